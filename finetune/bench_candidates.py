"""The same work by encoderkit and by transformers, on the CPU: what the benchmark times.

Everyone gets the same sequences, targets, sizes, dropout (none), optimizer (fused AdamW), threads and number format.
transformers pads each batch to its longest sequence; encoderkit packs. Batches are built before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from encoderkit.encoder.batch import IGNORE_INDEX, TokenBatch
from encoderkit.encoder.classifier import SequenceClassifier
from encoderkit.encoder.config import EncoderConfig, preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.encoder.native import to_native_config
from encoderkit.pretrain.flops import forward_flops

RATE = 0.3  # of the tokens that are predicted, encoderkit's default
LABELS = ["a", "b"]

Sequences = list[list[int]]
Work = tuple[Callable[[], None], int]  # what is timed, and the tokens of it


@dataclass(frozen=True)
class Size:
    """Of an encoder, how many tokens a training step on full rows has, and how many batches of lines are timed."""

    layers: int
    hidden: int
    step_tokens: int
    line_batches: int = 2

    def __str__(self) -> str:
        return f"{self.layers}x{self.hidden}"


SIZES = (Size(4, 256, 4096), Size(4, 512, 4096), Size(6, 768, 1024, line_batches=1))


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


def targets_of(sequences: Sequences) -> list[dict[int, int]]:
    """RATE of each sequence's tokens, [CLS] and [SEP] left out; one at least. Always the same."""
    rng = np.random.default_rng(0)
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


class Trainer:
    """Steps of one network: forward, backward, AdamW; or forward alone."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], precision: str) -> None:
        self.model, self.loss = model.train(), loss
        self.context = nullcontext() if precision == "fp32" else torch.autocast("cpu", dtype=torch.bfloat16)
        self.optimizer = AdamW(model.parameters(), lr=1e-4, fused=True)

    def train(self, batches: Sequence[Any]) -> None:
        """An optimizer step on each batch."""
        for batch in batches:
            with self.context:
                loss = self.loss(self.model, batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def infer(self, batches: Sequence[Any]) -> None:
        """The loss of each batch, dropout off, no gradient."""
        self.model.eval()
        with torch.inference_mode(), self.context:
            for batch in batches:
                self.loss(self.model, batch)
        self.model.train()


def our_training(config: EncoderConfig, precision: str, batches: list[Sequences]) -> Work:
    """encoderkit, masked language modelling."""
    given = [packed(batch, targets_of(batch), config) for batch in batches]
    return partial(our_masked_lm(config, precision).train, given), _tokens(batches)


def their_training(config: EncoderConfig, precision: str, batches: list[Sequences]) -> Work:
    """transformers, masked language modelling."""
    given = [padded(batch, targets_of(batch)) for batch in batches]
    return partial(their_masked_lm(config, precision).train, given), _tokens(batches)


def our_classification(config: EncoderConfig, precision: str, batches: list[Sequences], learns: bool) -> Work:
    """encoderkit, training or inference."""
    model = SequenceClassifier(config, LABELS)
    trainer = Trainer(model, lambda m, given: F.cross_entropy(m(given[0]), given[1]), precision)
    given = [(packed(batch, None, config), _labels(batch)) for batch in batches]
    return partial(trainer.train if learns else trainer.infer, given), _tokens(batches)


def their_classification(config: EncoderConfig, precision: str, batches: list[Sequences], learns: bool) -> Work:
    """transformers, training or inference."""
    from transformers import AutoModelForSequenceClassification

    native = to_native_config(config)
    native.num_labels = len(LABELS)
    model = AutoModelForSequenceClassification.from_config(native, attn_implementation="sdpa")
    trainer = Trainer(model, lambda m, given: m(**given).loss, precision)
    given = [{**padded(batch), "labels": _labels(batch)} for batch in batches]
    return partial(trainer.train if learns else trainer.infer, given), _tokens(batches)


def our_masked_lm(config: EncoderConfig, precision: str) -> Trainer:
    """encoderkit's network."""

    def loss(model: nn.Module, batch: TokenBatch) -> Tensor:
        sums = model(batch)
        return sums.loss / sums.count

    return Trainer(MaskedLM(config), loss, precision)


def their_masked_lm(config: EncoderConfig, precision: str) -> Trainer:
    """transformers' network, with its fastest attention on the CPU and, where it can, scores of the targets alone."""
    from transformers import AutoModelForMaskedLM, ModernBertConfig

    native = to_native_config(config)
    if isinstance(native, ModernBertConfig):
        native.sparse_prediction = True
    model = AutoModelForMaskedLM.from_config(native, attn_implementation="sdpa")
    return Trainer(model, lambda model, batch: model(**batch).loss, precision)


def step_flops(config: EncoderConfig, batches: list[Sequences]) -> float:
    """Operations that encoderkit executes in training steps on these batches."""
    return 3 * sum(forward_flops(config, packed(batch, targets_of(batch), config)) for batch in batches)


def padded_flops(config: EncoderConfig, batches: list[Sequences]) -> float:
    """At most so many operations of transformers in such steps: padding, scores at every position, no windows."""
    everywhere = replace(config, local_attention=None)
    total = 0.0
    for batch in batches:
        longest = max(map(len, batch))
        row = TokenBatch.from_sequences([[0] * longest], targets=[dict.fromkeys(range(longest), 0)])
        total += 3 * len(batch) * forward_flops(everywhere, row)
    return total


def _tokens(batches: list[Sequences]) -> int:
    return sum(len(sequence) for batch in batches for sequence in batch)


def _labels(batch: Sequences) -> Tensor:
    return torch.arange(len(batch)) % len(LABELS)
