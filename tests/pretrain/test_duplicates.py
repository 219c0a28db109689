"""Duplicates: the same and nearly the same texts are dropped and counted, others stay."""

import random

import pytest

from encoderkit.pretrain.corpora import Document
from encoderkit.pretrain.duplicates import FILTERS
from encoderkit.pretrain.prepare import prepare
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.tokenizer import train_tokenizer


def words(seed, count=200):
    generator = random.Random(seed)
    return [f"w{generator.randrange(500)}" for _ in range(count)]


def reasons(kind, texts):
    filters = [make() for make in FILTERS[kind]]
    return [next(filter(None, (f(Document("d", text)) for f in filters)), None) for text in texts]


def test_case_punctuation_and_spacing_make_no_other_text():
    texts = ["One, two.", "one  TWO", "one two three", "!!!", "???", "!!!"]
    assert reasons("exact", texts) == [None, "exact duplicate", None, None, None, "exact duplicate"]
    assert reasons("keep", texts) == [None] * 6


def test_a_text_with_few_other_words_is_near_and_others_are_not():
    near = words(0)
    near[100] = "changed"
    texts = [" ".join(text) for text in (words(0), words(1), near, words(2), words(1), words(0)[:100] + words(3)[:100])]
    assert reasons("near", texts) == [None, None, "near duplicate", None, "exact duplicate", None]


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_prepare_drops_duplicates_of_held_out_documents_too(tmp_path, kind):
    texts = [" ".join(words(i)) for i in range(6)]
    train_tokenizer("wordpiece", texts, 100, lowercase=True, out=tmp_path / "t")
    (tmp_path / "a.txt").write_text("\n\n".join([*texts, texts[4], texts[5].upper()]))
    (tmp_path / "held.txt").write_text(texts[0])
    held = str(tmp_path / "held.txt")
    manifest = prepare([str(tmp_path / "a.txt")], tmp_path / "t", tmp_path / "s", held_out=held, duplicates=kind)
    assert manifest["dropped"] == {"exact duplicate": 3}
    assert Store.open(tmp_path / "s").num_documents == 5
