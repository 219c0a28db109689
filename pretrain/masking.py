"""Which tokens are predicted, and what stands in their place.

Masked language modelling (Devlin et al. 2019, arXiv:1810.04805): of tokens, of whole words, or of spans of whole words
(Joshi et al. 2020, SpanBERT, arXiv:1907.10529). Every choice is a pure function of the seed, the epoch and the place in
the corpus, so it is the same in any process, batch or row. Vectorised over a micro-batch.

T tokens, P pieces, K tokens that may be selected, W words of them, M targets
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from encoderkit.pretrain.randomness import Purpose, philox4x32, uniform
from encoderkit.pretrain.settings import Masking, Select
from encoderkit.pretrain.tokenizer import TokenIds

POSITION_BITS, PIECE_BITS = 17, 19  # of a sort key; the other 28 are random
COUNT_PLACE = 0xFFFFFFFF  # counter of the draw that rounds a piece's number of targets; no token is there
SCORE_SHIFT = np.uint64(32 - (64 - POSITION_BITS - PIECE_BITS))
WORD_TOKENS = 16  # a longer word is selected in parts of this many tokens, which bounds the targets of a row
SPAN_WORDS, SPAN_STOP = 10, 0.2  # spans are of 1 to 10 words, geometric: 3.8 words on average


@dataclass(frozen=True, eq=False)
class Pieces:
    """Packed pieces. lengths: (P,) tokens, special ones too; epoch, document, start: (P,) where they are from."""

    lengths: np.ndarray
    epoch: np.ndarray
    document: np.ndarray
    start: np.ndarray


@dataclass(frozen=True, eq=False)
class Masked:
    """input_ids: (T,) with the selected replaced. positions: (M,) ascending. targets: (M,). counts: (P,) per piece."""

    input_ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    counts: np.ndarray


def mask_rows(
    ids: np.ndarray,
    pieces: Pieces,
    *,
    rate: float,
    seed: int,
    masking: Masking,
    tokens: TokenIds,
    word_starts: np.ndarray | None = None,
) -> Masked:
    """Select rate n of the n ordinary tokens of each piece, in expectation, and replace them.

    ids: (T,) int64, the pieces end to end. A piece with ordinary tokens has at least one target; special, unknown and
    unused ids are never selected nor inserted. masking: what is selected and the mask/random/keep split; its rates are
    not read. word_starts: (T,) bool, needed to select words or spans.
    """
    if masking.select == "token":
        positions, counts = select_targets(ids, pieces, rate=rate, seed=seed, is_ordinary=tokens.is_ordinary)
        heads = positions
    else:
        if word_starts is None:
            raise ValueError(f"selecting a {masking.select} needs word_starts")
        positions, counts, heads = select_words(
            ids,
            pieces,
            word_starts,
            rate=rate,
            seed=seed,
            is_ordinary=tokens.is_ordinary,
            spans=masking.select == "span",
        )
    piece_M = np.repeat(np.arange(len(counts)), counts)
    start_M = _starts(pieces.lengths)[piece_M]
    words = _draw(pieces, piece_M, positions - start_M, seed, Purpose.MASK_REPLACEMENT)
    u_M = uniform(words[0])
    if masking.select == "span":  # SpanBERT, section 3.1: a span is all [MASK], all random or all kept
        u_M = uniform(_draw(pieces, piece_M, heads - start_M, seed, Purpose.MASK_REPLACEMENT)[0])
    random_M = tokens.ordinary[(words[1] * np.uint64(len(tokens.ordinary))) >> np.uint64(32)]
    targets = ids[positions]
    mask_share, random_share = masking.shares
    replaced = np.where(u_M < mask_share + random_share, random_M, targets)
    replaced[u_M < mask_share] = tokens.mask
    input_ids = ids.copy()
    input_ids[positions] = replaced
    return Masked(input_ids, positions, targets, counts)


def select_targets(
    ids: np.ndarray,
    pieces: Pieces,
    *,
    rate: float,
    seed: int,
    is_ordinary: np.ndarray,
    purpose: Purpose = Purpose.MASK_CHOICE,
) -> tuple[np.ndarray, np.ndarray]:
    """(positions (M,) ascending, targets of each piece (P,)): the tokens with the smallest random scores of each piece.

    Of n ordinary tokens floor(rate n + u) are selected, u uniform, at least one. is_ordinary: (V,) bool, which ids may
    be selected.
    """
    num_pieces, starts = len(pieces.lengths), _starts(pieces.lengths)
    _, piece_K, offset_K = _selectable(ids, pieces, is_ordinary)
    # Sorting whole keys (piece, score, offset) is quicker than an argsort, and has no ties.
    key_K = _keys(piece_K, _scores(pieces, piece_K, offset_K, seed, purpose), offset_K)
    key_K.sort()
    available_P = _counts(piece_K, num_pieces)
    counts = _budgets(pieces, available_P, rate, seed, purpose)
    rank_K = np.arange(len(key_K)) - np.repeat(_starts(available_P), available_P)
    chosen = key_K[rank_K < np.repeat(counts, available_P)]
    offset_M = (chosen & np.uint64((1 << POSITION_BITS) - 1)).astype(np.int64)
    positions = starts[(chosen >> np.uint64(64 - PIECE_BITS)).astype(np.int64)] + offset_M
    positions.sort()
    return positions, counts


def select_words(
    ids: np.ndarray,
    pieces: Pieces,
    word_starts: np.ndarray,
    *,
    rate: float,
    seed: int,
    is_ordinary: np.ndarray,
    spans: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As select_targets, but all tokens of a word or none; spans: words that follow each other.

    Gives also (M,) the position of the first token of each target's word or span.

    Words, or spans word by word, are taken in random order up to the budget of tokens. The word that crosses it is
    taken with the probability that keeps the expectation; the first word always is.
    """
    num_pieces = len(pieces.lengths)
    at_K, piece_K, offset_K = _selectable(ids, pieces, is_ordinary)
    head_W = _word_heads(np.cumsum(word_starts)[at_K] + piece_K)
    piece_W, offset_W, size_W = piece_K[head_W], offset_K[head_W], np.diff(head_W, append=len(at_K))
    score_W = _scores(pieces, piece_W, offset_W, seed, Purpose.MASK_CHOICE)
    head_U = np.arange(len(head_W))  # units that are taken in order: words, or spans with the score of their first word
    if spans:
        u_W = uniform(_scores(pieces, piece_W, offset_W, seed, Purpose.SPAN_LENGTH))
        head_U = np.flatnonzero(span_starts(span_lengths(u_W), _counts(piece_W, num_pieces)))

    piece_U, size_U = piece_W[head_U], np.diff(head_W[head_U], append=len(at_K))
    units_P = _counts(piece_U, num_pieces)
    first_U = _starts(units_P)[piece_U]  # the first unit of each unit's piece
    key_U = _keys(piece_U, score_W[head_U], np.arange(len(head_U)) - first_U)
    key_U.sort()
    # piece_U and first_U are ascending, so they are those of the sorted units too.
    sorted_U = first_U + (key_U & np.uint64((1 << POSITION_BITS) - 1)).astype(np.int64)
    before_U = _starts_within(size_U[sorted_U], units_P)  # tokens that are taken before
    budgets = _budgets(pieces, _counts(piece_K, num_pieces), rate, seed, Purpose.MASK_CHOICE)

    # C words of the B units that begin within the budget. A random token of each, by bits of its score that hardly
    # order it, must lie within the budget too.
    begun_U = before_U < budgets[piece_U]
    unit_B, before_B = sorted_U[begun_U], before_U[begun_U]
    words_B = np.diff(head_U, append=len(head_W))[unit_B]
    word_C = np.repeat(head_U[unit_B] - _starts(words_B), words_B) + np.arange(words_B.sum())
    before_C = np.repeat(before_B - head_W[head_U[unit_B]], words_B) + head_W[word_C]
    token_C = ((score_W[word_C] & np.uint64(0xFFFF)).astype(np.int64) * size_W[word_C]) >> 16
    is_chosen_W = np.zeros(len(head_W), dtype=bool)
    is_chosen_W[word_C] = before_C + token_C * (before_C > 0) < budgets[piece_W[word_C]]
    chosen_K = np.flatnonzero(np.repeat(is_chosen_W, size_W))
    head_K = np.repeat(head_W[head_U], size_U)[chosen_K]  # size_U sums to all K tokens
    return at_K[chosen_K], _counts(piece_K[chosen_K], num_pieces), at_K[head_K]


def span_lengths(u: np.ndarray) -> np.ndarray:
    """Words of a span for u uniform in [0, 1): P(n) proportional to 0.8^n, n from 1 to 10."""
    lengths = np.ones(len(u), dtype=np.int8)
    for end in _SPAN_ENDS:  # a third of the time of searchsorted
        lengths += u >= end
    return lengths.astype(np.int64)


_SPAN_ENDS = np.cumsum((1 - SPAN_STOP) ** np.arange(SPAN_WORDS))[:-1] / np.sum((1 - SPAN_STOP) ** np.arange(SPAN_WORDS))


def span_starts(lengths: np.ndarray, words: np.ndarray) -> np.ndarray:
    """(W,) bool: the words that begin a span, where the words of each piece are cut into spans of these lengths.

    lengths: (W,) of which a piece uses as many as it needs. words: (P,) words of each piece.
    """
    begin_W = _starts_within(lengths, words)  # word of the piece
    begins = begin_W < np.repeat(words, words)
    marks = np.zeros(len(lengths), dtype=bool)
    marks[(np.repeat(_starts(words), words) + begin_W)[begins]] = True
    return marks


def most_targets(rate: float, row_tokens: int, max_pieces: int, select: Select = "token") -> int:
    """The most targets that a row can have, whatever its pieces.

    Of n tokens at most rate n + 1 are selected, and the rest of the last word.
    """
    more = 1 if select == "token" else WORD_TOKENS
    most = max(rate * (row_tokens - 2 * p) + more * p for p in (1, max_pieces))
    return min(int(np.ceil(most)), row_tokens - 2)


def _selectable(ids: np.ndarray, pieces: Pieces, is_ordinary: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position (K,), piece (K,) and offset in the piece (K,) of the tokens that may be selected."""
    num_pieces = len(pieces.lengths)
    if num_pieces >= 1 << PIECE_BITS or (num_pieces and int(pieces.lengths.max()) >= 1 << POSITION_BITS):
        raise ValueError(f"a batch holds at most {1 << PIECE_BITS} pieces of {1 << POSITION_BITS} tokens")
    piece_T = np.repeat(np.arange(num_pieces), pieces.lengths)
    at_K = np.flatnonzero(is_ordinary[ids])
    piece_K = piece_T[at_K]
    return at_K, piece_K, at_K - _starts(pieces.lengths)[piece_K]


def _word_heads(word_K: np.ndarray) -> np.ndarray:
    """(W,) the first token of each word, or of each part of a long one; word_K: ascending, the same within a word."""
    is_head = np.ones(len(word_K), dtype=bool)
    is_head[1:] = word_K[1:] != word_K[:-1]
    heads = np.flatnonzero(is_head)
    sizes = np.diff(heads, append=len(word_K))
    if sizes.max(initial=0) > WORD_TOKENS:
        is_head |= (np.arange(len(word_K)) - np.repeat(heads, sizes)) % WORD_TOKENS == 0
        heads = np.flatnonzero(is_head)
    return heads


def _keys(piece: np.ndarray, score: np.ndarray, place: np.ndarray) -> np.ndarray:
    """uint64 that sort by piece, then score, then place."""
    key = (piece.astype(np.uint64) << np.uint64(64 - PIECE_BITS)) | place.astype(np.uint64)
    key |= (score >> SCORE_SHIFT) << np.uint64(POSITION_BITS)
    return key


def _budgets(pieces: Pieces, available_P: np.ndarray, rate: float, seed: int, purpose: Purpose) -> np.ndarray:
    """(P,) tokens to select: floor(rate n + u), at least one of any."""
    u_P = uniform(_draw(pieces, np.arange(len(available_P)), COUNT_PLACE, seed, purpose)[0])
    return np.clip(np.floor(rate * available_P + u_P).astype(np.int64), np.minimum(available_P, 1), available_P)


def _scores(pieces: Pieces, piece: np.ndarray, offset: np.ndarray, seed: int, purpose: Purpose) -> np.ndarray:
    """A random word for a token of each piece; one Philox block serves four neighbouring tokens."""
    blocks_P = -(-pieces.lengths // 4)
    first_P = _starts(blocks_P)
    block_piece = np.repeat(np.arange(len(blocks_P)), blocks_P)
    block = np.arange(len(block_piece)) - first_P[block_piece]
    words = _draw(pieces, block_piece, block, seed, purpose)
    return words.T.reshape(-1)[4 * first_P[piece] + offset]


def _draw(pieces: Pieces, piece: np.ndarray, place: ArrayLike, seed: int, purpose: Purpose) -> np.ndarray:
    """(4, N) random words at a place of each piece."""
    return philox4x32((place, pieces.start[piece], pieces.document[piece], pieces.epoch[piece]), (seed, purpose))


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


def _starts_within(lengths: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Where each begins, counted from the first one of its piece; numbers: (P,) how many a piece has."""
    starts = _starts(lengths)
    some = numbers > 0
    starts -= np.repeat(starts[_starts(numbers)[some]], numbers[some])
    return starts


def _counts(piece: np.ndarray, num_pieces: int) -> np.ndarray:
    """(P,) how often each piece occurs; piece: ascending."""
    return np.diff(np.searchsorted(piece, np.arange(num_pieces + 1)))
