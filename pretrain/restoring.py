"""What a run goes on from: its newest whole checkpoint, and what of this machine has to be as it was."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.errors import InputError
from encoderkit.kernels.matrix_route import use_route
from encoderkit.pretrain.checkpoint import Checkpoint, latest_checkpoint
from encoderkit.pretrain.optimizer_state import unflatten_optimizer
from encoderkit.pretrain.parallel import load_optimizer
from encoderkit.pretrain.run_folder import names_key


@dataclass
class State:
    """What a run needs to go on, besides weights and optimizer state."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # real tokens seen by all ranks
    seconds: float = 0.0  # spent in the loop
    window: list[list[float]] = field(default_factory=list)  # of each rank: sums since the last log line
    epoch_ends: list[int] = field(default_factory=list)  # rows up to the end of each epoch so far
    order: str = ""  # fingerprint of the order that they are of
    stage: dict[str, int] = field(default_factory=dict)  # the Stage that the last step belongs to
    spikes: dict[str, Any] = field(default_factory=dict)  # of the SpikeGuard
    best: float = math.inf  # lowest held-out loss of masked tokens so far


def newest_checkpoint(out: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, None where it was stopped before the first one."""
    checkpoint = latest_checkpoint(out / "checkpoints")
    if checkpoint is None and any((out / "checkpoints").glob("step-*")):
        raise InputError(f"{out / 'checkpoints'}: no checkpoint is whole; restore one from a copy, or start a new run")
    return checkpoint


def check_same_checkpoint(checkpoint: Checkpoint | None, out: Path) -> None:
    """Raise InputError unless every rank found the first one's: shared disks may show a new folder to some later."""
    mine = None if checkpoint is None else checkpoint.step
    first = broadcast_object_list([mine])[0]
    if mine != first:
        raise InputError(f"{out}: the newest whole checkpoint is step {mine} here and {first} for rank 0; start again")


def restore(checkpoint: Checkpoint, model: MaskedLM, facts: dict[str, Any], allow_change: Collection[str]) -> State:
    """Load a checkpoint's weights; refuse where other bits would come out silently."""
    stay_with(checkpoint, facts, allow_change)
    try:
        model.load_state_dict(checkpoint.tensors("model"), strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{checkpoint.path} does not fit model.* as it was changed: {reason}") from error
    return State(**checkpoint.state["run"])


def stay_with(checkpoint: Checkpoint, facts: dict[str, Any], allow_change: Collection[str] = ()) -> None:
    """Go on as the run of a checkpoint was computed: with its threads and library, where its kind of machine is here.

    facts: what Machine.facts gives here; threads and matrix_route become the run's. Raises InputError where tokenizer,
    data, attention, precision or device are others than then.
    """
    before = checkpoint.state["facts"]
    sum_as_before(facts, before)
    machine = "resume on the same kind of machine"
    for name, key, advice in (
        ("tokenizer", None, "resume with the store of the run"),
        ("data", "data.store", "resume with the store of the run or name the change: --allow_change data.store"),
        ("attention", "attention", machine),
        ("precision", "precision", machine),
        ("device", None, machine),
    ):
        here = facts.get(name)
        was = before.get(name, here)
        if was != here and not (key and any(names_key(allowed, key) for allowed in allow_change)):
            raise InputError(f"{checkpoint.path}: {name} was {was} and is {here} here; {advice}, or start a new run")


def sum_as_before(facts: dict[str, Any], before: dict[str, Any]) -> None:
    """Keep what the order of summation depends on, where the bits can be kept."""
    if facts["device"] == before["device"] == "cpu" and facts["world_size"] == before["world_size"]:
        facts["threads"] = before["threads"]
        torch.set_num_threads(facts["threads"])
        facts["matrix_route"] = before.get("matrix_route", "mkl")  # torch's own, where none was measured yet
        use_route(facts["matrix_route"])


def restore_optimizers(
    checkpoint: Checkpoint, optimizers: list[torch.optim.Optimizer], allow_change: Collection[str]
) -> None:
    """Load a checkpoint's optimizer state, made on however many ranks; options of changed settings are the new ones."""
    described = checkpoint.state["optimizers"]
    if len(described) != len(optimizers):
        raise InputError(f"{checkpoint.path} holds another optimizer's state; optimizer.name cannot change")
    changes = any(name.startswith("optimizer.") for name in allow_change)
    for i, (optimizer, about) in enumerate(zip(optimizers, described, strict=True)):
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        load_optimizer(optimizer, unflatten_optimizer(checkpoint.tensors(f"optimizer-{i}"), about))
        if changes:
            for group, chosen in zip(optimizer.param_groups, options, strict=True):
                group.update(chosen)
