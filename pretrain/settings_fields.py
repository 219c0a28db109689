"""The keys of a settings dataclass, what each one is for, and the help page made of them. Imports no torch.

The comment behind a field is its documentation: `--help` shows it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Field:
    """One key. key: dotted. default: dataclasses.MISSING where a value must be given.

    section: the dataclass whose keys lie under this one, or None for a value. optional: whether null is allowed.
    """

    key: str
    hint: Any
    default: Any
    comment: str
    section: type | None
    optional: bool


def fields_of(cls: type) -> dict[str, Field]:
    """Every key of a dataclass, dotted keys of nested dataclasses included, in the order of definition."""
    return _fields_of(cls)


@functools.cache
def _fields_of(cls: Any) -> dict[str, Field]:
    hints, comments, found = get_type_hints(cls), field_comments(cls), {}
    for item in dataclasses.fields(cls):
        hint = without_none(hints[item.name])
        section = hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        optional = hint is not hints[item.name]
        found[item.name] = Field(item.name, hints[item.name], default, comments.get(item.name, ""), section, optional)
        for key, field in (fields_of(section) if section else {}).items():
            found[f"{item.name}.{key}"] = dataclasses.replace(
                field, key=f"{item.name}.{key}", default=_default_at(default, key, field.default)
            )
    return found


def _default_at(section: Any, key: str, fallback: Any) -> Any:
    """The value of key in a default section; fallback where there is no section on the way."""
    value = section
    for name in key.split("."):
        if not dataclasses.is_dataclass(value):
            return fallback
        value = getattr(value, name)
    return value


def field_comments(cls: type) -> dict[str, str]:
    """The comment on the lines of each field of a dataclass, base classes included; empty where there is no source."""
    comments: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except (OSError, TypeError):
            continue
        by_line: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                by_line[token.start[0]] = token.string.lstrip("# ").split("# noqa")[0].strip()
        body = ast.parse(source).body[0]
        assert isinstance(body, ast.ClassDef)
        for node in body.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                lines = range(lines.start, _closing_line(source, lines.stop - 1) + 1)
                comments[node.target.id] = " ".join(by_line[line] for line in lines if line in by_line)
    return comments


def _closing_line(source: str, line: int) -> int:
    """The line of the parenthesis that closes a value ending on line: `x: int = (\\n None  # why\\n)`."""
    lines = source.splitlines()
    return line + 1 if line < len(lines) and lines[line].strip() == ")" else line


def without_none(hint: Any) -> Any:
    """X for X | None, else the hint itself."""
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        return members[0] if len(members) == 1 else hint
    return hint


def describe(hint: Any) -> str:
    """What a value of this type looks like, in words."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(member) for member in members)
    if origin is Literal:
        return "one of " + ", ".join(map(str, members))
    if origin is list or (origin is tuple and members[1:] == (...,)):
        return f"a list, each {describe(members[0])}"
    if origin is tuple:
        return f"{len(members)} values, each {describe(members[0])}"
    if origin is dict:
        return f"a section, each value {describe(members[1])}"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", Path: "a path"}
    return "null" if hint is type(None) else names.get(hint, getattr(hint, "__name__", str(hint)))


def help_text(
    cls: type,
    prog: str,
    description: str = "",
    examples: str | Iterable[str] = (),
    positional: str | None = None,
    more_options: Mapping[str, str] | None = None,
) -> str:
    """The help page: usage, description, options, every key by section with its default, and examples."""
    bare = f" [{positional.upper()} ...]" if positional else ""
    options = {
        **(more_options or {}),
        "--config FILE.yaml": "read settings from YAML; settings on the command line replace them",
        "--print-config": "print the resolved settings as YAML and leave",
        "--help": "print this page and leave",
    }
    parts = [f"usage: {prog}{bare} [--config FILE.yaml] [--KEY VALUE ...]"]
    if description:
        parts += ["", textwrap.fill(description, 100)]
    parts += ["", "options:", *(f"  {name:<28}{text}" for name, text in options.items())]
    sections: dict[str, list[str]] = {}
    fields = fields_of(cls)
    for field in fields.values():
        if field.section is None:
            sections.setdefault(field.key.rpartition(".")[0], []).append(_help_line(field))
    for section, lines in sections.items():
        owner = fields[section].section if section else None
        about = fields[section].comment or (inspect.getdoc(owner) or "").split("\n\n")[0] if section else ""
        parts += ["", f"{section}: {' '.join(about.split())}" if section else "settings:", *lines]
    shown = [examples] if isinstance(examples, str) else list(examples)
    if shown:
        parts += ["", "examples:", *("  " + line for example in shown for line in example.strip().splitlines())]
    return "\n".join(parts)


def _help_line(field: Field) -> str:
    default = "required" if field.default is dataclasses.MISSING else f"default {_shown_default(field.default)}"
    about = f"{field.comment.rstrip('.')} " if field.comment else ""
    text = f"{about}({describe(field.hint)}; {default})"
    head = f"  --{field.key} "
    lines = textwrap.wrap(text, 88, break_long_words=False)
    lead = head.ljust(30) if len(head) <= 30 else head + "\n" + " " * 30
    return lead + ("\n" + " " * 30).join(lines)


def _shown_default(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return " ".join(map(_shown_default, value)) or "empty"
    return str(value) if value != "" else "empty"
