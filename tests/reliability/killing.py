"""The rows of torture that kill, stop, starve or poison runs for real. KILLING names them."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from reliability.bench import EVERY, WIDE, Bench, Outcome, compared, newest, start, told
from reliability.children import run
from tiny_run import read_log, torchrun, write_recipe

import encoderkit.pretrain.checkpoint as checkpoint
import encoderkit.pretrain.loop as loop
from encoderkit.pretrain.checkpoint import latest_checkpoint
from encoderkit.pretrain.settings import Budget, Checkpoints, Log, Optimizer, PretrainSettings, Timeouts
from encoderkit.pretrain.stopping import stop_signals


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
        span *= 0.7 if newest(folder) > before else 1.2  # towards two of three kills before the save has ended
        inside += bool(list((folder / "run" / "checkpoints").glob(".partial-*")))
        worst = max(worst, before + EVERY - newest(folder))
    end = start(folder, settings)[0].wait()
    found = compared(whole, folder)
    figure = f"{resumed} of {kills} resumed, {inside} killed inside, {worst // EVERY} intervals lost at most; "
    passed = resumed == kills and end == 0 and not found and worst <= EVERY and inside >= kills // 5
    return Outcome(passed, figure + (found or "0 bits differ at the end"))


SAVE_SECONDS = 0.15  # about what a save of WIDE takes


def save_in_place(folder: Path, step: int, tensors, state, ranks=None) -> Path:
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
    off = f"written in place, {resumed} of {kills} resumed"
    return replace(outcome, passed=outcome.passed and resumed < kills, guard_off=off)


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

            def save(*arguments, **options) -> None:
                began = time.perf_counter()
                real(*arguments, **options)
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
    lost = runs_without_handlers(bench, settings)
    passed = good == count and ends == [0, 0] and not found and lost > 0
    off = f"{lost} of 3 lost the steps since the last checkpoint"
    return Outcome(passed, figure + (found or "0 bits differ at the end"), off)


def without_handlers() -> None:
    import contextlib

    type(stop_signals).handled = lambda self: contextlib.nullcontext()


def runs_without_handlers(bench: Bench, settings: PretrainSettings) -> int:
    """How many of three runs lost steps to a signal."""
    lost = 0
    for _ in range(3):
        folder = bench.new("unhandled")
        (child,) = start(folder, settings, before=without_handlers)
        child.reaches("step", 7)
        child.signal(signal.SIGTERM)
        child.wait()
        lost += newest(folder) == EVERY
    return lost


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
    left = exports_without_handlers(bench, whole)
    passed = good == count and kept <= count // 3 and left > 0
    return Outcome(passed, figure, f"{left} of 5 exports left a part behind")


def export_seconds(bench: Bench, whole: Path) -> float:
    began = time.monotonic()
    assert run("export", whole, "--out", bench.new("edge") / "one", log=bench.folder / "log").wait() == 0
    return time.monotonic() - began


START_SECONDS = 5.0  # about what a start takes here


def exports_without_handlers(bench: Bench, whole: Path) -> int:
    """How many of five left a part behind."""
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
    return left


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
    is_told = "step 10, rows 72 to 79: loss or gradient is not finite" in text
    passed = ends == [1, 1] and step == 8 and finite and is_told
    went_on = not verdict[False][2]
    off = "the run went on with weights that are not finite" if went_on else "no difference seen"
    return Outcome(
        passed and went_on, f"both ranks left with {ends}, rows told, newest checkpoint {step} is finite", off
    )


def launched(fault: str, folder: Path, settings: PretrainSettings, restarts: int) -> tuple[int, float]:
    """A run of two ranks with a fault under torchrun: exit status and seconds."""
    recipe = write_recipe(replace(settings, out=str(folder / "run")), folder / "recipe.yaml")
    command = torchrun(VICTIM, fault, "run", "--config", recipe, restarts=restarts)
    began = time.monotonic()
    with open(folder / "log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            return process.wait(PATIENCE_LAUNCHED), time.monotonic() - began
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return -1, time.monotonic() - began


PATIENCE_LAUNCHED = 120.0
VICTIM = Path(__file__).with_name("victim.py")


def hang(bench: Bench, timeout: float, patience: float) -> tuple[float, bool, str]:
    """Seconds from the hang of a rank to the end of all, or patience; whether all had left; what was told."""
    settings = bench.settings(bench.folder, budget=Budget(steps=12), timeouts=Timeouts(collective=timeout))
    folder = bench.new("hanging")
    recipe = write_recipe(replace(settings, out=str(folder / "run")), folder / "recipe.yaml")
    with open(folder / "log", "a") as log:
        process = subprocess.Popen(torchrun(VICTIM, "hangs", "run", "--config", recipe), stdout=log, stderr=log)
    while not (folder / "run" / "checkpoints" / f"step-{EVERY}").exists() and process.poll() is None:
        time.sleep(0.05)
    began = time.monotonic()  # the hang begins one step after this checkpoint
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(ranks) == 2, told(folder)[-2000:]
    while any(Path(f"/proc/{pid}/exe").exists() for pid in ranks) and time.monotonic() - began < patience:
        time.sleep(0.05)
    seconds = time.monotonic() - began
    left = seconds < patience
    for pid in () if left else (*ranks, process.pid):
        os.kill(pid, signal.SIGKILL)
    return seconds, left and process.wait(PATIENCE_LAUNCHED) != 0, told(folder)


def hanging_collective(bench: Bench) -> Outcome:
    seconds, left, text = hang(bench, 5, PATIENCE_LAUNCHED)
    named = "step 6: rank 1 did not take part in a collective within timeouts.collective = 5 s" in text
    figure = f"all left {seconds:.1f} s after the hang began (timeout 5 s), {'rank 1 named' if named else 'not named'}"
    waited, left_off, _ = hang(bench, 3600, 15)
    off = (
        "all left all the same" if left_off else f"with a timeout of an hour both ranks still hung after {waited:.0f} s"
    )
    return Outcome(left and seconds <= 5 + 5 and named and not left_off, figure, off)


def rank_killed_under_torchrun(bench: Bench) -> Outcome:
    settings = bench.settings(bench.folder, budget=Budget(steps=16))
    whole, folder = bench.finished(settings, 2), bench.new("restarted")
    status, seconds = launched("killed", folder, settings, restarts=2)
    found = compared(whole, folder) if status == 0 else f"exit {status}"
    off = bench.new("unaware")
    status_off, _ = launched("unaware", off, settings, restarts=2)
    what_off = "the restarted ranks found the folder in use" if "is not empty" in told(off) else "?"
    figure = f"{found or '0 bits differ'} after a restart ({seconds:.0f} s)"
    return Outcome(status == 0 and not found and status_off != 0, figure, f"exit {status_off}, {what_off}")


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
