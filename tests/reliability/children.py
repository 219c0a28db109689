"""Work in forked processes, which start in a tenth of the time, tell where they are, and are killed there for real.

Threads do not survive a fork: a child computes with one.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import accelerate
import matplotlib.figure  # noqa: F401  # these, too, are imported once for all children
import torch
from transformers import ModernBertForMaskedLM, PreTrainedTokenizerFast  # noqa: F401

import encoderkit.encoder.precision as precision
import encoderkit.pretrain.loop as loop
import encoderkit.pretrain.shards as shards
from encoderkit.kernels.matrix_route import Route
from encoderkit.pretrain.__main__ import main
from encoderkit.pretrain.job import Job

PATIENCE = 180.0  # seconds after which a child counts as hung
PLACES = {"step": (loop, "train_step"), "validation": (loop, "validate"), "save": (Job, "save")}
PLACES["batch"] = (shards.ShardWriter, "add")  # of prepare
LETTERS = {place: place[2:3].encode() for place in PLACES}  # e, l, v, t


@dataclass
class Child:
    """A forked process. events: descriptor on which it writes the letter of each place it enters."""

    pid: int
    events: int
    status: int | None = None

    def reaches(self, place: str, times: int = 1) -> bool:
        """Wait until it has entered place this often from now on; False where it ended before."""
        deadline = time.monotonic() + PATIENCE
        while times and select.select([self.events], [], [], max(deadline - time.monotonic(), 0))[0]:
            letter = os.read(self.events, 1)
            if not letter:
                return False
            times -= letter == LETTERS[place]
        return not times

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit status, or minus the signal that ended it; one that hangs is killed, which shows."""
        deadline = time.monotonic() + seconds
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                os.close(self.events)
            elif time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
            else:
                time.sleep(0.002)
        return self.status


def fork(target: Callable[[], int], log: Path, environment: dict[str, str] | None = None) -> Child:
    """Run target in a child that announces places; its output goes to log."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        return Child(pid, reading)
    status = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not what pytest reads
        os.close(reading)
        os.environ.update(environment or {})
        torch.set_num_threads(1)
        accelerate.state.AcceleratorState._reset_state(True)  # what the parent ran in
        precision.fastest_route = lambda: Route("mkl", "for comparison")  # a new run measures, and may choose another
        for place, (owner, name) in PLACES.items():
            setattr(owner, name, _announcing(getattr(owner, name), LETTERS[place], writing))
        status = target()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):  # a disk that is full
            sys.stdout.flush()
        os._exit(status)


def _announcing(function: Callable, letter: bytes, writing: int) -> Callable:
    def announced(*arguments, **options):
        os.write(writing, letter)
        return function(*arguments, **options)

    return announced


def run(*arguments: object, log: Path, before: Callable[[], None] = lambda: None) -> Child:
    """encoderkit-pretrain with these arguments; before: what the child does first."""
    return run_ranks(1, *arguments, log=log, before=before)[0]


def run_ranks(ranks: int, *arguments: object, log: Path, before: Callable[[], None] = lambda: None) -> Sequence[Child]:
    """The same on several ranks."""
    argv = [str(argument) for argument in arguments]

    def target() -> int:
        before()
        return main(argv)

    if ranks == 1:
        return [fork(target, log)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    return [
        fork(target, log, {**common, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
