"""On resume, what would change the run is refused with a diff, unless it is named."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace

import pytest
from tiny_run import WORDS, differences, make_settings, read_log, stop_before, write_recipe

import encoderkit.pretrain.job as job_module
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.__main__ import main
from encoderkit.pretrain.command_line import read_settings
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.prepare import prepare
from encoderkit.pretrain.run_folder import RunFolder, check_resumable
from encoderkit.pretrain.settings import PretrainSettings
from encoderkit.pretrain.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def first_run(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    with stop_before(8):
        pretrain(make_settings(store, out))
    return out


@pytest.fixture
def cut_run(first_run, tmp_path):
    """A run that was interrupted after step 8; its newest checkpoint is of step 6."""
    return shutil.copytree(first_run, tmp_path / "run")


def resume(run, *arguments) -> int:
    return main(["run", "--resume", str(run), *map(str, arguments)])


def stored(run) -> PretrainSettings:
    return replace(read_settings(PretrainSettings, run / "config.yaml"), out=str(run))


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("seed", 1, "seed: 0 -> 1"),
        ("data.max_tokens", 16, "data.max_tokens: 32 -> 16"),
        ("model.hidden_dropout", 0.1, "model.hidden_dropout: null -> 0.1"),
        ("optimizer.lr", 1e-4, "optimizer.lr: 0.002 -> 0.0001"),
        ("budget.steps", 24, "budget.steps: 20 -> 24"),
    ],
)
def test_a_change_is_refused_with_a_diff_and_goes_on_where_it_is_named(key, value, shown, cut_run, capsys):
    before = (cut_run / "config.yaml").read_text()
    assert resume(cut_run, f"--{key}", value) == 2
    told = capsys.readouterr().err
    assert shown in told
    assert f"--allow_change {key}" in told
    assert (cut_run / "config.yaml").read_text() == before
    assert resume(cut_run, f"--{key}", value, "--allow_change", key) == 0
    changed = stored(cut_run)
    for name in key.split("."):
        changed = getattr(changed, name)
    assert changed == value


def test_a_named_change_takes_effect(cut_run):
    assert resume(cut_run, "--optimizer.lr", 1e-4, "--budget.steps", 24, "--allow_change", "optimizer.lr,budget.*") == 0
    rates = {record["step"]: record["lr"] for record in read_log(cut_run) if record["kind"] == "train"}
    assert rates[4] > 1e-3
    assert max(rate for step, rate in rates.items() if step > 6) <= 1e-4
    assert max(rates) == 24


def test_operational_keys_pass(cut_run):
    assert resume(cut_run, "--log.every_steps", 3, "--timeouts.loader", 60, "--checkpoints.asynchronous", "true") == 0


def test_keys_that_are_not_there_or_without_a_resume_are_refused(cut_run, capsys):
    assert resume(cut_run, "--allow_change", "data.stor") == 2
    assert "did you mean data.store?" in capsys.readouterr().err
    assert main(["run", "--allow_change", "seed"]) == 2
    assert "without --resume" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused_though_named(cut_run, capsys):
    before = (cut_run / "config.yaml").read_text()
    assert resume(cut_run, "--model.hidden_size", 64, "--allow_change", "model.hidden_size") == 2
    assert "does not fit model.* as it was changed: " in capsys.readouterr().err
    assert (cut_run / "config.yaml").read_text() == before


def test_what_says_which_state_there_is_never_changes(cut_run, capsys):
    assert resume(cut_run, "--optimizer.name", "lamb", "--allow_change", "optimizer.*") == 2
    assert '-> "lamb", which cannot change within a run' in capsys.readouterr().err
    was = stored(cut_run)
    with pytest.raises(InputError, match='pairs: "none" -> "sop", which cannot change within a run'):
        check_resumable(was, replace(was, pairs="sop"), ["pairs"])


def test_a_smaller_corpus_goes_on_in_its_own_order(store, cut_run, tmp_path):
    """Its epochs end elsewhere, so that the ends of those before say nothing."""
    (tmp_path / "few.txt").write_text("\n\n".join(" ".join(WORDS) for _ in range(12)))
    prepare([str(tmp_path / "few.txt")], tokenizer=store / "tokenizer", out=tmp_path / "few", held_out=0.1)
    assert resume(cut_run, "--data.store", tmp_path / "few", "--allow_change", "data.store") == 0


def another_store(folder, tokenizer, seed: int):
    draw = random.Random(seed)
    (folder / "other.txt").write_text("\n\n".join(" ".join(draw.choices(WORDS, k=60)) for _ in range(99)))
    prepare([str(folder / "other.txt")], tokenizer=tokenizer, out=folder / "other", held_out=0.1)
    return folder / "other"


def test_another_corpus_goes_on_where_it_is_named_and_another_tokenizer_never(store, cut_run, tmp_path, capsys):
    other = another_store(tmp_path, store / "tokenizer", seed=5)
    assert resume(cut_run, "--data.store", other) == 2
    assert "data.store: " in capsys.readouterr().err
    assert resume(cut_run, "--data.store", other, "--allow_change", "data.store") == 0
    shutil.rmtree(other)
    train_tokenizer("wordpiece", WORDS * 9, 50, lowercase=True, out=tmp_path / "tokenizer")
    other = another_store(tmp_path, tmp_path / "tokenizer", seed=5)
    assert resume(cut_run, "--data.store", other, "--allow_change", "data.store") == 2
    assert "tokenizer was" in capsys.readouterr().err


def test_without_the_comparison_a_changed_seed_gives_other_weights_silently(cut_run, whole_run, monkeypatch):
    """Proof that it is the comparison that refuses."""
    monkeypatch.setattr("encoderkit.pretrain.run_folder.check_resumable", lambda *_: [])
    assert resume(cut_run, "--seed", 1) == 0
    assert "weights" in differences(whole_run, cut_run)


def test_a_corpus_changed_by_a_byte_is_refused_and_without_checksums_it_is_not(store, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    recipe = write_recipe(make_settings(copy, tmp_path / "run"), tmp_path / "recipe.yaml")
    assert main(["run", "--config", str(recipe)]) == 0
    arrow = next(copy.rglob("*.arrow"))
    content = bytearray(arrow.read_bytes())
    content[len(content) // 2] ^= 1
    arrow.write_bytes(content)
    assert resume(tmp_path / "run") == 2
    assert "another checksum" in capsys.readouterr().err
    real = job_module.Store.open
    monkeypatch.setattr(job_module.Store, "open", lambda folder, verify=False: real(folder))
    assert resume(tmp_path / "run") == 0


def test_torchrun_that_starts_its_processes_again_resumes_the_run(cut_run, whole_run, store, tmp_path, monkeypatch):
    recipe = write_recipe(make_settings(store, cut_run, precision="auto"), tmp_path / "recipe.yaml")
    command = ["run", "--config", str(recipe)]
    assert main(command) == 2  # a folder that is in use, as long as nobody says to resume
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main([*command, "--seed", "1"]) == 2  # another run's folder
    assert main(command) == 0
    assert differences(whole_run, cut_run) == []


def test_a_run_folder_is_not_taken_from_its_holder(cut_run, capsys):
    with RunFolder.resume(stored(cut_run)):
        assert resume(cut_run) == 2
    assert "is in use by process" in capsys.readouterr().err
