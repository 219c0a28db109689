"""Softmax attention inside each packed sequence, by one of several kernels.

A kernel is a module with `unavailable(request)`, the reason why it cannot serve or None, and `attend`. BACKENDS is the
only list of them; select_backend chooses at start-up, attend runs the chosen one.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from encoderkit.kernels import (
    attention_op,
    reference_attention,
    torch_attention,
    varlen_attention,
    xformers_attention,
)
from encoderkit.kernels.attention_mask import AttentionMask, BackendUnavailable, Request

__all__ = ["BACKENDS", "AttentionMask", "BackendUnavailable", "Choice", "attend", "select_backend"]

# In the order in which "auto" asks them; reference serves only who names it.
BACKENDS: dict[str, ModuleType] = {
    "xformers": xformers_attention,
    "varlen": varlen_attention,
    "torch": torch_attention,
    "reference": reference_attention,
}


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
    alibi: bool = False,
) -> Choice:
    """Resolve "auto", or check that a named backend can serve.

    device, dtype: of q, k and v. head_size: K. window: a sliding window. dropout: on attention weights.
    deterministic: equal bits in every run, backward included. alibi: slopes on distances. Raises BackendUnavailable,
    saying why.
    """
    request = Request(device, dtype, head_size, window, dropout, deterministic, alibi)
    if name == "auto":
        passed: list[str] = []
        for candidate, module in BACKENDS.items():
            reason = module.unavailable(request)
            if reason is None:
                return Choice(candidate, "; ".join(passed) or "first choice on this device")
            passed.append(f"not {candidate}: {reason}")
    if name not in BACKENDS:
        raise BackendUnavailable(f"attention backend is {name!r}; expected auto or one of {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unavailable(request)
    if reason is not None:
        raise BackendUnavailable(f"attention backend {name} cannot serve here: {reason}; or use auto")
    return Choice(name, "as configured")


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
    """Softmax attention inside each packed sequence.

    q: (Tq, H, K). k, v: (Tk, H, K), the dtype of q. mask: who sees whom. dropout_p: 0.0 outside training. scale: of
    q.k before the softmax, 1 / sqrt(K) unless given. backend: a name that select_backend returned. Returns (Tq, H, K),
    zero where a query sees no key. Packing follows Krell et al. 2021, arXiv:2107.02027.
    """
    if mask.alibi_slopes is not None and len(mask.alibi_slopes) != q.shape[1]:
        raise ValueError(f"{len(mask.alibi_slopes)} ALiBi slopes for {q.shape[1]} heads; expected one of each head")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shapes_only = torch.compiler.is_compiling() or isinstance(q, FakeTensor)
    if shapes_only and backend in attention_op.KERNELS:
        return attention_op.attend(q, k, v, mask, dropout_p, scale, backend)
    return BACKENDS[backend].attend(q, k, v, mask, dropout_p, scale)
