"""Fine-tuning, from labelled rows to a measured model folder: one loop for every kind of task.

One denominator an optimizer step, known before the backward pass: the weight of all its targets, over all micro-batches
and processes. The epoch that is best on validation is kept; test is measured once, with it.

N inputs of a split, M outputs of a split, C labels.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from encoderkit.encoder.checkpoint import load_classifier, load_config, save_classifier, untrained_classifier
from encoderkit.encoder.classifier import Classifier
from encoderkit.encoder.model import choose_attention
from encoderkit.encoder.precision import Precision, resolve_precision
from encoderkit.finetune.data import LabelledData, load_data
from encoderkit.finetune.inference import check_max_tokens, score_texts
from encoderkit.finetune.report import write_report
from encoderkit.finetune.run_folder import (
    CHECKPOINTS,
    Log,
    NoLog,
    check_out,
    check_same,
    held,
    remove_checkpoints,
    write_predictions,
)
from encoderkit.finetune.settings import FinetuneSettings
from encoderkit.finetune.task_head import Answer, Limits, Prepared, TaskHead
from encoderkit.finetune.task_heads import HEADS
from encoderkit.finetune.trainable import add_adapters, freeze, layer_rates
from encoderkit.finetune.training_state import State
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.checkpoint import Checkpoint
from encoderkit.pretrain.command_line import dump_yaml
from encoderkit.pretrain.machine import Machine
from encoderkit.pretrain.optimizer import build_optimizers, set_learning_rates
from encoderkit.pretrain.parallel import agreed
from encoderkit.pretrain.restoring import check_same_checkpoint, newest_checkpoint, stay_with
from encoderkit.pretrain.run_folder import replace_file
from encoderkit.pretrain.schedule import factor
from encoderkit.pretrain.terminal import plain_console
from encoderkit.pretrain.tokenizer import check_vocabulary, load_tokenizer

LOG_EVERY_STEPS = 20  # the loss is read from the device this often: a read waits for all work before it


@dataclass(frozen=True)
class FinetuneResult:
    """What a run measured. scores: split -> metric -> value, at best_epoch; metric chose that epoch."""

    out: Path
    metric: str
    best_epoch: int
    scores: dict[str, dict[str, float]]

    @property
    def score(self) -> float:
        """The metric on test, or on validation where there is no test."""
        return self.scores.get("test", self.scores["validation"])[self.metric]


def finetune(
    settings: FinetuneSettings, data: LabelledData | None = None, *, console: Console | None = None
) -> FinetuneResult:
    """Fine-tune, measure and write the run folder: log.jsonl, predictions.jsonl, metrics.json, report.md, final/.

    data: what load_data(settings.resolve()) gives, where it is read already. On CPU two runs with the same settings
    write the same numbers, and so does one that was stopped and resumed. Raises InputError for settings or data that
    cannot be used, and FloatingPointError for a loss that is not finite.
    """
    console = console or plain_console()
    out = check_out(settings.out, resume=settings.resume)
    data = data or load_data(settings.resolve())
    start = _find_start(out, settings)
    if start and start.state["facts"]["rows"] != data.fingerprint:
        raise InputError(
            f"out: the run in {out} began with other rows than {data.train.source} and the files beside it hold now; "
            "put those back, or choose another --out and begin again"
        )
    run = _open_run(settings, data, start)
    metrics = run.head.metric_names(settings.metric, data.task.metrics)
    run.accelerator.wait_for_everyone()  # every process has looked at the folder
    with held(out) if run.is_first else contextlib.nullcontext():
        if run.is_first:
            _begin_folder(out, settings, start)
        else:
            console.quiet = True
        log = Log(out / "log.jsonl", up_to_step=start.step if start else None) if run.is_first else NoLog()
        _tell_start(console, run, data)

        history, outputs = _train(run, metrics, log, console, start)
        best_epoch = max(history, key=lambda line: line[metrics[0]])["epoch"]  # the first of equals
        if data.test:
            outputs["test"] = run.score("test")
        run.head.finish(run.model)
        answers = {name: run.head.answers(run.prepared[name], outputs[name]) for name in data.splits()}
        scores = {name: run.measure(metrics, name, outputs[name], answers[name]) for name in data.splits()}
        result = FinetuneResult(out, metrics[0], best_epoch, scores)
        if run.is_first:
            _write_results(run, data, result, history, answers, log)
        run.accelerator.wait_for_everyone()
    return result


@dataclass
class _Run:
    """What is trained, on what, how."""

    settings: FinetuneSettings
    accelerator: accelerate.Accelerator
    precision: Precision
    head: TaskHead
    model: Classifier
    tokenizer: Any
    prepared: dict[str, Prepared]
    facts: dict[str, Any]  # what the bits of a run depend on
    merge: Callable[[], None] | None = None  # adapters into the weights

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    def score(self, split: str) -> Tensor:
        """Outputs (M, C) of a split, restored."""
        outputs = score_texts(
            self.model,
            self.prepared[split].encoded,
            precision=self.precision,
            max_batch_tokens=self.settings.micro_batch_tokens,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )
        return self.head.restore(outputs)

    def measure(self, metrics: list[str], split: str, outputs: Tensor, answers: list[Answer]) -> dict[str, float]:
        """Mean loss in the unit of the head, and every metric."""
        prepared = self.prepared[split]
        assert prepared.targets is not None
        sizes = self.head.sizes(prepared.encoded, np.arange(len(prepared.encoded)))
        loss = self.head.loss(outputs, torch.from_numpy(prepared.targets), sizes, training=False)
        mean = float(loss) / self.head.weight(prepared.targets, training=False)
        return {"loss": mean, **self.head.measure(metrics, prepared.examples, answers)}


def _open_run(settings: FinetuneSettings, data: LabelledData, start: Checkpoint | None) -> _Run:
    """Open the model and its tokenizer, check that all fits together, tokenize."""
    accelerate.state.AcceleratorState._reset_state()  # runs of other precisions may have gone before in this process
    device = accelerate.PartialState(cpu=not torch.cuda.is_available()).device
    check_same_checkpoint(start, Path(settings.out))
    before = start.state["facts"] if start else {}
    precision = agreed(resolve_precision(before.get("precision", settings.precision), device))
    choices = choose_attention(
        load_config(settings.model), settings.attention, device=device, dtype=precision.dtype
    )  # before the weights are read: what cannot serve is told at once
    accelerator = accelerate.Accelerator(mixed_precision=precision.accelerate)
    facts = {"rows": data.fingerprint, **Machine(accelerator, precision, choices, None).facts()}
    if start:
        stay_with(start, facts)
    kind = HEADS[data.task.kind]
    outputs = kind(data.label_names, Limits(8, False)).outputs
    model = load_classifier(
        settings.model,
        outputs,
        kind.model_class,
        seed=settings.seed,
        dropout=settings.dropout,
        pooling=settings.pooling,
    )
    if settings.untrained:
        model = untrained_classifier(model.config, outputs, settings.seed, kind.model_class)
    model.problem_type = kind.problem_type
    model.encoder.use_attention(choices)
    tokenizer = load_tokenizer(settings.model)
    check_vocabulary(tokenizer, model.config.vocab_size, settings.model)
    check_max_tokens(settings.max_tokens, model.config.max_positions, settings.model)
    limits = Limits(settings.max_tokens, model.config.token_types > 1, settings.tag_pieces, settings.qa)
    head = kind(data.label_names, limits, unanswerable=bool(data.task.data.unanswerable))
    prepared = {
        name: head.prepare(tokenizer, split.examples) for name, split in {"train": data.train, **data.splits()}.items()
    }
    targets = prepared["train"].targets
    assert targets is not None
    if settings.class_weights == "balanced":
        head.balance(targets)
    head.smoothing = settings.label_smoothing
    head.begin(targets)
    run = _Run(settings, accelerator, precision, head, model, tokenizer, prepared, facts)
    if settings.frozen_layers is not None:
        freeze(model, settings.frozen_layers)
    if settings.lora.rank:
        run.merge = add_adapters(model, settings.lora, settings.seed)
    model.to(device)
    return run


def _find_start(out: Path, settings: FinetuneSettings) -> Checkpoint | None:
    """The state to go on with, of a run with the same settings; every process finds the same."""
    config = out / "config.yaml"
    if not settings.resume or not config.is_file():
        return None
    check_same(config, settings)
    start = newest_checkpoint(out)
    if start and "facts" not in start.state:
        raise InputError(f"out: the run in {out} was begun by an earlier version; begin it again in another --out")
    return start


def _begin_folder(out: Path, settings: FinetuneSettings, start: Checkpoint | None) -> None:
    """Write config.yaml into the folder that is held now; another run may have used it since it was looked at."""
    check_out(settings.out, resume=settings.resume)
    if start is None:
        replace_file(out / "config.yaml", dump_yaml(settings))
        (out / "log.jsonl").unlink(missing_ok=True)


def _train(
    run: _Run, metrics: list[str], log: Log, console: Console, start: Checkpoint | None
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Train, and leave the weights of the best epoch in run.model.

    Returns the figures of each epoch, and the outputs of the best epoch on validation.
    """
    settings, train = run.settings, run.prepared["train"]
    rates = layer_rates(run.model, settings.layer_decay)
    optimizers = build_optimizers(run.model, settings.optimizer, dtype=run.precision.dtype, rate=rates)
    state = State.load(start, run.model, optimizers) if start else State()
    steps_per_epoch = -(-len(train.encoded) // settings.batch_size)
    total_steps = steps_per_epoch * settings.epochs
    with _progress(console) as progress:
        bar = progress.add_task("", total=total_steps, completed=state.step, loss="")
        for epoch in range(state.epoch + 1, settings.epochs + 1):
            if settings.patience and state.epoch - state.best_epoch >= settings.patience:
                console.print(f"no better epoch than {state.best_epoch} in {settings.patience}; training stops")
                break
            run.model.train()
            torch.manual_seed(_dropout_seed(settings.seed, epoch, run.accelerator.process_index))
            order = epoch_order(len(train.encoded), settings.seed, epoch)
            logged_loss = torch.zeros((), device=run.accelerator.device)
            epoch_loss, epoch_weight, logged_weight = 0.0, 0.0, 0.0
            for first in range(0, len(order), settings.batch_size):
                set_learning_rates(optimizers, factor(settings.schedule, (state.step + 0.5) / total_steps))
                loss, weight = _step(run, order[first : first + settings.batch_size], optimizers)
                logged_loss += loss
                logged_weight += weight
                state.step += 1
                if state.step % LOG_EVERY_STEPS == 0 or state.step % steps_per_epoch == 0:
                    loss_sum = _finite(float(run.accelerator.reduce(logged_loss, "sum")), state.step)
                    mean = loss_sum / logged_weight
                    lr = max(group["lr"] for group in optimizers[0].param_groups)
                    log.append(step=state.step, epoch=epoch, loss=mean, lr=lr)
                    progress.update(bar, completed=state.step, loss=f"loss {mean:.4f}")
                    epoch_loss, epoch_weight = epoch_loss + loss_sum, epoch_weight + logged_weight
                    logged_loss, logged_weight = torch.zeros_like(logged_loss), 0.0
            outputs = run.score("validation")
            answers = run.head.answers(run.prepared["validation"], outputs)
            scores = run.measure(metrics, "validation", outputs, answers)
            state.epoch = epoch
            state.history.append({"epoch": epoch, "train_loss": epoch_loss / epoch_weight, **scores})
            log.append(step=state.step, epoch=epoch, validation=scores)
            console.print(_epoch_line(state.history[-1], settings.epochs, metrics))
            if not state.best or scores[metrics[0]] > state.history[state.best_epoch - 1][metrics[0]]:
                state.best_epoch, state.outputs = epoch, outputs  # a tie keeps the earlier epoch
                state.best = {name: tensor.detach().cpu().clone() for name, tensor in run.model.state_dict().items()}
            if settings.checkpoints and run.is_first and epoch < settings.epochs:
                state.save(Path(settings.out) / CHECKPOINTS, run.model, optimizers, run.facts)
    run.model.load_state_dict(state.best)
    if run.merge is not None:
        run.merge()
    return state.history, {"validation": state.outputs}


def _step(run: _Run, inputs: np.ndarray, optimizers: list[torch.optim.Optimizer]) -> tuple[Tensor, float]:
    """One optimizer step over these inputs; returns this process's sum of losses, and the weight of all processes'."""
    accelerator, train, head = run.accelerator, run.prepared["train"], run.head
    weight = head.weight(train.targets_of(inputs), training=True)
    total = torch.zeros((), device=accelerator.device)
    own = inputs[accelerator.process_index :: accelerator.num_processes]
    for piece in train.encoded.pieces(own, run.settings.micro_batch_tokens):
        targets = torch.from_numpy(train.targets_of(piece)).to(accelerator.device)
        with accelerator.autocast():
            outputs = run.model(train.encoded.batch(piece).to(accelerator.device))
        loss = head.loss(outputs.float(), targets, head.sizes(train.encoded, piece), training=True)
        accelerator.backward(loss / weight)
        total += loss.detach()
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    if accelerator.num_processes > 1:
        _sum_gradients(accelerator, trained)
    if run.settings.optimizer.clip:
        torch.nn.utils.clip_grad_norm_(trained, run.settings.optimizer.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total, weight


def _sum_gradients(accelerator: accelerate.Accelerator, parameters: list[torch.nn.Parameter]) -> None:
    """Add up gradients over processes, which may have had different numbers of micro-batches, or none."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
    for parameter, part in zip(parameters, flat.split([gradient.numel() for gradient in gradients])):
        parameter.grad = part.view_as(parameter)


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) int64: the order of the training inputs in an epoch, a pure function of seed and epoch."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable")


def _dropout_seed(seed: int, epoch: int, rank: int) -> int:
    return int(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=[rank, 1, 0, 0]).random_raw())


def _finite(loss: float, step: int) -> float:
    if not np.isfinite(loss):
        raise FloatingPointError(f"loss is {loss} at step {step}; lower optimizer.lr, or use precision fp32")
    return loss


def _write_results(
    run: _Run,
    data: LabelledData,
    result: FinetuneResult,
    history: list[dict[str, Any]],
    answers: dict[str, list[Answer]],
    log: Log,
) -> None:
    """final/, predictions.jsonl, metrics.json and report.md."""
    settings, out = run.settings, result.out
    run.tokenizer.model_max_length = settings.max_tokens  # so that predict, and transformers, cut where training did
    partial = out / ".final.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped here
    save_classifier(run.model, partial, run.tokenizer)
    shutil.rmtree(out / "final", ignore_errors=True)
    partial.rename(out / "final")
    write_predictions(out / "predictions.jsonl", _prediction_lines(run, data, answers))
    encoded = {name: prepared.encoded for name, prepared in run.prepared.items()}
    summary = {
        "task": settings.task,
        "kind": data.task.kind,
        "protocol": data.task.protocol,
        "model": settings.model,
        "untrained": settings.untrained,
        "metric": result.metric,
        "best_epoch": result.best_epoch,
        "loss_unit": run.head.loss_unit,
        **result.scores,
        "majority_share": data.majority_share(),
        "labels": data.label_names,
        "data": data.fingerprint,
        "rows": {name: len(prepared.examples) for name, prepared in run.prepared.items()},
        "inputs": {name: len(part) for name, part in encoded.items()},
        "truncated": {name: part.truncated for name, part in encoded.items()},
        "validation_held_out_of_train": data.validation_held_out,
        "precision": run.precision.name,
        "attention": run.facts["attention"],
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "processes": run.accelerator.num_processes,
        "time": {"seconds": round(log.seconds(), 1)},
    }
    write_report(out, settings, summary, history)
    replace_file(out / "metrics.json", json.dumps(summary, indent=2) + "\n")  # last: the run is over
    remove_checkpoints(out)


def _prediction_lines(run: _Run, data: LabelledData, answers: dict[str, list[Answer]]) -> Iterator[dict[str, Any]]:
    """One object a row: split, where it lies in which file, label, prediction and what it was chosen among."""
    for name, split in data.splits().items():
        files = [{"file": file} for file in split.files] or [{}] * len(split)
        for example, file, answer in zip(split.examples, files, answers[name]):
            yield {"split": name, **file, "row": example.row, "label": run.head.label(example), **answer}


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _epoch_line(line: dict[str, Any], epochs: int, metrics: list[str]) -> str:
    shown = "  ".join(f"{name} {line[name]:.4f}" for name in metrics)
    return (
        f"epoch {line['epoch']}/{epochs}  train loss {line['train_loss']:.4f}  "
        f"validation loss {line['loss']:.4f}  {shown}"
    )


def _tell_start(console: Console, run: _Run, data: LabelledData) -> None:
    rows = ", ".join(f"{name} {len(part.examples):,}" for name, part in run.prepared.items())
    held_out = " (validation held out of train)" if data.validation_held_out else ""
    labels = f"; labels: {', '.join(data.label_names[:20])}" if data.label_names else ""
    console.print(f"{data.task.kind}; rows: {rows}{held_out}{labels}")
    for name, prepared in run.prepared.items():
        part = prepared.encoded
        if len(part) > len(prepared.examples):
            console.print(f"{name}: {len(part):,} windows of at most {run.settings.max_tokens} tokens")
        if part.truncated:
            console.print(
                f"{name}: {part.truncated:,} of {len(part):,} inputs cut to {run.settings.max_tokens} tokens, "
                f"{part.cut_tokens:,} tokens lost; --max_tokens raises that"
            )
    backends = ", ".join(f"{kind} {name}" for kind, name in run.facts["attention"].items())
    console.print(f"precision: {run.precision.name} ({run.precision.reason}); attention: {backends}")
