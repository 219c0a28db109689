"""The folder of a run: one process at a time, resolved settings, what it ran on, and its log.

config.yaml holds every setting, run.json what a reader needs to judge or repeat the run (no environment variables),
log.jsonl one JSON record a line. Fields of the log that may differ between two equal runs lie under the key "time".
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import dump_yaml, read_settings, settings_to_dict, unknown_key
from encoderkit.pretrain.corpus_files import file_hash
from encoderkit.pretrain.redaction import without_secrets
from encoderkit.pretrain.settings_yaml import flat

OPERATIONAL = (
    "out",
    "data.workers",
    "micro_batch_tokens",
    "cuda_graphs",
    "gradient_checkpointing",
    "checkpoints.*",
    "log.*",
    "timeouts.*",
    "validation.*",
    "price_per_hour",
)  # may change on resume
FIXED = ("optimizer.name", "pairs")  # say which parameters are trained and what state they have
BEFORE_SETTINGS = ("lock", ".config.yaml.partial")  # all that a run which was killed at its start may leave
PACKAGES = ("encoderkit", "torch", "transformers", "datasets", "accelerate", "tokenizers", "safetensors", "numpy")


AGAIN, RESUME = "run the same command again", "resume the run"  # after a file could not be written
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # what disks without flock answer

logger = logging.getLogger("encoderkit")
_held: set[int] = set()  # descriptors of the locks of run folders


def _let_go() -> None:
    """Close the locks in a forked loader worker: one that outlives a killed run would hold them some seconds more."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


class RunFolder:
    """A run folder that this process holds until close(), or until it dies however it dies.

    Made with RunFolder.create or RunFolder.resume, in one process of a run; usable as a context manager.
    """

    def __init__(self, path: Path, lock: int, settings: Any) -> None:
        self.path, self._settings = path, settings
        self._lock: int | None = lock
        _held.add(lock)
        self.log = LogWriter(path / "log.jsonl")

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are written."""
        return self.path / "checkpoints"

    @classmethod
    def create(cls, settings: Any) -> RunFolder:
        """A new folder settings.out with config.yaml. Raises InputError where one is in use or holds anything."""
        path = Path(settings.out)
        check_new(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out {path} cannot be made: {error.strerror}; choose another out") from error
        folder = cls(path, lock_folder(path), settings)
        replace_file(path / "config.yaml", dump_yaml(settings))
        return folder

    @classmethod
    def resume(cls, settings: Any, allow_change: Collection[str] = ()) -> RunFolder:
        """The folder settings.out of a stopped run, taken over by this process.

        Raises InputError where it is in use, is no run folder, or was made with settings that differ in more than
        OPERATIONAL keys and those in allow_change.
        """
        path = Path(settings.out)
        if not (path / "config.yaml").is_file():
            raise InputError(f"out {path} holds no config.yaml; expected a run folder to resume")
        folder = cls(path, lock_folder(path), settings)
        try:
            check_resumable(read_settings(type(settings), path / "config.yaml"), settings, allow_change)
        except InputError:
            folder.close()
            raise
        return folder

    def describe(self, **facts: Any) -> None:
        """Write config.yaml and run.json: versions, source, hardware and command of this start, and the caller's facts.

        A resumed run adds its start to the list and replaces the facts. Before this, nothing in its folder changes.
        """
        replace_file(self.path / "config.yaml", dump_yaml(self._settings))
        file = self.path / "run.json"
        starts = json.loads(file.read_text())["starts"] if file.exists() else []
        replace_file(file, json.dumps({**facts, "starts": [*starts, describe_start()]}, indent=1) + "\n", RESUME)

    def close(self) -> None:
        """Let other processes use the folder."""
        if self._lock is not None:
            _held.discard(self._lock)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def clear_folder(path: Path) -> None:
    """Remove what is in a folder that this process holds, but for the lock."""
    for item in path.iterdir():
        if item.name not in BEFORE_SETTINGS:
            shutil.rmtree(item) if item.is_dir() else item.unlink()


def check_new(path: Path) -> None:
    """Raise InputError where a new run may not be written to path."""
    if path.exists() and not path.is_dir():
        raise InputError(f"out {path} is a file; expected a new folder")
    if path.is_dir() and (holder := _holder(path)):
        raise InputError(f"out {path} is in use by {holder}; choose another out")
    if path.is_dir() and any(item.name not in BEFORE_SETTINGS for item in path.iterdir()):
        how = f"continue it with --resume {path} or " if (path / "config.yaml").exists() else ""
        raise InputError(f"out {path} exists and is not empty; {how}choose another out")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside out that takes its place, which is empty or free, when all is in it; or goes, where that fails.

    Raises InputError where it cannot be made.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise InputError(f"out {out} cannot be made: {error.strerror}; choose another out") from error
    try:
        yield partial
        partial.chmod(0o755)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class LogWriter:
    """Appends records to log.jsonl; a record outlives a killed process once append has returned."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record as one line; numbers that are not finite become null. Raises InputError on a full disk."""
        with _writing(self.path, RESUME), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def flush(self) -> None:
        """Wait until what was written is on the disk, so that no checkpoint is ahead of its log."""
        with _writing(self.path, RESUME), self.path.open("a") as file:
            os.fsync(file.fileno())

    def cut_back(self, step: int) -> None:
        """Drop records of later steps than step, end records, and a last line that was cut off."""
        kept = [
            json.dumps(record) + "\n"
            for record in (read_log(self.path) if self.path.exists() else [])
            if record.get("step", 0) <= step and record.get("kind") != "end"
        ]
        replace_file(self.path, "".join(kept), RESUME)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, without a last line that was cut off. Raises InputError at any other bad line."""
    records: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if number < len(lines):
                raise InputError(f"{path} line {number} is not JSON; expected one record a line") from error
    return records


def read_facts(path: Path) -> dict[str, Any] | None:
    """The run.json of a run folder; None where the run was stopped before it was written."""
    file = path / "run.json"
    return dict(json.loads(file.read_text())) if file.exists() else None


def check_resumable(stored: Any, settings: Any, allow_change: Collection[str] = ()) -> list[str]:
    """Raise InputError with a diff unless two settings differ in OPERATIONAL keys and allow_change only.

    allow_change: keys, or "data.*" for a section. Returns the diff of what differs of these: "seed: 0 -> 1".
    """
    was, now = settings_to_dict(stored), settings_to_dict(settings)
    changed = changed_settings(was, now, OPERATIONAL)
    keys = list({**flat(was), **flat(now)})
    for name in allow_change:
        if not any(names_key(name, key) for key in keys):
            unknown_key(name, keys, "--allow_change: ")
    if fixed := [key for key in changed if key in FIXED]:
        raise InputError(f"{changed[fixed[0]]}, which cannot change within a run; start a new run for it")
    refused = [key for key in changed if not any(names_key(name, key) for name in allow_change)]
    if refused:
        raise InputError(
            f"settings differ from those the run was started with: {'; '.join(changed[key] for key in refused)}. "
            f"Only {', '.join(OPERATIONAL)} may change; start a new run for the rest, "
            f"or name what is meant to change: --allow_change {','.join(refused)}"
        )
    return list(changed.values())


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any], free: Collection[str] = ()) -> dict[str, str]:
    """By dotted key, what differs between nested settings, "seed: 0 -> 1".

    free: keys, or "log.*" for a section, that are passed over.
    """
    was, now = flat(before), flat(after)
    return {
        key: f"{key}: {json.dumps(was.get(key))} -> {json.dumps(now.get(key))}"
        for key in {**was, **now}
        if was.get(key) != now.get(key) and not any(names_key(name, key) for name in free)
    }


def names_key(name: str, key: str) -> bool:
    """Whether name is this key, or "log.*" for the section it is in."""
    return key == name or (name.endswith(".*") and key.startswith(name[:-1]))


def describe_start() -> dict[str, Any]:
    """What is running here and now: time, host, versions, source tree, hardware and command, as plain values."""
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES, "xformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "command": without_secrets(shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])),
        "versions": versions,
        "source": _source(),
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = named[0].partition(":")[2].strip() if named else cpu
    gpus = range(torch.cuda.device_count())
    return {
        "platform": platform.platform(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in gpus],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _source() -> dict[str, Any] | None:
    """Commit of the git tree that this very file is tracked in, and whether it was changed; None elsewhere."""

    def git(*arguments: str) -> str:
        where = str(Path(__file__).resolve().parent)
        done = subprocess.run(["git", "-C", where, *arguments], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def lock_folder(path: Path) -> int:
    """Hold path/lock. The kernel lets go when the process ends, so a killed run leaves nothing behind.

    Raises InputError where another process holds it. A disk without locks is told, and nothing is held.
    """
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        text = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise InputError(
            f"out {path} is in use by {text or 'another process'}; stop it or choose another out"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise InputError(f"{path / 'lock'} cannot be locked: {error.strerror}; choose another out") from error
        logger.warning("%s: no locks on this disk (%s); see that no other process writes there", path, error.strerror)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _holder(path: Path) -> str | None:
    """Who holds path/lock, or None; leaves the folder as it is."""
    try:
        descriptor = os.open(path / "lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
    except OSError:  # no locks on this disk
        return None
    finally:
        os.close(descriptor)
    return None


def model_fingerprint(model: str) -> str:
    """What changes when a model does, wherever it lies: of weights, config and tokenizer; of a hub name, the name."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted(
        file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".bin", ".txt", ".model")
    )
    return hashlib.sha256(repr([(file.name, file_hash(file)) for file in files]).encode()).hexdigest()


def replace_file(path: Path, text: str, then: str = AGAIN) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    with _writing(path, then), whole_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of path when all is in it, or goes where that fails; a pipe is written as it is."""
    if path.exists() and not path.is_file():
        with path.open("wb") as pipe:
            yield pipe
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _writing(path: Path, then: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}; free space there or mend its permissions, and {then}"
        ) from error


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
