"""Task heads on the encoder, as transformers' native classes have them: for whole sequences, choices, tokens and spans.

S sequences, M read positions, D hidden size, C labels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.heads import PredictionHead, TanhPooler, has_tanh_pooler
from encoderkit.encoder.layers import init_encoder
from encoderkit.encoder.model import Encoder
from encoderkit.encoder.native import Head

ProblemType = Literal["multi_label_classification", "regression"]


class Classifier(nn.Module):
    """What all task models share. labels: names of the outputs, in their order."""

    head_name: ClassVar[Head]
    problem_type: ProblemType | None = None  # transformers' name of what the labels are, where a folder has to say it

    def __init__(self, config: EncoderConfig, labels: list[str]) -> None:
        super().__init__()
        self.config, self.labels = config, list(labels)
        self.encoder = Encoder(config)
        self.head: PredictionHead | None = None if has_tanh_pooler(config) else PredictionHead(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.classifier = nn.Linear(config.hidden_size, len(labels))


class SequenceClassifier(Classifier):
    """Labels for whole sequences. problem_type: None for one label of several, else multi_label_... or regression."""

    head_name: ClassVar[Head] = "classifier"

    def __init__(self, config: EncoderConfig, labels: list[str], problem_type: ProblemType | None = None) -> None:
        super().__init__(config, labels)
        self.problem_type = problem_type
        self.pooler = TanhPooler(config) if has_tanh_pooler(config) else None
        init_encoder(self)

    def forward(self, batch: TokenBatch) -> Tensor:
        """(S, labels) fp32 logits; batch.target_positions are the first tokens of the S sequences."""
        pool = mean_of_tokens if self.config.pooling == "mean" else first_token
        transform = self.pooler or self.head
        assert transform is not None
        return self.classifier(self.dropout(transform(pool(self.encoder, batch)))).float()


class ChoiceClassifier(SequenceClassifier):
    """A score for each sequence, (S, 1); those of one question's choices are compared."""

    head_name = "choice"


class TokenClassifier(Classifier):
    """Labels for tokens: BERT's straight from the hidden state, ModernBERT's behind its prediction head."""

    head_name: ClassVar[Head] = "tokens"

    def __init__(self, config: EncoderConfig, labels: list[str]) -> None:
        super().__init__(config, labels)
        init_encoder(self)

    def forward(self, batch: TokenBatch) -> Tensor:
        """(M, labels) fp32 logits at batch.target_positions."""
        hidden_MD = self.encoder(batch)
        return self.classifier(self.dropout(hidden_MD if self.head is None else self.head(hidden_MD))).float()


class SpanClassifier(TokenClassifier):
    """Whether an answer begins, and whether it ends, at a token: (M, 2)."""

    head_name = "spans"

    def __init__(self, config: EncoderConfig, labels: list[str]) -> None:
        super().__init__(config, labels)
        if self.head is None:
            self.dropout = nn.Dropout(0.0)  # Devlin et al. 2019 drop nothing here


CLASSIFIERS: dict[Head, type[Classifier]] = {
    kind.head_name: kind for kind in (SequenceClassifier, ChoiceClassifier, TokenClassifier, SpanClassifier)
}


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
