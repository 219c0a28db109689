"""Micro-batches of an optimizer step, built from the store by the order: arithmetic, without state.

Each step takes the next R = batch_tokens / row_tokens rows of the endless stream; rank r of W takes the r-th contiguous
share. Loader workers only build ahead: their number changes nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from encoderkit.encoder.batch import IGNORE_INDEX, TokenBatch
from encoderkit.kernels.errors import InputError, first_line
from encoderkit.kernels.segments import Segments
from encoderkit.pretrain.masking import Pieces, mask_rows, most_targets
from encoderkit.pretrain.order import NUM_SPECIAL_TOKENS, Order, Row, padded_length
from encoderkit.pretrain.pairs import NO_PAIR, PairParts, Parts
from encoderkit.pretrain.schedule import Stage
from encoderkit.pretrain.settings import PretrainSettings
from encoderkit.pretrain.stopping import leave_to_parent
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.tokenizer import TokenIds

PREFETCH = 4  # steps that each worker builds ahead


@dataclass(frozen=True)
class StepCounts:
    """What one step holds over all ranks. tokens: not padding, special ones counted in. row_tokens: padding too."""

    tokens: int
    row_tokens: int


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

    rate_at: masking rate of a step. stage: length and batch size of the steps that are asked for; set it to go over to
    others. static_shapes: every micro-batch of a stage has the same T, M, S, R and longest: pad tokens fill each row;
    empty segments, ignored targets at T - 1 and ignored pairs follow. Else the unfilled tails are left out and shapes
    vary.
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
        self.rank, self.world_size = rank, world_size
        self.micro_batch_rows = settings.micro_batch_tokens // order.row_tokens
        sizes = [("batch_tokens", settings.batch_tokens), *(("batch_ramp", size) for _, size in settings.batch_ramp)]
        for key, size in sizes:
            if size // order.row_tokens % world_size:
                raise InputError(
                    f"{key} {size} is {size // order.row_tokens} rows of {order.row_tokens} tokens, which {world_size} "
                    f"ranks cannot share equally; expected a multiple of {world_size * order.row_tokens}"
                )
        self.stage = Stage.at(settings, 0.0)

    @property
    def rank_rows(self) -> int:
        """Rows of a step on this rank."""
        return self.stage.step_rows // self.world_size

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch."""
        return min(self.rank_rows, self.micro_batch_rows)

    @property
    def most_pieces(self) -> int:
        """The most sequences of a row."""
        more = self.order.row_tokens // (self.stage.max_tokens - NUM_SPECIAL_TOKENS)
        more *= 1 if self.order.pairs is None else 2  # what is cut off before and behind a pair
        return self.order.max_pieces + (more if self.stage.max_tokens < self.order.max_tokens else 0)

    @property
    def max_segments(self) -> int:
        """Segments of a micro-batch of fixed shape: sequences, and what fills rows."""
        pads = self.most_pieces if self.order.layout == "padded" else 0
        return self.micro_rows * (self.most_pieces + pads + -(-self.order.row_tokens // self.stage.max_tokens))

    @property
    def max_pairs(self) -> int:
        """Sentence pairs of a micro-batch of fixed shape."""
        return self.micro_rows * self.most_pieces if self.order.pairs else 0

    @property
    def max_reads(self) -> int:
        """Positions that are read of a micro-batch of fixed shape: targets, and the first tokens of pairs."""
        rates = [rate for rate in (self.masking.start_rate, self.masking.final_rate) if rate is not None]
        bounds = [most_targets(rate, self.order.row_tokens, self.most_pieces, self.masking.select) for rate in rates]
        return self.max_pairs + self.micro_rows * max(bounds)

    def __getitem__(self, step: int) -> list[TokenBatch]:
        return self.to_batches(self.plain(step))

    def to_batches(self, plains: list[_Plain]) -> list[TokenBatch]:
        """As tensors, in pinned memory where there is a GPU."""
        batches = [plain.to_batch() for plain in plains]
        return [batch.pin_memory() for batch in batches] if torch.cuda.is_available() else batches

    def counts(self, step: int) -> StepCounts:
        """Tokens and padding of a step over all ranks, from the order alone."""
        rows = self._rows(step, 0, self.stage.step_rows)
        return StepCounts(sum(row.num_tokens for row in rows), len(rows) * self.order.row_tokens)

    def plain(self, step: int) -> list[_Plain]:
        """The micro-batches as arrays."""
        rate = self.rate_at(step)
        rows = self._rows(step, self.rank * self.rank_rows, self.rank_rows)
        return [self._build(rows[i : i + self.micro_rows], rate) for i in range(0, len(rows), self.micro_rows)]

    def _rows(self, step: int, first: int, count: int) -> list[Row]:
        """Rows first to first + count of a step, in sequences of the stage."""
        rows = self.order.rows(int(self.stage.row(step)) + first, count)
        longest = self.stage.max_tokens
        return [row.cut(longest) for row in rows] if longest < self.order.max_tokens else rows

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
        if self.static_shapes or self.order.layout == "padded":
            plain = self._padded(rows, plain)
        if self.static_shapes:
            plain = self._of_fixed_shape(plain)
        return plain.narrow()

    def _copy(self, parts: Parts, at_P: np.ndarray, ids_T: np.ndarray, word_starts_T: np.ndarray | None) -> None:
        """Write the tokens of these parts at these places, and where words start but for each part's first."""
        bounds = zip(parts.document.tolist(), parts.start.tolist(), parts.stop.tolist(), at_P.tolist())
        for document, start, stop, at in bounds:
            ids_T[at : at + stop - start] = self.store.tokens(document)[start:stop]
            if word_starts_T is not None and stop > start:
                word_starts_T[at + 1 : at + stop - start] = self.store.word_starts(document, start + 1, stop)

    def _padded(self, rows: list[Row], plain: _Plain) -> _Plain:
        """The same sequences with pad tokens as segments of their own: behind each one, or where rows are not full."""
        parts = [self._row_segments(row) for row in rows]
        if self.static_shapes:
            none = np.zeros(0, dtype=np.int64)
            parts += [self._row_segments(Row(0, none, none, none))] * (self.micro_rows - len(rows))
        lengths_L, is_real_L = (np.concatenate(part) for part in zip(*parts))
        begins_P = (np.cumsum(lengths_L) - lengths_L)[is_real_L]
        shift_T = np.repeat(begins_P - (np.cumsum(plain.lengths) - plain.lengths), plain.lengths)
        place_T = np.arange(len(plain.ids)) + shift_T
        ids = np.full(int(lengths_L.sum()), self.tokens.pad)
        ids[place_T] = plain.ids
        counts_L = np.zeros_like(lengths_L)
        counts_L[is_real_L] = plain.counts
        types = plain.types
        if types is not None:
            types = np.zeros_like(ids)
            types[place_T] = plain.types
        positions = plain.positions + shift_T[plain.positions]
        return replace(plain, ids=ids, lengths=lengths_L, positions=positions, counts=counts_L, types=types)

    def _row_segments(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """(lengths (L,), which are sequences and not padding (L,) bool) of a row."""
        lengths_L, longest = row.lengths, self.stage.max_tokens
        is_real_L = np.ones(len(lengths_L), dtype=bool)
        if self.order.layout == "padded" and len(lengths_L):
            pads = padded_length(lengths_L, longest).max() - lengths_L
            lengths_L = np.stack([lengths_L, pads], axis=1).reshape(-1)
            is_real_L = np.tile([True, False], len(pads))
        if self.static_shapes:
            tail = self.order.row_tokens - int(lengths_L.sum())
            pads = [longest] * (tail // longest) + [tail % longest]
            lengths_L = np.append(lengths_L, pads)
            is_real_L = np.append(is_real_L, np.zeros(len(pads), dtype=bool))
        is_any = lengths_L > 0
        return lengths_L[is_any], is_real_L[is_any]

    def _of_fixed_shape(self, plain: _Plain) -> _Plain:
        """Every shape padded to its bound."""
        missing, empty = self.max_reads - len(plain.positions), self.max_segments - len(plain.lengths)
        counts = plain.counts.copy()
        counts[-1] += missing
        fixed = replace(
            plain,
            lengths=np.append(plain.lengths, [0] * empty),
            positions=np.append(plain.positions, [len(plain.ids) - 1] * missing),
            targets=np.append(plain.targets, [IGNORE_INDEX] * missing),
            counts=np.append(counts, [0] * empty),
            longest=self.stage.max_tokens,
        )
        if plain.pair_reads is None or plain.pair_labels is None:
            return fixed
        absent = self.max_pairs - len(plain.pair_reads)
        return replace(
            fixed,
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
) -> Generator[list[TokenBatch]]:
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
        worker_init_fn=_begin_worker,
        # Forked workers share the mapped store and the plan; they only touch numpy, never CUDA.
        multiprocessing_context="fork" if sys.platform == "linux" else "spawn",
    )
    step, iterator = first_step, iter(loader)
    processes = list(getattr(iterator, "_workers", []))
    try:
        for plains in iterator:
            yield dataset.to_batches(plains)
            step += 1
    except RuntimeError as error:
        told = lost_worker(error, step)
        if told is None:
            raise
        _kill(processes)  # else the loader waits 5 s for a worker that hangs
        raise told from error
    finally:
        del iterator  # which asks its workers to end
        _kill(processes)


def _kill(processes: list[Any]) -> None:
    for worker in processes:
        with contextlib.suppress(RuntimeError):  # torch tells of a worker that was killed
            if worker.is_alive():
                worker.kill()
                worker.join()


def lost_worker(error: RuntimeError, step: int) -> ChildProcessError | None:
    """What torch raises wherever it learns that a loader worker died or hangs, as one line; None for other errors."""
    if "DataLoader" not in str(error):
        return None
    return ChildProcessError(
        f"loading the batches of step {step} failed: {first_line(error)}; a worker was killed (often for "
        "memory) or hangs; resume with data.workers 0 to see its own error"
    )


def _begin_worker(index: int) -> None:
    leave_to_parent()


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
