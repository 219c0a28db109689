"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout of transformers.

P positions, T tokens, H heads, K head size, R = K / 2 angles of a token
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary_tables(max_positions: int, head_size: int, base: float, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position / base^(2i / K) for i < K / 2: two (P, K / 2) fp32 tensors."""
    exponents_R = torch.arange(0, head_size, 2, dtype=torch.int64, device=device).float() / head_size
    angles_PR = torch.outer(torch.arange(max_positions, device=device).float(), 1.0 / base**exponents_R)
    return angles_PR.cos(), angles_PR.sin()


def apply_rotary(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + K/2]) of every head by its token's angle i.

    x_THK: (T, H, K). cos_TR, sin_TR: (T, K / 2) fp32, without gradient. Computed in fp32, in float64 where x is.
    Returns (T, H, K) in the dtype of x.
    """
    if torch.compiler.is_compiling():
        return _rotate_plain(x_THK, cos_TR, sin_TR)
    return _Rotate.apply(x_THK, cos_TR, sin_TR)


class _Rotate(torch.autograd.Function):
    """The transpose of a rotation is the rotation back, so nothing but the angles is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        return _rotate_eager(x_THK, cos_TR, sin_TR, 1.0)

    @staticmethod
    def backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor, None, None]:
        cos_TR, sin_TR = ctx.saved_tensors
        return _rotate_eager(grad_THK, cos_TR, sin_TR, -1.0), None, None


def _rotate_eager(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor, sign: float) -> Tensor:
    """The formula in fewer passes over memory, and with nothing for autograd to keep."""
    wide_THK = x_THK.to(torch.promote_types(x_THK.dtype, torch.float32))
    cos_T1R, sin_T1R = (table.to(wide_THK.dtype).unsqueeze(1) for table in (cos_TR, sin_TR))
    R = cos_TR.shape[1]
    first_THR, second_THR = wide_THK[..., :R], wide_THK[..., R:]
    out_THK = torch.empty(wide_THK.shape, dtype=wide_THK.dtype, device=wide_THK.device)
    torch.mul(first_THR, cos_T1R, out=out_THK[..., :R]).addcmul_(second_THR, sin_T1R, value=-sign)
    torch.mul(second_THR, cos_T1R, out=out_THK[..., R:]).addcmul_(first_THR, sin_T1R, value=sign)
    return out_THK.to(x_THK.dtype)


def _rotate_plain(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """The formula as it is; a compiler fuses it into one pass."""
    first, second = x_THK.to(torch.promote_types(x_THK.dtype, torch.float32)).chunk(2, dim=-1)
    cos_T1R, sin_T1R = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    rotated = torch.cat([first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R], dim=-1)
    return rotated.to(x_THK.dtype)
