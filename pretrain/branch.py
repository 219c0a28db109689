"""A run that begins at the checkpoint of another one, under another schedule: a decay off a stable run.

Progress, and with it learning rate and masking rate, is counted from the beginning of the first run. A decay of D steps
from step N on: budget.steps N + D, schedule.name wsd, schedule.decay D / (N + D).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import dump_yaml, read_settings
from encoderkit.pretrain.run_folder import check_new, check_resumable, whole_folder
from encoderkit.pretrain.settings import PretrainSettings
from encoderkit.pretrain.store import Store

CHANGES = ("schedule.*", "budget.*", "masking.*")  # what a branch may set anew, beside operational keys


def begin_branch(source: str, settings: PretrainSettings, allow_change: Collection[str] = CHANGES) -> None:
    """Make settings.out a run folder that stands at a checkpoint of the run source, RUN or RUN:STEP.

    The first process does, others wait for it. Raises InputError, with nothing written, where out is in use, source
    has no such whole checkpoint, or settings differ in more than operational keys and allow_change.
    """
    out = Path(settings.out)
    if os.environ.get("RANK", "0") != "0":
        _wait_for(out, settings.timeouts.collective)
        return
    run, step = named_run(source)
    check_new(out)
    check_resumable(read_settings(PretrainSettings, run / "config.yaml"), settings, allow_change)
    Store.open(settings.data.store)
    checkpoint = _find(run, step)
    try:
        with whole_folder(out) as partial:
            for name in ("run.json", "log.jsonl"):
                shutil.copy(run / name, partial / name)
            (partial / "config.yaml").write_text(dump_yaml(settings), encoding="utf-8")
            copy = shutil.copytree(checkpoint, partial / "checkpoints" / checkpoint.name)
            if (reason := _damage(copy)) is not None:  # deleted meanwhile by the run, which goes on
                raise InputError(f"{checkpoint} was not copied whole: {reason}; name a step that stays")
    except (OSError, shutil.Error) as error:
        raise InputError(f"{checkpoint} cannot be copied to {out}: {error}") from error


def named_run(source: str) -> tuple[Path, int | None]:
    """The run folder and the step that RUN or RUN:STEP names."""
    run, _, step = source.rpartition(":")
    return (Path(run), int(step)) if run and step.isdigit() else (Path(source), None)


def _find(run: Path, step: int | None) -> Path:
    """The checkpoint of this step, or the newest whole one."""
    from encoderkit.pretrain.checkpoint import latest_checkpoint

    folder = run / "checkpoints"
    if step is None:
        newest = latest_checkpoint(folder)
        if newest is None:
            raise InputError(f"--branch {run}: {folder} holds no whole checkpoint")
        return newest.path
    if (reason := _damage(folder / f"step-{step}")) is not None:
        steps = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
        raise InputError(f"--branch {run}:{step}: {reason}; expected one of the steps {', '.join(map(str, steps))}")
    return folder / f"step-{step}"


def _damage(checkpoint: Path) -> str | None:
    from encoderkit.pretrain.checkpoint import damage  # imports torch

    return f"{checkpoint.name} is not there" if not checkpoint.is_dir() else damage(checkpoint)


def _wait_for(out: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not (out / "config.yaml").is_file():
        if time.monotonic() > end:
            raise InputError(f"--branch: the first rank has not made {out} in {seconds:g} s (timeouts.collective)")
        time.sleep(0.2)
