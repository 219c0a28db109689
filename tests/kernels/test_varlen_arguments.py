"""What varlen attention hands to torch's kernel, which itself runs on CUDA only."""

from __future__ import annotations

import pytest
import torch

from encoderkit.kernels import varlen_attention
from encoderkit.kernels.attention import AttentionMask, attend
from encoderkit.kernels.segments import Segments

S = Segments.from_lengths


def kernel_210(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """The 2.10 signature, computed by the reference."""
    return kernel_211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def kernel_211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """A later signature: window_size is (left, right), -1 for no limit."""
    queries, keys = S(cu_seq_q.diff(), longest=max_q), S(cu_seq_k.diff(), longest=max_k)
    assert window_size[0] == window_size[1]
    if window_size[0] >= 0:
        mask = AttentionMask(keys, window_tokens=window_size[0])
    else:
        mask = AttentionMask(keys, queries)
    return attend(query, key, value, mask, scale=scale, backend="reference")


MASKS = {
    "full": AttentionMask(S([5, 0, 9], longest=16)),
    "other queries": AttentionMask(S([5, 9]), S([2, 3])),
    "window": AttentionMask(S([5, 0, 9]), window_tokens=2),
    "wide window": AttentionMask(S([5, 9]), window_tokens=8),
}


@pytest.mark.parametrize("scale", [8**-0.5, 0.3])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kernel", [kernel_210, kernel_211])
def test_arguments_mean_what_the_mask_means(name, scale, kernel, monkeypatch):
    if kernel is kernel_210 and MASKS[name].window is not None:
        pytest.skip("torch 2.10 has no windows; unavailable says so")
    monkeypatch.setattr(varlen_attention, "varlen_attn", kernel)
    names = {"scale", "window_size"} if kernel is kernel_211 else {"is_causal"}
    monkeypatch.setattr(varlen_attention, "OPTIONS", frozenset(names))
    sizes = (MASKS[name].query_segments.total, MASKS[name].keys.total, MASKS[name].keys.total)
    q, k, v = (torch.randn(n, 2, 8, dtype=torch.float64) for n in sizes)
    found = varlen_attention.attend(q, k, v, MASKS[name], 0.0, scale)
    torch.testing.assert_close(found, attend(q, k, v, MASKS[name], scale=scale, backend="reference"))


def test_dropout_is_an_error_not_ignored():
    q = torch.zeros(14, 2, 8)
    with pytest.raises(ValueError, match="no dropout"):
        varlen_attention.attend(q, q, q, MASKS["full"], 0.1, 1.0)
