"""Doctor's warnings, of figures made by hand: each is raised alone, and none where all is well."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from encoderkit.pretrain.data_facts import DataFacts
from encoderkit.pretrain.doctor_warnings import (
    data_findings,
    memory_findings,
    recipe_findings,
    run_findings,
)
from encoderkit.pretrain.known_recipes import KNOWN_RECIPES
from encoderkit.pretrain.report import Run
from encoderkit.pretrain.settings import Data, Model, Optimizer, PretrainSettings

GOOD = DataFacts(
    tokens=1_000_000, documents=9, fertility=1.4, unknown=1e-4, unused_types=0.05, duplicate_documents=0.2,
    duplicate_tokens=0.02, lengths=np.array([100]), sequences=np.array([20] * 50 + [128] * 50), cut=0.9,
    cut_at_twice=0.8, rows=1000, padding=0.01, probe_targets=5000, unigram_entropy=6.7, ln_vocab=9.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("about", "change"),
    [
        ("unknown tokens", {"unknown": 0.011}),
        ("vocabulary", {"unused_types": 0.6}),
        ("duplicates", {"duplicate_tokens": 0.11}),
        ("padding", {"padding": 0.06}),
        ("sequence length", {"sequences": np.array([60] * 100)}),
        ("cut documents", {"cut": 0.6, "cut_at_twice": 0.2}),
        ("held-out text", {"probe_targets": 1999}),
    ],
)
def test_each_warning_about_data(about, change):
    recipe = PretrainSettings()
    assert list(data_findings(GOOD, recipe)) == []
    (finding,) = data_findings(dataclasses.replace(GOOD, **change), recipe)
    assert finding.about == about
    assert str(finding).startswith(f"{about}: ")
    assert "; expected " in str(finding)
    assert "\n" not in str(finding)


def test_advice_fits_the_layout_and_the_store():
    padded = PretrainSettings(data=Data(layout="padded"))
    (finding,) = data_findings(dataclasses.replace(GOOD, padding=0.4), padded)
    assert str(finding).endswith("set data.layout packed")
    (finding,) = data_findings(dataclasses.replace(GOOD, duplicate_tokens=0.11), PretrainSettings())
    assert str(finding).endswith("prepare the store with --duplicates exact")


def recipe_warnings(optimizer=None, parameters=4_400_000, step_targets=300.0, passes: float | None = 1.0, **model):
    recipe = PretrainSettings(optimizer=optimizer or Optimizer(), model=Model(**model))
    found = recipe_findings(recipe, parameters=parameters, step_targets=step_targets, passes=passes)
    return [finding.about for finding in found]


def test_each_warning_about_a_recipe():
    assert recipe_warnings() == []
    assert recipe_warnings(passes=None) == []
    assert recipe_warnings(step_targets=149) == ["targets a step"]
    assert recipe_warnings(passes=41) == ["passes over the data"]
    assert recipe_warnings(Optimizer(lr=0.5)) == ["optimizer.lr"]
    assert recipe_warnings(Optimizer(lr=5e-5)) == ["optimizer.lr"]
    assert recipe_warnings(Optimizer(muon_lr=0.5)) == ["optimizer.muon_lr"]
    assert recipe_warnings(Optimizer(name="adamw", muon_lr=0.5)) == []  # not used
    assert recipe_warnings(Optimizer(name="stable_adamw", lr=0.5)) == ["optimizer.lr"]  # as AdamW's
    assert recipe_warnings(Optimizer(name="lamb", lr=1.4e-2)) == []
    assert recipe_warnings(Optimizer(lr=5e-5, muon_lr=1e-4), init_from="bert-base-uncased") == []  # a low rate is right
    assert recipe_warnings(Optimizer(lr=0.5), init_from="bert-base-uncased") == ["optimizer.lr"]


@pytest.mark.parametrize("known_recipe", KNOWN_RECIPES, ids=lambda recipe: f"{recipe.name}-{recipe.optimizer}")
def test_no_known_recipe_is_far_from_the_known_ones(known_recipe):
    lr, parameters = known_recipe.lr, int(known_recipe.parameters)
    chosen = Optimizer(name=known_recipe.optimizer, lr=lr)
    if known_recipe.optimizer == "muon":
        chosen = Optimizer(name="muon", lr=2e-3, muon_lr=lr)
        assert "optimizer.muon_lr" not in recipe_warnings(chosen, parameters)
    else:
        assert recipe_warnings(chosen, parameters) == []


def test_rates_of_a_very_small_model_are_those_of_the_smallest_known():
    assert recipe_warnings(parameters=20_000) == []
    assert recipe_warnings(Optimizer(muon_lr=0.015), parameters=20_000) == []
    assert recipe_warnings(Optimizer(muon_lr=0.017), parameters=20_000) == ["optimizer.muon_lr"]


def test_warning_about_memory():
    parts, recipe = {"weights": 2 << 30, "activations": 6 << 30}, PretrainSettings()
    assert list(memory_findings(parts, 9 << 30, "this machine", recipe)) == []
    (finding,) = memory_findings(parts, 8 << 30, "this machine", recipe)
    assert str(finding).endswith("lower micro_batch_tokens to 6144, or set gradient_checkpointing true")
    assert (2 + 6 * 6144 / 8192) / 8 < 0.9 < (2 + 6 * 7168 / 8192) / 8  # one row more would not fit
    (finding,) = memory_findings({**parts, "weights": 9 << 30}, 8 << 30, "this machine", recipe)
    assert "take a smaller model" in str(finding)


def log(losses, norms=None, waiting=0.01) -> Run:
    times = {"data": waiting, "forward": 0.3, "backward": 0.6, "optimizer": 0.09}
    norms = norms or [1.0] * len(losses)
    train = [
        {"step": 10 * (i + 1), "loss": loss, "grad_norm": norm, "time": times}
        for i, (loss, norm) in enumerate(zip(losses, norms))
    ]
    return Run(Path("r"), {"data": {"workers": 0}}, {}, {"unigram_entropy": 6.7}, train, [], [], None)


FALLING = [7.0 - 3 * i / 100 for i in range(100)]


@pytest.mark.parametrize(
    ("about", "run"),
    [
        ("diverged", log([*FALLING, None])),
        ("diverged", log(FALLING, [1.0] * 99 + [None])),
        ("diverging", log([*FALLING, *[4.0 + i / 20 for i in range(40)]])),
        ("stuck", log([7.5, 7.0] + [6.7] * 40)),
        ("stuck", dataclasses.replace(log([9.0 - i / 40 for i in range(100)]), end={"step": 1000})),
        ("loss spikes", log([*FALLING[:50], 9.0, *FALLING[51:]])),
        ("gradient norms", log(FALLING, [1.0] * 90 + [20.0] * 10)),
        ("data-bound", log(FALLING, waiting=0.5)),
    ],
)
def test_each_warning_about_a_run(about, run):
    assert {about} <= {finding.about for finding in run_findings(run)} <= {about, "loss spikes"}


def test_a_run_that_goes_well_raises_no_warning():
    noise = np.random.default_rng(0).normal(0, 0.08, 100)
    assert list(run_findings(log([loss + n for loss, n in zip(FALLING, noise.tolist())]))) == []
    assert list(run_findings(log([9.0 - i / 40 for i in range(100)]))) == []  # at the unigram, on its way down
    assert list(run_findings(log([7.0] * 10))) == []  # too early to tell
    assert list(run_findings(log([]))) == []
