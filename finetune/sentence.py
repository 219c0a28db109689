"""Vectors of sentences, learned from pairs by sentence-transformers; what it trains, its Trainer trains.

Pairs without scores: in-batch contrastive (Henderson et al. 2017, arXiv:1705.00652). Pairs with scores: CoSENT (Su
2022, kexue.fm/archives/8847), or the squared error of the cosine (Reimers and Gurevych 2019, arXiv:1908.10084).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from encoderkit.encoder.checkpoint import load_encoder
from encoderkit.encoder.precision import resolve_precision
from encoderkit.finetune.data import LabelledData, Split, load_data
from encoderkit.finetune.inference import best_device, check_max_tokens
from encoderkit.finetune.run_folder import check_out, held
from encoderkit.finetune.settings import SentenceSettings
from encoderkit.finetune.tasks import Task
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import dump_yaml
from encoderkit.pretrain.run_folder import replace_file
from encoderkit.pretrain.terminal import plain_console
from encoderkit.pretrain.tokenizer import check_vocabulary, load_tokenizer

LOSSES = {
    "contrastive": "MultipleNegativesRankingLoss",
    "cosent": "CoSENTLoss",
    "cosine": "CosineSimilarityLoss",
}  # classes of sentence_transformers.losses


def train_sentences(settings: SentenceSettings, *, console: Console | None = None) -> dict[str, Any]:
    """Train, measure and write the run folder: config.yaml, metrics.json and final/, a SentenceTransformer.

    Returns what metrics.json holds: of each split the figure before and after, by name. Raises InputError where
    sentence-transformers is missing, and for a file, a column or a folder that cannot be used.
    """
    try:
        import sentence_transformers as library
        from sentence_transformers.sentence_transformer import losses, modules
    except ImportError as error:
        raise InputError(
            "sentence needs the package sentence-transformers; pip install 'encoderkit[sentence]'"
        ) from error
    console = console or plain_console()
    out = check_out(settings.out)
    scored = settings.columns.label is not None
    columns = replace(settings.columns, label=settings.columns.label or "")
    data = load_data(Task(kind="regression", data=settings.data, columns=columns))
    config = load_encoder(settings.model).config
    check_vocabulary(load_tokenizer(settings.model), config.vocab_size, settings.model)
    check_max_tokens(settings.max_tokens, config.max_positions, settings.model)
    device = best_device()
    precision = resolve_precision(settings.precision, device)

    # Named, so that an attention implementation that the folder asks for is not fetched.
    attention = {"attn_implementation": "sdpa"}
    first = modules.Transformer(settings.model, max_seq_length=settings.max_tokens, model_kwargs=attention)
    model = library.SentenceTransformer(modules=[first, modules.Pooling(config.hidden_size, settings.pooling)]).float()
    evaluators = {name: _evaluator(name, split, scored, settings.batch_size) for name, split in data.splits().items()}
    before = {name: measure(model) for name, measure in evaluators.items()}
    loss = LOSSES[settings.loss or ("cosent" if scored else "contrastive")]
    is_first = os.environ.get("RANK", "0") == "0"
    with held(out) if is_first else contextlib.nullcontext():
        if is_first:
            check_out(settings.out)  # another process may have filled it since
        trainer = library.SentenceTransformerTrainer(
            model=model,
            args=library.SentenceTransformerTrainingArguments(
                str(out / "trainer"),
                num_train_epochs=settings.epochs,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=settings.lr,
                warmup_steps=settings.warmup,
                bf16=precision.name == "bf16",
                use_cpu=device.type == "cpu",  # without it, bf16 is refused there
                batch_sampler="batch_sampler" if scored else "no_duplicates",  # a duplicate would be a wrong negative
                eval_strategy="epoch",
                save_strategy="epoch",
                save_total_limit=1,
                load_best_model_at_end=True,
                metric_for_best_model=f"eval_{evaluators['validation'].primary_metric}",
                report_to="none",
                disable_tqdm=not console.is_terminal,
                seed=settings.seed,
            ),
            train_dataset=_dataset(data, scored),
            loss=getattr(losses, loss)(model),
            evaluator=evaluators["validation"],
        )
        trainer.train()
        counts = {name: len(split) for name, split in {"train": data.train, **data.splits()}.items()}
        found: dict[str, Any] = {"model": settings.model, "pairs": counts}
        for name, measure in evaluators.items():
            key = measure.primary_metric
            found[name] = {
                "metric": key.removeprefix(f"{name}_"),
                "before": before[name][key],
                "after": measure(model)[key],
            }
        if is_first:
            _write(out, settings, model, found, console)
    return found


def _evaluator(name: str, split: Split, scored: bool, batch_size: int) -> Any:
    """Spearman's correlation of cosines with the scores; without scores, how often a text is nearest to its partner."""
    from sentence_transformers.sentence_transformer import evaluation

    first, second = ([getattr(example, side) for example in split.examples] for side in ("text", "text_b"))
    options: dict[str, Any] = {"batch_size": batch_size, "name": name, "write_csv": False}
    if not scored:
        return evaluation.TranslationEvaluator(first, second, **options)
    scores = [example.label for example in split.examples]
    return evaluation.EmbeddingSimilarityEvaluator(first, second, scores, main_similarity="cosine", **options)


def _dataset(data: LabelledData, scored: bool) -> Any:
    """The training pairs; scores from 0 to 1, as cosines are compared with them."""
    import datasets

    examples = data.train.examples
    columns = {"text": [e.text for e in examples], "text_b": [e.text_b for e in examples]}
    if scored:
        low, high = min(e.label for e in examples), max(e.label for e in examples)
        columns["score"] = [(e.label - low) / (high - low) for e in examples]
    return datasets.Dataset.from_dict(columns)


def _write(out: Path, settings: SentenceSettings, model: Any, found: dict[str, Any], console: Console) -> None:
    (out / "config.yaml").write_text(dump_yaml(settings), encoding="utf-8")
    model.save(str(out / "final"))
    shutil.rmtree(out / "trainer", ignore_errors=True)
    replace_file(out / "metrics.json", json.dumps(found, indent=1) + "\n")
    for name in ("validation", "test"):
        if name in found:
            of = found[name]
            console.print(f"{name}: {of['metric']} {of['before']:.4f} before, {of['after']:.4f} after")
    console.print(f"{out}/final opens with sentence_transformers.SentenceTransformer, and with embed")
