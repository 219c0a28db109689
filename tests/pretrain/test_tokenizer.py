"""Tokenizers: trained ones open with transformers, are deterministic, and refuse what they cannot do."""

import json

import numpy as np
import pytest
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.masking import Pieces, mask_rows
from encoderkit.pretrain.settings import Masking
from encoderkit.pretrain.tokenizer import TokenIds, load_tokenizer, tokenizer_hash, train_tokenizer

SENTENCE = "the quick brown fox jumps over lazy dogs while seven wizards brew potions under darkening Café skies"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(40)) + ", é!" for i in range(60)]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_trained_folder_opens_with_auto_tokenizer(tmp_path, kind):
    size = {"wordpiece": 120, "bpe": 320}[kind]
    train_tokenizer(kind, TEXTS, size, lowercase=True, out=tmp_path / "t")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert len(tokenizer) == size
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    encoded = tokenizer("The quick", "brown FOX")
    assert encoded["input_ids"].count(tokenizer.sep_token_id) == 2
    assert encoded["input_ids"][0] == tokenizer.cls_token_id
    assert set(encoded["token_type_ids"]) == {0, 1}
    assert encoded["token_type_ids"][-1] == 1
    assert tokenizer.decode(tokenizer("lazy dogs, while")["input_ids"], skip_special_tokens=True) == "lazy dogs, while"
    assert tokenizer.tokenize("FOX") == tokenizer.tokenize("fox")
    assert tokenizer.model_max_length > 10**9
    assert load_tokenizer(tmp_path / "t").mask_token_id == 4


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_cased_tokenizers_tell_case_apart(tmp_path, kind):
    train_tokenizer(kind, TEXTS, {"wordpiece": 120, "bpe": 300}[kind], lowercase=False, out=tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.tokenize("Café") != tokenizer.tokenize("café")


@pytest.mark.parametrize(("kind", "size"), [("wordpiece", 120), ("bpe", 320)])
def test_training_twice_gives_the_same_bytes(tmp_path, kind, size):
    # The library's own order of ids differs from one training to the next, even within a process.
    for name in "abc":
        train_tokenizer(kind, TEXTS, size, lowercase=True, out=tmp_path / name)
    assert len({(tmp_path / name / "tokenizer.json").read_bytes() for name in "abc"}) == 1


def test_too_many_types_names_what_the_text_gives(tmp_path):
    with pytest.raises(InputError, match=r"vocab_size is 100000, but the text gives \d+ types"):
        train_tokenizer("wordpiece", TEXTS, 100_000, lowercase=True, out=tmp_path / "t")
    assert not (tmp_path / "t").exists()
    for kind in ("wordpiece", "bpe"):
        with pytest.raises(InputError, match=r"vocab_size is 20; its characters alone make \d+ types"):
            train_tokenizer(kind, TEXTS, 20, lowercase=True, out=tmp_path / "t")


def test_an_output_folder_in_use_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="in use"):
        train_tokenizer("wordpiece", TEXTS, 120, lowercase=True, out=tmp_path)


def test_hash_ignores_padding_and_sees_a_changed_vocabulary(tmp_path):
    train_tokenizer("wordpiece", TEXTS, 120, lowercase=True, out=tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "the quick brown fox"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before
    path = tmp_path / "t/tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    first, second = sorted(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content))
    assert tokenizer_hash(load_tokenizer(tmp_path / "t")) != before


def test_a_tokenizer_without_mask_is_named(tmp_path):
    train_tokenizer("wordpiece", TEXTS, 120, lowercase=True, out=tmp_path / "t")
    whole = AutoTokenizer.from_pretrained(tmp_path / "t")
    poor = PreTrainedTokenizerFast(
        tokenizer_object=whole.backend_tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    poor.save_pretrained(tmp_path / "poor")
    with pytest.raises(InputError, match="poor has no mask_token"):
        load_tokenizer(tmp_path / "poor")


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be opened"):
        load_tokenizer(tmp_path)


def test_ordinary_ids_leave_special_and_unused_ones_out(tmp_path):
    train_tokenizer("wordpiece", TEXTS, 120, lowercase=True, out=tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    tokenizer.add_tokens(["[unused1]", AddedToken("[ENTITY]", special=True)])
    ids = TokenIds.of(tokenizer)
    assert ids.vocab_size == 122
    assert ids.ordinary.tolist() == list(range(5, 120))
    assert (ids.pad, ids.cls, ids.sep, ids.mask) == (0, 2, 3, 4)


def test_tokens_added_to_the_vocabulary_are_masked_and_inserted(tmp_path):
    train_tokenizer("wordpiece", TEXTS, 120, lowercase=True, out=tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.add_tokens(["myocarditis", "tachycardia"]) == 2
    tokenizer.save_pretrained(tmp_path / "longer")
    tokenizer = load_tokenizer(tmp_path / "longer")
    tokens = TokenIds.of(tokenizer)
    assert tokens.ordinary.tolist() == list(range(5, 122))
    rows = [tokenizer("myocarditis tachycardia")["input_ids"]] * 2000
    assert rows[0] == [tokens.cls, 120, 121, tokens.sep]
    zeros = np.zeros(2000, dtype=np.int64)
    pieces = Pieces(zeros + 4, zeros, np.arange(2000), zeros)
    masking = Masking(mask_share=0.0, random_share=1.0)
    masked = mask_rows(np.concatenate(rows), pieces, rate=0.5, seed=3, masking=masking, tokens=tokens)
    assert set(masked.targets.tolist()) == {120, 121}
    assert set(masked.input_ids[masked.positions].tolist()) == set(range(5, 122))
