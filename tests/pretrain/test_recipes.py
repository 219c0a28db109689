"""Every recipe is read, and takes its first steps."""

from dataclasses import replace
from pathlib import Path

import pytest

from encoderkit.pretrain.command_line import read_settings
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.settings import Budget, Log, PretrainSettings

RECIPES = sorted((Path(__file__).resolve().parents[2] / "pretrain" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_starts(recipe, sentence_store, tmp_path):
    settings = read_settings(PretrainSettings, recipe)
    data, run = replace(settings.data, store=str(sentence_store)), tmp_path / "run"
    final = pretrain(replace(settings, data=data, out=str(run), budget=Budget(steps=2), log=Log(every_steps=1)))
    assert (final / "model.safetensors").is_file()
    assert recipe.read_text().startswith("#")
    assert f"--config pretrain/recipes/{recipe.name}" in recipe.read_text()
