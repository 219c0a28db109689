"""The same work by encoderkit and by transformers, on the CPU: what the benchmark times.

Everyone gets the same sequences, targets, sizes, dropout (none), optimizer (fused AdamW), threads and number format.
transformers pads each batch to its longest sequence; encoderkit packs. Batches are built before the clock starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW

from encoderkit.encoder.batch import IGNORE_INDEX, TokenBatch
from encoderkit.encoder.classifier import SequenceClassifier
from encoderkit.encoder.config import EncoderConfig, preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.encoder.native import to_native_config

RATE = 0.3  # of the tokens that are predicted, encoderkit's default
LABELS = ["a", "b"]

Sequences = list[list[int]]


@dataclass(frozen=True)
class Size:
    """Of an encoder, and how many tokens a training step has."""

    layers: int
    hidden: int
    step_tokens: int

    def __str__(self) -> str:
        return f"{self.layers}x{self.hidden}"


SIZES = (Size(4, 256, 4096), Size(4, 512, 4096), Size(6, 768, 2048))


def config_of(architecture: str, size: Size, vocab_size: int) -> EncoderConfig:
    """The preset's parts at this size, without dropout; feed-forward layers as wide as the papers' for it."""
    wide = 3 * size.hidden // 2 if architecture == "modern" else 4 * size.hidden
    return preset(
        architecture,
        "tiny",
        vocab_size=vocab_size,
        num_layers=size.layers,
        hidden_size=size.hidden,
        num_heads=size.hidden // 64,
        intermediate_size=wide,
        max_positions=512,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def targets_of(sequences: Sequences, seed: int) -> list[dict[int, int]]:
    """RATE of each sequence's tokens, [CLS] and [SEP] left out; one at least."""
    rng = np.random.default_rng(seed)
    chosen = []
    for ids in sequences:
        count = max(1, round(RATE * (len(ids) - 2)))
        positions = rng.choice(np.arange(1, len(ids) - 1), count, replace=False)
        chosen.append({int(p): ids[p] for p in positions})
    return chosen


def packed(sequences: Sequences, targets: list[dict[int, int]] | None, config: EncoderConfig) -> TokenBatch:
    """As encoderkit reads them; first tokens are read where there are no targets."""
    batch = TokenBatch.from_sequences(sequences, targets=targets)
    return replace(batch, token_type_ids=torch.zeros_like(batch.input_ids)) if config.token_types else batch


def padded(sequences: Sequences, targets: list[dict[int, int]] | None = None) -> dict[str, Tensor]:
    """As transformers reads them; labels where there are targets."""
    longest = max(map(len, sequences))
    ids, mask = torch.zeros(len(sequences), longest, dtype=torch.long), torch.zeros(len(sequences), longest)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
        for position, target in (targets or [{}] * len(sequences))[row].items():
            labels[row, position] = target
    given = {"input_ids": ids, "attention_mask": mask.long()}
    return given if targets is None else {**given, "labels": labels}


def by_length(sequences: Sequences, batches: int) -> list[Sequences]:
    """Sorted by length, as many batches, in which padding is least."""
    ordered = sorted(sequences, key=len)
    bounds = np.linspace(0, len(ordered), batches + 1).astype(int)
    return [ordered[first:last] for first, last in itertools.pairwise(bounds)]


class Trainer:
    """Training steps of one network: forward, backward, AdamW."""

    def __init__(self, model: torch.nn.Module, loss: Callable[[torch.nn.Module, Any], Tensor], dtype: torch.dtype):
        self.model, self.loss = model.train(), loss
        self.context = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)
        self.optimizer = AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(self, batch: Any) -> None:
        """One optimizer step."""
        with self.context:
            loss = self.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def our_masked_lm(config: EncoderConfig, dtype: torch.dtype) -> Trainer:
    """encoderkit, masked language modelling."""

    def loss(model: torch.nn.Module, batch: TokenBatch) -> Tensor:
        sums = model(batch)
        return sums.loss / sums.count

    return Trainer(MaskedLM(config), loss, dtype)


def their_masked_lm(config: EncoderConfig, dtype: torch.dtype) -> Trainer:
    """transformers, masked language modelling, with its fastest attention on the CPU."""
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_config(to_native_config(config), attn_implementation="sdpa")
    return Trainer(model, lambda model, batch: model(**batch).loss, dtype)


def our_classifier(config: EncoderConfig, dtype: torch.dtype) -> Trainer:
    """encoderkit, sequence classification; a batch is (TokenBatch, labels)."""
    model = SequenceClassifier(config, LABELS)
    return Trainer(model, lambda model, given: torch.nn.functional.cross_entropy(model(given[0]), given[1]), dtype)


def their_classifier(config: EncoderConfig, dtype: torch.dtype) -> Trainer:
    """transformers, sequence classification; a batch is what its forward takes."""
    from transformers import AutoModelForSequenceClassification

    native = to_native_config(config)
    native.num_labels = len(LABELS)
    for name in ("classifier_dropout", "hidden_dropout_prob"):
        if hasattr(native, name):
            setattr(native, name, 0.0)
    model = AutoModelForSequenceClassification.from_config(native, attn_implementation="sdpa")
    return Trainer(model, lambda model, batch: model(**batch).loss, dtype)


def infer(trainer: Trainer, batches: Sequence[Any]) -> None:
    """Scores of all batches, dropout off."""
    trainer.model.eval()
    with torch.inference_mode(), trainer.context:
        for batch in batches:
            trainer.model(**batch) if isinstance(batch, dict) else trainer.model(batch)
    trainer.model.train()
