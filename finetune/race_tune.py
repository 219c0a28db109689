"""Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943) over the settings of a side, the same for all.

All trials train for a short time, the better half of them for twice as long from the start, and so on; the last two
have the whole time. A trial changes some keys of the side's recipe; the first one is the recipe as it is.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from encoderkit.finetune.race import read_side
from encoderkit.finetune.race_settings import OURS, TuneSettings
from encoderkit.finetune.terminal import plain_console, print_table
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import dump_yaml
from encoderkit.pretrain.run_folder import replace_file

Changes = dict[str, Any]  # key -> value
# Each trial takes one of each line.
_OPPONENT: list[list[Changes]] = [
    [{"lr": lr} for lr in (5e-4, 1e-3, 2e-3, 3e-3, 4e-3)],
    [{"mlm_probability": rate} for rate in (0.15, 0.2, 0.3, 0.4)],
    [{"mask_replace_prob": mask, "random_replace_prob": other} for mask, other in ((0.8, 0.1), (1.0, 0.0))],
    [
        *({"layout": "chunks", "batch_size": size} for size in (8, 16, 32, 64)),
        *({"layout": "sentences", "batch_size": size} for size in (64, 128, 256)),
    ],
    [{"schedule.warmup": share} for share in (0.03, 0.1, 0.3)],
    [{"betas": betas} for betas in ([0.9, 0.98], [0.9, 0.999])],
    [{"weight_decay": decay} for decay in (0.01, 0.1)],
]
SPACES: dict[str, list[list[Changes]]] = {
    "bert": _OPPONENT,
    "modernbert": [*_OPPONENT, [{"sparse_prediction": False}, {"sparse_prediction": True}]],
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
    """Run the trials that the log lacks; write OUT/SIDE.yaml and return what it changes of the recipe."""
    console, out = console or plain_console(), Path(settings.out) / settings.side
    out.mkdir(parents=True, exist_ok=True)
    left, found = choose_trials(settings), read_trials(out / "trials.jsonl")
    rounds = rounds_of(settings)
    for minutes, survivors in rounds:
        left = left[:survivors]
        losses = []
        for changes in left:
            done = next((t for t in found if (t["changes"], t["minutes"]) == (changes, minutes)), None)
            if done is None:
                done = {"minutes": minutes, "changes": changes, **_run_trial(settings, changes, minutes, out / "trial")}
                found.append(done)
                replace_file(out / "trials.jsonl", "".join(json.dumps(trial) + "\n" for trial in found))
            console.print(" | ".join(_row(done)), soft_wrap=True)
            losses.append(math.inf if done["loss"] is None else done["loss"])
        left = [left[i] for i in sorted(range(len(left)), key=losses.__getitem__)]
    shutil.rmtree(out / "trial", ignore_errors=True)
    best = out / f"{settings.side}.yaml"
    replace_file(best, dump_yaml(read_side(settings.side, settings.recipes, left[0])))
    last = [t for t in found if t["minutes"] == rounds[-1][0]]
    print_table(console, ["minutes", "loss", "changes"], [_row(t) for t in last])
    console.print(f"best: {best}; log: {out / 'trials.jsonl'}", soft_wrap=True)
    return left[0]


def rounds_of(settings: TuneSettings) -> list[tuple[float, int]]:
    """Minutes and number of trials of each round.

    >>> rounds_of(TuneSettings(side="bert", store="s", trials=8, minutes=10))
    [(2.5, 8), (5.0, 4), (10.0, 2)]
    """
    count = max(1, math.ceil(math.log2(settings.trials)))
    return [(settings.minutes / 2 ** (count - 1 - i), max(1, settings.trials // 2**i)) for i in range(count)]


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


def _run_trial(settings: TuneSettings, changes: Changes, minutes: float, folder: Path) -> dict[str, Any]:
    """What one training found; a loss of None where it diverged."""
    from encoderkit.finetune.race_cell import run_cell

    side = read_side(settings.side, settings.recipes, changes)
    where = {"store": settings.store, "precision": settings.precision}
    try:
        found = run_cell(side, settings.seed, folder, minutes=minutes, points=1, about={}, **where)
    except FloatingPointError as error:
        return {"loss": None, "error": str(error)}
    kept = ("loss", "tokens", "steps", "seconds", "tokens_per_second", "parameters", "precision")
    return {name: found[name] for name in kept} | ({} if math.isfinite(found["loss"]) else {"loss": None})


def _told(changes: Changes) -> str:
    return ", ".join(f"{key} {value}" for key, value in changes.items()) or "the recipe as it is"


def _row(trial: dict[str, Any]) -> list[str]:
    loss = "diverged" if trial["loss"] is None else f"{trial['loss']:.4f}"
    return [f"{trial['minutes']:.4g}", loss, _told(trial["changes"])]
