"""Labelled rows of a task: texts checked, labels turned into indices, validation held out where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from encoderkit.finetune.settings import TaskData
from encoderkit.finetune.tables import Table, read_file, read_hub
from encoderkit.finetune.tasks import Columns, Task
from encoderkit.kernels.errors import InputError


@dataclass(frozen=True)
class Split:
    """N rows of texts or pairs of texts. labels: (N,) int64. rows: their numbers in source."""

    source: str
    texts: list[str]
    texts_b: list[str] | None
    labels: np.ndarray
    rows: list[int]

    def take(self, indices: np.ndarray) -> Split:
        """The rows at these indices, in their order."""
        return Split(
            self.source,
            [self.texts[i] for i in indices],
            None if self.texts_b is None else [self.texts_b[i] for i in indices],
            self.labels[indices],
            [self.rows[i] for i in indices],
        )


@dataclass(frozen=True)
class LabelledData:
    """What a task is learned from and measured on. label_names: in the order of the integer labels."""

    train: Split
    validation: Split
    test: Split | None
    label_names: list[str]
    validation_held_out: bool  # whether validation is a share of the training rows

    def splits(self) -> dict[str, Split]:
        """The splits that are measured, by name."""
        return {"validation": self.validation} | ({"test": self.test} if self.test else {})

    def majority_share(self) -> float:
        """Share of the most frequent training label in the last measured split: what a constant answer reaches."""
        commonest = int(np.bincount(self.train.labels).argmax())
        return float(np.mean((self.test or self.validation).labels == commonest))


def load_data(data: TaskData, task: Task | None) -> LabelledData:
    """Read and check all splits of a task.

    Raises InputError with row numbers: a text that is missing or no text; a label that is missing, NaN or none of the
    label names; fewer than two labels in train; a column that is missing.
    """
    columns = data.columns(task)
    tables = _read_splits(data, task, columns)
    train_labels = _canonical(tables["train"], columns.label)
    names = data.labels or (list(task.labels) if task else None) or tables["train"].label_names
    if names is None:
        names = sorted(set(train_labels), key=lambda name: (0, int(name), "") if _is_integer(name) else (1, 0, name))
    splits = {name: _split(table, columns, list(names)) for name, table in tables.items()}
    train, held_out = splits["train"], "validation" not in splits
    if held_out:
        count = max(1, round(data.validation_share * len(train.texts)))
        order = np.argsort(np.random.Philox(key=0).random_raw(len(train.texts)), kind="stable")
        splits["validation"] = train.take(np.sort(order[:count]))
        train = train.take(np.sort(order[count:]))
    found = np.unique(train.labels)
    if len(found) < 2:
        only = repr(names[found[0]]) if len(found) else "no rows"
        raise InputError(
            f"{train.source}: {only} is the only label of {len(train.texts)} training rows; expected two or more"
        )
    return LabelledData(train, splits["validation"], splits.get("test"), list(names), held_out)


def check_texts(source: str, values: Sequence[Any], rows: Sequence[int], column: str) -> list[str]:
    """The values if all are valid texts; InputError names the rows that are not."""
    bad = [row for row, value in zip(rows, values) if not _is_text(value)]
    if bad:
        raise InputError(f"{source}: column {column} has no valid text in {_row_list(bad)}; drop or mend these rows")
    return list(values)


def _read_splits(data: TaskData, task: Task | None, columns: Columns) -> dict[str, Table]:
    """Tables by split name; splits that do not exist are left out."""
    wanted = [columns.text, *([columns.text_b] if columns.text_b else []), columns.label]
    if data.train:
        paths = {"train": data.train, "validation": data.validation, "test": data.test}
        return {name: read_file(path, wanted) for name, path in paths.items() if path}
    if task and not data.hub:
        hub, splits = task.hub, (task.splits.train, task.splits.validation, task.splits.test)
    else:
        assert data.hub  # checked by the settings
        hub, splits = data.hub, (data.train_split, data.validation_split, data.test_split)
    return {name: read_hub(hub, split, wanted) for name, split in zip(("train", "validation", "test"), splits) if split}


def _split(table: Table, columns: Columns, names: list[str]) -> Split:
    texts_b = None
    if columns.text_b:
        texts_b = check_texts(table.source, table.columns[columns.text_b], table.rows, columns.text_b)
    return Split(
        table.source,
        check_texts(table.source, table.columns[columns.text], table.rows, columns.text),
        texts_b,
        _label_indices(table, columns.label, names),
        table.rows,
    )


def _label_indices(table: Table, column: str, names: list[str]) -> np.ndarray:
    """(N,) int64: labels are matched by name; integers that are no names count as indices."""
    values = _canonical(table, column)
    index = {name: i for i, name in enumerate(names)}
    if not any(_is_integer(name) for name in names) and all(_is_integer(value) for value in set(values)):
        index = {str(i): i for i in range(len(names))}
    bad = [(row, value) for row, value in zip(table.rows, values) if value not in index]
    if bad:
        shown = ", ".join(dict.fromkeys(repr(value[:40]) for _, value in bad[:5]))
        allowed = ", ".join(index) if len(index) <= 20 else f"one of {len(index)} labels"
        raise InputError(
            f"{table.source}: label {shown} in {_row_list([row for row, _ in bad])}; expected {allowed}"
            f"{'' if set(index) & set(names) else ' (' + ', '.join(names) + ')'}"
        )
    return np.array([index[value] for value in values], dtype=np.int64)


def _canonical(table: Table, column: str) -> list[str]:
    """Labels as strings: 1, 1.0 and "1" are the same label."""
    result, missing, odd = [], [], []
    for row, value in zip(table.rows, table.columns[column]):
        if isinstance(value, bool):
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
        raise InputError(f"{table.source}: label column {column} is empty or NaN in {_row_list(missing)}")
    if odd:
        raise InputError(
            f"{table.source}: label column {column} is neither a name nor an integer in {_row_list(odd)}; "
            "expected classes"
        )
    return result


def _is_integer(value: str) -> bool:
    return value.removeprefix("-").isascii() and value.removeprefix("-").isdigit()


def _is_text(value: Any) -> bool:
    """Whether value is a string that can be written as UTF-8 and holds no NUL."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, from a \\ud800 in JSON
        return False
    return True


def _row_list(rows: list[int]) -> str:
    """row 3; rows 3, 7, 9; rows 3, 7, 9, 12, 15 and 85 more."""
    shown = ", ".join(map(str, rows[:5]))
    more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"
