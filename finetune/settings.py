"""Every setting of the fine-tuning commands, typed, with units and ranges. Imports no torch.

Read from YAML with dotted overrides by encoderkit.pretrain.command_line.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from encoderkit.finetune.tasks import Columns, Kind, Task, TaskData, check_columns, check_metric, find_task
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.settings import Schedule, TaskOptimizer, check_range

Precision = Literal["auto", "fp32", "bf16"]
Attention = Literal["auto", "reference", "torch", "xformers", "varlen"]


@dataclass(frozen=True, kw_only=True)
class _Labelled:
    """What training a network and training the baseline have in common."""

    task: str | None = None  # a known task or a .yaml file: its data, columns, labels and metrics
    kind: Kind | None = None  # which head and answer; None: the task's, or classification
    data: TaskData = field(default_factory=TaskData)
    columns: Columns = field(default_factory=Columns)
    metric: str | None = None  # what is compared; None: the task's first, or its kind's first
    seed: int = 0

    def __post_init__(self) -> None:
        if self.metric is not None:
            check_metric(self.metric, self.resolve().kind)
        if self.task is None and not self.data.train and not self.data.hub:
            raise InputError("no data: set task, data.train (files) or data.hub (a hub data set)")
        task = self.resolve()
        check_columns(task.columns, task.kind)
        check_range("seed", self.seed, 0, 2**32 - 1)

    def resolve(self) -> Task:
        """The task with its data and columns replaced by those that are set here."""
        task = find_task(self.task) if self.task else Task()
        kind = self.kind or task.kind
        same = kind == task.kind
        return Task(
            name=task.name,
            kind=kind,
            data=self.data.over(task.data),
            columns=self.columns.over(task.columns) if same else self.columns,
            metrics=task.metrics if same else [],
            protocol=task.protocol,
        )


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering:
    """How long contexts are cut into windows, and how an answer is chosen (Devlin et al. 2019)."""

    stride: int | None = None  # tokens that neighbouring windows share; None: a third of max_tokens
    n_best: int = 20  # likeliest beginnings, and ends, that are combined; as many answers are written
    max_answer_tokens: int = 30
    null_threshold: float = 0.0  # SQuAD 2.0: no answer where its score is ahead by more than this

    def __post_init__(self) -> None:
        check_range("qa.stride", self.stride, 0)
        check_range("qa.n_best", self.n_best, 1, 100)
        check_range("qa.max_answer_tokens", self.max_answer_tokens, 1)


def check_rates(key: str, rates: list[float]) -> None:
    """Raise InputError where a learning rate is none, or there twice."""
    for lr in rates:
        check_range(key, lr, 0, 10)
    if len({f"{lr:g}" for lr in rates}) < len(rates):
        raise InputError(f"{key} is {' '.join(f'{lr:g}' for lr in rates)}; expected each rate once")


def check_windows(max_tokens: int, stride: int | None) -> None:
    """Raise InputError where windows of a context have no room beside a question, or share too much."""
    check_range("max_tokens", max_tokens, 32)
    check_range("qa.stride", stride, 0, max_tokens // 2)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters in the blocks in place of their weights (Hu et al. 2022), by peft; merged at the end."""

    rank: int = 0  # of the adapters; 0 trains all weights
    alpha: int = 16  # their output is scaled by alpha / rank
    dropout: float = 0.0  # probability, on their input

    def __post_init__(self) -> None:
        check_range("lora.rank", self.rank, 0, 1024)
        check_range("lora.dropout", self.dropout, 0, 0.9)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a task model is trained, whatever the task and the seed."""

    epochs: int = 3  # passes over train; the best by metric is kept
    patience: int | None = None  # epochs without a better one after which training stops
    batch_size: int = 32  # examples an optimizer step, over all processes; windows in question answering
    micro_batch_tokens: int = 16_384  # tokens held at once; a larger batch is split, with the same gradient
    max_tokens: int = 256  # longest input, special tokens included; longer ones are cut, longest text first
    dropout: float | None = None  # hidden dropout probability while fine-tuning; None keeps the model's
    pooling: Literal["cls", "mean"] | None = None  # what the head reads: first token, or mean of all; None: the model's
    tag_pieces: Literal["first", "all"] = "first"  # tagging: which pieces of a word learn its tag; the first one tells
    class_weights: Literal["equal", "balanced"] = "equal"  # balanced: labels count by 1 / their frequency in train
    label_smoothing: float = 0.0  # share of the target that is spread over all labels
    layer_decay: float = 1.0  # learning rate of each layer as a share of the one above it
    frozen_layers: int | None = None  # so many first blocks, and the embeddings, keep their weights; 0: embeddings only
    optimizer: TaskOptimizer = field(
        default_factory=lambda: TaskOptimizer(name="adamw", lr=1e-4, weight_decay=0.01, betas=(0.9, 0.98))
    )
    schedule: Schedule = field(default_factory=lambda: Schedule(name="linear", warmup=0.1))
    lora: Lora = field(default_factory=Lora)
    qa: QuestionAnswering = field(default_factory=QuestionAnswering)
    precision: Precision = "auto"
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        check_range("epochs", self.epochs, 1)
        check_range("patience", self.patience, 1)
        check_range("dropout", self.dropout, 0, 0.9)
        check_range("batch_size", self.batch_size, 1)
        check_range("max_tokens", self.max_tokens, 8)
        check_range("micro_batch_tokens", self.micro_batch_tokens, self.max_tokens)
        check_range("label_smoothing", self.label_smoothing, 0, 0.9)
        check_range("layer_decay", self.layer_decay, 0.01, 1)
        check_range("frozen_layers", self.frozen_layers, 0)
        if self.lora.rank and self.frozen_layers is not None:
            raise InputError("lora.rank and frozen_layers are both set; adapters freeze the encoder, leave one out")


_CLASSES: tuple[Kind, ...] = ("classification", "tagging")
_WHOLE: tuple[Kind, ...] = ("classification", "multi_label", "regression", "multiple_choice")
# key -> the value that asks for nothing, the kinds that read it, and what that is for
_ONLY_FOR: dict[str, tuple[Any, tuple[Kind, ...], str]] = {
    "class_weights": ("equal", _CLASSES, "classes"),
    "label_smoothing": (0.0, _CLASSES, "classes"),
    "pooling": (None, _WHOLE, "answers to whole texts"),
    "tag_pieces": ("first", ("tagging",), "tags"),
    "data.iob1": (None, ("tagging",), "tags"),
    "data.unanswerable": (None, ("question_answering",), "questions"),
    **{f"qa.{part.name}": (part.default, ("question_answering",), "questions") for part in fields(QuestionAnswering)},
}


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(_Labelled, TrainingSettings):
    """Fine-tuning an encoder on a task."""

    model: str  # folder or hub name of a BERT, RoBERTa or ModernBERT encoder, or of one of encoderkit's own
    out: str = "runs/finetune"  # run folder; must not exist, or hold a run that resume goes on with
    untrained: bool = False  # the same network with fresh weights: what pretraining is worth
    checkpoints: bool = True  # write the state after every epoch; the last one stays until the run is over
    resume: bool = False  # go on after the last whole epoch of the run in out, with the same settings

    def __post_init__(self) -> None:
        _Labelled.__post_init__(self)
        TrainingSettings.__post_init__(self)
        kind = self.resolve().kind
        for key, (neutral, kinds, what) in _ONLY_FOR.items():
            value = attrgetter(key)(self)
            if value != neutral and kind not in kinds:
                raise InputError(f"{key} is {value}, which is for {what}; leave it out for {kind}")
        if kind == "question_answering":
            check_windows(self.max_tokens, self.qa.stride)


@dataclass(frozen=True, kw_only=True)
class BaselineSettings(_Labelled):
    """TF-IDF of words and word pairs with logistic regression, on the same rows as a fine-tuning run."""

    out: str | None = None  # JSON file for the figures; None prints them only


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """Answers for new rows."""

    model: str  # the final/ folder of a fine-tuning run, or any BERT, RoBERTa or ModernBERT model for a task
    texts: list[str] = field(default_factory=list)  # texts to label; words between spaces for a tagger
    file: str | None = None  # rows without labels: .jsonl, .ndjson, .json, .csv, .tsv (also .gz, .zst) or .parquet
    columns: Columns = field(default_factory=Columns)  # of file
    out: str | None = None  # JSONL file for the predictions; None prints them
    max_tokens: int | None = None  # longest input; None takes the one that the model was fine-tuned with
    batch_tokens: int = 16_384  # tokens held at once
    unanswerable: bool = False  # question answering: no answer is an answer, where qa.null_threshold says so
    qa: QuestionAnswering = field(default_factory=QuestionAnswering)
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

    model: str  # folder or hub name of a masked language model that encoderkit reads
    text: str  # a sentence with one [MASK] or several
    top: int = 5  # tokens shown for each [MASK]
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        check_range("top", self.top, 1, 1000)


@dataclass(frozen=True, kw_only=True)
class MinimalPairsSettings:
    """Which of two sentences a masked language model finds more likely, without training."""

    model: str  # folder or hub name of any masked language model
    data: list[str]  # files as for run, with good and bad, or sentence_good and sentence_bad
    out: str | None = None  # folder for results.json and pairs.jsonl; None prints the table only
    check: int | None = None  # pairs whose scores are compared with transformers', one masked copy at a time; no table
    batch_tokens: int = 4096  # tokens held at once
    precision: Precision = "fp32"  # fp32 gives the same digits everywhere; bf16 is faster
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("data is empty; expected files of minimal pairs")
        check_range("check", self.check, 1)
        if self.check is not None and self.out is not None:
            raise InputError("check is set, and so is out, but a comparison writes nothing; leave one of them out")
        check_range("batch_tokens", self.batch_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """A pretraining run on minimal pairs and tasks, for its report."""

    run: str  # folder of a pretraining run that has ended
    minimal_pairs: str | None = None  # file of minimal pairs, such as BLiMP's; None: none
    suite: str | None = None  # tasks that the model is fine-tuned on: glue, superglue or a .yaml file; None: none
    data: str | None = None  # folder that the files of the suite lie in; None: beside the suite file
    tasks: list[str] = field(default_factory=list)  # of the suite; empty: all
    lrs: list[float] = field(default_factory=list)  # of fine-tuning, to choose from on validation; empty: the suite's
    seeds: int = 3  # of fine-tuning: 0, 1, ...

    def __post_init__(self) -> None:
        check_range("seeds", self.seeds, 1, 100)
        check_rates("lrs", self.lrs)
        if self.minimal_pairs is None and self.suite is None:
            raise InputError("minimal_pairs and suite are both empty; give at least one of them")


@dataclass(frozen=True, kw_only=True)
class SentenceSettings:
    """Training an encoder for vectors of sentences, by sentence-transformers."""

    model: str  # folder or hub name of a BERT, RoBERTa or ModernBERT encoder, or of one of encoderkit's own
    out: str = "runs/sentence"  # run folder; must not exist
    data: TaskData = field(default_factory=TaskData)  # of pairs
    columns: Columns = field(default_factory=Columns)  # text, text_b, and label where pairs have scores
    loss: Literal["contrastive", "cosent", "cosine"] | None = (
        None  # None: contrastive, or cosent where there are scores
    )
    epochs: int = 1  # passes over train; the best on validation is kept
    batch_size: int = 64  # pairs an optimizer step on each device; contrastive: each one's negatives are the others
    lr: float = 1e-4  # peak learning rate, of AdamW
    warmup: float = 0.1  # share of the steps spent rising to the peak
    max_tokens: int = 128  # longest text, special tokens included
    pooling: Literal["cls", "mean"] = "mean"  # what a vector is made of: first token, or mean of all
    seed: int = 0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if not self.data.train and not self.data.hub:
            raise InputError("no data: set data.train (files) or data.hub (a hub data set) of pairs")
        if not (self.columns.text and self.columns.text_b):
            raise InputError("columns.text and columns.text_b name the two texts of a pair; set both")
        if self.columns.label == "":
            raise InputError("columns.label is empty; leave it out for pairs without scores")
        if self.loss is not None and (self.loss != "contrastive") != (self.columns.label is not None):
            raise InputError(
                f"loss is {self.loss} and columns.label is {self.columns.label}; expected contrastive for pairs "
                "without scores, cosent or cosine for pairs with scores"
            )
        check_range("epochs", self.epochs, 1)
        check_range("batch_size", self.batch_size, 2)
        check_range("lr", self.lr, 0, 10)
        check_range("warmup", self.warmup, 0, 0.99)
        check_range("max_tokens", self.max_tokens, 8)
        check_range("seed", self.seed, 0, 2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """Vectors of the texts of a file, or search with such vectors, measured."""

    model: str  # folder or hub name of an encoder
    file: str | None = None  # .jsonl, .ndjson, .json, .csv, .tsv (also .gz, .zst) or .parquet file of texts
    text: str = "text"  # column of the text in file
    corpus: str | None = None  # file of documents: id, text, perhaps title; with queries and qrels in place of file
    queries: str | None = None  # file of queries, id and text
    qrels: str | None = None  # file of judgements: query, doc and grade
    gains: dict[str, float] | None = None  # what a grade is worth, others nothing; None: a grade is its own gain
    out: str | None = None  # .parquet or .npy file for the vectors; .json file for the scores, which may be left out
    pooling: Literal["cls", "mean"] | None = None  # first token, or mean of all; None: the folder's own, else mean
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
        if not (self.out or "").endswith(endings) and (self.out is not None or self.file is not None):
            raise InputError(f"out is {self.out or 'empty'}; expected a name ending in {' or '.join(endings)}")
        check_range("max_tokens", self.max_tokens, 8)
        check_range("batch_tokens", self.batch_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class SuiteSettings:
    """Tasks by learning rates by seeds."""

    model: str  # folder or hub name of a BERT, RoBERTa or ModernBERT encoder, or of one of encoderkit's own
    suite: str = "glue"  # glue, superglue, or a .yaml file (encoderkit.finetune.suite_file)
    out: str = "runs/suite"  # folder of the suite; what is done in it is not done again
    data: str | None = None  # folder that the files of the suite lie in; None: beside the suite file
    tasks: list[str] = field(default_factory=list)  # of the suite; empty: all
    seeds: int = 5  # how many: 0, 1 and so on; of order, dropout and fresh weights
    lrs: list[float] = field(default_factory=list)  # learning rates to choose from on validation; empty: the suite's
    search_seeds: int | None = None  # seeds that try every rate, the others the best one only; None: all
    untrained: bool = False  # the same network with fresh weights
    against: str | None = None  # folder of another suite that is over, to compare with, seed by seed
    set: dict[str, str | None] = field(default_factory=dict)  # settings of run for every task: --set.epochs 1
    jobs: int | None = None  # runs at once; None: one on each GPU, or one

    def __post_init__(self) -> None:
        check_range("seeds", self.seeds, 1, 100)
        check_range("search_seeds", self.search_seeds, 1)
        check_range("jobs", self.jobs, 1, 64)
        check_rates("lrs", self.lrs)
        if self.against is not None and Path(self.against) == Path(self.out):
            raise InputError(f"against is {self.against}, and so is out; compare with another suite")

    @property
    def num_search_seeds(self) -> int:
        """How many seeds try every rate."""
        return min(self.search_seeds or self.seeds, self.seeds)


@dataclass(frozen=True, kw_only=True)
class AblateSettings:
    """Variants of a pretraining recipe by seeds."""

    recipe: str  # settings of encoderkit-pretrain run that all variants share, a .yaml file
    variants: dict[str, str | None] = field(default_factory=dict)  # what each changes: {nsp: {pairs: nsp}} in the file
    base: str = "base"  # what the recipe as it is is called: all others are compared with it
    set: dict[str, str | None] = field(default_factory=dict)  # over the recipe, for all: --set.budget.minutes 5
    seeds: int = 3  # of pretraining: 0, 1, ...
    suite: str | None = None  # tasks that each model is fine-tuned on: glue, superglue or a .yaml file; None: none
    data: str | None = None  # folder that the files of the suite lie in; None: beside the suite file
    tasks: list[str] = field(default_factory=list)  # of the suite; empty: all
    lrs: list[float] = field(default_factory=list)  # of fine-tuning, to choose from on validation; empty: the suite's
    out: str = "runs/ablation"  # folder of the ablation; what is done in it is not done again
    job: int | None = None  # only the variant and seed of this number, from 0, as job arrays count; None: all

    def __post_init__(self) -> None:
        check_range("seeds", self.seeds, 1, 100)
        check_range("job", self.job, 0)
        check_rates("lrs", self.lrs)
        if not self.variants:
            raise InputError("variants is empty; expected settings that the recipe is tried with, {nsp: {pairs: nsp}}")
