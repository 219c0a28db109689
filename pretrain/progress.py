"""How far a run is, on the terminal: a bar, or a plain line now and then where there is no terminal."""

from __future__ import annotations

import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows the progress of one run; silent where it is not enabled, as on all ranks but the first.

    description: what stands in front, such as the name of the run folder. file: standard error where it is None.
    """

    def __init__(
        self, description: str, *, enabled: bool = True, seconds_between_lines: float = 30.0, file: TextIO | None = None
    ) -> None:
        self._console = Console(file=file, stderr=file is None)
        self._enabled, self._description, self._between = enabled, description, seconds_between_lines
        self._first: tuple[float, float] | None = None  # time and progress of the first update
        self._loss: float | None = None
        self._pair_accuracy: float | None = None
        self._last_line = -float("inf")
        self._unsaid: str | None = None
        self._bar: RichProgress | None = None
        if enabled and self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task(description, total=1.0, numbers="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._unsaid is not None:
            self._say(self._unsaid)

    def update(
        self,
        progress: float,
        step: int,
        *,
        loss: float | None = None,
        pair_accuracy: float | None = None,
        tokens_per_second: float | None = None,
        utilisation: float | None = None,
    ) -> None:
        """Show these numbers; a loss or pair_accuracy of None leaves the last one standing.

        progress: 0 to 1. step: optimizer steps done. loss: nats a target. pair_accuracy: of sentence pairs.
        utilisation: share of the peak FLOP/s.
        """
        if not self._enabled:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (now, progress)
        parts = [f"step {step:,}"]
        self._loss = self._loss if loss is None else loss
        self._pair_accuracy = self._pair_accuracy if pair_accuracy is None else pair_accuracy
        parts += [] if self._loss is None else [f"loss {self._loss:.4f}"]
        parts += [] if self._pair_accuracy is None else [f"pairs {self._pair_accuracy:.1%}"]
        parts += [] if tokens_per_second is None else [f"{_short(tokens_per_second)} tokens/s"]
        parts += [] if utilisation is None else [f"MFU {utilisation:.1%}"]
        left = self._time_left(now, progress)
        parts += [] if left is None else [f"{duration(left)} left"]
        numbers = ", ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=min(progress, 1.0), numbers=numbers)
            return
        line = f"{self._description} {progress:6.1%}: {numbers}"
        if now - self._last_line >= self._between:
            self._say(line)
            self._last_line, self._unsaid = now, None
        else:
            self._unsaid = line

    def note(self, text: str) -> None:
        """Print one line above the bar, such as a validation loss."""
        if self._enabled:
            self._say(text)

    def _say(self, text: str) -> None:
        (self._bar.console if self._bar is not None else self._console).print(
            text, highlight=False, markup=False, soft_wrap=True
        )

    def _time_left(self, now: float, progress: float) -> float | None:
        """Seconds left at the pace since the first update, which leaves compiling and start-up out."""
        assert self._first is not None
        done = progress - self._first[1]
        return (now - self._first[0]) / done * (1 - progress) if done > 0 and progress < 1 else None


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def _short(number: float) -> str:
    """1234567 as 1.23M."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:.3g}"
