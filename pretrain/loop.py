"""The pretraining loop, from settings to a finished model folder, readable from top to bottom.

One denominator an optimizer step: the number of targets over all micro-batches and ranks, known before the first
backward pass, so that neither accumulation nor the number of ranks changes what a step means. Batch i is a pure
function of (seed, i), so resuming is arithmetic. On CPU a resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from encoderkit.encoder.batch import IGNORE_INDEX, TokenBatch
from encoderkit.encoder.checkpoint import save
from encoderkit.encoder.config import EncoderConfig, preset
from encoderkit.encoder.model import MaskedLM, choose_attention
from encoderkit.encoder.precision import resolve_precision
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.batches import StepBatches, step_loader
from encoderkit.pretrain.checkpoint import (
    flatten_optimizer,
    keep,
    latest_checkpoint,
    save_checkpoint,
    unflatten_optimizer,
)
from encoderkit.pretrain.flops import forward_flops, peak_flops
from encoderkit.pretrain.optimizer import build_optimizers, set_learning_rates
from encoderkit.pretrain.order import Order
from encoderkit.pretrain.probe import ProbeScore, probe_batches, probe_sequences, unigram_entropy
from encoderkit.pretrain.progress import Progress
from encoderkit.pretrain.report import write_model_card, write_report
from encoderkit.pretrain.run_folder import RunFolder
from encoderkit.pretrain.schedule import factor, mask_rate
from encoderkit.pretrain.settings import Model, PretrainSettings
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.timing import PhaseTimer
from encoderkit.pretrain.tokenizer import load_tokenizer


@dataclass
class State:
    """What a run needs to go on, besides weights and optimizer state."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # real tokens seen by all ranks
    seconds: float = 0.0  # spent in the loop
    window: list[list[float]] = field(default_factory=list)  # of each rank: sums since the last log line


def pretrain(settings: PretrainSettings, resume: bool = False) -> Path:
    """Train as settings say, or go on with the run folder settings.out; returns the folder of the finished model.

    Raises InputError before anything is written where the settings cannot be served.
    """
    accelerator = _accelerator(settings)
    device, is_main = accelerator.device, accelerator.is_main_process
    store = Store.open(Path(settings.data.store))
    tokenizer = load_tokenizer(store.tokenizer_folder)
    config = encoder_config(settings.model, store.vocab_size, tokenizer.pad_token_id)
    if settings.data.max_tokens > config.max_positions:
        raise InputError(f"data.max_tokens is {settings.data.max_tokens}; this model takes {config.max_positions}")
    precision = resolve_precision(settings.precision, device)
    attention = choose_attention(
        config, settings.attention, device=device, dtype=precision.dtype, deterministic=settings.deterministic
    )
    clock = Clock(settings)
    order = Order(
        store.document_lengths,
        seed=settings.seed,
        max_tokens=settings.data.max_tokens,
        row_tokens=settings.data.row_tokens,
    )
    dataset = StepBatches(
        store,
        order,
        settings,
        tokenizer,
        rate_at=lambda step: mask_rate(settings.masking, clock.progress(step)),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        static_shapes=device.type == "cuda",
    )
    run = None
    if is_main:
        run = RunFolder.resume(settings) if resume else RunFolder.create(settings)

    torch.manual_seed(settings.seed)
    model = MaskedLM(config)
    model.encoder.use_attention(attention)
    optimizers = build_optimizers(model, settings.optimizer)
    facts = {  # the bits of a run depend on these
        "attention": {span: choice.name for span, choice in attention.items()},
        "precision": precision.name,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "world_size": accelerator.num_processes,
    }
    state = State()
    if resume:
        state = _restore(Path(settings.out), model, optimizers, facts)
    clock.start(state.seconds)
    unwrapped = model
    wrapped, *prepared = accelerator.prepare(model, *optimizers)
    if settings.compile:
        unwrapped.encoder.compile_blocks()

    sequences = probe_sequences(store.held_out_texts(), tokenizer, seed=0)
    probe = probe_batches(sequences, tokens_per_batch=settings.micro_batch_tokens)
    entropy = unigram_entropy(store.unigram_counts, sequences)
    about = {
        "parameters": unwrapped.num_parameters(),
        "vocab_size": config.vocab_size,
        "unigram_entropy": entropy,
        "ln_vocab": math.log(config.vocab_size),
        "rows_per_epoch": order.rows_in_epoch(0),
    }
    if run is not None:
        run.describe(
            model=asdict(config), data=store.summary(), bits=facts,
            attention={span: choice.reason for span, choice in attention.items()}, precision=precision.reason, **about,
        )  # fmt: skip
        run.log.cut_back(state.step)
        if state.step == 0:
            run.log.append({"kind": "start", "step": 0, "tokens": 0, **about})
    if settings.log.trackers:
        accelerator.init_trackers("encoderkit")

    log = Log(settings, accelerator, config, state, precision.dtype)
    loader = step_loader(dataset, state.step, clock.total_steps, settings.data.workers)
    with Progress(enabled=is_main, description=Path(settings.out).name) as bar:
        while True:
            before = clock.progress(state.step)
            if before >= 1 or (clock.total_steps is not None and state.step >= clock.total_steps):
                break
            with log.timer.phase("data"):
                step_batch = next(loader)
            set_learning_rates(optimizers, factor(settings.schedule, clock.at_step(state.step)))
            norm = train_step(wrapped, prepared, step_batch.batches, accelerator, log, settings, state.step)
            state.step += 1
            state.tokens += step_batch.real_tokens
            clock.tick(accelerator)
            after = clock.progress(state.step)
            is_last = after >= 1
            log.count_step(step_batch, norm)
            bar.update(after, state.step, **log.live(state))
            if state.step % settings.log.every_steps == 0 or is_last:
                record = log.record(state, optimizers, step_batch.rate, clock.seconds)
                _tell(run, accelerator, record, settings)
            if _validates(settings, state.step, before, after):
                score = validate(wrapped, probe, accelerator)
                _tell(run, accelerator, _validation(state, score, clock.seconds), settings)
                bar.note(f"step {state.step}: held-out loss {score.loss:.4f}, accuracy {score.accuracy:.3f}")
            if clock.checkpoint_due(state.step, is_last, accelerator):
                state.seconds = clock.seconds
                state.window = log.window()
                if run is not None:
                    _save(run, settings, unwrapped, optimizers, state, facts)
                clock.checkpoint_done()

    final = Path(settings.out) / "final"
    if run is not None:
        _finish(run, settings, unwrapped, tokenizer, store, sequences, state, clock.seconds, about)
    accelerator.end_training()
    accelerator.wait_for_everyone()
    return final


def train_step(
    model: torch.nn.Module,
    optimizers: list[Any],
    batches: list[TokenBatch],
    accelerator: Accelerator,
    log: Log,
    settings: PretrainSettings,
    step: int,
) -> Tensor:
    """One optimizer step over this rank's micro-batches; returns the gradient norm before clipping.

    Raises FloatingPointError on every rank, before any update, where a gradient is not finite.
    """
    device, timer = accelerator.device, log.timer
    targets = sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches if batch.targets is not None)
    denominator = accelerator.reduce(torch.tensor(float(targets), device=device), reduction="sum")
    scale = accelerator.num_processes / denominator  # DDP averages over ranks
    for micro, batch in enumerate(batches):
        _seed(settings.seed, step, micro, accelerator.process_index)
        is_last = micro == len(batches) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            with timer.phase("forward"):
                result = model(batch.to(device, non_blocking=True))
            with timer.phase("backward"):
                accelerator.backward(result.loss * scale)
        log.count_loss(result.loss.detach(), result.count, result.correct)
    with timer.phase("optimizer"):
        limit = settings.optimizer.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        if not torch.isfinite(norm):  # gradients are averaged over ranks: if one rank's are bad, all ranks see it
            raise FloatingPointError(
                f"step {step}: the gradient is not finite, so no update was made; global rows "
                f"{step * settings.batch_tokens // settings.data.row_tokens} and following. "
                "Resume from the newest checkpoint with a lower learning rate, or look at these rows"
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def validate(model: torch.nn.Module, probe: list[TokenBatch], accelerator: Accelerator) -> ProbeScore:
    """Loss and accuracy at the fixed probe, its batches shared out over the ranks."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for batch in probe[accelerator.process_index :: accelerator.num_processes]:
        result = model(batch.to(accelerator.device))
        sums += torch.stack([result.loss.double(), result.count.double(), result.correct.double()])
    loss, count, correct = accelerator.reduce(sums, reduction="sum").tolist()
    model.train()
    return ProbeScore(loss=loss / count, accuracy=correct / count, count=int(count))


def encoder_config(model: Model, vocab_size: int, pad_token_id: int) -> EncoderConfig:
    """The preset with the fields that are set replaced."""
    given = {name: value for name, value in asdict(model).items() if value is not None}
    name, size = given.pop("preset"), given.pop("size")
    return preset(name, size, vocab_size=vocab_size, pad_token_id=pad_token_id, **given)


def _accelerator(settings: PretrainSettings) -> Accelerator:
    on_cpu = not torch.cuda.is_available()
    precision = resolve_precision(settings.precision, torch.device("cpu" if on_cpu else "cuda"))
    if settings.deterministic:
        torch.use_deterministic_algorithms(True)
    return Accelerator(
        mixed_precision=precision.accelerate,
        cpu=on_cpu,
        log_with=settings.log.trackers or None,
        project_dir=settings.out,
    )


def _restore(out: Path, model: MaskedLM, optimizers: list[Any], facts: dict[str, Any]) -> State:
    """Load the newest whole checkpoint; refuse where this machine would compute other bits silently."""
    checkpoint = latest_checkpoint(out / "checkpoints")
    if checkpoint is None:
        return State()
    saved = checkpoint.state
    if facts["device"] == "cpu":
        torch.set_num_threads(saved["facts"]["threads"])
        facts["threads"] = saved["facts"]["threads"]
    for name in ("attention", "precision", "device"):
        if saved["facts"][name] != facts[name]:
            raise InputError(
                f"{checkpoint.path}: {name} was {saved['facts'][name]} and would be {facts[name]} here; resume on the "
                "same kind of machine"
            )
    model.load_state_dict(checkpoint.tensors("model"), strict=True)
    for i, optimizer in enumerate(optimizers):
        tensors = checkpoint.tensors(f"optimizer-{i}")
        optimizer.load_state_dict(unflatten_optimizer(tensors, saved["optimizers"][i]))
    return State(**saved["run"])


def _save(
    run: RunFolder,
    settings: PretrainSettings,
    model: MaskedLM,
    optimizers: list[Any],
    state: State,
    facts: dict[str, Any],
) -> None:
    flat = [flatten_optimizer(optimizer.state_dict()) for optimizer in optimizers]
    tensors = {"model": model.state_dict(), **{f"optimizer-{i}": part for i, (part, _) in enumerate(flat)}}
    described = {"run": asdict(state), "facts": facts, "optimizers": [about for _, about in flat]}
    save_checkpoint(run.checkpoints, state.step, tensors, described)
    keep(run.checkpoints, settings.checkpoints.keep)


def _finish(
    run: RunFolder,
    settings: PretrainSettings,
    model: MaskedLM,
    tokenizer: Any,
    store: Store,
    sequences: list[Any],
    state: State,
    seconds: float,
    about: dict[str, Any],
) -> None:
    """Write final/ with its model card, score it in fp32 as anyone else would, and write the report."""
    save(model, run.final, tokenizer)
    loss, count, correct = sum_losses(model, probe, next(model.parameters()).device).tolist()
    score = ProbeScore(loss=loss / count, accuracy=correct / count, count=int(count))
    run.log.append(
        {"kind": "end", "step": state.step, "tokens": state.tokens, "loss": score.loss, "accuracy": score.accuracy,
         "time": {"elapsed": round(seconds, 3)}}
    )  # fmt: skip
    write_model_card(run.path)
    write_report(run.path)
    run.close()
