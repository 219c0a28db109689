"""The pretraining loop, readable from top to bottom.

One denominator an optimizer step and loss: the number of targets, and that of sentence pairs, over all micro-batches
and ranks, known before the first backward pass, so that neither accumulation nor the number of ranks changes what a
step means (the mean of means is another loss). Batch i is a pure function of (seed, i), so resuming is arithmetic; on
CPU a resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.checkpoint import save
from encoderkit.encoder.model import MaskedLM, choose_attention
from encoderkit.encoder.pseudo_likelihood import packed_logits
from encoderkit.pretrain.job import Job, build_job
from encoderkit.pretrain.minimal_pairs import accuracy
from encoderkit.pretrain.optimizer import set_learning_rates, skip_where
from encoderkit.pretrain.parallel import clip_gradients, gather_whole, without_reduction
from encoderkit.pretrain.probe import HeldOutScore, probe_sums
from encoderkit.pretrain.progress import Progress
from encoderkit.pretrain.report import Run, write_model_card, write_report
from encoderkit.pretrain.schedule import factor
from encoderkit.pretrain.settings import PretrainSettings

VALIDATIONS = 10  # over a run, where log.validate_every_steps says nothing

# Kept until the process ends. A gloo group that is destroyed right after its last collective waits, with Python's lock
# in hand, for its own thread, which wants that lock to let go of a tensor: one rank in some runs hung there for good.
_ended_groups: list[Any] = []


def pretrain(settings: PretrainSettings, resume: bool = False) -> Path:
    """Train as settings say, or go on with the run folder settings.out; returns the folder of the finished model.

    Raises InputError, with nothing written, where the settings cannot be served; FloatingPointError where training
    diverged.
    """
    job = build_job(settings, resume)
    try:
        _train(job)
        return finish(job)
    finally:
        if job.run is not None:
            job.run.close()


def _train(job: Job) -> None:
    settings, state, clock, log = job.settings, job.state, job.clock, job.log
    clock.start(state.seconds)
    with Progress(enabled=job.accelerator.is_main_process, description=Path(settings.out).name) as bar:
        if state.step == 0 and settings.model.init_from is not None:
            _tell_score(job, bar)  # what the pretrained model brings
        while (before := clock.progress(state.step)) < 1:
            if (due := clock.due_stage(state.step)) != clock.stage:
                check_finite(job)  # which tells the rows of this stage
                job.begin_stage(due)
                stage = {"max_tokens": clock.stage.max_tokens, "batch_rows": clock.stage.step_rows}
                job.tell({"kind": "stage", "step": state.step + 1, "tokens": state.tokens, **stage})
                bar.note(f"step {state.step + 1}: from here {clock.stage}")
            with log.timer.phase("data"):
                batches = next(job.loader)
            set_learning_rates(job.optimizers, factor(settings.schedule, clock.during(state.step)))
            rate, counts = job.dataset.rate_at(state.step), job.dataset.counts(state.step)
            train_step(job, batches)
            log.add_step(batches, counts)
            state.step += 1
            state.tokens += counts.tokens
            clock.tick(job.accelerator, state.step)
            after = clock.progress(state.step)

            line = {"step": state.step, "tokens": state.tokens}
            bar.update(after, state.step, **log.speed())
            log_due = state.step % settings.log.every_steps == 0 or after >= 1
            validation_due, save_due = (
                _validation_due(settings, state.step, before, after),
                clock.checkpoint_due(state.step),
            )
            if log_due or validation_due or save_due:
                norm = check_finite(job)
            if log_due:
                taken = log.take()
                lr = job.optimizers[0].param_groups[0]["lr"]
                taken["time"]["elapsed"] = clock.seconds
                job.tell({"kind": "train", **line, "grad_norm": norm, "lr": lr, "mask_rate": rate, **taken})
                bar.update(after, state.step, loss=taken["loss"], pair_accuracy=taken.get("pair_accuracy"))
            began = time.perf_counter()
            if validation_due:
                _tell_score(job, bar)
            if save_due:
                job.save()
            log.leave_out(time.perf_counter() - began)
    job.loader.close()  # ends its workers


def train_step(job: Job, batches: list[TokenBatch]) -> None:
    """One optimizer step over this rank's micro-batches; none, on any rank, where a gradient is not finite.

    On a CPU that raises FloatingPointError at once. A GPU is not waited for: check_finite raises it later.
    """
    accelerator, timer, settings, step = job.accelerator, job.log.timer, job.settings, job.state.step
    counts = accelerator.reduce(_counts(batches).to(accelerator.device), reduction="sum")
    scales = accelerator.num_processes / counts.clamp(min=1)  # DDP averages over ranks; a sum of losses overflows fp16
    for micro, batch in enumerate(batches):
        _seed_dropout(settings.seed, step, micro, accelerator.process_index)
        is_last = micro == len(batches) - 1
        with contextlib.nullcontext() if is_last else without_reduction(job.wrapped):
            with timer.phase("forward"):
                tokens, pairs = job.wrapped(batch.to(accelerator.device, non_blocking=True))
            with timer.phase("backward"):
                accelerator.backward(tokens.loss * scales[0] + pairs.loss * scales[1])
        job.log.add_loss(tokens, pairs)
    with timer.phase("optimizer"):
        norm = clip_gradients(job.model, settings.optimizer.clip)  # gradients are averaged: all ranks see one's NaN
        found_inf = job.log.add_norm(norm, step)
        if job.async_device:
            skip_where(found_inf, job.optimizers)
        else:
            check_finite(job)
        for optimizer in job.prepared:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def check_finite(job: Job) -> float:
    """The gradient norm of the last step before clipping. Waits for the device.

    Raises FloatingPointError on every rank where that of any step so far was not finite.
    """
    norm, step = job.log.read_norm()
    if step is not None:
        first, after = job.clock.stage.row(step), job.clock.stage.row(step + 1)
        raise FloatingPointError(
            f"step {step}, rows {first:.0f} to {after - 1:.0f}: the gradient is not finite; its update was not "
            "made. Resume from the newest checkpoint, or start again with a lower learning rate"
        )
    return norm


@torch.no_grad()
def validate(job: Job) -> HeldOutScore:
    """The scores on held-out documents in the run's precision, the batches shared out over the ranks."""
    accelerator, device = job.accelerator, job.accelerator.device
    objective = accelerator.unwrap_model(job.wrapped).eval()

    def sums(batches: list[TokenBatch], part: int) -> Tensor:
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        found = probe_sums(lambda batch: objective(batch)[part], mine, device)
        if len(mine) * accelerator.num_processes < len(batches):
            objective(batches[0].to(device))  # sharded weights: the forward passes of other ranks wait for this one
        return found

    both = torch.stack([sums(job.held_out.probe, 0), sums(job.held_out.pairs, 1)])
    objective.train()
    return HeldOutScore.of(accelerator.reduce(both, reduction="sum"))


def _tell_score(job: Job, bar: Progress) -> None:
    score, state = validate(job), job.state
    at = {"step": state.step, "tokens": state.tokens}
    pairs = _minimal_pairs(job)
    job.tell({"kind": "validation", **at, **score.record(), **pairs, "time": {"elapsed": job.clock.seconds}})
    told = "".join(f"; {name.replace('_', ' ')} {value:.3f}" for name, value in pairs.items())
    bar.note(f"step {state.step}: {score.told()}{told}")


def _minimal_pairs(job: Job) -> dict[str, float]:
    """Accuracy on the sample of minimal pairs, by variant; empty without one, and on all ranks but the first."""
    if job.minimal_pairs is None or not job.accelerator.is_main_process:
        return {}
    model = job.model.eval()
    scores = job.minimal_pairs.score(packed_logits(model), batch_tokens=job.settings.micro_batch_tokens)
    model.train()
    return {f"minimal_pairs_{variant}": accuracy(part) for variant, part in scores.items()}


@torch.no_grad()
def finish(job: Job) -> Path:
    """Write final/ with its model card, score it in fp32, and write the report; returns final/."""
    final = Path(job.settings.out) / "final"
    weights = gather_whole(job.model.state_dict(), keep=job.run is not None)
    if job.run is not None:
        device = job.accelerator.device
        model = MaskedLM(job.model.config)  # not the prepared one, which has autocast and may be sharded
        model.load_state_dict(weights, strict=True)
        save(model, final, job.tokenizer)
        choices = choose_attention(model.config, "auto", device=device, dtype=torch.float32)
        model.to(device).encoder.use_attention(choices)
        score = job.held_out.score(model, device)
        record = {"step": job.state.step, "tokens": job.state.tokens, **score.record()}
        job.run.log.append({"kind": "end", **record, "time": {"elapsed": job.clock.seconds}})
        write_model_card(Run.read(job.run.path), final)
        write_report(job.run.path)
        print(score.told())
        print(f"model {final}, report {job.run.path / 'report.md'}", flush=True)
    job.accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        _ended_groups.append(torch.distributed.group.WORLD)
    job.accelerator.end_training()
    return final


def _validation_due(settings: PretrainSettings, step: int, before: float, after: float) -> bool:
    if settings.log.validate_every_steps is not None:
        return step % settings.log.validate_every_steps == 0
    return math.floor(before * VALIDATIONS) < math.floor(after * VALIDATIONS)


def _counts(batches: list[TokenBatch]) -> Tensor:
    """Targets and sentence pairs of these micro-batches, (2,) fp64."""
    return torch.stack([torch.stack([batch.num_targets(), batch.num_pairs()]) for batch in batches]).sum(0).double()


def _seed_dropout(seed: int, step: int, micro: int, rank: int) -> None:
    """Random state of one micro-batch: a function of where it stands, not of what ran before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, micro, rank]).generate_state(1, np.uint64)[0]))
