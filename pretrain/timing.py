"""Where the time of a step goes: data, forward, backward, optimizer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "forward", "backward", "optimizer")


class PhaseTimer:
    """Seconds per phase since the last take(). On GPU by events, so that timing never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside towards this phase."""
        if self._cuda and name != "data":  # waiting for a batch is the host's time
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            stop.record()
            self._events.append((name, start, stop))
        else:
            began = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Seconds per phase, then start again from zero. On GPU this waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        for name, start, stop in self._events:
            self._seconds[name] += start.elapsed_time(stop) / 1000
        taken = {name: round(seconds, 4) for name, seconds in self._seconds.items()}
        self._seconds, self._events = dict.fromkeys(PHASES, 0.0), []
        return taken
