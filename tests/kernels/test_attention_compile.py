"""Attention under torch.compile: one graph, no recompilation when lengths change, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from encoderkit.kernels import attention_op
from encoderkit.kernels.attention import AttentionMask, attend
from encoderkit.kernels.rotary import rotary_table, rotate
from encoderkit.kernels.segments import Segments

H, K, T = 2, 8, 48


class Block(nn.Module):
    """Rotary attention with a residual."""

    def __init__(self, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.dropout_p = nn.Linear(H * K, 3 * H * K), dropout_p

    def forward(self, x_TD, mask, rotation):
        q, k, v = rotate(self.qkv(x_TD).view(-1, 3, H, K), rotation, 2)
        if mask.queries is not None:
            q = q[: mask.queries.longest * len(mask.queries)]
        out = attend(q, k, v, mask, dropout_p=self.dropout_p, backend="torch").flatten(1)
        return x_TD[: len(out)] + out


def masks(kind: str) -> list[AttentionMask]:
    packings = [Segments.from_lengths(x, pad_to=6, longest=40) for x in ([8, 40], [16, 16, 16], [1, 2, 3, 30, 12])]
    if kind == "window":
        return [AttentionMask(segments, window_tokens=5) for segments in packings]
    if kind == "other queries":
        reads = [Segments.from_lengths(x, pad_to=6, longest=4) for x in ([4, 4], [4, 4, 4], [0, 2, 2, 4, 4])]
        return [AttentionMask(segments, read) for segments, read in zip(packings, reads)]
    if kind == "ALiBi":
        return [AttentionMask(segments, window_tokens=20, alibi_slopes=(0.5, 0.1)) for segments in packings]
    return [AttentionMask(segments) for segments in packings]


@pytest.mark.parametrize("kind", ["full", "window", "ALiBi"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_lengths_run_the_same_graph(kind, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    block, counter = Block(), CompileCounterWithBackend(backend)
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    rotation = rotary_table(T, K, 10_000.0, "cpu")
    for mask in masks(kind):
        x_TD = torch.randn(T, H * K, requires_grad=True)
        found, expected = compiled(x_TD, mask, rotation), block(x_TD, mask, rotation)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        weight = torch.randn_like(found)
        inputs = (x_TD, *block.parameters())
        for a, b in zip(*(torch.autograd.grad(out, inputs, weight) for out in (found, expected))):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_dropout_in_the_compiled_backward_is_that_of_the_forward():
    torch._dynamo.reset()
    mask = masks("full")[0]
    q, k, v = (torch.randn(T, H, K, dtype=torch.float64, requires_grad=True) for _ in range(3))
    function = torch.compile(
        lambda q, k, v: attend(q, k, v, mask, dropout_p=0.4, backend="torch"), backend="aot_eager", fullgraph=True
    )

    def loss(step: float) -> torch.Tensor:
        torch.manual_seed(5)
        return function(q, k + step, v * (1 + step)).sin().sum()

    _, dk, dv = torch.autograd.grad(loss(0.0), (q, k, v))
    slope = float((dk.sum() + (dv * v).sum()).detach())
    assert slope == pytest.approx(float((loss(1e-6) - loss(-1e-6)).detach()) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("kind", ["full", "window", "ALiBi", "other queries"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_operator_keeps_its_promises(kind, dropout_p):
    mask = masks(kind)[0]
    q, k, v = (torch.randn(n, H, K, requires_grad=True) for n in (mask.query_segments.total, T, T))
    read = mask.queries
    arguments = (
        *(q, k, v, mask.keys.lengths, mask.keys.cu_seqlens, mask.keys.longest),
        *((None, None, 0) if read is None else (read.lengths, read.cu_seqlens, read.longest)),
        *(mask.window_tokens, mask.alibi_slopes, dropout_p, torch.tensor(7) if dropout_p else None, K**-0.5, "torch"),
    )
    torch.library.opcheck(torch.ops.encoderkit.attend.default, arguments)


def test_operator_equals_eager_with_other_queries():
    mask = masks("other queries")[2]
    q, k, v = (torch.randn(n, H, K, requires_grad=True) for n in (12, T, T))
    results = []
    for out in (
        attention_op.attend(q, k, v, mask, 0.0, 0.3, "torch"),
        attend(q, k, v, mask, scale=0.3, backend="torch"),
    ):
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
