"""Our encoders as Hugging Face models: equal logits and gradients for every choice of every axis."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
import transformers

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.checkpoint import save_classifier
from encoderkit.encoder.classifier import SequenceClassifier, SpanClassifier
from encoderkit.encoder.config import EncoderConfig, LocalAttention, RopeScaling, preset
from encoderkit.encoder.configuration_encoderkit import CHOICES, EncoderkitConfig
from encoderkit.encoder.hub import from_hub_config, to_hub_config
from encoderkit.encoder.model import MaskedLM
from encoderkit.encoder.modeling_encoderkit import (
    EncoderkitForMaskedLM,
    EncoderkitForMultipleChoice,
    EncoderkitForPreTraining,
    EncoderkitForQuestionAnswering,
    EncoderkitForSequenceClassification,
    EncoderkitForTokenClassification,
)

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
    "ntk rope": make_config("modern", rope_scaling=RopeScaling(factor=4.0), local_attention=WINDOW, pooling="cls"),
    "rope, all local": make_config(
        "modern",
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
    masked = F.cross_entropy(result.prediction_logits.flatten(0, 1), batch["input_ids"].flatten())
    pairs = F.cross_entropy(result.seq_relationship_logits, torch.tensor([0, 1, 0, 1, 0]))
    torch.testing.assert_close(result.loss, masked + pairs)
    with pytest.raises(ValueError, match="sentence_pairs is false"):
        EncoderkitForPreTraining(to_hub_config(CONFIGS[CUSTOM]))


def make_task_model(kind, config=CONFIGS["modern"]):
    torch.manual_seed(0)
    return kind._from_config(to_hub_config(config)).eval()


def test_token_loss_is_the_mean_over_the_labelled():
    batch = padded_batch(CONFIGS["modern"])
    labels_BL = (batch["input_ids"] % 2).masked_fill(batch["input_ids"] % 3 > 0, -100)
    result = make_task_model(EncoderkitForTokenClassification)(**batch, labels=labels_BL)
    asked_BL = labels_BL != -100
    torch.testing.assert_close(result.loss, F.cross_entropy(result.logits[asked_BL], labels_BL[asked_BL]))


def test_choice_loss_is_over_the_choices_of_a_question():
    batch = {name: part[[0, 1, 2, 4]].unflatten(0, (2, 2)) for name, part in padded_batch(CONFIGS["modern"]).items()}
    result = make_task_model(EncoderkitForMultipleChoice)(**batch, labels=torch.tensor([1, 0]))
    assert result.logits.shape == (2, 2)
    torch.testing.assert_close(result.loss, F.cross_entropy(result.logits, torch.tensor([1, 0])))


def test_span_loss_is_that_of_transformers(tmp_path):
    """Answers behind the end do not count, and labels may be (B, 1)."""
    torch.manual_seed(0)
    ours = SpanClassifier(CONFIGS["bert"], ["start", "end"])
    L = 40
    batch = {"input_ids": torch.randint(5, VOCAB, (4, L))}
    starts_B, ends_B = torch.tensor([5, 1, L, 3]), torch.tensor([9, 2, L + 7, 4])
    losses = []
    for format in ("native", "code"):
        save_classifier(ours, tmp_path / format, format=format)
        model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / format).eval()
        result = model(**batch, start_positions=starts_B[:, None], end_positions=ends_B[:, None])
        losses.append(result.loss)
    assert type(model) is EncoderkitForQuestionAnswering
    torch.testing.assert_close(*losses)
    inside = starts_B < L
    by_hand = [F.cross_entropy(result.start_logits[inside], starts_B[inside])]
    by_hand += [F.cross_entropy(result.end_logits[inside], ends_B[inside])]
    torch.testing.assert_close(losses[1], sum(by_hand) / 2)


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
