"""What the loop measures between two lines of log.jsonl. Sums stay on the device until a line is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.config import EncoderConfig
from encoderkit.kernels.loss import LossSum
from encoderkit.pretrain.batches import StepCounts
from encoderkit.pretrain.flops import forward_flops, peak_flops
from encoderkit.pretrain.timing import PhaseTimer


class StepLog:
    """Loss, padding, speed and time split since the last line.

    window: what StepLog.window() gave when the run was saved; a resumed run then writes the lines that the
    uninterrupted one would have written.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: EncoderConfig,
        dtype: torch.dtype,
        window: Sequence[Sequence[float]] = (),
    ) -> None:
        self._accelerator, self._config = accelerator, config
        self.timer = PhaseTimer(accelerator.device)
        peak = peak_flops(accelerator.device, dtype)
        self._peak = None if peak is None else peak * accelerator.num_processes
        mine = [0.0] * 8
        if len(window) == accelerator.num_processes:
            mine = list(window[accelerator.process_index])
        elif accelerator.is_main_process and window:  # another number of ranks: the first carries what all had
            mine = [sum(column) for column in zip(*window)]
        # Loss, targets, correct of the masked tokens; the same of the sentence pairs.
        self._loss = torch.tensor(mine[:6], dtype=torch.float64, device=accelerator.device)
        self._tokens = mine[6:]  # real tokens, row tokens
        self._norm = torch.zeros((), device=accelerator.device)
        self._first_bad = torch.full((), -1, device=accelerator.device)
        self._restart_clock()

    def add_loss(self, tokens: LossSum, pairs: LossSum) -> None:
        """Add one micro-batch of this rank, without waiting for the device."""
        self._loss += torch.stack([part.detach().double() for part in (*tokens, *pairs)])

    def add_norm(self, loss: torch.Tensor, norm: torch.Tensor, step: int) -> torch.Tensor:
        """Keep a step's gradient norm () without waiting for the device; 1.0 where it or the loss () is not finite."""
        is_bad = ~(norm.isfinite() & loss.isfinite())
        self._norm = norm
        self._first_bad = torch.where(is_bad & (self._first_bad < 0), step, self._first_bad)
        return is_bad.float()

    def read_norm(self) -> tuple[float, int | None]:
        """The last gradient norm, and the first step that was not finite. Waits for the device."""
        norm, first_bad = torch.stack([self._norm.double(), self._first_bad.double()]).tolist()
        return norm, None if first_bad < 0 else int(first_bad)

    def add_step(self, batches: Sequence[TokenBatch], counts: StepCounts) -> None:
        """Add what the host knows of a step: this rank's micro-batches, and the counts over all ranks."""
        first = self._accelerator.is_main_process  # counted once, also in a checkpoint
        self._tokens[0] += counts.tokens * first
        self._tokens[1] += counts.row_tokens * first
        self._recent_tokens += counts.tokens
        mine = 3 * sum(forward_flops(self._config, batch) for batch in batches)  # backward costs two
        self._recent_flops += mine * self._accelerator.num_processes

    def window(self) -> list[list[float]]:
        """The sums of each rank since the last line, for a checkpoint."""
        mine = torch.cat([self._loss, torch.tensor(self._tokens, dtype=torch.float64, device=self._loss.device)])
        return self._accelerator.gather(mine[None]).tolist()

    def speed(self) -> dict[str, float | None]:
        """Tokens/s of all ranks and model FLOP utilisation since the last line."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        return {
            "tokens_per_second": round(self._recent_tokens / seconds, 1),
            "utilisation": None if self._peak is None else round(self._recent_flops / seconds / self._peak, 4),
        }

    def take(self) -> dict[str, Any]:
        """Loss, accuracy, padding and times since the last line, then start again from zero. Waits for the device.

        pair_loss and pair_accuracy are there where sentence pairs were seen.
        """
        sums = self._accelerator.reduce(self._loss.clone(), reduction="sum").tolist()
        loss, targets, correct, pair_loss, pairs, pairs_correct = sums
        real, rows = self._tokens
        taken = {
            "loss": loss / max(targets, 1),
            "accuracy": correct / max(targets, 1),
            "padding": 1 - real / rows if rows else 0.0,
            "time": {**self.speed(), **self.timer.take()},
        }
        if pairs:
            taken.update(pair_loss=pair_loss / pairs, pair_accuracy=pairs_correct / pairs)
        self._loss.zero_()
        self._tokens = [0.0, 0.0]
        self._restart_clock()
        return taken

    def leave_out(self, seconds: float) -> None:
        """Do not count these seconds (a validation, a save) into the speed of the steps around them."""
        self._since += seconds

    def _restart_clock(self) -> None:
        self._since = time.perf_counter()
        self._recent_tokens = self._recent_flops = 0.0
