"""A signal ends the step, saves and leaves; what resumes is the uninterrupted run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from reliability.children import run
from tiny_run import differences, make_settings, write_recipe

import encoderkit.pretrain.loop as loop
from encoderkit.pretrain.__main__ import main
from encoderkit.pretrain.checkpoint import latest_checkpoint
from encoderkit.pretrain.job import Job
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.run_folder import RunFolder
from encoderkit.pretrain.settings import Budget, Data
from encoderkit.pretrain.stopping import Stopped, StopSignals, stop_signals


def signalled(monkeypatch, where: str, number: signal.Signals, at_step: int = 9) -> None:
    """Send this process a signal when it gets to where at this step."""
    owner, name = {"step": (loop, "train_step"), "validation": (loop, "validate"), "save": (Job, "save")}[where]
    real = getattr(owner, name)

    def told(job, *arguments, **options):
        if job.state.step >= at_step and not stop_signals.asked:
            os.kill(os.getpid(), number)
        return real(job, *arguments, **options)

    monkeypatch.setattr(owner, name, told)


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("step", signal.SIGTERM),
        ("step", signal.SIGINT),
        ("validation", signal.SIGUSR1),
        ("save", signal.SIGTERM),
    ],
)
def test_a_signal_saves_and_the_resumed_run_is_the_uninterrupted_one(
    where, number, whole_run, store, tmp_path, monkeypatch, capsys
):
    settings = make_settings(store, tmp_path / "run")
    recipe = write_recipe(settings, tmp_path / "recipe.yaml")
    with monkeypatch.context() as patch:
        signalled(patch, where, number)
        assert main(["run", "--config", str(recipe)]) == (130 if number is signal.SIGINT else 143)
    saved = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved.step == {"step": 10, "validation": 11, "save": 13}[where]
    assert f"stopped by {number.name} after step {saved.step}; go on with run --resume" in capsys.readouterr().err
    assert main(["run", "--resume", str(tmp_path / "run")]) == 0
    assert differences(whole_run, tmp_path / "run") == []


def test_without_the_handler_a_signal_loses_the_steps_since_the_last_checkpoint(store, tmp_path):
    """Proof that it is the handler that saves."""
    recipe = write_recipe(make_settings(store, tmp_path / "run"), tmp_path / "recipe.yaml")

    def unhandled():
        StopSignals.handled = lambda self: contextlib.nullcontext()
        real = loop.train_step

        def told(job, batches):
            if job.state.step == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(job, batches)

        loop.train_step = told

    child = run("run", "--config", recipe, log=tmp_path / "log", before=unhandled)
    assert child.wait() == -signal.SIGTERM, (tmp_path / "log").read_text()[-2000:]
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").step == 6


def test_on_several_gpus_the_wish_is_read_only_where_the_host_waits_for_them_anyway():
    job = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2), async_device=True, ranks_asked=torch.ones(()))
    assert not loop._stops(job, is_waited_for=False)
    assert loop._stops(job, is_waited_for=True)
    job.async_device = False
    assert loop._stops(job, is_waited_for=False)


def test_a_second_signal_leaves_at_once_and_repeats_of_the_first_do_not():
    script = """
import os, signal, sys, time
import encoderkit.pretrain.stopping as stopping
stopping.REPEAT_SECONDS = 0.2
with stopping.stop_signals.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    print("still here", flush=True)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not here", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, "still here\n")
    assert done.stderr == "left at once: SIGTERM came again\n"


def test_outside_training_a_signal_clears_away_and_leaves(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    cleared = []
    with pytest.raises(Stopped) as caught, stop_signals.handled():  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            cleared.append(True)
    assert (caught.value.code, str(caught.value), cleared) == (143, "stopped by SIGTERM", [True])
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_other_code_turns_into_another_exception_still_stops():
    """As while pandas is imported."""
    with pytest.raises(Stopped), stop_signals.handled():  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Stopped as error:
            raise SystemError("returned a result with an exception set") from error


def test_a_signal_to_every_process_spares_the_loader_workers_until_the_step_is_saved(store, tmp_path):
    """As Slurm sends it: to the whole group."""
    recipe = write_recipe(endless(store, tmp_path / "run", workers=2), tmp_path / "recipe.yaml")
    child = run("run", "--config", recipe, log=tmp_path / "log", before=os.setsid)
    assert child.reaches("save", 2)
    os.killpg(child.pid, signal.SIGTERM)
    status, told = child.wait(60), (tmp_path / "log").read_text()
    assert status == 143, told
    saved = latest_checkpoint(tmp_path / "run" / "checkpoints").step
    assert f"stopped by SIGTERM after step {saved};" in told


def test_a_killed_run_lets_go_of_its_folder_though_its_workers_live_on(store, tmp_path):
    settings = endless(store, tmp_path / "run", workers=1)
    recipe = write_recipe(settings, tmp_path / "recipe.yaml")
    child = run("run", "--config", recipe, log=tmp_path / "log")
    assert child.reaches("save", 2)
    child.signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    RunFolder.resume(settings).close()  # raises where the folder is in use


def test_a_run_that_was_killed_before_its_settings_were_written_can_begin_again(store, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("lock", ".config.yaml.partial"):
        (tmp_path / "run" / name).write_text("half")
    pretrain(make_settings(store, tmp_path / "run", budget=Budget(steps=2)))
    assert (tmp_path / "run" / "final").is_dir()


def test_a_run_that_was_killed_before_its_first_line_of_log_can_be_resumed(store, tmp_path, monkeypatch):
    import encoderkit.pretrain.run_folder as run_folder

    settings = make_settings(store, tmp_path / "run", budget=Budget(steps=2))
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.LogWriter, "cut_back", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings)
    assert not (tmp_path / "run" / "log.jsonl").exists()
    pretrain(settings, resume=True)
    assert (tmp_path / "run" / "final").is_dir()


def test_what_was_measured_stays_though_the_run_stopped_before_its_first_checkpoint(store, tmp_path, monkeypatch):
    import encoderkit.encoder.precision as precision
    from encoderkit.kernels.matrix_route import Route

    settings = make_settings(store, tmp_path / "run", budget=Budget(steps=2))
    with monkeypatch.context() as patch:
        patch.setattr(precision, "fastest_route", lambda: Route("onednn", "measured"))
        patch.setattr(loop, "train_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings)
    monkeypatch.setattr(precision, "fastest_route", lambda: Route("mkl", "measured"))
    pretrain(settings, resume=True)
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").state["facts"]["matrix_route"] == "onednn"


def endless(store, out, workers: int):
    data = Data(store=str(store), max_tokens=32, row_tokens=64, workers=workers)
    return make_settings(store, out, data=data, budget=Budget(steps=100_000))
