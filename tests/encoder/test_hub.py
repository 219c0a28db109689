"""Our encoders as Hugging Face models: equal logits for every choice of every axis, and folders that open elsewhere."""

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
from encoderkit.encoder.checkpoint import CODE
from encoderkit.encoder.classifier import SequenceClassifier
from encoderkit.encoder.config import EncoderConfig, LocalAttention, RopeScaling, preset
from encoderkit.encoder.configuration_encoderkit import CHOICES, EncoderkitConfig
from encoderkit.encoder.hub import AUTO_MAP, from_hub_config, to_hub_config
from encoderkit.encoder.model import MaskedLM
from encoderkit.encoder.modeling_encoderkit import (
    EncoderkitForMaskedLM,
    EncoderkitForPreTraining,
    EncoderkitForSequenceClassification,
    EncoderkitModel,
)
from encoderkit.kernels.errors import InputError

LOGITS_FP32 = 2e-6  # absolute
LOGITS_FP64 = 1e-12
GRADIENTS = 2e-6  # relative L2

VOCAB = 331  # no multiple of 64, so that our token table has rows that the exported one has not
SMALL = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "intermediate_size": 96, "max_positions": 200}
WINDOW = LocalAttention(window_tokens=16, global_every=2)


def make_config(architecture: str = "bert", **overrides) -> EncoderConfig:
    return preset(architecture, "tiny", **{**SMALL, "vocab_size": VOCAB, "attention_dropout": 0.0, **overrides})


CONFIGS = {
    "bert": make_config(),
    "roberta": make_config("roberta", biases=("norm", "head"), feed_forward="gelu_tanh", init="truncated"),
    "modern": make_config("modern", window_tokens=16, pooling="mean"),
    "sinusoidal": make_config(
        positions="sinusoidal",
        norm="rmsnorm",
        norm_placement="pre",
        embedding_norm=False,
        feed_forward="swiglu",
        biases=("attention",),
        tied_decoder=False,
        token_types=0,
    ),
    "alibi": make_config(
        positions="alibi", norm_placement="pre", feed_forward="geglu", biases=("norm", "feed_forward", "decoder")
    ),
    "alibi, windows, three heads": make_config(
        "modern", positions="alibi", local_attention=WINDOW, num_heads=3, hidden_size=72, tied_decoder=False
    ),
    "no positions": make_config(
        positions="none", embedding_norm=False, biases=(), head_activation="gelu_tanh", local_attention=WINDOW
    ),
    "linear rope": make_config(
        "roberta",
        positions="rope",
        rope_base=10_000,
        rope_scaling=RopeScaling(kind="linear", factor=2.0),
        local_attention=WINDOW,
        norm="rmsnorm",
        biases=("attention", "feed_forward"),
    ),
    "ntk rope, all local": make_config(
        "modern",
        rope_scaling=RopeScaling(kind="ntk", factor=4.0),
        local_attention=LocalAttention(window_tokens=5, global_every=0, rope_base=500.0),
        token_types=2,
        pooling="cls",
    ),
}
CUSTOM = "linear rope"  # one that transformers has no class for


@pytest.fixture(params=CONFIGS)
def config(request) -> EncoderConfig:
    return CONFIGS[request.param]


def move_from_start(model: torch.nn.Module) -> None:
    """Every bias and norm away from its trivial start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def make_model(config: EncoderConfig) -> MaskedLM:
    torch.manual_seed(0)
    model = MaskedLM(config).eval()
    move_from_start(model)
    return model


def exported(model, kind, attention: str = "sdpa", **settings):
    """The same network as a Hugging Face model; the names of all weights are equal."""
    native = kind._from_config(to_hub_config(model.config), attn_implementation=attention)
    native.config.update(settings)
    tables = ("tokens.weight", "decoder.weight")
    cut = {name: w[:VOCAB] if name.endswith(tables) else w for name, w in model.state_dict().items()}
    native.load_state_dict(cut, strict=True)
    return native.eval()


def padded_batch(config: EncoderConfig, left: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = [120, 3, 57, 0, 36]  # beyond the windows on both sides; one of padding alone
    mask_BL = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    if left:
        mask_BL = mask_BL.flip(1)
    ids_BL = torch.randint(5, VOCAB, mask_BL.shape, generator=generator).masked_fill(~mask_BL, 0)
    batch = {"input_ids": ids_BL, "attention_mask": mask_BL.long()}
    if config.token_types:
        types_BL = torch.randint(0, config.token_types, mask_BL.shape, generator=generator)
        batch["token_type_ids"] = types_BL
    return batch


def packed(batch: dict[str, torch.Tensor]) -> TokenBatch:
    return TokenBatch.from_padded(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))


def first_of_each(batch: dict[str, torch.Tensor]) -> TokenBatch:
    """The sequences without the empty one, their first tokens read."""
    rows = [mask.bool() for mask in batch["attention_mask"] if mask.any()]
    kept = [i for i, mask in enumerate(batch["attention_mask"]) if mask.any()]
    lists = {name: [batch[name][i][row].tolist() for i, row in zip(kept, rows)] for name in batch}
    return TokenBatch.from_sequences(lists["input_ids"], token_types=lists.get("token_type_ids"))


def test_every_choice_of_every_axis_is_compared():
    seen = {name: {getattr(config, name) for config in CONFIGS.values()} for name in CHOICES}
    assert seen == {name: set(choices) for name, choices in CHOICES.items()}
    assert {site for config in CONFIGS.values() for site in config.biases} == {
        "norm",
        "attention",
        "feed_forward",
        "head",
        "decoder",
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa", "encoderkit"])
def test_logits_are_equal(config, attention):
    model = make_model(config)
    native = exported(model, EncoderkitForMaskedLM, attention)
    batch = padded_batch(config)
    real_BL = batch["attention_mask"].bool()
    with torch.no_grad():
        theirs = native(**batch).logits
        assert theirs.isfinite().all()  # at padding too
        assert (theirs[real_BL] - model.logits(packed(batch))).abs().max() < LOGITS_FP32
        model.double(), native.double()
        theirs = native(**batch).logits
        assert theirs.isfinite().all()
        assert (theirs[real_BL] - model.logits(packed(batch))).abs().max() < LOGITS_FP64


@pytest.mark.parametrize("attention", ["eager", "sdpa", "encoderkit"])
def test_padding_on_the_left_changes_nothing(config, attention):
    native = exported(make_model(config), EncoderkitForMaskedLM, attention)
    right, left = padded_batch(config), padded_batch(config, left=True)
    left["input_ids"][left["attention_mask"].bool()] = right["input_ids"][right["attention_mask"].bool()]
    if config.token_types:
        left["token_type_ids"][left["attention_mask"].bool()] = right["token_type_ids"][right["attention_mask"].bool()]
    with torch.no_grad():
        logits = [native(**batch).logits[batch["attention_mask"].bool()] for batch in (right, left)]
    assert (logits[0] - logits[1]).abs().max() < LOGITS_FP32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "encoderkit"])
def test_sixteen_bits_stay_finite_where_all_is_padding(attention, dtype):
    for name in ("modern", "alibi, windows, three heads"):
        native = exported(make_model(CONFIGS[name]), EncoderkitForMaskedLM, attention).to(dtype)
        batch = padded_batch(CONFIGS[name])
        loss = native(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in native.parameters())


@pytest.mark.parametrize("name", ["modern", "alibi, windows, three heads", "sinusoidal"])
def test_gradients_are_equal(name):
    model = make_model(CONFIGS[name])
    native = exported(model, EncoderkitForMaskedLM)
    batch = padded_batch(model.config)
    ids_BL, real_BL = batch["input_ids"], batch["attention_mask"].bool()
    picked_BL = (ids_BL % 5 == 0) & real_BL
    loss = native(**batch, labels=ids_BL.masked_fill(~picked_BL, -100)).loss
    loss.backward()
    ours = packed(batch)
    ours = dataclasses.replace(ours, targets=ids_BL.masked_fill(~picked_BL, -100)[real_BL])
    result = model(ours)
    (result.loss / result.count).backward()
    assert abs(loss - result.loss / result.count) < LOGITS_FP32
    parameters = dict(model.named_parameters())
    largest = max(p.grad.norm() for p in parameters.values())
    for parameter_name, parameter in native.named_parameters():
        expected = parameters[parameter_name].grad[: len(parameter)]
        # Key biases have gradient zero in exact arithmetic: what is left there is rounding, far below the others.
        difference = (parameter.grad - expected).norm()
        assert difference <= GRADIENTS * max(expected.norm(), 1e-3 * largest), parameter_name


def test_classifier_logits_are_equal(config):
    torch.manual_seed(0)
    model = SequenceClassifier(config, ["no", "maybe", "yes"]).eval()
    move_from_start(model)
    native = exported(model, EncoderkitForSequenceClassificationWithThreeLabels)
    for left in (False, True):
        batch = padded_batch(config, left)
        some = batch["attention_mask"].any(1)
        with torch.no_grad():
            result = native(**batch, labels=torch.tensor([0, 1, 2, 0, 1]))
            assert result.logits.isfinite().all()
            assert (result.logits[some] - model(first_of_each(batch))).abs().max() < LOGITS_FP32
        expected = torch.nn.functional.cross_entropy(result.logits, torch.tensor([0, 1, 2, 0, 1]))
        assert torch.equal(result.loss, expected)


class EncoderkitForSequenceClassificationWithThreeLabels(EncoderkitForSequenceClassification):
    def __init__(self, config: EncoderkitConfig) -> None:
        config.id2label = {0: "no", 1: "maybe", 2: "yes"}
        super().__init__(config)


def test_sentence_pair_logits_are_equal():
    model = make_model(dataclasses.replace(CONFIGS[CUSTOM], sentence_pairs=True))
    native = exported(model, EncoderkitForPreTraining)
    batch = padded_batch(model.config)
    some, real_BL = batch["attention_mask"].any(1), batch["attention_mask"].bool()
    with torch.no_grad():
        result = native(**batch, labels=batch["input_ids"], next_sentence_label=torch.tensor([0, 1, 0, 1, 0]))
        assert (result.prediction_logits[real_BL] - model.logits(packed(batch))).abs().max() < LOGITS_FP32
        assert (
            result.seq_relationship_logits[some] - model.pair_logits(first_of_each(batch))
        ).abs().max() < LOGITS_FP32
    assert result.loss.isfinite()
    with pytest.raises(ValueError, match="sentence_pairs is false"):
        EncoderkitForPreTraining(to_hub_config(CONFIGS[CUSTOM]))


def test_packed_row_gives_the_logits_of_the_padded_batch(config):
    native = exported(make_model(config), EncoderkitForMaskedLM, "encoderkit")
    batch = padded_batch(config)
    real_BL = batch["attention_mask"].bool()
    row = {name: values[real_BL].unsqueeze(0) for name, values in batch.items() if name != "attention_mask"}
    lengths = real_BL.sum(1)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    flat = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": int(lengths.max())}
    with torch.no_grad():
        expected = native(**batch).logits[real_BL]
        for mask in ({}, {"attention_mask": torch.ones_like(row["input_ids"])}):
            assert (native(**row, **flat, **mask).logits[0] - expected).abs().max() < LOGITS_FP32
    native.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="sdpa attention does not know cu_seq_lens_q"):
        native(**row, **flat)


def test_config_survives_the_round_trip(config, tmp_path):
    to_hub_config(config).save_pretrained(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert from_hub_config(again) == config
    written = json.loads((tmp_path / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(EncoderConfig)} <= set(written)
    assert again.hidden_size == config.hidden_size
    assert again.num_hidden_layers == config.num_layers
    assert again.num_attention_heads == config.num_heads
    assert again.max_position_embeddings == config.max_positions
    assert again.tie_word_embeddings is config.tied_decoder


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
    wrong = to_hub_config(CONFIGS[CUSTOM])
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
    model = transformers.AutoModel.from_config(to_hub_config(CONFIGS[CUSTOM]))
    assert type(model) is EncoderkitModel
    kinds = (
        transformers.AutoModelForMaskedLM,
        transformers.AutoModelForPreTraining,
        transformers.AutoModelForSequenceClassification,
    )
    pairs = to_hub_config(dataclasses.replace(CONFIGS[CUSTOM], sentence_pairs=True))
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
    model = make_model(CONFIGS[CUSTOM])
    exported(model, EncoderkitForMaskedLM).save_pretrained(tmp_path / "model")
    batch = padded_batch(model.config)
    torch.save(batch, tmp_path / "batch.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    arguments = [tmp_path / "model", tmp_path / "batch.pt", tmp_path / "result.pt"]
    subprocess.run([sys.executable, "-c", WITHOUT_ENCODERKIT, *map(str, arguments)], cwd=tmp_path, check=True)
    results = torch.load(tmp_path / "result.pt")
    real_BL = batch["attention_mask"].bool()
    with torch.no_grad():
        assert (results["AutoModelForMaskedLM"][real_BL] - model.logits(packed(batch))).abs().max() < LOGITS_FP32
        assert (results["AutoModel"][real_BL] - model.encoder(packed(batch))).abs().max() < LOGITS_FP32
    here = Path(hub.__file__).parent
    for folder in (tmp_path / "model", tmp_path / "model" / "again"):
        for name in CODE:
            assert (folder / name).read_bytes() == (here / name).read_bytes()
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_folder_opens_as_our_classes_where_encoderkit_is_installed(tmp_path):
    exported(make_model(CONFIGS[CUSTOM]), EncoderkitForMaskedLM).save_pretrained(tmp_path)
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is EncoderkitModel


def test_initial_weights_follow_the_scheme():
    config = make_config("modern", hidden_size=256, vocab_size=2000, intermediate_size=256, sentence_pairs=True)
    native = EncoderkitForPreTraining(to_hub_config(config))
    ours = dict(MaskedLM(config).named_parameters())
    for name, parameter in native.named_parameters():
        expected = ours[name][: len(parameter)]
        four_sigma = 4 * expected.std() / parameter.numel() ** 0.5  # of the difference of two sample deviations
        assert abs(parameter.std() - expected.std()) <= four_sigma, name
        assert parameter.abs().max() <= max(2 * config.init_std, expected.abs().max()), name
    again = EncoderkitForSequenceClassification(to_hub_config(config)).head.dense.weight
    assert again.std() < 0.6 * config.init_std


@pytest.mark.parametrize("mean_resizing", [True, False])
def test_new_tokens_get_logits(config, mean_resizing):
    native = exported(make_model(config), EncoderkitForMaskedLM)
    batch = padded_batch(config)
    with torch.no_grad():
        before = native(**batch).logits
        native.resize_token_embeddings(VOCAB + 3, mean_resizing=mean_resizing)
        after = native(**batch).logits
    assert after.shape[-1] == native.config.vocab_size == VOCAB + 3
    assert torch.allclose(after[..., :VOCAB], before, atol=LOGITS_FP32, rtol=0)


def test_hidden_states_and_attentions_are_returned():
    native = exported(make_model(CONFIGS["modern"]), EncoderkitForMaskedLM, "eager")
    batch = padded_batch(CONFIGS["modern"])
    result = native(**batch, output_hidden_states=True, output_attentions=True)
    assert len(result.hidden_states) == SMALL["num_layers"] + 1
    assert torch.equal(result.hidden_states[-1], native.encoder(**batch).last_hidden_state)
    assert [tuple(weights.shape) for weights in result.attentions] == [(5, 4, 120, 120)] * SMALL["num_layers"]
    plain = native(**batch, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], result.logits)
    embeddings = native.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(native(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits, result.logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "either input_ids or inputs_embeds"),
        ({"attention_mask": torch.ones(5, 1, 120, 120)}, r"attention_mask has shape \(5, 1, 120, 120\); expected"),
        ({"input_ids": torch.zeros(1, 201, dtype=torch.long), "attention_mask": None}, "201 tokens; .* at most 200"),
    ],
)
def test_wrong_input_is_named(change, message):
    native = exported(make_model(CONFIGS["modern"]), EncoderkitForMaskedLM)
    with pytest.raises(ValueError, match=message):
        native(**{**padded_batch(CONFIGS["modern"]), **change})


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


def test_trains_in_a_transformers_trainer(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIGS[CUSTOM], hidden_dropout=0.1, attention_dropout=0.1)
    model = EncoderkitForMaskedLM(to_hub_config(config))
    texts = [" ".join("abcdefghijklmnopqrstuvwxyz"[i : i + 2 + i % 7]) for i in range(16)]
    encoded = tokenizer(texts)["input_ids"]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=24,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
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


def test_gradient_checkpointing_gives_the_same_gradients():
    batch = padded_batch(CONFIGS["modern"])
    gradients = []
    for checkpointed in (False, True):
        native = exported(make_model(CONFIGS["modern"]), EncoderkitForMaskedLM).train()
        if checkpointed:
            native.gradient_checkpointing_enable()
            assert native.encoder.blocks[0].gradient_checkpointing
        native(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in native.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients))


def test_fills_masks_in_a_pipeline(tokenizer):
    model = make_model(CONFIGS[CUSTOM])
    native = exported(model, EncoderkitForMaskedLM)
    filled = transformers.pipeline("fill-mask", model=native, tokenizer=tokenizer, top_k=3)("a b [MASK] d")
    ids = tokenizer("a b [MASK] d")["input_ids"]
    batch = TokenBatch.from_sequences([ids], targets=[{ids.index(tokenizer.mask_token_id): 0}])
    with torch.no_grad():
        best = model.logits(batch)[0].softmax(-1).topk(3)
    assert [answer["token"] for answer in filled] == best.indices.tolist()
    assert [answer["score"] for answer in filled] == pytest.approx(best.values.tolist(), rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "modern", CUSTOM])
def test_is_the_first_module_of_a_sentence_transformer(name, tmp_path, tokenizer):
    from sentence_transformers import SentenceTransformer, models

    from encoderkit.encoder.checkpoint import save

    model = make_model(CONFIGS[name])
    save(model, tmp_path / "encoder", tokenizer)
    first = models.Transformer(str(tmp_path / "encoder"))
    embedder = SentenceTransformer(modules=[first, models.Pooling(model.config.hidden_size, "mean")], device="cpu")
    texts = ["a b c d e f", "g", "h i j"]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    batch = TokenBatch.from_padded(encoded["input_ids"], encoded["attention_mask"])
    with torch.no_grad():
        means = [part.mean(0) for part in model.encoder(batch).split(batch.segments.lengths.tolist())]
    assert (embedder.encode(texts, convert_to_tensor=True) - torch.stack(means)).abs().max() < LOGITS_FP32
    embedder.save(str(tmp_path / "embedder"))
    again = SentenceTransformer(str(tmp_path / "embedder"), device="cpu")
    assert torch.equal(again.encode(texts, convert_to_tensor=True), embedder.encode(texts, convert_to_tensor=True))
