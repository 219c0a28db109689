"""Sequence classification on a pooled first token, as transformers' native classes do it.

S sequences, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.heads import PredictionHead, TanhPooler, has_tanh_pooler
from encoderkit.encoder.layers import init_encoder
from encoderkit.encoder.model import Encoder


class SequenceClassifier(nn.Module):
    """Labels for whole sequences. labels: their names, in the order of the logits."""

    def __init__(self, config: EncoderConfig, labels: list[str]) -> None:
        super().__init__()
        self.config, self.labels = config, list(labels)
        self.encoder = Encoder(config)
        tanh = has_tanh_pooler(config)
        self.pooler = TanhPooler(config) if tanh else None
        self.head = None if tanh else PredictionHead(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.classifier = nn.Linear(config.hidden_size, len(labels))
        init_encoder(self)

    def forward(self, batch: TokenBatch) -> Tensor:
        """(S, labels) fp32 logits; batch.target_positions are the first tokens of the S sequences."""
        pool = mean_of_tokens if self.config.pooling == "mean" else first_token
        transform = self.pooler or self.head
        assert transform is not None
        return self.classifier(self.dropout(transform(pool(self.encoder, batch)))).float()


def first_token(encoder: Encoder, batch: TokenBatch) -> Tensor:
    """Hidden states of the first tokens: (S, D). The last block computes nothing else."""
    return encoder(batch)


def mean_of_tokens(encoder: Encoder, batch: TokenBatch) -> Tensor:
    """Mean hidden state of each sequence, special tokens counted in: (S, D)."""
    everything = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
    hidden_TD = encoder(replace(batch, target_positions=everything, target_segments=batch.segments))
    ids_T = batch.segments.ids().to(hidden_TD.device)
    sums_SD = hidden_TD.new_zeros(len(batch.segments), hidden_TD.shape[1]).index_add(0, ids_T, hidden_TD)
    lengths_S1 = batch.segments.cu_seqlens.diff().unsqueeze(1)
    return sums_SD / lengths_S1.clamp(min=1)
