"""The likeliest tokens for each [MASK] of a sentence.

M masks, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console

from encoderkit.encoder.batch import IGNORE_INDEX, TokenBatch
from encoderkit.encoder.checkpoint import load
from encoderkit.encoder.model import choose_attention
from encoderkit.finetune.inference import best_device, check_max_tokens
from encoderkit.finetune.settings import FillSettings
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.terminal import plain_console, print_table
from encoderkit.pretrain.tokenizer import check_vocabulary, load_tokenizer


@dataclass(frozen=True)
class Candidate:
    """A token for a mask. probability: over the whole vocabulary."""

    token: str
    token_id: int
    probability: float


def fill(settings: FillSettings, *, console: Console | None = None) -> list[list[Candidate]]:
    """Print and return the likeliest tokens for each mask, best first; masks in the order of the text.

    Every mask is predicted with the other masks left as they are. Raises InputError where the text holds no mask.
    """
    console = console or plain_console()
    tokenizer = load_tokenizer(settings.model)
    mask = tokenizer.mask_token
    text = settings.text.replace("[MASK]", mask)
    ids = tokenizer(text)["input_ids"]
    positions = [i for i, token_id in enumerate(ids) if token_id == tokenizer.mask_token_id]
    if not positions:
        raise InputError(f"text holds no {mask}: {settings.text[:80]!r}; write {mask} where a token is to be found")
    device = best_device()
    model = load(settings.model).to(device)
    check_vocabulary(tokenizer, model.config.vocab_size, settings.model)
    check_max_tokens(len(ids), model.config.max_positions, settings.model)
    model.encoder.use_attention(choose_attention(model.config, settings.attention, device=device, dtype=torch.float32))
    batch = TokenBatch.from_sequences([ids], targets=[dict.fromkeys(positions, IGNORE_INDEX)])
    with torch.inference_mode():
        probabilities_MV = model.logits(batch.to(device)).softmax(1).cpu()
    best = probabilities_MV.topk(min(settings.top, probabilities_MV.shape[1]), dim=1)
    candidates = [
        [Candidate(str(tokenizer.decode([token_id])).strip(), token_id, p) for token_id, p in zip(ids_M, values_M)]
        for ids_M, values_M in zip(best.indices.tolist(), best.values.tolist())
    ]
    _print(console, text, mask, candidates)
    return candidates


def _print(console: Console, text: str, mask: str, candidates: list[list[Candidate]]) -> None:
    """A table with one pair of columns a mask, and the text with the best token in each."""
    head = [
        cell
        for number in range(1, len(candidates) + 1)
        for cell in (f"{mask} {number}" if len(candidates) > 1 else mask, "probability")
    ]
    rows = [[cell for c in line for cell in (c.token, f"{c.probability:.4f}")] for line in zip(*candidates)]
    print_table(console, head, rows)
    for choices in candidates:
        text = text.replace(mask, choices[0].token, 1)
    console.print(text)
