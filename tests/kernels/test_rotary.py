"""Rotary embedding against transformers."""

from __future__ import annotations

import pytest
import torch

from encoderkit.kernels.rotary import _rotate_plain, apply_rotary, rotary_tables

T, H, K = 13, 3, 16


def tables():
    return rotary_tables(T, K, 10_000.0, "cpu")


def test_tables_and_rotation_equal_transformers():
    modern = pytest.importorskip("transformers.models.modernbert.modeling_modernbert")
    from transformers import ModernBertConfig

    config = ModernBertConfig(hidden_size=H * K, num_attention_heads=H, num_hidden_layers=1)
    rotary = modern.ModernBertRotaryEmbedding(config)
    kind = config.layer_types[0]
    base = config.rope_parameters[kind]["rope_theta"]
    q, k = torch.randn(2, 1, H, T, K).unbind(0)
    cos, sin = rotary(q, torch.arange(T)[None], kind)
    expected, _ = modern.apply_rotary_pos_emb(q, k, cos, sin)
    found = apply_rotary(q[0].transpose(0, 1), *rotary_tables(T, K, base, "cpu")).transpose(0, 1)
    torch.testing.assert_close(found, expected[0], rtol=0, atol=2e-6)


def test_eager_equals_the_formula_and_its_gradient():
    x = torch.randn(T, H, K, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(T, H, K, dtype=torch.float64)
    for a, b in zip(*((f(x, *tables()), *torch.autograd.grad(f(x, *tables()), x, weight)) for f in FUNCTIONS)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


FUNCTIONS = (apply_rotary, _rotate_plain)


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, K, dtype=torch.float64).expand(2, T, 1, K).unbind(0)
    q, k = (apply_rotary(x, *(t.double() for t in tables()))[:, 0] for x in (q, k))
    scores = q @ k.T
    torch.testing.assert_close(scores[2, 5], scores[7, 10], rtol=0, atol=1e-5)  # angles are fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept_and_rounded_once(dtype):
    whole = torch.randn(T, 3, H, K).to(dtype)
    x = whole[:, 1]  # a strided view, as the projection gives it
    found = apply_rotary(x, *tables())
    assert found.dtype == dtype
    assert found.is_contiguous()
    exact = apply_rotary(x.double(), *tables())
    step = torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert bool(((found.double() - exact).abs() <= step).all())
