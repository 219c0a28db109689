"""Where rows of torture work: fresh folders, runs that end, and runs to strike at."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from reliability.children import run_ranks
from tiny_run import differences, make_settings, write_recipe

from encoderkit.pretrain.checkpoint import latest_checkpoint
from encoderkit.pretrain.settings import Checkpoints, Log, Model, PretrainSettings

EVERY = 4  # steps between checkpoints
WIDE = Model(preset="modern", hidden_size=256, num_layers=2, num_heads=8, intermediate_size=256, max_positions=128)


@dataclass(frozen=True)
class Outcome:
    """What a row found. guard_off: what happened without its guard, where it has one."""

    passed: bool
    figure: str
    guard_off: str = ""


@dataclass
class Bench:
    """Where the rows work. draw: where and when they strike."""

    folder: Path
    store: Path
    draw: random.Random
    recipe: PretrainSettings | None

    def new(self, name: str) -> Path:
        """A fresh folder."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def settings(self, out: Path, **changes) -> PretrainSettings:
        defaults = {
            "checkpoints": Checkpoints(every_steps=EVERY, every_minutes=None),
            "model": WIDE,
            "log": Log(every_steps=4, validate_every_steps=1000),
        }
        return make_settings(self.store, out, **{**defaults, **changes})

    def finished(self, settings: PretrainSettings, ranks: int = 1) -> Path:
        """An uninterrupted run of these settings."""
        folder = self.new("whole")
        recipe = write_recipe(replace(settings, out=str(folder / "run")), folder / "recipe.yaml")
        for child in run_ranks(ranks, "run", "--config", recipe, log=folder / "log"):
            assert child.wait(3600) == 0, (folder / "log").read_text()[-2000:]
        return folder / "run"


def start(folder: Path, settings: PretrainSettings, ranks: int = 1, before: Callable[[], None] = lambda: None):
    """Begin the run in folder/run, or go on with it."""
    out = folder / "run"
    arguments = ("run", "--resume", out)
    if not (out / "config.yaml").is_file():
        arguments = ("run", "--config", write_recipe(replace(settings, out=str(out)), folder / "recipe.yaml"))
    return run_ranks(ranks, *arguments, log=folder / "log", before=before)


def newest(folder: Path) -> int:
    """The step that a run would go on from."""
    found = latest_checkpoint(folder / "run" / "checkpoints")
    return found.step if found else 0


def told(folder: Path) -> str:
    """What its processes printed."""
    log = folder / "log"
    return log.read_text(errors="replace") if log.exists() else ""


def compared(whole: Path, folder: Path) -> str:
    """Empty where the run in folder ended as the whole one."""
    return ", ".join(differences(whole, folder / "run"))
