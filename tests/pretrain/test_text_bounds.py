"""Words and sentences of tokenized text, for the three kinds of tokenizer."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.text_bounds import (
    LONGEST,
    check_language,
    sentence_lengths,
    token_spans,
    token_stops,
    word_starts,
)

TEXT = "Dr. Smith unpacked it.  He didn't sleep \u2014 caf\u00e9 \U0001f642 noise!\n\n\u201cIs it?\u201d he asked.\nYes"
SENTENCES = [
    "Dr. Smith unpacked it.",
    "He didn't sleep \u2014 caf\u00e9 \U0001f642 noise!",
    "\u201cIs it?\u201d he asked.",
    "Yes",
]


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False)


def byte_level_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )


def unsplit_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # while it learns, so that no merge crosses a space
    return tokenizer, trainers.BpeTrainer(vocab_size=60, initial_alphabet=[" ", "\n"], show_progress=False)


@pytest.fixture(params=[wordpiece, byte_level_bpe, unigram, unsplit_bpe])
def encoding(request):
    tokenizer, trainer = request.param()
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    if request.param is unsplit_bpe:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    return tokenizer.encode(TEXT, add_special_tokens=False)


BYTES, _trainer = byte_level_bpe()
BYTES.train_from_iterator([TEXT], _trainer)


def test_every_word_between_spaces_starts_a_word(encoding):
    spans = token_spans(encoding)
    starts = word_starts(TEXT, encoding, spans)
    assert starts[0]
    begins = {span[0] + len(TEXT[span[0] :]) - len(TEXT[span[0] :].lstrip()) for span in spans[starts].tolist()}
    wanted = {i for i, c in enumerate(TEXT) if not c.isspace() and (i == 0 or TEXT[i - 1].isspace())}
    assert wanted <= begins
    inside = [TEXT.index(piece) + 1 for piece in ("noise", "unpacked", "sleep")]
    assert not begins & set(inside)


def test_sentences_are_whole_and_sum_to_the_document(encoding):
    spans = token_spans(encoding)
    stops = token_stops(spans)
    lengths = sentence_lengths(TEXT, stops, "en")
    assert lengths.dtype == np.uint16
    assert lengths.sum() == len(spans)
    bounds = np.cumsum([0, *lengths.tolist()])
    found = [TEXT[spans[a, 0] : spans[b - 1, 1]].strip() for a, b in itertools.pairwise(bounds.tolist())]
    assert found == SENTENCES
    assert sentence_lengths(TEXT, stops, "none").tolist() == [len(spans)]


def test_a_long_sentence_is_split():
    stops = np.arange(1, 150_001)
    assert sentence_lengths("a" * 150_000, stops, "none").tolist() == [LONGEST, LONGEST, 150_000 - 2 * LONGEST]


def test_an_empty_document_has_no_sentence():
    assert sentence_lengths("\u200b", np.zeros(0, np.int64), "en").tolist() == []


def test_a_language_is_a_code():
    check_language("de")
    check_language("none")
    with pytest.raises(InputError, match="sentences is 'English'; expected a language code such as en"):
        check_language("English")


RULES = "am ar bg bn ca da de el en es fi fr gu hi hy it ja kk kn ml mr my nl pa pl pt ru sk ta te uk zh"


def test_a_language_is_one_that_the_splitter_knows():
    for code in [*RULES.split(), "de-at", "pt-br", "en-gb", "zh-hans", "gsw", "cbk-zam", "cs", "none"]:
        check_language(code)
    for code in ("xx", "deu", "eng", "tr", "de-lu"):
        with pytest.raises(InputError, match=f"sentences is '{code}', for which the splitter has no rules; expected"):
            check_language(code)


@settings(max_examples=500, deadline=None)
@given(
    st.text(st.sampled_from("ab.?!\u201d\n \t\u00e9\u0301\u4e2d\U0001f642'-\u00ad\u3000"), max_size=60),
    st.sampled_from(["en", "zh", "none"]),
)
def test_bounds_of_any_text(text, language):
    encoding = BYTES.encode(text, add_special_tokens=False)
    spans = token_spans(encoding)
    lengths = sentence_lengths(text, token_stops(spans), language)
    assert lengths.sum() == len(encoding)
    assert (lengths > 0).all()
    starts = word_starts(text, encoding, spans)
    assert len(starts) == len(encoding)
    assert starts[:1].all()
