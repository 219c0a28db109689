"""The whole story on the embedded corpus, in a few minutes: python -m encoderkit.finetune.quickstart

Text of the installed Python packages, a tokenizer, a store, a small pretrained encoder, a filled mask; then, from a few
labelled examples, which package a docstring comes from, against the same network untrained and against TF-IDF with
logistic regression. Every step is a command that is printed before it runs.
"""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import encoderkit.pretrain
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import parse_settings, run_command
from encoderkit.pretrain.settings import check_range

PROG = "python -m encoderkit.finetune.quickstart"
MARKER = "quickstart.json"  # what a folder of this command holds, so that --overwrite removes nothing else
RECIPE = Path(encoderkit.pretrain.__file__).parent / "recipes" / "quickstart.yaml"
FINETUNE = shlex.split("--max_tokens 128 --epochs 8 --batch_size 16 --optimizer.lr 5e-4")
SENTENCE = "This function returns a [MASK] of strings."


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """How long, and where to."""

    out: str = "runs/quickstart"  # folder of all that is made
    minutes: float = 2.5  # wall-clock time of pretraining
    vocab_size: int = 8192  # token types
    seeds: int = 2  # fine-tuning runs of each network, for the spread
    overwrite: bool = False  # remove what an earlier quickstart left in out

    def __post_init__(self) -> None:
        check_range("minutes", self.minutes, 0.01)
        check_range("vocab_size", self.vocab_size, 256)
        check_range("seeds", self.seeds, 1, 20)


def main(argv: list[str] | None = None) -> int:
    """Run the quickstart; returns the exit status."""
    return run_command(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> None:
    settings = parse_settings(
        QuickstartSettings,
        argv,
        prog=PROG,
        description="From text to a measured task model on the documentation of the installed Python packages.",
        examples=[PROG, f"{PROG} --minutes 10 --out runs/longer"],
    )
    quickstart(settings)


def quickstart(settings: QuickstartSettings) -> dict[str, list[float]]:
    """Run all steps; returns the test accuracy of each way over the seeds. Raises InputError where out is in use."""
    out = _fresh_folder(settings)
    start = time.monotonic()

    _say("1. Text: the documentation of the installed Python packages, and a task made of it")
    from encoderkit.finetune.docstring_task import write_task

    counts = write_task(out / "task")
    about = ", ".join(f"{count} {split}" for split, count in counts.items()) + " docstrings; test modules are held back"
    print(f"{out / 'task'}: {about}", flush=True)

    _say("2. A tokenizer, and the text tokenized once into a store")
    tokenizer, store = str(out / "tokenizer"), str(out / "store")
    size = ("--vocab_size", str(settings.vocab_size))
    _command("pretrain", "tokenizer", "--sources", "python-docs:train", *size, "--out", tokenizer)
    _command("pretrain", "prepare", "--sources", "python-docs:train", "--tokenizer", tokenizer, "--out", store)

    _say(f"3. Pretraining: predict masked tokens, {settings.minutes:g} minutes")
    pretrained = out / "pretrain"
    budget = ("--budget.minutes", f"{settings.minutes:g}")
    recipe = ("--config", _shortest(RECIPE))
    _command("pretrain", "run", *recipe, "--data.store", store, *budget, "--out", str(pretrained))
    _command("finetune", "fill", str(pretrained / "final"), "--text", SENTENCE)

    _say("4. Which package is a docstring from? A few labelled examples, package names masked out")
    data = [f"--data.{split}={out / 'task' / split}.jsonl" for split in ("train", "validation", "test")]
    scores: dict[str, list[float]] = {}
    for name, flags in (("pretrained", ()), ("untrained", ("--untrained",))):
        for seed in range(settings.seeds):
            run = out / f"{name}-seed{seed}"
            where = ("--seed", str(seed), "--out", str(run))
            _command("finetune", "run", str(pretrained / "final"), *data, *FINETUNE, *where, *flags)
            scores.setdefault(name, []).append(_accuracy(run / "metrics.json"))
    _command("finetune", "baseline", *data, "--out", str(out / "baseline.json"))
    scores["TF-IDF + logistic regression"] = [_accuracy(out / "baseline.json")]

    chance = json.loads((out / "baseline.json").read_text())["majority_share"]
    _report(out, settings, scores, about, chance, time.monotonic() - start)
    return scores


def _shortest(path: Path) -> str:
    """From the working folder where the file is in it."""
    path, here = path.resolve(), Path.cwd().resolve()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _fresh_folder(settings: QuickstartSettings) -> Path:
    out = Path(settings.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / MARKER).is_file():
            raise InputError(f"out: {out} exists and is not a quickstart folder; choose another --out")
        if not settings.overwrite:
            raise InputError(
                f"out: {out} holds an earlier quickstart; read {out / 'report.md'}, choose another --out, "
                "or start again with --overwrite"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text(json.dumps({"minutes": settings.minutes, "seeds": settings.seeds}) + "\n")
    return out


def _command(package: str, *arguments: str) -> None:
    """Print a command as a user would type it, and run it here."""
    print(f"\n$ encoderkit-{package} {shlex.join(arguments)}", flush=True)
    if package == "pretrain":
        from encoderkit.pretrain.__main__ import main as run
    else:
        from encoderkit.finetune.__main__ import main as run
    status = run(list(arguments))
    if status:
        raise SystemExit(status)


def _accuracy(path: Path) -> float:
    return json.loads(path.read_text())["test"]["accuracy"]


def _say(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def _report(
    out: Path, settings: QuickstartSettings, scores: dict[str, list[float]], about: str, chance: float, seconds: float
) -> None:
    """Print the table; write report.md and scores.png."""
    from encoderkit.pretrain.report import table_lines
    from encoderkit.pretrain.terminal import plain_console, print_table

    rows = [[name, _with_spread(values)] for name, values in [*scores.items(), ("commonest label", [chance])]]
    head = ["way", "test accuracy"]
    console = plain_console()
    print()
    print_table(console, head, rows)
    lines = [
        "# Which package is a docstring from?",
        "",
        f"Package names are masked out. {about} from pretraining.",
        "",
        *table_lines(head, rows),
        "",
        f"Mean and standard deviation over {settings.seeds} seed(s) of fine-tuning; one pretraining of "
        f"{settings.minutes:g} minutes. {seconds:.0f} s in all. The corpus is what this machine has installed, so the "
        "figures are not comparable with another machine's.",
        "",
        "![scores](scores.png)",
        "",
        "- Pretraining: [pretrain/report.md](pretrain/report.md), the model in `pretrain/final`",
        *(
            f"- {name}, seed 0: [{name}-seed0/report.md]({name}-seed0/report.md)"
            for name in ("pretrained", "untrained")
        ),
        f"- Made by `{PROG} --minutes {settings.minutes:g} --seeds {settings.seeds} --out {out}`",
    ]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(out / "scores.png", scores, chance)
    console.print(f"report: {out / 'report.md'}\nplot:   {out / 'scores.png'}\n{seconds:.0f} s in all")
    console.print(
        f'try:    encoderkit-finetune fill {out / "pretrain" / "final"} --text "raise an [MASK] if it fails."'
    )


def _with_spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _plot(path: Path, scores: dict[str, list[float]], chance: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.2), layout="constrained")
    axes: Any = figure.subplots()
    for position, (name, values) in enumerate(scores.items()):
        axes.barh(position, statistics.mean(values), color=f"C{position}", height=0.6, label=name)
        axes.plot(values, [position] * len(values), "k|", markersize=10)
    axes.axvline(chance, color="grey", linestyle=":", linewidth=0.8)
    axes.set(yticks=range(len(scores)), yticklabels=list(scores), xlabel="test accuracy (dotted: commonest label)")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
