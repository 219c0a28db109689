"""Fine-tuning, from labelled rows to a measured model folder.

One denominator an optimizer step, known before the backward pass: the number of sequences in the batch. The epoch that
is best on validation is kept; test is measured once, with it.

S sequences of a micro-batch, C labels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from encoderkit.encoder.checkpoint import load_classifier, save_classifier, untrained_classifier
from encoderkit.encoder.classifier import SequenceClassifier
from encoderkit.encoder.model import choose_attention
from encoderkit.encoder.precision import Precision, resolve_precision
from encoderkit.finetune.data import LabelledData, load_data
from encoderkit.finetune.encoding import EncodedTexts, encode
from encoderkit.finetune.inference import check_max_tokens, check_vocabulary, score_texts
from encoderkit.finetune.metrics import compute_metrics, metric_names
from encoderkit.finetune.report import write_report
from encoderkit.finetune.run_folder import Log, check_out
from encoderkit.finetune.settings import FinetuneSettings
from encoderkit.finetune.tasks import find_task
from encoderkit.finetune.terminal import plain_console
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import dump_yaml
from encoderkit.pretrain.optimizer import build_optimizers, set_learning_rates
from encoderkit.pretrain.schedule import factor
from encoderkit.pretrain.tokenizer import load_tokenizer

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

    data: what load_data(settings.data, task) gives, where it is read already. On CPU two runs with the same settings
    write the same numbers. Raises InputError for settings or data that cannot be used, and for a loss that is not
    finite.
    """
    console = console or plain_console()
    out = check_out(settings.out)
    task = find_task(settings.task) if settings.task else None
    data = data or load_data(settings.data, task)
    metrics = metric_names(len(data.label_names), settings.metric, task.metrics if task else ())
    run = _open_run(settings, data)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(dump_yaml(settings), encoding="utf-8")
    log = Log(out / "log.jsonl")
    _tell_start(console, run, data)

    history, logits = _train(run, data, metrics, log, console)
    best_epoch = max(history, key=lambda line: line[metrics[0]])["epoch"]  # the first of equals
    if data.test:
        logits["test"] = run.score("test")
    scores = {name: _measure(metrics, logits[name], split.labels) for name, split in data.splits().items()}
    summary = {
        "task": settings.task,
        "model": settings.model,
        "untrained": settings.untrained,
        "metric": metrics[0],
        "best_epoch": best_epoch,
        **scores,
        "majority_share": data.majority_share(),
        "labels": data.label_names,
        "rows": {name: len(part) for name, part in run.encoded.items()},
        "truncated": {name: part.truncated for name, part in run.encoded.items()},
        "validation_held_out_of_train": data.validation_held_out,
        "precision": run.precision.name,
        "attention": run.attention,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "time": {"seconds": round(log.seconds(), 1)},
    }
    run.tokenizer.model_max_length = settings.max_tokens  # so that predict, and transformers, cut where training did
    save_classifier(run.model, out / "final", run.tokenizer)
    _write_predictions(out / "predictions.jsonl", data, logits)
    (out / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_report(out, settings, summary, history)
    return FinetuneResult(out, metrics[0], best_epoch, scores)


@dataclass
class _Run:
    """What is trained, on what, how."""

    settings: FinetuneSettings
    accelerator: accelerate.Accelerator
    precision: Precision
    model: SequenceClassifier
    tokenizer: Any
    encoded: dict[str, EncodedTexts]
    attention: dict[str, str]  # kind of layer -> backend

    def score(self, split: str) -> Tensor:
        """Logits (N, C) of a split."""
        tokens = self.settings.micro_batch_tokens
        return score_texts(self.model, self.encoded[split], precision=self.precision, max_batch_tokens=tokens)


def _open_run(settings: FinetuneSettings, data: LabelledData) -> _Run:
    """Open the model and its tokenizer, check that all fits together, tokenize."""
    accelerate.state.AcceleratorState._reset_state()  # runs of other precisions may have gone before in this process
    device = accelerate.PartialState().device
    precision = resolve_precision(settings.precision, device)
    accelerator = accelerate.Accelerator(mixed_precision=precision.accelerate)
    if accelerator.num_processes > 1:
        raise InputError(f"{accelerator.num_processes} processes; fine-tuning runs in one, start it without a launcher")
    model = load_classifier(
        settings.model, data.label_names, seed=settings.seed, dropout=settings.dropout, pooling=settings.pooling
    )
    if settings.untrained:
        model = untrained_classifier(model.config, data.label_names, settings.seed)
    choices = choose_attention(model.config, settings.attention, device=device, dtype=precision.dtype)
    model.encoder.use_attention(choices)
    tokenizer = load_tokenizer(settings.model)
    check_vocabulary(len(tokenizer), model.config.vocab_size, settings.model)
    check_max_tokens(settings.max_tokens, model.config.max_positions, settings.model)
    token_types = model.config.token_types > 1
    encoded = {
        name: encode(tokenizer, split.texts, split.texts_b, max_tokens=settings.max_tokens, token_types=token_types)
        for name, split in {"train": data.train, **data.splits()}.items()
    }
    attention = {kind: choice.name for kind, choice in choices.items()}
    return _Run(settings, accelerator, precision, model.to(device), tokenizer, encoded, attention)


def _train(
    run: _Run, data: LabelledData, metrics: list[str], log: Log, console: Console
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Train, and leave the weights of the best epoch in run.model.

    Returns the figures of each epoch, and the logits of the best epoch on validation.
    """
    settings, accelerator, train = run.settings, run.accelerator, run.encoded["train"]
    labels = torch.from_numpy(data.train.labels).to(accelerator.device)
    torch.manual_seed(settings.seed)  # dropout
    model, *optimizers = accelerator.prepare(
        run.model, *build_optimizers(run.model, settings.optimizer, dtype=run.precision.dtype)
    )
    steps_per_epoch = -(-len(train) // settings.batch_size)
    total_steps = steps_per_epoch * settings.epochs
    history: list[dict[str, Any]] = []
    best_score, best_weights, best_logits = -float("inf"), {}, torch.empty(0)
    step = 0
    with _progress(console) as progress:
        bar = progress.add_task("", total=total_steps, loss="")
        for epoch in range(1, settings.epochs + 1):
            model.train()
            order = epoch_order(len(train), settings.seed, epoch)
            epoch_loss, logged_loss, logged_rows = 0.0, torch.zeros((), device=accelerator.device), 0
            for first in range(0, len(order), settings.batch_size):
                rows = order[first : first + settings.batch_size]
                set_learning_rates(optimizers, factor(settings.schedule, (step + 0.5) / total_steps))
                for piece in train.pieces(rows, settings.micro_batch_tokens):
                    with accelerator.autocast():
                        logits_SC = model(train.batch(piece).to(accelerator.device))
                    loss = F.cross_entropy(logits_SC.float(), labels[piece], reduction="sum")
                    accelerator.backward(loss / len(rows))
                    logged_loss += loss.detach()
                if settings.optimizer.clip:
                    accelerator.clip_grad_norm_(model.parameters(), settings.optimizer.clip)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                step += 1
                logged_rows += len(rows)
                if step % LOG_EVERY_STEPS == 0 or step % steps_per_epoch == 0:
                    loss_sum = _finite(float(logged_loss), step)
                    log.append(
                        step=step, epoch=epoch, loss=loss_sum / logged_rows, lr=optimizers[0].param_groups[0]["lr"]
                    )
                    progress.update(bar, completed=step, loss=f"loss {loss_sum / logged_rows:.4f}")
                    epoch_loss += loss_sum
                    logged_loss.zero_()
                    logged_rows = 0
            logits_NC = run.score("validation")
            scores = _measure(metrics, logits_NC, data.validation.labels)
            history.append({"epoch": epoch, "train_loss": epoch_loss / len(train), **scores})
            log.append(step=step, epoch=epoch, validation=scores)
            console.print(_epoch_line(history[-1], settings.epochs))
            if scores[metrics[0]] > best_score:  # a tie keeps the earlier epoch
                best_score, best_logits = scores[metrics[0]], logits_NC
                best_weights = {name: tensor.detach().cpu().clone() for name, tensor in run.model.state_dict().items()}
    run.model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    run.model.load_state_dict(best_weights)
    return history, {"validation": best_logits}


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) int64: the order of the training rows in an epoch, a pure function of seed and epoch."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable")


def _measure(names: list[str], logits_NC: Tensor, labels: np.ndarray) -> dict[str, float]:
    """Mean loss in nats, and every metric."""
    loss = float(F.cross_entropy(logits_NC, torch.from_numpy(labels)))
    return {"loss": loss, **compute_metrics(names, logits_NC.argmax(1).tolist(), labels.tolist())}


def _finite(loss: float, step: int) -> float:
    if not np.isfinite(loss):
        raise InputError(f"loss is {loss} at step {step}; lower optimizer.lr, or use precision fp32")
    return loss


def _write_predictions(path: Path, data: LabelledData, logits: dict[str, Tensor]) -> None:
    """One JSON object a row: split, row number in its file, label, prediction, probabilities in label order."""
    names = data.label_names
    with path.open("w", encoding="utf-8") as file:
        for name, split in data.splits().items():
            probabilities_NC = logits[name].softmax(1)
            for row, label, row_probabilities in zip(split.rows, split.labels.tolist(), probabilities_NC.tolist()):
                line = {
                    "split": name,
                    "row": row,
                    "label": names[label],
                    "prediction": names[int(np.argmax(row_probabilities))],
                    "probabilities": {n: round(p, 8) for n, p in zip(names, row_probabilities)},
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _epoch_line(line: dict[str, Any], epochs: int) -> str:
    shown = "  ".join(
        f"{name} {value:.4f}" for name, value in line.items() if name not in ("epoch", "train_loss", "loss")
    )
    return (
        f"epoch {line['epoch']}/{epochs}  train loss {line['train_loss']:.4f}  "
        f"validation loss {line['loss']:.4f}  {shown}"
    )


def _tell_start(console: Console, run: _Run, data: LabelledData) -> None:
    rows = ", ".join(f"{name} {len(part):,}" for name, part in run.encoded.items())
    held_out = " (validation held out of train)" if data.validation_held_out else ""
    console.print(f"rows: {rows}{held_out}; labels: {', '.join(data.label_names[:20])}")
    for name, part in run.encoded.items():
        if part.truncated:
            console.print(
                f"{name}: {part.truncated:,} of {len(part):,} inputs cut to {run.settings.max_tokens} tokens, "
                f"{part.cut_tokens:,} tokens lost; --max_tokens raises that"
            )
    backends = ", ".join(f"{kind} {name}" for kind, name in run.attention.items())
    console.print(f"precision: {run.precision.name} ({run.precision.reason}); attention: {backends}")
