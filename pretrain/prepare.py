"""Text to store: tokenized once, by all cores, shard by shard, so that a killed run goes on; renamed when whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.corpora import Corpora, Document, check_read_once
from encoderkit.pretrain.corpus_files import Interrupted
from encoderkit.pretrain.data_settings import PrepareSettings
from encoderkit.pretrain.duplicates import FILTERS
from encoderkit.pretrain.encode import Encoder, encode_all
from encoderkit.pretrain.prepare_progress import PrepareProgress
from encoderkit.pretrain.run_folder import lock_folder
from encoderkit.pretrain.selection import Drop, Selection
from encoderkit.pretrain.shards import SHARD_TOKENS, ShardWriter
from encoderkit.pretrain.store import FORMAT, MARKS, Store, describe_files
from encoderkit.pretrain.text_bounds import check_language

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_CHARACTERS = 500_000  # of text that is tokenized at once, by one process: one Arrow record batch
LARGEST_BLOCK = 10_000  # documents among which one is held out: the smallest share is one in this many
HELD_OUT_BATCH = 256  # documents that are written at once
# Keys of the manifest that decide the store, besides sources and held_out.
DECIDING = (
    "format",
    "held_out_by",
    "text_column",
    "documents",
    "invalid_utf8",
    "max_documents",
    "duplicates",
    "sentences",
    "shard",
    "tokenizer",
)


def prepare(sources: list[str], tokenizer: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Tokenize sources into a store and return its manifest; a store of the same inputs is left as it is.

    options: the other fields of PrepareSettings. A prepare that was killed goes on after its last whole shard and gives
    the same bytes. More than one worker are processes that import the calling script: guard it by __name__.
    Raises InputError when out is in use, a source cannot be read, or nothing is left to train on.
    """
    given = {"held_out": str(options.pop("held_out", 0.01)), "workers": options.pop("workers", 1)}
    return _prepare(PrepareSettings(sources=sources, tokenizer=str(tokenizer), out=str(out), **given, **options))


def run_prepare(settings: PrepareSettings) -> None:
    """Make a store and say what is in it: the command encoderkit-pretrain prepare."""
    from encoderkit.pretrain.terminal import plain_console

    manifest, console = _prepare(settings), plain_console()
    out = settings.arrived or settings.out
    dropped = ", ".join(f"{count:,} {why}" for why, count in manifest["dropped"].items())
    console.print(
        f"{out}: {manifest['tokens']:,} tokens in {manifest['num_documents']:,} documents, "
        f"{manifest['num_held_out']:,} held out; dropped: {dropped or 'none'}; "
        f"{manifest['unknown_tokens']:,} unknown tokens"
        + (f"; {manifest['replaced_bytes']:,} bytes were not UTF-8" if manifest["replaced_bytes"] else "")
    )
    if any("python-docs" in source["source"] for source in manifest["sources"]):
        console.print("python-docs differs from machine to machine: compare its scores on this machine only")


def _prepare(settings: PrepareSettings) -> dict[str, Any]:
    from encoderkit.pretrain.tokenizer import load_tokenizer, tokenizer_hash

    check_language(settings.sentences)
    out, share = Path(settings.arrived or settings.out), _share(settings.held_out)
    if share is None and settings.held_out_by is not None:
        raise InputError(
            f"held_out_by is {settings.held_out_by}, and held_out {settings.held_out} names what is held out; leave "
            "one of them out"
        )
    reading: dict[str, Any] = {name: getattr(settings, name) for name in ("text_column", "documents", "invalid_utf8")}
    group_column = settings.held_out_by if share else None
    corpora = Corpora(settings.sources, group_column=group_column, max_documents=settings.max_documents, **reading)
    kept_apart = None if share else Corpora([settings.held_out], **reading)
    check_read_once(corpora, kept_apart)
    fast = load_tokenizer(settings.tokenizer)
    inputs = {
        "format": FORMAT,
        "sources": corpora.inputs(),
        "held_out": share or (kept_apart.inputs() if kept_apart else None),
        "held_out_by": settings.held_out_by,
        **reading,
        "max_documents": settings.max_documents,
        "duplicates": settings.duplicates,
        "sentences": settings.sentences,
        "shard": settings.shard,
        "tokenizer": tokenizer_hash(fast),
    }
    assert inputs.keys() == {"sources", "held_out", *DECIDING}
    wanted = inputs_hash(inputs)
    shards: list[Path] = []
    if settings.arrived is not None:
        shards = _arrived(Path(settings.out), wanted)
        wanted = f"{wanted}, first {len(shards)} shards"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _unchanged(out, wanted)
    partial = _partial(out)
    lock = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(partial)
        _take_up(partial, wanted)
        if settings.arrived is not None:
            _link_shards(shards, partial / "tokens")
        counted = _write(partial, settings, corpora, kept_apart, share, fast)
        manifest = {**inputs, "inputs_hash": wanted, **counted, "versions": _versions()}
        finish(partial, out, manifest)
    except InputError as error:
        if lock is not None and not isinstance(error, Interrupted):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        raise InputError(
            f"{out} cannot be written: {error.strerror or error}; "
            f"run the same command again to go on from what lies in {partial}, or remove it"
        ) from error
    finally:
        if lock is not None:
            os.close(lock)
    return manifest


def _partial(out: Path) -> Path:
    """Where a store is written until it is whole."""
    return out.parent / f".{out.name}.partial"


def _arrived(out: Path, wanted: str) -> list[Path]:
    """The whole shards of a prepare of these inputs into out, running or stopped. They never change."""
    partial = _partial(out)
    mark = partial / "inputs_hash"
    if (out / "manifest.json").is_file():
        raise InputError(f"{out} is whole; use it")
    if not mark.is_file():
        raise InputError(f"{out}: no prepare is under way there, {partial} is missing; start one without --arrived")
    if mark.read_text() != wanted:
        raise InputError(f"{partial} is made from other sources, settings or tokenizer; give those of its prepare")
    shards = sorted((partial / "tokens").glob("data-*.arrow"))
    if not shards:
        raise InputError(f"{partial}: no shard is whole yet, of {SHARD_TOKENS:,} tokens; try again later")
    return shards


def _link_shards(shards: list[Path], folder: Path) -> None:
    """The same files in another folder; copies where links do not reach."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for shard in shards:
        try:
            os.link(shard, folder / shard.name)
        except OSError:
            shutil.copyfile(shard, folder / shard.name)


def finish(partial: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Add the manifest to a folder that holds everything else, and give it its name.

    What holds the folder, and lets a killed prepare go on, goes last.
    """
    manifest["files"] = describe_files(partial)
    with (partial / "manifest.json").open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, out)
    for name in MARKS:
        (out / name).unlink(missing_ok=True)


def _take_up(partial: Path, wanted: str) -> None:
    """Empty the folder of a killed prepare unless it had the same inputs."""
    mark = partial / "inputs_hash"
    if mark.is_file() and mark.read_text() == wanted:
        return
    for path in partial.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    mark.write_text(wanted)


def inputs_hash(inputs: dict[str, Any]) -> str:
    """sha256 of what decides the store, in a manifest or before there is one; where local files lie does not."""
    named = [inputs["sources"], inputs["held_out"] if isinstance(inputs["held_out"], list) else []]
    contents = [[e if "hub" in e else {k: e[k] for k in e if k != "source"} for e in part] for part in named]
    share = None if isinstance(inputs["held_out"], list) else inputs["held_out"]
    # What is refused changes no store, so those made before this was a setting are the same.
    rest = {key: inputs[key] for key in DECIDING if key != "invalid_utf8" or inputs.get(key, "refuse") != "refuse"}
    return hashlib.sha256(json.dumps([share, rest, contents], sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("encoderkit", "tokenizers", "sentencex", "pyarrow")}


def _unchanged(out: Path, wanted: str) -> dict[str, Any]:
    try:
        store = Store.open(out)
    except InputError as error:
        raise InputError(f"{out} is in use; give --out a new or empty folder ({error})") from error
    made = str(store.manifest.get("inputs_hash"))
    before, _, part = made.partition(", ")
    if made != wanted and part and wanted.startswith(before):
        raise InputError(f"{out} holds the {part} of this prepare; give --arrived a new folder for more")
    if made != wanted:
        raise InputError(f"{out} is a store made from other sources, settings or tokenizer; give --out a new folder")
    print(f"{out} is up to date: sources, settings and tokenizer are the same", file=sys.stderr)
    return store.manifest


def _share(held_out: str) -> float | None:
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
    settings: PrepareSettings,
    corpora: Corpora,
    kept_apart: Corpora | None,
    share: float | None,
    fast: PreTrainedTokenizerFast,
) -> dict[str, Any]:
    """Write everything but the manifest; returns the counts for it."""
    encoder = Encoder.of(fast, settings.sentences)
    workers = settings.workers or _cores()
    writer = ShardWriter(folder / "tokens", encoder.vocab_size, encoder.dtype)
    with HeldOutWriter(folder / "held_out.parquet") as held, PrepareProgress(corpora) as progress:
        drop: list[Drop] = [make() for make in FILTERS[settings.duplicates]]
        selection = Selection(corpora, kept_apart, share, held.add, drop)
        mine = Share(_batched(selection), settings.shard)
        progress.tell_size(encoder, workers, mine.shards, folder, writer)
        last = None if settings.arrived is None else writer.batches  # what arrived is tokenized, and read for the rest
        for batch, notes in encode_all(islice(mine, writer.batches, last), encoder, workers=workers):
            writer.add(batch, notes)
            progress.update(writer)
    writer.close()
    if not writer.documents and settings.shard is None:
        raise InputError(
            f"{', '.join(corpora.names)}: 0 documents to train on, "
            f"{selection.held_out.documents} held out; give more text, another documents setting, or a file as held_out"
        )
    if not selection.held_out.documents:
        raise InputError(
            f"held_out {settings.held_out}, held_out_by {settings.held_out_by}: 0 documents are held out; "
            "give a larger share, another column, or a file as held_out"
        )
    np.save(folder / "unigram_counts.npy", writer.counts)
    fast.save_pretrained(str(folder / "tokenizer"))
    tokenized = {"documents": mine.documents, "characters": mine.characters}
    ledger = selection.ledger(stopped=settings.arrived is not None)
    counted = counts_of(writer, tokenized, ledger, fast.unk_token_id)
    read = [corpora.reading, *([kept_apart.reading] if kept_apart else [])]
    counted["replaced_bytes"] = sum(reading.replaced for reading in read)
    assert settings.shard or tokenized == counted["ledger"]["trained"], "documents lost on the way to the tokenizer"
    return counted


def counts_of(
    writer: ShardWriter, tokenized: dict[str, int], ledger: dict[str, Any], unknown_id: int
) -> dict[str, Any]:
    """What the manifest says of the tokens written from the documents that were tokenized, and of all others."""
    empty = {
        "documents": tokenized["documents"] - writer.documents,
        "characters": writer.notes["characters_without_tokens"],
    }
    dropped = {reason: amount["documents"] for reason, amount in ledger["dropped"].items()}
    return {
        "num_documents": writer.documents,
        "num_held_out": ledger["held_out"]["documents"],
        "tokens": writer.tokens,
        "unknown_id": unknown_id,
        "unknown_tokens": int(writer.counts[unknown_id]),
        "dropped": dropped | ({"without tokens": empty["documents"]} if empty["documents"] else {}),
        "special_in_text": writer.notes["special_in_text"],
        "vocab_size": len(writer.counts),
        "tokenized": tokenized | {"without_tokens": empty},
        "ledger": ledger,
    }


class Share:
    """The texts of every n-th batch, the first one the i-th, for shard i/n; of all batches where it is None.

    documents, characters: in the batches given out so far.
    """

    def __init__(self, batches: Iterable[list[Document]], shard: str | None) -> None:
        self.number, self.shards = (1, 1) if shard is None else (int(part) for part in shard.split("/"))
        self.batches = batches
        self.documents = self.characters = 0

    def __iter__(self) -> Iterator[list[str]]:
        for batch in islice(self.batches, self.number - 1, None, self.shards):
            self.documents += len(batch)
            self.characters += sum(len(document.text) for document in batch)
            yield [document.text for document in batch]


class HeldOutWriter:
    """held_out.parquet, written some documents at a time."""

    def __init__(self, path: Path) -> None:
        self.schema = pa.schema([("id", pa.string()), ("text", pa.string())])
        self.writer = pq.ParquetWriter(path, self.schema)
        self.held: list[Document] = []

    def add(self, document: Document) -> None:
        """Append one document."""
        self.held.append(document)
        if len(self.held) == HELD_OUT_BATCH:
            self._flush()

    def __enter__(self) -> HeldOutWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self.writer.close()

    def _flush(self) -> None:
        columns = [[document.id for document in self.held], [document.text for document in self.held]]
        self.writer.write_table(pa.table(columns, schema=self.schema))
        self.held = []


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
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
