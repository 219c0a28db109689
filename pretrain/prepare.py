"""Text to store: tokenized once, in parallel, written beside and renamed when whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.corpora import Corpora, Document, Documents
from encoderkit.pretrain.data_settings import PrepareSettings
from encoderkit.pretrain.store import FORMAT, Store, describe_files
from encoderkit.pretrain.text_bounds import check_language, sentence_lengths, token_spans, word_starts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_CHARACTERS = 1_000_000  # of text that is tokenized at once
BATCH_TOKENS = 1 << 20  # of one Arrow record batch, about
SHARD_TOKENS = 1 << 28  # of one Arrow file, about
LARGEST_BLOCK = 10_000  # documents among which one is held out: the smallest share is one in this many


def prepare(
    sources: list[str],
    tokenizer: str | Path,
    out: str | Path,
    *,
    held_out: float | str = 0.01,
    text_column: str = "text",
    documents: Documents = "blank-line",
    sentences: str = "en",
    workers: int = 0,
) -> dict[str, Any]:
    """Tokenize sources into a store and return its manifest; a store of the same inputs is left as it is.

    held_out: a share of the documents, or a source of its own. sentences: language of the sentence splitter, or none.
    workers: threads, 0 for all cores.
    Raises InputError when out is in use, a source cannot be read, or nothing is left to train on.
    """
    # Both are read once, when the library starts its threads.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(workers or os.cpu_count() or 1)
    from encoderkit.pretrain.tokenizer import load_tokenizer, tokenizer_hash

    check_language(sentences)
    out = Path(out)
    share = _share(held_out)
    corpora = Corpora(sources, text_column=text_column, documents=documents)
    kept_apart = None if share else Corpora([str(held_out)], text_column=text_column, documents=documents)
    fast = load_tokenizer(tokenizer)
    inputs = {
        "format": FORMAT,
        "sources": corpora.inputs(),
        "held_out": share or (kept_apart.inputs() if kept_apart else None),
        "text_column": text_column,
        "documents": documents,
        "sentences": sentences,
        "tokenizer": tokenizer_hash(fast),
    }
    inputs_hash = _hash(inputs)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _unchanged(out, inputs_hash)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        manifest = {
            **inputs,
            "inputs_hash": inputs_hash,
            **_write(partial, corpora, kept_apart, share, fast, sentences),
        }
        manifest["versions"] = {name: metadata.version(name) for name in ("encoderkit", "tokenizers", "pyarrow")}
        manifest["files"] = describe_files(partial)
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        os.replace(partial, out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def run_prepare(settings: PrepareSettings) -> None:
    """Make a store and say what is in it: the command encoderkit-pretrain prepare."""
    from rich.console import Console

    manifest = prepare(
        settings.sources,
        settings.tokenizer,
        settings.out,
        held_out=settings.held_out,
        text_column=settings.text_column,
        documents=settings.documents,
        sentences=settings.sentences,
        workers=settings.workers,
    )
    dropped = ", ".join(f"{count:,} {why}" for why, count in manifest["dropped"].items())
    Console().print(
        f"{settings.out}: {manifest['tokens']:,} tokens in {manifest['num_documents']:,} documents, "
        f"{manifest['num_held_out']:,} held out; dropped: {dropped or 'none'}; "
        f"{manifest['unknown_tokens']:,} unknown tokens",
        soft_wrap=True,
    )
    if any("python-docs" in source["source"] for source in manifest["sources"]):
        Console().print(
            "python-docs differs from machine to machine: compare its scores on this machine only", soft_wrap=True
        )


def _hash(inputs: dict[str, Any]) -> str:
    """sha256 of what decides the store; where local files lie does not."""
    named = [inputs["sources"], inputs["held_out"] if isinstance(inputs["held_out"], list) else []]
    contents = [[e if "hub" in e else {k: e[k] for k in e if k != "source"} for e in part] for part in named]
    share = None if isinstance(inputs["held_out"], list) else inputs["held_out"]
    rest = {key: value for key, value in inputs.items() if key not in ("sources", "held_out")}
    return hashlib.sha256(json.dumps([share, rest, contents], sort_keys=True).encode()).hexdigest()


def _unchanged(out: Path, inputs_hash: str) -> dict[str, Any]:
    try:
        store = Store.open(out)
    except InputError as error:
        raise InputError(f"{out} is in use; give --out a new or empty folder ({error})") from error
    if store.manifest.get("inputs_hash") != inputs_hash:
        raise InputError(f"{out} is a store made from other sources, settings or tokenizer; give --out a new folder")
    print(f"{out} is up to date: sources, settings and tokenizer are the same", file=sys.stderr)
    return store.manifest


def _share(held_out: float | str) -> float | None:
    """The share, or None when held_out is a source."""
    try:
        share = float(held_out)
    except ValueError:
        return None
    if not 1 / LARGEST_BLOCK <= share <= 0.5:
        raise InputError(f"held_out is {share:g}; expected a share from {1 / LARGEST_BLOCK:g} to 0.5, or a source")
    return share


def _write(
    folder: Path,
    corpora: Corpora,
    kept_apart: Corpora | None,
    share: float | None,
    fast: PreTrainedTokenizerFast,
    sentences: str,
) -> dict[str, Any]:
    """Write everything but the manifest; returns the counts for it."""
    held: list[Document] = list(kept_apart) if kept_apart else []
    encode = _Encoder(fast, sentences)
    shards = _Shards(folder / "tokens", np.dtype(np.uint16 if encode.vocab_size <= 1 << 16 else np.uint32))
    counts = np.zeros(encode.vocab_size, dtype=np.int64)
    empty = 0
    with _progress() as progress:
        task = progress.add_task("tokenizing", total=None, tokens=0)
        for batch in _batched(_training(corpora, share, held)):
            for encoded in encode([document.text for document in batch]):
                empty += not len(encoded.ids)
                if len(encoded.ids):
                    shards.add(encoded)
                    counts += np.bincount(encoded.ids, minlength=len(counts))
            progress.update(task, advance=len(batch), tokens=shards.tokens)
    shards.close()
    if not shards.documents:
        raise InputError(
            f"{', '.join(spec.source for spec in corpora.specs)}: 0 documents to train on, {len(held)} held out; "
            "give more text, another documents setting, or a file as held_out"
        )
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    columns = [[document.id for document in held], [document.text for document in held]]
    pq.write_table(pa.table(columns, schema=schema), folder / "held_out.parquet")
    np.save(folder / "unigram_counts.npy", counts)
    fast.save_pretrained(str(folder / "tokenizer"))
    dropped = corpora.dropped + (kept_apart.dropped if kept_apart else type(corpora.dropped)())
    return {
        "num_documents": shards.documents,
        "num_held_out": len(held),
        "tokens": shards.tokens,
        "unknown_tokens": int(counts[fast.unk_token_id]),
        "dropped": dict(sorted(dropped.items())) | ({"without tokens": empty} if empty else {}),
        "special_in_text": encode.special_in_text,
        "vocab_size": encode.vocab_size,
    }


def _training(corpora: Corpora, share: float | None, held: list[Document]) -> Iterator[Document]:
    """The documents to train on; one of each 1 / share goes to held, the one whose id has the smallest hash."""
    size = round(1 / share) if share else 1
    block: list[Document] = []
    for document in corpora:
        block.append(document)
        if len(block) == size:
            yield from _without_one(block, held) if share else block
            block = []
    # The last block is short: it gives one if it is the only one.
    yield from _without_one(block, held) if share and block and not held else block


def _without_one(block: list[Document], held: list[Document]) -> list[Document]:
    chosen = min(range(len(block)), key=lambda i: (hashlib.sha256(block[i].id.encode()).digest(), i))
    held.append(block[chosen])
    return block[:chosen] + block[chosen + 1 :]


def _batched(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class Encoded(NamedTuple):
    """One tokenized document. ids: (n,) int64. sentence_lengths: uint16, summing to n. word_starts: (n,) bool."""

    ids: np.ndarray
    sentence_lengths: np.ndarray
    word_starts: np.ndarray


class _Encoder:
    """Texts to ids without special tokens, with their bounds; text that spells a special token does not become one."""

    def __init__(self, fast: PreTrainedTokenizerFast, sentences: str) -> None:
        self.backend = fast.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        self.vocab_size = max(fast.get_vocab().values()) + 1
        self.unknown = fast.unk_token_id
        self.special = np.setdiff1d(np.array(fast.all_special_ids), [self.unknown])
        self.sentences = sentences
        self.special_in_text = 0  # tokens that were special ones all the same, now unknown ones

    def __call__(self, texts: list[str]) -> Iterator[Encoded]:
        for text, encoding in zip(texts, self.backend.encode_batch(texts, add_special_tokens=False)):
            ids = np.array(encoding.ids, dtype=np.int64)
            is_special = np.isin(ids, self.special)
            if is_special.any():
                self.special_in_text += int(is_special.sum())
                ids[is_special] = self.unknown
            spans = token_spans(encoding)
            yield Encoded(ids, sentence_lengths(text, spans, self.sentences), word_starts(text, encoding, spans))


class _Shards:
    """Arrow stream files of three list columns, and the two files by which `datasets` knows them."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        import datasets

        folder.mkdir()
        self.folder, self.dtype = folder, dtype
        kinds = {"input_ids": dtype.name, "sentence_lengths": "uint16", "word_starts": "uint8"}
        self.features = datasets.Features({name: datasets.List(datasets.Value(kind)) for name, kind in kinds.items()})
        self.names: list[str] = []
        self.writer: pa.RecordBatchStreamWriter | None = None
        self.held: list[tuple[np.ndarray, ...]] = []  # one array for each column, of each document
        self.held_tokens = self.shard_tokens = self.tokens = self.documents = 0

    def add(self, document: Encoded) -> None:
        """Append one document."""
        ids, sentences, words = document
        self.held.append((ids.astype(self.dtype), sentences, np.packbits(words, bitorder="little")))
        self.held_tokens += len(ids)
        self.tokens += len(ids)
        self.documents += 1
        if self.held_tokens >= BATCH_TOKENS:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the files of `datasets`."""
        import datasets

        self._flush()
        self._end_shard()
        datasets.DatasetInfo(features=self.features).write_to_directory(str(self.folder))
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in self.names],
            "_fingerprint": hashlib.sha256(f"{self.documents} {self.tokens}".encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (self.folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")

    def _flush(self) -> None:
        if not self.held:
            return
        if self.writer is None:
            self.names.append(f"data-{len(self.names):05d}.arrow")
            self.writer = pa.ipc.new_stream(str(self.folder / self.names[-1]), self.features.arrow_schema)
        schema = self.features.arrow_schema
        columns = [_list_array(arrays).cast(field.type) for arrays, field in zip(zip(*self.held), schema)]
        self.writer.write_batch(pa.record_batch(columns, schema=schema))
        self.shard_tokens += self.held_tokens
        self.held, self.held_tokens = [], 0
        if self.shard_tokens >= SHARD_TOKENS:
            self._end_shard()

    def _end_shard(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer, self.shard_tokens = None, 0


def _list_array(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0] + [len(array) for array in arrays], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


def _progress():
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} documents, {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
