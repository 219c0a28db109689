"""The progress display on terminals, files and other processes than the first."""

from __future__ import annotations

import io

import pytest

from encoderkit.pretrain import progress as module
from encoderkit.pretrain.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def drive(file, clock, steps: int = 100, enabled: bool = True) -> str:
    with Progress("pretrain", enabled=enabled, file=file) as shown:
        for step in range(1, steps + 1):
            clock[0] += 1.0
            loss = 9.0 - step / 50 if step % 31 == 0 else None
            shown.update(step / steps, step, loss=loss, tokens_per_second=123_456.0, utilisation=0.421)
    return file.getvalue()


def test_plain_lines_come_first_last_and_every_half_minute(clock):
    lines = drive(io.StringIO(), clock).splitlines()
    assert [line.split("step ")[1].split(",")[0] for line in lines] == ["1", "31", "61", "91", "100"]
    assert lines[1] == "pretrain  31.0%: step 31, loss 8.3800, 123k tokens/s, MFU 42.1%, 1 min 09 s left"
    assert "left" not in lines[-1]


def test_terminal_shows_a_bar_with_the_numbers(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    shown = drive(Terminal(), clock)
    assert "100%" in shown
    assert "123k tokens/s, MFU 42.1%" in shown


def test_other_ranks_are_silent(clock):
    assert drive(io.StringIO(), clock, enabled=False) == ""
    assert drive(Terminal(), clock, enabled=False) == ""


def test_notes_are_printed_as_they_are():
    file = io.StringIO()
    with Progress("run", file=file) as shown:
        shown.note("validation [MASK] loss 3.2")
    assert file.getvalue() == "validation [MASK] loss 3.2\n"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_are_for_people(seconds, expected):
    assert duration(seconds) == expected
