"""The folders that `prepare --shard i/n` wrote on n machines to the store that one machine would have written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.data_settings import MergeSettings
from encoderkit.pretrain.prepare import counts_of, finish, inputs_hash
from encoderkit.pretrain.run_folder import lock_folder
from encoderkit.pretrain.shards import ShardWriter, read_batches
from encoderkit.pretrain.store import Store


def merge(folders: list[str], out: str | Path) -> dict[str, Any]:
    """Put shares together, batch by batch in the order of the documents, and return the manifest of the store.

    Raises InputError when a share is missing, damaged, or made from other inputs than the first, or out is in use.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is in use; give --out a new folder")
    stores = _in_order([Store.open(folder, verify=True) for folder in folders])
    manifest = {key: value for key, value in stores[0].manifest.items() if key != "files"} | {"shard": None}
    manifest["inputs_hash"] = inputs_hash(manifest)
    partial = out.parent / f".{out.name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if (partial / "inputs_hash").exists():
            raise InputError(
                f"{partial} holds what a prepare into {out} has tokenized so far; go on with it, remove it, or give "
                "another --out"
            )
        lock = lock_folder(partial)
        try:
            shutil.rmtree(partial / "tokens", ignore_errors=True)
            dtype = np.dtype(np.uint16 if stores[0].vocab_size <= 1 << 16 else np.uint32)
            writer = ShardWriter(partial / "tokens", stores[0].vocab_size, dtype)
            for batch, notes in _interleaved(stores):
                writer.add(batch, notes)
            writer.close()
            tokenized = _sum([store.manifest["tokenized"] for store in stores])
            if tokenized != manifest["ledger"]["trained"]:
                raise InputError(
                    f"the shares hold {tokenized}; expected {manifest['ledger']['trained']}, prepare them again"
                )
            if not writer.documents:
                raise InputError(f"{', '.join(folders)}: 0 documents to train on; give more text")
            np.save(partial / "unigram_counts.npy", writer.counts)
            shutil.copyfile(stores[0].folder / "held_out.parquet", partial / "held_out.parquet")
            shutil.copytree(stores[0].tokenizer_folder, partial / "tokenizer", dirs_exist_ok=True)
            manifest |= counts_of(writer, tokenized, manifest["ledger"], manifest["unknown_id"])
            finish(partial, out, manifest)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(lock)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error
    return manifest


def run_merge(settings: MergeSettings) -> None:
    """Put shares together and say what is in the store: the command encoderkit-pretrain merge."""
    manifest = merge(settings.folders, settings.out)
    print(f"{settings.out}: {manifest['tokens']:,} tokens in {manifest['num_documents']:,} documents")


def _in_order(stores: list[Store]) -> list[Store]:
    """The shares 1/n to n/n of the same inputs."""
    shares = [store.manifest["shard"] for store in stores]
    for store, share in zip(stores, shares):
        if share is None:
            raise InputError(f"{store.folder} is a whole store; expected folders made by prepare --shard i/n")
        if inputs_hash(store.manifest | {"shard": None}) != inputs_hash(stores[0].manifest | {"shard": None}):
            raise InputError(
                f"{store.folder} and {stores[0].folder} were made from other sources, settings or tokenizer"
            )
    count = int(shares[0].split("/")[1])
    wanted = [f"{i + 1}/{count}" for i in range(count)]
    if sorted(shares) != sorted(wanted):
        raise InputError(f"shares {', '.join(shares)} are given; expected each of {', '.join(wanted)} once")
    return [stores[shares.index(share)] for share in wanted]


def _interleaved(stores: list[Store]) -> Iterator[tuple[pa.RecordBatch, dict[str, int]]]:
    """Batches in the order of the documents: share i of n holds the batches i, i + n, i + 2n and so on."""
    waiting = [_batches_of(store) for store in stores]
    while True:
        for batches in waiting:
            found = next(batches, None)
            if found is None:
                return
            yield found


def _batches_of(store: Store) -> Iterator[tuple[pa.RecordBatch, dict[str, int]]]:
    names = json.loads((store.folder / "tokens/state.json").read_text())["_data_files"]
    for entry in names:
        yield from read_batches(store.folder / "tokens" / entry["filename"])


def _sum(amounts: list[dict[str, Any]]) -> dict[str, int]:
    return {unit: sum(amount[unit] for amount in amounts) for unit in ("documents", "characters")}
