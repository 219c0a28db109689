"""Minimal pairs scored without training: a table a paradigm and a field, and files with every figure.

Ours where encoderkit reads the model: packed, and only masked positions go through the head. Any other masked language
model of transformers by its own forward pass, over the same batches.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from encoderkit.encoder.checkpoint import load, load_transformers
from encoderkit.encoder.model import choose_attention
from encoderkit.encoder.precision import Precision, resolve_precision
from encoderkit.encoder.pseudo_likelihood import VARIANTS, Logits, Variant, packed_logits, transformers_logits
from encoderkit.finetune.inference import autocast, best_device
from encoderkit.finetune.run_folder import check_out
from encoderkit.finetune.settings import MinimalPairsSettings
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.minimal_pairs import MinimalPairs, Pair, accuracy, fingerprint, read_pairs, sample_pairs
from encoderkit.pretrain.run_folder import whole_folder
from encoderkit.pretrain.terminal import plain_console, print_table
from encoderkit.pretrain.tokenizer import check_vocabulary, load_tokenizer

LARGEST_DIFFERENCE = 1e-4  # nats a sentence, in fp32: sums of some twenty rounded log-probabilities


def score_minimal_pairs(settings: MinimalPairsSettings, *, console: Console | None = None) -> dict[str, Any]:
    """Score, print the table, and write settings.out where it is given; returns what results.json holds.

    With settings.check, compares the scores of so many pairs with one_at_a_time instead. Raises InputError for a file
    or folder that cannot be used, and FloatingPointError where the scores compared differ.
    """
    console = console or plain_console()
    out = check_out(settings.out) if settings.out else None
    pairs = read_pairs(settings.data)
    if settings.check is not None:
        pairs = sample_pairs(pairs, settings.check)
    tokenizer = load_tokenizer(settings.model)
    device = best_device()
    precision = resolve_precision(settings.precision, device)
    logits, vocab_size, max_positions = _open(settings, tokenizer, precision, device, console)
    check_vocabulary(tokenizer, vocab_size, settings.model)
    encoded = MinimalPairs.of(pairs, tokenizer, max_positions)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console
    )
    began = time.perf_counter()
    with bar, autocast(device, precision):
        task = bar.add_task(f"{len(pairs):,} pairs", total=encoded.sentences.num_copies_tokens())
        scores = encoded.score(
            logits, batch_tokens=settings.batch_tokens, tell=lambda done: bar.update(task, completed=done)
        )
    if settings.check is not None:
        seconds = time.perf_counter() - began
        return _compare(settings, pairs, scores, seconds, tokenizer, precision, device, console)
    found = results(settings.model, pairs, scores)
    found |= {"data": settings.data, "fingerprint": fingerprint(pairs)}
    found["time"] = {"seconds": round(time.perf_counter() - began, 2)}
    _print(console, found)
    if out is not None:
        with whole_folder(out) as folder:
            _write(folder, found, pairs, scores)
    return found


def results(model: str, pairs: list[Pair], scores: dict[Variant, np.ndarray]) -> dict[str, Any]:
    """Accuracies by paradigm; a field's is the mean over its paradigms, the whole one the mean over all of them."""
    rows: dict[tuple[str, str], list[int]] = {}
    for i, pair in enumerate(pairs):
        rows.setdefault((pair.field, pair.paradigm), []).append(i)
    paradigms: list[dict[str, Any]] = [
        {"field": field, "paradigm": paradigm, "pairs": len(at)}
        | {variant: accuracy(scores[variant][at]) for variant in VARIANTS}
        for (field, paradigm), at in sorted(rows.items())
    ]

    def mean(part: list[dict[str, Any]]) -> dict[str, Any]:
        whole = {"paradigms": len(part), "pairs": sum(line["pairs"] for line in part)}
        return whole | {variant: float(np.mean([line[variant] for line in part])) for variant in VARIANTS}

    fields = [
        {"field": name} | mean([line for line in paradigms if line["field"] == name])
        for name in sorted({line["field"] for line in paradigms})
    ]
    return {"model": model, **mean(paradigms), "by_field": fields, "by_paradigm": paradigms}


def _compare(
    settings: MinimalPairsSettings,
    pairs: list[Pair],
    scores: dict[Variant, np.ndarray],
    seconds: float,
    tokenizer: Any,
    precision: Precision,
    device: torch.device,
    console: Console,
) -> dict[str, Any]:
    """How far these scores are from those of one_at_a_time, in fp32, and how many times as fast they came."""
    model = load_transformers(settings.model).to(device)
    began = time.perf_counter()
    slow = [one_at_a_time(model, tokenizer, text) for pair in pairs for text in (pair.good, pair.bad)]
    ratio = (time.perf_counter() - began) / seconds
    difference = max(
        float(np.abs(scores[variant].reshape(-1) - [each[variant] for each in slow]).max()) for variant in VARIANTS
    )
    console.print(
        f"{len(pairs):,} pairs: largest difference from transformers {difference:.1e} nats in {precision.name}; "
        f"{2 * len(pairs) / seconds:,.0f} sentences/s, {ratio:.1f} times as fast as one masked copy at a time"
    )
    if precision.name == "fp32" and not difference <= LARGEST_DIFFERENCE:
        raise FloatingPointError(f"scores differ by {difference:.1e} nats; expected at most {LARGEST_DIFFERENCE:g}")
    return {"pairs": len(pairs), "largest_difference": difference, "speed_ratio": ratio}


@torch.inference_mode()
def one_at_a_time(model: Any, tokenizer: Any, text: str) -> dict[Variant, float]:
    """The scores of a sentence by their definition: a forward pass of transformers for each masked copy."""
    encoded = tokenizer(text, return_tensors="pt").to(model.device)
    words, ids_L = encoded.word_ids(), encoded["input_ids"][0]
    totals: dict[Variant, float] = dict.fromkeys(VARIANTS, 0.0)
    for at, word in enumerate(words):
        for variant in VARIANTS if word is not None else ():
            last = len(words) if variant == "within_word" else at + 1
            copy_L = ids_L.clone()
            copy_L[[i for i in range(at, last) if words[i] == word]] = tokenizer.mask_token_id
            scores_V = model(input_ids=copy_L[None], attention_mask=torch.ones_like(copy_L[None])).logits[0, at]
            totals[variant] += float(scores_V.double().log_softmax(0)[ids_L[at]])
    return totals


def _open(
    settings: MinimalPairsSettings, tokenizer: Any, precision: Precision, device: torch.device, console: Console
) -> tuple[Logits, int, int]:
    """What scores masked positions, the model's vocabulary, and its longest sequence."""
    try:
        model = load(settings.model).to(device)
    except InputError as error:
        other = load_transformers(settings.model).to(device)
        console.print(f"scored by transformers' own forward pass, which is slower: {error}")
        longest = min(tokenizer.model_max_length, getattr(other.config, "max_position_embeddings", 512))
        return transformers_logits(other), other.config.vocab_size, longest
    choices = choose_attention(model.config, settings.attention, device=device, dtype=precision.dtype)
    model.encoder.use_attention(choices)
    return packed_logits(model), model.config.vocab_size, model.config.max_positions


def _print(console: Console, found: dict[str, Any]) -> None:
    def cells(line: dict[str, Any]) -> list[str]:
        return [f"{line['pairs']:,}", *(f"{line[variant]:.1%}" for variant in VARIANTS)]

    head = ["pairs", "original", "within word"]
    print_table(
        console,
        ["field", "paradigm", *head],
        [[line["field"], line["paradigm"], *cells(line)] for line in found["by_paradigm"]],
    )
    rows = [[line["field"] or "-", str(line["paradigms"]), *cells(line)] for line in found["by_field"]]
    print_table(console, ["field", "paradigms", *head], [*rows, ["all", str(found["paradigms"]), *cells(found)]])
    console.print(f"mean over paradigms; chance is 50%; {found['time']['seconds']:,.0f} s")


def _write(out: Path, found: dict[str, Any], pairs: list[Pair], scores: dict[Variant, np.ndarray]) -> None:
    with (out / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for i, pair in enumerate(pairs):
            line: dict[str, Any] = {"field": pair.field, "paradigm": pair.paradigm, "good": pair.good, "bad": pair.bad}
            line |= {name: [round(value, 6) for value in values[i].tolist()] for name, values in scores.items()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
