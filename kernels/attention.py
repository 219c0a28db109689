"""Softmax attention inside each packed sequence, through one of several kernels.

A kernel is a module with `unavailable(request)`, the reason why it cannot serve or None, and `attend`. BACKENDS is the
only list of them; select_backend chooses at start-up, attend runs the chosen one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from encoderkit.kernels import reference_attention, torch_attention
from encoderkit.kernels.attention_mask import AttentionMask, BackendUnavailable, Request

__all__ = ["BACKENDS", "AttentionMask", "BackendUnavailable", "Choice", "attend", "select_backend"]

BACKENDS = {"torch": torch_attention, "reference": reference_attention}


class Choice(NamedTuple):
    """The backend that will run, and why."""

    name: str
    reason: str


def select_backend(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    window: bool,
    dropout: bool,
    deterministic: bool = False,
) -> Choice:
    """Resolve "auto" or check a named backend."""
    request = Request(device, dtype, head_size, window, dropout, deterministic)
    del request
    return Choice("torch", "serves everything")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str,
) -> Tensor:
    """Softmax attention inside each packed sequence."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[backend].attend(q, k, v, mask, dropout_p, scale)
