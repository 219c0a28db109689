"""Checkpoints that are whole or not there: safetensors and JSON, checksummed, renamed into place.

A checkpoint is a folder step-N with one safetensors file for each group of tensors, state.json, and manifest.json with
the size and SHA-256 of every file. It is written under another name, flushed to disk and renamed, so a folder called
step-N was complete once; whether it still is, is checked before it is used. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from encoderkit.kernels.errors import InputError

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
        if f"{stem}.safetensors" not in manifest["files"]:
            raise InputError(f"checkpoint {self.path} holds no {stem}.safetensors; it was written by another recipe")
        try:
            tensors = load_file(self.path / f"{stem}.safetensors")
        except SafetensorError as error:  # with checksums that fit: not written here
            raise InputError(f"checkpoint {self.path}: {stem}.safetensors is not safetensors: {error}") from error
        return {name: tensors[manifest["tied"][stem].get(name, name)] for name in manifest["names"][stem]}


@dataclass(frozen=True)
class Group:
    """Tensors of one file. tensors: each once, on the CPU. names: all of them; tied: name -> the name it shares."""

    tensors: dict[str, Tensor]
    names: list[str]
    tied: dict[str, str]

    @classmethod
    def of(cls, group: Mapping[str, Tensor], *, copy: bool = False) -> Group:
        """name -> tensor, any device and dtype; a name may share its tensor with another. copy: shares no memory."""
        return cls(*_untie(group, copy))


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor] | Group], state: Mapping[str, Any]
) -> Path:
    """Write folder/step-N and return its path; on any failure nothing new is listed and older ones stay.

    tensors: of each group. state: plain JSON values; its "score", lower is better, may make it the best (keep).
    Raises InputError when the disk is full or cannot be written.
    """
    final, partial = folder / f"step-{step}", folder / f".partial-step-{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        partial.mkdir()
        manifest: dict[str, Any] = {"format": FORMAT, "step": step, "files": {}, "names": {}, "tied": {}}
        for stem, given in tensors.items():
            group = given if isinstance(given, Group) else Group.of(given)
            save_file(group.tensors, partial / f"{stem}.safetensors")
            manifest["names"][stem], manifest["tied"][stem] = group.names, group.tied
        (partial / "state.json").write_text(json.dumps(dict(state)))
        for file in sorted(partial.iterdir()):
            manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        (partial / "manifest.json").write_text(_sealed(manifest))
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
        _remove(final)  # a damaged one of this step, or the same one written again after a resume
        partial.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"checkpoint of step {step} cannot be written to {folder}: {error}; "
            "older ones are whole; free space there and resume"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


class CheckpointWriter:
    """Writes the checkpoints of a run in order, and deletes old ones once a new one is whole.

    keep_newest: how many stay, see keep. asynchronous: save() returns once the tensors are copied, and one thread
    writes them; before the next copy, and in finish(), that one is waited for, so they are committed in order and there
    is at most one copy. What went wrong is raised there.
    """

    def __init__(self, folder: Path, keep_newest: int, *, asynchronous: bool = False) -> None:
        self._folder, self._keep = folder, keep_newest
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write a checkpoint. Raises InputError where this or the one before it could not be written."""
        self.finish()
        if self._thread is None:
            self._write(step, tensors, state)
        else:
            copies = {stem: Group.of(group, copy=True) for stem, group in tensors.items()}
            self._pending = self._thread.submit(self._write, step, copies, state)

    def finish(self) -> None:
        """Wait until everything is on the disk. Raises InputError where it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread, after what it is writing."""
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor] | Group], state: Mapping[str, Any]) -> None:
        save_checkpoint(self._folder, step, tensors, state)
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
            if _sha256(file) != expected["sha256"]:
                return f"{name} does not have its checksum"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is not a manifest"
    return None


def flatten_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors and JSON; unflatten_optimizer gives back the same, bit for bit."""
    tensors: dict[str, Tensor] = {}
    params = [
        [param, _pack(state, f"state.{i}", tensors)] for i, (param, state) in enumerate(state_dict["state"].items())
    ]
    groups = [_pack(group, f"group.{i}", tensors) for i, group in enumerate(state_dict["param_groups"])]
    return tensors, {"state": params, "param_groups": groups}


def unflatten_optimizer(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict that flatten_optimizer took apart."""
    return {
        "state": {param: _unpack(state, tensors) for param, state in described["state"]},
        "param_groups": [_unpack(group, tensors) for group in described["param_groups"]],
    }


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """value as JSON; tensors move out under name, and tuples are marked so that they come back as tuples."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": {key: _pack(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"optimizer state {name} is a {type(value).__name__}; expected tensors and plain values")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content.items()}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
