"""What a stranger's model or tokenizer folder may not do: read other folders. Imports no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from encoderkit.kernels.errors import InputError

LARGEST_JSON = 256 << 20  # bytes; the largest published tokenizer.json has 35 MB


def check_source(name_or_folder: str) -> bool:
    """Whether a model is a folder here; a hub name if not.

    Raises InputError where it is neither, or a folder that would read others; told before torch is imported.
    """
    local = os.path.isdir(name_or_folder)
    path_like = name_or_folder.startswith((".", "/", "~")) or name_or_folder.count("/") > 1
    if not local and (path_like or os.path.exists(name_or_folder)):
        raise InputError(f"{name_or_folder}: no such model folder; give a folder with config.json, or a hub name")
    if local:
        try:
            check_inside(Path(name_or_folder))
        except InputError as error:
            raise InputError(f"{name_or_folder}: {error}") from error
    return local


def check_inside(folder: Path) -> None:
    """Raise InputError where opening this folder with transformers would read another one.

    The hub's cache, whose folders link to its own blobs, is let through.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError("holds adapter_config.json, which names another model; merge the adapter first")
    inside = {folder.resolve(), (folder.parent.parent / "blobs").resolve()}
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not inside & set(file.resolve().parents):
            raise InputError(f"{file.name} links to {file.resolve()}, outside the folder; copy the file in")
        if file.suffix == ".json" and file.stat().st_size > LARGEST_JSON:
            raise InputError(f"{file.name} has {file.stat().st_size:,} bytes; expected at most {LARGEST_JSON:,}")
    for index in folder.glob("*.index.json"):
        _check_names(index.name, set(_read(index).get("weight_map", {}).values()))
    # transformers picks one of these file names by its version, and joins it to the folder as it is.
    _check_names("tokenizer_config.json", _read(folder / "tokenizer_config.json").get("fast_tokenizer_files") or [])


def _check_names(where: str, names: Any) -> None:
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{where} names {name}; expected files of the folder itself")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path.name} holds a {type(found).__name__}; expected an object")
    return found
