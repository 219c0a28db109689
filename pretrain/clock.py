"""How far a run is, and when its state is written."""

from __future__ import annotations

import math
import multiprocessing
import time
from dataclasses import replace

import torch
from accelerate import Accelerator

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.schedule import Stage
from encoderkit.pretrain.settings import PretrainSettings

VALIDATIONS = 10  # over a run, where log.validate_every_steps says nothing
VALIDATION_SHARE = 0.1  # of a budget in minutes that they may take, the first and the last left out


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
        # Seconds spent; loader workers read them for the masking rate. One that is killed would keep a lock.
        self._shared = multiprocessing.Value("d", 0.0, lock=False)
        self._began = self._saved_at = self._validated_at = 0.0
        self._told = 0.0  # the last seconds that all ranks knew
        self._validation_seconds = 0.0  # that the last one took

    @property
    def seconds(self) -> float:
        """Wall-clock time in the loop as of the last tick, stops left out."""
        return self._shared.value

    def start(self, seconds: float) -> None:
        """Begin, or go on after this many seconds that were spent before."""
        self._shared.value = self._saved_at = self._validated_at = self._told = seconds
        self._began = time.perf_counter() - seconds

    def tick(self, accelerator: Accelerator, step: int) -> None:
        """Read the time after this step; all ranks follow rank 0's, so that they stop and save at the same step.

        On several GPUs that waits for them: after every step of a budget in minutes, else at log lines only.
        """
        seconds = time.perf_counter() - self._began
        by_time = self._budget.minutes is not None or self._checkpoints.every_minutes is not None
        at_log_line = step % self._settings.log.every_steps == 0
        agree = accelerator.num_processes == 1 or self._budget.minutes is not None or at_log_line
        if accelerator.num_processes > 1 and by_time and agree:
            mine = torch.tensor([seconds, self._validation_seconds], dtype=torch.float64, device=accelerator.device)
            mine *= accelerator.is_main_process
            seconds, self._validation_seconds = accelerator.reduce(mine, reduction="sum").tolist()
        self._shared.value = seconds
        if agree:
            self._told = seconds

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

    def validation_due(self, step: int, before: float) -> bool:
        """Whether to validate after this step, which began at progress before.

        On a slow machine, or in a short run, validations at every tenth of some minutes could take most of them.
        """
        every, after = self._settings.log.validate_every_steps, self.progress(step)
        if every is not None:
            return step % every == 0
        if math.floor(before * VALIDATIONS) == math.floor(after * VALIDATIONS):
            return False
        is_free = self._budget.minutes is None or after >= 1
        return is_free or self.seconds - self._validated_at >= self._validation_seconds / VALIDATION_SHARE

    def validated(self, seconds: float) -> None:
        """Note a validation after the present step that took so long."""
        self._validated_at, self._validation_seconds = self.seconds, seconds

    def checkpoint_due(self, step: int) -> bool:
        """Whether the state is to be written after this step; asking resets the minutes when it is."""
        by_steps = self._checkpoints.every_steps is not None and step % self._checkpoints.every_steps == 0
        minutes = self._checkpoints.every_minutes
        by_time = minutes is not None and self._told - self._saved_at >= 60 * minutes
        if by_steps or by_time or self.progress(step) >= 1:
            self._saved_at = self._told
            return True
        return False
