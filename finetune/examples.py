"""Examples of each kind of task, and how they are read from the columns of a table. Imports no torch.

Readers check what they read: an InputError names the file, the column and the rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from encoderkit.finetune.cells import (
    check_texts,
    integers_of,
    is_integer,
    is_text,
    label_indices,
    label_names_of,
    lists_of,
    parse_json,
    row_list,
    several,
    texts_of,
)
from encoderkit.finetune.iob import check_iob2, from_iob1, is_iob
from encoderkit.finetune.tables import Table
from encoderkit.finetune.tasks import Columns, Kind, Task
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

    labels_are_names: ClassVar[bool] = True  # else numbers, which stay numbers where a hub data set has names for them

    def label_names(self, tables: Sequence[Table], columns: Columns) -> list[str]:
        """Names found in training tables: the declared ones, or those that occur, integers by value."""
        assert columns.label
        if tables[0].label_names is not None:
            return tables[0].label_names
        found = {name for table in tables for name in label_names_of(table, columns.label, *self.flat(table, columns))}
        return sorted(found, key=lambda name: (0, int(name), "") if is_integer(name) else (1, 0, name))

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
        """Examples of one group are held out together: those of the same first text, words, context or story."""
        return example.text

    def check_split(self, source: str, examples: list[Any]) -> None:  # noqa: B027 - most rows stand alone
        """Raise InputError where rows of a split, which may be of several files, do not go together."""

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
        return label_indices(table, str(columns.label), values, rows, names)

    def labels(self, examples):
        return [example.label for example in examples]


class MultiLabelReader(ClassReader):
    """Any number of labels for each text: a list of names or indices, or such a list as JSON text."""

    def flat(self, table, columns):
        values, rows = [], []
        for row, labels in zip(table.rows, lists_of(table, columns.label)):
            values += labels
            rows += [row] * len(labels)
        return values, rows

    def read(self, table, columns, names):
        indices = iter(super().read(table, columns, names))
        return [tuple(sorted({next(indices) for _ in labels})) for labels in lists_of(table, columns.label)]

    def labels(self, examples):
        return [label for example in examples for label in example.label]


class ScoreReader(ClassReader):
    """A number for each text or pair."""

    labels_are_names = False

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
        tags = lists_of(table, columns.label)
        return [tag for row in tags for tag in row], [r for r, row in zip(table.rows, tags) for _ in row]

    def examples(self, table, task, names, *, labelled=True):
        columns = task.columns
        words = lists_of(table, columns.text)
        for row, row_words in zip(table.rows, words):
            if not row_words:
                raise InputError(f"{table.source}: column {columns.text} has no words in row {row}; drop this row")
            check_texts(table.source, row_words, [row] * len(row_words), str(columns.text))
        if not labelled:
            return [TaggedExample(row, row_words, None) for row, row_words in zip(table.rows, words)]
        counts = [len(row) for row in lists_of(table, columns.label)]
        uneven = [row for row, row_words, count in zip(table.rows, words, counts) if len(row_words) != count]
        if uneven:
            raise InputError(f"{table.source}: not one tag for each word in {row_list(uneven)}; mend these rows")
        flat, rows = self.flat(table, columns)
        indices = iter(label_indices(table, str(columns.label), flat, rows, names))
        tags = [[next(indices) for _ in range(count)] for count in counts]
        if task.data.iob1:
            tags = [from_iob1(row, names) for row in tags]
        if is_iob(names):
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

    def group(self, example):
        return tuple(example.words)


class ChoiceReader(Reader):
    """The index of the right choice."""

    labels_are_names = False

    def label_names(self, tables, columns):
        return []

    def examples(self, table, task, names, *, labelled=True):
        columns = task.columns
        contexts = texts_of(table, columns.text)
        questions = texts_of(table, columns.text_b) if columns.text_b else None
        specs = columns.choices or []
        if len(specs) == 1:
            rows = lists_of(table, specs[0])
        else:
            rows = [list(row) for row in zip(*(texts_of(table, spec) for spec in specs))]
        few = [row for row, choices in zip(table.rows, rows) if len(choices) < 2]
        if few:
            raise InputError(f"{table.source}: fewer than two choices in {row_list(few)}; drop these rows")
        for row, choices in zip(table.rows, rows):
            check_texts(table.source, choices, [row] * len(choices), " ".join(specs))
        labels: list[Any] = [None] * len(rows)
        if labelled:
            labels = [int(v) for v in integers_of(table, str(columns.label))]
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
        if not labelled:
            return [QuestionExample(*parts, None) for parts in zip(table.rows, ids, questions, contexts)]
        answers = [_answers(table, row, value) for row, value in zip(table.rows, table.columns[columns.label])]
        without = [id for id, found in zip(ids, answers) if not found]
        if without and not task.data.unanswerable:
            raise InputError(
                f"{table.source}: no answer to {several(without)}; drop these questions, or set "
                "--data.unanswerable true, as in SQuAD 2.0"
            )
        return [QuestionExample(*parts) for parts in zip(table.rows, ids, questions, contexts, answers)]

    def labels(self, examples):
        return []

    def group(self, example):
        return example.context

    def check_split(self, source, examples):
        """Raise InputError where two questions have one id: their answers could not be told apart."""
        repeated = [id for id, count in Counter(example.id for example in examples).items() if count > 1]
        if repeated:
            raise InputError(f"{source}: {several(repeated)} more than once; expected an id for each question")

    def check_train(self, source, examples, names):
        """Raise InputError where an answer does not stand where it is said to."""
        wrong = [
            example.id
            for example in examples
            for text, start in (example.answers or [])[:1]
            if not text or example.context[start : start + len(text)] != text
        ]
        if wrong:
            raise InputError(f"{source}: the answer to {several(wrong)} does not stand at its answer_start; mend it")


READERS: dict[Kind, Reader] = {
    "classification": ClassReader(),
    "multi_label": MultiLabelReader(),
    "regression": ScoreReader(),
    "tagging": TagReader(),
    "multiple_choice": ChoiceReader(),
    "question_answering": QuestionReader(),
}


def _answers(table: Table, row: int, value: Any) -> list[tuple[str, int]]:
    """Answers as hub columns hold them, {text: [...], answer_start: [...]}, or as the official files do."""
    if isinstance(value, str):
        value = parse_json(value)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        pairs = list(zip(value["text"], value.get("answer_start") or [-1] * len(value["text"])))
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        pairs = [(item.get("text"), item.get("answer_start", -1)) for item in value]
    else:
        pairs = [(None, None)]
    if not all(is_text(text) and isinstance(start, int) for text, start in pairs):
        raise InputError(f"{table.source}: row {row}: expected answers with the lists text and answer_start")
    return pairs
