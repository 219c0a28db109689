"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout of transformers.

P positions, T tokens, H heads, K head size
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(
    max_positions: int, head_size: int, base: float, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * base^(-2i / K): two (P, K / 2) fp32 tensors."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64, device=device).float() / head_size
    angles_PR = torch.outer(torch.arange(max_positions, device=device).float(), 1.0 / base**exponents)
    return angles_PR.cos(), angles_PR.sin()


def apply_rotary(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + K/2]) of every head by its token's angle i, computed in fp32.

    x_THK: (T, H, K). cos_TR, sin_TR: (T, K / 2) fp32. Returns (T, H, K) in the dtype of x.
    """
    first, second = x_THK.float().chunk(2, dim=-1)
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_THK.dtype)
