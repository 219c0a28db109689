"""Muon: momentum whose matrices are made orthogonal before they are applied.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), sized as in Liu et al. 2025 (arXiv:2502.16982); the orthogonal
factor by the polynomials of Amsel et al. 2025 (Polar Express, arXiv:2505.16932, algorithm 1). Not torch.optim.Muon:
that uses one polynomial for all five iterations and learns less from as many tokens (pretrain/recipes), and takes
the matrices one at a time.

n matrices of one shape or blocks of them, A rows, B columns; W ranks, s matrices each, C rows of each matrix on a rank
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

# a x + b x^3 + c x^5 of each iteration, made for singular values from 1e-3 to 1; without the last, each is shrunk a
# little in use, so that rounding to bf16 never leaves the interval.
_POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
_SHRINK = 1.01


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay; for matrices only.

    lr: in units of AdamW's update size: an update's root mean square is 0.2 lr. dtype: of the matrix products.
    block: (rows, columns) of the parts of a matrix that are made orthogonal each on its own, None for whole matrices;
    a group may have its own. Gradients are those of all ranks, whole as DistributedDataParallel leaves them or in
    rows as fully_shard does; the ranks share the work. found_inf: set from outside as on torch's fused optimizers, a
    () tensor; where it is 1, step() changes nothing, and nobody waits for the device to know.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        block: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "block": block})
        self._dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon trains matrices; got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update to every matrix that has a gradient."""
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    of_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in of_shape.values():
                self._step(matrices, **{k: group[k] for k in ("lr", "weight_decay", "momentum", "block")})

    def _step(
        self, matrices: list[Tensor], *, lr: float, weight_decay: float, momentum: float, block: tuple[int, int] | None
    ) -> None:
        """matrices: of one shape, so that all are orthogonalised at once."""
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        whole = matrices[0]
        mine = [local_part(matrix) for matrix in matrices]
        gradients = [local_part(matrix.grad) for matrix in matrices if matrix.grad is not None]
        momenta = [local_part(self.state[matrix]["momentum"]) for matrix in matrices]
        applied: Tensor | float = 1.0
        if self.found_inf is not None:
            gradients = [torch.where(self.found_inf > 0, m, g) for m, g in zip(momenta, gradients)]
            applied = 1 - self.found_inf
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        directions = torch.stack(torch._foreach_lerp(gradients, momenta, momentum))
        block = block or (whole.shape[0], whole.shape[1])
        polar = partial(polar_factor, dtype=self._dtype)
        if isinstance(whole, DTensor):
            compute = partial(_by_blocks, polar, block=block)
            updates = _exchange_rows(compute, directions, whole.shape[0], whole.device_mesh.get_group())
        else:
            updates = _by_blocks(partial(_share_out, polar), directions, block=block)
        updates = updates.to(directions.dtype) * applied
        torch._foreach_mul_(mine, 1 - lr * weight_decay * applied)
        torch._foreach_add_(mine, updates.unbind(), alpha=-0.2 * lr * math.sqrt(max(block)))


def local_part(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this rank holds, in the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _by_blocks(compute: Callable[[Tensor], Tensor], x_nAB: Tensor, *, block: tuple[int, int]) -> Tensor:
    """compute, on all blocks of all matrices at once."""
    rows, columns = block
    blocks = x_nAB.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
    factors = compute(blocks.flatten(0, 2))
    return factors.unflatten(0, blocks.shape[:3]).transpose(2, 3).reshape(x_nAB.shape)


def _share_out(compute: Callable[[Tensor], Tensor], x_nAB: Tensor) -> Tensor:
    """compute(x), each rank taking its share of the n matrices, which are the same on all ranks."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks == 1:
        return compute(x_nAB)
    share = -(-len(x_nAB) // ranks)
    mine = torch.arange(share, device=x_nAB.device) + share * dist.get_rank()
    part = compute(x_nAB[mine.clamp(max=len(x_nAB) - 1)]).contiguous()  # ranks beyond the last repeat it
    whole = part.new_empty(share * ranks, *part.shape[1:])
    dist.all_gather_into_tensor(whole, part)
    return whole[: len(x_nAB)]


def _exchange_rows(compute: Callable[[Tensor], Tensor], mine: Tensor, A: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of compute(x), from its rows of the n matrices: each rank gets its share of them whole.

    Rows are cut as torch.chunk does, so the last ranks may have fewer or none.
    """
    ranks, n = dist.get_world_size(group), len(mine)
    share, rows = -(-n // ranks), -(-A // ranks)
    padded = F.pad(mine, (0, 0, 0, rows - mine.shape[1], 0, share * ranks - n))
    x_WsCB = torch.empty_like(padded)
    dist.all_to_all_single(x_WsCB, padded, group=group)
    x_sAB = x_WsCB.unflatten(0, (ranks, share)).transpose(0, 1).flatten(1, 2)[:, :A]
    factors_sAB = F.pad(compute(x_sAB), (0, 0, 0, rows * ranks - A))
    sent_WsCB = factors_sAB.unflatten(1, (ranks, rows)).transpose(0, 1).flatten(0, 1).contiguous()
    received = torch.empty_like(sent_WsCB)
    dist.all_to_all_single(received, sent_WsCB, group=group)
    return received[:n, : mine.shape[1]]


def polar_factor(matrices_nAB: Tensor, *, dtype: torch.dtype) -> Tensor:
    """About U V' of each matrix U S V', computed and returned in this dtype; bf16 is accurate enough.

    Singular values of 1e-3 and more of a matrix's Frobenius norm come out within 0.2 of 1, smaller ones below.
    """
    tall = matrices_nAB.shape[1] > matrices_nAB.shape[2]
    x_nAB = matrices_nAB.mT if tall else matrices_nAB
    norm_n11 = torch.linalg.matrix_norm(x_nAB, keepdim=True) * _SHRINK
    x_nAB = (x_nAB / norm_n11.clamp(min=torch.finfo(torch.float32).tiny)).to(dtype)
    for i, (a, b, c) in enumerate(_POLYNOMIALS):
        shrink = _SHRINK if i < len(_POLYNOMIALS) - 1 else 1.0
        gram_nAA = torch.bmm(x_nAB, x_nAB.mT)
        # Faster on a CPU than baddbmm, which copies what it adds to.
        scale_nAA = torch.bmm(gram_nAA, gram_nAA).mul_(c / shrink**5).add_(gram_nAA, alpha=b / shrink**3)
        scale_nAA.diagonal(dim1=1, dim2=2).add_(a / shrink)
        x_nAB = torch.bmm(scale_nAA, x_nAB)
    return x_nAB.mT if tall else x_nAB
