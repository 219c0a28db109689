"""Looked-up words give the tokens of the whole text, for the tokenizers that are said to allow it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from encoderkit.pretrain import word_cache
from encoderkit.pretrain.word_cache import WordCache, splits_at_blanks, tokenize

TEXTS = [
    "Dr. Smith unpacked it.  He didn't sleep \u2014 caf\u00e9 \U0001f642 noise!\n\n\u201cIs it?\u201d he asked.\nYes",
    "  <s> the [MASK] of\tit \r\n\r\n \n\u4e2d\u6587 e\u0301\xa0 x \x0b\n y\x85z \x1c w\u2028\u200b \n\n",
]


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[MASK]"]
    return tokenizer, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)


def byte_level_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )


def train(make):
    tokenizer, trainer = make()
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


TOKENIZERS = [train(wordpiece), train(byte_level_bpe)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_known_and_new_words_give_the_tokens_of_the_text(tokenizer):
    cache = WordCache(tokenizer)
    for texts in (TEXTS[:1], TEXTS, [], [""], [TEXTS[1] * 3, " ", TEXTS[0]]):
        found, wanted = cache(texts), tokenize(tokenizer, texts)
        assert len(found) == len(wanted)
        assert all((a == b).all() and len(a) == len(b) for a, b in zip(found, wanted))


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.text(
            st.sampled_from(
                "abS.,'\u201d \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u00e9\u0301\u4e2d\U0001f642\u200b\u2028\u3000\ufb01<s>"
            )
        ),
        max_size=4,
    ),
    st.sampled_from(TOKENIZERS),
)
def test_tokens_of_any_text(texts, tokenizer):
    cache = WordCache(tokenizer)
    for _ in range(2):
        for found, wanted in zip(cache(texts), tokenize(tokenizer, texts)):
            assert found.tolist() == wanted.tolist()


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(word_cache, "CACHED_CHARACTERS", 1000)
    cache = WordCache(TOKENIZERS[0])
    texts = [" ".join(f"w{i * 10 + j}" for j in range(10)) for i in range(400)]
    for text in texts:
        assert cache([text])[0].tolist() == tokenize(cache.backend, [text])[0].tolist()
        assert sum(map(len, cache._known)) <= 1000 + 70


def prefix_space(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def prefix_space_in_offsets(tokenizer):
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(add_prefix_space=True, trim_offsets=True)])


def no_pre_tokenizer(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def metaspace(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()


def strip(tokenizer):
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])


def token_of_two_words(tokenizer):
    tokenizer.add_tokens([AddedToken("it  is")])


@pytest.mark.parametrize(
    "change", [prefix_space, prefix_space_in_offsets, no_pre_tokenizer, metaspace, strip, token_of_two_words]
)
def test_tokenizers_that_look_across_blanks_are_left_alone(change):
    tokenizer = train(byte_level_bpe)
    assert splits_at_blanks(tokenizer)
    change(tokenizer)
    assert not splits_at_blanks(tokenizer)


def test_words_that_are_long_or_without_tokens():
    tokenizer = TOKENIZERS[0]
    texts = ["a" * 5000 + " b", "\u200b \u200b x", "\x01", "x" + " \u0301" * 3]
    for found, wanted in zip(WordCache(tokenizer)(texts), tokenize(tokenizer, texts)):
        assert found.tolist() == wanted.tolist()
    assert np.diff(tokenize(tokenizer, TEXTS)[1]["stop"].astype(int)).min() >= 0
