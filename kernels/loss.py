"""Cross-entropy at the masked tokens, in chunks of targets.

The gradient is computed in the forward pass, chunk by chunk, so that few scores are ever held (Wijmans et al. 2024,
arXiv:2411.09009, do the same on the GPU). On the CPU a group of chunks shares the products of the gradient. Not
torch.nn.functional.linear_cross_entropy: it gives NaN where every target is ignored, and is slower here
(kernels/bench.py).

M targets, V vocabulary, D hidden size, C targets in a chunk, G in a group
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores of a chunk stay in the cache: 1.3x as fast as all 2,000 targets at once, bf16, V = 8,192, one thread.
CPU_CHUNK_TOKENS = 256
CUDA_CHUNK_TOKENS = 4096
# Of the scores' gradients of a group: a sum over chunks in fp32 costs more than the products themselves.
CPU_GROUP_BYTES = 64 << 20

_LOG2_E = 1 / math.log(2)


def chunk_and_group(device: torch.device, vocabulary: int, itemsize: int) -> tuple[int, int]:
    """Targets that are scored at a time, and whose gradients share their products. itemsize: bytes of a score."""
    if device.type != "cpu":
        return CUDA_CHUNK_TOKENS, CUDA_CHUNK_TOKENS
    chunk_bytes = CPU_CHUNK_TOKENS * vocabulary * itemsize
    return CPU_CHUNK_TOKENS, CPU_CHUNK_TOKENS * max(1, CPU_GROUP_BYTES // chunk_bytes)


class LossSum(NamedTuple):
    """A summed loss and what it is summed over.

    loss: nats, a scalar. count: targets that counted, int64. correct: of these, predicted right, int64.
    """

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    correct: Tensor


def masked_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    targets_M: Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> LossSum:
    """Sum over targets of -log softmax(hidden weight' + bias)[target], in nats.

    hidden_MD: its dtype is that of the matrix products; weight_VD and bias_V may be of a wider one and get their
    gradients in it. targets_M: (M,) int64, ignore_index where a target counts for nothing: all ignored gives a loss
    of 0. The softmax and the sum are in fp32, in float64 where hidden is. chunk_tokens: targets scored at a time, and
    whose gradients share their products.
    """
    chunk, group = chunk_and_group(hidden_MD.device, len(weight_VD), hidden_MD.element_size())
    if chunk_tokens is not None:
        chunk = group = chunk_tokens
    with torch.autocast(hidden_MD.device.type, enabled=False):  # hidden has decided the dtype
        learns = torch.is_grad_enabled()  # inside a Function gradients are always off
        loss, correct = _ChunkedCrossEntropy.apply(
            hidden_MD, weight_VD, bias_V, targets_M, ignore_index, chunk, group, learns
        )
    return LossSum(loss, (targets_M != ignore_index).sum(), correct)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        targets_M: Tensor,
        ignore_index: int,
        chunk: int,
        group: int,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_MD.dtype, torch.float32)
        wants_gradient = learns and any(ctx.needs_input_grad[:3])
        narrow_VD, bias2_V = weight_VD.to(hidden_MD.dtype), bias_V.to(wide) * _LOG2_E
        M, V = len(hidden_MD), len(narrow_VD)
        group = group if wants_gradient else chunk
        loss = torch.zeros((), dtype=wide, device=hidden_MD.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden_MD.device)
        # The same memory serves all groups and chunks: fresh memory from the system costs more than the arithmetic.
        products_GV = hidden_MD.new_empty(min(group, M), V)
        wide_CV = None if wide == hidden_MD.dtype else hidden_MD.new_empty(min(chunk, M), V, dtype=wide)
        if wants_gradient:
            grad_hidden_MD, grad_weight_VD = torch.empty_like(hidden_MD), torch.zeros_like(weight_VD) if not M else None
            grad_bias_V = torch.zeros_like(bias2_V)
        for at in range(0, M, chunk):
            hidden_CD = hidden_MD[at : at + chunk]
            products_CV = products_GV[at % group : at % group + len(hidden_CD)]
            scores_CV = products_CV if wide_CV is None else wide_CV[: len(hidden_CD)]
            kept_C1 = (targets_M[at : at + chunk] != ignore_index).unsqueeze(1)
            target_C1 = torch.where(kept_C1, targets_M[at : at + chunk].unsqueeze(1), 0)
            # In units of log2(e), because exp2 is three times as fast as exp on the CPU.
            torch.add(bias2_V, torch.mm(hidden_CD, narrow_VD.T, out=products_CV), alpha=_LOG2_E, out=scores_CV)
            highest_C1 = scores_CV.amax(1, keepdim=True)
            target_score_C1 = scores_CV.gather(1, target_C1)
            correct += _hits(scores_CV, target_score_C1, highest_C1, target_C1, kept_C1)
            odds_CV = scores_CV.sub_(highest_C1).exp2_()
            total_C1 = odds_CV.sum(1, keepdim=True)
            nats_C1 = (total_C1.log2() + highest_C1 - target_score_C1) / _LOG2_E
            loss += nats_C1.masked_fill(~kept_C1, 0.0).sum()
            if not wants_gradient:
                continue
            probabilities_CV = odds_CV.mul_(kept_C1 / total_C1)
            probabilities_CV.scatter_add_(1, target_C1, -kept_C1.to(wide))
            grad_bias_V += probabilities_CV.sum(0)
            products_CV.copy_(probabilities_CV)
            stop = min(at + chunk, M)
            if stop % group == 0 or stop == M:
                first = at // group * group
                grad_scores_GV = products_GV[: stop - first]
                torch.mm(grad_scores_GV, narrow_VD, out=grad_hidden_MD[first:stop])
                part_VD = torch.mm(grad_scores_GV.T, hidden_MD[first:stop])
                grad_weight_VD = part_VD if grad_weight_VD is None else grad_weight_VD.to(wide).add_(part_VD)
        if wants_gradient:
            ctx.save_for_backward(grad_hidden_MD, grad_weight_VD, grad_bias_V)
            ctx.dtypes = hidden_MD.dtype, weight_VD.dtype, bias_V.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (grad.to(dtype) * grad_loss.to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return *grads, None, None, None, None, None


def _hits(scores_CV: Tensor, target_score_C1: Tensor, highest_C1: Tensor, target_C1: Tensor, kept_C1: Tensor) -> Tensor:
    """How many kept targets are the first highest score of their row."""
    if scores_CV.device.type != "cpu":
        return ((scores_CV.argmax(1, keepdim=True) == target_C1) & kept_C1).sum()
    # argmax costs a tenth of the loss on the CPU; only rows whose target ties with the highest can be hits.
    rows = ((target_score_C1 == highest_C1) & kept_C1).flatten().nonzero().flatten()
    return (scores_CV.index_select(0, rows).argmax(1) == target_C1.flatten().index_select(0, rows)).sum()
