"""attn_implementation="encoderkit" against each model's own eager attention, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AttentionMaskInterface

from encoderkit.encoder import attention_interface
from encoderkit.encoder.attention_interface import Packing, attention, packing, register
from encoderkit.kernels.errors import InputError

FP32 = 2e-6  # absolute
FP64 = {"ModernBert": 1e-8, "EuroBert": 2e-6}  # their rotations, and the norms of the second, are fp32 in transformers
FP64_OTHERS = 1e-12

SMALL = {
    "vocab_size": 331,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 200,
    "pad_token_id": 0,
}
CONFIGS = {
    "Bert": transformers.BertConfig,
    "Roberta": transformers.RobertaConfig,
    "XLMRoberta": transformers.XLMRobertaConfig,
    "Electra": transformers.ElectraConfig,
    "DistilBert": transformers.DistilBertConfig,
    "ModernBert": transformers.ModernBertConfig,
    "EuroBert": transformers.EuroBertConfig,
}
OWN = {  # names and parts that differ
    "DistilBert": {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 96},
    "ModernBert": {"local_attention": 32, "global_attn_every_n_layers": 3},  # layers 1 and 2: |i - j| <= 16
    "EuroBert": {"num_key_value_heads": 2},  # two query heads share one of keys
}
DISTILBERT_NAMES = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}

register()


def make_model(name: str, attention: str = "encoderkit", **settings):
    shared = {key: value for key, value in SMALL.items() if name != "DistilBert" or key not in DISTILBERT_NAMES}
    config = CONFIGS[name](**{**shared, **OWN.get(name, {}), **settings})
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation=attention)
    with torch.no_grad():  # scores far enough from equal that a wrong mask shows
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def padded_batch(left: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = [120, 3, 57, 120]  # beyond ModernBERT's window on both sides
    mask_BL = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    if left:
        mask_BL = mask_BL.flip(1)
    ids_BL = torch.randint(5, 331, mask_BL.shape, generator=generator).masked_fill(~mask_BL, 0)
    return {"input_ids": ids_BL, "attention_mask": mask_BL.long()}


def one_by_one(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of all real tokens, without padding: beside it ModernBERT gives NaN in float64."""
    rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    return torch.cat([model(input_ids=row[None]).last_hidden_state[0] for row in rows])


@pytest.fixture(params=CONFIGS)
def name(request) -> str:
    return request.param


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_equals_eager_attention_beside_padding(name, left):
    model, eager = make_model(name), make_model(name, "eager")
    batch = padded_batch(left)
    real_BL = batch["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = model(**batch).last_hidden_state, eager(**batch).last_hidden_state
    assert (ours - theirs)[real_BL].abs().max() < FP32
    assert ours.isfinite().all()


def test_equals_unpadded_attention_in_float64(name):
    # sdpa, because the softmax of ModernBert's and EuroBert's eager attention is fp32
    model, exact = make_model(name).double(), make_model(name, "sdpa").double()
    batch = padded_batch()
    with torch.no_grad():
        ours = model(**batch).last_hidden_state[batch["attention_mask"].bool()]
        assert (ours - one_by_one(exact, batch)).abs().max() < FP64.get(name, FP64_OTHERS)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 120, dtype=torch.long)], ids=["no mask", "all ones"])
def test_equals_eager_attention_without_padding(name, mask):
    ids = padded_batch()["input_ids"][[0, 3]]
    with torch.no_grad():
        ours, theirs = (
            make_model(name, implementation)(input_ids=ids, attention_mask=mask).last_hidden_state
            for implementation in ("encoderkit", "eager")
        )
    assert (ours - theirs).abs().max() < FP32


def test_gradients_equal_those_of_eager_attention(name):
    batch = padded_batch()
    real_BL = batch["attention_mask"].bool()
    gradients = []
    for implementation in ("encoderkit", "eager"):
        model = make_model(name, implementation)
        model(**batch).last_hidden_state[real_BL].square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    ours, theirs = gradients
    largest = max(gradient.norm() for gradient in theirs.values())
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        # Key biases have gradient zero in exact arithmetic: what is left there is rounding, far below the others.
        assert (ours[key] - expected).norm() < FP32 * max(expected.norm(), 1e-3 * largest), key


def test_padding_would_be_ignored_without_the_mask_function(name, monkeypatch):
    model, batch = make_model(name), padded_batch()
    real_BL = batch["attention_mask"].bool()
    with torch.no_grad():
        right = model(**batch).last_hidden_state[real_BL]
        monkeypatch.delitem(AttentionMaskInterface._global_mapping, "encoderkit")
        wrong = model(**batch).last_hidden_state[real_BL] if name != "ModernBert" else None
        if wrong is None:  # its windows would be lost too, and that is seen
            with pytest.raises(InputError, match="sliding_window is 17, but the model's mask has no window"):
                model(**batch)
            return
    assert (right - wrong).abs().max() > 1e-2


def test_window_is_that_of_the_model():
    ids = padded_batch()["input_ids"][:1]
    model = make_model(
        "ModernBert", num_hidden_layers=2, global_attn_every_n_layers=99, layer_types=["sliding_attention"] * 2
    )
    other = ids.clone()
    other[0, 60] = 7
    with torch.no_grad():
        changed = (model(input_ids=ids).last_hidden_state - model(input_ids=other).last_hidden_state)[0].abs().amax(
            1
        ) > 0
    assert changed.nonzero().flatten().tolist() == list(range(60 - 32, 60 + 32 + 1))  # two layers of 16


@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLMRoberta", "Electra", "DistilBert", "ModernBert"])
def test_packed_row_equals_one_by_one(family, monkeypatch):
    read, make = [], attention_interface._row_segments
    monkeypatch.setattr(attention_interface, "_row_segments", lambda *row: read.append(row) or make(*row))
    model, eager, batch = make_model(family), make_model(family, "eager"), padded_batch()
    real_BL = batch["attention_mask"].bool()
    features = [{"input_ids": ids[mask].tolist()} for ids, mask in zip(batch["input_ids"], real_BL)]
    row = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features)
    row.pop("labels")
    if "Roberta" in family:  # which counts from behind the padding's id
        row["position_ids"] += 1 + model.config.pad_token_id
    with torch.no_grad():
        ours = model(**row).last_hidden_state[0]
        assert (ours - one_by_one(eager, batch)).abs().max() < FP32
    assert len(read) == (2 if family == "ModernBert" else 1)  # once for each attention span, not for each layer


def test_dropout_and_scale_reach_the_kernel(monkeypatch):
    seen = []

    def attend(q, k, v, mask, *, dropout_p, scale, backend, run=attention_interface.attend):
        seen.append((dropout_p, scale))
        return run(q, k, v, mask, dropout_p=dropout_p, scale=scale, backend=backend)

    monkeypatch.setattr(attention_interface, "attend", attend)
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.25}
    model, batch = make_model("Bert", **settings), padded_batch()
    real_BL = batch["attention_mask"].bool()
    with torch.no_grad():
        exact = model(**batch).last_hidden_state[real_BL]
        assert set(seen) == {(0.0, 0.25)}
        model.train()
        torch.manual_seed(1)
        seen.clear()
        first = model(**batch).last_hidden_state[real_BL]
        second = model(**batch).last_hidden_state[real_BL]
    assert set(seen) == {(0.25, 0.25)}
    assert (first - second).abs().max() > 1e-2
    assert ((first + second) / 2 - exact).norm() < (first - exact).norm()  # the draws spread around the exact result


def test_zeros_at_padding_and_no_weights():
    batch = padded_batch()
    where = packing(4, 120, 120, attention_mask=batch["attention_mask"].bool(), allow_is_bidirectional_skip=True)
    q, k, v = torch.randn(3, 4, 2, 120, 8).unbind(0)
    out, weights = attention(encoder_layer(), q, k, v, where)
    assert weights is None
    assert out.shape == (4, 120, 2, 8)
    assert (out[~batch["attention_mask"].bool()] == 0).all()
    expected = F.scaled_dot_product_attention(q[1:2, :, :3], k[1:2, :, :3], v[1:2, :, :3]).transpose(1, 2)
    assert (out[1:2, :3] - expected).abs().max() < FP32


def test_sequence_of_padding_alone_gives_zeros_and_finite_gradients():
    mask = torch.zeros(1, 5, dtype=torch.bool)
    where = packing(1, 5, 5, attention_mask=mask, allow_is_bidirectional_skip=True)
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    out, _ = attention(encoder_layer(), q, q, q, where)
    out.sum().backward()
    assert (out == 0).all()
    assert (q.grad == 0).all()


def encoder_layer(**attributes) -> torch.nn.Module:
    module = torch.nn.Module()
    vars(module).update({"is_causal": False, **attributes})
    return module


def refuse(message: str, module=None, key_length: int = 6, mask=None, rows: int = 1, **arguments) -> None:
    q = torch.randn(rows, 2, 6, 8)
    k = torch.randn(rows, 2, key_length, 8)
    if mask is None:
        mask = packing(rows, 6, 6, allow_is_bidirectional_skip=True)
    with pytest.raises(InputError, match=message):
        attention(module or encoder_layer(), q, k, k, mask, **arguments)


def test_what_is_not_served_is_refused_by_name():
    refuse("Module is causal", encoder_layer(is_causal=True))
    refuse("Module is causal", is_causal=True)
    refuse("6 queries for 7 keys", key_length=7)
    refuse(r"an attention mask of shape \(1, 1, 6, 6\)", mask=torch.zeros(1, 1, 6, 6))
    refuse("sliding_window is 3, but the model's mask has no window", sliding_window=3)
    for name in ("softcap", "position_bias", "s_aux", "head_mask"):
        refuse(f"{name} is given", **{name: torch.ones(2)})
    refuse("output_attentions is given", output_attentions=True)


def test_wrong_packed_rows_are_refused():
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    refuse("a batch of 2 rows; expected one flat row", rows=2, cu_seq_lens_q=starts)
    refuse("cu_seq_lens_k is given without cu_seq_lens_q", cu_seq_lens_k=starts)
    refuse("cu_seq_lens_k is not cu_seq_lens_q", cu_seq_lens_q=starts, cu_seq_lens_k=starts.flip(0))
    for wrong in ([0, 2, 5], [1, 2, 6], [0, 7, 6]):
        refuse(r"cu_seq_lens_q is \[.*\]; expected 0 up to 6", cu_seq_lens_q=torch.tensor(wrong))
    mask = torch.tensor([[True] * 5 + [False]])
    where = packing(1, 6, 6, attention_mask=mask, allow_is_bidirectional_skip=True)
    refuse("cu_seq_lens_q and an attention_mask with padding", mask=where, cu_seq_lens_q=starts)


def test_masks_that_are_not_served_are_refused():
    with pytest.raises(InputError, match="a causal or custom attention mask"):
        make_model("Bert", is_decoder=True)(**padded_batch())
    with pytest.raises(InputError, match=r"an attention mask of shape \(4, 1, 120, 120\)"):
        make_model("Bert")(input_ids=padded_batch()["input_ids"], attention_mask=torch.zeros(4, 1, 120, 120))
    with pytest.raises(InputError, match="1 queries for 6 keys"):
        packing(2, 1, 6, q_offset=5, allow_is_bidirectional_skip=True)
    with pytest.raises(InputError, match="output_attentions is given"):
        make_model("Bert")(**padded_batch(), output_attentions=True)
    holes = torch.tensor([[True, False, True]])
    with pytest.raises(InputError, match="padding between real tokens"):
        packing(1, 3, 3, attention_mask=holes, local_size=1, allow_is_bidirectional_skip=True)
    assert isinstance(packing(1, 3, 3, attention_mask=holes, allow_is_bidirectional_skip=True), Packing)


def test_holes_in_the_mask_equal_eager_attention():
    batch = padded_batch()
    batch["attention_mask"][:, 1:40:2] = 0
    real_BL = batch["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = (make_model("Bert", kind)(**batch).last_hidden_state for kind in ("encoderkit", "eager"))
    assert (ours - theirs)[real_BL].abs().max() < FP32


def test_gradient_checkpointing_gives_the_same_gradients():
    batch, gradients = padded_batch(), []
    for checkpointed in (False, True):
        model = make_model("ModernBert", attention_dropout=0.1).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(2)
        model(**batch).last_hidden_state.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["Bert", "ModernBert", "EuroBert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_eager_attention_on_the_gpu(family, dtype):
    batch = {key: value.cuda() for key, value in padded_batch().items()}
    real_BL = batch["attention_mask"].bool()
    with torch.no_grad():
        exact = one_by_one(make_model(family, "eager").double().cuda(), batch)
        errors = [
            (make_model(family, kind).to(dtype).cuda()(**batch).last_hidden_state[real_BL] - exact).abs().max()
            for kind in ("encoderkit", "eager")
        ]
    assert errors[0] < 2 * errors[1]
