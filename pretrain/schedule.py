"""Learning rate, masking rate, length and batch size: pure functions of progress, 0 at the start and 1 at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from encoderkit.pretrain.settings import Masking, PretrainSettings, Schedule, Stages


def _linear(done: float, schedule: Schedule) -> float:
    return 1 - done


def _cosine(done: float, schedule: Schedule) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def _wsd(done: float, schedule: Schedule) -> float:
    """Stable, then 1 - sqrt (Hägele et al. 2024, arXiv:2405.18392). done is counted after warm-up."""
    decay = schedule.decay / max(1 - schedule.warmup, 1e-9)
    into = (done - (1 - decay)) / decay if decay > 0 else 0.0
    return 1 - math.sqrt(min(max(into, 0.0), 1.0))


SHAPES: dict[str, Callable[[float, Schedule], float]] = {"linear": _linear, "cosine": _cosine, "wsd": _wsd}


def factor(schedule: Schedule, progress: float) -> float:
    """Share of the peak learning rate at this progress.

    >>> factor(Schedule(name="linear", warmup=0.5), 0.25), factor(Schedule(name="linear", warmup=0.5), 0.75)
    (0.5, 0.5)
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < schedule.warmup:
        return progress / schedule.warmup
    done = (progress - schedule.warmup) / (1 - schedule.warmup) if schedule.warmup < 1 else 0.0
    return schedule.final + (1 - schedule.final) * SHAPES[schedule.name](done, schedule)


def mask_rate(masking: Masking, progress: float) -> float:
    """Share of tokens that are predicted at this progress; linear from rate to final_rate."""
    if masking.final_rate is None:
        return masking.start_rate
    return masking.start_rate + (masking.final_rate - masking.start_rate) * min(max(progress, 0.0), 1.0)


@dataclass(frozen=True)
class Stage:
    """Steps of one length and one batch size. first_row: where in the endless stream of rows first_step begins."""

    max_tokens: int  # longest sequence
    step_rows: int  # rows a step, over all ranks
    first_step: int = 0
    first_row: int = 0

    @classmethod
    def at(cls, settings: PretrainSettings, progress: float) -> Stage:
        """The stage at this progress, as if it were the first one."""
        data = settings.data
        batch_tokens = _stage_value(settings.batch_ramp, settings.batch_tokens, progress)
        return cls(_stage_value(data.length_curriculum, data.max_tokens, progress), batch_tokens // data.row_tokens)

    def __str__(self) -> str:
        return f"sequences of at most {self.max_tokens} tokens, {self.step_rows} rows a step"

    def row(self, step: float) -> float:
        """Rows of the stream before this step of the stage."""
        return self.first_row + (step - self.first_step) * self.step_rows


def _stage_value(stages: Stages, final: int, progress: float) -> int:
    return next((value for until, value in stages if progress < until), final)
