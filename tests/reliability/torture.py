"""Kills, corrupts and starves runs for real, and prints a line for each row of checks: make torture.

Beside a row that guards stands what happened with the guard off. Exit status 1 where a row failed or was not reached
within --minutes. --store and --config kill a run of that recipe in place of the tiny one (the row "ten").
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

from reliability.bench import ROOT, Bench, Outcome
from reliability.children import fork
from reliability.killing import KILLING
from tiny_run import make_store

from encoderkit.pretrain.command_line import parse_settings
from encoderkit.pretrain.settings import PretrainSettings

# Rows that are tests. Of each: what, its tests, and what those show that take the guard off.
LOOP, RESUME = "tests/pretrain/test_loop.py::test_", "tests/pretrain/test_resume.py::test_"
SAVED, BATCHES = "tests/pretrain/test_checkpoint.py::test_", "tests/pretrain/test_batches.py::test_"
HERE = "tests/reliability/test_"
TESTS: dict[str, tuple[str, list[str], str]] = {
    "1": ("stop and resume at five points", [f"{RESUME}resumed_run_equals_uninterrupted_run"], ""),
    "3": ("two resumes; an epoch's edge", [
        f"{RESUME}dropout_and_two_resumes_change_nothing",
        f"{BATCHES}an_epoch_ends_and_masks_are_new_in_the_next"], ""),
    "4": ("loader workers across a resume", [
        f"{BATCHES}loader_workers_change_nothing_and_resume_in_the_middle", f"{LOOP}workers_change_nothing"], ""),
    "5": ("ranks 2, 1, 2", ["tests/pretrain/test_parallel.py::test_a_run_goes_from_two_ranks_to_one_to_two"], ""),
    "6": ("a state file missing", [
        f"{SAVED}damaged_file_is_named_and_the_one_before_is_used",
        f"{RESUME}resume_refuses_to_start_over_when_every_checkpoint_is_damaged"], ""),
    "8": ("each file missing, cut, empty, zeroed", [f"{SAVED}damaged_file_is_named_and_the_one_before_is_used"],
          "without checksums a flipped bit passes"),
    "9": ("200 of 200 bit flips", [
        f"{SAVED}200_bit_flips_are_found", f"{SAVED}bit_flips_pass_unseen_without_checksums"],
        "without checksums a flipped bit passes"),
    "10": ("the two newest damaged", [f"{SAVED}two_newest_damaged_and_the_third_loads"],
           "without checksums a flipped bit passes"),
    "11": ("retention", [
        f"{SAVED}retention_counts_whole_ones_only", f"{HERE}saving.py::test_the_best_stays_beside_the_newest",
        f"{HERE}saving.py::test_a_run_keeps_the_checkpoint_with_the_lowest_held_out_loss"], ""),
    "12": ("full disk during a save", [
        f"{SAVED}full_disk_is_a_clear_error_and_the_old_one_stays",
        f"{HERE}saving.py::test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room"], "as in row 7"),
    "13 c": ("asynchronous: order, errors, slow disk", [
        f"{HERE}saving.py"], "without the copy, later steps are in the checkpoint"),
    "14 c": ("signals, one process", [f"{HERE}stopping.py"], "the steps since the last checkpoint are lost"),
    "16 c": ("not finite: nothing applied, rows told", [
        f"{LOOP}not_finite_gradient_stops_before_any_update",
        f"{LOOP}a_device_that_is_not_waited_for_skips_a_bad_step_and_tells_it_at_the_next_line"], "as in row 16"),
    "17 c": ("a loss a hundred times as large", [f"{HERE}spikes.py"], "the spike moves the weights"),
    "18": ("loader worker killed, hung", [
        f"{BATCHES}a_killed_worker_is_an_error_within_seconds",
        f"{BATCHES}a_hanging_worker_is_an_error_after_the_timeout"], "not run: torch's own timeout is endless"),
    "21": ("out of memory names the settings", [
        f"{HERE}saving.py::test_out_of_memory_names_the_settings_to_change_and_they_keep_the_batch"], ""),
    "22": ("settings changed on resume", [f"{HERE}drift.py"], "a changed seed gives other weights silently"),
    "23": ("corpus changed by a byte", [
        f"{HERE}drift.py::test_a_corpus_changed_by_a_byte_is_refused_and_without_checksums_it_is_not",
        f"{RESUME}resume_refuses_another_corpus_at_the_same_place"], "without checksums it is trained on"),
    "35": ("fp32 weights under bf16", [
        f"{HERE}saving.py::test_weights_are_fp32_under_bf16_and_bf16_weights_would_freeze"], "bf16 weights freeze"),
    "36": ("strangers' files; 37: archives and bombs", [f"{HERE}hostile_files.py"],
        "pickles, code and other folders' files are taken"),
    "38": ("planted secrets", [f"{HERE}secrets.py"], "a traceback tells them"),
    "39": ("bad inputs", [f"{HERE}bad_inputs.py"], ""),
    "40": ("properties of order, packing, masking, settings", [
        "tests/pretrain/test_order.py", "tests/pretrain/test_masking.py",
        "tests/pretrain/test_command_line.py::test_written_settings_read_back_equal"], ""),
}  # fmt: skip


def run_tests(rows: list[str], folder: Path, seconds: float) -> dict[str, Outcome]:
    """The rows that are tests, in one go."""
    nodes = list(dict.fromkeys(node for row in rows for node in TESTS[row][1]))
    command = [sys.executable, "-m", "pytest", f"--junitxml={folder / 'tests.xml'}", *nodes]
    with open(folder / "tests.log", "w") as log:
        try:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return {row: Outcome(False, "not reached in time") for row in rows}
    cases = [
        (f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}", len(case) == 0)
        for case in ElementTree.parse(folder / "tests.xml").iter("testcase")
        if case.find("skipped") is None
    ]
    outcomes = {}
    for row in rows:
        mine = [passed for name, passed in cases for node in TESTS[row][1] if _is_of(name, node)]
        figure = f"{sum(mine)} of {len(mine)} tests"
        outcomes[row] = Outcome(bool(mine) and all(mine), figure, TESTS[row][2])
    return outcomes


def _is_of(name: str, node: str) -> bool:
    return name == node or name.startswith((f"{node}[", f"{node}::"))


def show(row: str, what: str, outcome: Outcome, seconds: float) -> None:
    off = f" | guard off: {outcome.guard_off}" if outcome.guard_off else ""
    verdict = "pass" if outcome.passed else "FAIL"
    print(f"{verdict}  {row:<5} {what}: {outcome.figure}{off}  ({seconds:.0f} s)", flush=True)


def torture(arguments: argparse.Namespace) -> int:
    began, failed = time.monotonic(), 0
    folder = Path(arguments.out or tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = arguments.rows or [*KILLING, *TESTS]
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
        if at - began > 60 * arguments.minutes:
            outcome = Outcome(False, "not reached in time")
        else:
            try:
                outcome = check(bench)
            except Exception as error:
                outcome = Outcome(False, f"{type(error).__name__}: {str(error)[-500:]}")
        failed += not outcome.passed
        show(row, what, outcome, time.monotonic() - at)
    tested = [row for row in rows if row in TESTS]
    if tested:
        at = time.monotonic()
        outcomes = run_tests(tested, folder, max(60 * arguments.minutes - (at - began), 1))
        for row, outcome in outcomes.items():
            failed += not outcome.passed
            show(row, TESTS[row][0], outcome, (time.monotonic() - at) / len(tested))
    print(f"{failed} rows failed; {(time.monotonic() - began) / 60:.1f} minutes; {folder}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=[*KILLING, *TESTS], help="these rows only")
    parser.add_argument("--minutes", type=float, default=30, help="no row begins after these")
    parser.add_argument("--seed", type=int, default=0, help="of where and when the rows strike")
    parser.add_argument("--out", help="folder to work in, kept; a new temporary one where it is not given")
    parser.add_argument("--config", help="a recipe for the rows 17 and ten")
    parser.add_argument("--store", help="the store of that recipe")
    parser.epilog = "other options are settings of that recipe, --budget.steps among them"
    options, settings = parser.parse_known_args()
    options.settings = settings
    sys.exit(torture(options))
