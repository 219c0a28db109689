"""Stores of made-up English, small enough that a run of twenty steps crosses the edge of an epoch."""

import json
import random

import pytest
from tiny_run import TEXTS, WORDS, make_store

from encoderkit.pretrain import prepare as prepare_module
from encoderkit.pretrain import shards
from encoderkit.pretrain.prepare import prepare
from encoderkit.pretrain.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def small_store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def sentence_store(tmp_path_factory):
    """A store of documents of some sentences each."""
    folder = tmp_path_factory.mktemp("sentences")
    generator = random.Random(0)

    def sentence():
        return " ".join(generator.choices(WORDS, k=generator.randint(2, 7))).capitalize() + "."

    texts = [" ".join(sentence() for _ in range(generator.randint(2, 6))) for _ in range(300)]
    (folder / "text.txt").write_text("\n\n".join(texts))
    train_tokenizer("wordpiece", texts, 60, lowercase=True, out=folder / "tokenizer")
    prepare([str(folder / "text.txt")], tokenizer=folder / "tokenizer", out=folder / "store", held_out=0.25)
    return folder / "store"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer("wordpiece", TEXTS, 80, lowercase=True, out=out)
    return out


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, " ", "\u200b"]))
    return path


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 150)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 200)
