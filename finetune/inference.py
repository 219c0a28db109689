"""Outputs for encoded inputs, with dropout off: what validation, test, predict and embed have in common.

M read positions or sequences, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.classifier import Classifier
from encoderkit.encoder.precision import Precision
from encoderkit.finetune.encoding import EncodedTexts
from encoderkit.kernels.errors import InputError


def score_texts(
    model: Classifier,
    encoded: EncodedTexts,
    *,
    precision: Precision,
    max_batch_tokens: int,
    rank: int = 0,
    ranks: int = 1,
) -> Tensor:
    """Outputs of the model, (M, C) fp32 on the CPU, in the order of the inputs; the model stays in the mode it was in.

    rank, ranks: as in compute_by_length.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        return compute_by_length(model, encoded, device, precision, max_batch_tokens, rank=rank, ranks=ranks)
    finally:
        model.train(was_training)


def compute_by_length(
    compute: Callable[[TokenBatch], Tensor],
    encoded: EncodedTexts,
    device: torch.device,
    precision: Precision,
    max_batch_tokens: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    tell: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """What compute gives for all inputs, (M, C) fp32 on the CPU, in the order of the inputs.

    The longest come first: batches hold like lengths, which the CPU's attention computes in fewer products, and one
    that does not fit into memory fails at once. rank, ranks: which share of the batches is computed here; the shares
    are gathered, so that every process has all. tell: called with the number of tokens of each batch.
    """
    order = np.argsort(-encoded.lengths(), kind="stable")
    pieces = list(encoded.pieces(order, max_batch_tokens))
    parts: list[tuple[int, Tensor]] = []
    with torch.inference_mode(), autocast(device, precision):
        for number in range(rank, len(pieces), ranks):
            batch = encoded.batch(pieces[number])
            parts.append((number, compute(batch.to(device)).float().cpu()))
            tell(len(batch.input_ids))
    if ranks > 1:
        from accelerate.utils import gather_object

        parts = gather_object(parts)
    computed_MC = torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])])
    outputs_MC = torch.empty_like(computed_MC)
    outputs_MC[torch.from_numpy(encoded.reads_of(order))] = computed_MC
    return outputs_MC


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """Matrix products in this precision; nothing for fp32."""
    return nullcontext() if precision.name == "fp32" else torch.autocast(device.type, dtype=precision.dtype)


def best_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_max_tokens(max_tokens: int, max_positions: int, where: str) -> None:
    """Raise InputError where inputs may be longer than the model's positions."""
    if max_tokens > max_positions:
        raise InputError(f"max_tokens is {max_tokens}, but {where} takes at most {max_positions} tokens; lower it")
