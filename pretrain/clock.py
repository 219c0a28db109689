"""How far a run is, and when its state is written."""

from __future__ import annotations

import math
import multiprocessing
import time

import torch
from accelerate import Accelerator

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.settings import PretrainSettings


class Clock:
    """Progress by steps where the budget is in steps or tokens, else by wall-clock time of rank 0."""

    def __init__(self, settings: PretrainSettings) -> None:
        budget = settings.budget
        if budget.steps is None and budget.tokens is None and budget.minutes is None:
            raise InputError("budget is empty; set one of budget.steps, budget.tokens and budget.minutes")
        self.total_steps = budget.steps
        if budget.tokens is not None:
            self.total_steps = math.ceil(budget.tokens / settings.batch_tokens)
        self._budget_seconds = 60 * (budget.minutes or 0)
        self._checkpoints = settings.checkpoints
        self._shared = multiprocessing.Value("d", 0.0)  # seconds spent; loader workers read it for the masking rate
        self._began = self._saved_at = 0.0

    @property
    def seconds(self) -> float:
        """Wall-clock time in the loop as of the last tick, stops left out."""
        return self._shared.value

    def start(self, seconds: float) -> None:
        """Begin, or go on after this many seconds that were spent before."""
        self._shared.value = self._saved_at = seconds
        self._began = time.perf_counter() - seconds

    def tick(self, accelerator: Accelerator) -> None:
        """Read the time; all ranks follow rank 0's, so that they stop and save at the same step."""
        seconds = time.perf_counter() - self._began
        if accelerator.num_processes > 1 and (self.total_steps is None or self._checkpoints.every_minutes is not None):
            mine = torch.tensor(seconds if accelerator.is_main_process else 0.0, device=accelerator.device)
            seconds = float(accelerator.reduce(mine, reduction="sum"))
        self._shared.value = seconds

    def progress(self, step: int) -> float:
        """Share of the budget that is spent after this many steps, 0 to 1."""
        if self.total_steps is not None:
            return step / self.total_steps
        return min(self.seconds / self._budget_seconds, 1.0)

    def during(self, step: int) -> float:
        """Progress in the middle of a step, so that neither the first nor the last has learning rate 0."""
        return (step + 0.5) / self.total_steps if self.total_steps is not None else max(self.progress(step), 1e-3)

    def checkpoint_due(self, step: int) -> bool:
        """Whether the state is to be written after this step; asking resets the minutes when it is."""
        by_steps = self._checkpoints.every_steps is not None and step % self._checkpoints.every_steps == 0
        minutes = self._checkpoints.every_minutes
        by_time = minutes is not None and self.seconds - self._saved_at >= 60 * minutes
        if by_steps or by_time or self.progress(step) >= 1:
            self._saved_at = self.seconds
            return True
        return False
