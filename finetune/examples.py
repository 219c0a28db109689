"""Examples of each kind of task, and how they are read from the columns of a table. Imports no torch.

Readers check what they read: an InputError names the file, the column and the rows.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from encoderkit.finetune.tables import Table
from encoderkit.finetune.tasks import Columns, Kind, Task, column_names
from encoderkit.kernels.errors import InputError


@dataclass(frozen=True)
class TextExample:
    """A text or a pair. label: an index, the indices of several, or a score; None where nobody knows it."""

    row: int
    text: str
    text_b: str | None
    label: Any


@dataclass(frozen=True)
class TaggedExample:
    """Words, and the index of each one's tag."""

    row: int
    words: list[str]
    tags: list[int] | None


@dataclass(frozen=True)
class ChoiceExample:
    """A context, and what may follow it; label: the index of what does."""

    row: int
    text: str
    choices: list[str]
    label: int | None


@dataclass(frozen=True)
class QuestionExample:
    """A question about a context. answers: texts and where they begin, in characters; none where there is no answer."""

    row: int
    id: str
    question: str
    context: str
    answers: list[tuple[str, int]] | None


class Reader(ABC):
    """Reads the examples of one kind of task."""

    names_are_labels: ClassVar[bool] = True  # whether the outputs of the model are label names

    def label_names(self, tables: Sequence[Table], columns: Columns) -> list[str]:
        """Names found in training tables: the declared ones, or those that occur, integers by value."""
        assert columns.label
        if tables[0].label_names is not None:
            return tables[0].label_names
        found = {name for table in tables for name in _canonical(table, columns.label, *self.flat(table, columns))}
        return sorted(found, key=lambda name: (0, int(name), "") if _is_integer(name) else (1, 0, name))

    def flat(self, table: Table, columns: Columns) -> tuple[Iterable[Any], list[int]]:
        """Every single label, and its row."""
        assert columns.label
        return table.columns[columns.label], table.rows

    @abstractmethod
    def examples(self, table: Table, task: Task, names: list[str], *, labelled: bool = True) -> list[Any]:
        """The rows of a table; labels are None unless labelled."""

    @abstractmethod
    def labels(self, examples: list[Any]) -> list[Any]:
        """Every single label: what a constant answer is counted on."""

    def group(self, example: Any) -> Any:
        """Examples of one group are held out together: those of the same first text, context or story."""
        return example.row

    def check_train(self, source: str, examples: list[Any], names: list[str]) -> None:
        """Raise InputError where all training rows have one label."""
        found = set(self.labels(examples))
        if len(found) < 2:
            only = repr(names[found.pop()] if names else found.pop()) if found else "no rows"
            count = len(examples)
            raise InputError(f"{source}: {only} is the only label of {count} training rows; expected two or more")


class ClassReader(Reader):
    """One label of several for each text or pair."""

    def examples(self, table, task, names, *, labelled=True):
        columns = task.columns
        texts = texts_of(table, columns.text)
        texts_b = texts_of(table, columns.text_b) if columns.text_b else [None] * len(texts)
        labels = self.read(table, columns, names) if labelled else [None] * len(texts)
        return [TextExample(*parts) for parts in zip(table.rows, texts, texts_b, labels)]

    def read(self, table: Table, columns: Columns, names: list[str]) -> list[Any]:
        """The label of each row."""
        values, rows = self.flat(table, columns)
        return _indices(table, str(columns.label), values, rows, names)

    def labels(self, examples):
        return [example.label for example in examples]

    def group(self, example):
        return example.row if example.text_b is None else example.text


class MultiLabelReader(ClassReader):
    """Any number of labels for each text: a list of names or indices, or such a list as JSON text."""

    def flat(self, table, columns):
        values, rows = [], []
        for row, labels in zip(table.rows, _lists(table, columns.label)):
            values += labels
            rows += [row] * len(labels)
        return values, rows

    def read(self, table, columns, names):
        indices = iter(super().read(table, columns, names))
        return [tuple(sorted({next(indices) for _ in labels})) for labels in _lists(table, columns.label)]

    def labels(self, examples):
        return [label for example in examples for label in example.label]


class ScoreReader(ClassReader):
    """A number for each text or pair."""

    names_are_labels = False

    def label_names(self, tables, columns):
        return []

    def read(self, table, columns, names):
        scores, bad = [], []
        for row, value in zip(table.rows, table.columns[columns.label]):
            try:
                score = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError):
                score = math.nan
            scores.append(score)
            if not math.isfinite(score):
                bad.append(row)
        if bad:
            raise InputError(f"{table.source}: column {columns.label} is no finite number in {row_list(bad)}")
        return scores


class TagReader(Reader):
    """A tag for each word. Chunk tags, the ones with B- and I-, have to be IOB2; data.iob1 converts IOB1."""

    def flat(self, table, columns):
        tags = _lists(table, columns.label)
        return [tag for row in tags for tag in row], [r for r, row in zip(table.rows, tags) for _ in row]

    def examples(self, table, task, names, *, labelled=True):
        columns = task.columns
        words = _lists(table, columns.text)
        for row, row_words in zip(table.rows, words):
            if not row_words:
                raise InputError(f"{table.source}: column {columns.text} has no words in row {row}; drop this row")
            check_texts(table.source, row_words, [row] * len(row_words), str(columns.text))
        if not labelled:
            return [TaggedExample(row, row_words, None) for row, row_words in zip(table.rows, words)]
        counts = [len(row) for row in _lists(table, columns.label)]
        uneven = [row for row, row_words, count in zip(table.rows, words, counts) if len(row_words) != count]
        if uneven:
            raise InputError(f"{table.source}: not one tag for each word in {row_list(uneven)}; mend these rows")
        flat, rows = self.flat(table, columns)
        indices = iter(_indices(table, str(columns.label), flat, rows, names))
        tags = [[next(indices) for _ in range(count)] for count in counts]
        if task.data.iob1:
            tags = [_from_iob1(row, names) for row in tags]
        elif is_iob(names):
            check_iob2(table.source, table.rows, tags, names)
        return [TaggedExample(*parts) for parts in zip(table.rows, words, tags)]

    def label_names(self, tables, columns):
        """With B- for each I-: a conversion, and other splits, may need it."""
        names = super().label_names(tables, columns)
        if is_iob(names):
            names += [f"B-{name[2:]}" for name in names if name.startswith("I-") and f"B-{name[2:]}" not in names]
        return names

    def labels(self, examples):
        return [tag for example in examples for tag in example.tags]


class ChoiceReader(Reader):
    """The index of the right choice."""

    def label_names(self, tables, columns):
        return []

    def examples(self, table, task, names, *, labelled=True):
        columns = task.columns
        contexts = texts_of(table, columns.text)
        questions = texts_of(table, columns.text_b) if columns.text_b else None
        specs = columns.choices or []
        if len(specs) == 1:
            rows = _lists(table, specs[0])
        else:
            rows = [list(row) for row in zip(*(texts_of(table, spec) for spec in specs))]
        few = [row for row, choices in zip(table.rows, rows) if len(choices) < 2]
        if few:
            raise InputError(f"{table.source}: fewer than two choices in {row_list(few)}; drop these rows")
        for row, choices in zip(table.rows, rows):
            check_texts(table.source, choices, [row] * len(choices), " ".join(specs))
        labels: list[Any] = [None] * len(rows)
        if labelled:
            labels = [int(v) for v in _integers(table, str(columns.label))]
            bad = [row for row, label, choices in zip(table.rows, labels, rows) if not 0 <= label < len(choices)]
            if bad:
                raise InputError(
                    f"{table.source}: column {columns.label} is no index of a choice in {row_list(bad)}; "
                    "expected 0 up to the number of choices less one"
                )
        if questions is not None:
            rows = [[f"{question} {choice}" for choice in choices] for question, choices in zip(questions, rows)]
        return [ChoiceExample(*parts) for parts in zip(table.rows, contexts, rows, labels)]

    def labels(self, examples):
        return [example.label for example in examples]

    def group(self, example):
        return example.text

    def check_train(self, source, examples, names):
        """The index of the right choice may always be the same: it is no class."""


class QuestionReader(Reader):
    """Spans of a context that answer a question."""

    def label_names(self, tables, columns):
        return []

    def examples(self, table, task, names, *, labelled=True):
        columns = task.columns
        questions, contexts = texts_of(table, columns.text), texts_of(table, columns.text_b)
        ids = [str(value) for value in table.columns[columns.id]]
        repeated = [id for id, count in Counter(ids).items() if count > 1]
        if repeated:
            raise InputError(f"{table.source}: {_several(repeated)} more than once; expected an id for each question")
        if not labelled:
            return [QuestionExample(*parts, None) for parts in zip(table.rows, ids, questions, contexts)]
        answers = [_answers(table, row, value) for row, value in zip(table.rows, table.columns[columns.label])]
        without = [id for id, found in zip(ids, answers) if not found]
        if without and not task.data.unanswerable:
            raise InputError(
                f"{table.source}: no answer to {_several(without)}; drop these questions, or set "
                "--data.unanswerable true, as in SQuAD 2.0"
            )
        return [QuestionExample(*parts) for parts in zip(table.rows, ids, questions, contexts, answers)]

    def labels(self, examples):
        return []

    def group(self, example):
        return example.context

    def check_train(self, source, examples, names):
        """Raise InputError where an answer does not stand where it is said to."""
        wrong = [
            example.id
            for example in examples
            for text, start in (example.answers or [])[:1]
            if not text or example.context[start : start + len(text)] != text
        ]
        if wrong:
            raise InputError(f"{source}: the answer to {_several(wrong)} does not stand at its answer_start; mend it")


READERS: dict[Kind, Reader] = {
    "classification": ClassReader(),
    "multi_label": MultiLabelReader(),
    "regression": ScoreReader(),
    "tagging": TagReader(),
    "multiple_choice": ChoiceReader(),
    "question_answering": QuestionReader(),
}


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
    bad = [row for row, value in zip(rows, values) if not _is_text(value)]
    if bad:
        raise InputError(f"{source}: column {column} has no valid text in {row_list(bad)}; drop or mend these rows")
    return list(values)


def is_iob(names: Iterable[str]) -> bool:
    """Whether these are chunk tags: some begin with B- or I-."""
    return any(name.startswith(("B-", "I-")) for name in names)


def check_iob2(source: str, rows: list[int], tags: list[list[int]], names: list[str]) -> None:
    """Raise InputError naming the first row whose tags are not IOB2 (Ratnaparkhi 1998): every chunk begins with B-."""
    for row, indices in zip(rows, tags):
        before = "O"
        for position, tag in enumerate([names[i] for i in indices], 1):
            fits = tag == "O" or (len(tag) > 2 and tag[:2] in ("B-", "I-"))
            if not fits or (tag[0] == "I" and before[1:] != tag[1:]):
                raise InputError(
                    f"{source}: row {row}, word {position}: tag {tag} after {before} is not IOB2; mend it, or set "
                    "--data.iob1 true where tags are IOB1"
                )
            before = tag


def _from_iob1(indices: list[int], names: list[str]) -> list[int]:
    """IOB2 of IOB1 (Ramshaw and Marcus 1995): I- that begins a chunk becomes B-."""
    converted, before = [], "O"
    for tag in (names[i] for i in indices):
        begins = tag.startswith("I-") and before[1:] != tag[1:]
        converted.append(names.index(f"B-{tag[2:]}" if begins else tag))
        before = tag
    return converted


def _answers(table: Table, row: int, value: Any) -> list[tuple[str, int]]:
    """Answers as hub columns hold them, {text: [...], answer_start: [...]}, or as the official files do."""
    if isinstance(value, str):
        value = _json(value)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        pairs = list(zip(value["text"], value.get("answer_start") or [-1] * len(value["text"])))
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        pairs = [(item.get("text"), item.get("answer_start", -1)) for item in value]
    else:
        pairs = [(None, None)]
    if not all(_is_text(text) and isinstance(start, int) for text, start in pairs):
        raise InputError(f"{table.source}: row {row}: expected answers with the lists text and answer_start")
    return pairs


def _lists(table: Table, column: str | None) -> list[list[Any]]:
    """A column whose values are lists, or lists written as JSON."""
    values = table.columns[str(column)]
    lists = [_json(value) if isinstance(value, str) else value for value in values]
    lists = [list(value) if isinstance(value, (list, tuple, np.ndarray)) else None for value in lists]
    bad = [row for row, value in zip(table.rows, lists) if value is None]
    if bad:
        raise InputError(f"{table.source}: column {column} holds no list in {row_list(bad)}; expected one a row")
    return lists


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def _integers(table: Table, column: str) -> list[str]:
    """A column of integers as text."""
    values = _canonical(table, column, table.columns[column], table.rows)
    bad = [row for row, value in zip(table.rows, values) if not _is_integer(value)]
    if bad:
        raise InputError(f"{table.source}: column {column} is no integer in {row_list(bad)}; expected an index")
    return values


def _indices(table: Table, column: str, values: Iterable[Any], rows: list[int], names: list[str]) -> list[int]:
    """Labels are matched by name; integers that are no names count as indices."""
    labels = _canonical(table, column, values, rows)
    index = {name: i for i, name in enumerate(names)}
    if not any(_is_integer(name) for name in names) and all(_is_integer(label) for label in set(labels)):
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


def _canonical(table: Table, column: str, values: Iterable[Any], rows: list[int]) -> list[str]:
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


def row_list(rows: Iterable[int]) -> str:
    """row 3; rows 3, 7, 9; rows 3, 7, 9, 12, 15 and 85 more."""
    return _several(list(dict.fromkeys(rows)), "row")


def _several(items: list[Any], noun: str = "id") -> str:
    shown = ", ".join(map(str, items[:5]))
    more = f" and {len(items) - 5:,} more" if len(items) > 5 else ""
    return f"{noun}{'s' if len(items) > 1 else ''} {shown}{more}"
