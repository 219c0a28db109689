"""Parity with transformers: logits, hidden states, gradients and folders, both ways."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.checkpoint import (
    load,
    load_classifier,
    load_encoder,
    save,
    save_classifier,
    untrained_classifier,
)
from encoderkit.encoder.classifier import ChoiceClassifier
from encoderkit.encoder.config import RopeScaling, preset
from encoderkit.encoder.hub import to_hub_config
from encoderkit.encoder.model import MaskedLM
from encoderkit.encoder.modeling_encoderkit import EncoderkitForMultipleChoice
from encoderkit.encoder.native import to_native_config
from encoderkit.kernels.errors import InputError

LOGITS_FP32 = 2e-6  # absolute
LOGITS_FP64 = {"bert": 1e-12, "roberta": 1e-12, "modern": 1e-8}  # ModernBERT's rotary tables are fp32 in transformers
GRADIENTS, GRADIENTS_BF16 = 2e-6, 0.03  # relative L2

SMALL = {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "intermediate_size": 96, "max_positions": 200}
ALL_BIASES = ("norm", "attention", "feed_forward", "head", "decoder")
# Everything that a native class can express, and other sizes.
VARIANTS = {
    "bert": {},
    "bert-wide": {"hidden_size": 96, "num_layers": 2, "num_heads": 6, "intermediate_size": 200},
    "bert-tanh-untied": {"tied_decoder": False, "feed_forward": "gelu_tanh", "head_activation": "gelu_tanh"},
    "bert-pairs": {"sentence_pairs": True},
    "roberta": {"pad_token_id": 1},
    "roberta-untied": {"pad_token_id": 3, "tied_decoder": False, "token_types": 2},
    "modern": {},
    "modern-wide": {"hidden_size": 96, "num_layers": 7, "num_heads": 3, "intermediate_size": 128},
    "modern-swiglu-biases": {"feed_forward": "swiglu", "biases": ALL_BIASES, "head_activation": "gelu_tanh"},
    "modern-untied-no-bias": {"tied_decoder": False, "biases": (), "global_every": 2},
    "modern-local-linear": {"global_every": 0, "window_tokens": 20},
    "modern-global-ntk": {"global_every": 1, "rope_scaling": RopeScaling(kind="ntk", factor=4.0)},
    "modern-linear": {"rope_scaling": RopeScaling(kind="linear", factor=2.0), "local_rope_base": 5_000.0},
}


def make_model(variant: str) -> MaskedLM:
    torch.manual_seed(0)
    fields = {**SMALL, **VARIANTS[variant]}
    model = MaskedLM(preset(variant.partition("-")[0], "tiny", vocab_size=331, **fields)).eval()
    with torch.no_grad():  # every bias and norm away from its trivial start
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padded_batch(pad_token_id: int = 0, vocab: int = 331) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = [160, 3, 57, 129]  # beyond the local window of 64 on both sides
    mask_BL = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    ids_BL = torch.randint(5, vocab, mask_BL.shape, generator=generator).masked_fill(~mask_BL, pad_token_id)
    return ids_BL, mask_BL.long()


@pytest.fixture(params=list(VARIANTS))
def variant(request):
    return request.param


@pytest.fixture
def folder_and_model(variant, tmp_path):
    model = make_model(variant)
    save(model, tmp_path / "model", format="native")
    return tmp_path / "model", model


def open_native(folder, model):
    make = transformers.AutoModelForPreTraining if model.config.sentence_pairs else transformers.AutoModelForMaskedLM
    return make.from_pretrained(folder, attn_implementation="eager").eval()


def token_logits(output):
    return output.prediction_logits if "prediction_logits" in output else output.logits


def test_saved_folder_gives_transformers_logits(folder_and_model):
    folder, model = folder_and_model
    native = open_native(folder, model)
    ids_BL, mask_BL = padded_batch(model.config.pad_token_id)
    batch = TokenBatch.from_padded(ids_BL, mask_BL)
    with torch.no_grad():
        theirs = token_logits(native(ids_BL, attention_mask=mask_BL))[mask_BL.bool()]
        assert (model.logits(batch) - theirs).abs().max() < LOGITS_FP32
        # In float64 transformers gives NaN for padding farther from the text than the window: one by one.
        model.double(), native.double()
        rows = zip(ids_BL, mask_BL.sum(1).tolist())
        theirs = torch.cat([token_logits(native(ids[None, :length]))[0] for ids, length in rows])
        assert (model.logits(batch) - theirs).abs().max() < LOGITS_FP64[model.config.architecture]


def test_hidden_states_equal_transformers(folder_and_model):
    folder, model = folder_and_model
    native = open_native(folder, model)
    ids_BL, mask_BL = padded_batch(model.config.pad_token_id)
    seen = []
    for block in model.encoder.blocks[:-1]:
        block.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        last = model.encoder(TokenBatch.from_padded(ids_BL, mask_BL))
        theirs = native.base_model(ids_BL, attention_mask=mask_BL, output_hidden_states=True)
    assert len(theirs.hidden_states) == model.config.num_layers + 1
    seen = [hidden[: len(last)] for hidden in seen]  # pad tokens follow
    for ours, hidden in zip([*seen, last], [*theirs.hidden_states[1:-1], theirs.last_hidden_state], strict=True):
        scale = max(1.0, float(hidden[mask_BL.bool()].abs().max()))  # pre-norm states grow with depth
        assert (ours - hidden[mask_BL.bool()]).abs().max() < LOGITS_FP32 * scale


def test_sentence_pair_logits_equal_transformers(tmp_path):
    model = make_model("bert-pairs")
    save(model, tmp_path)
    native = open_native(tmp_path, model)
    ids_BL, mask_BL = padded_batch()
    types_BL = (torch.arange(ids_BL.shape[1]) > 30).long() * mask_BL
    lengths = mask_BL.sum(1).tolist()
    rows, types = ([row[:n] for row, n in zip(part.tolist(), lengths)] for part in (ids_BL, types_BL))
    with torch.no_grad():
        ours = model.pair_logits(TokenBatch.from_sequences(rows, token_types=types))
        theirs = native(ids_BL, attention_mask=mask_BL, token_type_ids=types_BL).seq_relationship_logits
        assert (ours - theirs).abs().max() < LOGITS_FP32
        ours = model.double().pair_logits(TokenBatch.from_sequences(rows, token_types=types))
        theirs = native.double()(ids_BL, attention_mask=mask_BL, token_type_ids=types_BL).seq_relationship_logits
    assert (ours - theirs).abs().max() < LOGITS_FP64["bert"]


POSITIONS = "roberta.embeddings.position_embeddings.weight"  # padding has one of its own there, which text never has


def both_gradients(folder, model, *, bf16: bool = False):
    """Of our parameters under our names; and ours and transformers' under its names. bf16: our products are."""
    native = open_native(folder, model)
    ids_BL, mask_BL = padded_batch(model.config.pad_token_id)
    picked = (ids_BL % 5 == 0) & mask_BL.bool()
    labels_BL = ids_BL.masked_fill(~picked, -100)
    logits = token_logits(native(ids_BL, attention_mask=mask_BL))
    F.cross_entropy(logits.flatten(0, 1), labels_BL.flatten(), ignore_index=-100, reduction="sum").backward()

    lengths = mask_BL.sum(1).tolist()
    sequences = [row[:n] for row, n in zip(ids_BL.tolist(), lengths)]
    targets = [{p: t for p, t in enumerate(row[:n]) if t != -100} for row, n in zip(labels_BL.tolist(), lengths)]
    batch = TokenBatch.from_sequences(sequences, targets=targets)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        result = model(batch)
    assert result.count == picked.sum()
    result.loss.backward()
    probe = MaskedLM(model.config)
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    probe.load_state_dict(grads)
    save(probe, folder.parent / "gradients")
    theirs = dict(native.named_parameters())
    ours = dict(open_native(folder.parent / "gradients", model).named_parameters())
    assert ours.keys() == theirs.keys()
    used = {name: p.grad for name, p in theirs.items() if p.grad is not None}
    return grads, {name: ours[name].detach() for name in used}, used


def test_gradients_equal_transformers(folder_and_model):
    folder, model = folder_and_model
    grads, ours, theirs = both_gradients(folder, model)
    for name, gradient in theirs.items():
        if name != POSITIONS:
            # Key biases have gradient zero in exact arithmetic: what is left there is rounding, far below the others.
            scale = max(gradient.norm(), 1e-3 * grads["head.dense.weight"].norm())
            assert (ours[name] - gradient).norm() <= GRADIENTS * scale, name
    if POSITIONS in theirs:
        positions = theirs[POSITIONS][model.config.pad_token_id + 1 :]
        assert (grads["encoder.positions.table.weight"] - positions).norm() <= GRADIENTS * positions.norm()


def test_gradients_in_bf16_are_near_those_of_transformers(folder_and_model):
    """All of them end to end, with products in bf16 here and in fp32 there."""
    _, ours, theirs = both_gradients(*folder_and_model, bf16=True)
    first, second = (
        torch.cat([gradient.flatten() for name, gradient in part.items() if name != POSITIONS])
        for part in (ours, theirs)
    )
    error = (first - second).norm() / second.norm()
    assert 100 * GRADIENTS < error < GRADIENTS_BF16


def test_load_reads_back_what_save_wrote(folder_and_model):
    folder, model = folder_and_model
    again = load(folder)
    if model.config.rope_scaling is None or model.config.rope_scaling.kind == "linear":
        scheme = {"init": again.config.init}  # how weights once began is not in a folder
        assert again.config == dataclasses.replace(model.config, **scheme)
    for name, tensor in model.state_dict().items():
        vocab = model.config.vocab_size
        expected = tensor[:vocab] if name in ("encoder.embeddings.tokens.weight", "decoder.weight") else tensor
        assert torch.equal(again.state_dict()[name][: len(expected)], expected), name
    batch = TokenBatch.from_padded(*padded_batch(model.config.pad_token_id))
    with torch.no_grad():
        assert torch.equal(again.logits(batch), model.logits(batch))
    save(again, folder.parent / "again")
    first, second = (safetensors.torch.load_file(f / "model.safetensors") for f in (folder, folder.parent / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_folder_holds_no_padding_rows_and_no_code(folder_and_model):
    folder, model = folder_and_model
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == 331
    assert "auto_map" not in config
    assert model.encoder.embeddings.tokens.num_embeddings == 384
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_folder_with_code_reads_back_whole(variant, tmp_path):
    model = make_model(variant)
    save(model, tmp_path, format="code")
    again = load(tmp_path)
    assert again.config == model.config
    assert all(
        torch.equal(again.state_dict()[name], tensor)
        for name, tensor in model.state_dict().items()
        if name not in ("encoder.embeddings.tokens.weight", "decoder.weight")
    )  # padding rows are not saved
    batch = TokenBatch.from_padded(*padded_batch(model.config.pad_token_id))
    with torch.no_grad():
        assert torch.equal(again.logits(batch), model.logits(batch))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("Bert", "BertForMaskedLM"),
        ("Bert", "BertForPreTraining"),
        ("Roberta", "RobertaForMaskedLM"),
        ("XLMRoberta", "XLMRobertaForMaskedLM"),
        ("ModernBert", "ModernBertForMaskedLM"),
    ],
)
@pytest.mark.parametrize("shared_weights", [True, False], ids=["tied", "untied"])
def test_transformers_checkpoint_loads_with_equal_logits(family, name, shared_weights, tmp_path):
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=331,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        pad_token_id=1,
        tie_word_embeddings=shared_weights,
    )
    native = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    native.save_pretrained(tmp_path)
    ids_BL, mask_BL = padded_batch(pad_token_id=1)
    ours = load(tmp_path)
    assert (ours.pair_classifier is not None) == (name == "BertForPreTraining")
    with torch.no_grad():
        theirs = token_logits(native(ids_BL, attention_mask=mask_BL))[mask_BL.bool()]
        assert (ours.logits(TokenBatch.from_padded(ids_BL, mask_BL)) - theirs).abs().max() < LOGITS_FP32


@pytest.mark.parametrize("family", ["Bert", "Roberta", "ModernBert"])
def test_encoder_without_a_prediction_head_loads(family, tmp_path):
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = getattr(transformers, f"{family}Config")(vocab_size=331, pad_token_id=1, **sizes)
    native = getattr(transformers, f"{family}Model")(config).eval()
    native.save_pretrained(tmp_path)
    ids_BL, mask_BL = padded_batch(pad_token_id=1)
    with torch.no_grad():
        theirs = native(ids_BL, attention_mask=mask_BL).last_hidden_state[mask_BL.bool()]
        ours = load_encoder(tmp_path)(TokenBatch.from_padded(ids_BL, mask_BL))
    assert (ours - theirs).abs().max() < LOGITS_FP32
    with pytest.raises(InputError, match=r"no weights for (decoder_bias|head\.dense\.weight)"):
        load(tmp_path)
    a, b, c = (load(tmp_path, head_seed=seed).head.dense.weight for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLMRoberta"])
@pytest.mark.parametrize("format", ["native", "code"])
def test_pooler_without_a_sentence_pair_head_is_kept(family, format, tmp_path):
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    native = getattr(transformers, f"{family}Model")(
        getattr(transformers, f"{family}Config")(vocab_size=331, pad_token_id=1, **sizes)
    ).eval()
    native.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs", head_seed=1)
    save(ours, tmp_path / "ours", format=format)
    again = load(tmp_path / "ours")
    assert (again.config.pooler, again.config.sentence_pairs) == (True, False)
    assert torch.equal(again.pooler.dense.weight, native.pooler.dense.weight)
    assert torch.equal(again.pooler.dense.bias, native.pooler.dense.bias)
    assert torch.equal(load_classifier(tmp_path / "theirs", ["a"], ChoiceClassifier).pooler.dense.weight,
                       load_classifier(tmp_path / "ours", ["a"], ChoiceClassifier).pooler.dense.weight)  # fmt: skip
    if format == "native":
        ids_BL, mask_BL = padded_batch(pad_token_id=1)
        written = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
        with torch.no_grad():
            pooled, expected = (model(ids_BL, attention_mask=mask_BL).pooler_output for model in (written, native))
        assert (pooled - expected).abs().max() < LOGITS_FP32
        named = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"]
        assert named == [f"{family.removeprefix('XLM')}ForMaskedLM"]
        assert transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours") is not None


@pytest.mark.parametrize(
    ("variant", "pooling"), [("bert", "cls"), ("roberta", "cls"), ("modern", "cls"), ("modern", "mean")]
)
def test_classifier_folder_gives_transformers_logits(folder_and_model, pooling):
    folder, model = folder_and_model
    classifier = load_classifier(folder, ["no", "maybe", "yes"], seed=5, pooling=pooling)
    save_classifier(classifier, folder.parent / "classifier", format="native")
    native = transformers.AutoModelForSequenceClassification.from_pretrained(folder.parent / "classifier").eval()
    assert native.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    ids_BL, mask_BL = padded_batch(model.config.pad_token_id)
    batch = TokenBatch.from_sequences([row[:n] for row, n in zip(ids_BL.tolist(), mask_BL.sum(1).tolist())])
    again = load_classifier(folder.parent / "classifier")
    assert again.labels == ["no", "maybe", "yes"]
    with torch.no_grad():
        theirs = native(ids_BL, attention_mask=mask_BL).logits
        assert (classifier(batch) - theirs).abs().max() < LOGITS_FP32
        assert torch.equal(again(batch), classifier(batch))


@pytest.mark.parametrize("format", ["native", "code"])
def test_classifier_starts_from_a_pooler(format, tmp_path):
    model, without = make_model("bert-pairs"), make_model("bert")
    save(model, tmp_path / "with", format=format)
    assert torch.equal(load_classifier(tmp_path / "with", ["a", "b"]).pooler.dense.weight, model.pooler.dense.weight)
    save(without, tmp_path / "without", format=format)
    fresh = load_classifier(tmp_path / "without", ["a", "b"])
    assert not torch.equal(fresh.pooler.dense.weight, without.head.dense.weight)
    save_classifier(fresh, tmp_path / "classifier", format=format)
    again = load(tmp_path / "classifier", head_seed=3)
    assert not torch.equal(again.head.dense.weight, fresh.pooler.dense.weight)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("bert", {"positions": "alibi"}, "model.positions is 'alibi'; bert has 'learned'"),
        ("modern", {"norm": "rmsnorm"}, "model.norm is 'rmsnorm'; modern has 'layernorm'"),
        ("roberta", {"sentence_pairs": True}, "model.sentence_pairs is True; roberta has False"),
        ("bert", {"token_types": 0}, "model.token_types is 0; bert has some"),
    ],
)
def test_what_no_native_class_has_is_named(architecture, fields, message, tmp_path):
    model = MaskedLM(preset(architecture, "tiny", vocab_size=331, **{**SMALL, **fields}))
    with pytest.raises(InputError, match=message):
        save(model, tmp_path / "folder", format="native")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("kind", ["native", "code"])
def test_choice_models_that_note_two_labels_have_one_score(kind, tmp_path):
    torch.manual_seed(0)
    config = preset("bert", "tiny", vocab_size=331, **SMALL)
    if kind == "native":
        native = transformers.BertForMultipleChoice(to_native_config(config))
    else:
        native = EncoderkitForMultipleChoice(to_hub_config(config))
    assert native.config.num_labels == 2
    native.eval().save_pretrained(tmp_path)
    ours = load_classifier(tmp_path, kind=ChoiceClassifier)
    ids_BL = torch.randint(5, 331, (3, 20))
    with torch.no_grad():
        scores_S1 = ours(TokenBatch.from_sequences(ids_BL.tolist()))
        assert (scores_S1 - native(ids_BL[None]).logits.T).abs().max() < LOGITS_FP32


@pytest.mark.parametrize("variant", ["modern"])
def test_fresh_weights_seed_no_gpu(folder_and_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    folder, model = folder_and_model
    load(folder)
    untrained_classifier(model.config, ["a", "b"], seed=5)


@pytest.mark.parametrize("variant", ["modern"])
def test_fresh_head_depends_on_the_seed_alone(folder_and_model):
    folder, model = folder_and_model
    torch.manual_seed(1)
    first = load_classifier(folder, ["a", "b"], seed=5)
    torch.manual_seed(2)
    assert torch.equal(first.classifier.weight, load_classifier(folder, ["a", "b"], seed=5).classifier.weight)
    assert not torch.equal(first.classifier.weight, load_classifier(folder, ["a", "b"], seed=6).classifier.weight)
    tokens = untrained_classifier(model.config, ["a", "b"], seed=5).encoder.embeddings.tokens.weight
    assert not torch.equal(tokens, first.encoder.embeddings.tokens.weight)
