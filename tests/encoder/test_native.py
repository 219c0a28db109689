"""Parity with transformers: logits, gradients and folders, both ways."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.checkpoint import load, load_classifier, save, save_classifier, untrained_classifier
from encoderkit.encoder.config import preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.errors import InputError

LOGITS_FP32 = 2e-6  # absolute
LOGITS_FP64 = {"bert": 1e-12, "modern": 1e-8}  # ModernBERT's rotary tables are fp32 in transformers
GRADIENTS = 2e-6  # relative L2

SMALL = {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "intermediate_size": 96, "max_positions": 200}


def make_model(architecture: str) -> MaskedLM:
    torch.manual_seed(0)
    model = MaskedLM(preset(architecture, "tiny", vocab_size=331, **SMALL)).eval()
    with torch.no_grad():  # every bias and norm away from its trivial start
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padded_batch(vocab: int = 331) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = [160, 3, 57, 129]  # beyond the local window of 64 on both sides
    mask_BL = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    ids_BL = torch.randint(5, vocab, mask_BL.shape, generator=generator).masked_fill(~mask_BL, 0)
    return ids_BL, mask_BL.long()


@pytest.fixture(params=["bert", "modern"])
def architecture(request):
    return request.param


@pytest.fixture
def folder_and_model(architecture, tmp_path):
    model = make_model(architecture)
    save(model, tmp_path / "model")
    return tmp_path / "model", model


def test_saved_folder_gives_transformers_logits(folder_and_model, architecture):
    folder, model = folder_and_model
    native = transformers.AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids_BL, mask_BL = padded_batch()
    batch = TokenBatch.from_padded(ids_BL, mask_BL)
    with torch.no_grad():
        theirs = native(ids_BL, attention_mask=mask_BL).logits[mask_BL.bool()]
        assert (model.logits(batch) - theirs).abs().max() < LOGITS_FP32
        # In float64 transformers gives NaN for padding farther from the text than the window: one by one.
        model.double(), native.double()
        rows = zip(ids_BL, mask_BL.sum(1).tolist())
        theirs = torch.cat([native(ids[None, :length]).logits[0] for ids, length in rows])
        assert (model.logits(batch) - theirs).abs().max() < LOGITS_FP64[architecture]


def test_gradients_equal_transformers(folder_and_model):
    folder, model = folder_and_model
    native = transformers.AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids_BL, mask_BL = padded_batch()
    picked = (ids_BL % 5 == 0) & mask_BL.bool()
    labels_BL = ids_BL.masked_fill(~picked, -100)
    logits = native(ids_BL, attention_mask=mask_BL).logits
    F.cross_entropy(logits.flatten(0, 1), labels_BL.flatten(), ignore_index=-100, reduction="sum").backward()

    lengths = mask_BL.sum(1).tolist()
    sequences = [row[:n] for row, n in zip(ids_BL.tolist(), lengths)]
    targets = [{p: t for p, t in enumerate(row[:n]) if t != -100} for row, n in zip(labels_BL.tolist(), lengths)]
    batch = TokenBatch.from_sequences(sequences, targets=targets)
    result = model(batch)
    assert result.count == picked.sum()
    result.loss.backward()
    probe = MaskedLM(model.config)
    probe.load_state_dict({name: p.grad for name, p in model.named_parameters()})
    save(probe, folder.parent / "gradients")
    theirs = dict(native.named_parameters())
    ours = dict(transformers.AutoModelForMaskedLM.from_pretrained(folder.parent / "gradients").named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        difference = (ours[name] - parameter.grad).norm()
        # Key biases have gradient zero in exact arithmetic: what is left there is rounding, far below the others.
        assert difference <= GRADIENTS * max(parameter.grad.norm(), 1e-3 * model.decoder_bias.grad.norm()), name


def test_load_reads_back_what_save_wrote(folder_and_model):
    folder, model = folder_and_model
    again = load(folder)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        vocab = model.config.vocab_size
        expected = tensor[:vocab] if name.endswith("tokens.weight") else tensor
        assert torch.equal(again.state_dict()[name][: len(expected)], expected), name


def test_folder_holds_no_padding_rows_and_no_code(folder_and_model):
    folder, model = folder_and_model
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == 331
    assert "auto_map" not in config
    assert model.encoder.embeddings.tokens.num_embeddings == 384
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_transformers_checkpoint_loads_with_equal_logits(architecture, tmp_path):
    name = {"bert": "BertForMaskedLM", "modern": "ModernBertForMaskedLM"}[architecture]
    config_class = {"bert": transformers.BertConfig, "modern": transformers.ModernBertConfig}[architecture]
    torch.manual_seed(3)
    config = config_class(
        vocab_size=331, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, pad_token_id=0
    )
    native = getattr(transformers, name)(config).eval()
    native.save_pretrained(tmp_path)
    ids_BL, mask_BL = padded_batch()
    with torch.no_grad():
        theirs = native(ids_BL, attention_mask=mask_BL).logits[mask_BL.bool()]
        ours = load(tmp_path).logits(TokenBatch.from_padded(ids_BL, mask_BL))
    assert (ours - theirs).abs().max() < LOGITS_FP32


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_classifier_folder_gives_transformers_logits(pooling, folder_and_model, architecture):
    folder, _ = folder_and_model
    if architecture == "bert" and pooling == "mean":
        with pytest.raises(InputError, match="the bert architecture pools the first token"):
            load_classifier(folder, ["no", "yes"], pooling=pooling)
        return
    classifier = load_classifier(folder, ["no", "maybe", "yes"], seed=5, pooling=pooling)
    save_classifier(classifier, folder.parent / "classifier")
    native = transformers.AutoModelForSequenceClassification.from_pretrained(folder.parent / "classifier").eval()
    assert native.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    ids_BL, mask_BL = padded_batch()
    batch = TokenBatch.from_sequences([row[:n] for row, n in zip(ids_BL.tolist(), mask_BL.sum(1).tolist())])
    again = load_classifier(folder.parent / "classifier")
    assert again.labels == ["no", "maybe", "yes"]
    with torch.no_grad():
        theirs = native(ids_BL, attention_mask=mask_BL).logits
        assert (classifier(batch) - theirs).abs().max() < LOGITS_FP32
        assert torch.equal(again(batch), classifier(batch))


def test_fresh_head_depends_on_the_seed_alone(folder_and_model):
    folder, model = folder_and_model
    torch.manual_seed(1)
    first = load_classifier(folder, ["a", "b"], seed=5)
    torch.manual_seed(2)
    assert torch.equal(first.classifier.weight, load_classifier(folder, ["a", "b"], seed=5).classifier.weight)
    assert not torch.equal(first.classifier.weight, load_classifier(folder, ["a", "b"], seed=6).classifier.weight)
    tokens = untrained_classifier(model.config, ["a", "b"], seed=5).encoder.embeddings.tokens.weight
    assert not torch.equal(tokens, first.encoder.embeddings.tokens.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; expected 'gelu'"),
        ({"model_type": "gpt2"}, "model type 'gpt2'; expected bert or modernbert"),
    ],
)
def test_unknown_architecture_is_refused_by_name(change, message, tmp_path):
    save(make_model("bert"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_missing_folder_is_told(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        load(tmp_path / "nothing")


def test_missing_weights_are_told(tmp_path):
    import safetensors.torch as st

    save(make_model("bert"), tmp_path)
    weights = st.load_file(tmp_path / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    st.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no weights for encoder.blocks.1.feed_forward.down.weight"):
        load(tmp_path)
