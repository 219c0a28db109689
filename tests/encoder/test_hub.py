"""Registration with transformers, folders that open elsewhere, and the tools around: Trainer, pipeline, sentences."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from encoderkit.encoder import hub
from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.checkpoint import CODE, save
from encoderkit.encoder.config import EncoderConfig, LocalAttention, RopeScaling, preset
from encoderkit.encoder.configuration_encoderkit import EncoderkitConfig
from encoderkit.encoder.hub import AUTO_MAP, from_hub_config, to_hub_config
from encoderkit.encoder.model import MaskedLM
from encoderkit.encoder.modeling_encoderkit import (
    EncoderkitForMaskedLM,
    EncoderkitForMultipleChoice,
    EncoderkitForSequenceClassification,
    EncoderkitForTokenClassification,
    EncoderkitModel,
)
from encoderkit.kernels.errors import InputError

LOGITS_FP32 = 2e-6  # absolute

SMALL = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "intermediate_size": 96, "max_positions": 200}
BERT, MODERN = (preset(name, "tiny", vocab_size=331, **SMALL) for name in ("bert", "modern"))
CUSTOM = dataclasses.replace(  # transformers has no class for it
    BERT,
    positions="rope",
    rope_scaling=RopeScaling(kind="linear", factor=2.0),
    local_attention=LocalAttention(window_tokens=16, global_every=2),
    norm="rmsnorm",
    biases=("attention", "feed_forward"),
)


def make_model(config: EncoderConfig) -> MaskedLM:
    torch.manual_seed(0)
    return MaskedLM(config).eval()


def test_config_fields_have_our_defaults():
    ours = {field.name: field.default for field in dataclasses.fields(EncoderConfig)}
    theirs = vars(EncoderkitConfig())
    required = {name for name, default in ours.items() if default is dataclasses.MISSING}
    assert {name: theirs[name] for name in ours if name not in required} == {
        name: default for name, default in ours.items() if name not in required
    }


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", "64", "model.hidden_size is '64'; expected int"),
        ("hidden_size", 64.0, "model.hidden_size is 64.0; expected int"),
        ("num_heads", 5, "model.num_heads 5"),
        ("tied_decoder", 1, "model.tied_decoder is 1; expected bool"),
        ("positions", "rotary", "model.positions is 'rotary'; expected one of learned"),
        ("biases", ["norm", "all"], "model.biases is 'all'; expected one of norm"),
        ("biases", "norm", "model.biases is 'norm'; expected tuple"),
        ("rope_scaling", {"kind": "yarn", "factor": 2.0}, "model.rope_scaling.kind is 'yarn'; expected one of linear"),
        ("local_attention", {"window_tokens": 8}, "model.local_attention has the fields window_tokens; expected"),
        ("local_attention", [8], r"model.local_attention is \[8\]; expected LocalAttention"),
    ],
)
def test_wrong_field_is_named(field, value, message):
    wrong = to_hub_config(CUSTOM)
    setattr(wrong, field, value)
    with pytest.raises(InputError, match=message):
        from_hub_config(wrong)


def test_other_model_types_are_refused():
    with pytest.raises(InputError, match="model type 'bert'; expected encoderkit"):
        from_hub_config(transformers.BertConfig())


def test_unknown_choice_is_refused_by_the_hub_config():
    with pytest.raises(ValueError, match="norm is 'batchnorm'; expected one of layernorm, rmsnorm"):
        EncoderkitConfig(norm="batchnorm")


def test_registration_can_be_repeated():
    hub.register()
    model = transformers.AutoModel.from_config(to_hub_config(CUSTOM))
    assert type(model) is EncoderkitModel
    kinds = (
        transformers.AutoModelForMaskedLM,
        transformers.AutoModelForPreTraining,
        transformers.AutoModelForSequenceClassification,
    )
    pairs = to_hub_config(dataclasses.replace(CUSTOM, sentence_pairs=True))
    assert [f"modeling_encoderkit.{type(kind.from_config(pairs)).__name__}" for kind in kinds] == [
        AUTO_MAP[kind.__name__] for kind in kinds
    ]


WITHOUT_ENCODERKIT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "encoderkit":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocked())
import torch, transformers

folder, batch_file, result_file = sys.argv[1:]
batch = torch.load(batch_file)
results = {}
for kind in ("AutoModel", "AutoModelForMaskedLM"):
    model = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        results[kind] = model(**batch)[0]
model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=5)
assert model(**batch).logits.shape == (len(batch["input_ids"]), 5)
model.save_pretrained(folder + "/again")
assert not any(name.startswith("encoderkit") for name in sys.modules)
torch.save(results, result_file)
"""


def test_folder_opens_where_encoderkit_is_not_installed(tmp_path, monkeypatch):
    model = make_model(CUSTOM)
    save(model, tmp_path / "model", format="code")
    lengths = torch.tensor([120, 3, 57])  # beyond the windows on both sides
    mask_BL = (torch.arange(120)[None] < lengths[:, None]).long()
    batch = {"input_ids": torch.randint(5, 331, mask_BL.shape) * mask_BL, "attention_mask": mask_BL}
    packed = TokenBatch.from_padded(**batch)
    torch.save(batch, tmp_path / "batch.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    arguments = [tmp_path / "model", tmp_path / "batch.pt", tmp_path / "result.pt"]
    subprocess.run([sys.executable, "-c", WITHOUT_ENCODERKIT, *map(str, arguments)], cwd=tmp_path, check=True)
    results = torch.load(tmp_path / "result.pt")
    real_BL = batch["attention_mask"].bool()
    with torch.no_grad():
        assert (results["AutoModelForMaskedLM"][real_BL] - model.logits(packed)).abs().max() < LOGITS_FP32
        assert (results["AutoModel"][real_BL] - model.encoder(packed)).abs().max() < LOGITS_FP32
    here = Path(hub.__file__).parent
    for folder in (tmp_path / "model", tmp_path / "model" / "again"):
        for name in CODE:
            assert (folder / name).read_bytes() == (here / name).read_bytes()
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_folder_opens_as_our_classes_where_encoderkit_is_installed(tmp_path):
    save(make_model(CUSTOM), tmp_path, format="code")
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is EncoderkitModel


@pytest.fixture(scope="module")
def tokenizer():
    """One token a letter, between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **names, mask_token="[MASK]", model_max_length=200
    )


def trainer_arguments(folder, **given):
    """For a short training on the CPU that writes nothing and tells nobody."""
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return transformers.TrainingArguments(output_dir=str(folder), **quiet, **given)


def test_trains_in_a_transformers_trainer(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = dataclasses.replace(CUSTOM, hidden_dropout=0.1, attention_dropout=0.1)
    model = EncoderkitForMaskedLM(to_hub_config(config))
    texts = [" ".join("abcdefghijklmnopqrstuvwxyz"[i : i + 2 + i % 7]) for i in range(16)]
    encoded = tokenizer(texts)["input_ids"]
    arguments = trainer_arguments(
        tmp_path / "run",
        max_steps=24,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        logging_steps=4,
        seed=0,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": ids} for ids in encoded],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=0),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    trainer.save_model(str(tmp_path / "final"))
    assert all((tmp_path / "final" / name).exists() for name in CODE)


def trained_one_step(kind, rows, accumulation, folder, **labels):
    """Parameters after a step of SGD, and the loss that was logged."""
    torch.manual_seed(0)
    dropless = dataclasses.replace(CUSTOM, hidden_dropout=0.0, attention_dropout=0.0)
    config = to_hub_config(dropless)
    config.update(labels)
    model = kind(config)
    arguments = trainer_arguments(
        folder,
        max_steps=1,
        learning_rate=1.0,
        optim="sgd",
        max_grad_norm=0.0,
        per_device_train_batch_size=len(rows) // accumulation,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return [p.detach() for p in model.parameters()], trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("task", ["tokens", "choice", "regression", "multi_label"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(task, tmp_path):
    """Tokens: with other numbers of labels in each part."""
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(5, 331, (12,), generator=generator)} for _ in range(4)]
    labels = {}
    for i, row in enumerate(rows):
        if task == "tokens":
            row["labels"] = (row["input_ids"] % 2).where(torch.arange(12) > 3 * i, -100)
        elif task == "choice":
            row.update(input_ids=row["input_ids"].view(2, 6), labels=i % 2)
        else:
            row["labels"] = torch.tensor([0.5 * i] if task == "regression" else [1.0, i % 2])
    if task in ("regression", "multi_label"):
        labels = {"num_labels": 1 if task == "regression" else 2}
    kinds = {"tokens": EncoderkitForTokenClassification, "choice": EncoderkitForMultipleChoice}
    kind = kinds.get(task, EncoderkitForSequenceClassification)
    whole, parts = (trained_one_step(kind, rows, n, tmp_path, **labels) for n in (1, 4))
    assert parts[1] == pytest.approx(whole[1], rel=1e-5)
    for a, b in zip(whole[0], parts[0]):
        assert (a - b).abs().max() < 1e-5 * max(1.0, float(a.abs().max()))  # fp32 sums in another order


def test_fills_masks_in_a_pipeline(tmp_path, tokenizer):
    model = make_model(CUSTOM)
    save(model, tmp_path, tokenizer, format="code")
    filled = transformers.pipeline("fill-mask", model=str(tmp_path), top_k=3)("a b [MASK] d")
    ids = tokenizer("a b [MASK] d")["input_ids"]
    batch = TokenBatch.from_sequences([ids], targets=[{ids.index(tokenizer.mask_token_id): 0}])
    with torch.no_grad():
        best = model.logits(batch)[0].softmax(-1).topk(3)
    assert [answer["token"] for answer in filled] == best.indices.tolist()
    assert [answer["score"] for answer in filled] == pytest.approx(best.values.tolist(), rel=1e-5)


@pytest.mark.parametrize("config", [BERT, MODERN, CUSTOM], ids=["bert", "modern", "custom"])
def test_is_the_first_module_of_a_sentence_transformer(config, tmp_path, tokenizer):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    model = make_model(config)
    save(model, tmp_path / "encoder", tokenizer)
    first = modules.Transformer(str(tmp_path / "encoder"))
    embedder = SentenceTransformer(modules=[first, modules.Pooling(model.config.hidden_size, "mean")], device="cpu")
    texts = ["a b c d e f", "g", "h i j"]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    batch = TokenBatch.from_padded(encoded["input_ids"], encoded["attention_mask"])
    with torch.no_grad():
        means = [part.mean(0) for part in model.encoder(batch).split(batch.segments.lengths.tolist())]
    assert (embedder.encode(texts, convert_to_tensor=True) - torch.stack(means)).abs().max() < LOGITS_FP32
    embedder.save(str(tmp_path / "embedder"))
    again = SentenceTransformer(str(tmp_path / "embedder"), device="cpu")
    assert torch.equal(again.encode(texts, convert_to_tensor=True), embedder.encode(texts, convert_to_tensor=True))
