"""report.md with its plot, and the model card, made from what a run folder holds.

Made from config.yaml, run.json and log.jsonl alone, so a report can be written again at any time, also of a run that
was stopped; and from evaluations/scores.json where encoderkit-finetune evaluate wrote it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.progress import duration
from encoderkit.pretrain.run_folder import model_fingerprint, read_log
from encoderkit.pretrain.settings import Masking
from encoderkit.pretrain.settings_yaml import read_yaml

PHASES = ("data", "forward", "backward", "optimizer")
BLUE, ORANGE, GREY = "#1f6fb4", "#d1580a", "#6b6b6b"


@dataclass(frozen=True)
class Run:
    """What a run folder tells: settings and facts as plain values, log records by kind."""

    path: Path
    settings: dict[str, Any]
    facts: dict[str, Any]
    start: dict[str, Any]
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    end: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> Run:
        """Raises InputError where path is no run folder with a log."""
        for name in ("config.yaml", "run.json", "log.jsonl"):
            if not (path / name).is_file():
                raise InputError(f"{path} holds no {name}; expected a run folder")
        records = read_log(path / "log.jsonl")
        if any("kind" not in record for record in records):
            raise InputError(f"{path / 'log.jsonl'} is not the log of a pretraining run")
        kinds = ("start", "train", "validation", "stage", "end")
        of_kind = {kind: [r for r in records if r["kind"] == kind] for kind in kinds}
        read_yaml(path / "config.yaml")  # refuses what a stranger may have put there
        settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        try:
            facts = json.loads((path / "run.json").read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path / 'run.json'} is not JSON ({error}); expected a run folder") from error
        start = of_kind["start"][0] if of_kind["start"] else {}
        end = of_kind["end"][-1] if of_kind["end"] else None
        return cls(path, settings, facts, start, of_kind["train"], of_kind["validation"], of_kind["stage"], end)

    @property
    def last(self) -> dict[str, Any]:
        """The newest record with step, tokens and time."""
        return self.end or max([self.start, *self.train, *self.validation], key=lambda record: record.get("step", 0))

    @property
    def score(self) -> dict[str, Any] | None:
        """The newest record with a held-out loss."""
        return self.end or (self.validation[-1] if self.validation else None)

    @property
    def model(self) -> str:
        """The model in words."""
        config = self.facts.get("model", {})
        size = ", ".join(
            f"{config[name]:,} {word}"
            for name, word in (("num_layers", "layers"), ("hidden_size", "wide"), ("num_heads", "heads"))
            if name in config
        )
        return f"{config.get('architecture', 'an encoder')}" + (f" ({size})" if size else "")


def write_report(run_folder: Path) -> None:
    """Write report.md, loss.png and loss.svg into a run folder."""
    run = Run.read(run_folder)
    plot(run)
    (run_folder / "report.md").write_text("\n".join(_report(run)) + "\n", encoding="utf-8")


def write_model_card(run: Run, folder: Path, about: str = "") -> None:
    """Write README.md into a model folder of this run: what it is, data, recipe, scores, how to load it.

    about: a sentence on which state of the run it is.
    """
    (folder / "README.md").write_text("\n".join(_card(run, folder, about)) + "\n", encoding="utf-8")


def _report(run: Run) -> list[str]:
    status = "" if run.end else f"\n\nThe run has not ended; this is step {run.last.get('step', 0):,}."
    return [
        f"# Pretraining: {run.path.resolve().name}{status}",
        "",
        *table_lines(("", ""), _summary(run)),
        "",
        "## Held-out loss at the fixed probe",
        "",
        "15% of the tokens of the held-out documents (of at most 262,144 tokens), all replaced by [MASK], in pieces of "
        "at most 128 tokens: the same for every masking rate.",
        "",
        *_scores(run),
        "",
        "![training and held-out loss against tokens](loss.png)",
        "",
        *_evaluations(run),
        "## Where the time went",
        "",
        *table_lines(("phase", "seconds", "share"), _phases(run)),
        "",
        "## Recipe",
        "",
        *table_lines(("", ""), _recipe(run)),
        "",
        "## Data",
        "",
        *_tree(run.facts.get("data", {})),
        "",
        "## Command",
        "",
        *(f"    {start['command']}" for start in run.facts.get("starts", [])),
        "",
        *(_versions(run.facts["starts"][-1]) if run.facts.get("starts") else []),
        "Every setting: `config.yaml`. Every figure: `log.jsonl`. Machine and versions: `run.json`.",
    ]


def _rows_seen(run: Run, steps: int) -> int:
    """Rows of so many steps, of one batch size after another."""
    rows, begun, step_rows = 0, 0, run.start["batch_rows"]
    for stage in run.stages:
        rows += (stage["step"] - 1 - begun) * step_rows
        begun, step_rows = stage["step"] - 1, stage["batch_rows"]
    return rows + (steps - begun) * step_rows


def _summary(run: Run) -> list[tuple[str, str]]:
    last, facts = run.last, run.facts
    hardware = facts["starts"][-1]["hardware"] if facts.get("starts") else {}
    seconds = last.get("time", {}).get("elapsed") or 0.0
    speeds = [record["time"]["tokens_per_second"] for record in run.train]
    shares = [record["time"]["utilisation"] for record in run.train if record["time"].get("utilisation") is not None]
    padding = [record["padding"] for record in run.train]
    passes = "unknown"
    if facts.get("rows_per_epoch") and "batch_rows" in run.start:
        passes = f"{_rows_seen(run, last.get('step', 0)) / facts['rows_per_epoch']:.2f}"
    lines = [
        ("model", run.model),
        ("parameters", f"{facts['parameters']:,}" if "parameters" in facts else "unknown"),
        ("steps", f"{last.get('step', 0):,}"),
        ("tokens seen", f"{last.get('tokens', 0):,}"),
        ("passes over the data", passes),
        ("time", duration(seconds)),
        ("tokens/s", f"{statistics.median(speeds):,.0f} (median of the log lines)" if speeds else "unknown"),
        ("model FLOP utilisation", f"{statistics.median(shares):.1%}" if shares else "unknown on this machine"),
        ("row padding", f"{statistics.mean(padding):.2%}" if padding else "unknown"),
        ("hardware", _hardware(hardware)),
    ]
    reasons = {
        f"{name} attention" if name in ("global", "local") else name: why
        for name, why in facts.get("reasons", {}).items()
    }
    price = run.settings.get("price_per_hour")
    lines += [("cost", f"{price * seconds / 3600:,.2f} at {price:g} an hour")] if price is not None else []
    averaged = last.get("averaged_steps")
    lines += [("final weights", f"the mean of the steps {', '.join(map(str, averaged))}")] if averaged else []
    return [*lines, *reasons.items()]


def _hardware(hardware: Mapping[str, Any]) -> str:
    if not hardware:
        return "unknown"
    gpus = hardware.get("gpus") or []
    cpu = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads"
    ranks = f", {hardware['world_size']} ranks" if hardware.get("world_size", 1) > 1 else ""
    return (f"{len(gpus)} x {gpus[0]}, " if gpus else "") + cpu + ranks


def _scores(run: Run) -> list[str]:
    rows = []
    for name, key in (("uniform guess (ln V)", "ln_vocab"), ("training unigram", "unigram_entropy")):
        value = run.start.get(key, run.facts.get(key))
        rows += [] if value is None else [(name, f"{value:.4f}", f"{math.exp(value):,.1f}", "")]
    if run.score is not None and run.score.get("loss") is not None:
        loss, accuracy = run.score["loss"], run.score.get("accuracy")
        shown = "" if accuracy is None else f"{accuracy:.2%}"
        rows.append(("**this model**", f"**{loss:.4f}**", f"{math.exp(loss):,.1f}", shown))
        if run.score.get("pair_loss") is not None:
            what = f"sentence pairs ({run.settings['pairs']}), {run.score['pair_count']:,} held out"
            rows.append((what, f"{run.score['pair_loss']:.4f}", "", f"{run.score['pair_accuracy']:.2%}"))
        newest = run.validation[-1] if run.validation else {}
        for name in (name for name in newest if name.startswith("minimal_pairs_")):
            rows.append((f"{name.replace('_', ' ')}, a sample, step {newest['step']:,}", "", "", f"{newest[name]:.2%}"))
    return table_lines(("", "loss (nats)", "perplexity", "accuracy"), rows)


def _evaluations(run: Run) -> list[str]:
    """Sections on minimal pairs and tasks, where they were measured."""
    file = run.path / "evaluations" / "scores.json"
    if not file.is_file():
        return []
    scores = json.loads(file.read_text(encoding="utf-8"))
    if scores.get("weights") != model_fingerprint(str(run.path / "final")):  # the run went on since
        return []
    return [*_pairs_section(scores.get("minimal_pairs")), *_tasks_section(scores.get("tasks"))]


def _pairs_section(pairs: dict[str, Any] | None) -> list[str]:
    if not pairs:
        return []
    rows = []
    for line in [*pairs["by_field"], {**pairs, "field": "**all**"}]:
        accuracies = (f"{line[variant]:.1%}" for variant in ("original", "within_word"))
        rows.append((line["field"] or "-", str(line["paradigms"]), f"{line['pairs']:,}", *accuracies))
    head = ("field", "paradigms", "pairs", "accuracy", "with the rest of a word masked")
    about = f"Of two sentences, is the right one more likely? `{pairs['file']}`; means over paradigms, chance is 50%."
    return ["## Minimal pairs", "", about, "", *table_lines(head, rows), ""]


def _tasks_section(tasks: list[dict[str, Any]] | None) -> list[str]:
    if not tasks:
        return []
    rows = []
    for task in tasks:
        score = f"{task['mean']:.4f}" + ("" if task["sd"] is None else f" ± {task['sd']:.4f}")
        rows.append((task["task"], task["metric"], task["on"], score, str(task["seeds"]), f"{task['lr']:g}"))
    head = ("task", "metric", "on", "mean ± sd", "seeds", "learning rate")
    about = "Fine-tuned, at the learning rate that is best on validation. More: `evaluations/tasks/report.md`."
    return ["## Tasks", "", about, "", *table_lines(head, rows), ""]


def _phases(run: Run) -> list[tuple[str, str, str]]:
    sums = {phase: sum(record["time"].get(phase, 0.0) for record in run.train) for phase in PHASES}
    whole = run.last.get("time", {}).get("elapsed") or sum(sums.values())
    sums["validation, saving, the rest"] = max(whole - sum(sums.values()), 0.0)
    return [(phase, f"{seconds:,.1f}", f"{seconds / whole:.1%}" if whole else "") for phase, seconds in sums.items()]


def _recipe(run: Run) -> list[tuple[str, str]]:
    settings, masking = run.settings, Masking(**run.settings["masking"])
    budget = " ".join(f"{value:,} {name}" for name, value in settings["budget"].items() if value is not None)
    rate = f"{masking.start_rate:g}" + (f" to {masking.final_rate:g}" if masking.final_rate is not None else "")
    optimizer, schedule = settings["optimizer"], settings["schedule"]
    muon = f", Muon learning rate {optimizer['muon_lr']:g}" if optimizer["name"] == "muon" else ""
    return [
        ("budget", budget),
        ("batch", f"{settings['batch_tokens']:,} tokens a step, sequences of at most {settings['data']['max_tokens']}"),
        ("masking", f"{rate} of the tokens, by {masking.select}; "
         f"{masking.shares[0]:g} [MASK], {masking.shares[1]:g} random"),
        ("sentence pairs", settings.get("pairs", "none")),
        ("optimizer", f"{optimizer['name']}, learning rate {optimizer['lr']:g}{muon}, weight decay "
         f"{optimizer['weight_decay']:g}, clipped at {optimizer['clip']:g}"),
        ("schedule", f"{schedule['name']}, warmup {schedule['warmup']:g} of the budget, final {schedule['final']:g}"),
        ("seed", str(settings["seed"])),
    ]  # fmt: skip


def _card(run: Run, folder: Path, about: str) -> list[str]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    code = ", trust_remote_code=True" if "auto_map" in config else ""
    origin = run.settings["model"]["init_from"]
    trained = f"continued from {origin}" if origin else "pretrained from scratch"
    front = {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": list(dict.fromkeys(["encoderkit", "fill-mask", "masked-language-modeling", config["model_type"]])),
    }
    return [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {run.path.resolve().name}",
        "",
        f"A masked language model, {run.model}, {run.facts.get('parameters', 0):,} parameters, {trained} "
        f"with encoderkit on {run.last.get('tokens', 0):,} tokens. {about}".rstrip(),
        "",
        "## How to load it",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'fill = pipeline("fill-mask", model="path/to/this/folder"{code})',
        'fill(f"The capital of France is {fill.tokenizer.mask_token}.")',
        "```",
        "",
        f"Sequences of up to {run.settings['data']['max_tokens']} tokens were seen in pretraining.",
        "",
        "## Scores",
        "",
        "At the fixed probe: 15% of the tokens of held-out documents of the same data, all replaced by [MASK].",
        "",
        *_scores(run),
        "",
        "## Data",
        "",
        *_tree(run.facts.get("data", {})),
        "",
        "The model has what bias these texts have. The terms of these texts apply to it.",
        "",
        "## Recipe",
        "",
        *table_lines(("", ""), _recipe(run)),
    ]


def plot(run: Run) -> None:
    """Write loss.png and loss.svg: training and held-out loss against tokens, and the learning rate below."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "encoderkit"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        train = [record for record in run.train if record["loss"] is not None]
        rates = [f"{run.train[i]['mask_rate']:.0%}" for i in (0, -1)] if run.train else []
        rate = f" ({' to '.join(dict.fromkeys(rates))} masked)" if rates else ""
        upper.plot(*_xy(train, "loss"), color=BLUE, linewidth=1.2, label=f"training{rate}")
        measured = {record["step"]: record for record in (*run.validation, *([run.end] if run.end else []))}
        probe = _xy(list(measured.values()), "loss")
        upper.plot(*probe, color=ORANGE, marker="o", markersize=3.5, label="held-out probe")
        for name, key in (("uniform guess, ln V", "ln_vocab"), ("training unigram", "unigram_entropy")):
            value = run.start.get(key)
            if value is not None:
                upper.axhline(value, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
                upper.annotate(
                    f"{name} {value:.2f}", (1, value), (0, 3), xycoords=("axes fraction", "data"),
                    textcoords="offset points", ha="right", color=GREY,
                )  # fmt: skip
        upper.set_ylabel("loss (nats a target)")
        upper.grid(axis="y", alpha=0.25)
        upper.legend(frameon=False, loc="lower left")
        lower.plot(*_xy(run.train, "lr"), color=GREY, linewidth=1.2)
        lower.set_ylabel("learning rate")
        lower.set_ylim(bottom=0)
        lower.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
        lower.set_xlabel("tokens seen")
        lower.set_xlim(left=0)
        lower.xaxis.set_major_formatter(EngFormatter(sep=""))
        figure.align_ylabels()
        figure.savefig(run.path / "loss.png", dpi=160)
        figure.savefig(run.path / "loss.svg", metadata={"Date": None})


def _xy(records: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    kept = [record for record in records if record.get(key) is not None]
    return [record["tokens"] for record in kept], [record[key] for record in kept]


def table_lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    escaped = (tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in (head, *rows))
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def _tree(values: Mapping[str, Any], indent: str = "") -> list[str]:
    """Nested plain values as a Markdown list."""
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}- {name}", *_tree(value, indent + "  ")]
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            lines += [f"{indent}- {name}", *(f"{indent}  - {_line(item)}" for item in value)]
        else:
            lines.append(f"{indent}- {name}: {_line(value)}")
    return lines


def _line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_line(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_line, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _versions(start: Mapping[str, Any]) -> list[str]:
    source = start.get("source")
    commit = f", commit {source['commit'][:12]}{' with changes' if source['changed'] else ''}" if source else ""
    return [", ".join(f"{name} {version}" for name, version in start["versions"].items()) + commit + ".", ""]
