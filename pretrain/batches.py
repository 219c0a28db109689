"""Micro-batches of an optimizer step, built from the store by the order: arithmetic, without state.

Step i takes rows [i R, (i + 1) R) of the endless stream, R = batch_tokens / row_tokens; rank r of W takes the r-th
contiguous share. Loader workers only build ahead: their number changes nothing.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from encoderkit.encoder.batch import IGNORE_INDEX, TokenBatch
from encoderkit.kernels.errors import InputError
from encoderkit.kernels.segments import Segments
from encoderkit.pretrain.masking import Pieces, mask_rows, most_targets
from encoderkit.pretrain.order import SPECIAL_TOKENS, Order, Row
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
    """A micro-batch as int32 arrays, which cross from a worker through a pipe, not through shared memory."""

    ids: np.ndarray  # (T,)
    lengths: np.ndarray  # (S,)
    positions: np.ndarray  # (M,)
    targets: np.ndarray  # (M,)
    counts: np.ndarray  # (S,) targets of each segment
    longest: int | None

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
        )


class StepBatches(Dataset):
    """dataset[step]: this rank's micro-batches of that step, CPU tensors.

    rate_at: masking rate of a step. static_shapes: every micro-batch has the same T, M, S and longest: pad tokens fill
    each row, empty segments and ignored targets at T - 1 follow; else the unfilled tails are left out and shapes vary.
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
        self.max_targets = self.micro_rows * max(
            most_targets(rate, order.row_tokens, order.max_pieces) for rate in rates
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
        document, start, stop = (
            np.concatenate([getattr(r, name) for r in rows]) for name in ("document", "start", "stop")
        )
        epoch = np.repeat([row.epoch for row in rows], [len(row.start) for row in rows])
        lengths = stop - start + SPECIAL_TOKENS
        ids = np.empty(int(lengths.sum()), dtype=np.int64)
        ends = np.cumsum(lengths)
        ids[ends - lengths] = self.tokens.cls
        ids[ends - 1] = self.tokens.sep
        for d, first, last, end in zip(document.tolist(), start.tolist(), stop.tolist(), ends.tolist()):
            ids[end - 1 - (last - first) : end - 1] = self.store.tokens(d)[first:last]
        masked = mask_rows(
            ids,
            Pieces(lengths, epoch, document, start),
            rate=rate,
            seed=self.seed,
            masking=self.masking,
            tokens=self.tokens,
        )
        parts = (masked.input_ids, lengths, masked.positions, masked.targets, masked.counts)
        if self.static_shapes:
            return self._padded(rows, *parts)
        plain = [part.astype(np.int32) for part in parts]
        return _Plain(plain[0], plain[1], plain[2], plain[3], plain[4], longest=None)

    def _padded(self, rows: list[Row], ids_T, lengths_P, positions_M, targets_M, counts_P) -> _Plain:
        """Spread the packed rows over rows of full length and pad every shape to its bound."""
        row_tokens, longest = self.order.row_tokens, self.order.max_tokens
        real = [row.num_tokens for row in rows] + [0] * (self.micro_rows - len(rows))
        shift_T = np.repeat(np.arange(len(real)) * row_tokens - (np.cumsum(real) - real), real)  # packed to padded
        ids = np.full(self.micro_rows * row_tokens, self.tokens.pad, dtype=np.int32)
        ids[np.arange(len(ids_T)) + shift_T] = ids_T
        lengths: list[int] = []
        counts: list[int] = []
        piece = 0
        for row, filled in itertools.zip_longest(rows, real):
            pieces = 0 if row is None else len(row.start)
            tail = row_tokens - filled
            pads = [longest] * (tail // longest) + ([tail % longest] if tail % longest else [])
            lengths += lengths_P[piece : piece + pieces].tolist() + pads
            counts += counts_P[piece : piece + pieces].tolist() + [0] * len(pads)
            piece += pieces
        missing = self.max_targets - len(positions_M)
        counts[-1] += missing
        empty = [0] * (self.max_segments - len(lengths))
        return _Plain(
            ids=ids,
            lengths=np.array(lengths + empty, dtype=np.int32),
            positions=np.append(positions_M + shift_T[positions_M], [len(ids) - 1] * missing).astype(np.int32),
            targets=np.append(targets_M, [IGNORE_INDEX] * missing).astype(np.int32),
            counts=np.array(counts + empty, dtype=np.int32),
            longest=longest,
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
