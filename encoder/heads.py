"""What sits on top of the encoder: the prediction head of the masked LM, and the pooler of sequence heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.layers import ACTIVATIONS, make_norm


class PredictionHead(nn.Module):
    """norm(activation(dense(x))), before the decoder (Devlin et al. 2019)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias="head" in config.biases)
        self.activation = ACTIVATIONS[config.head_activation]
        self.norm = make_norm(config)

    def forward(self, hidden_MD: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(hidden_MD)))


class TanhPooler(nn.Module):
    """tanh(dense(x)) of the first token (Devlin et al. 2019)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_SD: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_SD))


def has_tanh_pooler(config: EncoderConfig) -> bool:
    """Whether sequence heads read a TanhPooler; else a PredictionHead (ModernBERT)."""
    return config.architecture in ("bert", "roberta")
