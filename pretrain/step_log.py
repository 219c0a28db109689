"""What the loop measures between two lines of log.jsonl."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from encoderkit.encoder.config import EncoderConfig
from encoderkit.pretrain.batches import StepBatch
from encoderkit.pretrain.flops import forward_flops, peak_flops
from encoderkit.pretrain.settings import PretrainSettings
from encoderkit.pretrain.timing import PhaseTimer


class Log:
    """Sums between two lines of log.jsonl, kept on the device until a line is written."""

    NAMES = ("loss", "targets", "correct", "real_tokens", "row_tokens", "flops")

    def __init__(
        self, settings: PretrainSettings, accelerator: Accelerator, config: EncoderConfig, state: State, dtype: torch.dtype
    ) -> None:
        self._accelerator, self._config, self._settings = accelerator, config, settings
        self.timer = PhaseTimer(accelerator.device)
        self._peak = peak_flops(accelerator.device, dtype)
        self._loss = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        self._host = np.zeros(3)
        self._norm = torch.zeros(())
        if len(state.window) == accelerator.num_processes:
            mine = state.window[accelerator.process_index]
        else:  # another number of ranks: rank 0 carries what all had
            mine = list(np.sum(state.window, axis=0)) if state.window and accelerator.is_main_process else [0.0] * 6
        self._loss += torch.tensor(mine[:3], dtype=torch.float64, device=accelerator.device)
        self._host += mine[3:]
        self._since = self._live_since = time.perf_counter()
        self._speed_tokens = self._speed_flops = self._live_tokens = 0.0

    def count_loss(self, loss: Tensor, count: Tensor, correct: Tensor) -> None:
        """Add one micro-batch's sums, without waiting for the device."""
        self._loss += torch.stack([loss.double(), count.double(), correct.double()])

    def count_step(self, step_batch: Any, norm: Tensor) -> None:
        """Add what the host knows of one step."""
        world = self._accelerator.num_processes
        flops = 3 * sum(forward_flops(self._config, batch) for batch in step_batch.batches) * world
        self._host += [step_batch.real_tokens, self._settings.batch_tokens, flops]
        self._speed_tokens += step_batch.real_tokens
        self._speed_flops += flops
        self._norm = norm

    def window(self) -> list[list[float]]:
        """The sums of each rank, for a checkpoint."""
        mine = torch.cat([self._loss, torch.from_numpy(self._host).to(self._loss)])
        return self._accelerator.gather(mine[None]).tolist()

    def live(self, state: State) -> dict[str, float | None]:
        """Figures for the progress bar, of the current window."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        loss = None
        if state.step % self._settings.log.every_steps == 0:  # reading the loss waits for the device
            sums = self._loss.tolist()
            loss = sums[0] / max(sums[1], 1)
        return {
            "loss": loss,
            "tokens_per_second": self._speed_tokens / seconds,
            "utilisation": self._utilisation(seconds),
        }

    def record(self, state: State, optimizers: list[Any], rate: float, elapsed: float) -> dict[str, Any]:
        """The line of log.jsonl for the steps since the last one, then start again from zero."""
        loss, targets, correct = self._accelerator.reduce(self._loss.clone(), reduction="sum").tolist()
        real, rows, _ = self._host.tolist()
        seconds = max(time.perf_counter() - self._since, 1e-9)
        record = {
            "kind": "train",
            "step": state.step,
            "tokens": state.tokens,
            "loss": loss / max(targets, 1),
            "accuracy": correct / max(targets, 1),
            "grad_norm": float(self._norm),
            "lr": optimizers[0].param_groups[0]["lr"],
            "mask_rate": rate,
            "padding": 1 - real / rows,
            "time": {
                "elapsed": round(elapsed, 3),
                "tokens_per_second": round(self._speed_tokens / seconds, 1),
                "utilisation": self._utilisation(seconds),
                **self.timer.take(),
            },
        }
        self._loss.zero_()
        self._host[:] = 0
        self._since, self._speed_tokens, self._speed_flops = time.perf_counter(), 0.0, 0.0
        return record

    def _utilisation(self, seconds: float) -> float | None:
        if self._peak is None:
            return None
        return round(self._speed_flops / seconds / (self._peak * self._accelerator.num_processes), 4)
