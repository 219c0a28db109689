"""report.md, ablation.png and the printed table of an ablation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from encoderkit.finetune.comparison import Comparison, compare, corrected, summarize
from encoderkit.finetune.settings import AblateSettings
from encoderkit.pretrain.report import table_lines
from encoderkit.pretrain.terminal import print_table

Scores = dict[str, dict[str, list[float]]]  # measure -> variant -> of each seed

_HEAD = ["measure", "variant", "mean ± sd", "95% interval", "difference", "95% interval ", "p", "detectable", "verdict"]


def write_ablation_report(out: Path, settings: AblateSettings, results: list[dict[str, Any]], console: Console) -> None:
    """Print the table; write report.md and ablation.png. results: the measures of every variant with every seed."""
    scores = _by_measure(results)
    compared = _compare(scores, settings.base)
    rows = [
        _row(measure, variant, seeds, compared.get((measure, variant)))
        for measure, variants in scores.items()
        for variant, seeds in variants.items()
    ]
    shown = (0, 1, 2, 4, 6, 8)  # in the width of a terminal
    print_table(console, [_HEAD[i] for i in shown], [[row[i] for i in shown] for row in rows])
    tokens: dict[str, list[int]] = {}
    for result in results:
        tokens.setdefault(result["variant"], []).append(result["tokens"])
    seen = ", ".join(f"{name} {sum(counts) / len(counts):,.0f}" for name, counts in tokens.items())
    over = "".join(f", `{key}: {value}`" for key, value in settings.set.items())
    changes = [f"- `{settings.base}`: the recipe as it is" + (f", with{over[1:]} for all" if over else "")]
    changes += [f"- `{key.partition('.')[0]}`: `{key.partition('.')[2]}: {v}`" for key, v in settings.variants.items()]
    lines = [
        f"# Ablation of {Path(settings.recipe).name}",
        "",
        *changes,
        "",
        f"Tokens seen, mean over seeds: {seen}.",
        "",
        *table_lines(_HEAD, rows),
        "",
        f"Differences are from `{settings.base}`, paired by seed; intervals and p are Student's t, p corrected for the "
        "number of comparisons (Holm 1979). Detectable: the smallest true difference that so many seeds of this spread "
        "show four times in five, in one comparison alone.",
        "",
        "![ablation](ablation.png)",
    ]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(out / "ablation.png", scores)
    console.print(f"report: {out}/report.md")


def less_is_better(measure: str) -> bool:
    """Whether a measure is a loss."""
    return measure.endswith("loss")


def _by_measure(results: list[dict[str, Any]]) -> Scores:
    """Variants without a measure, such as the pair accuracy, are left out of it."""
    scores: Scores = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        for measure, value in result["measures"].items():
            scores.setdefault(measure, {}).setdefault(result["variant"], []).append(value)
    return scores


def _compare(scores: Scores, base: str) -> dict[tuple[str, str], Comparison]:
    """Of every other variant with the base one, so that more is better."""
    found = {}
    for measure, variants in scores.items():
        sign = -1 if less_is_better(measure) else 1
        for variant in variants.keys() - {base} if base in variants else ():
            mine, theirs = ([sign * value for value in variants[name]] for name in (variant, base))
            found[measure, variant] = compare(mine, theirs)
    return corrected(found)


def _row(measure: str, variant: str, seeds: list[float], compared: Comparison | None) -> list[str]:
    of = summarize(seeds)
    cells = [measure, variant, f"{of.mean:.4f}" + (f" ± {of.sd:.4f}" if of.n > 1 else "")]
    cells.append(f"{of.low:.4f} to {of.high:.4f}" if of.n > 1 else "")
    if compared is None:
        return [*cells, *[""] * 5]
    difference, low, high = compared.difference, compared.low, compared.high
    if less_is_better(measure):
        difference, low, high = -difference, -high, -low
    cells.append(f"{difference:+.4f}")
    if math.isnan(compared.p):
        return [*cells, "", "", "", compared.verdict]
    return [*cells, f"{low:+.4f} to {high:+.4f}", f"{compared.p:.3f}", f"{compared.detectable:.4f}", compared.verdict]


def _plot(path: Path, scores: Scores) -> None:
    """A panel for each measure: a dot a seed, joined over variants, and bars for the 95% intervals of the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 2.2 * len(scores), 3.2), layout="constrained")
    panels: Any = figure.subplots(1, len(scores), squeeze=False)[0]
    for axes, (measure, variants) in zip(panels, scores.items()):
        for seed in range(max(map(len, variants.values()))):
            points = [(x, seeds[seed]) for x, seeds in enumerate(variants.values()) if seed < len(seeds)]
            axes.plot(*zip(*points), "o-", color="0.7", markersize=3, linewidth=0.7)
        for x, seeds in enumerate(variants.values()):
            of = summarize(seeds)
            axes.plot(x, of.mean, "s", color="C0", markersize=5)
            if of.n > 1:
                axes.plot([x, x], [of.low, of.high], color="C0", linewidth=2)
        axes.set(
            title=measure, xticks=range(len(variants)), xticklabels=list(variants), xlim=(-0.5, len(variants) - 0.5)
        )
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
