"""Ablations: what is run and what is left, the same pretraining as alone, and a table that says what scipy says."""

import concurrent.futures
import dataclasses
import json
import random
import shutil
import time
from pathlib import Path

import pytest
import scipy.stats

from encoderkit.encoder.checkpoint import load
from encoderkit.finetune import ablate, ablate_report
from encoderkit.finetune.__main__ import main
from encoderkit.finetune.settings import AblateSettings
from encoderkit.finetune.suite_file import read_suite
from encoderkit.pretrain.command_line import read_settings
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.prepare import prepare
from encoderkit.pretrain.settings import Budget, PretrainSettings
from encoderkit.pretrain.settings_yaml import dump_yaml

RECIPE = """
data: {store: STORE, max_tokens: 16, row_tokens: 32, workers: 0}
model: {preset: modern, size: tiny, num_layers: 1, hidden_size: 16, num_heads: 2, intermediate_size: 24}
batch_tokens: 64
micro_batch_tokens: 64
precision: fp32
budget: {steps: 2}
"""
ABLATION = """
recipe: recipe.yaml
base: mlm
seeds: 2
suite: suite.yaml
variants:
  nsp: {pairs: nsp, model: {token_types: 2}}
"""
SUITE = """
lrs: [1.0e-3]
defaults: {epochs: 1, batch_size: 64, max_tokens: 32, precision: fp32}
tasks:
  colour:
    data: {train: [train.jsonl], validation: [validation.jsonl], test: [test.jsonl]}
"""


@pytest.fixture
def ablation(tokenizer, task_files, tmp_path):
    """The words of an ablation's command, without --out."""
    words, generator = ["cat", "dog", "tree", "sees", "likes", "red", "blue", "the", "a"], random.Random(0)
    texts = [" ".join(" ".join(generator.choices(words, k=5)).capitalize() + "." for _ in range(4)) for _ in range(80)]
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    prepare([str(tmp_path / "text.txt")], tmp_path / "tokenizer", tmp_path / "store", held_out=0.25)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("STORE", str(tmp_path / "store")))
    (tmp_path / "suite.yaml").write_text(SUITE)
    (tmp_path / "ablation.yaml").write_text(ABLATION)  # its paths lie beside it
    return ["ablate", "--config", str(tmp_path / "ablation.yaml"), "--data", str(task_files)]


def test_cells_are_run_once_by_whoever_comes(ablation, tmp_path, capsys):
    out = tmp_path / "out"
    for job in (0, 1):
        assert main([*ablation, "--out", str(out), "--job", str(job)]) == 0
    assert "2 of 4 are done" in capsys.readouterr().out
    assert not (out / "results.jsonl").exists()
    assert main([*ablation, "--out", str(out), "--job", "4"]) == 2
    assert "job is 4; expected 0 to 3" in capsys.readouterr().err
    before = (out / "mlm/seed-0/measures.json").stat().st_mtime_ns
    assert main([*ablation, "--out", str(out)]) == 0
    assert (out / "mlm/seed-0/measures.json").stat().st_mtime_ns == before
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(r["variant"], r["seed"]) for r in results] == [("mlm", 0), ("nsp", 0), ("mlm", 1), ("nsp", 1)]
    assert set(results[0]["measures"]) == {"held-out loss", "colour accuracy"}
    assert set(results[1]["measures"]) == {"held-out loss", "nsp accuracy", "colour accuracy"}
    report = (out / "report.md").read_text()
    assert "`nsp`: `pairs: nsp`" in report
    assert (out / "ablation.png").stat().st_size > 5000
    losses = [[r["measures"]["held-out loss"] for r in results if r["variant"] == v] for v in ("nsp", "mlm")]
    row = next(line for line in report.splitlines() if "held-out loss | nsp" in line)
    assert f"{sum(losses[0]) / 2 - sum(losses[1]) / 2:+.4f}" in row

    settings = read_settings(PretrainSettings, out / "mlm/seed-1/pretraining/config.yaml")
    alone = pretrain(dataclasses.replace(settings, out=str(tmp_path / "alone")))
    for a, b in zip(load(alone).parameters(), load(out / "mlm/seed-1/pretraining/final").parameters()):
        assert (a == b).all()

    moved = shutil.move(out, tmp_path / "moved")
    for gone in ("measures.json", "pretraining/final"):  # as if it had been stopped at its end
        path = moved / "nsp/seed-1" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main([*ablation, "--out", str(moved)]) == 0
    assert (moved / "nsp/seed-1/pretraining/final").is_dir()
    assert not out.exists()
    shutil.move(moved, out)

    assert main([*ablation, "--out", str(out), "--set.budget.steps", "3"]) == 2
    assert "not as what was run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants.sop.pairs", "swap"], r"variants.sop: pairs is 'swap'; expected"),
        (["--variants.sop.budget.steps", "9"], "variants have budgets of their own"),
        (["--variants.mlm.seed", "9"], r"variants.mlm.seed: expected NAME.SETTING other than the base one"),
        (["--set.budgets.steps", "9"], r"set: .*budgets.steps"),
        (["--set.seed", "9"], r"set.seed is set by the ablation itself"),
    ],
)
def test_a_wrong_variant_is_told_before_anything_runs(ablation, tmp_path, capsys, words, message):
    assert main([*ablation, *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) <= 2
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)
    assert not (tmp_path / "out").exists()


def test_a_budget_may_be_taken_back(ablation, tmp_path):
    """The recipe's minutes by null, for a budget in steps; it stays so in the folder's own config.yaml."""
    (tmp_path / "recipe.yaml").write_text((tmp_path / "recipe.yaml").read_text().replace("steps: 2", "minutes: 5"))
    (tmp_path / "ablation.yaml").write_text(ABLATION + "set: {budget: {minutes: null, steps: 2}}\n")
    for config in (tmp_path / "ablation.yaml", tmp_path / "config.yaml"):
        settings = dataclasses.replace(read_settings(AblateSettings, config), recipe=str(tmp_path / "recipe.yaml"))
        (tmp_path / "config.yaml").write_text(dump_yaml(settings))
        assert {cell.settings.budget for cell in ablate.read_cells(settings)} == {Budget(steps=2)}


def test_a_cell_that_was_stopped_goes_on_with_the_precision_it_measured(ablation, tmp_path, monkeypatch):
    out, words = (
        tmp_path / "out",
        [*ablation, "--set.precision", "auto", "--seeds", "1", "--suite", "null", "--job", "0"],
    )
    with monkeypatch.context() as stopped:
        stopped.setattr("encoderkit.pretrain.loop.finish", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*words, "--out", str(out)]) == 130
    assert not (out / "mlm/seed-0/measures.json").exists()
    assert main([*words, "--out", str(out)]) == 0
    assert (out / "mlm/seed-0/measures.json").exists()


def test_a_cell_that_was_stopped_before_its_model_was_there_goes_on(ablation, tmp_path):
    words = [*ablation, "--seeds", "1", "--suite", "null", "--job", "0", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    cell = tmp_path / "out/mlm/seed-0"
    (cell / "measures.json").unlink()
    (final,) = cell.glob("*/final")
    shutil.rmtree(final)  # as if killed after the last record of the log
    assert main(words) == 0
    assert (final / "model.safetensors").is_file()


def test_every_cell_has_the_precision_that_the_first_one_measured(ablation, tmp_path, monkeypatch):
    out, measured = tmp_path / "out", iter(["fp32"])
    (tmp_path / "suite.yaml").write_text(SUITE.replace(", precision: fp32", ""))
    monkeypatch.setattr("encoderkit.finetune.ablate.fastest_precision", lambda: next(measured))
    monkeypatch.setattr("encoderkit.encoder.precision.bf16_speedup", lambda: 2.0)  # auto would be another one now
    monkeypatch.setattr("encoderkit.encoder.precision.has_bf16", lambda device: True)
    for job in ("0", "1"):
        assert main([*ablation, "--set.precision", "auto", "--out", str(out), "--job", job]) == 0
    for cell in ("mlm", "nsp"):
        folder = out / cell / "seed-0"
        assert read_settings(PretrainSettings, folder / "pretraining/config.yaml").precision == "fp32"
        assert json.loads((folder / "tasks/suite.json").read_text())["precision"] == "fp32"


def test_jobs_that_begin_together_agree(ablation, tmp_path, monkeypatch):
    measured = []

    def measure():
        time.sleep(0.1)
        measured.append("fp32")
        return f"fp32, measured {len(measured)} times"

    monkeypatch.setattr("encoderkit.finetune.ablate.fastest_precision", measure)
    settings = AblateSettings(
        recipe=str(tmp_path / "recipe.yaml"), variants={"nsp.pairs": "nsp"}, out=str(tmp_path / "out")
    )
    cells = ablate.read_cells(settings)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = [pool.submit(ablate._begin_folder, settings, cells) for _ in range(8)]
        assert {future.result() for future in found} == {"fp32, measured 1 times"}


def test_the_packaged_ablations_are_whole(tmp_path, monkeypatch):
    files = sorted((Path(ablate.__file__).parent / "ablations").glob("*.yaml"))
    assert [file.name for file in files] == ["nsp.yaml", "optimizers.yaml"]
    monkeypatch.chdir(tmp_path)  # their paths lie beside them
    seen = []
    monkeypatch.setattr(ablate, "run_ablation", seen.append)
    assert main(["ablate", "--config", str(files[0]), "--set.data.store", "here", "--data", "there"]) == 0
    cells = ablate.read_cells(seen[0])
    assert [(cell.variant, cell.settings.pairs) for cell in cells[:3]] == [
        ("mlm", "none"),
        ("mlm+nsp", "nsp"),
        ("mlm+sop", "sop"),
    ]
    assert len(cells) == 9
    assert {cell.settings.budget for cell in cells} == {Budget(minutes=5.0)}
    assert {cell.settings.data.store for cell in cells} == {"here"}
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # of the data
    assert list(read_suite(ablate._suite_of(seen[0], cells[0]))) == ["cola", "mrpc"]
    monkeypatch.undo()
    monkeypatch.setattr(ablate, "run_ablation", seen.append)
    assert main(["ablate", "--config", str(files[1]), "--set.data.store", "here"]) == 0
    cells = ablate.read_cells(seen[1])
    rates = {
        (cell.settings.optimizer.name, cell.settings.optimizer.lr, cell.settings.optimizer.muon_lr) for cell in cells
    }
    assert len(cells) == len(rates) == 15
    assert {cell.settings.budget for cell in cells} == {Budget(tokens=600_000)}


def test_differences_are_told_as_scipy_tests_them():
    base, variant = [3.90, 3.88, 3.93, 3.91], [3.81, 3.84, 3.85, 3.80]
    results = [
        {"variant": name, "seed": seed, "tokens": 5, "measures": {"held-out loss": value, "sst2 accuracy": -value}}
        for name, values in (("base", base), ("new", variant))
        for seed, value in enumerate(values)
    ]
    compared = ablate_report._compare(ablate_report._by_measure(results), "base")
    t = scipy.stats.ttest_rel(variant, base)
    for measure in ("held-out loss", "sst2 accuracy"):
        found = compared[measure, "new"]
        assert found.p == pytest.approx(2 * t.pvalue)  # Holm: two comparisons
        assert found.verdict == "better"
        row = ablate_report._row(measure, "new", variant, found)
        assert row[4] == ("-0.0800" if measure == "held-out loss" else "+0.0800")
        assert row[7] == f"{found.detectable:.4f}"
        assert len(row) == len(ablate_report._row(measure, "base", base, None)) == len(ablate_report._HEAD)
    low, high = t.confidence_interval(0.95)
    assert (
        ablate_report._row("held-out loss", "new", variant, compared["held-out loss", "new"])[5]
        == f"{low:+.4f} to {high:+.4f}"
    )
