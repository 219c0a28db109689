"""Sentence pairs: two runs of sentences in one sequence, and whether the second one belongs there.

Next-sentence prediction (Devlin et al. 2019, arXiv:1810.04805): in half of the pairs the second part is replaced by
sentences of another document. Sentence order (Lan et al. 2020, arXiv:1909.11942): in half of them the parts change
places. Pieces hold whole sentences, and a replacement is the second part of another pair whose first part is about as
long, so neither how parts begin and end nor their lengths tell (lengths alone told 57% of the pairs of a 5M-word corpus
where replacements were filled up with any sentences, as BERT does). Every choice is a pure function of the
seed, the epoch and the piece. Shorter sequences early in training are the same pairs where their parts meet.

S sentences, N pieces, C sequences
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.randomness import Purpose, philox4x32, uniform
from encoderkit.pretrain.settings import Pairs

FOLLOWS, REPLACED = 0, 1  # labels, as in transformers: also right order, swapped
NO_PAIR = -100  # label of a piece of one sentence, which is no pair
TRIES = 16  # draws of a replacement that fits
NEAR = 64  # a replacement comes from one of so many pairs, whose first parts are about as long


@dataclass(frozen=True, eq=False)
class Parts:
    """Parts of sequences: (N,) int64, tokens start to stop of a document."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def __getitem__(self, pieces: np.ndarray) -> Parts:
        return Parts(self.document[pieces], self.start[pieces], self.stop[pieces])

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class PairParts:
    """What stands in each sequence of an epoch. The second part of a piece that is no pair is empty.

    labels: (N,) int64, FOLLOWS, REPLACED or NO_PAIR.
    """

    first: Parts
    second: Parts
    labels: np.ndarray

    def __getitem__(self, pieces: np.ndarray) -> PairParts:
        return PairParts(self.first[pieces], self.second[pieces], self.labels[pieces])

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens, special ones not counted."""
        return self.first.lengths + self.second.lengths


class SentencePairs:
    """Documents cut into pieces of whole sentences, and the pairs that these are in each epoch.

    sentence_lengths: of each document, (n,) tokens; a sentence longer than room fills pieces of its own. room: tokens
    of a pair. pieces: (N,) whole pieces in the order of the documents.
    Raises InputError when no piece has two sentences, or nsp has no other document to take sentences from.
    """

    def __init__(
        self, objective: Pairs, sentence_lengths: Iterable[np.ndarray], *, seed: int, room: int, source: str = "store"
    ) -> None:
        self.objective, self.seed, self.room = objective, seed, room
        lengths_of = [np.asarray(lengths, dtype=np.int64) for lengths in sentence_lengths]
        whole_S = np.concatenate([np.zeros(0, np.int64), *lengths_of])
        document_S = np.repeat(np.arange(len(lengths_of)), [len(lengths) for lengths in lengths_of])
        parts_S = -(-whole_S // room)  # a sentence of 0 tokens is left out
        begins = np.repeat(_before(parts_S), parts_S) == np.arange(int(parts_S.sum()))
        self._document = np.repeat(document_S, parts_S)
        place = np.arange(len(begins)) - np.repeat(_before(parts_S), parts_S)
        lengths_S = np.minimum(room, np.repeat(whole_S, parts_S) - place * room)
        self._stop = np.cumsum(lengths_S)  # tokens of the corpus up to the end of each sentence
        self._start = self._stop - lengths_S
        tokens_D = np.array([int(lengths.sum()) for lengths in lengths_of], dtype=np.int64)
        self._stop_D = np.cumsum(tokens_D)  # tokens of the corpus up to the end of each document
        self._start_D = self._stop_D - tokens_D
        self._heads = np.flatnonzero(begins)  # sentences, without the later parts of long ones
        self._heads_D = np.searchsorted(self._document[self._heads], np.arange(len(lengths_of) + 1))

        self._first = self._cut()  # (N,) first sentence of each piece
        self._count = np.diff(self._first, append=len(self._stop))  # (N,) sentences of each piece
        last = self._first + self._count - 1
        document = self._document[self._first]
        before = self._start_D[document]
        self.pieces = Parts(document, self._start[self._first] - before, self._stop[last] - before)
        if not (self._count > 1).any():
            raise InputError(
                f"pairs is {objective}, but no piece of the {source} holds two sentences; prepare it from documents of "
                "several sentences and with a language for its sentence splitter, or raise data.max_tokens"
            )
        if objective == "nsp" and len(np.unique(self._document)) < 2:
            raise InputError(
                f"pairs is nsp, but the {source} holds one document; expected at least two, for sentences that do not "
                "follow. Give it more documents, or set pairs sop"
            )

    def draw(self, epoch: int) -> PairParts:
        """The pairs of an epoch: all pieces in their order."""
        pieces, count = self.pieces, self._count
        words = self._words(epoch, 0)
        is_pair = count > 1
        inner = ((words[0] * np.maximum(count - 1, 1).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
        begin = np.where(is_pair, self._first + 1 + inner, self._first)  # the second part's first sentence
        cut = np.where(is_pair, self._start[begin] - self._start_D[pieces.document], pieces.stop)
        changed = is_pair & (uniform(words[1]) < 0.5)
        labels = np.where(is_pair, np.where(changed, REPLACED, FOLLOWS), NO_PAIR)
        first = Parts(pieces.document, pieces.start, cut)
        second = Parts(pieces.document, cut, pieces.stop)
        if self.objective == "nsp":
            return PairParts(first, self._replaced(first, second, changed, words[2], epoch), labels)
        swapped = Parts(pieces.document, np.where(changed, cut, first.start), np.where(changed, second.stop, cut))
        rest = Parts(pieces.document, np.where(changed, first.start, second.start), np.where(changed, cut, second.stop))
        return PairParts(swapped, rest, labels)

    def _replaced(self, first: Parts, second: Parts, changed: np.ndarray, random: np.ndarray, epoch: int) -> Parts:
        """The second parts, where changed those of other documents' pairs. random: (N,) orders pieces of equal length.

        A pair takes the second part of one whose first part is as long or a little longer: it fits, and lengths do not
        tell what was replaced.
        """
        document, start, stop = second.document.copy(), second.start.copy(), second.stop.copy()
        pairs = np.flatnonzero(self._count > 1)
        ranked = pairs[np.lexsort((random[pairs], first.lengths[pairs]))]
        rank = np.zeros(len(document), dtype=np.int64)
        rank[ranked] = np.arange(len(ranked))
        room = self.room - first.lengths
        open_ = np.flatnonzero(changed)
        for attempt in range(1, TRIES + 1):
            step = 1 + (self._words(epoch, attempt, open_)[0] & np.uint64(NEAR - 1)).astype(np.int64)
            other = ranked[(rank[open_] + step) % len(ranked)]
            fits = (second.lengths[other] <= room[open_]) & (second.document[other] != second.document[open_])
            into, other = open_[fits], other[fits]
            document[into], start[into], stop[into] = second.document[other], second.start[other], second.stop[other]
            open_ = open_[~fits]
        self._fill(Parts(document, start, stop), open_, second.document, room, epoch)
        return Parts(document, start, stop)

    def _fill(self, parts: Parts, open_: np.ndarray, own_N: np.ndarray, room: np.ndarray, epoch: int) -> None:
        """Write into these parts sentences of other documents, while they fit; for the few that found no pair."""
        for attempt in range(TRIES + 1, 2 * TRIES + 1):
            words = self._words(epoch, attempt, open_)
            own = self._heads_D[own_N[open_]], self._heads_D[own_N[open_] + 1]
            others = len(self._heads) - (own[1] - own[0])
            head = ((words[0] * others.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
            sentence = self._heads[head + (own[1] - own[0]) * (head >= own[0])]  # passing over the own document
            begin, limit = self._start[sentence], self._start[sentence] + room[open_]
            fits = self._stop[sentence] <= limit
            last = np.searchsorted(self._stop, limit, side="right") - 1
            end = np.where(fits, self._stop[last], limit)
            other = self._document[sentence]
            parts.document[open_], parts.start[open_] = other, begin - self._start_D[other]
            parts.stop[open_] = np.minimum(end, self._stop_D[other]) - self._start_D[other]
            open_ = open_[~fits]

    def _cut(self) -> np.ndarray:
        """(N,) first sentence of each piece: as many as fit, document by document."""
        document_stop = self._stop_D[self._document]
        limit = np.minimum(self._start + self.room, document_stop)
        following = np.searchsorted(self._stop, limit, side="right")  # the first sentence of the next piece
        is_piece = np.zeros(len(self._stop), dtype=bool)
        at = np.flatnonzero(np.diff(self._document, prepend=-1))
        while len(at):  # all documents at once, piece by piece
            is_piece[at] = True
            more = at[self._stop[following[at] - 1] < document_stop[at]]
            at = following[more]
        return np.flatnonzero(is_piece)

    def _words(self, epoch: int, attempt: int, pieces: np.ndarray | None = None) -> np.ndarray:
        """(4, n) random words for these pieces, or all."""
        numbers = np.arange(len(self._first)) if pieces is None else pieces
        return philox4x32((numbers, numbers >> 32, epoch, attempt), (self.seed, Purpose.PAIRS))


def cut_pairs(pairs: PairParts, room: int) -> PairParts:
    """The same tokens in shorter sequences: where two parts meet is the pair, what is left before and behind is none.

    room: tokens of a sequence; a pair has one less, for its third special token. What is no pair is cut in equal parts.
    Pairs of both labels are cut alike, so that cuts do not tell.
    """
    first_N, second_N = _meeting(pairs, room)
    first, second = pairs.first, pairs.second
    behind = Parts(second.document, second.start + second_N, second.stop)
    counts_N3 = _cut_counts(pairs, room)
    # C sequences, piece by piece: those before, the pair, those behind.
    part_C = np.repeat(np.arange(counts_N3.size), counts_N3.reshape(-1))
    piece_C, is_pair_C = part_C // 3, part_C % 3 == 1
    document_C, start_C, stop_C = (
        np.stack([getattr(first, name), getattr(first, name), getattr(behind, name)], axis=1).reshape(-1)[part_C]
        for name in ("document", "start", "stop")
    )
    meets_C = first.stop[piece_C] - first_N[piece_C]
    start_C = np.where(is_pair_C, meets_C, start_C)
    stop_C = np.where(part_C % 3 == 0, meets_C, stop_C)
    nth_C, of_C = np.arange(len(part_C)) - _before(counts_N3.reshape(-1))[part_C], counts_N3.reshape(-1)[part_C]
    begin_C, end_C = (start_C + k * (stop_C - start_C) // of_C for k in (nth_C, nth_C + 1))
    second_C = second[piece_C]
    taken_C = np.where(is_pair_C, second_N[piece_C], 0)
    return PairParts(
        Parts(document_C, begin_C, end_C),
        Parts(second_C.document, second_C.start, second_C.start + taken_C),
        np.where(is_pair_C, pairs.labels[piece_C], NO_PAIR),
    )


def cut_sizes(pairs: PairParts, room: int) -> np.ndarray:
    """(N,) tokens of what cut_pairs makes of each piece: two special ones a sequence, and one more in a pair."""
    counts_N3 = _cut_counts(pairs, room)
    return pairs.lengths + 2 * counts_N3.sum(1) + counts_N3[:, 1]


def _cut_counts(pairs: PairParts, room: int) -> np.ndarray:
    """(N, 3) sequences before each pair, the pair itself, and those behind it."""
    first_N, second_N = _meeting(pairs, room)
    before_N, behind_N = pairs.first.lengths - first_N, pairs.second.lengths - second_N
    return np.stack([-(-before_N // room), (pairs.labels != NO_PAIR).astype(np.int64), -(-behind_N // room)], axis=1)


def _meeting(pairs: PairParts, room: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) tokens at the end of the first part and at the beginning of the second that make the pair.

    Half of the room each, or more where the other part is short; none of a piece that is no pair.
    """
    is_pair, both = pairs.labels != NO_PAIR, room - 1
    first_N = np.minimum(pairs.first.lengths, np.maximum(-(-both // 2), both - pairs.second.lengths))
    second_N = np.minimum(pairs.second.lengths, both - first_N)
    return np.where(is_pair, first_N, 0), np.where(is_pair, second_N, 0)


def _before(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts
