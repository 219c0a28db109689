"""A suite as a YAML file: what its tasks are and how each is trained. Imports no torch.

    lrs: [1.0e-4, 3.0e-4]          # rates that every task tries
    defaults: {epochs: 3}          # settings of encoderkit-finetune run, for every task
    tasks:
      sst2:                        # settings of this task, over the defaults
        task: sst2
        data: {train: [sst2/train.jsonl.gz], validation: [sst2/dev.jsonl.gz]}
        columns: {text: text}
      rte-from-mnli: {task: rte, start_from: mnli}

Files lie relative to --data, or to the suite file. start_from: the task of the suite whose model, at its best rate and
of the same seed, training begins with (Phang et al. 2018, arXiv:1811.01088); lrs: rates of this task alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoderkit.finetune.registry import SUITES
from encoderkit.finetune.settings import FinetuneSettings, SuiteSettings, check_rates
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import found_beside, settings_from_entries, unknown_key
from encoderkit.pretrain.settings_yaml import Entry, as_written, read_yaml

DEFAULT_LRS = [3e-5, 1e-4, 3e-4]
_OF_RUNS = ("model", "out", "seed", "untrained", "checkpoints", "resume", "optimizer.lr")  # what the suite itself sets


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite. entries: its settings, defaults first. root: where its files lie.

    is_start: another task of the suite starts from its model, whether that one is run now or not.
    """

    name: str
    entries: list[Entry]
    own_lrs: list[float] | None
    start_from: str | None
    is_start: bool
    root: Path

    def lrs(self, settings: SuiteSettings) -> list[float]:
        """Rates to try: the command line's, the task's, the suite's."""
        return settings.lrs or self.own_lrs or DEFAULT_LRS

    def settings(self, model: str, lr: float, seed: int, out: str, *, untrained: bool = False) -> FinetuneSettings:
        """The settings of one run."""
        own: dict[str, Any] = {"model": model, "seed": seed, "out": out, "untrained": untrained, "checkpoints": False}
        own["optimizer.lr"] = lr
        entries = [*self.entries, *(Entry(key, value, "") for key, value in own.items())]
        settings = settings_from_entries(FinetuneSettings, entries)
        return dataclasses.replace(settings, data=settings.data.within(self.root))


def read_suite(settings: SuiteSettings) -> dict[str, SuiteTask]:
    """The tasks of a suite by name, checked: each one's settings are built once.

    Raises InputError naming the file and the line, or the nearest name.
    """
    if settings.suite in SUITES:
        found: dict[str, list[Entry]] = {name: [Entry("task", name, "")] for name in SUITES[settings.suite]}
        defaults: list[Entry] = []
        suite_lrs = None
        root = Path()
    else:
        path = Path(settings.suite)
        if path.suffix not in (".yaml", ".yml"):
            raise InputError(f"suite is {settings.suite!r}; expected one of {', '.join(SUITES)}, or a .yaml file")
        found, defaults, suite_lrs = _read_file(path)
        root = path.parent
    for key in settings.set:
        _check_free(f"set.{key}", key)
    changes = [Entry(key, as_written(value), f"set.{key}: ") for key, value in settings.set.items()]
    starts = {entry.value for entries in found.values() for entry in entries if entry.key == "start_from"}
    tasks = {}
    for name, entries in found.items():
        special = {entry.key: entry for entry in entries if entry.key in ("start_from", "lrs")}
        plain = [entry for entry in entries if entry.key not in special]
        tasks[name] = SuiteTask(
            name,
            [*defaults, *plain, *changes],
            _rates(special["lrs"]) if "lrs" in special else suite_lrs,
            str(special["start_from"].value) if "start_from" in special else None,
            name in starts,
            Path(settings.data) if settings.data else root,
        )
    for name in settings.tasks:
        if name not in tasks:
            unknown_key(name, tasks, kind="task")
    if settings.tasks:
        tasks = {name: task for name, task in tasks.items() if name in settings.tasks}
    _check(tasks, settings)
    return tasks


def _read_file(path: Path) -> tuple[dict[str, list[Entry]], list[Entry], list[float] | None]:
    """Entries of each task, defaults, and rates of a suite file."""
    tasks: dict[str, list[Entry]] = {}
    defaults: list[Entry] = []
    lrs = None
    for entry in read_yaml(path):
        section, _, rest = entry.key.partition(".")
        name, _, key = rest.partition(".")
        if entry.key == "lrs":
            lrs = _rates(entry)
        elif section == "defaults" and rest:
            defaults.append(_setting(entry, rest, path))
        elif section == "tasks" and key:
            tasks.setdefault(name, []).append(_setting(entry, key, path))
        else:
            unknown_key(entry.key, ["lrs", "defaults.KEY", "tasks.NAME.KEY"], entry.where)
    if not tasks:
        raise InputError(f"{path}: no tasks; expected tasks: with a name and its settings each")
    for entry in [*defaults, *(entry for entries in tasks.values() for entry in entries)]:
        _check_free(f"{entry.where}{entry.key}", entry.key)
    return tasks, defaults, lrs


def _setting(entry: Entry, key: str, file: Path) -> Entry:
    """A setting of a task; a task that is itself a file lies beside the suite file."""
    entry = entry._replace(key=key)
    is_file = key == "task" and str(entry.value).endswith((".yaml", ".yml"))
    return found_beside(entry, file) if is_file else entry


def _check_free(where: str, key: str) -> None:
    if key in _OF_RUNS:
        raise InputError(f"{where} is set by the suite itself; leave it out")


def _rates(entry: Entry) -> list[float]:
    try:
        rates = [float(value) for value in entry.value]
    except (TypeError, ValueError):
        rates = []
    if not rates:
        raise InputError(f"{entry.where}{entry.key} is {entry.value!r}; expected a list of learning rates")
    check_rates(f"{entry.where}{entry.key}", rates)
    return rates


def _check(tasks: dict[str, SuiteTask], settings: SuiteSettings) -> None:
    """Build the settings of each task, and see that what a task starts from is there."""
    for task in tasks.values():
        for lr in task.lrs(settings):
            made = task.settings(settings.model, lr, 0, "out")
        for path in [*made.data.train, *made.data.validation, *made.data.test]:
            if not Path(path).is_file():
                raise InputError(f"{task.name}: {path}: no such file; --data names the folder that files lie in")
        seen, at = [task.name], task.start_from
        while at is not None:
            if at not in tasks:
                raise InputError(f"{task.name} starts from {at}, which is no task of this suite; add it")
            if at in seen:
                raise InputError(f"{' starts from '.join([*seen, at])}; break the circle")
            seen, at = [*seen, at], tasks[at].start_from
