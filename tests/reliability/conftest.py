"""What the tests here start from: an uninterrupted run, and a store, a BERT and a classifier of one tokenizer."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_run import WORDS, make_settings, make_store


@dataclass(frozen=True)
class Things:
    """Folders and files that commands take; none of the tests changes them."""

    tokenizer: Path
    store: Path
    model: Path  # masked language model
    classifier: Path
    text: Path
    task: Path  # labelled rows


@pytest.fixture(scope="session")
def things(tmp_path_factory) -> Things:
    import torch

    from encoderkit.encoder.checkpoint import load_classifier, save, save_classifier
    from encoderkit.encoder.config import preset
    from encoderkit.encoder.model import MaskedLM
    from encoderkit.pretrain.tokenizer import load_tokenizer

    folder, generator = tmp_path_factory.mktemp("things"), random.Random(0)
    make_store(folder)
    names = ("tokenizer", "store", "model", "classifier", "text.txt", "task.jsonl")
    things = Things(*(folder / name for name in names))
    rows = [{"text": " ".join(generator.choices(WORDS, k=5)), "label": i % 2} for i in range(40)]
    things.task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(things.tokenizer)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 128}
    torch.manual_seed(0)
    save(MaskedLM(preset("bert", "tiny", vocab_size=len(tokenizer), **sizes)), things.model, tokenizer)
    save_classifier(load_classifier(things.model, ["0", "1"]), things.classifier, tokenizer)
    return things


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("reliability"))


@pytest.fixture(scope="session")
def whole_run(store, tmp_path_factory):
    from encoderkit.pretrain.loop import pretrain

    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(make_settings(store, out))
    return out
