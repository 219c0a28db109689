"""Variants of a pretraining recipe by seeds, each pretrained on the same budget and measured: what a change is worth.

Every cell, a variant with a seed, is a folder of its own under out: the pretraining run, which goes on where it was
stopped, and the fine-tuning runs of the tasks. The report is written once all cells are there, whoever made them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from encoderkit.finetune.ablate_report import write_ablation_report
from encoderkit.finetune.settings import AblateSettings, SuiteSettings
from encoderkit.finetune.settings import Precision as PrecisionName
from encoderkit.finetune.suite import best_scores, fastest_precision, run_suite
from encoderkit.finetune.suite_file import read_suite
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import read_settings, settings_from_entries, settings_to_dict
from encoderkit.pretrain.run_folder import changed_settings, read_log, replace_file
from encoderkit.pretrain.settings import PretrainSettings
from encoderkit.pretrain.settings_yaml import Entry, as_written, read_yaml
from encoderkit.pretrain.terminal import plain_console

LOCK = "lock"  # of out
HELD_OUT_LOSS = "held-out loss"  # nats at the fixed probe: the only measure of which less is better


@dataclass(frozen=True)
class Cell:
    """A variant with a seed. settings: of its pretraining."""

    variant: str
    seed: int
    folder: Path
    settings: PretrainSettings

    @property
    def final(self) -> Path:
        """The pretrained model."""
        return Path(self.settings.out) / "final"


def run_ablation(settings: AblateSettings, *, console: Console | None = None) -> list[dict[str, Any]] | None:
    """Pretrain and measure what is missing; write results.jsonl, report.md and ablation.png once all is there.

    Returns the measures of every cell, or None where settings.job left some to others. Raises InputError for a variant
    or suite that cannot be run, before anything runs; FloatingPointError where training diverged.
    """
    console = console or plain_console()
    cells = read_cells(settings)
    if settings.suite is not None:
        read_suite(_suite_of(settings, cells[0]))  # wrong tasks are told at once
    if settings.job is not None and settings.job >= len(cells):
        raise InputError(f"job is {settings.job}; expected 0 to {len(cells) - 1}: a variant with a seed each")
    precision = _begin_folder(settings, cells)
    for number, cell in enumerate(cells):
        if settings.job in (None, number) and _measured(cell) is None:
            console.print(f"{number + 1}/{len(cells)}  {cell.variant}, seed {cell.seed}")
            _measure(cell, settings, precision, console)
    found = [_measured(cell) for cell in cells]
    results = [measures for measures in found if measures is not None]
    if len(results) < len(cells):
        console.print(f"{len(results)} of {len(cells)} are done; the report comes with the last")
        return None
    out = Path(settings.out)
    with _alone(out):
        replace_file(out / "results.jsonl", "".join(json.dumps(result) + "\n" for result in results))
        write_ablation_report(out, settings, results, console)
    return results


def read_cells(settings: AblateSettings) -> list[Cell]:
    """Every variant with every seed, variants first, the base one leading; each one's settings are checked."""
    changes: dict[str, dict[str, str | None]] = {settings.base: {}}
    for key, value in settings.variants.items():
        name, _, setting = key.partition(".")
        if name == settings.base or not setting:
            raise InputError(f"variants.{key}: expected NAME.SETTING other than the base one, such as nsp.pairs: nsp")
        _check_free(f"variants.{key}", setting)
        changes.setdefault(name, {})[setting] = value
    for key in settings.set:
        _check_free(f"set.{key}", key)
    shared = read_yaml(Path(settings.recipe)) + _entries(settings.set, "set")
    cells = []
    for seed in range(settings.seeds):
        for name, changed in changes.items():
            folder = Path(settings.out) / name / f"seed-{seed}"
            own = {"seed": str(seed), "out": str(folder / "pretraining")}
            entries = [*shared, *_entries(changed, f"variants.{name}"), *_entries(own, "")]
            cells.append(Cell(name, seed, folder, settings_from_entries(PretrainSettings, entries)))
    budgets = {dataclasses.astuple(cell.settings.budget) for cell in cells}
    if len(budgets) > 1:
        raise InputError("variants have budgets of their own, which compares nothing; set one budget for all")
    return cells


def _check_free(where: str, setting: str) -> None:
    if setting in ("seed", "out"):
        raise InputError(f"{where} is set by the ablation itself; leave it out")


def _entries(values: Mapping[str, str | None], where: str) -> list[Entry]:
    return [Entry(key, as_written(value), f"{where}: " if where else "") for key, value in values.items()]


def _suite_of(settings: AblateSettings, cell: Cell) -> SuiteSettings:
    """The tasks of a cell's model; the cell's seed is the pretraining's, fine-tuning has always the same."""
    assert settings.suite is not None
    return SuiteSettings(
        model=str(cell.final),
        suite=settings.suite,
        data=settings.data,
        tasks=settings.tasks,
        lrs=settings.lrs,
        seeds=1,
        out=str(cell.folder / "tasks"),
    )


def _measure(cell: Cell, settings: AblateSettings, precision: PrecisionName, console: Console) -> None:
    """Pretrain, go on, or find it done; then the tasks. precision: in place of auto."""
    run = Path(cell.settings.out)
    if not _ended(run):
        from encoderkit.pretrain.loop import pretrain

        begun = run / "config.yaml"
        is_begun = begun.is_file()
        wanted = read_settings(PretrainSettings, begun) if is_begun else cell.settings
        chosen_precision = precision if wanted.precision == "auto" else wanted.precision
        out = cell.settings.out  # the ablation may have been moved
        pretrain(dataclasses.replace(wanted, precision=chosen_precision, out=out), resume=is_begun)
    measures = {HELD_OUT_LOSS: _ended(run)["loss"]}
    if cell.settings.pairs != "none":
        measures[f"{cell.settings.pairs} accuracy"] = _ended(run)["pair_accuracy"]
    if settings.suite is not None:
        chosen = best_scores(run_suite(_suite_of(settings, cell), precision=precision, console=Console(quiet=True)))
        measures |= {f"{task} {scores[0]['metric']}": scores[0]["score"] for task, scores in chosen.items()}
    found = {"variant": cell.variant, "seed": cell.seed, "tokens": _ended(run)["tokens"], "measures": measures}
    replace_file(cell.folder / "measures.json", json.dumps(found) + "\n")
    console.print("    " + ", ".join(f"{name} {value:.4f}" for name, value in measures.items()))


def _ended(run: Path) -> dict[str, Any]:
    """The last record of a run that is over, its finished model with it, else nothing."""
    log = run / "log.jsonl"
    records = read_log(log) if log.is_file() and (run / "final").is_dir() else []
    return records[-1] if records and records[-1]["kind"] == "end" else {}


def _measured(cell: Cell) -> dict[str, Any] | None:
    path = cell.folder / "measures.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _begin_folder(settings: AblateSettings, cells: list[Cell]) -> PrecisionName:
    """ablation.json says what the cells in a folder are of; more seeds and variants may come, none may change.

    Returns the precision of all that leave it to be chosen: chosen once, as a budget in minutes is spent by speed.
    """
    out = Path(settings.out)
    path = out / "ablation.json"
    there = {item.name for item in out.iterdir()} if out.exists() else set()
    if path.name not in there and there - {LOCK, f".{path.name}.partial"}:  # another job may be writing it
        raise InputError(f"out: {out} exists and holds no ablation; choose another --out or remove it")
    wanted: dict[str, Any] = {name: getattr(settings, name) for name in ("suite", "data", "tasks", "lrs")}
    wanted |= {f"variant {cell.variant}": settings_to_dict(cell.settings) for cell in cells if cell.seed == 0}
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        was = {name: written[name] for name in wanted if name in written}
        now = {name: json.loads(json.dumps(wanted[name])) for name in was}
        if changed := changed_settings(was, now, [f"{name}.out" for name in wanted]):  # the folder may be moved
            raise InputError(f"{'; '.join(changed.values())}: not as what was run in {out}; choose another --out")
        precision = written.get("precision") or fastest_precision()
        replace_file(path, json.dumps({**written, "precision": precision, **wanted}, indent=1) + "\n")
    return precision


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process at a time writes what is of all cells: those of a job array begin, and end, together."""
    with (out / LOCK).open("w") as file:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
