"""Every recipe is read, takes its first steps, and describes a model of the size that it tells."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from encoderkit.encoder.checkpoint import save
from encoderkit.encoder.config import preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.pretrain.command_line import read_settings
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.settings import Budget, Log, Model, PretrainSettings
from encoderkit.pretrain.tokenizer import load_tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "pretrain" / "recipes"
RECIPES = [*sorted(FOLDER.glob("*.yaml")), FOLDER / "race" / "encoderkit.yaml"]
STEPS = 3
# Where a preset's sizes are changed, what it becomes small with: two layers, the second with a window where there are.
SMALL = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48}

VOCABULARY = {"bert": 30522, "roberta": 50265, "modern": 50368}
OWN_VOCABULARY = {
    "bert-objectives": 8192,
    "modern-4x256": 8192,
    "laptop": 8192,
    "quickstart": 8192,
    "babylm-10m": 16384,
}
OWN_VOCABULARY |= {"encoderkit": 8192}
by_name = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def pretrained(sentence_store, tmp_path_factory):
    """A small BERT with both heads, to go on with."""
    folder, tokenizer = tmp_path_factory.mktemp("pretrained"), load_tokenizer(sentence_store / "tokenizer")
    sizes = {**SMALL, "sentence_pairs": True}
    config = preset("bert", "tiny", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    save(MaskedLM(config), folder, tokenizer)
    return folder


def shrunk(settings: PretrainSettings, store: Path, pretrained: Path, out: Path) -> PretrainSettings:
    """A few steps of one row, on a narrow network of the recipe's kind; all else is the recipe's."""
    row = settings.data.max_tokens
    model = replace(settings.model, **SMALL) if settings.model.init_from is None else continued(settings, pretrained)
    return replace(
        settings,
        data=replace(settings.data, store=str(store), row_tokens=row, workers=0),
        model=model,
        budget=Budget(steps=STEPS),
        batch_tokens=row,
        batch_ramp=[(until, row) for until, _ in settings.batch_ramp],
        micro_batch_tokens=row,
        precision="fp32",
        compile=False,
        log=Log(every_steps=1),
        out=str(out),
    )


def continued(settings: PretrainSettings, pretrained: Path) -> Model:
    return replace(settings.model, init_from=str(pretrained))


@by_name
def test_a_recipe_starts(recipe, sentence_store, pretrained, tmp_path):
    settings = shrunk(read_settings(PretrainSettings, recipe), sentence_store, pretrained, tmp_path / "run")
    final = pretrain(settings)
    assert (final / "model.safetensors").is_file()


@by_name
def test_a_recipe_is_headed_by_command_hardware_and_score(recipe):
    head = recipe.read_text().partition("\n\n")[0].partition("\ndata:")[0]
    assert f"--config pretrain/recipes/{recipe.relative_to(FOLDER)}" in head
    assert all(f"\n# {word}" in head for word in ("Command: ", "Hardware and hours: ", "Score"))
    index = (FOLDER / "README.md").read_text()
    assert f"]({recipe.relative_to(FOLDER)})" in index


@by_name
def test_the_rows_of_a_step_can_be_shared_by_the_ranks_of_the_command(recipe):
    settings, text = read_settings(PretrainSettings, recipe), recipe.read_text()
    told = re.search(r"--nproc_per_node (\d+)", text)
    ranks = int(told[1]) if told else 8 if "accelerate launch" in text else 1  # 8: those of accelerate/*.yaml
    for tokens in (settings.batch_tokens, *(tokens for _, tokens in settings.batch_ramp)):
        assert tokens % (ranks * settings.data.row_tokens) == 0, tokens


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if "\n  init_from:" not in r.read_text()], ids=lambda path: path.stem
)
def test_a_recipe_describes_a_model_of_the_size_that_it_tells(recipe):
    settings, text = read_settings(PretrainSettings, recipe), recipe.read_text()
    told = re.search(r"\((\d+(?:\.\d)?)M parameters\)", text.split("\n")[0])
    vocabulary = OWN_VOCABULARY.get(recipe.stem) or VOCABULARY[settings.model.preset]
    with torch.device("meta"):
        model = MaskedLM(settings.model.encoder_config(vocab_size=vocabulary, pad_token_id=0))
    assert told, f"{recipe.name}: its first line tells no parameters"
    assert float(told[1]) == pytest.approx(model.num_parameters() / 1e6, rel=0.005, abs=0.05)
