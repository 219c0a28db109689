"""Checkpoints that are whole or not there: safetensors and JSON, checksummed, renamed into place.

A checkpoint is a folder step-N with one safetensors file for each group of tensors, state.json, and manifest.json with
the size and SHA-256 of every file. It is written under another name, flushed to disk and renamed, so a folder called
step-N was complete once; whether it still is, is checked before it is used. Nothing is ever unpickled.

Where ranks have rows of the tensors each, each writes its own in a file of its own, side by side: the ranks meet in the
folder, not in a collective, so that a thread can do it behind the steps. The first one commits what all have handed in.
torch.distributed.checkpoint is not used: its files are named in a pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.corpus_files import file_hash

logger = logging.getLogger("encoderkit")
FORMAT = "encoderkit checkpoint 3"
FEWEST = 2  # whole checkpoints that always stay


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: every file had its size and checksum when it was looked at."""

    step: int
    path: Path

    @property
    def state(self) -> dict[str, Any]:
        """What was saved as JSON."""
        return dict(json.loads((self.path / "state.json").read_text()))

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors of one group, on the CPU; names that were one tensor are one tensor again."""
        manifest = json.loads((self.path / "manifest.json").read_text())
        parts = []
        for rank in range(count := manifest.get("ranks", 1)):
            name = _file_name(stem, rank, count)
            if name not in manifest["files"]:
                raise InputError(f"checkpoint {self.path} holds no {name}; it was written by another recipe")
            try:
                parts.append(load_file(self.path / name))
            except SafetensorError as error:  # with checksums that fit: not written here
                raise InputError(f"checkpoint {self.path}: {name} is not safetensors: {error}") from error
        tensors = parts[0]
        for name in tensors.keys() & manifest.get("rows", {}).get(stem, []):
            tensors[name] = torch.cat([part[name] for part in parts])
        return {name: tensors[manifest["tied"][stem].get(name, name)] for name in manifest["names"][stem]}


@dataclass(frozen=True)
class Group:
    """Tensors of one file. tensors: each once, on the CPU. names: all of them; tied: name -> the name it shares.

    rows: those of which this rank has its rows only.
    """

    tensors: dict[str, Tensor]
    names: list[str]
    tied: dict[str, str]
    rows: list[str]

    @classmethod
    def of(cls, group: Mapping[str, Tensor], rows: Collection[str] = (), *, copy: bool = False) -> Group:
        """name -> tensor, any device and dtype; a name may share its tensor with another. copy: shares no memory."""
        return cls(*_untie(group, copy), [name for name in group if name in rows])


@dataclass(frozen=True)
class Ranks:
    """The ranks that write a checkpoint together, on a disk that all of them see.

    meet: waits for all. seconds: how long the first one waits for the parts of the others.
    """

    rank: int
    count: int
    meet: Callable[[], object]
    seconds: float


ALONE = Ranks(0, 1, lambda: None, 0.0)


def begin_checkpoint(folder: Path, step: int) -> Path:
    """Make the folder that a checkpoint is written in."""
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    partial = folder / f".partial-step-{step}"
    partial.mkdir()
    return partial


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor] | Group],
    state: Mapping[str, Any],
    ranks: Ranks = ALONE,
) -> Path:
    """Write folder/step-N and return its path; on any failure nothing new is listed and older ones stay.

    tensors: of each group. state: plain JSON values; its "score", lower is better, may make it the best (keep).
    ranks: where there are several, each calls this with its rows, after begin_checkpoint on the first; the others
    return when they have handed in theirs. Raises InputError when the disk is full or cannot be written.
    """
    final, partial = folder / f"step-{step}", folder / f".partial-step-{step}"
    try:
        if ranks.count == 1:
            begin_checkpoint(folder, step)
        groups = {stem: given if isinstance(given, Group) else Group.of(given) for stem, given in tensors.items()}
        names = {stem: _file_name(stem, ranks.rank, ranks.count) for stem in groups}
        for stem, group in groups.items():
            save_file(group.tensors, partial / names[stem])
        if ranks.rank > 0:
            _hand_in(partial, ranks.rank, names.values())
            return final
        manifest: dict[str, Any] = {"format": FORMAT, "step": step, "files": {}}
        manifest["names"] = {stem: group.names for stem, group in groups.items()}
        manifest["tied"] = {stem: group.tied for stem, group in groups.items()}
        if ranks.count > 1:
            manifest |= {"ranks": ranks.count, "rows": {stem: group.rows for stem, group in groups.items()}}
        deadline = time.monotonic() + ranks.seconds
        for rank in range(1, ranks.count):
            manifest["files"] |= _handed_in(partial, rank, deadline)
        (partial / "state.json").write_text(json.dumps(dict(state)))
        for file in sorted(partial.iterdir()):
            if file.name not in manifest["files"]:
                manifest["files"][file.name] = _seen(file)
        (partial / "manifest.json").write_text(_sealed(manifest))
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
        _remove(final)  # a damaged one of this step, or the same one written again after a resume
        partial.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        if ranks.rank > 0:
            with suppress(OSError):
                (partial / f"rank-{ranks.rank}.failed").touch()
        raise InputError(
            f"checkpoint of step {step} cannot be written to {folder}: {error}; "
            "older ones are whole; free space there and resume"
        ) from error
    finally:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def _file_name(stem: str, rank: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{rank}-of-{count}.safetensors"


def _seen(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_hash(file)}


def _hand_in(partial: Path, rank: int, names: Collection[str]) -> None:
    """Tell the first rank that these files are on the disk, with their checksums."""
    for name in names:
        _flush(partial / name)
    unfinished = partial / f"rank-{rank}.unfinished"
    unfinished.write_text(json.dumps({name: _seen(partial / name) for name in names}))
    unfinished.rename(partial / f"rank-{rank}.json")


def _handed_in(partial: Path, rank: int, deadline: float) -> dict[str, Any]:
    """The files of another rank, once they are on the disk. Raises OSError where they are not by the deadline."""
    told = partial / f"rank-{rank}.json"
    while not told.exists():
        if (partial / f"rank-{rank}.failed").exists():
            raise OSError(f"rank {rank} could not write its part")
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {rank} did not write its part in time; all ranks must see this folder")
        time.sleep(0.01)
    files = dict(json.loads(told.read_text()))
    told.unlink()
    return files


class CheckpointWriter:
    """Writes the checkpoints of a run in order, and deletes old ones once a new one is whole.

    keep_newest: how many stay, see keep. asynchronous: save() returns once the tensors are copied, and one thread
    writes them; before the next copy, and in finish(), that one is waited for, so they are committed in order and there
    is at most one copy. What went wrong is raised there. ranks: of those that write together each has a writer, and all
    call save() alike.
    """

    def __init__(self, folder: Path, keep_newest: int, *, asynchronous: bool = False, ranks: Ranks = ALONE) -> None:
        self._folder, self._keep, self._ranks = folder, keep_newest, ranks
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        rows: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        """Write a checkpoint. rows: of each group, the names of the tensors of which this rank has its rows only.

        Raises InputError where this or the one before it could not be written.
        """
        self.finish()
        if self._ranks.count > 1:
            if self._ranks.rank == 0:
                self._begin(step)
            self._ranks.meet()
        is_later, rows = self._thread is not None, rows or {}
        groups = {stem: Group.of(group, rows.get(stem, ()), copy=is_later) for stem, group in tensors.items()}
        if self._thread is None:
            self._write(step, groups, state)
        else:
            self._pending = self._thread.submit(self._write, step, groups, state)

    def finish(self) -> None:
        """Wait until everything is on the disk. Raises InputError where it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread, after what it is writing."""
        if self._thread is not None:
            self._thread.shutdown()

    def _begin(self, step: int) -> None:
        try:
            begin_checkpoint(self._folder, step)
        except OSError as error:
            raise InputError(f"checkpoint of step {step} cannot be written to {self._folder}: {error}") from error

    def _write(self, step: int, groups: Mapping[str, Group], state: Mapping[str, Any]) -> None:
        save_checkpoint(self._folder, step, groups, state, self._ranks)
        if self._ranks.rank == 0:
            keep(self._folder, self._keep)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None; damaged ones are named in the log and passed over."""
    return next(_whole(folder), None)


def whole_checkpoints(folder: Path) -> list[Checkpoint]:
    """All whole checkpoints, newest first; damaged ones are named in the log and passed over."""
    return list(_whole(folder))


def _whole(folder: Path) -> Iterator[Checkpoint]:
    for step, path in _listed(folder):
        reason = damage(path)
        if reason is None:
            yield Checkpoint(step, path)
        else:
            logger.warning("checkpoint %s is damaged: %s; passed over", path, reason)


def keep(folder: Path, n: int) -> None:
    """Delete what is older than the n newest whole checkpoints, but for the best; never fewer than 2 whole ones stay.

    Those that a signal asked for stay as long, uncounted. The best is the whole one with the lowest score in its state.
    """
    newest: list[Path] = []
    older: list[Path] = []
    for _, path in _listed(folder):
        if sum(map(is_due, newest)) >= max(n, FEWEST):
            older.append(path)
        elif damage(path) is None:
            newest.append(path)
    scored = sorted((score, path) for path in [*newest, *older] if (score := _score(path)) is not None)
    best = next((path for _, path in scored if path in newest or damage(path) is None), None)
    for path in older:
        if path != best:
            _remove(path)


def is_due(path: Path) -> bool:
    """Whether the checkpoint in this folder was written as settings say, and not because a signal asked for it."""
    return bool(json.loads((path / "state.json").read_text()).get("due", True))


def _score(path: Path) -> float | None:
    try:
        return float(json.loads((path / "state.json").read_text())["score"])
    except (OSError, ValueError, KeyError, TypeError):  # without a score, or damaged
        return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder: the first missing, cut or changed file; None when it is whole."""
    try:
        if (path / "manifest.json").is_symlink():
            return "manifest.json is a link"
        text = (path / "manifest.json").read_text()
        manifest = json.loads(text)
        if text != _sealed({key: value for key, value in manifest.items() if key != "seal"}):
            return "manifest.json was changed"
        if manifest["format"] != FORMAT or f"step-{manifest['step']}" != path.name:
            return f"manifest.json is of {manifest['format']}, step {manifest['step']}"
        for name, expected in manifest["files"].items():
            file = path / name
            if Path(name).name != name or file.is_symlink() or not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes; expected {expected['bytes']:,}"
            if file_hash(file) != expected["sha256"]:
                return f"{name} does not have its checksum"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is not a manifest"
    return None


def _untie(group: Mapping[str, Tensor], copy: bool) -> tuple[dict[str, Tensor], list[str], dict[str, str]]:
    """Each tensor once, contiguous on the CPU; all names; and for every other name of one the name that is kept."""
    unique: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in group.items():
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        stored = tensor.to("cpu").contiguous()
        storage = stored.untyped_storage()
        is_view = storage.nbytes() != stored.nbytes or storage.data_ptr() in storages  # safetensors wants owners
        if is_view or (copy and stored.data_ptr() == tensor.data_ptr()):
            stored = stored.clone()
        storages.add(stored.untyped_storage().data_ptr())
        unique[name] = stored
    return unique, list(group), tied


def _sealed(manifest: Mapping[str, Any]) -> str:
    """The manifest as text that ends with its own checksum."""
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "seal": seal}, indent=1) + "\n"


def _listed(folder: Path) -> Iterator[tuple[int, Path]]:
    """Folders called step-N, newest first."""
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in (folder.iterdir() if folder.is_dir() else ())]
    yield from sorted(((int(match[1]), path) for match, path in found if match and path.is_dir()), reverse=True)


def _sweep(folder: Path) -> None:
    """Remove what an interrupted save or deletion left; one run at a time writes here (run_folder.py locks it)."""
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that it is never listed half deleted."""
    if path.exists():
        hidden = path.with_name(f".partial-removed-{path.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
