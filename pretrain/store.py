"""A tokenized corpus on disk: memory-mapped Arrow that `datasets.load_from_disk` reads too, and a manifest.

tokens/            one document a row: input_ids, uint16, or uint32 for more than 65,536 types; sentence_lengths,
                   uint16 tokens, summing to the document's; word_starts, one bit a token, lowest bit first
held_out.parquet   id and text of the documents kept for the probe
unigram_counts.npy (V,) int64, how often each type occurs in tokens/
tokenizer/         a copy of the tokenizer
manifest.json      sources, counts, what was dropped and why, and size and sha256 of every file above
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.corpus_files import CorpusFile, check_unpacked, file_hash, read_rows

MARKS = ("inputs_hash", "lock")  # files of a folder that is not whole yet
FORMAT = 3  # of the folder; a store of another format is refused


class Store:
    """An open store. Token arrays are slices of mapped files: nothing is copied, and pages come when they are read."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._columns: list[dict[str, _Lists]] = []  # per record batch
        for name in sorted(name for name in manifest["files"] if name.endswith(".arrow")):
            mapped = pa.memory_map(str(folder / name))
            for batch in pa.ipc.open_stream(mapped):
                batch.validate()  # a stranger's lists may point outside their buffers
                self._columns.append({name: _Lists.of(batch.column(name)) for name in batch.schema.names})
        lengths = [np.diff(columns["input_ids"].offsets) for columns in self._columns]
        self.document_lengths = np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)  # (N,) tokens
        self._first = np.cumsum([0] + [len(part) for part in lengths]).tolist()  # first document of each record batch

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> Store:
        """Open a store; verify also compares every file's checksum, not only its size.

        Raises InputError naming the file that is missing or damaged.
        """
        folder = Path(folder)
        path = folder / "manifest.json"
        if not path.is_file():
            raise InputError(f"{folder} is not a store (no manifest.json); make one with encoderkit-pretrain prepare")
        try:
            manifest = json.loads(path.read_text())
            files, found_format = manifest["files"], manifest["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}); prepare the store again") from error
        if found_format != FORMAT:
            raise InputError(f"{folder} has store format {found_format}; expected {FORMAT}, prepare it again")
        for name, expected in files.items():
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{path} names {name}, outside the store; prepare it again")
            damage = _damage(folder / name, expected, verify)
            if damage:
                raise InputError(f"{folder / name} {damage}; the store is damaged, prepare it again")
        try:
            store = cls(folder, manifest)
        except (pa.ArrowException, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder}/tokens is damaged ({error}); prepare the store again") from error
        if store.document_lengths.min(initial=0) < 0:
            raise InputError(f"{folder}/tokens is damaged (a document ends before it begins); prepare the store again")
        return store

    def __reduce__(self):
        return Store, (self.folder, self.manifest)  # a loader worker maps the files itself

    @property
    def num_documents(self) -> int:
        """Documents to train on."""
        return len(self.document_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens to train on, special ones not counted."""
        return int(self.document_lengths.sum())

    @property
    def vocab_size(self) -> int:
        """Token types of the tokenizer."""
        return self.manifest["vocab_size"]

    @property
    def tokenizer_folder(self) -> Path:
        """A copy of the tokenizer."""
        return self.folder / "tokenizer"

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of the checksums of every file: equal for equal stores."""
        sums = {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def unigram_counts(self) -> np.ndarray:
        """(V,) int64: how often each type occurs."""
        path = self.folder / "unigram_counts.npy"
        try:
            counts = np.load(path, allow_pickle=False)
        except (ValueError, OSError) as error:
            raise InputError(f"{path} is damaged ({error}); prepare the store again") from error
        return counts

    def tokens(self, document: int) -> np.ndarray:
        """(n,) uint16 or uint32 view of one document's tokens, without special tokens."""
        return self._row("input_ids", document)

    def sentence_lengths(self, document: int) -> np.ndarray:
        """(sentences,) int64 tokens of each sentence of one document, none 0, summing to the document's."""
        return self._row("sentence_lengths", document).astype(np.int64)

    def word_starts(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """(n,) bool: which tokens from start to stop of one document begin a word; the first of the document does."""
        stop = int(self.document_lengths[document]) if stop is None else stop
        byte, bit = divmod(start, 8)
        packed = self._row("word_starts", document)[byte : -(-stop // 8)]
        return np.unpackbits(packed, count=stop - 8 * byte, bitorder="little")[bit:].view(bool)

    def held_out_texts(self) -> list[str]:
        """Texts of the documents kept for the probe. Raises InputError where they are damaged or fill memory."""
        path = self.folder / "held_out.parquet"
        texts, held, packed = [], 0, path.stat().st_size
        for where, row in read_rows(CorpusFile(str(path), path.name), ["text"], "line", lambda _: None):
            if not isinstance(row["text"], str):
                raise InputError(f"{path} {where} holds no text; the store is damaged, prepare it again")
            texts.append(row["text"])
            held += len(row["text"])
            check_unpacked(path, packed, held)  # a dictionary may say one long text for a thousand rows
        return texts

    def _row(self, column: str, document: int) -> np.ndarray:
        part = bisect.bisect_right(self._first, document) - 1
        values, offsets = self._columns[part][column]
        row = document - self._first[part]
        return values[offsets[row] : offsets[row + 1]]


class _Lists(NamedTuple):
    """A list column of one record batch. values: all lists end to end. offsets: (documents + 1,) bounds in values."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, column: pa.ListArray) -> _Lists:
        return cls(column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy(zero_copy_only=True))


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below a folder, but for its manifest and MARKS."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ("manifest.json", *MARKS))
    return {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": file_hash(p)} for p in paths}


def _damage(path: Path, expected: dict[str, Any], verify: bool) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != expected["size"]:
        return f"has {path.stat().st_size} bytes; expected {expected['size']}"
    if verify and file_hash(path) != expected["sha256"]:
        return "has another checksum than manifest.json says"
    return None
