"""Record batches of tokens to Arrow files, written one by one so that a killed prepare goes on at the last whole one.

A record batch holds the documents of one batch that was tokenized, even when none is left, so that batches can be
counted: that is how a second start finds its place, and how the shares of several machines are put together again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from encoderkit.pretrain.encode import NOTES

SHARD_TOKENS = 1 << 22  # of one Arrow file, about: 9 MB, a quarter of a minute of one core


class ShardWriter:
    """Arrow stream files in a folder, taken up after the last whole one, and what `datasets` needs to read them.

    counts: (V,) int64 occurrences of each type. batches, documents, tokens: written in all starts.
    """

    def __init__(self, folder: Path, vocab_size: int, dtype: np.dtype) -> None:
        import datasets

        kinds = {"input_ids": dtype.name, "sentence_lengths": "uint16", "word_starts": "uint8"}
        self.features = datasets.Features({name: datasets.List(datasets.Value(kind)) for name, kind in kinds.items()})
        self.folder = folder
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self.notes = dict.fromkeys(NOTES, 0)
        self.batches = self.documents = self.tokens = self.bytes = 0
        self._shards = self._shard_tokens = 0
        self._writer: pa.RecordBatchStreamWriter | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._take_up()

    def add(self, batch: pa.RecordBatch, notes: dict[str, int]) -> None:
        """Write one record batch."""
        if self._writer is None:
            self._writer = pa.ipc.new_stream(str(self._path(".partial")), self.features.arrow_schema)
        batch = pa.RecordBatch.from_arrays(batch.columns, schema=self.features.arrow_schema)
        self._writer.write_batch(batch, custom_metadata={name: str(notes[name]) for name in NOTES})
        self._shard_tokens += self._count(batch, notes)
        if self._shard_tokens >= SHARD_TOKENS:
            self._end_shard()

    def close(self) -> None:
        """End the last shard, and write the files of `datasets`."""
        import datasets

        self._end_shard()
        datasets.DatasetInfo(features=self.features).write_to_directory(str(self.folder))
        state: dict[str, Any] = {
            "_data_files": [{"filename": f"data-{i:05d}.arrow"} for i in range(self._shards)],
            "_fingerprint": hashlib.sha256(f"{self.documents} {self.tokens}".encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (self.folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")

    def _take_up(self) -> None:
        while self._path("").is_file():
            for batch, notes in read_batches(self._path("")):
                self._count(batch, notes)
            self.bytes += self._path("").stat().st_size
            self._shards += 1

    def _path(self, ending: str) -> Path:
        return self.folder / f"data-{self._shards:05d}.arrow{ending}"

    def _count(self, batch: pa.RecordBatch, notes: dict[str, int]) -> int:
        ids = batch.column(0).values.to_numpy()
        self.counts += np.bincount(ids, minlength=len(self.counts))
        self.notes = {name: self.notes[name] + notes[name] for name in NOTES}
        self.batches += 1
        self.documents += batch.num_rows
        self.tokens += len(ids)
        return len(ids)

    def _end_shard(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer, self._shard_tokens = None, 0
        with open(self._path(".partial"), "rb+") as file:
            os.fsync(file.fileno())
        self.bytes += self._path(".partial").stat().st_size
        os.replace(self._path(".partial"), self._path(""))
        self._shards += 1


def read_batches(path: Path):
    """The record batches of one shard with their notes."""
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
        while True:
            try:
                batch, notes = stream.read_next_batch_with_custom_metadata()
            except StopIteration:
                return
            yield batch, {name: int(notes[name]) for name in NOTES}
