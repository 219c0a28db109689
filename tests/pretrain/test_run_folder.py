"""The run folder: one holder at a time, settings that may not change, a log that can be cut back."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import run_folder
from encoderkit.pretrain.command_line import read_settings
from encoderkit.pretrain.run_folder import LogWriter, RunFolder, check_resumable, read_log
from encoderkit.pretrain.settings import Checkpoints, Data, Log, Optimizer, PretrainSettings

HOLDER = """
import sys, time
from encoderkit.pretrain.run_folder import RunFolder
from encoderkit.pretrain.settings import PretrainSettings
RunFolder.create(PretrainSettings(out=sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def made(out: Path, **changes) -> PretrainSettings:
    return dataclasses.replace(PretrainSettings(out=str(out)), **changes)


def test_new_folder_holds_its_settings(tmp_path):
    settings = made(tmp_path / "a" / "run", seed=3)
    with RunFolder.create(settings) as folder:
        assert read_settings(PretrainSettings, folder.path / "config.yaml") == settings
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "lock"]


def test_folder_with_content_is_refused_and_left_alone(tmp_path):
    RunFolder.create(made(tmp_path / "run")).close()
    with pytest.raises(InputError, match="exists and is not empty; continue it with --resume"):
        RunFolder.create(made(tmp_path / "run"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(InputError, match="exists and is not empty; choose another out"):
        RunFolder.create(made(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="is a file; expected a new folder"):
        RunFolder.create(made(tmp_path / "mine" / "thesis.txt"))


def test_lock_names_host_and_process_and_a_killed_process_lets_go(tmp_path):
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        expected = f"in use by process {holder.pid} on {socket.gethostname()}"
        for take in (RunFolder.create, RunFolder.resume):
            with pytest.raises(InputError, match=expected):
                take(made(run))
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    RunFolder.resume(made(run)).close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_without_locks_is_told_and_the_run_goes_on(number, tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    RunFolder.create(made(tmp_path / "run")).close()
    assert len(caplog.messages) == 1
    assert "no locks on this disk" in caplog.text
    RunFolder.resume(made(tmp_path / "run")).close()


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(InputError, match="lock cannot be locked: Input/output error"):
        RunFolder.create(made(tmp_path / "run"))


def test_operational_keys_may_change_on_resume(tmp_path):
    run = tmp_path / "run"
    RunFolder.create(made(run)).close()
    changed = made(
        run,
        data=Data(workers=3),
        micro_batch_tokens=4096,
        checkpoints=Checkpoints(every_steps=5),
        log=Log(every_steps=1, trackers=["tensorboard"]),
    )
    with RunFolder.resume(changed) as folder:
        assert read_settings(PretrainSettings, run / "config.yaml") != changed  # it may still be refused
        folder.describe()
    assert read_settings(PretrainSettings, run / "config.yaml") == changed


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"data": Data(max_tokens=64)}, "data.max_tokens: 128 -> 64"),
        ({"optimizer": Optimizer(lr=1.0)}, "optimizer.lr: 0.002 -> 1.0"),
        ({"precision": "bf16"}, 'precision: "auto" -> "bf16"'),
    ],
)
def test_other_keys_are_refused_with_a_diff(tmp_path, changes, shown):
    run = tmp_path / "run"
    RunFolder.create(made(run)).close()
    before = (run / "config.yaml").read_text()
    for _ in range(2):  # the refusal lets go of the folder
        with pytest.raises(InputError) as caught:
            RunFolder.resume(made(run, **changes))
        assert shown in str(caught.value)
    assert (run / "config.yaml").read_text() == before
    with pytest.raises(InputError, match="holds no config"):
        RunFolder.resume(made(tmp_path))
    assert check_resumable(made(run), made(run, **changes), ("seed", "data.*", "optimizer.lr", "precision")) == [shown]


def test_run_json_describes_each_start_without_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2-planted")
    run = tmp_path / "run"
    with RunFolder.create(made(run)) as folder:
        folder.describe(parameters=123, data={"hash": "abc"})
    with RunFolder.resume(made(run)) as folder:
        folder.describe(parameters=123, data={"hash": "abc"})
    text = (run / "run.json").read_text()
    found = json.loads(text)
    assert "hunter2" not in "".join(path.read_text() for path in run.iterdir())
    assert (found["parameters"], found["data"], len(found["starts"])) == (123, {"hash": "abc"}, 2)
    start = found["starts"][1]
    assert {"python", "torch", "encoderkit"} <= set(start["versions"])
    assert start["hardware"]["cores"] >= 1
    assert start["hardware"]["memory_bytes"] > 2**28
    assert start["command"]
    assert start["source"] == run_folder._source()


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_source_is_the_commit_and_whether_it_was_changed(tmp_path, monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    source, file = inspect.unwrap(run_folder._source), tmp_path / "code.py"  # conftest.py caches it
    monkeypatch.setattr(run_folder, "__file__", str(file))
    file.write_text("first")
    git("init")
    assert source() is None
    git("add", file)
    git("commit", "-m", "first")
    assert source() == {"commit": git("rev-parse", "HEAD"), "changed": False}
    file.write_text("second")
    assert source() == {"commit": git("rev-parse", "HEAD"), "changed": True}


def test_log_is_cut_back_to_a_step_and_a_torn_line_is_dropped(tmp_path):
    log = LogWriter(tmp_path / "log.jsonl")
    log.cut_back(0)
    records = [
        {"kind": "start", "step": 0, "vocab": 3},
        *({"kind": "train", "step": i, "loss": 0.1 * i} for i in (1, 2, 3)),
    ]
    for record in [*records, {"kind": "end", "step": 3}]:
        log.append(record)
    with log.path.open("a") as file:
        file.write('{"kind": "tra')
    assert len(read_log(log.path)) == 5
    log.cut_back(2)
    log.append({"kind": "train", "step": 3, "loss": float("nan"), "time": {"data": float("inf")}})
    assert read_log(log.path) == [*records[:3], {"kind": "train", "step": 3, "loss": None, "time": {"data": None}}]
    log.path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"log\.jsonl line 2 is not JSON"):
        read_log(log.path)
