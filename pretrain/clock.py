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
    """How far a run is: by steps where the budget is in steps or tokens, else by wall-clock time of rank 0."""

    def __init__(self, settings: PretrainSettings) -> None:
        budget = settings.budget
        if budget.steps is None and budget.tokens is None and budget.minutes is None:
            raise InputError("budget is empty; set one of budget.steps, budget.tokens and budget.minutes")
        self.total_steps = budget.steps
        if budget.tokens is not None:
            self.total_steps = math.ceil(budget.tokens / settings.batch_tokens)
        self._minutes = budget.minutes
        self._checkpoints = settings.checkpoints
        self.seconds = 0.0
        self._shared = multiprocessing.Value("d", 0.0)  # workers read it for the masking rate
        self._saved_at = 0.0

    def start(self, seconds: float) -> None:
        """Begin, or go on after this many seconds that were spent before."""
        self.seconds = self._saved_at = self._shared.value = seconds
        self._began = time.perf_counter() - seconds

    def tick(self, accelerator: Accelerator) -> None:
        """Read rank 0's time; the other ranks follow it, so that all stop at the same step."""
        self.seconds = time.perf_counter() - self._began
        if accelerator.num_processes > 1 and (self._minutes is not None or self._checkpoints.every_minutes is not None):
            mine = torch.tensor(self.seconds if accelerator.is_main_process else 0.0, dtype=torch.float64)
            self.seconds = float(accelerator.reduce(mine.to(accelerator.device), reduction="sum"))
        self._shared.value = self.seconds

    def progress(self, step: int) -> float:
        """Share of the budget that is spent after this many steps, 0 to 1."""
        if self.total_steps is not None:
            return step / self.total_steps
        return min(self._shared.value / (60 * (self._minutes or 1)), 1.0)

    def at_step(self, step: int) -> float:
        """Progress in the middle of a step, so that neither the first nor the last has learning rate 0."""
        return (step + 0.5) / self.total_steps if self.total_steps is not None else max(self.progress(step), 1e-3)

    def checkpoint_due(self, step: int, is_last: bool, accelerator: Accelerator) -> bool:
        """Whether the state is to be written after this step."""
        settings = self._checkpoints
        by_steps = settings.every_steps is not None and step % settings.every_steps == 0
        by_time = settings.every_minutes is not None and self.seconds - self._saved_at >= 60 * settings.every_minutes
        return is_last or by_steps or by_time

    def checkpoint_done(self) -> None:
        """Count the minutes to the next checkpoint from now."""
        self._saved_at = self.seconds
