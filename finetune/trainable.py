"""Which weights of a task model are trained, and at what share of the learning rate.

Layer-wise decay: Howard and Ruder 2018 (arXiv:1801.06146), Clark et al. 2020 (arXiv:2003.10555). Adapters: Hu et al.
2022 (arXiv:2106.09685), by peft.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from encoderkit.encoder.classifier import Classifier
from encoderkit.finetune.settings import Lora
from encoderkit.kernels.errors import InputError

_LINEAR = r"blocks\.\d+\.(attention|feed_forward)\.(qkv|out|up|down)"  # what adapters stand beside


def freeze(model: Classifier, layers: int) -> None:
    """Keep the embeddings and the first blocks as they are. Raises InputError where there are fewer."""
    blocks = model.encoder.blocks
    if layers > len(blocks):
        raise InputError(f"frozen_layers is {layers}, but the model has {len(blocks)} layers; lower it")
    parts: list[nn.Module] = [model.encoder.embeddings, model.encoder.positions, *blocks[:layers]]
    for part in parts:
        part.requires_grad_(False)


def layer_rates(model: Classifier, decay: float) -> Callable[[str], float]:
    """Share of the learning rate by parameter name: 1 in the head, decay in the last block, decay^2 below it, ..."""
    top = model.config.num_layers + 1

    def rate(name: str) -> float:
        block = re.search(r"encoder\.blocks\.(\d+)\.", name)
        below = re.search(r"encoder\.(embeddings|positions)\.", name)
        layer = int(block[1]) + 1 if block else 0 if below else top
        return decay ** (top - layer)

    return rate


def add_adapters(model: Classifier, lora: Lora, seed: int) -> Callable[[], None]:
    """Put adapters into the encoder, which is frozen but for them; the head stays trained. Returns what merges them.

    Raises InputError where peft is missing.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError("lora needs the package peft; pip install encoderkit[lora]") from error
    import torch

    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=_LINEAR, bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = peft.LoraModel(model.encoder, config, "default")
    return lambda: adapted.merge_and_unload()
