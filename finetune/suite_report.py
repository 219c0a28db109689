"""report.md, scores.png and the printed table of a suite."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from encoderkit.finetune.comparison import Comparison, summarize
from encoderkit.finetune.settings import SuiteSettings
from encoderkit.finetune.suite_file import SuiteTask
from encoderkit.pretrain.report import table_lines
from encoderkit.pretrain.terminal import print_table

Chosen = dict[str, dict[int, dict[str, Any]]]  # task -> seed -> result at the best rate
Comparisons = dict[str, tuple[Comparison, list[float], list[float]]]

_HEAD = ["task", "metric", "on", "median", "mean ± sd", "95% interval", "n", "rate", "commonest label"]
_HEAD_COMPARED = ["task", "this", "other", "difference", "95% interval", "p", "verdict"]


def write_suite_report(
    out: Path,
    settings: SuiteSettings,
    tasks: dict[str, SuiteTask],
    results: list[dict[str, Any]],
    chosen: Chosen,
    comparisons: Comparisons | None,
    seconds: float,
    console: Console,
) -> None:
    """Print the table; write report.md and scores.png. seconds: what this call took."""
    failed = [result for result in results if "failed" in result]
    rows = [_row(task, list(chosen[task].values())) for task in tasks]
    medians = [statistics.median(r["score"] for r in by_seed.values()) for by_seed in chosen.values()]
    if len(rows) > 1:
        rows.append(["average", "", "", f"{statistics.fmean(medians):.4f}", "", "", "", "", ""])
    print_table(console, _HEAD[:2] + _HEAD[3:7], [row[:2] + row[3:7] for row in rows])  # 80 characters wide
    weights = "fresh weights (untrained)" if settings.untrained else "pretrained weights"
    spent = sum(result["time"]["seconds"] for result in results if result not in failed)
    lines = [
        f"# Suite {Path(settings.suite).stem}",
        "",
        f"`{settings.model}`, {weights}; {len(results)} runs, {spent / 60:.0f} minutes of training and measuring, "
        f"{seconds / 60:.0f} in this call.",
        "",
        *table_lines(_HEAD, rows),
        "",
        f"The rate of each task has the best median on validation{_searched(settings)}; test is never looked at to "
        "choose. What is measured on validation is of the rate and the epoch that these rows chose: a little high, the "
        "more so the more rates were tried. Intervals are Student's t for the mean over seeds. n: seeds.",
        "",
        "![scores](scores.png)",
        "",
        "## Protocols",
        "",
        *(f"- {_protocol(name, task, settings, chosen[name])}" for name, task in tasks.items()),
    ]
    if comparisons is not None:
        compared = [_compared_row(name, *values) for name, values in comparisons.items()]
        print_table(console, [_HEAD_COMPARED[0], *_HEAD_COMPARED[3:]], [[row[0], *row[3:]] for row in compared])
        verdict = _verdict(comparisons)
        console.print(verdict)
        lines += [
            "",
            f"## Against `{settings.against}`",
            "",
            *table_lines(_HEAD_COMPARED, compared),
            "",
            f"**{verdict}**",
            "",
            "Paired by seed, Student's t; p of the tasks corrected for their number (Holm 1979); 'would have been': "
            "the smallest true difference found four times in five.",
        ]
    rates = [result for result in results if len({r["lr"] for r in results if r["task"] == result["task"]}) > 1]
    if rates:
        lines += [
            "",
            "## Rates",
            "",
            *table_lines(["task", "rate", "median on validation", "seeds", ""], _rate_rows(rates, settings)),
        ]
    if failed:
        lines += [
            "",
            "## Failed",
            "",
            *(f"- {r['task']}, rate {r['lr']:g}, seed {r['seed']}: {r['failed']}" for r in failed),
        ]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(out / "scores.png", chosen, comparisons)
    console.print(f"report: {out}/report.md")


def _row(task: str, results: list[dict[str, Any]]) -> list[str]:
    found, first = summarize([result["score"] for result in results]), results[0]
    share = first.get("majority_share")
    counts = first["metric"] == "accuracy" and share is not None
    several = found.n > 1
    return [
        task,
        first["metric"],
        first["measured_on"],
        f"{found.median:.4f}",
        f"{found.mean:.4f} ± {found.sd:.4f}" if several else f"{found.mean:.4f}",
        f"{found.low:.4f} to {found.high:.4f}" if several else "",
        str(found.n),
        f"{first['lr']:g}",
        f"{share:.4f}" if counts else "",
    ]


def _compared_row(name: str, compared: Comparison, scores: list[float], base: list[float]) -> list[str]:
    several = not math.isnan(compared.p)
    return [
        name,
        f"{statistics.fmean(scores):.4f}",
        f"{statistics.fmean(base):.4f}",
        f"{compared.difference:+.4f}",
        f"{compared.low:+.4f} to {compared.high:+.4f}" if several else "",
        f"{compared.p:.3f}" if several else "",
        compared.verdict,
    ]


def _verdict(comparisons: Comparisons) -> str:
    """One sentence."""
    tasks = {name: values[0].verdict for name, values in comparisons.items() if name != "average"}
    better = [name for name, verdict in tasks.items() if verdict == "better"]
    worse = [name for name, verdict in tasks.items() if verdict == "worse"]
    parts = [
        f"better on {len(better)} of {len(tasks)} tasks" + (f" ({', '.join(better)})" if better else ""),
        f"worse on {len(worse)}" + (f" ({', '.join(worse)})" if worse else ""),
    ]
    if "average" in comparisons:
        average = comparisons["average"][0]
        parts.append(f"on average {average.verdict} ({average.difference:+.4f})")
    return "This model is " + ", ".join(parts) + "."


def _protocol(name: str, task: SuiteTask, settings: SuiteSettings, by_seed: dict[int, dict[str, Any]]) -> str:
    """What was done, and how published scores are measured."""
    first = next(iter(by_seed.values()))
    made = task.settings(settings.model, first["lr"], 0, "out")
    resolved = made.resolve()
    rows = ", ".join(f"{count:,} {split}" for split, count in first["rows"].items())
    start = f", from the model of {task.start_from}: another protocol than from the encoder" if task.start_from else ""
    published = f" Published: {resolved.protocol}." if resolved.protocol else ""
    return (
        f"**{name}** ({resolved.kind}): {rows} rows; at most {made.epochs} epochs, the best kept by {first['metric']} "
        f"on validation, batch {made.batch_size}, at most {made.max_tokens} tokens, rates "
        f"{', '.join(f'{lr:g}' for lr in task.lrs(settings))}{start}; measured on {first['measured_on']}.{published}"
    )


def _rate_rows(results: list[dict[str, Any]], settings: SuiteSettings) -> list[list[str]]:
    """A row a rate, of the seeds that tried every rate."""
    tried: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        if result["seed"] < settings.num_search_seeds:
            tried.setdefault((result["task"], result["lr"]), []).append(result)
    rows = []
    for (task, lr), of_rate in tried.items():
        scores = [result["validation_score"] for result in of_rate if "failed" not in result]
        failed, chosen = len(scores) < len(of_rate), of_rate[0]["chosen"]
        median = "" if failed else f"{statistics.median(scores):.4f}"
        rows.append([task, f"{lr:g}", median, str(len(of_rate)), "failed" if failed else "chosen" if chosen else ""])
    return rows


def _searched(settings: SuiteSettings) -> str:
    count = settings.num_search_seeds
    return f" over the first {count} of the seeds" if count < settings.seeds else ""


def _plot(path: Path, chosen: Chosen, comparisons: Comparisons | None) -> None:
    """A dot a seed, a bar for the 95% interval of the mean; the other suite's beside it."""
    from matplotlib.figure import Figure

    sides = [{task: [r["score"] for r in by_seed.values()] for task, by_seed in chosen.items()}]
    if comparisons is not None:
        sides.append({task: values[2] for task, values in comparisons.items() if task != "average"})
    figure = Figure(figsize=(7, 1 + 0.4 * len(chosen)), layout="constrained")
    axes: Any = figure.subplots()
    for number, (side, label) in enumerate(zip(sides, ("this", "other"))):
        for position, task in enumerate(chosen):
            scores = side.get(task)
            if not scores:
                continue
            found, y = summarize(scores), position + 0.25 * number
            if found.n > 1:
                axes.plot([found.low, found.high], [y, y], color=f"C{number}", linewidth=2)
            axes.plot(scores, [y] * len(scores), "o", color=f"C{number}", markersize=4, label="" if position else label)
    axes.set(
        yticks=range(len(chosen)), yticklabels=list(chosen), xlabel="score of each seed, and 95% interval of the mean"
    )
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    if comparisons is not None:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
