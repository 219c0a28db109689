"""Kills, corrupts and starves runs for real, and prints a line for each row of checks: make torture.

Beside a row that guards stands what happened with the guard off. Exit status 1 where a row failed or was not over
within --minutes. --store and --config kill a run of that recipe in place of the tiny one (the row "ten"), which takes
more --minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

from reliability.bench import Bench, Outcome
from reliability.children import fork
from reliability.killing import KILLING
from reliability.tested_rows import ROOT, TESTS, Row, missing
from tiny_run import make_store

from encoderkit.pretrain.command_line import parse_settings
from encoderkit.pretrain.settings import PretrainSettings

TEST_SHARE = 0.3  # of the minutes, kept for the rows that are tests


class Late(Exception):
    """What a row ends with whose time is over."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise Late in here after these seconds, and end the processes that were begun in here."""

    def ring(*_: object) -> None:
        raise Late

    others, before = _children(os.getpid()), signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    except Late:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for child in set(_children(os.getpid())).difference(others):
            for process in (*_children(child), child):  # ranks, then what launched them
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _children(process: int) -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def run_tests(rows: list[str], folder: Path, seconds: float) -> dict[str, Outcome]:
    """The rows that are tests, in one go; what was over in time counts."""
    nodes = list(dict.fromkeys(node for row in rows for node in (*TESTS[row].tests, *TESTS[row].unguarded)))
    results = folder / "tests.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", f"--junitxml={results}", *nodes]
    with open(folder / "tests.log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it writes what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
    found = ElementTree.parse(results).iter("testcase") if results.is_file() else ()
    cases = [
        (f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}", len(case) == 0)
        for case in found
        if case.find("skipped") is None
    ]
    return {row: outcome_of(TESTS[row], cases) for row in rows}


def outcome_of(row: Row, cases: list[tuple[str, bool]]) -> Outcome:
    """cases: of each test that ran its node id, and whether it passed."""

    def passed(nodes: Iterable[str]) -> list[list[bool]]:
        return [
            [ok for name, ok in cases if name == node or name.startswith((f"{node}[", f"{node}::"))] for node in nodes
        ]

    guarded, unguarded = passed(row.tests), passed(row.unguarded)
    told = ""
    if row.unguarded:
        unseen = [node for node, ok in zip(row.unguarded, unguarded, strict=True) if not (ok and all(ok))]
        names = [node.rpartition("::test_")[2].replace("_", " ") for node in row.unguarded]
        told = f"not seen: {', '.join(unseen)}" if unseen else f"fails as it should ({'; '.join(names)})"
    mine = [ok for part in guarded for ok in part]
    late = sum(not part for part in guarded)
    figure = f"{sum(mine)} of {len(mine)} tests" + (f"; {late} not reached or skipped" if late else "")
    return Outcome(all(part and all(part) for part in (*guarded, *unguarded)), figure, told)


def show(row: str, what: str, outcome: Outcome, seconds: float) -> None:
    off = f" | guard off: {outcome.guard_off}" if outcome.guard_off else ""
    verdict = "pass" if outcome.passed else "FAIL"
    print(f"{verdict}  {row:<5} {what}: {outcome.figure}{off}  ({seconds:.0f} s)", flush=True)


def torture(arguments: argparse.Namespace) -> int:
    began, failed = time.monotonic(), 0
    rows = arguments.rows or [*KILLING, *TESTS]
    tested = [row for row in rows if row in TESTS]
    if lost := missing(tested):
        raise SystemExit(f"torture names tests that are not there: {', '.join(lost)}")
    end = began + 60 * arguments.minutes
    kills_end = end - (60 * arguments.minutes * TEST_SHARE if tested else 0)
    folder = Path(arguments.out or tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    store, recipe = folder / "store" / "store", None
    if not store.is_dir():
        maker = fork(lambda: 0 if make_store(folder / "store") else 1, folder / "store.log")
        assert maker.wait() == 0, (folder / "store.log").read_text()
    if arguments.config:
        options = ["--config", arguments.config, "--data.store", arguments.store, *arguments.settings]
        recipe = parse_settings(PretrainSettings, options, prog="torture")
    bench = Bench(folder, store, random.Random(arguments.seed), recipe)
    for row in (row for row in rows if row in KILLING):
        what, check = KILLING[row]
        at = time.monotonic()
        try:
            with at_most(kills_end - at):
                outcome = check(bench)
        except Late:
            outcome = Outcome(False, "not over in time; more --minutes, or fewer --rows")
        except Exception as error:
            outcome = Outcome(False, f"{type(error).__name__}: {str(error)[-500:]}")
        failed += not outcome.passed
        show(row, what, outcome, time.monotonic() - at)
    if tested:
        at = time.monotonic()
        outcomes = run_tests(tested, folder, end - at)
        for row, outcome in outcomes.items():
            failed += not outcome.passed
            show(row, TESTS[row].what, outcome, (time.monotonic() - at) / len(tested))
    print(f"{failed} rows failed; {(time.monotonic() - began) / 60:.1f} minutes; {folder}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=[*KILLING, *TESTS], help="these rows only")
    parser.add_argument("--minutes", type=float, default=30, help="for all rows together")
    parser.add_argument("--seed", type=int, default=0, help="of where and when the rows strike")
    parser.add_argument("--out", help="folder to work in, kept; a new temporary one where it is not given")
    parser.add_argument("--config", help="a recipe for the rows 17 and ten")
    parser.add_argument("--store", help="the store of that recipe")
    parser.epilog = "other options are settings of that recipe, --budget.steps among them"
    options, settings = parser.parse_known_args()
    options.settings = settings
    sys.exit(torture(options))
