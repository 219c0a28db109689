"""AdamW for everything, or Muon for the blocks' matrices with AdamW for the rest.

AdamW: Loshchilov and Hutter 2019 (arXiv:1711.05101). Muon: see encoderkit.pretrain.muon.
"""

from __future__ import annotations

import torch
from torch import nn

from encoderkit.pretrain.muon import Muon
from encoderkit.pretrain.settings import Optimizer


def build_optimizers(
    model: nn.Module, settings: Optimizer, *, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Optimizers over all trained parameters. Norms and biases are not decayed.

    dtype: of Muon's matrix products; state and updates are fp32.
    """
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            plain.append(parameter)
        elif settings.name == "muon" and "encoder.blocks." in name:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        optimizers.append(Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay, dtype=dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Give each group this share of its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
