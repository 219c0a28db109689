"""Every setting of the fine-tuning commands, typed, with units and ranges. Imports no torch.

Read from YAML with dotted overrides by encoderkit.pretrain.command_line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from encoderkit.finetune.tasks import METRICS, Columns, Task, find_task
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.settings import Optimizer, Schedule, check_range

Precision = Literal["auto", "fp32", "bf16"]
Attention = Literal["auto", "reference", "torch", "xformers", "varlen"]


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Where labelled rows lie, and which columns hold what; a column that is None is the task's, or text and label."""

    train: str | None = None  # .jsonl[.gz], .json, .csv, .tsv or .parquet file
    validation: str | None = None  # file; None holds out a share of train
    test: str | None = None  # file that the best epoch is measured on once
    hub: str | None = None  # hub data set in place of files, configuration after a colon: nyu-mll/glue:sst2
    train_split: str = "train"  # split names, for a hub data set without a task
    validation_split: str | None = None
    test_split: str | None = None
    text: str | None = None  # column of the text
    text_b: str | None = None  # column of the second text of a pair
    label: str | None = None  # column of the label: a name, or an integer
    labels: list[str] | None = None  # label names, in the order of integer labels; None collects them from train
    validation_share: float = 0.1  # of train, held out where there is no validation data; the same rows for every seed

    def __post_init__(self) -> None:
        if self.train and self.hub:
            raise InputError(f"data.train is {self.train} and data.hub is {self.hub}; set one of them")
        if (self.validation or self.test) and not self.train:
            raise InputError("data.validation or data.test is set without data.train; name the training file too")
        if not 0 < self.validation_share < 1:
            raise InputError(f"data.validation_share is {self.validation_share:g}; expected 0 < share < 1")
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise InputError(f"data.labels is {self.labels}; expected at least two different names")

    def columns(self, task: Task | None) -> Columns:
        """Column names: those that are set, then the task's, then text and label."""
        base = task.columns if task else Columns()
        return Columns(text=self.text or base.text, text_b=self.text_b or base.text_b, label=self.label or base.label)


@dataclass(frozen=True, kw_only=True)
class _Labelled:
    """What training a network and training the baseline have in common."""

    task: str | None = None  # a known task: its hub data set, columns, label names and metrics
    data: TaskData = field(default_factory=TaskData)
    metric: str | None = None  # what is compared; None takes the task's first, or accuracy
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task is not None:
            find_task(self.task)
        if self.task is None and not self.data.train and not self.data.hub:
            raise InputError("no data: set task, data.train (a file) or data.hub (a hub data set)")
        if self.metric is not None and self.metric not in METRICS:
            raise InputError(f"metric is {self.metric!r}; expected one of {', '.join(METRICS)}")
        check_range("seed", self.seed, 0, 2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(_Labelled):
    """Fine-tuning an encoder to tell labels of texts or pairs of texts apart."""

    model: str  # folder or hub name of a native BERT or ModernBERT encoder
    out: str = "runs/finetune"  # run folder; must not exist
    untrained: bool = False  # the same network with fresh weights: what pretraining is worth
    epochs: int = 3  # passes over train; the best by metric is kept
    batch_size: int = 32  # sequences an optimizer step
    micro_batch_tokens: int = 16_384  # tokens held at once; a larger batch is split, with the same gradient
    max_tokens: int = 256  # longest input, special tokens included; longer ones are cut, longest text first
    dropout: float | None = None  # hidden dropout probability while fine-tuning; None keeps the model's
    pooling: Literal["cls", "mean"] | None = None  # what the head reads: first token, or mean of all; None: the model's
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(name="adamw", lr=1e-4, weight_decay=0.01, betas=(0.9, 0.98))
    )
    schedule: Schedule = field(default_factory=lambda: Schedule(name="linear", warmup=0.1))
    precision: Precision = "auto"
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("epochs", self.epochs, 1)
        check_range("dropout", self.dropout, 0, 0.9)
        check_range("batch_size", self.batch_size, 1)
        check_range("max_tokens", self.max_tokens, 8)
        check_range("micro_batch_tokens", self.micro_batch_tokens, self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class BaselineSettings(_Labelled):
    """TF-IDF of words and word pairs with logistic regression, on the same rows as a fine-tuning run."""

    out: str | None = None  # JSON file for the figures; None prints them only


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """Labels for new texts."""

    model: str  # the final/ folder of a fine-tuning run, or any native sequence classifier
    texts: list[str] = field(default_factory=list)  # texts to label
    file: str | None = None  # .jsonl[.gz], .json, .csv, .tsv or .parquet file of texts to label
    text: str = "text"  # column of the text in file
    text_b: str | None = None  # column of the second text of a pair in file
    out: str | None = None  # JSONL file for the predictions; None prints them
    max_tokens: int | None = None  # longest input; None takes the one that the model was fine-tuned with
    batch_tokens: int = 16_384  # tokens held at once
    precision: Precision = "fp32"  # fp32 gives the same digits everywhere; bf16 is faster
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        if bool(self.texts) == bool(self.file):
            raise InputError("expected either texts or file; set exactly one of them")
        check_range("max_tokens", self.max_tokens, 8)
        check_range("batch_tokens", self.batch_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class FillSettings:
    """The likeliest tokens for each [MASK]."""

    model: str  # folder or hub name of a native BERT or ModernBERT masked language model
    text: str  # a sentence with one [MASK] or several
    top: int = 5  # tokens shown for each [MASK]
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        check_range("top", self.top, 1, 1000)


@dataclass(frozen=True, kw_only=True)
class MinimalPairsSettings:
    """Which of two sentences a masked language model finds more likely, without training."""

    model: str  # folder or hub name of any masked language model
    data: list[str]  # .jsonl[.gz], .csv, .tsv or .parquet files with good and bad, or sentence_good and sentence_bad
    out: str | None = None  # folder for results.json and pairs.jsonl; None prints the table only
    batch_tokens: int = 4096  # tokens held at once
    precision: Precision = "fp32"  # fp32 gives the same digits everywhere; bf16 is faster
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("data is empty; expected files of minimal pairs")
        check_range("batch_tokens", self.batch_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """Vectors of the texts of a file, or search with such vectors, measured."""

    model: str  # folder or hub name of an encoder
    file: str | None = None  # .jsonl[.gz], .json, .csv, .tsv or .parquet file of texts
    text: str = "text"  # column of the text in file
    corpus: str | None = None  # file of documents, id and text; with queries and qrels in place of file
    queries: str | None = None  # file of queries, id and text
    qrels: str | None = None  # file of judgements: query, doc and grade
    gains: dict[str, float] | None = None  # what a grade is worth, others nothing; None: a grade is its own gain
    out: str = ""  # .parquet or .npy file for the vectors; .json file for the scores, which may be left out
    pooling: Literal["cls", "mean"] = "mean"  # what a vector is made of: first token, or mean of all
    normalized: bool = True  # vectors of length 1, whose inner products are cosines
    max_tokens: int | None = None  # longest input; None takes the model's
    batch_tokens: int = 16_384  # tokens held at once
    precision: Precision = "fp32"  # fp32 gives the same digits everywhere; bf16 is faster
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        searched = [self.corpus, self.queries, self.qrels]
        if (self.file is None) != all(searched) or (self.file is not None and any(searched)):
            raise InputError("expected either file, or corpus, queries and qrels; set one of both")
        endings = (".json",) if self.file is None else (".parquet", ".npy")
        if not self.out.endswith(endings) and (self.out or self.file is not None):
            raise InputError(f"out is {self.out!r}; expected a name ending in {' or '.join(endings)}")
        check_range("max_tokens", self.max_tokens, 8)
        check_range("batch_tokens", self.batch_tokens, 1)
