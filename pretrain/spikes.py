"""Steps whose loss or gradient norm jumps are left out: beyond 6 standard deviations above the last 128 steps.

Logarithms are compared, so that one spike of a hundredfold does not hide the next, and every step counts as history,
skipped ones too: where the level has changed for good, training goes on after some steps. As in OLMo-core's
SkipStepOptimizer, but for the logarithms. Everything stays on the device, and nobody waits for it to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WINDOW = 128  # steps that a new one is compared with
FEWEST = WINDOW // 2  # steps before which none is left out
TINY = 1e-30  # what stands for a loss or norm of zero
LEAST_STD = 0.01  # of the logarithms: where there is hardly any noise, one percent counts as one deviation


@dataclass(frozen=True)
class Spike:
    """A step that was left out, counted from 1. loss: nats a target. limits: what loss and norm had to stay below."""

    step: int
    loss: float
    norm: float
    limits: tuple[float, float]


class SpikeGuard:
    """Loss and gradient norm of the last WINDOW steps, the same on every rank.

    sigmas: standard deviations above the mean from which a step is a spike; 0: none is.
    """

    def __init__(self, sigmas: float, device: torch.device) -> None:
        self._sigmas = sigmas
        self._history = torch.zeros(WINDOW, 2, dtype=torch.float64, device=device)  # logarithms of loss and norm
        self._limits = torch.zeros(WINDOW, 2, dtype=torch.float64, device=device)
        self._is_spike = torch.zeros(WINDOW, dtype=torch.bool, device=device)
        self._seen = self._read = 0  # steps, and of these those that spikes() has told

    def add(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Take in a step, () and () on the device; 1.0 where it is a spike, else 0.0."""
        value = torch.stack([loss.double(), norm.double()]).clamp(min=TINY).log()
        past = self._history[: min(self._seen, WINDOW)]
        place = self._seen % WINDOW
        if self._sigmas > 0 and self._seen >= FEWEST:
            std, mean = torch.std_mean(past, dim=0)
            self._limits[place] = mean + self._sigmas * std.clamp(min=LEAST_STD)
            self._is_spike[place] = (value > self._limits[place]).any()
        else:
            self._is_spike[place] = False
        is_spike = self._is_spike[place].float()
        self._history[place] = value
        self._seen += 1
        return is_spike

    def spikes(self, steps_done: int) -> list[Spike]:
        """Those since the last call, at most the last WINDOW steps. Waits for the device.

        steps_done: of the run, which is the number of the last step.
        """
        steps = range(max(self._read, self._seen - WINDOW), self._seen)
        self._read = self._seen
        flags, values, limits = self._is_spike.tolist(), self._history.exp().tolist(), self._limits.exp().tolist()
        found = ((steps_done - self._seen + i + 1, i % WINDOW) for i in steps if flags[i % WINDOW])
        return [
            Spike(step, values[place][0], values[place][1], (limits[place][0], limits[place][1]))
            for step, place in found
        ]

    def forget(self) -> None:
        """Begin anew, where length or batch size change."""
        self._seen = self._read = 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as plain values. Waits for the device."""
        return {"seen": self._seen, "history": self._history.tolist()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on where state() was taken."""
        self._seen = self._read = state["seen"]
        self._history.copy_(torch.tensor(state["history"], dtype=torch.float64))
