"""Tasks are data: what kind they are, where the rows lie, which columns hold what, what is measured. Imports no torch.

A task is a Task: one entry of encoderkit.finetune.registry.TASKS, or a YAML file with the same keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.settings import check_range

Kind = Literal["classification", "multi_label", "regression", "tagging", "multiple_choice", "question_answering"]

# What is reported of each kind; each is a class in encoderkit.finetune.metrics, the first chooses the best epoch.
METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "f1_macro", "matthews"),
    "multi_label": ("f1_micro", "f1_macro", "accuracy"),
    "regression": ("pearson", "spearman"),
    "tagging": ("seqeval_f1", "accuracy"),
    "multiple_choice": ("accuracy",),
    "question_answering": ("squad_f1", "exact_match"),
}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns of the input and the answer; {a}: {b} joins two. None: the task's; empty: no such column."""

    text: str | None = None  # the text; the words in tagging, the question in question answering
    text_b: str | None = None  # second text of a pair; the context in question answering, the question before choices
    label: str | None = None  # name, index, score, or list of them; in question answering the answers
    choices: list[str] | None = None  # multiple choice: one column that holds a list, or a column for each choice
    id: str | None = None  # question answering: what predictions are filed under

    def over(self, base: Columns) -> Columns:
        """These, and base's where these are None."""
        return Columns(**{k: getattr(base, k) if v is None else v for k, v in vars(self).items()})

    def names(self) -> list[str]:
        """Every column that is read."""
        specs = [self.text, self.text_b, self.label, self.id, *(self.choices or ())]
        return list(dict.fromkeys(name for spec in specs if spec for name in column_names(spec)))


COLUMNS: dict[Kind, Columns] = {
    "classification": Columns(text="text", label="label"),
    "multi_label": Columns(text="text", label="labels"),
    "regression": Columns(text="text", label="score"),
    "tagging": Columns(text="tokens", label="tags"),
    "multiple_choice": Columns(text="context", text_b="question", label="label", choices=["choices"]),
    "question_answering": Columns(text="question", text_b="context", label="answers", id="id"),
}


def column_names(spec: str) -> list[str]:
    """The columns that a spec reads.

    >>> column_names("sentence"), column_names("{word}: {sentence}")
    (['sentence'], ['word', 'sentence'])
    """
    return re.findall(r"\{([^{}]+)\}", spec) or [spec]


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Where labelled rows lie. None: the task's."""

    train: list[str] = field(default_factory=list)  # .jsonl, .ndjson, .json, .csv, .tsv (also .gz, .zst), .parquet
    validation: list[str] = field(default_factory=list)  # files; none holds out a share of train
    test: list[str] = field(default_factory=list)  # files that the best epoch is measured on once
    hub: str | None = None  # hub data set in place of files: NAME[:CONFIGURATION][@REVISION], such as nyu-mll/glue:sst2
    train_split: str | None = None  # names of the hub data set's splits; without one: train
    validation_split: str | None = None  # empty, or without one: a share of train is held out
    test_split: str | None = None  # empty: no such split
    labels: list[str] | None = None  # label names, in the order of integer labels; None collects them from train
    validation_share: float | None = None  # of train, held out where there is no validation data; None: a tenth
    test_share: float | None = None  # of train, held out as test data; None: none
    max_train_rows: int | None = None  # at most so many rows of train, the same ones for every seed; None: all
    max_eval_rows: int | None = None  # at most so many rows of validation, and of test; None: all
    iob1: bool | None = None  # tags are IOB1, which is converted: B- only between two neighbours of one type
    unanswerable: bool | None = None  # questions may have no answer, as in SQuAD 2.0

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])
        if self.train and self.hub:
            raise InputError(f"data.train is {' '.join(self.train)} and data.hub is {self.hub}; set one of them")
        if (self.validation or self.test) and not self.train:
            raise InputError("data.validation or data.test is set without data.train; name the training file too")
        for name in ("validation_share", "test_share"):
            if (share := getattr(self, name)) is not None and not 0 < share < 1:
                raise InputError(f"data.{name} is {share:g}; expected 0 < share < 1")
        for name in ("max_train_rows", "max_eval_rows"):
            check_range(f"data.{name}", getattr(self, name), 2)
        if self.test_share is not None and (self.test or self.test_split):
            raise InputError("data.test_share is set, and there is test data already; leave one of them out")
        if self.validation_share is not None and (self.validation or self.validation_split):
            raise InputError(
                "data.validation_share is set, and there is validation data already; leave one of them out"
            )
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise InputError(f"data.labels is {self.labels}; expected at least two different names")

    def over(self, base: TaskData) -> TaskData:
        """These; base's rows where these name none, and base's other fields where these are not set."""
        own = bool(self.train or self.hub)
        sources = ("train", "validation", "test", "hub", "train_split", "validation_split", "test_split")
        changes: dict[str, Any] = {
            name: getattr(base, name)
            for name in vars(self)
            if not (own and name in sources) and getattr(self, name) in (None, [])
        }
        return dataclasses.replace(self, **changes)

    def within(self, folder: Path) -> TaskData:
        """The same with relative files taken from folder."""
        changes: dict[str, Any] = {
            name: [str(folder / file) for file in getattr(self, name)] for name in ("train", "validation", "test")
        }
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. Its columns are whole: those that it does not name are its kind's."""

    name: str = ""
    kind: Kind = "classification"  # which head, loss and answer it has
    data: TaskData = field(default_factory=TaskData)
    columns: Columns = field(default_factory=Columns)
    metrics: list[str] = field(default_factory=list)  # reported first; the first chooses the best epoch
    protocol: str = ""  # how published scores are measured

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", self.columns.over(COLUMNS[self.kind]))
        for name in self.metrics:
            check_metric(name, self.kind)


def check_columns(columns: Columns, kind: Kind, *, labelled: bool = True) -> None:
    """Raise InputError where a column that this kind of task reads is set empty, or joins what is no text."""
    more = {"question_answering": ["text_b", "id"], "multiple_choice": ["choices"]}
    for name in ["text", *(["label"] if labelled else []), *more.get(kind, [])]:
        if not getattr(columns, name):
            raise InputError(f"columns.{name} is empty, but {kind} reads it; name its column, or leave it out")
    single = ["label", "id", *(["text"] if kind == "tagging" else [])]
    specs = [(name, getattr(columns, name)) for name in single]
    specs += [("choices", columns.choices[0])] if columns.choices and len(columns.choices) == 1 else []
    for name, spec in specs:
        if spec and column_names(spec) != [spec]:
            raise InputError(
                f"columns.{name} is {spec}; {kind} reads one column there, so give its name, without braces"
            )


def check_metric(name: str, kind: Kind) -> None:
    """Raise InputError where a kind of task has no metric of this name."""
    if name not in METRICS[kind]:
        raise InputError(f"metric is {name!r}; expected one of {', '.join(METRICS[kind])} for {kind}")


def find_task(name: str) -> Task:
    """The task of this name, or the one that a YAML file describes, whose files lie relative to it.

    Raises InputError naming the nearest name.
    """
    if name.endswith((".yaml", ".yml")):
        from encoderkit.pretrain.command_line import read_settings

        task = read_settings(Task, Path(name))
        data = task.data.within(Path(name).parent)
        return dataclasses.replace(task, name=task.name or Path(name).stem, data=data)
    from encoderkit.finetune.registry import TASKS

    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ";"
        raise InputError(f"task is {name!r}{hint} Known tasks: {', '.join(TASKS)}, or a .yaml file")
    return TASKS[name]
