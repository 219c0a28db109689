"""Labelled rows of a task: read, checked, and validation held out of train where there is none. Imports no torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from encoderkit.finetune.examples import READERS, Reader
from encoderkit.finetune.squad import read_squad_or_file
from encoderkit.finetune.tables import Table, read_file, read_hub
from encoderkit.finetune.tasks import Task
from encoderkit.kernels.errors import InputError

SPLITS = ("train", "validation", "test")
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Split:
    """Examples of one kind (encoderkit.finetune.examples).

    source: the files or the hub split they are from. files: that of each example, where there are several.
    """

    source: str
    examples: list[Any]
    files: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def take(self, indices: np.ndarray) -> Split:
        """The examples at these indices, in their order."""
        files = [self.files[i] for i in indices] if self.files else []
        return Split(self.source, [self.examples[i] for i in indices], files)


@dataclass(frozen=True)
class LabelledData:
    """What a task is learned from and measured on. label_names: in the order of the integer labels, or none."""

    task: Task
    train: Split
    validation: Split
    test: Split | None
    label_names: list[str]
    validation_held_out: bool  # whether validation is a share of the training rows

    def splits(self) -> dict[str, Split]:
        """The splits that are measured, by name."""
        return {"validation": self.validation} | ({"test": self.test} if self.test else {})

    @cached_property
    def fingerprint(self) -> str:
        """What changes when a row, a label or a split does."""
        digest = hashlib.sha256(repr(self.label_names).encode())
        for name, split in {"train": self.train, **self.splits()}.items():
            digest.update(name.encode())
            for example in split.examples:
                digest.update(repr(example).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def majority_share(self) -> float | None:
        """Share of the most frequent training label in the last measured split: what a constant answer reaches.

        None where labels are no classes, or a row has several.
        """
        if self.task.kind in ("multi_label", "regression"):
            return None
        reader = READERS[self.task.kind]
        labels = reader.labels(self.train.examples)
        if not labels:
            return None
        measured = reader.labels((self.test or self.validation).examples)
        return measured.count(Counter(labels).most_common(1)[0][0]) / max(1, len(measured))


def load_data(task: Task) -> LabelledData:
    """Read and check all splits of a task.

    Raises InputError with row numbers: what is missing or no text; a label that is missing, NaN or none of the label
    names; fewer than two labels in train; tags that are not IOB2; a column that is missing.
    """
    data, reader = task.data, READERS[task.kind]
    tables = _read_splits(task)
    names = list(data.labels) if data.labels else reader.label_names(tables["train"], task.columns)
    labelled = task.columns.label != ""  # pairs of sentences need no scores
    splits = {}
    for split, parts in tables.items():
        read = [reader.examples(table, task, names, labelled=labelled) for table in parts]
        examples = [example for of_file in read for example in of_file]
        files = [table.source for table, of_file in zip(parts, read) for _ in of_file] if len(parts) > 1 else []
        splits[split] = Split(", ".join(table.source for table in parts), examples, files)
        reader.check_split(splits[split].source, examples)
    train = splits["train"]
    if labelled:
        reader.check_train(train.source, train.examples, names)
    held_out = "validation" not in splits
    shares = {"validation": (data.validation_share or VALIDATION_SHARE) if held_out else None, "test": data.test_share}
    splits |= _hold_out(splits["train"], {name: share for name, share in shares.items() if share}, reader)
    for split in splits:
        most = data.max_train_rows if split == "train" else data.max_eval_rows
        if most is not None and len(splits[split]) > most:
            splits[split] = splits[split].take(np.sort(_shuffled(len(splits[split]), key=1)[:most]))
    train = splits["train"]
    if not len(train):
        raise InputError(f"{train.source}: no row is left to train on; expected several, with texts that differ")
    if labelled:
        reader.check_train(train.source, train.examples, names)
    return LabelledData(task, train, splits["validation"], splits.get("test"), names, held_out)


def _hold_out(train: Split, shares: dict[str, float], reader: Reader) -> dict[str, Split]:
    """Shares of the groups of train as splits of their own, and what is left; the same ones for every seed."""
    groups = [reader.group(example) for example in train.examples]
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    number_N = np.array([numbers[group] for group in groups])
    order = _shuffled(len(numbers), key=0)
    splits, first = {}, 0
    for name, share in shares.items():
        count = max(1, round(share * len(numbers)))
        splits[name] = train.take(np.flatnonzero(np.isin(number_N, order[first : first + count])))
        first += count
    return {**splits, "train": train.take(np.flatnonzero(np.isin(number_N, order[first:])))}


def _shuffled(count: int, key: int) -> np.ndarray:
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def _read_splits(task: Task) -> dict[str, list[Table]]:
    """Tables by split name; splits that do not exist are left out."""
    data = task.data
    if data.train:
        read = read_squad_or_file if task.kind == "question_answering" else read_file
        paths = {split: getattr(data, split) for split in SPLITS}
        return {split: [read(path, task.columns.names()) for path in files] for split, files in paths.items() if files}
    if not data.hub:
        raise InputError("no data: set task, data.train (files) or data.hub (a hub data set)")
    wanted = task.columns.names()
    splits = zip(SPLITS, (data.train_split or "train", data.validation_split, data.test_split))
    named = READERS[task.kind].labels_are_names and not data.labels
    label = task.columns.label if named else None
    return {name: [read_hub(data.hub, split, wanted, label)] for name, split in splits if split}
