"""report.md, race.png and the printed table of a race."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from encoderkit.finetune.comparison import summarize
from encoderkit.finetune.race_cell import Result
from encoderkit.finetune.race_settings import OURS, RaceSettings
from encoderkit.pretrain.command_line import settings_to_dict
from encoderkit.pretrain.report import table_lines
from encoderkit.pretrain.settings import PretrainSettings
from encoderkit.pretrain.settings_yaml import flat
from encoderkit.pretrain.terminal import print_table

HEAD = ["side", "parameters", "tokens seen", "tokens/s", "held-out loss", "behind", "minimal pairs"]


def write_race_report(out: Path, settings: RaceSettings, results: list[Result], console: Console) -> None:
    """Print the table; write report.md and race.png."""
    by_side = {side: [r for r in results if r["side"] == side] for side in dict.fromkeys(r["side"] for r in results)}
    best = min(statistics.fmean(r["loss"] for r in part) for part in by_side.values())
    rows = [_row(side, part, best) for side, part in by_side.items()]
    print_table(console, HEAD, rows)
    here = results[0]["machine"]
    machine = f"{here['cpu']}, {here['threads']} threads" + "".join(f", {gpu}" for gpu in here["gpus"])
    lines = [
        f"# {settings.minutes:g} minutes of training each",
        "",
        f"{machine}, {results[0]['precision']}; seeds 0 to {settings.seeds - 1}, the sides in turn. Store "
        f"`{settings.store}`, {results[0]['store'][:12]}.",
        "",
        *table_lines(HEAD, rows),
        "",
        "Held-out loss in nats at the fixed probe, mean and standard deviation over seeds; it is measured outside the "
        "time. Behind: nats more than the best side. Tokens are real ones, padding left out.",
        "",
        "![loss against time](race.png)",
        "",
        *(f"- `{side}`: {_recipe(side, part[0]['settings'])}" for side, part in by_side.items()),
    ]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(out / "race.png", by_side)
    console.print(f"report: {out / 'report.md'}", soft_wrap=True)


def told(result: Result) -> str:
    """One line on a cell that is done."""
    pairs = f", minimal pairs {result['minimal_pairs']:.2%}" if "minimal_pairs" in result else ""
    speed = f"{result['tokens']:,} tokens, {result['tokens_per_second']:,.0f} a second"
    return f"{result['side']}, seed {result['seed']}: held-out loss {result['loss']:.4f} after {speed}{pairs}"


def _row(side: str, results: list[Result], best: float) -> list[str]:
    def mean(key: str, show: Callable[[float], str]) -> str:
        found = summarize([result[key] for result in results])
        return show(found.mean) + (f" ± {show(found.sd)}" if found.n > 1 else "")

    behind = statistics.fmean(result["loss"] for result in results) - best
    return [
        side,
        f"{results[0]['parameters']:,}",
        f"{statistics.fmean(result['tokens'] for result in results):,.0f}",
        f"{statistics.fmean(result['tokens_per_second'] for result in results):,.0f}",
        mean("loss", lambda value: f"{value:.3f}"),
        f"{behind:.3f}" if behind else "",
        mean("minimal_pairs", lambda value: f"{value:.1%}") if all("minimal_pairs" in r for r in results) else "",
    ]


def _recipe(side: str, settings: dict[str, Any]) -> str:
    """Every key of an opponent, and those of encoderkit's recipe that are not as they are by default.

    >>> _recipe("bert", {"lr": 1e-3, "window_tokens": None, "schedule": {"name": "linear"}})
    'lr 0.001, schedule.name "linear"'
    """
    usual = flat(settings_to_dict(PretrainSettings())) if side == OURS else {}
    told = {key: value for key, value in settings.items() if key != "budget"}  # which is the race's
    own = {key: value for key, value in flat(told).items() if value is not None and usual.get(key) != value}
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in own.items())


def _plot(path: Path, by_side: dict[str, list[Result]]) -> None:
    """A line for each side, the mean over seeds, and the seeds themselves thin behind it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes: Any = figure.subplots()
    for number, (side, results) in enumerate(by_side.items()):
        color = "#d1580a" if side == OURS else ("#1f6fb4", "#6b6b6b")[number % 2]
        for result in results:
            axes.plot(*_minutes(result["curve"]), color=color, linewidth=0.7, alpha=0.5)
        shortest = min(len(result["curve"]) for result in results)
        points = [[result["curve"][i] for result in results] for i in range(shortest)]
        mean = [tuple(statistics.fmean(part) for part in zip(*of_seeds)) for of_seeds in points]
        axes.plot(*_minutes(mean), color=color, marker="o", markersize=3, label=side)
    axes.set(xlabel="minutes of training", ylabel="held-out loss (nats)")
    axes.set_xlim(left=0)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)


def _minutes(curve: list[Any]) -> tuple[list[float], list[float]]:
    return [seconds / 60 for seconds, _ in curve], [loss for _, loss in curve]
