"""Packed attention in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from encoderkit.kernels.attention_mask import AttentionMask, Request
from encoderkit.kernels import reference_attention


def unavailable(request: Request) -> str | None:
    """Why this kernel cannot serve, or None."""
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout_p: float, scale: float) -> Tensor:
    return reference_attention.attend(q, k, v, mask, dropout_p, scale)
