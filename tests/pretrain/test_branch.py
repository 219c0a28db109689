"""A branch stands where its run stood, and goes on under another schedule."""

import dataclasses
from pathlib import Path

import pytest
from tiny_run import differences, make_settings, read_log

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.__main__ import main
from encoderkit.pretrain.branch import begin_branch, named_run
from encoderkit.pretrain.checkpoint import latest_checkpoint
from encoderkit.pretrain.command_line import read_settings
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.settings import Budget, Checkpoints, PretrainSettings, Schedule

STABLE = Schedule(name="wsd", warmup=0.1, decay=0.0)


@pytest.fixture(scope="module")
def stable(small_store, tmp_path_factory):
    """Twenty steps at one learning rate, checkpoints at 6, 12, 18 and 20."""
    out = tmp_path_factory.mktemp("stable") / "run"
    checkpoints = Checkpoints(every_steps=6, every_minutes=None, keep=9)
    pretrain(make_settings(small_store, out, schedule=STABLE, checkpoints=checkpoints))
    return out


def settings_of(stable: Path, out: Path, **changes):
    return dataclasses.replace(read_settings(PretrainSettings, stable / "config.yaml"), out=str(out), **changes)


def test_a_branch_that_changes_nothing_ends_with_the_bits_of_its_run(stable, tmp_path):
    assert main(["run", "--branch", f"{stable}:12", "--out", str(tmp_path / "same")]) == 0
    assert differences(stable, tmp_path / "same") == []


def test_a_branch_decays_where_its_run_was_stable(stable, tmp_path):
    out = tmp_path / "decayed"
    words = ["--budget.steps", "16", "--schedule.decay", "0.25", "--masking.final_rate", "0.3"]
    assert main(["run", "--branch", f"{stable}:12", "--out", str(out), *words]) == 0
    log = [record for record in read_log(out) if record["kind"] == "train"]
    assert [record["step"] for record in log] == [4, 8, 12, 16]
    assert log[2]["lr"] == log[1]["lr"] > 4 * log[3]["lr"]
    assert log[3]["mask_rate"] == pytest.approx(0.3)
    assert latest_checkpoint(out / "checkpoints").step == 16
    assert latest_checkpoint(stable / "checkpoints").step == 20  # the run is as it was


def test_without_a_step_the_newest_checkpoint_is_taken(stable, tmp_path):
    begin_branch(str(stable), settings_of(stable, tmp_path / "new", budget=Budget(steps=30)))
    assert latest_checkpoint(tmp_path / "new" / "checkpoints").step == 20
    assert not (tmp_path / "new" / "final").exists()
    assert read_settings(PretrainSettings, tmp_path / "new" / "config.yaml").budget.steps == 30  # what --resume takes


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (":13", {}, r"step-13 is not there; expected one of the steps 6, 12, 18, 20"),
        ("", {"seed": 3}, r"seed: 0 -> 3"),
        ("", {"batch_tokens": 1024}, r"batch_tokens: 512 -> 1024"),
    ],
)
def test_what_cannot_be_a_branch_is_refused_and_nothing_is_written(stable, tmp_path, source, changes, message):
    with pytest.raises(InputError, match=message):
        begin_branch(f"{stable}{source}", settings_of(stable, tmp_path / "new", **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_refused(stable, tmp_path):
    import shutil

    run = shutil.copytree(stable, tmp_path / "run")
    (run / "checkpoints" / "step-12" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="0 bytes"):
        begin_branch(f"{run}:12", settings_of(stable, tmp_path / "new"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--branch", "/no/run", "--out", "x"], "holds no config.yaml"),
        (["--branch", "runs/a"], "--branch is given without --out"),
        (["--branch", "runs/a", "--resume", "runs/b"], "--branch is given with --resume"),
    ],
)
def test_bad_words_are_told(words, message, capsys):
    assert main(["run", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_source_may_hold_colons():
    assert named_run("runs/a:12") == (Path("runs/a"), 12)
    assert named_run("runs/a:b") == (Path("runs/a:b"), None)
