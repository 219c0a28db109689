"""Rotary embedding against transformers."""

from __future__ import annotations

import pytest
import torch

from encoderkit.kernels.rotary import _rotate_plain, rotary_table, rotate

T, H, K = 13, 3, 16


def table():
    return rotary_table(T, K, 10_000.0, "cpu")


def pairs_to_halves(x):
    """From pairs side by side to transformers' two half heads."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def test_table_and_rotation_equal_transformers():
    modern = pytest.importorskip("transformers.models.modernbert.modeling_modernbert")
    from transformers import ModernBertConfig

    config = ModernBertConfig(hidden_size=H * K, num_attention_heads=H, num_hidden_layers=1)
    rotary = modern.ModernBertRotaryEmbedding(config)
    kind = config.layer_types[0]
    base = config.rope_parameters[kind]["rope_theta"]
    qkv_TNHK = torch.randn(T, 3, H, K)
    cos, sin = rotary(qkv_TNHK, torch.arange(T)[None], kind)
    theirs = (pairs_to_halves(qkv_TNHK[:, i]).transpose(0, 1)[None] for i in range(2))
    expected = modern.apply_rotary_pos_emb(*theirs, cos, sin)
    *found, v_THK = rotate(qkv_TNHK, rotary_table(T, K, base, "cpu"), 2)
    for ours, their in zip(found, expected, strict=True):
        torch.testing.assert_close(pairs_to_halves(ours).transpose(0, 1), their[0], rtol=0, atol=2e-6)
    assert torch.equal(v_THK, qkv_TNHK[:, 2])


@pytest.mark.parametrize(("parts", "count"), [(3, 2), (2, 1), (1, 1)])
def test_eager_equals_the_formula_and_its_gradient(parts, count):
    x = torch.randn(T, parts, H, K, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(parts, T, H, K, dtype=torch.float64)
    eager, plain = rotate(x, table(), count), _rotate_plain(x, table(), count)
    assert len(eager) == len(plain) == parts
    for outs in zip(eager, plain):
        torch.testing.assert_close(*outs, rtol=0, atol=1e-12)
    spread = [weight.transpose(0, 2).contiguous().transpose(0, 2) for weight in weights]  # gradients of any strides
    for given in (list(weights), spread):
        grads = (torch.autograd.grad(outs, x, given, retain_graph=True)[0] for outs in (eager, plain))
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, K, dtype=torch.float64).expand(2, T, 1, K).unbind(0)
    q, k = (part[:, 0] for part in rotate(torch.stack([q, k], 1), table(), 2))
    scores = q @ k.T
    torch.testing.assert_close(scores[2, 5], scores[7, 10], rtol=0, atol=1e-5)  # angles are fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept_and_rounded_once(dtype):
    x = torch.randn(T, 3, H, K).to(dtype)
    found, exact = rotate(x, table(), 2), rotate(x.double(), table(), 2)
    for ours, expected in zip(found, exact):
        assert ours.dtype == dtype
        step = torch.finfo(dtype).eps * expected.abs() + 1e-6
        assert bool(((ours.double() - expected).abs() <= step).all())
