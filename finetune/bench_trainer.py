"""Whole jobs beside transformers' Trainer, on the CPU: rows of text in, a saved model or saved answers out.

Everyone reads the same files, tokenizes them, and trains the same network with the same optimizer, dropout (none),
clipping, batch size and number format for an epoch, answers the rows, and saves it; or only answers the rows of a file.
The Trainer pads each batch to its longest text: of 32 rows in order of chance, or grouped by length, and then 256 at a
time where it answers.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from encoderkit.encoder.checkpoint import save_classifier
from encoderkit.encoder.classifier import SequenceClassifier
from encoderkit.encoder.config import EncoderConfig
from encoderkit.finetune.bench_candidates import LABELS, Work
from encoderkit.finetune.loop import finetune
from encoderkit.finetune.predict import predict
from encoderkit.finetune.settings import FinetuneSettings, PredictSettings
from encoderkit.finetune.tasks import TaskData
from encoderkit.pretrain.settings import TaskOptimizer
from encoderkit.pretrain.tokenizer import load_tokenizer

BATCH = 32  # rows of an optimizer step
RATE = 1e-4  # highest learning rate; a tenth of the steps rise to it, the others fall to 0


class Job:
    """Files of labelled rows, and the folder of a network that is to learn or to answer them."""

    def __init__(self, config: EncoderConfig, tokenizer: Path, lines: list[str], max_tokens: int, folder: Path) -> None:
        self.folder, self.max_tokens = folder, max_tokens
        self.runs = itertools.count()
        folder.mkdir(parents=True)
        loaded = load_tokenizer(tokenizer)
        self.tokens = sum(map(len, loaded(lines, truncation=True, max_length=max_tokens)["input_ids"]))
        self.file = folder / "rows.jsonl"
        rows = ({"text": line, "label": LABELS[i % len(LABELS)]} for i, line in enumerate(lines))
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        save_classifier(SequenceClassifier(config, LABELS), folder / "model", loaded)

    def new_folder(self) -> Path:
        """For what a run writes."""
        return self.folder / f"run{next(self.runs)}"


def our_job(make: Callable[[], Job], learns: bool, precision: str) -> Work:
    """encoderkit-finetune run, or predict."""
    return partial(_ours, make(), learns, precision), make().tokens


def their_job(make: Callable[[], Job], learns: bool, precision: str, by_length: bool) -> Work:
    """A script around transformers' Trainer."""
    return partial(_theirs, make(), learns, precision, by_length), make().tokens


def _ours(job: Job, learns: bool, precision: Any) -> None:
    out, console = job.new_folder(), Console(file=io.StringIO())
    if learns:
        settings = FinetuneSettings(
            model=str(job.folder / "model"),
            data=TaskData(train=[str(job.file)], validation=[str(job.file)]),
            optimizer=TaskOptimizer(name="adamw", lr=RATE, weight_decay=0.0, betas=(0.9, 0.999), clip=1.0),
            epochs=1,
            batch_size=BATCH,
            max_tokens=job.max_tokens,
            precision=precision,
            out=str(out),
        )
        finetune(settings, console=console)
        shutil.rmtree(out)
    else:
        predict(
            PredictSettings(
                model=str(job.folder / "model"), file=str(job.file), out=str(out), max_tokens=job.max_tokens,
                precision=precision,
            ),
            console=console,
        )  # fmt: skip
        out.unlink()


def _theirs(job: Job, learns: bool, precision: str, by_length: bool) -> None:
    import datasets
    import numpy as np
    import transformers
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    out = job.new_folder()
    model = AutoModelForSequenceClassification.from_pretrained(job.folder / "model", attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(job.folder / "model")
    rows = datasets.Dataset.from_list([json.loads(line) for line in job.file.read_text().splitlines()])

    def encode(part: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenizer(part["text"], truncation=True, max_length=job.max_tokens)
        return {**ids, "label": [LABELS.index(label) for label in part["label"]]}

    encoded = asked = rows.map(encode, batched=True, remove_columns=["text"])
    if by_length:  # the Trainer groups the rows that it learns, and answers rows in their order
        asked = encoded.select(np.argsort([len(ids) for ids in encoded["input_ids"]], kind="stable")).flatten_indices()
    arguments = TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        bf16=precision == "bf16",
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=8 * BATCH if by_length else BATCH,
        optim="adamw_torch_fused",
        adam_epsilon=1e-6,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length" if by_length else "random",
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(
        model, arguments, DataCollatorWithPadding(tokenizer), train_dataset=encoded, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if learns:
            trainer.train()
            trainer.predict(asked)
            trainer.save_model(str(out / "final"))
        else:
            labels = np.argmax(trainer.predict(asked).predictions, axis=-1)
            out.mkdir(exist_ok=True)
            (out / "answers.json").write_text(json.dumps(np.asarray(LABELS)[labels].tolist()))
    shutil.rmtree(out, ignore_errors=True)
