"""The store: what prepare wrote is what is read, other tools read it too, and damage is named."""

import itertools
import json
import pickle

import datasets
import numpy as np
import pytest

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import prepare as prepare_module
from encoderkit.pretrain import shards
from encoderkit.pretrain.prepare import prepare
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.tokenizer import load_tokenizer, train_tokenizer

TEXTS = [" ".join(f"w{(i * j) % 37} and more" for j in range(1, i % 9 + 3)) for i in range(50)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    (root / "a.txt").write_text("\n\n".join(TEXTS))
    train_tokenizer("wordpiece", TEXTS, 60, lowercase=True, out=root / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:  # several shards and record batches from a small text
        patch.setattr(prepare_module, "BATCH_CHARACTERS", 400)
        patch.setattr(shards, "SHARD_TOKENS", 300)
        prepare([str(root / "a.txt")], root / "tokenizer", root / "s", held_out=0.1)
    return root / "s"


@pytest.fixture
def damaged(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "copy")


def test_tokens_are_the_tokenizers_ids(folder):
    store = Store.open(folder, verify=True)
    tokenizer = load_tokenizer(store.tokenizer_folder)
    held = set(store.held_out_texts())
    expected = [
        tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS if t not in {h.strip() for h in held}
    ]
    assert len(held) == 5
    assert store.num_documents == 45
    assert [store.tokens(d).tolist() for d in range(45)] == expected
    assert store.document_lengths.tolist() == [len(ids) for ids in expected]
    assert store.num_tokens == sum(map(len, expected)) == store.unigram_counts.sum()
    assert (store.unigram_counts == np.bincount(np.concatenate(expected), minlength=60)).all()
    assert len(list((folder / "tokens").glob("*.arrow"))) > 1


def test_reading_copies_nothing(folder):
    store = Store.open(folder)
    tokens = store.tokens(3)
    assert tokens.dtype == np.uint16
    assert not tokens.flags.owndata
    assert not tokens.flags.writeable
    assert np.shares_memory(tokens, store.tokens(3))


def test_datasets_reads_the_tokens(folder):
    store = Store.open(folder)
    loaded = datasets.load_from_disk(str(folder / "tokens"))
    assert len(loaded) == store.num_documents
    assert loaded[17]["input_ids"] == store.tokens(17).tolist()


def test_a_store_can_be_sent_to_a_worker(folder):
    store = Store.open(folder)
    copy = pickle.loads(pickle.dumps(store))
    assert copy.tokens(9).tolist() == store.tokens(9).tolist()
    assert copy.hash == store.hash
    assert len(pickle.dumps(store)) < 20_000


@pytest.mark.parametrize(
    "name", ["tokens/data-00000.arrow", "unigram_counts.npy", "held_out.parquet", "tokenizer/tokenizer.json"]
)
def test_missing_and_cut_files_are_named(damaged, name):
    path = damaged / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{name} has .* bytes; expected"):
        Store.open(damaged)
    path.unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        Store.open(damaged)


def test_one_changed_byte_is_found_by_verify(damaged):
    path = damaged / "tokens/data-00000.arrow"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="another checksum"):
        Store.open(damaged, verify=True)


def test_what_is_no_store_is_refused(tmp_path, damaged):
    with pytest.raises(InputError, match="is not a store"):
        Store.open(tmp_path)
    manifest = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(InputError, match="store format 99"):
        Store.open(damaged)
    (damaged / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        Store.open(damaged)


def test_sentences_and_words_of_each_document(folder):
    store = Store.open(folder)
    tokenizer = load_tokenizer(store.tokenizer_folder)
    for document in range(store.num_documents):
        tokens = tokenizer.convert_ids_to_tokens(store.tokens(document).tolist())
        assert store.word_starts(document).tolist() == [not token.startswith("##") for token in tokens]
        assert store.word_starts(document).dtype == bool
        for start, stop in itertools.combinations_with_replacement(range(len(tokens) + 1), 2):
            whole = store.word_starts(document)
            assert np.array_equal(store.word_starts(document, start, stop), whole[start:stop])
        assert store.sentence_lengths(document).dtype == np.int64
        assert store.sentence_lengths(document).sum() == len(tokens)
