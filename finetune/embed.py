"""Vectors of texts, packed; and exact search with them, measured on corpus, queries and judgements.

N texts, Q queries, D hidden size.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch.nn.functional import normalize
from transformers.utils import cached_file

from encoderkit.encoder.checkpoint import load_encoder
from encoderkit.encoder.classifier import first_token, mean_of_tokens
from encoderkit.encoder.model import Encoder, choose_attention
from encoderkit.encoder.precision import Precision, resolve_precision
from encoderkit.finetune.encoding import encode
from encoderkit.finetune.examples import check_texts
from encoderkit.finetune.inference import best_device, check_max_tokens, compute_by_length
from encoderkit.finetune.retrieval import Judgements, read_judgements, retrieval_scores, search
from encoderkit.finetune.settings import EmbedSettings
from encoderkit.finetune.tables import read_file
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.run_folder import replace_file, whole_file
from encoderkit.pretrain.terminal import plain_console
from encoderkit.pretrain.tokenizer import check_vocabulary, load_tokenizer


class Embedder:
    """An encoder with its tokenizer that turns texts into vectors."""

    def __init__(self, settings: EmbedSettings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.device = best_device()
        self.precision: Precision = resolve_precision(settings.precision, self.device)
        self.encoder: Encoder = load_encoder(settings.model).to(self.device)
        config = self.encoder.config
        self.encoder.use_attention(
            choose_attention(config, settings.attention, device=self.device, dtype=self.precision.dtype)
        )
        self.tokenizer = load_tokenizer(settings.model)
        check_vocabulary(self.tokenizer, config.vocab_size, settings.model)
        self.max_tokens = settings.max_tokens or min(self.tokenizer.model_max_length, config.max_positions)
        check_max_tokens(self.max_tokens, config.max_positions, settings.model)
        self.pooling = settings.pooling or own_pooling(settings.model)

    def __call__(self, texts: list[str], what: str) -> np.ndarray:
        """(N, D) float32, of length 1 where settings.normalized."""
        pool = mean_of_tokens if self.pooling == "mean" else first_token
        types = self.encoder.config.token_types > 1
        encoded = encode(self.tokenizer, texts, None, max_tokens=self.max_tokens, token_types=types)
        if encoded.truncated:
            self.console.print(f"{encoded.truncated:,} of {len(texts):,} {what} cut to {self.max_tokens} tokens")
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(f"{len(texts):,} {what}", total=int(encoded.lengths().sum()))
            vectors_ND = compute_by_length(
                partial(pool, self.encoder),
                encoded,
                self.device,
                self.precision,
                self.settings.batch_tokens,
                tell=partial(bar.advance, task),
            )
        return (normalize(vectors_ND) if self.settings.normalized else vectors_ND).numpy()


def own_pooling(model: str) -> str:
    """What a SentenceTransformer, a folder or a hub name, makes its vectors of: mean or cls; mean for any other model.

    Raises InputError where that is another way.
    """
    name = "1_Pooling/config.json"
    try:
        file = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        config = {"pooling_mode": "mean"} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
        mode = config.get("pooling_mode")
    except (OSError, ValueError, AttributeError) as error:
        why = str(error).partition("\n")[0]
        raise InputError(f"{model}: {name} cannot be read ({why}); give --pooling mean or cls") from error
    if mode is None:  # as written before version 6 of sentence-transformers
        older = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        chosen = [key for key in config if key.startswith("pooling_mode_") and config[key] is True]
        mode = older.get(chosen[0]) if len(chosen) == 1 else chosen
    if mode not in ("mean", "cls"):
        raise InputError(f"{file}: neither the mean of all tokens nor the first one; give --pooling mean or cls")
    return mode


def embed(settings: EmbedSettings, *, console: Console | None = None) -> None:
    """Write vectors of settings.file, or measure search: the command encoderkit-finetune embed.

    Raises InputError for a file, a column or a folder that cannot be used.
    """
    console = console or plain_console()
    if settings.file is None:
        measure_search(settings, console)
        return
    table = read_file(settings.file, [settings.text])
    texts = check_texts(table.source, table.columns[settings.text], table.rows, settings.text)
    began = time.perf_counter()
    vectors_ND = Embedder(settings, console)(texts, "texts")
    assert settings.out is not None  # as the settings see to
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as file:
        if out.suffix == ".npy":
            np.save(file, vectors_ND)
        else:
            _write_parquet(file, table.rows, vectors_ND)
    seconds = time.perf_counter() - began
    console.print(f"{out}: {len(texts):,} vectors of {vectors_ND.shape[1]}, {seconds:,.1f} s")


def measure_search(settings: EmbedSettings, console: Console) -> dict[str, Any]:
    """Embed corpus and queries, rank every document for every query, and print and write the scores."""
    corpus, queries, qrels = (str(file) for file in (settings.corpus, settings.queries, settings.qrels))
    judged: Judgements = read_judgements(corpus, queries, qrels, settings.gains)
    embedder = Embedder(settings, console)
    corpus_ND, queries_QD = embedder(judged.documents, "documents"), embedder(judged.queries, "queries")
    scores = retrieval_scores(search(queries_QD, corpus_ND), judged.gains)
    found = {"model": settings.model, "pooling": embedder.pooling, **scores}
    told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float))
    console.print(f"{told}; {scores['queries']:,} queries, {len(judged.documents):,} documents")
    if settings.out is not None:
        Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(settings.out), json.dumps(found, indent=1) + "\n")
    return found


def _write_parquet(file: BinaryIO, rows: list[int], vectors_ND: np.ndarray) -> None:
    """row: its number in the file; vector: D float32."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), vectors_ND.shape[1])
    pq.write_table(pa.table({"row": pa.array(rows, pa.int64()), "vector": vectors}), file)
