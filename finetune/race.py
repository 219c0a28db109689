"""The race: encoderkit and a tuned loop of transformers learn for equal time on this machine, one after another.

    python -m encoderkit.finetune.race run --store STORE --minutes 10 --seeds 3
    python -m encoderkit.finetune.race tune --side bert --store STORE --trials 8 --minutes 10

Same store, tokenizer, number of parameters, number format, threads and allocator; all are scored at the fixed probe, in
fp32, while the clock stands still. A side's time holds what its training needs: batches, steps, and with encoderkit the
first token vectors and the checkpoints that its curve is measured on.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from encoderkit.finetune.race_settings import OURS, Opponent, RaceSettings, Side, TuneSettings, recipe_of
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import (
    Commands,
    dispatch,
    parse_settings,
    run_command,
    settings_from_entries,
    settings_to_dict,
)
from encoderkit.pretrain.minimal_pairs import read_pairs
from encoderkit.pretrain.run_folder import replace_file
from encoderkit.pretrain.settings import PretrainSettings
from encoderkit.pretrain.settings_yaml import Entry, read_inline, read_yaml
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.terminal import plain_console

PROG = "python -m encoderkit.finetune.race"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    return run_command(lambda: dispatch(PROG, COMMANDS, sys.argv[1:] if argv is None else argv))


def read_side(side: str, recipes: str | None, changes: Mapping[str, Any] | None = None) -> Side:
    """The settings of a side, with some keys changed. Raises InputError naming a key that cannot be."""
    entries = read_yaml(recipe_of(side, recipes))
    entries += [Entry(key, read_inline(json.dumps(value)), "") for key, value in (changes or {}).items()]
    return (
        settings_from_entries(PretrainSettings, entries) if side == OURS else settings_from_entries(Opponent, entries)
    )


def run_race(settings: RaceSettings, *, console: Console | None = None) -> list[dict[str, Any]]:
    """Run what is missing; write results.jsonl, report.md and race.png into settings.out; returns all results.

    Raises InputError, before anything runs, for sides that do not compare; FloatingPointError where one diverged.
    """
    from encoderkit.encoder.precision import resolve_precision
    from encoderkit.finetune.inference import best_device
    from encoderkit.finetune.race_cell import check_alike, machine, read_result, run_cell, score_pairs
    from encoderkit.finetune.race_report import told, write_race_report
    from encoderkit.finetune.run_folder import held
    from encoderkit.pretrain.tokenizer import TokenIds, load_tokenizer

    console, out = console or plain_console(), Path(settings.out)
    sides = {side: read_side(side, settings.recipes) for side in settings.sides}
    store = Store.open(settings.store)
    check_alike(sides, TokenIds.of(load_tokenizer(store.tokenizer_folder)))
    turns = [deque(sides) for _ in range(settings.seeds)]
    for seed, turn in enumerate(turns):
        turn.rotate(-seed)  # another one begins with each seed
    cells = [(side, seed) for seed, turn in enumerate(turns) for side in turn]
    pairs, count = settings.minimal_pairs, settings.num_pairs
    if pairs is not None:
        read_pairs([pairs])  # a file that cannot be read is told before ten minutes of training
    precision = resolve_precision(settings.precision, best_device())  # the same for every side
    how = {"precision": precision.name, "machine": machine(), "minutes": settings.minutes, "points": settings.points}
    train = partial(run_cell, store=store, minutes=settings.minutes, precision=precision, points=settings.points)
    results = []
    with held(out):
        for number, (side, seed) in enumerate(cells, 1):
            folder = out / side / f"seed-{seed}"
            about = {"side": side, "settings": settings_to_dict(sides[side]), "store": store.hash, **how}
            try:
                result = read_result(folder) or train(sides[side], seed, folder, about=about)
            except FloatingPointError as error:
                raise FloatingPointError(f"{side}, seed {seed}: {error}") from error
            if any(result.get(key) != value for key, value in about.items()):
                raise InputError(
                    f"{folder} was run with other settings or on another machine; choose another --out, or remove it"
                )
            if pairs is not None and result.get("pairs") != [pairs, count]:
                result |= {"pairs": [pairs, count], "minimal_pairs": score_pairs(folder / "final", pairs, count)}
                replace_file(folder / "result.json", json.dumps(result, indent=1) + "\n")
            console.print(f"{number}/{len(cells)}  {told(result)}")
            results.append(result)
        results.sort(key=lambda result: settings.sides.index(result["side"]))
        replace_file(out / "results.jsonl", "".join(json.dumps(result) + "\n" for result in results))
        write_race_report(out, settings, results, console)
    return results


def _run(argv: list[str]) -> None:
    settings = parse_settings(
        RaceSettings,
        argv,
        prog=f"{PROG} run",
        description="Train encoderkit's recipe and the tuned loops of transformers for equal minutes, in turn. The "
        "folder holds results.jsonl, report.md, race.png and the models; a race that was stopped goes on.",
        examples=[
            f"{PROG} run --store stores/mine --minutes 10 --seeds 3",
            f"{PROG} run --store stores/mine --minutes 10 --minimal_pairs blimp/all.jsonl.gz --out runs/race",
            "make race ARGS='--store stores/mine --sides [encoderkit,bert]'",
        ],
    )
    run_race(settings)


def _tune(argv: list[str]) -> None:
    settings = parse_settings(
        TuneSettings,
        argv,
        prog=f"{PROG} tune",
        description="Search a side's settings: all trials for half of the time, then the best two for all of it. The "
        "folder holds a log of the trials and the best settings as YAML; a search that was stopped goes on.",
        examples=[
            f"{PROG} tune --side bert --store stores/mine --trials 8 --minutes 10",
            f"{PROG} tune --side encoderkit --store stores/mine --trials 8 --minutes 10 --out runs/tuned",
        ],
    )
    from encoderkit.finetune.race_tune import tune

    tune(settings)


COMMANDS: Commands = {
    "run": ("train all sides for equal time and compare them", _run),
    "tune": ("search the settings of one side", _tune),
}

if __name__ == "__main__":
    sys.exit(main())
