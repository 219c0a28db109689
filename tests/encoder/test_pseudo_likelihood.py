"""Pseudo-log-likelihoods against a slow implementation on transformers, one masked copy at a time."""

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from encoderkit.encoder import pseudo_likelihood
from encoderkit.encoder.checkpoint import load, save
from encoderkit.encoder.config import LocalAttention, preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.encoder.pseudo_likelihood import (
    VARIANTS,
    Sentences,
    check_fits,
    packed_logits,
    pseudo_log_likelihoods,
    transformers_logits,
)
from encoderkit.kernels.errors import InputError

LOG_PROBABILITY = 1e-4  # nats, of a sentence
TEXTS = [
    "cats purr unhappily .",
    "cats purrs unhappily .",
    "the unhappy cats purr .",
    "the unhappy cats purr .",
    "cats",
    "the cats the cats the cats unhappily purr .",
    "the cats [MASK] .",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    words = ["cat", "##s", "un", "##happy", "##ily", "##happi", "##ly", "purr", "the", ".", "[", "]"]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@pytest.fixture(scope="module", params=["bert", "roberta", "modern", "alibi"])
def folder(request, tokenizer, tmp_path_factory):
    local = {"local_attention": LocalAttention(window_tokens=2, global_every=2)} if request.param == "modern" else {}
    sizes = {"hidden_size": 32, "num_layers": 3, "num_heads": 2, "intermediate_size": 64, "max_positions": 32}
    odd = {"positions": "alibi", "init_std": 0.2} if request.param == "alibi" else {"init_std": 0.2}
    name = "bert" if request.param == "alibi" else request.param
    torch.manual_seed(0)
    model = MaskedLM(preset(name, "tiny", vocab_size=len(tokenizer), **sizes, **odd, **local))
    path = tmp_path_factory.mktemp("model") / request.param
    save(model, path, tokenizer)
    return path


@torch.no_grad()
def slow(model, tokenizer, text, variant):
    """One copy at a time; words by white space and punctuation, by hand."""
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    total = 0.0
    for at in range(1, len(ids) - 1):
        masked = list(ids)
        masked[at] = tokenizer.mask_token_id
        later = at + 1
        while variant == "within_word" and pieces[later].startswith("##"):
            masked[later] = tokenizer.mask_token_id
            later += 1
        scores = model(input_ids=torch.tensor([masked])).logits[0, at].double().log_softmax(0)
        total += float(scores[ids[at]])
    return total


def test_scores_equal_one_copy_at_a_time_in_transformers(folder, tokenizer):
    import encoderkit.encoder.hub  # noqa: F401  # alibi is no class of transformers

    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    sentences = Sentences.of(TEXTS, tokenizer)
    ours = load(folder)
    for logits in (packed_logits(ours), transformers_logits(theirs)):
        found = pseudo_log_likelihoods(logits, sentences, mask_token_id=tokenizer.mask_token_id, batch_tokens=64)
        for variant in VARIANTS:
            expected = [slow(theirs, tokenizer, text, variant) for text in TEXTS]
            assert np.abs(found[variant] - expected).max() < LOG_PROBABILITY
    assert np.abs(found["original"] - found["within_word"]).max() > 0.01  # words of several pieces tell them apart


def unigram(counted):
    """Logits of a model that knows the first tokens best, whatever stands around; counts the rows it is given."""

    def logits(ids, at):
        counted.append(len(ids))
        return torch.arange(20.0, 0.0, -1.0).repeat(len(ids), 1)

    return logits


def test_scores_of_a_known_distribution(tokenizer):
    sentences = Sentences.of(TEXTS, tokenizer)
    log_p = torch.arange(20.0, 0.0, -1.0).double().log_softmax(0).numpy()
    found = pseudo_log_likelihoods(unigram([]), sentences, mask_token_id=tokenizer.mask_token_id)
    expected = [log_p[ids[1:-1]].sum() for ids in sentences.ids]
    for variant in VARIANTS:
        np.testing.assert_allclose(found[variant], expected, atol=1e-5)


def test_a_sentence_without_tokens_has_zero():
    sentences = Sentences([[], [2, 7, 3], []], [[], [-1, 0, -1], []])
    found = pseudo_log_likelihoods(unigram([]), sentences, mask_token_id=4)
    assert [(values != 0).tolist() for values in found.values()] == [[False, True, False]] * 2


def test_equal_copies_are_computed_once(tokenizer):
    """Of a pair that differs in one word, the copy without that word; and single-piece words in both variants."""
    counted: list[int] = []
    sentences = Sentences.of(["the cats purr .", "the cats . ."], tokenizer)  # the cat ##s purr . / the cat ##s . .
    pseudo_log_likelihoods(unigram(counted), sentences, mask_token_id=tokenizer.mask_token_id)
    # 5 copies of each, of which the one without the word that differs is shared, and one more each for cat ##s.
    assert sum(counted) == 5 + 5 - 1 + 2
    assert sentences.num_copies_tokens() == 2 * 2 * 5 * 7


def test_batches_and_chunks_change_nothing(folder, tokenizer, monkeypatch):
    model, sentences = load(folder), Sentences.of(TEXTS, tokenizer)
    told: list[int] = []

    def score(**more):
        return pseudo_log_likelihoods(packed_logits(model), sentences, mask_token_id=4, **more)["within_word"]

    whole = score(batch_tokens=10_000, tell=told.append)
    assert told[-1] == sentences.num_copies_tokens()
    monkeypatch.setattr(pseudo_likelihood, "CHUNK", 1)
    assert np.abs(whole - score(batch_tokens=1)).max() < 1e-5


def test_too_long_sentence_is_named(tokenizer):
    with pytest.raises(InputError, match="f: sentence 6 has 16 tokens; the model takes at most 10"):
        check_fits(Sentences.of(TEXTS, tokenizer), 10, "f")
