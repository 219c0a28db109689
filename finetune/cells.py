"""Values of a table's columns as texts, lists, integers and labels; an error names the rows. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from encoderkit.finetune.tables import Table
from encoderkit.finetune.tasks import column_names
from encoderkit.kernels.errors import InputError


def texts_of(table: Table, spec: str | None) -> list[str]:
    """The texts that a column, or a template of several, holds. Raises InputError naming rows without valid text."""
    assert spec is not None
    names = column_names(spec)
    columns = [check_texts(table.source, table.columns[name], table.rows, name) for name in names]
    if names == [spec]:
        return columns[0]
    texts = []
    for values in zip(*columns):
        held, text = dict(zip(names, values)), ""
        rest = spec
        while rest:  # no str.format: a value may hold braces
            before, _, after = rest.partition("{")
            name, _, rest = after.partition("}")
            text += before + held.get(name, "")
        texts.append(text)
    return texts


def check_texts(source: str, values: Sequence[Any], rows: Sequence[int], column: str) -> list[str]:
    """The values if all are valid texts; InputError names the rows that are not."""
    bad = [row for row, value in zip(rows, values) if not is_text(value)]
    if bad:
        raise InputError(f"{source}: column {column} has no valid text in {row_list(bad)}; drop or mend these rows")
    return list(values)


def lists_of(table: Table, column: str | None) -> list[list[Any]]:
    """A column whose values are lists, or lists written as JSON."""
    values = table.columns[str(column)]
    lists = [parse_json(value) if isinstance(value, str) else value for value in values]
    lists = [list(value) if isinstance(value, (list, tuple, np.ndarray)) else None for value in lists]
    bad = [row for row, value in zip(table.rows, lists) if value is None]
    if bad:
        raise InputError(f"{table.source}: column {column} holds no list in {row_list(bad)}; expected one a row")
    return lists


def parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def integers_of(table: Table, column: str) -> list[str]:
    """A column of integers as text."""
    values = label_names_of(table, column, table.columns[column], table.rows)
    bad = [row for row, value in zip(table.rows, values) if not is_integer(value)]
    if bad:
        raise InputError(f"{table.source}: column {column} is no integer in {row_list(bad)}; expected an index")
    return values


def label_indices(table: Table, column: str, values: Iterable[Any], rows: list[int], names: list[str]) -> list[int]:
    """Labels are matched by name; integers that are no names count as indices."""
    labels = label_names_of(table, column, values, rows)
    index = {name: i for i, name in enumerate(names)}
    if not any(is_integer(name) for name in names) and all(is_integer(label) for label in set(labels)):
        index = {str(i): i for i in range(len(names))}
    bad = [(row, label) for row, label in zip(rows, labels) if label not in index]
    if bad:
        shown = ", ".join(dict.fromkeys(repr(label[:40]) for _, label in bad[:5]))
        allowed = ", ".join(index) if len(index) <= 20 else f"one of {len(index)} labels"
        raise InputError(
            f"{table.source}: label {shown} in {row_list([row for row, _ in bad])}; expected {allowed}"
            f"{'' if set(index) & set(names) else ' (' + ', '.join(names) + ')'}"
        )
    return [index[label] for label in labels]


def label_names_of(table: Table, column: str, values: Iterable[Any], rows: list[int]) -> list[str]:
    """Labels as strings: 1, 1.0 and "1" are the same label."""
    result, missing, odd = [], [], []
    for row, value in zip(rows, values):
        if isinstance(value, (bool, np.integer)):
            value = int(value)
        if isinstance(value, float) and math.isfinite(value) and value.is_integer():
            value = int(value)
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            missing.append(row)
        elif not isinstance(value, (str, int)):
            odd.append(row)
        else:
            result.append(str(value).strip())
    if missing:
        raise InputError(f"{table.source}: label column {column} is empty or NaN in {row_list(missing)}")
    if odd:
        raise InputError(
            f"{table.source}: label column {column} is neither a name nor an integer in {row_list(odd)}; "
            "expected classes"
        )
    return result


def is_integer(value: str) -> bool:
    return value.removeprefix("-").isascii() and value.removeprefix("-").isdigit()


def is_text(value: Any) -> bool:
    """Whether value is a string that can be written as UTF-8 and holds no NUL."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, from a \\ud800 in JSON
        return False
    return True


def row_list(rows: Iterable[int]) -> str:
    """row 3; rows 3, 7, 9; rows 3, 7, 9, 12, 15 and 85 more."""
    return several(list(dict.fromkeys(rows)), "row")


def several(items: list[Any], noun: str = "id") -> str:
    shown = ", ".join(map(str, items[:5]))
    more = f" and {len(items) - 5:,} more" if len(items) > 5 else ""
    return f"{noun}{'s' if len(items) > 1 else ''} {shown}{more}"
