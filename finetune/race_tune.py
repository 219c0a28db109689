"""A search over the settings of a side: random trials for half of the time, the best two for all of it.

A trial changes some keys of the side's recipe; the first one is the recipe as it is.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from encoderkit.finetune.race import read_side
from encoderkit.finetune.race_settings import OURS, Side, TuneSettings
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import dump_yaml, settings_to_dict
from encoderkit.pretrain.run_folder import replace_file
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.terminal import plain_console

if TYPE_CHECKING:
    from encoderkit.encoder.precision import Precision

Changes = dict[str, Any]  # key -> value
# Each trial takes one of each line.
_OPPONENT: list[list[Changes]] = [
    [{"mlm_probability": rate} for rate in (0.15, 0.2, 0.3, 0.4)],
    [{"mask_replace_prob": mask, "random_replace_prob": other} for mask, other in ((0.8, 0.1), (1.0, 0.0))],
    [{"batch_size": size} for size in (4, 8, 16, 32)],
    [{"layout": layout} for layout in ("pieces", "chunks")],
    [{"schedule.warmup": share} for share in (0.03, 0.1, 0.3)],
    [{"betas": betas} for betas in ([0.9, 0.98], [0.9, 0.999])],
    [{"weight_decay": decay} for decay in (0.01, 0.1)],
]
SPACES: dict[str, list[list[Changes]]] = {
    "bert": [[{"lr": lr} for lr in (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 3e-3)], *_OPPONENT],
    "modernbert": [
        [{"lr": lr} for lr in (5e-4, 1e-3, 2e-3, 3e-3, 4e-3)],
        *_OPPONENT,
        [{"window_tokens": tokens} for tokens in (8, 16, 64)],
    ],
    OURS: [
        [{"optimizer.lr": lr} for lr in (1e-3, 2e-3, 3e-3, 4e-3)],
        [{"optimizer.muon_lr": lr} for lr in (3e-3, 4e-3, 6e-3)],
        [{"masking.rate": rate} for rate in (0.3, 0.4, 0.5)],
        [{"masking.mask_share": mask, "masking.random_share": other} for mask, other in ((0.8, 0.1), (1.0, 0.0))],
        [{"batch_tokens": size, "micro_batch_tokens": size} for size in (1024, 2048, 4096)],
        [{"schedule.warmup": share} for share in (0.03, 0.1, 0.3)],
        [{"optimizer.weight_decay": decay} for decay in (0.05, 0.2)],
        [{"model.window_tokens": tokens} for tokens in (8, 16)],
    ],
}


def tune(settings: TuneSettings, *, console: Console | None = None) -> Changes:
    """Run the trials that the log lacks; write OUT/SIDE.yaml and return what it changes of the recipe.

    Raises FloatingPointError where every trial diverged.
    """
    from encoderkit.encoder.precision import resolve_precision
    from encoderkit.finetune.inference import best_device
    from encoderkit.finetune.race_cell import machine
    from encoderkit.finetune.run_folder import held

    console, out = console or plain_console(), Path(settings.out) / settings.side
    left, log = choose_trials(settings), out / "trials.jsonl"
    store, precision = Store.open(settings.store), resolve_precision(settings.precision, best_device())
    with held(out):
        found, shared = read_trials(log), {"store": store.hash, "seed": settings.seed, "machine": machine()}
        shared["precision"] = precision.name
        last: list[dict[str, Any]] = []
        for minutes, count in rounds_of(settings):
            last = []
            for changes in left[:count]:
                side = read_side(settings.side, settings.recipes, changes)
                about = {"minutes": minutes, "changes": changes, "settings": settings_to_dict(side), **shared}
                done = next((t for t in found if all(t.get(key) == value for key, value in about.items())), None)
                if done is None:
                    done = {**about, **_run_trial(side, settings.seed, out / "trial", store, minutes, precision)}
                    found.append(done)
                    replace_file(log, "".join(json.dumps(trial) + "\n" for trial in found))
                console.print(" | ".join(_row(done)), soft_wrap=True)
                last.append(done)
            shutil.rmtree(out / "trial", ignore_errors=True)
            last = sorted((trial for trial in last if trial["loss"] is not None), key=lambda trial: trial["loss"])
            left = [trial["changes"] for trial in last]
            if not left:
                raise FloatingPointError(
                    f"every trial of {minutes:g} minutes diverged; lower the rates of {settings.side}.yaml"
                )
        best = out / f"{settings.side}.yaml"
        replace_file(best, dump_yaml(read_side(settings.side, settings.recipes, left[0])))
        console.print(f"best: {_told(left[0])}; written to {best}; log: {log}", soft_wrap=True)
    return left[0]


def rounds_of(settings: TuneSettings) -> list[tuple[float, int]]:
    """Minutes and number of trials of each round.

    >>> rounds_of(TuneSettings(side="bert", store="s", trials=8, minutes=10))
    [(5.0, 8), (10, 2)]
    """
    half = [(settings.minutes / 2, settings.trials)] if settings.trials > 2 else []
    return [*half, (settings.minutes, 2)]


def choose_trials(settings: TuneSettings) -> list[Changes]:
    """The recipe as it is, and as many others as are wanted, all different, by the seed."""
    space = SPACES[settings.side]
    most = math.prod(map(len, space))
    if settings.trials > most // 2:
        raise InputError(f"trials is {settings.trials}; expected at most {most // 2} for {settings.side}")
    generator, trials = random.Random(settings.seed), [Changes()]
    while len(trials) < settings.trials:
        changes = {key: value for line in space for key, value in generator.choice(line).items()}
        if changes not in trials:
            trials.append(changes)
    return trials


def read_trials(log: Path) -> list[dict[str, Any]]:
    """The trials of a log that were run."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def _run_trial(
    side: Side, seed: int, folder: Path, store: Store, minutes: float, precision: Precision
) -> dict[str, Any]:
    """What one training found; a loss of None where it diverged."""
    from encoderkit.finetune.race_cell import run_cell

    try:
        found = run_cell(side, seed, folder, store=store, minutes=minutes, precision=precision, points=1, about={})
    except FloatingPointError as error:
        return {"loss": None, "error": str(error)}
    return {name: found[name] for name in ("loss", "tokens", "steps", "seconds", "tokens_per_second", "parameters")}


def _told(changes: Changes) -> str:
    return ", ".join(f"{key} {value}" for key, value in changes.items()) or "the recipe as it is"


def _row(trial: dict[str, Any]) -> list[str]:
    loss = "diverged" if trial["loss"] is None else f"{trial['loss']:.4f}"
    return [f"{trial['minutes']:.4g}", loss, _told(trial["changes"])]
