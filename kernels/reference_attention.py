"""Attention written out: the oracle that every other kernel is tested against.

For one query q, softmax attention is the Nadaraya-Watson regression (Nadaraya 1964, Watson 1964) of the values at
q: sum_j kernel(q, k_j) v_j / sum_j kernel(q, k_j), with the learned kernel exp(q.k / sqrt(K)).

Tq queries, Tk keys, H heads, K head size
"""

from __future__ import annotations

import torch
from torch import Tensor

from encoderkit.kernels.attention_mask import AttentionMask, Request


def unavailable(request: Request) -> str | None:
    """Why this kernel cannot serve, or None."""
    return None


def visible(mask: AttentionMask) -> Tensor:
    """(Tq, Tk) bool on the CPU: whether query i sees key j."""
    visible_QK = mask.query_segments.ids()[:, None] == mask.keys.ids()[None, :]
    if mask.window_tokens is not None:
        visible_QK &= _distance(mask) <= mask.window_tokens
    return visible_QK


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout_p: float, scale: float) -> Tensor:
    """Softmax attention over a whole (Tq, Tk) matrix, in the dtype of q.

    q: (Tq, H, K). k, v: (Tk, H, K). Returns (Tq, H, K), zero where a query sees no key.
    """
    visible_QK = visible(mask).to(q.device)
    scores_HQK = torch.einsum("qhd,khd->hqk", q, k) * scale
    if mask.alibi_slopes is not None:
        slopes_H = torch.tensor(mask.alibi_slopes, dtype=torch.float64)
        scores_HQK = scores_HQK - (slopes_H[:, None, None] * _distance(mask)).to(scores_HQK)
    # The finite floor keeps a query without keys free of NaN, forward and backward; its weights are zeroed below.
    scores_HQK = scores_HQK.masked_fill(~visible_QK, torch.finfo(q.dtype).min)
    weights_HQK = scores_HQK.softmax(-1).masked_fill(~visible_QK, 0.0)
    weights_HQK = torch.nn.functional.dropout(weights_HQK, dropout_p)
    return torch.einsum("hqk,khd->qhd", weights_HQK, v)


def _distance(mask: AttentionMask) -> Tensor:
    """(T, T) int64 on the CPU: tokens from query i to key j, of use inside a sequence."""
    position_T = torch.arange(mask.keys.total)
    return (position_T[:, None] - position_T[None, :]).abs()
