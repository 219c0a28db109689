"""One of AdamW, StableAdamW and LAMB for everything, or Muon for the blocks' matrices with AdamW for the rest.

AdamW: Loshchilov and Hutter 2019 (arXiv:1711.05101). The others: see encoderkit.pretrain.adaptive and .muon.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from encoderkit.encoder.layers import Attention
from encoderkit.pretrain.adaptive import Lamb, StableAdamW
from encoderkit.pretrain.muon import Muon
from encoderkit.pretrain.settings import TaskOptimizer

_ADAMW = partial(torch.optim.AdamW, fused=True)
# What trains all that Muon does not, by optimizer.name.
FAMILY: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _ADAMW,
    "muon": _ADAMW,
    "stable_adamw": StableAdamW,
    "lamb": Lamb,
}


def build_optimizers(
    model: nn.Module,
    settings: TaskOptimizer,
    *,
    dtype: torch.dtype = torch.float32,
    rate: Callable[[str], float] = lambda name: 1.0,
) -> list[torch.optim.Optimizer]:
    """Optimizers over all trained parameters. Norms and biases are not decayed.

    dtype: of Muon's matrix products; state and updates are fp32. Muon takes queries, keys and values head by
    head: as good a token (pretrain/recipes), and a quarter of its work less at 4 x 256. rate: what the learning rates
    of settings are multiplied by for the parameter of a name.
    """
    heads = {
        id(module.qkv.weight): (module.head_size, module.qkv.in_features)
        for module in model.modules()
        if isinstance(module, Attention)
    }
    matrices: dict[tuple[tuple[int, int] | None, float], list[nn.Parameter]] = {}
    decayed: dict[float, list[nn.Parameter]] = {}
    plain: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            plain.setdefault(rate(name), []).append(parameter)
        elif settings.name == "muon" and "encoder.blocks." in name:
            matrices.setdefault((heads.get(id(parameter)), rate(name)), []).append(parameter)
        else:
            decayed.setdefault(rate(name), []).append(parameter)
    first = FAMILY[settings.name](
        [
            {"params": params, "weight_decay": decay, "lr": settings.lr * share}
            for parts, decay in ((decayed, settings.weight_decay), (plain, 0.0))
            for share, params in parts.items()
        ],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
    )
    optimizers = [first]
    if matrices:
        of_block = [
            {"params": params, "block": block, "lr": settings.muon_lr * share}
            for (block, share), params in matrices.items()
        ]
        optimizers.append(Muon(of_block, lr=settings.muon_lr, weight_decay=settings.weight_decay, dtype=dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Give each group this share of its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def skip_where(found_inf: torch.Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    """Make the next steps change nothing where found_inf () is 1; the device decides, and nobody waits for it."""
    for optimizer in optimizers:
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # torch's fused optimizers and ours read it


def keep_gradients(model: nn.Module) -> None:
    """Give every trained parameter a gradient of zeros, to which backward passes add in place.

    Without, the first one of a step leaves its own tensor there, and a CUDA graph writes over that in the next.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
