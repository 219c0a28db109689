"""The slopes of ALiBi, and what they do to scores."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from encoderkit.kernels.alibi import alibi_slopes
from encoderkit.kernels.attention import AttentionMask, attend
from encoderkit.kernels.segments import Segments

S = Segments.from_lengths


@pytest.mark.parametrize(
    ("num_heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (3, [4, 8, 2]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
        (16, [i / 2 for i in range(1, 17)]),
    ],
)
def test_slopes_are_the_published_ones(num_heads, exponents):
    assert alibi_slopes(num_heads) == tuple(2**-exponent for exponent in exponents)


def test_no_heads_have_no_slopes():
    with pytest.raises(ValueError, match="num_heads is 0"):
        alibi_slopes(0)


@pytest.mark.parametrize("window", [None, 3])
def test_reference_takes_slope_times_distance_from_the_scaled_score(window):
    lengths, slopes, scale = [5, 0, 9], (0.5, 0.03), 0.7
    q, k, v = torch.randn(3, sum(lengths), 2, 4, dtype=torch.float64)
    found = attend(q, k, v, AttentionMask(S(lengths), None, window, slopes), scale=scale, backend="reference")
    for i, h in itertools.product(range(sum(lengths)), range(2)):
        own = [j for j in (range(5) if i < 5 else range(5, 14)) if window is None or abs(i - j) <= window]
        weights = [math.exp(scale * float(q[i, h] @ k[j, h]) - slopes[h] * abs(i - j)) for j in own]
        expected = sum(weight * v[j, h] for weight, j in zip(weights, own)) / sum(weights)
        torch.testing.assert_close(found[i, h], expected, rtol=0, atol=1e-12)


def test_slopes_need_queries_and_keys_of_the_same_tokens():
    with pytest.raises(ValueError, match="ALiBi needs queries and keys of the same tokens"):
        AttentionMask(S([4]), S([2]), alibi_slopes=(0.5,))


def test_as_many_slopes_as_heads_are_expected():
    q = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="1 ALiBi slopes for 2 heads"):
        attend(q, q, q, AttentionMask(S([4]), alibi_slopes=(0.5,)), backend="torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_keys_of_a_steep_head_get_no_weight_instead_of_a_subnormal_one(dtype):
    mask = AttentionMask(S([300]), alibi_slopes=(0.5,))
    q, v = torch.zeros(300, 1, 300, dtype=dtype), torch.eye(300, dtype=dtype)[:, None].contiguous()
    weights = attend(q, q, v, mask, backend="torch")[:, 0]  # outputs are the weights themselves
    if dtype == torch.float32:
        assert not ((weights > 0) & (weights < torch.finfo(dtype).tiny)).any()
    distance = (torch.arange(300)[:, None] - torch.arange(300)).abs()
    expected = (-0.5 * distance.double()).softmax(-1)
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-7 if dtype == torch.float32 else 2e-3)
