"""What a run uses of the machine it is on: device and ranks, number format, attention; and why, in words."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    LoggerType,
    parse_flag_from_env,
)

from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.model import choose_attention
from encoderkit.encoder.precision import Precision, resolve_precision
from encoderkit.kernels.attention import Choice
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.parallel import agreed, group_options, sharding_plugin
from encoderkit.pretrain.settings import PretrainSettings


@dataclass(frozen=True)
class Machine:
    """What serves one run in one process."""

    accelerator: Accelerator
    precision: Precision
    attention: dict[str, Choice]  # of each span
    plugin: FullyShardedDataParallelPlugin | None  # what the launcher asked for to shard weights

    @classmethod
    def find(cls, settings: PretrainSettings, config: EncoderConfig) -> Machine:
        """Join the other ranks and choose what serves this model. Raises InputError where something cannot."""
        if settings.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        device = _own_device()
        PartialState(cpu=device.type == "cpu", **group_options(settings.timeouts.collective))
        precision = agreed(resolve_precision(settings.precision, device))
        plugin = sharding_plugin()
        attention = choose_attention(
            config, settings.attention, device=device, dtype=precision.dtype, deterministic=settings.deterministic
        )
        AcceleratorState._reset_state()  # another precision may have run before in this process
        accelerator = Accelerator(
            mixed_precision=precision.accelerate,
            cpu=device.type == "cpu",
            log_with=settings.log.trackers or None,
            project_dir=settings.out,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # rotary tables: equal everywhere
        )
        torch.use_deterministic_algorithms(settings.deterministic)
        machine = cls(accelerator, precision, attention, plugin)
        if settings.cuda_graphs and (device.type != "cuda" or machine.is_sharded):
            why = "there is no GPU here" if device.type != "cuda" else "sharded weights move"
            raise InputError(f"cuda_graphs is true, but {why}; leave it out")
        return machine

    @property
    def is_sharded(self) -> bool:
        """Whether each rank keeps only a part of the weights."""
        return self.plugin is not None and self.accelerator.num_processes > 1

    def facts(self) -> dict[str, Any]:
        """What the bits of a run depend on here, as plain values."""
        return {
            "attention": {span: choice.name for span, choice in self.attention.items()},
            "precision": self.precision.name,
            "device": self.accelerator.device.type,
            "threads": torch.get_num_threads(),
            "matrix_route": None if self.precision.route is None else self.precision.route.name,
            "world_size": self.accelerator.num_processes,
            "weights": "sharded" if self.is_sharded else "replicated",
        }

    def reasons(self, facts: dict[str, Any], before: dict[str, Any] | None, resume: bool) -> dict[str, str]:
        """What was chosen and why, for run.json and the first lines; before: the facts of the checkpoint, if any."""
        why = "as when the run began" if resume else self.precision.reason
        reasons = {"precision": f"{self.precision.name} ({why})"}
        if self.precision.route is not None:
            reasons["fp32 products"] = f"{facts['matrix_route']} ({self.precision.route.reason})"
        reasons |= {span: f"{choice.name} ({choice.reason})" for span, choice in self.attention.items()}
        ranks, ranks_before = _ranks(facts), _ranks(before or facts)
        if ranks_before != ranks:
            reasons["ranks"] = f"{ranks}; {ranks_before} before: the same batches, summed in another order"
        elif facts["world_size"] > 1:
            reasons["ranks"] = ranks
        return reasons


def check_trackers(names: list[str]) -> None:
    """Raise InputError for a tracker that Accelerate does not know or that is not installed."""
    known = {tracker.value for tracker in LoggerType if tracker is not LoggerType.ALL}
    installed = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in names:
        if name not in known:
            raise InputError(f"log.trackers has {name!r}; expected some of {', '.join(sorted(known))}")
        if name not in installed:
            raise InputError(f"log.trackers has {name!r}, which is not installed; pip install {name}")


def _own_device() -> torch.device:
    """The GPU of this rank, which from here on is the one that things are put on, or the CPU."""
    if not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):  # accelerate launch --cpu
        return torch.device("cpu")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", number + 1))
    if processes > count:
        raise InputError(
            f"{processes} processes were started on this node, and {count} GPUs are visible; start {count}"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _ranks(facts: dict[str, Any]) -> str:
    return f"{facts['world_size']}, weights {facts.get('weights', 'replicated')}"
