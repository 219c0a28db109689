"""The pretraining loop, readable from top to bottom.

One denominator an optimizer step and loss: the number of targets, and that of sentence pairs, over all micro-batches
and ranks, known before the first backward pass, so that neither accumulation nor the number of ranks changes what a
step means (the mean of means is another loss). Batch i is a pure function of (seed, i), so resuming is arithmetic; on
CPU a resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.checkpoint import save
from encoderkit.encoder.model import MaskedLM, choose_attention
from encoderkit.encoder.pseudo_likelihood import packed_logits
from encoderkit.kernels.errors import InputError
from encoderkit.kernels.segments import send
from encoderkit.pretrain.averaging import mean_weights, newest_due
from encoderkit.pretrain.batches import lost_worker
from encoderkit.pretrain.failures import lost_rank, other_failed, out_of_memory
from encoderkit.pretrain.job import Job, build_job
from encoderkit.pretrain.minimal_pairs import accuracy
from encoderkit.pretrain.optimizer import set_learning_rates, skip_where
from encoderkit.pretrain.parallel import clip_gradients, gather_whole, without_reduction
from encoderkit.pretrain.probe import HeldOutScore, probe_sums
from encoderkit.pretrain.progress import Progress
from encoderkit.pretrain.report import Run, write_model_card, write_report
from encoderkit.pretrain.run_folder import RunFolder
from encoderkit.pretrain.schedule import factor
from encoderkit.pretrain.settings import PretrainSettings
from encoderkit.pretrain.spikes import WINDOW
from encoderkit.pretrain.stopping import stop_signals

# Kept until the process ends. A gloo group that is destroyed right after its last collective waits, with Python's lock
# in hand, for its own thread, which wants that lock to let go of a tensor: one rank in some runs hung there for good.
_ended_groups: list[Any] = []


def pretrain(settings: PretrainSettings, resume: bool = False, *, allow_change: Collection[str] = ()) -> Path:
    """Train as settings say, or go on with the run folder settings.out; returns the folder of the finished model.

    allow_change: keys that may differ from those of the run that is resumed. Raises InputError, with nothing written,
    where the settings cannot be served; FloatingPointError where training diverged; ChildProcessError where a process
    it needs is gone; Stopped, with a checkpoint written, where a signal asked for it.
    """
    job = build_job(settings, resume, allow_change=allow_change)
    try:
        _train(job)
        final = finish(job)
        if stop_signals.asked:  # while the last step was saved
            raise stop_signals.stopped(f" when the run had ended: {final}")
        return final
    except RuntimeError as error:
        told = lost_worker(error, job.state.step) or lost_rank(error, job) or out_of_memory(error, job)
        if told is None:
            raise
        raise told from error
    finally:
        job.close()


def _train(job: Job) -> None:
    settings, state, clock, log = job.settings, job.state, job.clock, job.log
    clock.start(state.seconds)
    with (
        stop_signals.deferred(is_in_vain=other_failed),
        Progress(enabled=job.accelerator.is_main_process, description=Path(settings.out).name) as bar,
    ):
        job.accelerator.wait_for_everyone()  # no rank is in a step that another one could leave by a signal
        if state.step == 0 and settings.model.init_from is not None:
            _tell_score(job, bar)  # what the pretrained model brings
        while (before := clock.progress(state.step)) < 1:
            if (due := clock.due_stage(state.step)) != clock.stage:
                check_finite(job)  # which tells the rows of this stage
                _tell_spikes(job, bar)
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
                clock.validation_due(state.step, before),
                clock.checkpoint_due(state.step),
            )
            is_waited_for = log_due or validation_due or save_due or state.step % WINDOW == 0  # spikes are told in time
            stops = _stops(job, is_waited_for)
            if is_waited_for or stops:
                norm = check_finite(job)
                _tell_spikes(job, bar)
            if log_due:
                taken = log.take()
                lr = job.optimizers[0].param_groups[0]["lr"]
                taken["time"]["elapsed"] = clock.seconds
                job.tell({"kind": "train", **line, "grad_norm": norm, "lr": lr, "mask_rate": rate, **taken})
                bar.update(after, state.step, loss=taken["loss"], pair_accuracy=taken.get("pair_accuracy"))
            score = _tell_score(job, bar) if validation_due else None
            if score is not None and score < state.best:
                state.best = score
                save_due |= _saves_best(settings)
            if save_due or stops:
                began = time.perf_counter()
                job.save(score, due=save_due)
                log.leave_out(time.perf_counter() - began)
            if stops:
                job.finish_saving()
                raise stop_signals.stopped(f" after step {state.step}; go on with run --resume {settings.out}")
        job.finish_saving()
    job.end_workers()


def _stops(job: Job, is_waited_for: bool) -> bool:
    """Whether any rank was asked to stop: the same answer on all of them.

    One rank knows it at once. Several add it up with the counts of each step, which costs nothing more. On a CPU the
    sum is there; on GPUs it is read where the host waits for them anyway, log.every_steps steps later at most.
    """
    if job.accelerator.num_processes == 1:
        return stop_signals.asked
    return (is_waited_for or not job.async_device) and bool(job.ranks_asked)


def train_step(job: Job, batches: list[TokenBatch]) -> None:
    """One optimizer step over this rank's micro-batches; none, on any rank, where a gradient is not finite or a spike.

    On a CPU the first raises FloatingPointError at once. A GPU is not waited for: check_finite raises it later.
    """
    accelerator, timer, settings, step = job.accelerator, job.log.timer, job.settings, job.state.step
    counts = accelerator.reduce(send(_counts(batches), accelerator.device), reduction="sum")
    job.ranks_asked = counts[2]
    scales = accelerator.num_processes / counts[:2].clamp(min=1)  # DDP averages over ranks; a loss sum overflows fp16
    loss = torch.zeros((), device=accelerator.device)
    for micro, batch in enumerate(batches):
        _seed_dropout(settings.seed, step, micro, accelerator.process_index)
        is_last = micro == len(batches) - 1
        with contextlib.nullcontext() if is_last else without_reduction(job.wrapped):
            with timer.phase("forward"):
                tokens, pairs = job.wrapped(batch.to(accelerator.device, non_blocking=True))
                objective = tokens.loss * scales[0] + pairs.loss * scales[1]
            with timer.phase("backward"):
                accelerator.backward(objective)
        loss += objective.detach()
        job.log.add_loss(tokens, pairs)
    with timer.phase("optimizer"):
        loss = accelerator.reduce(loss, reduction="mean")
        norm = clip_gradients(job.model, settings.optimizer.clip)  # gradients are averaged: all ranks see one's NaN
        is_bad, is_spike = job.log.add_norm(loss, norm, step), job.spikes.add(loss, norm)
        if job.async_device:
            skip_where(torch.maximum(is_bad, is_spike), job.optimizers)
        else:
            check_finite(job)
        for optimizer in job.prepared:
            if job.async_device or not is_spike:
                optimizer.step()
            optimizer.zero_grad(set_to_none=not settings.cuda_graphs)


def check_finite(job: Job) -> float:
    """The gradient norm of the last step before clipping. Waits for the device.

    Raises FloatingPointError on every rank where that of any step so far was not finite.
    """
    norm, step = job.log.read_norm()
    if step is not None:
        first, after = job.clock.stage.row(step), job.clock.stage.row(step + 1)
        raise FloatingPointError(
            f"step {step + 1}, rows {first:.0f} to {after - 1:.0f}: loss or gradient is not finite; the update was not "
            "made. Resume from the newest checkpoint, or start again with a lower learning rate"
        )
    return norm


def _tell_spikes(job: Job, bar: Progress) -> None:
    """Log the steps that were left out since the last time. Waits for the device."""
    stage = job.clock.stage
    for spike in job.spikes.spikes(job.state.step):
        rows = [int(stage.row(spike.step - 1)), int(stage.row(spike.step)) - 1]
        numbers = {"loss": spike.loss, "grad_norm": spike.norm, "loss_limit": spike.limits[0]}
        numbers["grad_norm_limit"] = spike.limits[1]
        job.tell({"kind": "spike", "step": spike.step, "rows": rows, **numbers})
        bar.note(
            f"step {spike.step}, rows {rows[0]} to {rows[1]}: loss {spike.loss:.3f}, gradient norm {spike.norm:.3g}; "
            f"expected below {spike.limits[0]:.3f} and {spike.limits[1]:.3g}, skipped"
        )


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


def _tell_score(job: Job, bar: Progress) -> float:
    """Log the held-out score; returns the loss of masked tokens."""
    began = time.perf_counter()
    score, state = validate(job), job.state
    at = {"step": state.step, "tokens": state.tokens}
    pairs = _minimal_pairs(job)
    job.tell({"kind": "validation", **at, **score.record(), **pairs, "time": {"elapsed": job.clock.seconds}})
    told = "".join(f"; {name.replace('_', ' ')} {value:.3f}" for name, value in pairs.items())
    bar.note(f"step {state.step}: {score.told()}{told}")
    seconds = time.perf_counter() - began
    job.clock.validated(seconds)
    job.log.leave_out(seconds)
    return score.probe.loss


def _minimal_pairs(job: Job) -> dict[str, float]:
    """Accuracy on the sample of minimal pairs, by variant; empty without one, and on all ranks but the first."""
    if job.minimal_pairs is None or not job.accelerator.is_main_process:
        return {}
    model = job.model.eval()
    with job.accelerator.autocast():  # which the wrapped model has by itself
        scores = job.minimal_pairs.score(packed_logits(model), batch_tokens=job.settings.micro_batch_tokens)
    model.train()
    return {f"minimal_pairs_{variant}": accuracy(part) for variant, part in scores.items()}


@torch.no_grad()
def finish(job: Job) -> Path:
    """Write final/ with its model card, score it in fp32, and write the report; returns final/.

    The folder appears when it is whole. Raises InputError where it cannot be written.
    """
    final = Path(job.settings.out) / "final"
    weights = gather_whole(job.model.state_dict(), keep=job.run is not None)
    if job.run is not None:
        count = job.settings.checkpoints.average
        averaged = newest_due(job.run.checkpoints, count) if count > 1 else []
        model = MaskedLM(job.model.config)  # not the prepared one, which has autocast and may be sharded
        model.load_state_dict(mean_weights(averaged) if averaged else weights, strict=True)
        try:
            score = _write_final(job, job.run, model, final, [checkpoint.step for checkpoint in averaged])
        except (OSError, SafetensorError) as error:
            raise InputError(f"{final} cannot be written: {error}; free space there and resume") from error
        print(score.told())
        print(f"model {final}, report {job.run.path / 'report.md'}", flush=True)
    job.accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        _ended_groups.append(torch.distributed.group.WORLD)
    job.accelerator.end_training()
    return final


def _write_final(job: Job, run: RunFolder, model: MaskedLM, final: Path, averaged: list[int]) -> HeldOutScore:
    device = job.accelerator.device
    partial = final.with_name(".final.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        save(model, partial, job.tokenizer)
        choices = choose_attention(model.config, "auto", device=device, dtype=torch.float32)
        model.to(device).encoder.use_attention(choices)
        score = job.held_out.score(model, device)
        record: dict[str, Any] = {"step": job.state.step, "tokens": job.state.tokens, **score.record()}
        if averaged:
            record["averaged_steps"] = averaged
        run.log.append({"kind": "end", **record, "time": {"elapsed": job.clock.seconds}})
        write_model_card(Run.read(run.path), partial)
        shutil.rmtree(final, ignore_errors=True)  # of an earlier end of this run
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    write_report(run.path)
    return score


def _saves_best(settings: PretrainSettings) -> bool:
    """Whether a validation with the lowest loss so far is saved: where no steps were named that saves could share."""
    return settings.checkpoints.every_steps is None and settings.log.validate_every_steps is None


def _counts(batches: list[TokenBatch]) -> Tensor:
    """Targets and sentence pairs of these micro-batches, and whether this rank was asked to stop: (3,) fp64."""
    counts = torch.stack([torch.stack([batch.num_targets(), batch.num_pairs()]) for batch in batches]).sum(0).double()
    return torch.cat([counts, counts.new_tensor([stop_signals.asked])])


def _seed_dropout(seed: int, step: int, micro: int, rank: int) -> None:
    """Random state of one micro-batch: a function of where it stands, not of what ran before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, micro, rank]).generate_state(1, np.uint64)[0]))
