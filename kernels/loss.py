"""Cross-entropy at the masked tokens, in chunks of targets.

The gradient is computed in the forward pass, chunk by chunk, so that one chunk's scores are all that is ever held
(Wijmans et al. 2024, arXiv:2411.09009, do the same on the GPU). Not torch.nn.functional.linear_cross_entropy: it gives
NaN where every target is ignored, and is slower here (kernels/bench.py).

M targets, V vocabulary, D hidden size, C targets in a chunk
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Scores of a chunk stay in the cache: 1.3x as fast as all 2,000 targets at once, bf16, V = 8,192, one thread.
CPU_CHUNK_TOKENS = 256
CUDA_CHUNK_TOKENS = 4096

_LOG2_E = 1 / math.log(2)


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
    of 0. The softmax and the sum are in fp32, in float64 where hidden is. chunk_tokens: targets scored at a time.
    """
    if chunk_tokens is None:
        chunk_tokens = CPU_CHUNK_TOKENS if hidden_MD.device.type == "cpu" else CUDA_CHUNK_TOKENS
    with torch.autocast(hidden_MD.device.type, enabled=False):  # hidden has decided the dtype
        learns = torch.is_grad_enabled()  # inside a Function gradients are always off
        loss, correct = _ChunkedCrossEntropy.apply(
            hidden_MD, weight_VD, bias_V, targets_M, ignore_index, chunk_tokens, learns
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
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_MD.dtype, torch.float32)
        wants_gradient = learns and any(ctx.needs_input_grad[:3])
        narrow_VD, bias2_V = weight_VD.to(hidden_MD.dtype), bias_V.to(wide) * _LOG2_E
        loss = torch.zeros((), dtype=wide, device=hidden_MD.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden_MD.device)
        # The same memory serves all chunks: fresh memory from the system costs more than the arithmetic.
        shape = min(chunk, len(hidden_MD)), len(narrow_VD)
        products_CV = scores_CV = hidden_MD.new_empty(shape)
        if wide != hidden_MD.dtype:
            scores_CV = hidden_MD.new_empty(shape, dtype=wide)
        if wants_gradient:
            grad_hidden_MD = torch.zeros_like(hidden_MD) if not len(hidden_MD) else torch.empty_like(hidden_MD)
            grad_weight_VD = torch.zeros(weight_VD.shape, dtype=wide, device=weight_VD.device)
            grad_bias_V = torch.zeros_like(bias2_V)
        for at in range(0, len(hidden_MD), chunk):
            hidden_CD = hidden_MD[at : at + chunk]
            products_CV, scores_CV = products_CV[: len(hidden_CD)], scores_CV[: len(hidden_CD)]
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
            if wants_gradient:
                probabilities_CV = odds_CV.mul_(kept_C1 / total_C1)
                probabilities_CV.scatter_add_(1, target_C1, -kept_C1.to(wide))
                grad_bias_V += probabilities_CV.sum(0)
                if wide == hidden_MD.dtype:
                    grad_scores_CV = probabilities_CV
                    grad_weight_VD.addmm_(grad_scores_CV.T, hidden_CD)
                else:
                    grad_scores_CV = products_CV.copy_(probabilities_CV)
                    grad_weight_VD += torch.mm(grad_scores_CV.T, hidden_CD)
                grad_hidden_MD[at : at + chunk] = torch.mm(grad_scores_CV, narrow_VD)
        if wants_gradient:
            ctx.save_for_backward(grad_hidden_MD, grad_weight_VD.to(weight_VD.dtype), grad_bias_V.to(bias_V.dtype))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None


def _hits(scores_CV: Tensor, target_score_C1: Tensor, highest_C1: Tensor, target_C1: Tensor, kept_C1: Tensor) -> Tensor:
    """How many kept targets are the first highest score of their row."""
    if scores_CV.device.type != "cpu":
        return ((scores_CV.argmax(1, keepdim=True) == target_C1) & kept_C1).sum()
    # argmax costs a tenth of the loss on the CPU; only rows whose target ties with the highest can be hits.
    rows = ((target_score_C1 == highest_C1) & kept_C1).flatten().nonzero().flatten()
    return (scores_CV.index_select(0, rows).argmax(1) == target_C1.flatten().index_select(0, rows)).sum()
