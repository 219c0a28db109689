"""Sequence classification on a pooled first token, as transformers' native classes do it.

S sequences, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.model import Encoder, PredictionHead, init_encoder


class TanhPooler(nn.Module):
    """tanh(dense(x)) of the first token (Devlin et al. 2019)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_SD: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_SD))


POOLERS: dict[str, type[nn.Module]] = {"bert": TanhPooler, "modern": PredictionHead}


class SequenceClassifier(nn.Module):
    """Labels for whole sequences. labels: their names, in the order of the logits."""

    def __init__(self, config: EncoderConfig, labels: list[str]) -> None:
        super().__init__()
        self.config, self.labels = config, list(labels)
        self.encoder = Encoder(config)
        self.head = POOLERS[config.architecture](config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.classifier = nn.Linear(config.hidden_size, len(labels))
        init_encoder(self)

    def forward(self, batch: TokenBatch) -> Tensor:
        """(S, labels) fp32 logits; batch.target_positions are the first tokens of the S sequences."""
        return self.classifier(self.dropout(self.head(self.encoder(batch)))).float()
