"""A few real steps of a recipe on this machine, in memory, to know how fast it runs. Nothing is written."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

from encoderkit.pretrain.job import Job, build_job
from encoderkit.pretrain.loop import check_finite, train_step
from encoderkit.pretrain.optimizer import set_learning_rates
from encoderkit.pretrain.schedule import factor
from encoderkit.pretrain.settings import Budget, Checkpoints, Log, PretrainSettings

WARM_UP_STEPS = 2  # left out: kernels are built and memory is faulted in
STEPS = 8
MOST_SECONDS = 30.0  # after which no further step begins


@dataclass(frozen=True)
class Trial:
    """seconds_per_step: of the recipe's whole step. tokens_per_second: padding left out. phases: share of the time."""

    steps: int
    seconds_per_step: float
    tokens_per_second: float
    phases: dict[str, float]


def run_trial(settings: PretrainSettings) -> Trial:
    """Time steps of one micro-batch each; a step of the recipe takes as many of them, and one optimizer update.

    Raises FloatingPointError where a gradient is not finite, InputError as the run itself would.
    """
    micro_batch = min(settings.micro_batch_tokens, settings.batch_tokens)
    job = build_job(steady(settings, micro_batch), resume=False, in_memory=True)
    try:
        return _time_steps(job, settings.batch_tokens / micro_batch)
    finally:
        job.loader.close()  # ends its workers


def steady(settings: PretrainSettings, batch_tokens: int) -> PretrainSettings:
    """The recipe with steps that are all alike and never end: at full length, so many tokens each, nothing saved."""
    return dataclasses.replace(
        settings,
        batch_tokens=batch_tokens,
        batch_ramp=[],
        data=dataclasses.replace(settings.data, length_curriculum=[]),  # most of the run has the full length
        model=dataclasses.replace(settings.model, token_vectors="random"),  # no faster and no slower afterwards
        budget=Budget(minutes=60),
        checkpoints=Checkpoints(every_minutes=None),
        log=Log(),
    )


def step(job: Job) -> int:
    """One step as the loop makes it; returns its tokens, over all ranks."""
    with job.log.timer.phase("data"):
        batches = next(job.loader)
    set_learning_rates(job.optimizers, factor(job.settings.schedule, job.clock.during(job.state.step)))
    train_step(job, batches)
    tokens = job.dataset.counts(job.state.step).tokens
    job.state.step += 1
    return tokens


def _time_steps(job: Job, micro_batches: float) -> Trial:
    """micro_batches: in a step of the recipe."""
    first = time.perf_counter()
    for _ in range(WARM_UP_STEPS):
        step(job)
    check_finite(job)
    job.log.timer.take()  # on GPU this waits for the device
    began, steps, tokens = time.perf_counter(), 0, 0
    while steps < STEPS and (steps == 0 or time.perf_counter() - first < MOST_SECONDS):
        tokens += step(job)
        steps += 1
    check_finite(job)
    phases = job.log.timer.take()
    seconds = time.perf_counter() - began
    optimizer = phases["optimizer"]
    step_seconds = ((seconds - optimizer) * micro_batches + optimizer) / steps
    return Trial(
        steps=steps,
        seconds_per_step=step_seconds,
        tokens_per_second=tokens / steps * micro_batches / step_seconds,
        phases={name: part / seconds for name, part in phases.items()},
    )
