"""How far a run is, and when its state is written."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace

import torch
from accelerate import Accelerator

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.schedule import Stage
from encoderkit.pretrain.settings import PretrainSettings


class Clock:
    """Progress by steps or tokens where the budget is in these, else by wall-clock time of rank 0.

    stage: the length and batch size of the steps from stage.first_step on.
    """

    def __init__(self, settings: PretrainSettings) -> None:
        budget = settings.budget
        if budget.steps is None and budget.tokens is None and budget.minutes is None:
            raise InputError("budget is empty; set one of budget.steps, budget.tokens and budget.minutes")
        self._settings, self._budget = settings, budget
        self.stage = Stage.at(settings, 0.0)
        self._checkpoints = settings.checkpoints
        self._shared = multiprocessing.Value("d", 0.0)  # seconds spent; loader workers read it for the masking rate
        self._began = self._saved_at = 0.0
        self._agreed = True  # whether all ranks have the same seconds

    @property
    def seconds(self) -> float:
        """Wall-clock time in the loop as of the last tick, stops left out."""
        return self._shared.value

    def start(self, seconds: float) -> None:
        """Begin, or go on after this many seconds that were spent before."""
        self._shared.value = self._saved_at = seconds
        self._began = time.perf_counter() - seconds

    def tick(self, accelerator: Accelerator, step: int) -> None:
        """Read the time after this step; all ranks follow rank 0's, so that they stop and save at the same step.

        On several GPUs that waits for them: after every step of a budget in minutes, else at log lines only.
        """
        seconds = time.perf_counter() - self._began
        by_time = self._budget.minutes is not None or self._checkpoints.every_minutes is not None
        at_log_line = step % self._settings.log.every_steps == 0
        self._agreed = accelerator.num_processes == 1 or self._budget.minutes is not None or at_log_line
        if accelerator.num_processes > 1 and by_time and self._agreed:
            mine = torch.zeros((), dtype=torch.float64, device=accelerator.device)
            mine += seconds if accelerator.is_main_process else 0.0
            seconds = float(accelerator.reduce(mine, reduction="sum"))
        self._shared.value = seconds

    def progress(self, step: float) -> float:
        """Share of the budget that is spent after this many steps, 0 to 1; steps of the present stage."""
        if self._budget.minutes is not None:
            return min(self.seconds / (60 * self._budget.minutes), 1.0)
        if self._budget.steps is not None:
            return step / self._budget.steps
        assert self._budget.tokens is not None
        return min(self.stage.row(step) * self._settings.data.row_tokens / self._budget.tokens, 1.0)

    def during(self, step: int) -> float:
        """Progress in the middle of a step, so that neither the first nor the last has learning rate 0."""
        return max(self.progress(step + 0.5), 1e-3 if self._budget.minutes is not None else 0.0)

    def due_stage(self, step: int) -> Stage:
        """The stage that this step belongs to: the present one, or another length or batch size from here on."""
        due = Stage.at(self._settings, self.progress(step))
        if (due.max_tokens, due.step_rows) == (self.stage.max_tokens, self.stage.step_rows):
            return self.stage
        return replace(due, first_step=step, first_row=int(self.stage.row(step)))

    def checkpoint_due(self, step: int) -> bool:
        """Whether the state is to be written after this step; asking resets the minutes when it is."""
        by_steps = self._checkpoints.every_steps is not None and step % self._checkpoints.every_steps == 0
        minutes = self._checkpoints.every_minutes
        by_time = minutes is not None and self._agreed and self.seconds - self._saved_at >= 60 * minutes
        if by_steps or by_time or self.progress(step) >= 1:
            self._saved_at = self.seconds
            return True
        return False
