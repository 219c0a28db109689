"""A store of made-up English, small enough that a run of twenty steps crosses the edge of an epoch."""

import random

import pytest

from encoderkit.pretrain.prepare import prepare
from encoderkit.pretrain.tokenizer import train_tokenizer

TEXT = "the a red blue old young cat dog bird fox sees likes follows hears and but hello world in on tree house"
WORDS = TEXT.split()


@pytest.fixture(scope="session")
def small_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(3, 90))) for _ in range(120)]
    (folder / "text.txt").write_text("\n\n".join(texts))
    train_tokenizer("wordpiece", texts, 60, lowercase=True, out=folder / "tokenizer")
    prepare(
        [str(folder / "text.txt")],
        tokenizer=folder / "tokenizer",
        out=folder / "store",
        held_out=0.1,
    )
    return folder / "store"
