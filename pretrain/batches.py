"""Micro-batches of an optimizer step, built from the store by the order: arithmetic, without state.

Step i takes rows [i R, (i + 1) R) of the endless stream, R = batch_tokens / row_tokens; rank r of W takes the r-th
contiguous share. Loader workers only build ahead: their number changes nothing.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from encoderkit.encoder.batch import IGNORE_INDEX, TokenBatch
from encoderkit.kernels.errors import InputError
from encoderkit.kernels.segments import Segments
from encoderkit.pretrain.masking import Pieces, mask_rows, most_targets
from encoderkit.pretrain.order import Order, Row
from encoderkit.pretrain.pairs import NO_PAIR, PairParts, Parts
from encoderkit.pretrain.settings import PretrainSettings
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.tokenizer import TokenIds

PREFETCH = 4  # steps that each worker builds ahead


@dataclass(frozen=True)
class StepCounts:
    """What one step holds over all ranks. tokens: not padding, special ones counted in. row_tokens: padding too."""

    tokens: int
    row_tokens: int
    sequences: int

    @property
    def padding(self) -> float:
        """Share of the row tokens that is padding."""
        return 1 - self.tokens / self.row_tokens


@dataclass(frozen=True)
class _Plain:
    """A micro-batch as arrays, which cross from a worker through a pipe, not through shared memory."""

    ids: np.ndarray  # (T,)
    lengths: np.ndarray  # (S,)
    positions: np.ndarray  # (M,)
    targets: np.ndarray  # (M,)
    counts: np.ndarray  # (S,) read positions of each segment
    longest: int | None
    types: np.ndarray | None = None  # (T,) token types
    pair_reads: np.ndarray | None = None  # (R,) which of the M positions are the first tokens of pairs
    pair_labels: np.ndarray | None = None  # (R,)

    def narrow(self) -> _Plain:
        """The same arrays, as int32."""
        parts: dict[str, Any] = {}
        for name, part in vars(self).items():
            parts[name] = part.astype(np.int32) if isinstance(part, np.ndarray) else part
        return _Plain(**parts)

    def to_batch(self) -> TokenBatch:
        starts = np.cumsum(self.lengths) - self.lengths
        return TokenBatch(
            input_ids=torch.from_numpy(self.ids.astype(np.int64)),
            segments=Segments.from_lengths(torch.from_numpy(self.lengths), longest=self.longest),
            position_ids=torch.from_numpy(np.arange(len(self.ids)) - np.repeat(starts, self.lengths)),
            target_positions=torch.from_numpy(self.positions.astype(np.int64)),
            target_segments=Segments.from_lengths(
                torch.from_numpy(self.counts), longest=None if self.longest is None else len(self.positions)
            ),
            targets=torch.from_numpy(self.targets.astype(np.int64)),
            token_type_ids=_long(self.types),
            pair_reads=_long(self.pair_reads),
            pair_labels=_long(self.pair_labels),
        )


def _long(array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array.astype(np.int64))


class StepBatches(Dataset):
    """dataset[step]: this rank's micro-batches of that step, CPU tensors.

    rate_at: masking rate of a step. static_shapes: every micro-batch has the same T, M, S, R and longest: pad tokens
    fill each row; empty segments, ignored targets at T - 1 and ignored pairs follow. Else the unfilled tails are left
    out and shapes vary.
    Raises InputError when the ranks cannot share the rows of a step equally.
    """

    def __init__(
        self,
        store: Store,
        order: Order,
        settings: PretrainSettings,
        tokens: TokenIds,
        rate_at: Callable[[int], float],
        *,
        rank: int = 0,
        world_size: int = 1,
        static_shapes: bool = False,
    ) -> None:
        self.store, self.order, self.tokens, self.rate_at = store, order, tokens, rate_at
        self.seed, self.masking, self.static_shapes = settings.seed, settings.masking, static_shapes
        self.step_rows = settings.batch_tokens // order.row_tokens
        if self.step_rows % world_size:
            raise InputError(
                f"batch_tokens {settings.batch_tokens} is {self.step_rows} rows of {order.row_tokens} tokens, which "
                f"{world_size} ranks cannot share equally; expected a multiple of {world_size * order.row_tokens}"
            )
        self.rank_rows = self.step_rows // world_size
        self.first_row = rank * self.rank_rows
        self.micro_rows = min(self.rank_rows, settings.micro_batch_tokens // order.row_tokens)
        rates = [r for r in (settings.masking.rate, settings.masking.final_rate) if r is not None]
        row_pads = -(-order.row_tokens // order.max_tokens)
        self.max_segments = self.micro_rows * (order.max_pieces + row_pads)
        self.max_pairs = self.micro_rows * order.max_pieces if order.pairs else 0
        self.max_reads = self.max_pairs + self.micro_rows * max(
            most_targets(rate, order.row_tokens, order.max_pieces, settings.masking.select) for rate in rates
        )

    def __getitem__(self, step: int) -> list[TokenBatch]:
        return [plain.to_batch() for plain in self.plain(step)]

    def counts(self, step: int) -> StepCounts:
        """Tokens and padding of a step over all ranks, from the order alone."""
        rows = self.order.rows(step * self.step_rows, self.step_rows)
        real = sum(row.num_tokens for row in rows)
        return StepCounts(real, self.step_rows * self.order.row_tokens, sum(len(row.start) for row in rows))

    def plain(self, step: int) -> list[_Plain]:
        """The micro-batches as arrays."""
        rate = self.rate_at(step)
        rows = self.order.rows(step * self.step_rows + self.first_row, self.rank_rows)
        return [self._build(rows[i : i + self.micro_rows], rate) for i in range(0, len(rows), self.micro_rows)]

    def _build(self, rows: list[Row], rate: float) -> _Plain:
        document, start = (np.concatenate([getattr(r, name) for r in rows]) for name in ("document", "start"))
        epoch = np.repeat([row.epoch for row in rows], [len(row.start) for row in rows])
        lengths = np.concatenate([row.lengths for row in rows])
        ends = np.cumsum(lengths)
        begins = ends - lengths
        ids = np.full(int(lengths.sum()), self.tokens.sep, dtype=np.int64)
        ids[begins] = self.tokens.cls
        word_starts = None if self.masking.select == "token" else np.ones(len(ids), dtype=bool)
        pairs = _all_pairs(rows)
        if pairs is None:
            stop = np.concatenate([row.stop for row in rows])
            self._copy(Parts(document, start, stop), begins + 1, ids, word_starts)
        else:
            self._copy(pairs.first, begins + 1, ids, word_starts)
            self._copy(pairs.second, ends - 1 - pairs.second.lengths, ids, word_starts)
        masked = mask_rows(
            ids,
            Pieces(lengths, epoch, document, start),
            rate=rate,
            seed=self.seed,
            masking=self.masking,
            tokens=self.tokens,
            word_starts=word_starts,
        )
        plain = _Plain(masked.input_ids, lengths, masked.positions, masked.targets, masked.counts, longest=None)
        if pairs is not None:
            plain = _with_pairs(plain, pairs, begins)
        if self.static_shapes:
            plain = self._padded(rows, plain)
        return plain.narrow()

    def _copy(self, parts: Parts, at_P: np.ndarray, ids_T: np.ndarray, word_starts_T: np.ndarray | None) -> None:
        """Write the tokens of these parts at these places, and where words start but for each part's first."""
        bounds = zip(parts.document.tolist(), parts.start.tolist(), parts.stop.tolist(), at_P.tolist())
        for document, start, stop, at in bounds:
            ids_T[at : at + stop - start] = self.store.tokens(document)[start:stop]
            if word_starts_T is not None and stop > start:
                word_starts_T[at + 1 : at + stop - start] = self.store.word_starts(document, start + 1, stop)

    def _padded(self, rows: list[Row], plain: _Plain) -> _Plain:
        """Spread the packed rows over rows of full length and pad every shape to its bound."""
        row_tokens, longest = self.order.row_tokens, self.order.max_tokens
        real = [row.num_tokens for row in rows] + [0] * (self.micro_rows - len(rows))
        shift_T = np.repeat(np.arange(len(real)) * row_tokens - (np.cumsum(real) - real), real)  # packed to padded
        place_T = np.arange(len(plain.ids)) + shift_T
        ids = np.full(self.micro_rows * row_tokens, self.tokens.pad)
        ids[place_T] = plain.ids
        lengths: list[int] = []
        counts: list[int] = []
        piece = 0
        for row, filled in itertools.zip_longest(rows, real):
            pieces = 0 if row is None else len(row.start)
            tail = row_tokens - filled
            pads = [longest] * (tail // longest) + ([tail % longest] if tail % longest else [])
            lengths += plain.lengths[piece : piece + pieces].tolist() + pads
            counts += plain.counts[piece : piece + pieces].tolist() + [0] * len(pads)
            piece += pieces
        missing = self.max_reads - len(plain.positions)
        counts[-1] += missing
        empty = [0] * (self.max_segments - len(lengths))
        padded = _Plain(
            ids=ids,
            lengths=np.array(lengths + empty),
            positions=np.append(plain.positions + shift_T[plain.positions], [len(ids) - 1] * missing),
            targets=np.append(plain.targets, [IGNORE_INDEX] * missing),
            counts=np.array(counts + empty),
            longest=longest,
        )
        if plain.types is None or plain.pair_reads is None or plain.pair_labels is None:
            return padded
        types = np.zeros_like(ids)
        types[place_T] = plain.types
        absent = self.max_pairs - len(plain.pair_reads)
        return replace(
            padded,
            types=types,
            pair_reads=np.append(plain.pair_reads, [self.max_reads - 1] * absent),
            pair_labels=np.append(plain.pair_labels, [IGNORE_INDEX] * absent),
        )


def _all_pairs(rows: list[Row]) -> PairParts | None:
    """The pairs of these rows, end to end."""
    pairs = [row.pairs for row in rows if row.pairs is not None]
    if not pairs:
        return None
    first, second = (
        Parts(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("document", "start", "stop")))
        for parts in ([pair.first for pair in pairs], [pair.second for pair in pairs])
    )
    return PairParts(first, second, np.concatenate([pair.labels for pair in pairs]))


def _with_pairs(plain: _Plain, pairs: PairParts, begins: np.ndarray) -> _Plain:
    """The same micro-batch with token types, and the first token of every pair among the positions that are read."""
    is_pair = pairs.labels != NO_PAIR
    positions = np.append(plain.positions, begins[is_pair])
    ranked = np.argsort(positions, kind="stable")
    targets = np.append(plain.targets, [IGNORE_INDEX] * int(is_pair.sum()))
    offset_T = np.arange(len(plain.ids)) - np.repeat(begins, plain.lengths)
    return replace(
        plain,
        positions=positions[ranked],
        targets=targets[ranked],
        counts=plain.counts + is_pair,
        types=(offset_T >= np.repeat(pairs.first.lengths + 2, plain.lengths)).astype(np.int64),
        pair_reads=np.searchsorted(positions[ranked], begins[is_pair]),
        pair_labels=pairs.labels[is_pair],
    )


def step_loader(
    dataset: StepBatches, first_step: int, last_step: int | None, workers: int, *, timeout_seconds: float = 120.0
) -> Iterator[list[TokenBatch]]:
    """The micro-batches of steps first_step to last_step - 1, in order; last_step None goes on without end.

    workers: processes that build ahead; 0 builds in this one. Raises ChildProcessError naming the step when a worker
    dies (within seconds) or gives nothing for timeout_seconds.
    """
    if workers == 0:
        for step in itertools.count(first_step) if last_step is None else range(first_step, last_step):
            yield dataset[step]
        return
    loader = DataLoader(
        _PlainSteps(dataset),
        batch_size=None,
        sampler=_Steps(first_step, last_step),
        num_workers=workers,
        prefetch_factor=PREFETCH,
        timeout=timeout_seconds,
        # Forked workers share the mapped store and the plan; they only touch numpy, never CUDA.
        multiprocessing_context="fork" if sys.platform == "linux" else "spawn",
    )
    step, iterator = first_step, iter(loader)
    try:
        for plains in iterator:
            yield [plain.to_batch() for plain in plains]
            step += 1
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        for worker in getattr(iterator, "_workers", []):
            worker.terminate()  # else the loader waits 5 s for a worker that hangs
        raise ChildProcessError(
            f"loading the batches of step {step} failed: {str(error).splitlines()[0]}; a worker was killed (often for "
            "memory) or hangs; resume with data.workers 0 to see its own error"
        ) from error


class _PlainSteps(Dataset):
    def __init__(self, dataset: StepBatches) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> list[_Plain]:
        return self.dataset.plain(step)


class _Steps:
    """A sampler of consecutive steps, endless where there is no last one."""

    def __init__(self, first: int, last: int | None) -> None:
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first) if self.last is None else iter(range(self.first, self.last))
