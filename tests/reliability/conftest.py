"""What the tests here start from: an uninterrupted run, and a store, a BERT and a classifier of one tokenizer."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_run import make_settings, make_store

TEXT = "the a red blue old young cat dog bird fox sees likes follows hears and but hello world in on tree house"
WORDS = TEXT.split()


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
    from encoderkit.pretrain.prepare import prepare
    from encoderkit.pretrain.tokenizer import load_tokenizer, train_tokenizer

    folder, generator = tmp_path_factory.mktemp("things"), random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(3, 90))) for _ in range(120)]
    things = Things(*(folder / name for name in ("tokenizer", "store", "model", "classifier", "a.txt", "task.jsonl")))
    things.text.write_text("\n\n".join(texts))
    rows = [{"text": " ".join(generator.choices(WORDS, k=5)), "label": i % 2} for i in range(40)]
    things.task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer("wordpiece", texts, 60, lowercase=True, out=things.tokenizer)
    prepare([str(things.text)], tokenizer=things.tokenizer, out=things.store, held_out=0.1)
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
