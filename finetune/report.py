"""report.md and a plot of a fine-tuning run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from encoderkit.finetune.settings import FinetuneSettings, QuestionAnswering
from encoderkit.finetune.tasks import COLUMNS
from encoderkit.pretrain.report import table_lines


def write_report(out: Path, settings: FinetuneSettings, summary: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Write report.md and epochs.png. summary: what metrics.json holds; history: one dict of figures an epoch."""
    metric, best = summary["metric"], summary["best_epoch"]
    splits = [name for name in ("validation", "test") if name in summary]
    found = dict.fromkeys(name for split in splits for name in summary[split])  # a split may have some of its own
    names = [name for name in found if name != "loss"]
    columns = ["train_loss", "loss", *names]
    weights = "fresh weights (untrained baseline)" if settings.untrained else "pretrained weights"
    measured = splits[-1]
    lines = [
        f"# Fine-tuning: {settings.task or settings.data.hub or Path(settings.data.train[0]).name}",
        "",
        f"`{settings.model}`, {weights}, {summary['parameters']:,} parameters, on "
        + ", ".join(f"{count:,} {name}" for name, count in summary["rows"].items())
        + f" rows ({summary['kind']})"
        + (" (validation held out of train)." if summary["validation_held_out_of_train"] else "."),
        "",
        f"**{metric} {summary[measured][metric]:.4f} on {measured}**, epoch {best} of {settings.epochs}"
        f" (best {metric} on validation)." + _floor(summary["majority_share"]),
        "",
        *([f"Published protocol: {summary['protocol']}.", ""] if summary["protocol"] else []),
        *table_lines(["split", "loss", *names], [_row(split, summary[split], ["loss", *names]) for split in splits]),
        "",
        *table_lines(
            ["epoch", "train loss", "validation loss", *names],
            [_row(f"{line['epoch']}{' (kept)' if line['epoch'] == best else ''}", line, columns) for line in history],
        ),
        "",
        "![losses and metric by epoch](epochs.png)",
        "",
        f"Peak learning rate {settings.optimizer.lr:g}, {settings.batch_size} sequences a step, at most "
        f"{settings.max_tokens} tokens an input, seed {settings.seed}, {summary['precision']}, "
        f"{summary['time']['seconds']:.0f} s. Inputs that were cut: "
        + ", ".join(f"{count:,} {name}" for name, count in summary["truncated"].items())
        + ".",
        "",
        "Settings: `config.yaml`. Figures: `metrics.json`. Every prediction: `predictions.jsonl`. Model: `final/`.",
        f"New rows: `encoderkit-finetune predict {shlex.quote(f'{out}/final')} --file ROWS.jsonl{_options(settings)}`",
    ]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(out / "epochs.png", metric, best, history, summary["loss_unit"])


def _options(settings: FinetuneSettings) -> str:
    """The options of predict that answer new rows as the run did: columns, and what decides on spans."""
    task = settings.resolve()
    usual, options = vars(COLUMNS[task.kind]), ""
    for name, value in vars(task.columns).items():
        if name != "label" and value is not None and value != usual[name]:
            written = value if isinstance(value, str) else f"[{', '.join(value)}]"
            options += f" --columns.{name} {shlex.quote(written)}"
    if task.kind == "question_answering":
        options += " --unanswerable true" if task.data.unanswerable else ""
        by_default = vars(QuestionAnswering())
        options += "".join(f" --qa.{name} {v}" for name, v in vars(settings.qa).items() if v != by_default[name])
    return options


def _floor(share: float | None) -> str:
    return "" if share is None else f" The commonest label alone is right on {share:.1%}."


def _row(head: str, figures: dict[str, float], names: list[str]) -> list[str]:
    return [head, *(f"{figures[name]:.4f}" if name in figures else "" for name in names)]


def _plot(path: Path, metric: str, best: int, history: list[dict[str, Any]], unit: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in history]
    losses.plot(epochs, [line["train_loss"] for line in history], "o-", label="train")
    losses.plot(epochs, [line["loss"] for line in history], "o-", label="validation")
    losses.set(xlabel="epoch", ylabel=f"loss ({unit})")
    losses.legend(frameon=False)
    scores.plot(epochs, [line[metric] for line in history], "o-", color="C1")
    scores.axvline(best, color="grey", linewidth=0.8, linestyle=":")
    scores.set(xlabel="epoch", ylabel=f"{metric} on validation")
    for axes in (losses, scores):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
