"""A plain pretraining loop of transformers: what encoderkit races.

Everything is transformers' or torch's own: the network with its fastest attention here, the collator, AdamW, autocast.
The loop reads the same store, follows the same schedules by time, and stands on the same torch settings.

T tokens of a stream of sequences
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from encoderkit.encoder.checkpoint import quiet_transformers
from encoderkit.encoder.native import to_native_config
from encoderkit.encoder.precision import Precision
from encoderkit.finetune.race_settings import Opponent
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.probe import ProbeScore
from encoderkit.pretrain.schedule import factor
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.tokenizer import TokenIds, load_tokenizer

Curve = list[list[float]]  # seconds of training, held-out loss


@dataclass(frozen=True)
class Trained:
    """What a loop did in its time."""

    steps: int
    tokens: int  # real ones, padding left out
    seconds: float
    curve: Curve
    final: ProbeScore


class Rows(Dataset):
    """Sequences with [CLS] and [SEP], as the collator takes them.

    pieces: each document cut every max_tokens - 2, [CLS] and [SEP] around each piece.
    chunks: documents joined, [CLS] and [SEP] around each, and cut every max_tokens; the rest is dropped.
    """

    def __init__(self, store: Store, tokens: TokenIds, opponent: Opponent) -> None:
        joined = opponent.layout == "chunks"
        pieces = _documents(store) if joined else _pieces(store, opponent.max_tokens - 2)
        parts: list[np.ndarray] = []
        stops = [0]
        dtype = np.uint16 if tokens.vocab_size <= 1 << 16 else np.int32
        first, last = np.array([tokens.cls], dtype), np.array([tokens.sep], dtype)
        for piece in pieces:
            parts += [first, piece.astype(dtype, copy=False), last]
            stops.append(stops[-1] + len(piece) + 2)
        self._bounds = np.arange(0, stops[-1] + 1, opponent.max_tokens) if joined else np.array(stops)
        if not len(self):
            raise InputError(
                f"{store.folder} has {stops[-1]} tokens; expected at least max_tokens, {opponent.max_tokens}"
            )
        self._stream_T = np.concatenate(parts)
        self._special_T = np.isin(self._stream_T, [tokens.pad, tokens.cls, tokens.sep]).astype(np.int8)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        part = slice(self._bounds[row], self._bounds[row + 1])
        ids, special = (stream_T[part].astype(np.int64) for stream_T in (self._stream_T, self._special_T))
        return {"input_ids": ids, "special_tokens_mask": special}


def build_model(opponent: Opponent, tokens: TokenIds, seed: int) -> nn.Module:
    """The network with random weights."""
    from transformers import AutoModelForMaskedLM

    native = to_native_config(opponent.encoder_config(vocab_size=tokens.vocab_size, pad_token_id=tokens.pad))
    if opponent.sparse_prediction:
        native.sparse_prediction = True
    torch.manual_seed(seed)
    return AutoModelForMaskedLM.from_config(native, attn_implementation="sdpa")


def train(
    opponent: Opponent,
    store: Store,
    model: nn.Module,
    *,
    precision: Precision,
    minutes: float,
    seed: int,
    points: int,
    measure: Callable[[nn.Module], ProbeScore],
) -> Trained:
    """Train for these minutes; measure is called at equal distances of time, and at the end, with the clock stopped.

    Raises FloatingPointError for a held-out loss that is not finite.
    """
    device = next(model.parameters()).device
    tokenizer = load_tokenizer(store.tokenizer_folder)
    batches = _batches(Rows(store, TokenIds.of(tokenizer), opponent), tokenizer, opponent, seed)
    optimizer = _optimizer(model, opponent)
    context = torch.autocast(device.type, dtype=torch.bfloat16) if precision.name == "bf16" else nullcontext()
    budget, spent, steps, tokens = 60 * minutes, 0.0, 0, 0
    curve: Curve = []
    model.train()
    began = time.perf_counter()
    while spent < budget:
        share = factor(opponent.schedule, max(spent / budget, 1e-3))
        for group in optimizer.param_groups:
            group["lr"] = opponent.lr * share
        batch = next(batches)
        tokens += int(batch["attention_mask"].sum())
        if bool((batch["labels"] >= 0).any()):  # else the mean over no target is NaN
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            with context:
                loss = model(**on_device).loss
            loss.backward()
            if opponent.clip:
                nn.utils.clip_grad_norm_(model.parameters(), opponent.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        steps += 1
        spent = time.perf_counter() - began
        if spent >= budget * (len(curve) + 1) / points or spent >= budget:
            if device.type == "cuda":  # steps that were asked for are done in the time
                torch.cuda.synchronize(device)
                spent = time.perf_counter() - began
            score = measure(model)
            curve.append([spent, score.loss])
            if not math.isfinite(score.loss):
                raise FloatingPointError(f"held-out loss is {score.loss} at step {steps}; lower lr")
            began = time.perf_counter() - spent
    return Trained(steps, tokens, spent, curve, score)


def save(model: Any, store: Store, folder: Path) -> None:
    """The model with its tokenizer, as transformers opens them."""
    with quiet_transformers():
        model.save_pretrained(folder)
    load_tokenizer(store.tokenizer_folder).save_pretrained(folder)


def _batches(rows: Rows, tokenizer: Any, opponent: Opponent, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Epoch after epoch, each in an order of its own."""
    from transformers import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(
        tokenizer,
        mlm_probability=opponent.mlm_probability,
        mask_replace_prob=opponent.mask_replace_prob,
        random_replace_prob=opponent.random_replace_prob,
        seed=seed,
    )
    loader = DataLoader(
        rows,
        batch_size=min(opponent.batch_size, len(rows)),
        shuffle=True,
        drop_last=True,
        collate_fn=collator,
        num_workers=opponent.workers,
        persistent_workers=opponent.workers > 0,  # else each epoch masks alike
        generator=torch.Generator().manual_seed(seed),
    )
    while True:
        yield from map(dict, loader)


def _optimizer(model: nn.Module, opponent: Opponent) -> AdamW:
    """Norms and biases are not decayed, as in transformers' Trainer."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": opponent.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return AdamW(groups, lr=opponent.lr, betas=opponent.betas, eps=opponent.eps, fused=True)


def _documents(store: Store) -> Iterator[np.ndarray]:
    """In an order of their own, so that no chunk joins what lay side by side."""
    order = np.random.default_rng(0).permutation(store.num_documents)
    return (store.tokens(int(document)) for document in order)


def _pieces(store: Store, room: int) -> Iterator[np.ndarray]:
    for document in range(store.num_documents):
        tokens = store.tokens(document)
        yield from (tokens[start : start + room] for start in range(0, len(tokens), room))
