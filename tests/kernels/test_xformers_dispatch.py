"""xformers' public function with operators of our own that run on the CPU: our masks are what xformers understands."""

from __future__ import annotations

import contextlib

import pytest
import torch

from encoderkit.kernels import xformers_attention
from encoderkit.kernels.attention import AttentionMask, attend
from encoderkit.kernels.reference_attention import visible
from encoderkit.kernels.segments import Segments

fmha = pytest.importorskip("xformers.ops.fmha")
common = pytest.importorskip("xformers.ops.fmha.common")

H, K = 2, 8
S = Segments.from_lengths
MASKS = {
    "self": AttentionMask(S([5, 9, 1])),
    "empty": AttentionMask(S([5, 0, 9], pad_to=6, longest=16)),
    "other queries": AttentionMask(S([5, 9, 4]), S([2, 3, 1])),
}


class _OnCPU:
    OPERATOR = staticmethod(lambda: None)
    SUPPORTED_DEVICES = frozenset({"cpu"})
    SUPPORTED_DTYPES = frozenset({torch.float32, torch.float64})
    SUPPORTED_MAX_K = 256
    SUPPORTED_ATTN_BIAS_TYPES = (fmha.attn_bias.BlockDiagonalMask,)
    SUPPORTS_DROPOUT = False
    SUPPORTS_CUSTOM_SCALE = True

    @classmethod
    def is_available(cls):
        return True


def _weights(inputs):
    bias = inputs.attn_bias.materialize(
        (1, H, inputs.query.shape[1], inputs.key.shape[1]), dtype=inputs.query.dtype, device=inputs.query.device
    )
    return ((torch.einsum("bqhd,bkhd->bhqk", inputs.query, inputs.key) * inputs.scale_float) + bias).softmax(-1)


class Forward(_OnCPU, common.AttentionFwOpBase):
    """softmax(q k' + materialised bias) v."""

    NAME = "cpuF"

    @classmethod
    def apply(cls, inp, needs_gradient):
        out = torch.einsum("bhqk,bkhd->bqhd", _weights(inp), inp.value)
        lse = torch.zeros(1, H, inp.query.shape[1], dtype=inp.query.dtype)
        return out, common.Context(out=out, lse=lse) if needs_gradient else None


class Backward(_OnCPU, common.AttentionBwOpBase):
    """Its gradient, written out."""

    NAME = "cpuB"

    @classmethod
    def apply(cls, ctx, inp, grad):
        weights = _weights(inp)
        dweights = torch.einsum("bqhd,bkhd->bhqk", grad, inp.value)
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * inp.scale_float
        return common.Gradients(
            dq=torch.einsum("bhqk,bkhd->bqhd", dscores, inp.key),
            dk=torch.einsum("bhqk,bqhd->bkhd", dscores, inp.query),
            dv=torch.einsum("bhqk,bqhd->bkhd", weights, grad),
        )


@pytest.mark.parametrize("name", MASKS)
def test_block_diagonal_shows_what_the_mask_shows(name):
    mask = MASKS[name]
    shape = (mask.query_segments.total, mask.keys.total)
    assert torch.equal(xformers_attention.block_diagonal(mask).materialize(shape) == 0, visible(mask))


@pytest.mark.parametrize("name", MASKS)
def test_block_diagonal_equals_the_public_constructor(name):
    mask = MASKS[name]
    lengths = mask.query_segments.lengths.tolist(), mask.keys.lengths.tolist()
    public = fmha.attn_bias.BlockDiagonalMask.from_seqlens(*lengths, device=torch.device("cpu"))
    ours = xformers_attention.block_diagonal(mask)
    for a, b in ((ours.q_seqinfo, public.q_seqinfo), (ours.k_seqinfo, public.k_seqinfo)):
        assert a.seqstart_py == b.seqstart_py
        assert torch.equal(a.seqstart, b.seqstart)
        assert a.min_seqlen == b.min_seqlen
        assert a.max_seqlen >= b.max_seqlen


@pytest.mark.parametrize("name", MASKS)
def test_public_function_equals_reference(name):
    mask, scale = MASKS[name], 0.4
    sizes = (mask.query_segments.total, mask.keys.total, mask.keys.total)
    q, k, v = (torch.randn(n, H, K, dtype=torch.float64, requires_grad=True) for n in sizes)
    found = xformers_attention.attend(q, k, v, mask, 0.0, scale, op=(Forward, Backward))
    expected = attend(q, k, v, mask, scale=scale, backend="reference")
    weight = torch.randn_like(found)
    for a, b in zip(*((out, *torch.autograd.grad(out, (q, k, v), weight)) for out in (found, expected))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_dropout_is_seeded_on_the_device_of_the_queries(monkeypatch):
    calls = []

    class Device(contextlib.nullcontext):
        def __enter__(self):
            calls.append(self.enter_result)

    names = ("get_rng_state", "manual_seed", "set_rng_state")
    for name in names:
        monkeypatch.setattr(torch.cuda, name, lambda *given, name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "device", Device)
    second = torch.device("cuda:1")
    with xformers_attention._drawing(3, 0.1, second):
        assert calls == ["get_rng_state", second, "manual_seed"]
    assert calls[-1] == "set_rng_state"


def test_compiled_path_equals_reference(monkeypatch):
    """forward and gradients without autograd, through xformers' dispatch with our operators in its lists."""
    monkeypatch.setattr(fmha, "_dispatch_fw", lambda inp, needs_gradient: Forward)
    monkeypatch.setattr(fmha, "_dispatch_bw", lambda inp, varlen_lse_packed: Backward)
    mask = MASKS["other queries"]
    q, k, v = (torch.randn(n, H, K, dtype=torch.float64, requires_grad=True) for n in (6, 18, 18))
    expected = attend(q, k, v, mask, backend="reference")
    grad = torch.randn_like(expected)
    found = xformers_attention.forward(q.detach(), k.detach(), v.detach(), mask, 0.0, K**-0.5, 0)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)
    grads = xformers_attention.gradients(grad, q.detach(), k.detach(), v.detach(), mask, 0.0, K**-0.5, 0)
    for a, b in zip(grads, torch.autograd.grad(expected, (q, k, v), grad)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
