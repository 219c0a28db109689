"""Tasks are data: where the rows lie, which columns hold what, and what is measured. Imports no torch.

A task is one line of TASKS. GLUE: Wang et al. 2019 (arXiv:1804.07461); AG News: Zhang et al. 2015 (arXiv:1509.01626);
TREC: Li and Roth 2002; IMDB: Maas et al. 2011.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from encoderkit.kernels.errors import InputError

METRICS = ("accuracy", "f1", "f1_macro", "matthews")  # each is a class in encoderkit.finetune.metrics


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns that hold the input and the answer."""

    text: str = "text"
    text_b: str | None = None  # the second text of a pair
    label: str = "label"


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Names of the splits of a hub data set; None where the task has no labelled one."""

    train: str = "train"
    validation: str | None = "validation"
    test: str | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    hub: data set name, or name/configuration after a colon. kind: which head and loss it takes. labels: names in the
    order of the integer labels. metrics: what is reported; the first one chooses the best epoch.
    """

    name: str
    hub: str
    columns: Columns
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: Splits = Splits()
    kind: Literal["classification"] = "classification"


_YES_NO_ENTAILMENT = ("entailment", "not_entailment")
_THREE_WAY = ("entailment", "neutral", "contradiction")
_MNLI_COLUMNS = Columns(text="premise", text_b="hypothesis")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="cola",
            hub="nyu-mll/glue:cola",
            columns=Columns(text="sentence"),
            labels=("unacceptable", "acceptable"),
            metrics=("matthews", "accuracy"),
        ),
        Task(
            name="sst2",
            hub="nyu-mll/glue:sst2",
            columns=Columns(text="sentence"),
            labels=("negative", "positive"),
            metrics=("accuracy",),
        ),
        Task(
            name="mrpc",
            hub="nyu-mll/glue:mrpc",
            columns=Columns(text="sentence1", text_b="sentence2"),
            labels=("not_equivalent", "equivalent"),
            metrics=("f1", "accuracy"),
            splits=Splits(test="test"),
        ),
        Task(
            name="qqp",
            hub="nyu-mll/glue:qqp",
            columns=Columns(text="question1", text_b="question2"),
            labels=("not_duplicate", "duplicate"),
            metrics=("f1", "accuracy"),
        ),
        Task(
            name="mnli",
            hub="nyu-mll/glue:mnli",
            columns=_MNLI_COLUMNS,
            labels=_THREE_WAY,
            metrics=("accuracy",),
            splits=Splits(validation="validation_matched"),
        ),
        Task(
            name="mnli-mismatched",
            hub="nyu-mll/glue:mnli",
            columns=_MNLI_COLUMNS,
            labels=_THREE_WAY,
            metrics=("accuracy",),
            splits=Splits(validation="validation_mismatched"),
        ),
        Task(
            name="qnli",
            hub="nyu-mll/glue:qnli",
            columns=Columns(text="question", text_b="sentence"),
            labels=_YES_NO_ENTAILMENT,
            metrics=("accuracy",),
        ),
        Task(
            name="rte",
            hub="nyu-mll/glue:rte",
            columns=Columns(text="sentence1", text_b="sentence2"),
            labels=_YES_NO_ENTAILMENT,
            metrics=("accuracy",),
        ),
        Task(
            name="wnli",
            hub="nyu-mll/glue:wnli",
            columns=Columns(text="sentence1", text_b="sentence2"),
            labels=_YES_NO_ENTAILMENT[::-1],
            metrics=("accuracy",),
        ),
        Task(
            name="agnews",
            hub="fancyzhx/ag_news",
            columns=Columns(),
            labels=("World", "Sports", "Business", "Sci/Tech"),
            metrics=("accuracy", "f1_macro"),
            splits=Splits(validation=None, test="test"),
        ),
        Task(
            name="trec",
            hub="CogComp/trec",
            columns=Columns(label="coarse_label"),
            labels=("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
            metrics=("accuracy", "f1_macro"),
            splits=Splits(validation=None, test="test"),
        ),
        Task(
            name="imdb",
            hub="stanfordnlp/imdb",
            columns=Columns(),
            labels=("neg", "pos"),
            metrics=("accuracy",),
            splits=Splits(validation=None, test="test"),
        ),
    )
}


def find_task(name: str) -> Task:
    """The task of this name; InputError names the nearest."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"task is {name!r}{hint} Known tasks: {', '.join(TASKS)}")
    return TASKS[name]
