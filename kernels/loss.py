"""Cross-entropy at the masked tokens.

M targets, V vocabulary, D hidden size
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LossSum(NamedTuple):
    """A summed loss and what it is summed over.

    loss: nats, a scalar. count: targets that counted, int64. correct: of these, predicted right, int64.
    """

    loss: Tensor
    count: Tensor
    correct: Tensor


def masked_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    targets_M: Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int = 4096,
) -> LossSum:
    """Sum over targets of -log softmax(hidden weight' + bias)[target]."""
    logits = (hidden_MD @ weight_VD.to(hidden_MD.dtype).T).float() + bias_V
    loss = F.cross_entropy(logits, targets_M, ignore_index=ignore_index, reduction="sum")
    kept = targets_M != ignore_index
    return LossSum(loss, kept.sum(), ((logits.argmax(-1) == targets_M) & kept).sum())
