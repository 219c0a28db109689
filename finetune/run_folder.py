"""The folder that a fine-tuning run writes: refused when in use, a log, the state after each epoch."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from encoderkit.finetune.settings import FinetuneSettings
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import read_settings, settings_to_dict
from encoderkit.pretrain.run_folder import BEFORE_SETTINGS, LogWriter, changed_settings, lock_folder, replace_file

CHECKPOINTS = "checkpoints"


def check_out(out: str, *, resume: bool | None = None) -> Path:
    """The run folder to be; InputError where something is in it already, or where there is nothing to resume.

    resume: None where the command cannot.
    """
    path = Path(out)
    in_use = path.exists() and (not path.is_dir() or any(item.name not in BEFORE_SETTINGS for item in path.iterdir()))
    if resume and not path.exists():
        raise InputError(f"out: {out} is not there, so nothing can be resumed; leave out --resume to begin there")
    if resume and (path / "metrics.json").exists():
        raise InputError(f"out: the run in {out} is over; its figures are in {out}/metrics.json")
    if resume and in_use and not (path / "config.yaml").is_file():
        raise InputError(f"out: {out} holds no run that could be resumed; choose another --out")
    if in_use and not resume:
        way = "" if resume is None else ", or go on with a run that was stopped by --resume"
        raise InputError(f"out: {out} exists and is not empty; choose another --out or remove it{way}")
    return path


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the folder, which is made where it is not there. Raises InputError where another process does."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: {path} cannot be made: {error.strerror}; choose another --out") from error
    lock = lock_folder(path)
    try:
        yield
    finally:
        os.close(lock)


def check_same(config: Path, settings: FinetuneSettings, *, free: Collection[str] = ()) -> None:
    """Raise InputError naming the settings that differ from those in config, that a run began with.

    free: settings that may.
    """
    before = settings_to_dict(read_settings(FinetuneSettings, config))
    changed = changed_settings(before, settings_to_dict(settings), ("resume", "out", *free))
    if changed:
        what = "; ".join(changed.values())
        raise InputError(f"{what}: not as the run began; resume with the same settings")


class Log:
    """log.jsonl: one object a line; what may differ between equal runs is under time."""

    def __init__(self, path: Path, *, up_to_step: int | None = None) -> None:
        """Without up_to_step a new log; with it, what was written up to there is kept."""
        self._writer, self._start = LogWriter(path), time.monotonic()
        if up_to_step is not None:
            self._writer.cut_back(up_to_step)

    def seconds(self) -> float:
        """Since the log was opened."""
        return time.monotonic() - self._start

    def append(self, **fields) -> None:
        """Write a line, with the seconds so far."""
        self._writer.append({**fields, "time": {"seconds": round(self.seconds(), 3)}})


class NoLog(Log):
    """What processes other than the first log."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def append(self, **fields) -> None:
        """Nothing."""


def write_predictions(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    """predictions.jsonl: one object a row."""
    replace_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def remove_checkpoints(out: Path) -> None:
    """Delete the states of a run that is over."""
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
