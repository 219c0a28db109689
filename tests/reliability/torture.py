"""Kills, corrupts and starves runs for real, and prints a line for each row of checks: make torture.

Beside a row that guards stands what happened with the guard off. Exit status 1 where a row failed or was not reached
within --minutes. --store and --config kill a run of that recipe in place of the tiny one (the row "ten").
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

from children import fork, run, run_ranks
from tiny_run import differences, make_settings, make_store, read_log, write_recipe

import encoderkit.pretrain.checkpoint as checkpoint
import encoderkit.pretrain.loop as loop
from encoderkit.pretrain.checkpoint import latest_checkpoint
from encoderkit.pretrain.command_line import parse_settings
from encoderkit.pretrain.settings import Budget, Checkpoints, Log, Model, Optimizer, PretrainSettings, Timeouts
from encoderkit.pretrain.stopping import stop_signals

ROOT = Path(__file__).resolve().parents[2]
EVERY = 4  # steps between checkpoints
WIDE = Model(preset="modern", hidden_size=256, num_layers=2, num_heads=8, intermediate_size=256, max_positions=128)


@dataclass(frozen=True)
class Outcome:
    """What a row found. guard_off: what happened without its guard, where it has one."""

    passed: bool
    figure: str
    guard_off: str = ""


@dataclass
class Bench:
    """Where the rows work. draw: where and when they strike."""

    folder: Path
    store: Path
    draw: random.Random
    recipe: PretrainSettings | None

    def new(self, name: str) -> Path:
        """A fresh folder."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def settings(self, out: Path, **changes) -> PretrainSettings:
        defaults = {
            "checkpoints": Checkpoints(every_steps=EVERY, every_minutes=None),
            "model": WIDE,
            "log": Log(every_steps=4, validate_every_steps=1000),
        }
        return make_settings(self.store, out, **{**defaults, **changes})

    def finished(self, settings: PretrainSettings, ranks: int = 1) -> Path:
        """An uninterrupted run of these settings."""
        folder = self.new("whole")
        recipe = write_recipe(replace(settings, out=str(folder / "run")), folder / "recipe.yaml")
        for child in run_ranks(ranks, "run", "--config", recipe, log=folder / "log"):
            assert child.wait(3600) == 0, (folder / "log").read_text()[-2000:]
        return folder / "run"


def start(folder: Path, settings: PretrainSettings, ranks: int = 1, before: Callable[[], None] = lambda: None):
    """Begin the run in folder/run, or go on with it."""
    out = folder / "run"
    arguments = ("run", "--resume", out)
    if not (out / "config.yaml").is_file():
        arguments = ("run", "--config", write_recipe(replace(settings, out=str(out)), folder / "recipe.yaml"))
    return run_ranks(ranks, *arguments, log=folder / "log", before=before)


def newest(folder: Path) -> int:
    """The step that a run would go on from."""
    found = latest_checkpoint(folder / "run" / "checkpoints")
    return found.step if found else 0


def told(folder: Path) -> str:
    """What its processes printed."""
    log = folder / "log"
    return log.read_text(errors="replace") if log.exists() else ""


def compared(whole: Path, folder: Path) -> str:
    """Empty where the run in folder ended as the whole one."""
    return ", ".join(differences(whole, folder / "run"))


# Rows that kill


def two_ranks_resume(bench: Bench) -> Outcome:
    settings = bench.settings(bench.folder, budget=Budget(steps=12))
    whole, folder, lost = bench.finished(settings, 2), bench.new("two"), 0
    for _ in range(2):
        ranks = start(folder, settings, 2)
        ranks[0].reaches("step", 4)
        for child in ranks:
            child.signal(signal.SIGKILL)
        lost += sum(child.wait() != -signal.SIGKILL for child in ranks)
    ends = [child.wait() for child in start(folder, settings, 2)]
    found = compared(whole, folder)
    return Outcome(ends == [0, 0] and not lost and not found, found or "0 bits differ after two kills of both ranks")


def kills_in_saves(bench: Bench, kills: int = 50, asynchronous: bool = False) -> Outcome:
    saving = Checkpoints(every_steps=EVERY, every_minutes=None, asynchronous=asynchronous)
    settings = bench.settings(bench.folder, budget=Budget(steps=EVERY * (kills + 2)), checkpoints=saving)
    whole, folder = bench.finished(settings), bench.new("kills")
    resumed = worst = inside = 0
    span = SAVE_SECONDS
    for _ in range(kills):
        before = newest(folder)
        (child,) = start(folder, settings)
        if not child.reaches("save"):
            break
        resumed += 1
        time.sleep(bench.draw.uniform(0, span))
        child.signal(signal.SIGKILL)
        child.wait()
        span *= 0.9 if newest(folder) > before else 1.1  # towards half of the kills before the save has ended
        inside += bool(list((folder / "run" / "checkpoints").glob(".partial-*")))
        worst = max(worst, before + EVERY - newest(folder))
    end = start(folder, settings)[0].wait()
    found = compared(whole, folder)
    figure = f"{resumed} of {kills} resumed, {inside} killed inside, {worst // EVERY} intervals lost at most; "
    passed = resumed == kills and end == 0 and not found and worst <= EVERY and inside > kills // 5
    return Outcome(passed, figure + (found or "0 bits differ at the end"))


SAVE_SECONDS = 0.15  # about what a save of WIDE takes


def save_in_place(folder: Path, step: int, tensors, state) -> Path:
    """What libraries do: no other name, no checksums, the files one after the other."""
    import json

    final = folder / f"step-{step}"
    final.mkdir(parents=True, exist_ok=True)
    manifest = {"files": {}, "names": {}, "tied": {}}
    groups = {stem: checkpoint.Group.of(group) for stem, group in tensors.items()}
    for stem, group in groups.items():
        manifest["names"][stem], manifest["tied"][stem] = group.names, group.tied
        manifest["files"][f"{stem}.safetensors"] = {}
    (final / "manifest.json").write_text(json.dumps(manifest))
    for stem, group in groups.items():
        checkpoint.save_file(group.tensors, final / f"{stem}.safetensors")
        checkpoint._flush(final / f"{stem}.safetensors")
    (final / "state.json").write_text(json.dumps(dict(state)))
    return final


def unguarded() -> None:
    checkpoint.save_checkpoint = save_in_place
    checkpoint.damage = lambda path: None


def kills_in_saves_and_unguarded(bench: Bench) -> Outcome:
    outcome, kills, resumed = kills_in_saves(bench), 10, 0
    settings, folder = bench.settings(bench.folder, budget=Budget(steps=1000)), bench.new("unguarded")
    for _ in range(kills):
        (child,) = start(folder, settings, before=unguarded)
        child.reaches("save")
        time.sleep(bench.draw.uniform(0, SAVE_SECONDS))
        child.signal(signal.SIGKILL)
        child.wait()
        (child,) = start(folder, settings, before=unguarded)
        resumed += child.reaches("step")
        child.signal(signal.SIGKILL)
        child.wait()
        steps = sorted((folder / "run" / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
        if steps and not (steps[-1] / "state.json").is_file():
            shutil.rmtree(steps[-1])
    return replace(outcome, guard_off=f"written in place, {resumed} of {kills} resumed")


def kills_in_asynchronous_saves(bench: Bench) -> Outcome:
    outcome = kills_in_saves(bench, kills=10, asynchronous=True)
    seconds = {}
    for asynchronous in (False, True):
        saving = Checkpoints(every_steps=6, every_minutes=None, asynchronous=asynchronous)
        big = replace(WIDE, hidden_size=512, intermediate_size=1024, num_layers=4)
        settings = bench.settings(bench.folder, budget=Budget(steps=24), model=big, checkpoints=saving)
        folder = bench.new("stall")

        def timed(folder=folder) -> None:
            real = checkpoint.CheckpointWriter.save

            def save(*arguments) -> None:
                began = time.perf_counter()
                real(*arguments)
                with open(folder / "seconds", "a") as file:
                    print(time.perf_counter() - began, file=file)

            checkpoint.CheckpointWriter.save = save

        assert start(folder, settings, before=timed)[0].wait() == 0, told(folder)[-2000:]
        found = sorted(map(float, (folder / "seconds").read_text().split()))
        seconds[asynchronous] = found[len(found) // 2]
    share = seconds[True] / seconds[False]
    figure = f"{outcome.figure}; a step waits {1000 * seconds[True]:.0f} ms, {share:.0%} of a synchronous save"
    return Outcome(outcome.passed and share <= 0.1, figure, f"synchronous: {1000 * seconds[False]:.0f} ms")


def signals_in_a_run(bench: Bench, count: int = 20) -> Outcome:
    settings = bench.settings(
        bench.folder, budget=Budget(steps=4 * count), log=Log(every_steps=4, validate_every_steps=3)
    )
    whole, folder, good, wrong = bench.finished(settings, 2), bench.new("signals"), 0, ""
    for i in range(count):
        before, ranks = newest(folder), start(folder, settings, 2)
        number = (signal.SIGTERM, signal.SIGUSR1)[i % 2]
        place = ("step", "validation", "save")[i % 3]
        if not ranks[0].reaches(place):
            break
        time.sleep(bench.draw.uniform(0, 0.05))
        for child in ranks if i % 4 < 2 else [ranks[bench.draw.randrange(2)]]:
            child.signal(number)
        ends, after = [child.wait() for child in ranks], newest(folder)
        if ends == [143, 143] and f"after step {after};" in told(folder) and after > before:
            good += 1
        else:
            wrong = wrong or f"{number.name} in a {place}: exit {ends}, step {before} to {after}; "
    ends = [child.wait() for child in start(folder, settings, 2)]
    found = compared(whole, folder)
    figure = f"{good} of {count} saved and left with 143 on both ranks; {wrong}"
    off = signals_without_handlers(bench, settings)
    return Outcome(good == count and ends == [0, 0] and not found, figure + (found or "0 bits differ at the end"), off)


def without_handlers() -> None:
    import contextlib

    type(stop_signals).handled = lambda self: contextlib.nullcontext()


def signals_without_handlers(bench: Bench, settings: PretrainSettings) -> str:
    lost = 0
    for _ in range(3):
        folder = bench.new("unhandled")
        (child,) = start(folder, settings, before=without_handlers)
        child.reaches("step", 7)
        child.signal(signal.SIGTERM)
        child.wait()
        lost += newest(folder) == EVERY
    return f"{lost} of 3 lost the steps since the last checkpoint"


def signals_at_the_edges(bench: Bench, count: int = 20) -> Outcome:
    settings = bench.settings(bench.folder, budget=Budget(steps=6))
    whole, good, kept, wrong = bench.finished(settings), 0, 0, ""
    for _ in range(count // 2):  # whole processes: imports count in
        folder = bench.new("edge")
        recipe = write_recipe(replace(settings, out=str(folder / "run")), folder / "recipe.yaml")
        command = [sys.executable, "-m", "encoderkit.pretrain", "run", "--config", str(recipe)]
        with open(folder / "log", "a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        time.sleep(bench.draw.uniform(0.05, START_SECONDS))
        process.terminate()
        status = process.wait(60)
        end = start(folder, settings)[0].wait() if status else 0  # 0: it had finished
        is_good = status in (143, -signal.SIGTERM, 0) and end == 0 and newest(folder) == 6
        good += is_good
        wrong += "" if is_good else f"start-up: exit {status}, then {end}: {told(folder)[-300:]!r}; "
    seconds = min(export_seconds(bench, whole) for _ in range(3))
    for _ in range(count - count // 2):
        folder = bench.new("edge")
        arguments = ("export", whole, "--checkpoint", "last", "--out", folder / "models" / "one")
        child = run(*arguments, log=folder / "log")
        time.sleep(bench.draw.uniform(0.0, 0.8 * seconds))
        child.signal(signal.SIGTERM)
        status = child.wait()
        left = [path.name for path in (folder / "models").glob("*")] if (folder / "models").exists() else []
        is_good = (status in (143, -signal.SIGTERM) and not left) or (status == 0 and left == ["one"])
        good += is_good
        wrong += "" if is_good else f"export: exit {status}, left {left}: {told(folder)[-300:]!r}; "
        kept += status == 0
    figure = f"{wrong}{good} of {count} left clean, and the run after them was whole ({kept} exports had ended)"
    return Outcome(good == count and kept <= count // 3, figure, exports_without_handlers(bench, whole))


def export_seconds(bench: Bench, whole: Path) -> float:
    began = time.monotonic()
    assert run("export", whole, "--out", bench.new("edge") / "one", log=bench.folder / "log").wait() == 0
    return time.monotonic() - began


START_SECONDS = 5.0  # about what a start takes here


def exports_without_handlers(bench: Bench, whole: Path) -> str:
    left = 0
    for _ in range(5):
        folder = bench.new("unhandled")
        child = run("export", whole, "--checkpoint", "last", "--out", folder / "one", log=folder / "log",
                    before=without_handlers)  # fmt: skip
        deadline = time.monotonic() + 30
        while not list(folder.glob(".one.partial-*")) and time.monotonic() < deadline:
            time.sleep(0.001)
        child.signal(signal.SIGTERM)
        child.wait()
        left += bool(list(folder.glob(".one.partial-*")))
    return f"{left} of 5 exports left a part behind"


def poisoned(rank: str, guarded: bool = True) -> Callable[[], None]:
    """At step 9, the gradient of one rank is not a number."""

    def plant() -> None:
        train_step = loop.train_step

        def faulty(job, batches):
            hook = None
            if job.state.step == 9 and os.environ["RANK"] == rank:
                weight = next(job.wrapped.parameters())
                hook = weight.register_hook(lambda gradient: gradient * float("nan"))
            train_step(job, batches)
            if hook is not None:
                hook.remove()

        loop.train_step = faulty
        if not guarded:
            loop.check_finite = lambda job: 0.0

    return plant


def not_finite_on_one_rank(bench: Bench) -> Outcome:
    import torch

    def is_finite(folder: Path) -> bool:
        found = latest_checkpoint(folder / "run" / "checkpoints")
        return all(bool(tensor.isfinite().all()) for tensor in found.tensors("model").values())

    settings, verdict = bench.settings(bench.folder, budget=Budget(steps=12)), {}
    for guarded in (True, False):
        folder = bench.new("poisoned")
        ranks = start(folder, settings, 2, before=poisoned("1", guarded))
        verdict[guarded] = ([child.wait() for child in ranks], newest(folder), is_finite(folder), told(folder))
    assert torch.get_num_threads() == 1
    ends, step, finite, text = verdict[True]
    passed = ends == [1, 1] and step == 8 and finite and "step 9, rows 72 to 79: loss or gradient is not finite" in text
    off = "the run went on with weights that are not finite" if not verdict[False][2] else "no difference seen"
    return Outcome(passed, f"both ranks left with {ends}, rows told, newest checkpoint {step} is finite", off)


def launched(fault: str, folder: Path, settings: PretrainSettings, restarts: int) -> tuple[int, float]:
    """A run of two ranks with a fault under torchrun: exit status and seconds."""
    recipe = write_recipe(replace(settings, out=str(folder / "run")), folder / "recipe.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max_restarts", str(restarts), str(ROOT / "tests" / "reliability" / "victim.py"), fault]
    began = time.monotonic()
    with open(folder / "log", "a") as log:
        process = subprocess.Popen([*command, "run", "--config", str(recipe)], stdout=log, stderr=log)
        try:
            return process.wait(PATIENCE_LAUNCHED), time.monotonic() - began
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return -1, time.monotonic() - began


PATIENCE_LAUNCHED = 120.0


def hanging_collective(bench: Bench) -> Outcome:
    settings = bench.settings(bench.folder, budget=Budget(steps=12), timeouts=Timeouts(collective=5))
    folder = bench.new("hanging")
    recipe = write_recipe(replace(settings, out=str(folder / "run")), folder / "recipe.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "reliability" / "victim.py"), "hangs", "run", "--config", str(recipe)]
    with open(folder / "log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    while not (folder / "run" / "checkpoints" / f"step-{EVERY}").exists() and process.poll() is None:
        time.sleep(0.05)
    began = time.monotonic()  # the hang begins one step after this checkpoint
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    while any(Path(f"/proc/{pid}/exe").exists() for pid in ranks) and time.monotonic() - began < PATIENCE_LAUNCHED:
        time.sleep(0.05)
    seconds, status, text = time.monotonic() - began, process.wait(PATIENCE_LAUNCHED), told(folder)
    named = "step 5: rank 1 did not take part in a collective within timeouts.collective = 5 s" in text
    passed = status != 0 and len(ranks) == 2 and seconds <= 5 + 5 and named
    figure = f"all left {seconds:.1f} s after the hang began (timeout 5 s), {'rank 1 named' if named else 'not named'}"
    return Outcome(passed, figure, "not run: gloo's own timeout is 30 minutes")


def rank_killed_under_torchrun(bench: Bench) -> Outcome:
    settings = bench.settings(bench.folder, budget=Budget(steps=16))
    whole, folder = bench.finished(settings, 2), bench.new("restarted")
    status, seconds = launched("killed", folder, settings, restarts=2)
    found = compared(whole, folder) if status == 0 else f"exit {status}"
    off = bench.new("unaware")
    status_off, _ = launched("unaware", off, settings, restarts=2)
    what_off = "the restarted ranks found the folder in use" if "is not empty" in told(off) else "?"
    figure = f"{found or '0 bits differ'} after a restart ({seconds:.0f} s)"
    return Outcome(status == 0 and not found, figure, f"exit {status_off}, {what_off}")


def learning_rate_on_ranks(bench: Bench) -> Outcome:
    rates = {}
    for ranks in (1, 2, 4):
        settings = bench.settings(
            bench.folder, budget=Budget(steps=8), log=Log(every_steps=1, validate_every_steps=8), micro_batch_tokens=128
        )
        whole = bench.finished(settings, ranks)
        rates[ranks] = [(r["step"], r["lr"]) for r in read_log(whole) if r["kind"] == "train"]
    return Outcome(rates[1] == rates[2] == rates[4] and len(rates[1]) == 8, "equal in 8 steps on 1, 2 and 4 ranks")


def limited_files(limit: int) -> Callable[[], None]:
    """A disk that is full for files of more than limit bytes."""

    def plant() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return plant


def killed_ten_times(bench: Bench, kills: int = 12) -> Outcome:
    """SIGKILL anywhere, SIGTERM anywhere, and a disk that is full at a save, in turn."""
    settings = bench.recipe or bench.settings(bench.folder, budget=Budget(steps=15 * kills), model=WIDE)
    total = settings.budget.steps
    assert total is not None, "the recipe needs budget.steps"
    whole, folder, ends = bench.finished(settings), bench.new("ten"), []
    for i in range(kills):
        kind = ("SIGKILL", "SIGTERM", "full disk")[i % 3]
        (child,) = start(folder, settings, before=limited_files(300_000) if kind == "full disk" else lambda: None)
        if kind == "full disk":
            ends.append((kind, child.wait(3600)))
        else:
            left = total - newest(folder)
            child.reaches("step", bench.draw.randint(1, max(left // (kills - i + 1), 1)))
            time.sleep(bench.draw.uniform(0, 0.05))
            child.signal(getattr(signal, kind))
            ends.append((kind, child.wait()))
    expected = {"SIGKILL": -9, "SIGTERM": 143, "full disk": 2}
    wrong = [f"{kind}: exit {status}" for kind, status in ends if status != expected[kind]]
    status = start(folder, settings)[0].wait(3600)
    found = compared(whole, folder) if status == 0 else f"exit {status}"
    figure = f"{kills} kills ({len(ends[::3])} SIGKILL, {len(ends[1::3])} SIGTERM, {len(ends[2::3])} full disks); "
    figure += f"{', '.join(wrong)}; " if wrong else ""
    return Outcome(not wrong and not found, figure + (found or f"0 bits differ after {total} steps"))


def no_false_alarms(bench: Bench) -> Outcome:
    """1,000 steps of the recipe that --config names, or of the tiny one at ten times the rate."""
    noisy = bench.settings(bench.folder, batch_tokens=128, optimizer=Optimizer(lr=2e-2, muon_lr=4e-2))
    settings = replace(
        bench.recipe or noisy,
        budget=Budget(steps=1000),
        log=Log(every_steps=100, validate_every_steps=1000),
        checkpoints=Checkpoints(every_steps=1000, every_minutes=None),
    )
    spikes = [record for record in read_log(bench.finished(settings)) if record["kind"] == "spike"]
    return Outcome(not spikes, f"{len(spikes)} of 1,000 steps skipped")


KILLING: dict[str, tuple[str, Callable[[Bench], Outcome]]] = {
    "2": ("stop and resume, two ranks", two_ranks_resume),
    "7": ("SIGKILL in saves", kills_in_saves_and_unguarded),
    "13": ("asynchronous saves and SIGKILL", kills_in_asynchronous_saves),
    "14": ("SIGTERM, SIGUSR1 in step, validation, save", signals_in_a_run),
    "15": ("SIGTERM at start-up and in export", signals_at_the_edges),
    "16": ("NaN on one of two ranks", not_finite_on_one_rank),
    "17": ("false alarms of the spike guard", no_false_alarms),
    "19": ("a collective hangs", hanging_collective),
    "20": ("a rank killed under torchrun", rank_killed_under_torchrun),
    "24": ("learning rate on 1, 2, 4 ranks", learning_rate_on_ranks),
    "ten": ("killed again and again", killed_ten_times),
}

# Rows that are tests. Of each: what, its tests, and what those show that take the guard off.
LOOP, SAVED = "tests/pretrain/test_loop.py::test_", "tests/pretrain/test_checkpoint.py::test_"
BATCHES, HERE = "tests/pretrain/test_batches.py::test_", "tests/reliability/test_"
TESTS: dict[str, tuple[str, list[str], str]] = {
    "1": ("stop and resume at five points", [f"{LOOP}resumed_run_equals_uninterrupted_run"], ""),
    "3": ("two resumes; an epoch's edge", [
        f"{LOOP}dropout_and_two_resumes_change_nothing", f"{BATCHES}an_epoch_ends_and_masks_are_new_in_the_next"], ""),
    "4": ("loader workers across a resume", [
        f"{BATCHES}loader_workers_change_nothing_and_resume_in_the_middle", f"{LOOP}workers_change_nothing"], ""),
    "5": ("ranks 2, 1, 2", ["tests/pretrain/test_parallel.py::test_a_run_goes_from_two_ranks_to_one_to_two"], ""),
    "6": ("a state file missing", [
        f"{SAVED}damaged_file_is_named_and_the_one_before_is_used",
        f"{LOOP}resume_refuses_to_start_over_when_every_checkpoint_is_damaged"], ""),
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
        f"{HERE}saving.py::test_a_full_disk_is_one_line_and_the_run_goes_on_with_room"], "as in row 7"),
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
        f"{LOOP}resume_refuses_another_corpus_at_the_same_place"], "without checksums it is trained on"),
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
