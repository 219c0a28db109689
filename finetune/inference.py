"""Class scores for encoded texts, with dropout off: what validation, test and predict have in common.

N inputs, C labels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from encoderkit.encoder.classifier import SequenceClassifier
from encoderkit.encoder.precision import Precision
from encoderkit.finetune.encoding import EncodedTexts
from encoderkit.kernels.errors import InputError


def score_texts(
    model: SequenceClassifier, encoded: EncodedTexts, *, precision: Precision, max_batch_tokens: int
) -> Tensor:
    """Logits (N, C), fp32 on the CPU, in the order of the inputs. The model is left in the mode it was in."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, precision):
            pieces = encoded.pieces(np.arange(len(encoded)), max_batch_tokens)
            return torch.cat([model(encoded.batch(piece).to(device)).float().cpu() for piece in pieces])
    finally:
        model.train(was_training)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """Matrix products in this precision; nothing for fp32."""
    return nullcontext() if precision.name == "fp32" else torch.autocast(device.type, dtype=precision.dtype)


def best_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_vocabulary(tokenizer_size: int, model_size: int, where: str) -> None:
    """Raise InputError where the tokenizer has token ids that the model has not."""
    if tokenizer_size > model_size:
        raise InputError(
            f"{where}: the tokenizer has {tokenizer_size} tokens and the model {model_size}; "
            "they do not belong together, use the tokenizer that the model was trained with"
        )


def check_max_tokens(max_tokens: int, max_positions: int, where: str) -> None:
    """Raise InputError where inputs may be longer than the model's positions."""
    if max_tokens > max_positions:
        raise InputError(f"max_tokens is {max_tokens}, but {where} takes at most {max_positions} tokens; lower it")
