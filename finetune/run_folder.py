"""The folder that a fine-tuning run writes: refused when in use, a log of one JSON object a line. Imports no torch."""

from __future__ import annotations

import json
import time
from pathlib import Path

from encoderkit.kernels.errors import InputError


def check_out(out: str) -> Path:
    """The run folder to be; InputError where something is in it already."""
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"out: {out} exists and is not empty; choose another --out or remove it")
    return path


class Log:
    """log.jsonl: one object a line; what may differ between equal runs is under time."""

    def __init__(self, path: Path) -> None:
        self._path, self._start = path, time.monotonic()

    def seconds(self) -> float:
        """Since the log was opened."""
        return time.monotonic() - self._start

    def append(self, **fields) -> None:
        """Write a line, with the seconds so far."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**fields, "time": {"seconds": round(self.seconds(), 3)}}) + "\n")
