"""What torture says of rows that are tests: which there are, and nothing that was not seen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from reliability import tested_rows
from reliability.tested_rows import ROOT, TESTS, Row, missing
from reliability.torture import Late, at_most, outcome_of

ROW = Row("a guard", ["tests/test_a.py::test_guards"], ("tests/test_a.py::test_without_it_all_is_lost",))


def test_every_test_that_torture_names_is_there():
    assert missing() == []


@pytest.mark.parametrize("node", ["tests/reliability/test_torture.py::test_none", "tests/test_none.py"])
def test_a_test_that_is_not_there_is_told(node, monkeypatch):
    monkeypatch.setitem(tested_rows.TESTS, "1", Row("none", [*TESTS["1"].tests, node]))
    assert missing(["1"]) == [node]


@pytest.mark.parametrize(
    ("verdicts", "passed", "told"),
    [
        (
            {"guards[a]": True, "guards[b]": True, "without_it_all_is_lost": True},
            True,
            "fails as it should (without it all is lost)",
        ),
        (
            {"guards[a]": True, "guards[b]": False, "without_it_all_is_lost": True},
            False,
            "fails as it should (without it all is lost)",
        ),
        ({"guards[a]": True, "without_it_all_is_lost": False}, False, f"not seen: {ROW.unguarded[0]}"),
        ({"guards[a]": True}, False, f"not seen: {ROW.unguarded[0]}"),
        ({"without_it_all_is_lost": True}, False, "fails as it should (without it all is lost)"),
    ],
)
def test_what_happens_with_the_guard_off_is_told_where_it_was_seen(verdicts, passed, told):
    outcome = outcome_of(ROW, [(f"tests/test_a.py::test_{name}", verdict) for name, verdict in verdicts.items()])
    assert (outcome.passed, outcome.guard_off) == (passed, told)


def test_a_row_that_is_late_ends_with_its_processes():
    begun: list[subprocess.Popen] = []

    def hang():
        with at_most(0.5):
            begun.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
            begun[0].wait()

    with pytest.raises(Late):
        hang()
    assert begun[0].wait(5) == -signal.SIGKILL


def test_two_rows_strike_and_pass(tmp_path):
    """Their faults are planted in functions of the loop, and so fit only as long as those take what they took."""
    command = [sys.executable, "-m", "reliability.torture", "--rows", "2", "16", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line[:8] for line in done.stdout.splitlines()[:2]] == ["pass  2 ", "pass  16"]
