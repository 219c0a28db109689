"""Adam with steps that are bounded a tensor at a time: StableAdamW and LAMB.

Not those of pytorch_optimizer 4.1: they count steps on the host, so that a step which the device leaves out would be
counted, and take norms of the rows that a rank holds for norms of a sharded tensor.

n parameters of a group
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from encoderkit.pretrain.muon import local_part


@dataclass
class _Step:
    """Of a group: its parameters, and what this rank holds of each."""

    parameters: list[Tensor]
    mine: list[Tensor]
    directions: tuple[Tensor, ...]  # mean / (root + eps)
    sizes: tuple[Tensor, ...]  # of the gradients
    roots: tuple[Tensor, ...]  # of the mean squares
    lr: Tensor  # (), 0 where the step is left out
    weight_decay: float
    eps: float


class _Adaptive(torch.optim.Optimizer, ABC):
    """Adam's moments; a subclass says how large the step is, and with it the decoupled weight decay.

    Gradients are whole or in rows as fully_shard leaves them. found_inf: set from outside as on torch's fused
    optimizers, a () tensor; where it is 1, step() changes nothing, and nobody waits for the device to know.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step(parameters, group)

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                begin = {name: torch.zeros_like(parameter) for name in ("mean", "square")}
                self.state[parameter].update(begin, updates=torch.zeros((), device=parameter.device))
        means, squares = ([local_part(self.state[p][name]) for p in parameters] for name in ("mean", "square"))
        updates = [self.state[parameter]["updates"] for parameter in parameters]
        gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
        squared = list(torch._foreach_mul(gradients, gradients))
        applied = torch.ones((), device=updates[0].device)
        if self.found_inf is not None:
            gradients = [torch.where(self.found_inf > 0, m, g) for m, g in zip(means, gradients)]
            squared = [torch.where(self.found_inf > 0, s, g) for s, g in zip(squares, squared)]
            applied = 1 - self.found_inf
        torch._foreach_lerp_(means, gradients, 1 - group["betas"][0])
        torch._foreach_lerp_(squares, squared, 1 - group["betas"][1])
        torch._foreach_add_(updates, applied)
        count_n = torch.stack(updates).clamp(min=1)
        share_n, square_share_n = (-torch.expm1(count_n * math.log(max(beta, 1e-30))) for beta in group["betas"])
        roots = torch._foreach_sqrt(torch._foreach_div(squares, square_share_n.unbind()))
        directions = torch._foreach_div(means, share_n.unbind())
        torch._foreach_div_(directions, torch._foreach_add(roots, group["eps"]))
        mine, sizes = [local_part(parameter) for parameter in parameters], torch._foreach_sqrt(squared)
        lr = applied * group["lr"]
        self._apply(_Step(parameters, mine, directions, sizes, roots, lr, group["weight_decay"], group["eps"]))

    @abstractmethod
    def _apply(self, step: _Step) -> None:
        """Change step.mine."""


class StableAdamW(_Adaptive):
    """AdamW that is slowed down where gradients are larger than expected.

    u = mean / (root + eps), rms^2 = mean of (g / max(root, eps))^2 over the tensor, w <- w - lr / max(1, rms) (u +
    weight_decay w); mean and root with Adam's bias correction. Wortsman et al. 2023 (arXiv:2304.13013), algorithm 2.
    """

    def _apply(self, step: _Step) -> None:
        surprise = torch._foreach_div(step.sizes, torch._foreach_clamp_min(step.roots, step.eps))
        lengths = [math.sqrt(parameter.numel()) for parameter in step.parameters]
        rms = torch._foreach_div(_whole_norms(surprise, step.parameters).unbind(), lengths)
        rate_n = step.lr / torch.stack(rms).clamp(min=1)
        torch._foreach_mul_(step.mine, (1 - rate_n * step.weight_decay).unbind())
        torch._foreach_sub_(step.mine, torch._foreach_mul(step.directions, rate_n.unbind()))


class Lamb(_Adaptive):
    """Adam whose step is as long as lr times the matrix that it changes.

    u = mean / (root + eps) + weight_decay w, w <- w - lr |w| / |u| u; 1 for |w| / |u| where either is 0, and for norms
    and biases, as in the authors' code. You et al. 2020 (arXiv:1904.00962), algorithm 2.
    """

    def _apply(self, step: _Step) -> None:
        torch._foreach_add_(step.directions, step.mine, alpha=step.weight_decay)
        norm_n, step_n = (_whole_norms(part, step.parameters) for part in (step.mine, step.directions))
        rate_n = step.lr * torch.where((norm_n > 0) & (step_n > 0), norm_n / step_n, 1.0)
        rates = [rate if p.ndim > 1 else step.lr for p, rate in zip(step.parameters, rate_n.unbind())]
        torch._foreach_sub_(step.mine, torch._foreach_mul(step.directions, rates))


def _whole_norms(mine: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """(n,) norms of tensors of which this rank holds as much as of these parameters."""
    square_n = torch.stack(torch._foreach_norm(tuple(mine))).square()
    if isinstance(parameters[0], DTensor):
        dist.all_reduce(square_n, group=parameters[0].device_mesh.get_group())
    return square_n.sqrt()
