"""What was measured of this machine, kept on disk so that every process here chooses alike.

One small JSON file, by CPU, torch version and threads. Where it is damaged or cannot be written, a process measures for
itself. `python -m encoderkit.kernels info --measure` measures again.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def kept(name: str, measure: Callable[[], T], is_whole: Callable[[Any], bool]) -> T:
    """What the file has under this name, or what measure() gives, which is then written there.

    is_whole: whether something read is what measure() could have given, as JSON.
    """
    here, everything = machine(), _read()
    mine = everything.get(here)
    if isinstance(mine, dict) and name in mine and is_whole(mine[name]):
        return mine[name]
    found = measure()
    everything = _read()  # anew: another process may have measured something else meanwhile
    mine = everything.get(here)
    _write({**everything, here: {**(mine if isinstance(mine, dict) else {}), name: found}})
    return found


def forget() -> None:
    """Let what this machine keeps be measured again."""
    _write({about: found for about, found in _read().items() if about != machine()})


def file() -> Path:
    """Where measurements are kept: in ENCODERKIT_CACHE, or encoderkit/ in XDG_CACHE_HOME, or ~/.cache/encoderkit."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("ENCODERKIT_CACHE") or os.path.join(caches, "encoderkit")) / "measured.json"


def machine() -> str:
    """What a measurement depends on."""
    return f"{_cpu()}; torch {torch.__version__}; {torch.get_num_threads()} threads"


def _cpu() -> str:
    """As the kernel describes the first core; names alone are shared by several generations."""
    described: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            described[key.strip()] = value.strip()
    named = [described[key] for key in ("model name", "cpu family", "model", "stepping") if key in described]
    return " ".join(named) or platform.processor() or platform.machine()


def _read() -> dict[str, Any]:
    try:
        found = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(everything: dict[str, Any]) -> None:
    """Under another name first: a process that reads meanwhile finds the old file, whole."""
    with contextlib.suppress(OSError):
        file().parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=file().parent, prefix=".measured-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump(everything, out, indent=1)
            os.replace(partial, file())
        except BaseException:
            os.unlink(partial)
            raise
