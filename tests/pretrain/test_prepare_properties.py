"""prepare on drawn texts, batches and shards, killed at drawn points and by drawn shares: one store, nothing lost."""

import contextlib
import functools
import json
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import prepare as prepare_module
from encoderkit.pretrain import shards
from encoderkit.pretrain import tokenizer as tokenizer_module
from encoderkit.pretrain.encode import Encoder
from encoderkit.pretrain.merge import merge
from encoderkit.pretrain.prepare import prepare
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.tokenizer import load_tokenizer, train_tokenizer

TEXTS = [f"Document {i} says something of its own. It is about number {i * i}." for i in range(40)]
SOME = st.lists(st.sampled_from([*TEXTS[:6], " ", "\u200b", "a text that spells [MASK]"]), max_size=12)

BATCH, SHARD = st.integers(1, 400), st.integers(1, 200)  # characters, tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer("wordpiece", TEXTS, 80, lowercase=True, out=out)
    return out


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """These tests cut no power, and open one tokenizer again and again."""
    opened = functools.cache(load_tokenizer)
    with mock.patch("os.fsync"), mock.patch.object(tokenizer_module, "load_tokenizer", opened):
        yield


@pytest.fixture(scope="module")
def encode(tokenizer):
    return Encoder.of(load_tokenizer(tokenizer), "none")


def write(folder: str, texts: list[str]) -> str:
    source = Path(folder) / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(source)


@settings(max_examples=500, deadline=None)
@given(
    SOME,
    st.sampled_from([0.5, 0.1]),
    st.sampled_from(["keep", "exact"]),
)
def test_the_manifest_accounts_for_every_document_and_token(tokenizer, encode, texts, share, duplicates):
    """In = trained on + held out + dropped, in documents and in tokens."""
    texts = [*TEXTS[-3:], *texts]  # some to train on and to hold out in any case
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "s"
        manifest = prepare([write(folder, texts)], tokenizer, out, held_out=share, duplicates=duplicates)
        store = Store.open(out)
        held = store.held_out_texts()
        for document in range(store.num_documents):
            assert store.sentence_lengths(document).sum() == len(store.tokens(document))
            assert store.word_starts(document)[0]
        assert manifest["tokens"] == store.num_tokens == sum(len(store.tokens(d)) for d in range(store.num_documents))
    dropped = sum(manifest["dropped"].values())
    assert len(texts) == manifest["num_documents"] + manifest["num_held_out"] + dropped
    given_tokens, held_tokens = (
        sum(len(encode([text])[0].column(0).values) for text in part)
        for part in (texts if duplicates == "keep" else set(texts), held)
    )
    assert given_tokens == manifest["tokens"] + held_tokens


@contextlib.contextmanager
def small_parts(batch_characters, shard_tokens):
    """A folder to prepare in, where work is cut into parts of these sizes."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(prepare_module, "BATCH_CHARACTERS", batch_characters),
        mock.patch.object(shards, "SHARD_TOKENS", shard_tokens),
    ):
        yield folder


@settings(max_examples=20, deadline=None)
@given(SOME, BATCH, SHARD, st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_killed_anywhere_it_gives_the_same_bytes(tokenizer, texts, batch_characters, shard_tokens, kills):
    add = shards.ShardWriter.add
    with small_parts(batch_characters, shard_tokens) as folder:
        source = write(folder, [*TEXTS[-3:], *texts])
        whole = prepare([source], tokenizer, f"{folder}/whole", held_out=0.1)
        for left in kills:
            added = 0

            def add_or_die(self, batch, notes, left=left):
                nonlocal added
                added += 1
                if added > left:
                    raise KeyboardInterrupt
                add(self, batch, notes)

            with mock.patch.object(shards.ShardWriter, "add", add_or_die), contextlib.suppress(KeyboardInterrupt):
                prepare([source], tokenizer, f"{folder}/killed", held_out=0.1)
        assert prepare([source], tokenizer, f"{folder}/killed", held_out=0.1) == whole  # checksums of all files too
        assert Store.open(f"{folder}/killed", verify=True).manifest == Store.open(f"{folder}/whole").manifest


@settings(max_examples=20, deadline=None)
@given(SOME, BATCH, SHARD, st.integers(1, 3), st.randoms(use_true_random=False))
def test_any_number_of_shares_is_the_store_of_one_machine(
    tokenizer, texts, batch_characters, shard_tokens, number, random
):
    with small_parts(batch_characters, shard_tokens) as folder:
        source = write(folder, [*TEXTS[-3:], *texts])
        one = prepare([source], tokenizer, f"{folder}/one", held_out=0.1)
        parts = [f"{folder}/part{i}" for i in range(1, number + 1)]
        for i, part in enumerate(parts, start=1):
            prepare([source], tokenizer, part, held_out=0.1, shard=f"{i}/{number}")
        random.shuffle(parts)
        assert merge(parts, f"{folder}/merged") == one
        if number > 1:
            with pytest.raises(InputError, match="expected each of"):
                merge(parts[1:], f"{folder}/lacking")
