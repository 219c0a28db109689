"""Settings in YAML: a reader that keeps every scalar as its text, and the writer of config.yaml. Imports no torch.

Text keeps `1e-4` and `no` from being guessed at; the type of the field decides. Only scalars, lists and mappings are
read: repeated keys, tags, anchors and aliases are refused, so a file can neither run code nor grow when it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from encoderkit.kernels.errors import InputError, first_line

LARGEST_FILE = 1_000_000  # bytes


class Plain(str):
    """Text that stood without quotes, so that null, true and 1 may mean more than text."""


def as_written(value: str | None) -> Plain:
    """A value of a section whose values may be of any type, as it stood: None is null."""
    return Plain("null" if value is None else value)


class Entry(NamedTuple):
    """One value for one dotted key; where: "FILE line N: ", or empty for the command line."""

    key: str
    value: Any
    where: str


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Refused(event.start_mark.line + 1, f"&{event.anchor}: anchors and aliases are not read")
        if getattr(event, "tag", None):
            raise _Refused(event.start_mark.line + 1, f"tag {event.tag} is not read; write the value without it")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text with line breaks and other control characters, which plain styles would fold."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"'),
)


class _Refused(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def read_yaml(path: Path) -> list[Entry]:
    """The entries of a YAML file, in order. Raises InputError with file and line."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise InputError(f"{path} has {path.stat().st_size:,} bytes; expected settings of at most {LARGEST_FILE:,}")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"config {path} cannot be read: {error.strerror}; expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"config {path} is not UTF-8 text at byte {error.start}; expected a YAML file") from error
    root = _compose(text, str(path))
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{path} holds {_kind(root)}; expected keys with values")
    seen: dict[str, int] = {}
    return list(_entries(root, "", str(path), seen))


def read_inline(text: str) -> Any:
    """One value written as YAML on the command line: [a, b] or {a: b}."""
    root = _compose(text, "command line")
    return Plain("") if root is None else _value(root, "command line")


def dump_yaml(settings: Any) -> str:
    """A settings instance as YAML that read_yaml reads back to the same settings."""
    return str(yaml.dump(settings_to_dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000))


def settings_to_dict(settings: Any) -> dict[str, Any]:
    """A settings instance as nested plain values: dicts, lists, text, numbers, None."""
    return {item.name: _plain(getattr(settings, item.name)) for item in dataclasses.fields(settings)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain values by dotted key."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return settings_to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, (Path, str)) else value


def _compose(text: str, where: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except _Refused as error:
        raise InputError(f"{where} line {error.line}: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{where}{line}: {error.problem or error.context}; expected YAML") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{where}: {first_line(error)}; expected YAML") from error


def _entries(node: yaml.MappingNode, prefix: str, where: str, seen: dict[str, int]) -> Iterator[Entry]:
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise InputError(f"{where} line {line}: a key is {_kind(key_node)}; expected text")
        key = prefix + key_node.value
        if key in seen:
            raise InputError(f"{where} line {line}: key {key} is already set in line {seen[key]}; keep one of them")
        seen[key] = line
        if isinstance(value, yaml.MappingNode):
            yield from _entries(value, f"{key}.", where, seen)
        else:
            yield Entry(key, _value(value, where), f"{where} line {line}: ")


def _value(node: yaml.Node, where: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return Plain(node.value) if node.style is None else str(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, where) for item in node.value]
    items: dict[str, Any] = {}
    for key_node, value in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.value in items:
            raise InputError(f"{where} line {key_node.start_mark.line + 1}: expected each key once, as text")
        items[key_node.value] = _value(value, where)
    return items


def _kind(node: yaml.Node) -> str:
    return (
        "one value"
        if isinstance(node, yaml.ScalarNode)
        else "a list"
        if isinstance(node, yaml.SequenceNode)
        else "a section"
    )
