"""A tiny tokenizer, tiny encoders and a task that a tiny encoder can learn."""

import json

import pytest
import torch

from encoderkit.encoder.checkpoint import save
from encoderkit.encoder.config import LocalAttention, preset
from encoderkit.encoder.model import MaskedLM

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "tree",
    "sees",
    "likes",
    "eats",
    "red",
    "blue",
    "green",
    "not",
    "very",
    "and",
    "or",
    "of",
    "to",
    "in",
    "is",
    "was",
    "one",
    "two",
    "three",
]


@pytest.fixture
def no_plots(monkeypatch):
    """Runs draw nothing: a third of a second each."""
    monkeypatch.setattr("encoderkit.finetune.report._plot", lambda *_: None)


@pytest.fixture(scope="session")
def tokenizer():
    """One token a word; pairs as [CLS] A [SEP] B [SEP]."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture(scope="session", params=["bert", "roberta", "modern"])
def model_folder(request, tokenizer, tmp_path_factory):
    """A native folder of a masked language model with random weights, for each architecture."""
    return make_model(tokenizer, tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="session")
def modern_folder(tokenizer, tmp_path_factory):
    return make_model(tokenizer, tmp_path_factory.mktemp("model") / "modern", "modern")


def make_model(tokenizer, folder, architecture):
    local = {"local_attention": LocalAttention(window_tokens=4, global_every=2)} if architecture == "modern" else {}
    config = preset(
        architecture,
        "tiny",
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        max_positions=64,
        init_std=0.1,
        **local,
    )
    torch.manual_seed(0)
    save(MaskedLM(config), folder, tokenizer)
    return str(folder)


@pytest.fixture(scope="session")
def task_files(tmp_path_factory):
    """train, validation and test files: the label is the colour that the text names. Pairs: do the colours agree?"""
    folder = tmp_path_factory.mktemp("task")
    generator = torch.Generator().manual_seed(1)

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    def sentence(colour):
        noise = [pick(WORDS[:9]) for _ in range(int(torch.randint(1, 9, (), generator=generator)))]
        noise.insert(int(torch.randint(len(noise) + 1, (), generator=generator)), colour)
        return " ".join(noise)

    for split, count in (("train", 96), ("validation", 40), ("test", 40)):
        rows = []
        for _ in range(count):
            first, second = pick(("red", "blue", "green")), pick(("red", "blue", "green"))
            rows.append(
                {"text": sentence(first), "other": sentence(second), "label": first, "same": int(first == second)}
            )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
