"""Which tokens stand in which row: a pure function of the seed and the row's number.

Documents are cut into pieces that fit a sequence; nothing is dropped, but for what next-sentence prediction replaces
(encoderkit.pretrain.pairs, which then cuts at sentences). Each epoch the pieces are shuffled, not the
documents, so that one batch holds pieces of many documents, and packed into rows: in shuffled order while they fit,
then the best-fitting pieces among the next ones close the row (best fit in a window; Krell et al. 2021,
arXiv:2107.02027). Rows go on from epoch to epoch without end, so resuming is arithmetic. Shorter sequences early in
training are the same rows with their pieces cut again, so that no token is seen twice where lengths change.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.pairs import PairParts, Parts, SentencePairs, cut_pairs, cut_sizes
from encoderkit.pretrain.randomness import Purpose, philox4x32

NUM_SPECIAL_TOKENS = 2  # [CLS] and [SEP] around each piece; a pair has one more [SEP] in between
WINDOW = 4096  # pieces ahead among which the best fit is looked for
BUCKET = 32  # tokens; sequences are padded to multiples of it where they are not packed


@dataclass(frozen=True, eq=False)
class Row:
    """The pieces of one row. document, start, stop: (P,) int64, piece p is tokens start to stop of its document.

    pairs: what stands in each piece's sequence where there are sentence pairs; first is document, start, stop.
    """

    epoch: int
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    pairs: PairParts | None = None

    @property
    def lengths(self) -> np.ndarray:
        """(P,) tokens of each sequence, special ones counted in."""
        if self.pairs is None:
            return self.stop - self.start + NUM_SPECIAL_TOKENS
        return pair_sizes(self.pairs)

    @property
    def num_tokens(self) -> int:
        """Tokens of the row that are not padding, [CLS] and [SEP] counted in."""
        return int(self.lengths.sum())

    def cut(self, max_tokens: int) -> Row:
        """The same tokens in sequences of at most max_tokens, special ones counted in: each piece in equal parts.

        A pair stays one where its parts meet; see cut_pairs.
        """
        if self.pairs is not None:
            pairs = cut_pairs(self.pairs, max_tokens - NUM_SPECIAL_TOKENS)
            first = pairs.first
            return replace(self, document=first.document, start=first.start, stop=first.stop, pairs=pairs)
        lengths_P = self.stop - self.start
        counts_P = -(-lengths_P // (max_tokens - NUM_SPECIAL_TOKENS))
        piece = np.repeat(np.arange(len(counts_P)), counts_P)
        nth = np.arange(len(piece)) - (np.cumsum(counts_P) - counts_P)[piece]
        start, stop = (self.start[piece] + k * lengths_P[piece] // counts_P[piece] for k in (nth, nth + 1))
        return replace(self, document=self.document[piece], start=start, stop=stop)


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """An epoch's rows. pieces: (N,) int64 piece numbers in the order of the rows; row_starts: (rows + 1,) int64."""

    epoch: int
    pieces: np.ndarray
    row_starts: np.ndarray
    pairs: PairParts | None = None  # of all pieces, by piece number

    def __len__(self) -> int:
        return len(self.row_starts) - 1


class Order:
    """The endless stream of rows over documents of these lengths.

    lengths: (documents,) tokens without special ones. max_tokens: longest sequence, special tokens counted in.
    shortest: the smallest max_tokens that rows are cut again for; they have room for its special tokens. row_tokens:
    length of a row. layout: packed, or padded: rows of equally long sequences (see padded_length). max_pieces: the most
    pieces that one row holds. pairs: the pieces and their pairs, cut for max_tokens.
    Raises InputError when there is nothing to order, or a piece does not fit a row.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        seed: int,
        max_tokens: int,
        row_tokens: int,
        shortest: int | None = None,
        layout: Literal["packed", "padded"] = "packed",
        pairs: SentencePairs | None = None,
    ) -> None:
        if max_tokens <= NUM_SPECIAL_TOKENS or row_tokens < max_tokens:
            raise InputError(
                f"max_tokens is {max_tokens} and row_tokens {row_tokens}; expected "
                f"{NUM_SPECIAL_TOKENS} < max_tokens <= row_tokens"
            )
        lengths_D = np.asarray(lengths, dtype=np.int64)
        if not lengths_D.any():
            raise InputError(f"the store holds {len(lengths_D)} documents without tokens; prepare it from other text")
        self.seed, self.max_tokens, self.row_tokens, self.pairs = seed, max_tokens, row_tokens, pairs
        self.layout, self.shortest = layout, shortest or max_tokens
        room = self.shortest - NUM_SPECIAL_TOKENS
        if pairs is None:
            cut = cut_documents(lengths_D, longest_piece(max_tokens, self.shortest))
            sizes = cut.lengths + NUM_SPECIAL_TOKENS * -(-cut.lengths // room)
        else:
            cut = pairs.pieces
            sizes = cut.lengths + NUM_SPECIAL_TOKENS + 1  # about: an epoch draws its own pairs
            largest = most_cut_tokens(pairs.room, room)
            if largest > row_tokens:
                raise InputError(
                    f"row_tokens is {row_tokens}; expected at least {largest}, so that pairs of {max_tokens} "
                    f"tokens cut to {shortest} by the curriculum have room for all their [CLS] and [SEP]"
                )
        self.document, self.start, self.stop = cut.document, cut.start, cut.stop  # (N,) of each piece
        # Twice the mean: a bound that rows hardly ever meet, and that keeps the fixed shapes on a GPU small.
        self.max_pieces = min(
            row_tokens // (NUM_SPECIAL_TOKENS + 1), 2 * -(-row_tokens * len(sizes) // int(sizes.sum()))
        )
        if layout == "padded":
            self.max_pieces = row_tokens // min(BUCKET, max_tokens)
        self.sizes = sizes.astype(np.int32)  # (N,) tokens of each piece, special ones too
        self.ends: list[int] = []  # rows up to the end of each epoch that was planned; given back, they are not again
        self._plan: EpochPlan | None = None

    def __getstate__(self) -> dict:
        return {**vars(self), "_plan": None}

    @cached_property
    def fingerprint(self) -> str:
        """What the rows are a function of; where it is another one, ends are not this order's."""
        how = (self.seed, self.max_tokens, self.shortest, self.row_tokens, self.layout)
        objective = None if self.pairs is None else self.pairs.objective
        parts = hashlib.sha256(repr((*how, objective)).encode())
        for part in (self.document, self.start, self.stop):
            parts.update(part.tobytes())
        return parts.hexdigest()

    @property
    def num_pieces(self) -> int:
        """Pieces in an epoch."""
        return len(self.document)

    def epoch(self, epoch: int) -> EpochPlan:
        """The rows of one epoch; the last one asked for is kept."""
        if self._plan is None or self._plan.epoch != epoch:
            shuffled = np.argsort(self._keys(epoch), kind="stable")
            pairs = None if self.pairs is None else self.pairs.draw(epoch)
            sizes = self.sizes if pairs is None else self._pair_sizes(pairs)
            if self.layout == "packed":
                pieces, starts = pack_rows(sizes[shuffled], self.row_tokens, self.max_pieces)
            else:
                pieces, starts = pad_rows(padded_length(sizes[shuffled], self.max_tokens), self.row_tokens)
            self._plan = EpochPlan(epoch, shuffled[pieces], starts, pairs)
        return self._plan

    def rows(self, first: int, count: int) -> list[Row]:
        """Rows first to first + count of the endless stream: epoch 0's rows, then epoch 1's, and so on."""
        rows: list[Row] = []
        while len(rows) < count:
            epoch, index = self._locate(first + len(rows))
            plan = self.epoch(epoch)
            for row in range(index, min(len(plan), index + count - len(rows))):
                pieces = plan.pieces[plan.row_starts[row] : plan.row_starts[row + 1]]
                if plan.pairs is None:
                    rows.append(Row(epoch, self.document[pieces], self.start[pieces], self.stop[pieces]))
                else:
                    pairs = plan.pairs[pieces]
                    rows.append(Row(epoch, pairs.first.document, pairs.first.start, pairs.first.stop, pairs))
        return rows

    def _pair_sizes(self, pairs: PairParts) -> np.ndarray:
        """(N,) tokens of each pair, with room for the special ones of the shortest sequences."""
        cut = self.shortest < self.max_tokens
        return cut_sizes(pairs, self.shortest - NUM_SPECIAL_TOKENS) if cut else pair_sizes(pairs)

    def _locate(self, row: int) -> tuple[int, int]:
        """Epoch of a row, and its number within the epoch."""
        while not self.ends or self.ends[-1] <= row:
            self.ends.append((self.ends[-1] if self.ends else 0) + len(self.epoch(len(self.ends))))
        epoch = int(np.searchsorted(self.ends, row, side="right"))
        return epoch, row - (self.ends[epoch - 1] if epoch else 0)

    def _keys(self, epoch: int) -> np.ndarray:
        """(N,) uint64 sort keys; numpy's own permutations may change between its versions, these do not."""
        blocks = np.arange(-(-self.num_pieces // 2), dtype=np.uint64)
        words = philox4x32((blocks, blocks >> np.uint64(32), epoch, 0), (self.seed, Purpose.PIECE_ORDER))
        keys = (words[0::2] << np.uint64(32)) | words[1::2]  # (2, blocks)
        return keys.T.reshape(-1)[: self.num_pieces]


def longest_piece(max_tokens: int, shortest: int) -> int:
    """The most tokens that have room in max_tokens with the special ones of sequences of shortest tokens.

    >>> longest_piece(512, 512), longest_piece(512, 128), longest_piece(512, 100)
    (510, 504, 500)
    """
    whole, rest = divmod(max_tokens, shortest)
    return whole * (shortest - NUM_SPECIAL_TOKENS) + max(0, rest - NUM_SPECIAL_TOKENS)


def cut_documents(lengths: np.ndarray, room: int) -> Parts:
    """Documents of these lengths cut into pieces of room tokens; the last one of each is what is left."""
    counts_D = -(-lengths // room)
    document = np.repeat(np.arange(len(lengths)), counts_D)
    first_D = np.cumsum(counts_D) - counts_D
    start = (np.arange(len(document)) - first_D[document]) * room
    return Parts(document, start, np.minimum(start + room, lengths[document]))


def pair_sizes(pairs: PairParts) -> np.ndarray:
    """(N,) tokens of [CLS] A [SEP] B [SEP], or of [CLS] A [SEP] where there is no B."""
    return pairs.lengths + NUM_SPECIAL_TOKENS + (pairs.second.lengths > 0)


def most_cut_tokens(length: int, room: int) -> int:
    """The most tokens of a pair of this length that is cut for sequences of room tokens, special ones counted in."""
    left = length - (room - 1)
    sequences = min(left, 2 + (left - 2) // room) if left > 0 else 0
    return length + NUM_SPECIAL_TOKENS + 1 + NUM_SPECIAL_TOKENS * sequences


def pack_rows(sizes: np.ndarray, row_tokens: int, max_pieces: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack pieces into rows, near their order; returns (pieces in the order of the rows, row starts).

    sizes: (N,) tokens of each piece, none above row_tokens. Every piece is in exactly one row, no row is over
    row_tokens or max_pieces. About 1 microsecond a piece.
    """
    size_of = array("i", sizes.astype(np.int32).tobytes())  # a list would hold an object for each number
    total = len(size_of)
    used = bytearray(total)
    by_size: list[list[int]] = [[] for _ in range(row_tokens + 1)]  # unused pieces of the window, by size
    present = 0  # bit s is set when by_size[s] may hold pieces
    seen = at = 0  # the window is at..seen
    order, starts = array("q"), array("q", [0])
    while len(order) < total:
        room, most = row_tokens, len(order) + max_pieces
        for piece in range(seen, min(total, at + WINDOW)):
            if not used[piece]:
                by_size[size_of[piece]].append(piece)
                present |= 1 << size_of[piece]
        seen = max(seen, min(total, at + WINDOW))
        while at < total and (used[at] or size_of[at] <= room) and len(order) < most:
            if not used[at]:
                used[at] = 1
                room -= size_of[at]
                order.append(at)
            at += 1
        while len(order) < most:
            fitting = present & ((2 << room) - 1)
            if not fitting:
                break
            size = fitting.bit_length() - 1
            pieces = by_size[size]
            while pieces and used[pieces[-1]]:
                pieces.pop()
            if pieces:
                piece = pieces.pop()
                used[piece] = 1
                room -= size
                order.append(piece)
            else:
                present &= ~(1 << size)
        starts.append(len(order))
    return np.array(order, dtype=np.int64), np.array(starts, dtype=np.int64)


def padded_length(sizes: np.ndarray, max_tokens: int) -> np.ndarray:
    """(N,) tokens that sequences of these sizes are padded to: the next multiple of BUCKET, at most max_tokens."""
    return np.minimum(-(-sizes // BUCKET) * BUCKET, max_tokens)


def pad_rows(padded: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of sequences that are padded to the same length, as pack_rows returns them.

    padded: (N,) length of each sequence with its padding. A row is where its last sequence was; the rows that stay
    unfilled come wherever that was, too.
    """
    by_length = np.argsort(padded, kind="stable")
    starts = []
    for length in np.unique(padded):
        first, last = np.searchsorted(padded[by_length], [length, length + 1])
        starts.append(np.arange(first, last, row_tokens // length))
    bounds = np.append(np.concatenate(starts), len(padded))
    rows = np.argsort(by_length[bounds[1:] - 1], kind="stable")
    counts = np.diff(bounds)[rows]
    ends = np.cumsum(counts)
    within = np.arange(len(padded)) - np.repeat(ends - counts, counts)
    return by_length[np.repeat(bounds[rows], counts) + within], np.append(0, ends)
