"""What a stranger's model or tokenizer folder may not do: read other folders. Imports no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from encoderkit.kernels.errors import InputError

LARGEST_JSON = 256 << 20  # bytes; the largest published tokenizer.json has 35 MB
# A string here is a path, which transformers opens wherever it leads; it writes none itself.
_VOCABULARIES = ("vocab", "merges", "entity_vocab", "gguf_file")
_LEFT_OVER = ("tokenizer_file", "special_tokens_map_file")  # paths in old folders that transformers does not read


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
        except OSError as error:
            raise InputError(
                f"{name_or_folder}: {error.filename} cannot be read: {error.strerror}; give a whole folder"
            ) from error
    return local


def check_inside(folder: Path) -> None:
    """Raise InputError where opening this folder with transformers would read another one.

    The hub's cache, whose folders link to its own blobs, is let through.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError("holds adapter_config.json, which names another model; merge the adapter first")
    inside = {folder.resolve(), folder.resolve().parent.parent / "blobs"}
    for file in sorted(folder.rglob("*")):  # all levels: config.json may name weights in a subfolder
        name, target = str(file.relative_to(folder)), Path(os.path.realpath(file))
        if file.is_symlink() and not inside & set(target.parents):
            raise InputError(f"{name} links to {target}, outside the folder; copy the file in")
        is_index = file.name.endswith(".index.json")
        is_read = is_index or (file.suffix == ".json" and file.parent == folder)
        if is_read and file.stat().st_size > LARGEST_JSON:
            raise InputError(f"{name} has {file.stat().st_size:,} bytes; expected at most {LARGEST_JSON:,}")
        if is_index:
            weights = _read(file).get("weight_map", {})
            if not isinstance(weights, dict):
                raise InputError(f"{name} has a weight_map of type {type(weights).__name__}; expected an object")
            _check_names(name, list(weights.values()))
    config = _read(folder / "tokenizer_config.json")
    # transformers picks one of these file names by its version, and joins it to the folder as it is.
    _check_names("tokenizer_config.json", config.get("fast_tokenizer_files") or [])
    _check_tokenizer("tokenizer_config.json", {key: config[key] for key in config if key not in _LEFT_OVER})
    _check_tokenizer("special_tokens_map.json", _read(folder / "special_tokens_map.json"))


def _check_tokenizer(where: str, arguments: dict[str, Any]) -> None:
    """Arguments of a tokenizer's class, which opens a path that it is given."""
    for key, value in arguments.items():
        if (key in _VOCABULARIES and isinstance(value, str)) or (key == "init_inputs" and value):
            raise InputError(
                f"{where} has {key} {value}; expected a vocabulary in a file of the folder; remove the key"
            )
        if key.endswith("_file") and isinstance(value, str):
            _check_names(where, [value])


def _check_names(where: str, names: Any) -> None:
    if not isinstance(names, list):
        raise InputError(f"{where} has {names!r}; expected a list of files of the folder itself")
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
