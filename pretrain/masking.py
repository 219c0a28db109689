"""Which tokens are predicted, and what stands in their place.

Masked language modelling (Devlin et al. 2019, arXiv:1810.04805). Every choice is a pure function of the seed, the
epoch and the place in the corpus, so it is the same in any process, batch or row. Vectorised over a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from encoderkit.pretrain.randomness import Purpose, philox4x32, uniform
from encoderkit.pretrain.settings import Masking
from encoderkit.pretrain.tokenizer import TokenIds

POSITION_BITS, PIECE_BITS = 17, 19  # of a sort key; the other 28 are random
COUNT_PLACE = 0xFFFFFFFF  # counter of the draw that rounds a piece's number of targets; no token is there
SCORE_SHIFT = np.uint64(32 - (64 - POSITION_BITS - PIECE_BITS))


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


def mask_rows(ids: np.ndarray, pieces: Pieces, *, rate: float, seed: int, masking: Masking, tokens: TokenIds) -> Masked:
    """Select floor(rate n + u) of the n ordinary tokens of each piece, u uniform, and replace them.

    ids: (T,) int64, the pieces end to end. A piece with ordinary tokens has at least one target; special, unknown and
    unused ids are never selected nor inserted. masking: the mask/random/keep split; its rates are not read.
    """
    positions, counts = select_targets(ids, pieces, rate=rate, seed=seed, is_ordinary=tokens.is_ordinary)
    piece_M = np.repeat(np.arange(len(counts)), counts)
    offset_M = positions - _starts(pieces.lengths)[piece_M]
    words = _draw(pieces, piece_M, offset_M, seed, Purpose.MASK_REPLACEMENT)
    u_M = uniform(words[0])
    random_M = tokens.ordinary[(words[1] * np.uint64(len(tokens.ordinary))) >> np.uint64(32)]
    targets = ids[positions]
    replaced = np.where(u_M < masking.mask_share + masking.random_share, random_M, targets)
    replaced[u_M < masking.mask_share] = tokens.mask
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

    is_ordinary: (V,) bool, which ids may be selected.
    """
    num_pieces = len(pieces.lengths)
    if num_pieces >= 1 << PIECE_BITS or (num_pieces and int(pieces.lengths.max()) >= 1 << POSITION_BITS):
        raise ValueError(f"a batch holds at most {1 << PIECE_BITS} pieces of {1 << POSITION_BITS} tokens")
    starts = _starts(pieces.lengths)
    piece_T = np.repeat(np.arange(num_pieces), pieces.lengths)
    at_K = np.flatnonzero(is_ordinary[ids])  # K tokens that may be selected
    piece_K = piece_T[at_K]
    offset_K = at_K - starts[piece_K]

    # One Philox block scores four neighbouring tokens.
    blocks_P = -(-pieces.lengths // 4)
    first_P = np.cumsum(blocks_P) - blocks_P
    block_piece = np.repeat(np.arange(num_pieces), blocks_P)
    block = np.arange(len(block_piece)) - first_P[block_piece]
    words = _draw(pieces, block_piece, block, seed, purpose)
    score_K = words.T.reshape(-1)[4 * first_P[piece_K] + offset_K]

    # Sorting whole keys (piece, score, offset) is quicker than an argsort, and has no ties.
    key_K = (piece_K.astype(np.uint64) << np.uint64(64 - PIECE_BITS)) | offset_K.astype(np.uint64)
    key_K |= (score_K >> SCORE_SHIFT) << np.uint64(POSITION_BITS)
    key_K.sort()
    available_P = np.bincount(piece_K, minlength=num_pieces)
    u_P = uniform(_draw(pieces, np.arange(num_pieces), COUNT_PLACE, seed, purpose)[0])
    counts = np.clip(np.floor(rate * available_P + u_P).astype(np.int64), np.minimum(available_P, 1), available_P)
    rank_K = np.arange(len(key_K)) - np.repeat(np.cumsum(available_P) - available_P, available_P)
    chosen = key_K[rank_K < np.repeat(counts, available_P)]
    offset_M = (chosen & np.uint64((1 << POSITION_BITS) - 1)).astype(np.int64)
    positions = starts[(chosen >> np.uint64(64 - PIECE_BITS)).astype(np.int64)] + offset_M
    positions.sort()
    return positions, counts


def most_targets(rate: float, row_tokens: int, max_pieces: int) -> int:
    """The most targets that a row can have, whatever its pieces: of n tokens at most rate n + 1 are selected."""
    most = max(rate * (row_tokens - 2 * p) + p for p in (1, max_pieces))
    return min(int(np.ceil(most)), row_tokens - 2)


def _draw(pieces: Pieces, piece: np.ndarray, place: ArrayLike, seed: int, purpose: Purpose) -> np.ndarray:
    """(4, N) random words at a place of each piece."""
    return philox4x32((place, pieces.start[piece], pieces.document[piece], pieces.epoch[piece]), (seed, purpose))


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths
