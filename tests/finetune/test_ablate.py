"""Ablations: what is run and what is left, the same pretraining as alone, and a table that says what scipy says."""

import dataclasses
import json
import random

import pytest
import scipy.stats

from encoderkit.encoder.checkpoint import load
from encoderkit.finetune import ablate_report
from encoderkit.finetune.__main__ import main
from encoderkit.pretrain.command_line import read_settings
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.prepare import prepare
from encoderkit.pretrain.settings import PretrainSettings

RECIPE = """
data: {store: STORE, max_tokens: 16, row_tokens: 32, workers: 0}
model: {preset: modern, size: tiny, num_layers: 1, hidden_size: 16, num_heads: 2, intermediate_size: 24}
batch_tokens: 64
micro_batch_tokens: 64
precision: fp32
budget: {steps: 2}
"""
ABLATION = """
recipe: RECIPE
base: mlm
seeds: 2
suite: SUITE
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
    changed = ABLATION.replace("RECIPE", str(tmp_path / "recipe.yaml")).replace("SUITE", str(tmp_path / "suite.yaml"))
    (tmp_path / "ablation.yaml").write_text(changed)
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

    assert main([*ablation, "--out", str(out), "--set.budget.steps", "3"]) == 2
    assert "differs from what was run in" in capsys.readouterr().err


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
    low, high = t.confidence_interval(0.95)
    assert (
        ablate_report._row("held-out loss", "new", variant, compared["held-out loss", "new"])[5]
        == f"{low:+.4f} to {high:+.4f}"
    )
