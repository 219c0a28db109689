"""Labels and probabilities for new texts, from a fine-tuned folder.

N texts, C labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from encoderkit.encoder.checkpoint import load_classifier
from encoderkit.encoder.model import choose_attention
from encoderkit.encoder.precision import resolve_precision
from encoderkit.finetune.data import check_texts
from encoderkit.finetune.encoding import encode
from encoderkit.finetune.inference import best_device, check_max_tokens, check_vocabulary, score_texts
from encoderkit.finetune.settings import PredictSettings
from encoderkit.finetune.tables import read_file
from encoderkit.finetune.terminal import plain_console, print_table
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.tokenizer import load_tokenizer


def predict(settings: PredictSettings, *, console: Console | None = None) -> list[dict[str, Any]]:
    """Label texts; write them to settings.out, or print a table.

    Returns one dict a text, in order: row, prediction, probabilities (label -> probability).
    Raises InputError for a file, a column or a folder that cannot be used.
    """
    console = console or plain_console()
    rows, texts, texts_b = _read(settings)
    if settings.out and Path(settings.out).exists():
        raise InputError(f"out: {settings.out} exists; choose another --out or remove it")
    device = best_device()
    precision = resolve_precision(settings.precision, device)
    model = load_classifier(settings.model).to(device)
    model.encoder.use_attention(
        choose_attention(model.config, settings.attention, device=device, dtype=precision.dtype)
    )
    tokenizer = load_tokenizer(settings.model)
    check_vocabulary(len(tokenizer), model.config.vocab_size, settings.model)
    max_tokens = settings.max_tokens or min(tokenizer.model_max_length, model.config.max_positions)
    check_max_tokens(max_tokens, model.config.max_positions, settings.model)
    encoded = encode(tokenizer, texts, texts_b, max_tokens=max_tokens, token_types=model.config.token_types > 1)
    logits_NC = score_texts(model, encoded, precision=precision, max_batch_tokens=settings.batch_tokens)
    predictions = list(_lines(rows, logits_NC, model.labels))
    if settings.out:
        _write(Path(settings.out), predictions)
        console.print(f"{len(predictions):,} predictions in {settings.out}")
    else:
        _print(console, predictions, texts)
    if encoded.truncated:
        console.print(
            f"{encoded.truncated:,} of {len(encoded):,} inputs cut to {max_tokens} tokens, "
            f"{encoded.cut_tokens:,} tokens lost"
        )
    return predictions


def _read(settings: PredictSettings) -> tuple[list[int], list[str], list[str] | None]:
    """Row numbers, texts, and second texts where the inputs are pairs."""
    if not settings.file:
        rows = list(range(1, len(settings.texts) + 1))
        return rows, check_texts("texts", settings.texts, rows, "texts"), None
    table = read_file(settings.file, [settings.text, *([settings.text_b] if settings.text_b else [])])
    texts, *more = [check_texts(table.source, values, table.rows, name) for name, values in table.columns.items()]
    return table.rows, texts, more[0] if more else None


def _lines(rows: list[int], logits_NC: torch.Tensor, labels: list[str]) -> Iterator[dict[str, Any]]:
    for row, probabilities_C in zip(rows, logits_NC.softmax(1)):
        yield {
            "row": row,
            "prediction": labels[int(probabilities_C.argmax())],
            "probabilities": {name: round(p, 8) for name, p in zip(labels, probabilities_C.tolist())},
        }


def _write(path: Path, predictions: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in predictions)


def _print(console: Console, predictions: list[dict[str, Any]], texts: list[str]) -> None:
    rows = [
        [
            str(line["row"]),
            line["prediction"],
            f"{line['probabilities'][line['prediction']]:.3f}",
            text if len(text) <= 60 else f"{text[:57]}...",
        ]
        for line, text in zip(predictions, texts)
    ]
    print_table(console, ["row", "prediction", "probability", "text"], rows)
