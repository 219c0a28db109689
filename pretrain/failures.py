"""Which part failed, and what to do: errors of torch and gloo as one line that names the culprit."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from encoderkit.kernels.errors import InputError, first_line

if TYPE_CHECKING:
    from encoderkit.pretrain.job import Job

ANSWER_SECONDS = 1.0  # in which ranks that waited too tell that they are alive
_COLLECTIVE = re.compile(r"gloo|NCCL|Timed out waiting|Connection (closed|reset)|Broken pipe", re.IGNORECASE)
_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


def lost_rank(error: RuntimeError, job: Job) -> ChildProcessError | None:
    """The error of a collective as one that names the ranks that did not take part; None for any other error.

    The ranks that wait for each other all fail within moments, and each leaves its name in the store that brought them
    together; whose name is missing hangs or is gone. With NCCL, torch's watchdog ends the processes instead, and
    its own log names the collective.
    """
    if job.accelerator.num_processes == 1 or not (isinstance(error, dist.DistError) or _COLLECTIVE.search(str(error))):
        return None
    missing: list[int] = []
    try:
        store = _store()
        store.set(_name(dist.get_rank()), "")
        deadline = time.monotonic() + ANSWER_SECONDS
        missing = [rank for rank in range(dist.get_world_size()) if not store.check([_name(rank)])]
        while missing and time.monotonic() < deadline:
            time.sleep(0.05)
            missing = [rank for rank in missing if not store.check([_name(rank)])]
    except RuntimeError:  # the store is gone with the process that held it
        pass
    who = f"rank {', '.join(map(str, missing))}" if missing else "another rank"
    return ChildProcessError(
        f"step {job.state.step + 1}: {who} did not take part in a collective within timeouts.collective = "
        f"{job.settings.timeouts.collective:g} s, or is gone: {first_line(error)}. "
        "Its own messages tell more; resume from the newest checkpoint"
    )


def other_failed() -> bool:
    """Whether another rank has left its name, so that this one, if it hangs, need not finish anything."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    try:
        return any(_store().check([_name(rank)]) for rank in range(dist.get_world_size()))
    except RuntimeError:
        return True


def out_of_memory(error: RuntimeError, job: Job) -> InputError | None:
    """The error of an allocation as one that names the setting to change; None for any other error."""
    if not isinstance(error, torch.OutOfMemoryError) and not _MEMORY.search(str(error)):
        return None
    settings = job.settings
    ways = []
    if settings.micro_batch_tokens > settings.data.row_tokens:
        rows = max(settings.micro_batch_tokens // 2 // settings.data.row_tokens, 1)
        ways.append(f"--micro_batch_tokens {rows * settings.data.row_tokens}")
    if not settings.gradient_checkpointing:
        ways.append("--gradient_checkpointing true")
    how = " or ".join(ways) or "a smaller data.row_tokens or model, in a new run"
    return InputError(
        f"step {job.state.step + 1}: out of memory with micro_batch_tokens {settings.micro_batch_tokens}; resume with "
        f"{how}, which keeps batch_tokens {settings.batch_tokens} and the numbers: {first_line(error)}"
    )


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _name(rank: int) -> str:
    return f"encoderkit/failed/{rank}"
