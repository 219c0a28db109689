"""The mean of checkpoints' weights (Izmailov et al. 2018, arXiv:1803.05407)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from encoderkit.pretrain.checkpoint import Checkpoint, is_due, whole_checkpoints


def mean_weights(checkpoints: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """name -> mean over the checkpoints, fp32 on the CPU, summed in float64."""
    sums: dict[str, Tensor] = {}
    for checkpoint in checkpoints:
        for name, tensor in checkpoint.tensors("model").items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + tensor.double()
    return {name: (total / len(checkpoints)).float() for name, total in sums.items()}


def newest_due(folder: Path, count: int) -> list[Checkpoint]:
    """The newest whole checkpoints, newest first, without those that a signal asked for; fewer where there are not."""
    return [checkpoint for checkpoint in whole_checkpoints(folder) if is_due(checkpoint.path)][:count]
