"""Answers for new rows, from a fine-tuned folder of any kind of task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from encoderkit.encoder.checkpoint import classifier_kind, load_classifier
from encoderkit.encoder.model import choose_attention
from encoderkit.encoder.precision import resolve_precision
from encoderkit.finetune.cells import check_texts, row_list
from encoderkit.finetune.examples import READERS, TaggedExample, TextExample
from encoderkit.finetune.inference import best_device, check_max_tokens, score_texts
from encoderkit.finetune.run_folder import write_predictions
from encoderkit.finetune.settings import PredictSettings, check_windows
from encoderkit.finetune.squad import read_squad_or_file
from encoderkit.finetune.task_head import Limits
from encoderkit.finetune.task_heads import head_of
from encoderkit.finetune.tasks import Columns, Kind, Task, check_columns
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.terminal import plain_console, print_table
from encoderkit.pretrain.tokenizer import check_vocabulary, load_tokenizer


def predict(settings: PredictSettings, *, console: Console | None = None) -> list[dict[str, Any]]:
    """Answer rows; write the answers to settings.out, or print a table.

    Returns one dict a row, in order: row, prediction, and what it was chosen among, such as probabilities.
    Raises InputError for a file, a column or a folder that cannot be used.
    """
    console = console or plain_console()
    if settings.out and Path(settings.out).exists():
        raise InputError(f"out: {settings.out} exists; choose another --out or remove it")
    kind = classifier_kind(settings.model)
    device = best_device()
    precision = resolve_precision(settings.precision, device)
    model = load_classifier(settings.model, kind=kind).to(device)
    make_head = head_of(model)
    examples = _read(settings, make_head.kind)
    model.encoder.use_attention(
        choose_attention(model.config, settings.attention, device=device, dtype=precision.dtype)
    )
    tokenizer = load_tokenizer(settings.model)
    check_vocabulary(tokenizer, model.config.vocab_size, settings.model)
    max_tokens = settings.max_tokens or min(tokenizer.model_max_length, model.config.max_positions)
    check_max_tokens(max_tokens, model.config.max_positions, settings.model)
    if make_head.kind == "question_answering":
        check_windows(max_tokens, settings.qa.stride)
    limits = Limits(max_tokens, model.config.token_types > 1, qa=settings.qa)
    head = make_head(model.labels, limits, unanswerable=settings.unanswerable)
    prepared = head.prepare(tokenizer, examples)
    encoded = prepared.encoded
    outputs = score_texts(model, encoded, precision=precision, max_batch_tokens=settings.batch_tokens)
    answers = head.answers(prepared, outputs)
    predictions = [{"row": example.row, **answer} for example, answer in zip(examples, answers)]
    if settings.out:
        Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
        write_predictions(Path(settings.out), iter(predictions))
        console.print(f"{len(predictions):,} predictions in {settings.out}")
    else:
        _print(console, predictions, examples)
    if encoded.truncated:
        console.print(
            f"{encoded.truncated:,} of {len(encoded):,} inputs cut to {max_tokens} tokens, "
            f"{encoded.cut_tokens:,} tokens lost"
        )
    return predictions


def _read(settings: PredictSettings, kind: Kind) -> list[Any]:
    """Examples without labels."""
    if settings.file:
        task = Task(kind=kind, columns=settings.columns)
        check_columns(task.columns, kind, labelled=False)
        columns = Columns(**{**vars(task.columns), "label": None})
        table = read_squad_or_file(settings.file, columns.names())
        examples = READERS[kind].examples(table, task, [], labelled=False)
        READERS[kind].check_split(table.source, examples)
        return examples
    if kind in ("multiple_choice", "question_answering"):
        raise InputError(f"texts is set, but the model is for {kind}; give a file with the columns of its rows")
    rows = list(range(1, len(settings.texts) + 1))
    texts = check_texts("texts", settings.texts, rows, "texts")
    if kind == "tagging":
        if blank := [row for row, text in zip(rows, texts) if not text.split()]:
            raise InputError(f"texts: no words in {row_list(blank)}; leave them out")
        return [TaggedExample(row, text.split(), None) for row, text in zip(rows, texts)]
    return [TextExample(row, text, None, None) for row, text in zip(rows, texts)]


def _print(console: Console, predictions: list[dict[str, Any]], examples: list[Any]) -> None:
    """A table of rows, answers, how probable they are where that is known, and inputs."""
    rows = []
    for line, example in zip(predictions, examples):
        answer, shares = line["prediction"], line.get("probabilities")
        share = shares[answer] if shares is not None and not isinstance(answer, list) else None
        rows.append(
            [
                str(line["row"]),
                " ".join(answer) if isinstance(answer, list) else str(answer),
                "" if share is None else f"{share:.3f}",
                _shown(example),
            ]
        )
    print_table(console, ["row", "prediction", "probability", "input"], rows)


def _shown(example: Any) -> str:
    words = getattr(example, "words", None)
    text = " ".join(words) if words else getattr(example, "text", None) or example.question
    return text if len(text) <= 60 else f"{text[:57]}..."
