"""Known tasks by name, with their hub data sets and how published scores are measured. Imports no torch.

GLUE: Wang et al. 2019 (arXiv:1804.07461); SuperGLUE: Wang et al. 2019 (arXiv:1905.00537), without ReCoRD, whose answers
are neither spans nor choices of fixed texts; SQuAD: Rajpurkar et al. 2016 and 2018; CoNLL-2003: Tjong Kim Sang and De
Meulder 2003; WNUT-17: Derczynski et al. 2017; UD English EWT: Silveira et al. 2014; SWAG: Zellers et al. 2018; AG News:
Zhang et al. 2015; TREC: Li and Roth 2002; IMDB: Maas et al. 2011.
"""

from __future__ import annotations

from encoderkit.finetune.tasks import Columns, Kind, Task, TaskData

PARQUET = "refs/convert/parquet"  # the hub's own conversion, where the repository holds a loading script

_GLUE = "dev set; rates 2e-5 to 5e-5, batch 16 or 32, 3 epochs (Devlin et al. 2019), or median of 5 seeds (RoBERTa)"
_MNLI_START = f"{_GLUE}; started from the MNLI model it is another protocol, told apart"
_SUPERGLUE = "dev set, best of a few rates, single runs in the paper; median of 5 seeds here"
_TEST = "test set, once, with the epoch that is best on a tenth held out of train"
_TAGS = "test set, entity F1 strict in IOB2, mean of 5 seeds"


def _glue(name: str, a: str, b: str | None, labels: list[str] | None, metrics: list[str], **changes) -> Task:
    kind: Kind = "classification" if labels else "regression"
    configuration = changes.pop("configuration", name)
    protocol = changes.pop("protocol", _GLUE)
    splits = {"validation_split": "validation", **changes}
    data = TaskData(hub=f"nyu-mll/glue:{configuration}", labels=labels, **splits)
    return Task(
        name=name,
        kind=kind,
        data=data,
        columns=Columns(text=a, text_b=b, label="label"),
        metrics=metrics,
        protocol=protocol,
    )


def _superglue(name: str, configuration: str, columns: Columns, labels: list[str], metrics: list[str]) -> Task:
    hub = f"aps/super_glue:{configuration}"
    return Task(
        name=name,
        data=TaskData(hub=hub, labels=labels, validation_split="validation"),
        columns=columns,
        metrics=metrics,
        protocol=_SUPERGLUE,
    )


def _texts(name: str, hub: str, labels: list[str], metrics: list[str], label: str = "label") -> Task:
    return Task(
        name=name,
        data=TaskData(hub=hub, labels=labels, test_split="test"),
        columns=Columns(label=label),
        metrics=metrics,
        protocol=_TEST,
    )


def _tags(name: str, hub: str, label: str, metrics: list[str], protocol: str) -> Task:
    return Task(
        name=name,
        kind="tagging",
        data=TaskData(hub=hub, validation_split="validation", test_split="test"),
        columns=Columns(label=label),
        metrics=metrics,
        protocol=protocol,
    )


_ENTAILMENT = ["entailment", "not_entailment"]
_THREE_WAY = ["entailment", "neutral", "contradiction"]
_SQUAD = "dev set, EM and F1 of the official script; 384 tokens, stride 128, rate 3e-5, 2 epochs (Devlin et al. 2019)"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", "sentence", None, ["unacceptable", "acceptable"], ["matthews", "accuracy"]),
        _glue("sst2", "sentence", None, ["negative", "positive"], ["accuracy"]),
        _glue(
            "mrpc",
            "sentence1",
            "sentence2",
            ["not_equivalent", "equivalent"],
            ["f1", "accuracy"],
            protocol=_MNLI_START,
        ),
        _glue("qqp", "question1", "question2", ["not_duplicate", "duplicate"], ["f1", "accuracy"]),
        _glue("stsb", "sentence1", "sentence2", None, ["pearson", "spearman"], protocol=_MNLI_START),
        _glue("mnli", "premise", "hypothesis", _THREE_WAY, ["accuracy"], validation_split="validation_matched"),
        _glue(
            "mnli-mismatched",
            "premise",
            "hypothesis",
            _THREE_WAY,
            ["accuracy"],
            validation_split="validation_mismatched",
            configuration="mnli",
        ),
        _glue("qnli", "question", "sentence", _ENTAILMENT, ["accuracy"]),
        _glue("rte", "sentence1", "sentence2", _ENTAILMENT, ["accuracy"], protocol=_MNLI_START),
        _glue("wnli", "sentence1", "sentence2", _ENTAILMENT[::-1], ["accuracy"]),
        _superglue("boolq", "boolq", Columns(text="question", text_b="passage"), ["no", "yes"], ["accuracy"]),
        _superglue(
            "cb",
            "cb",
            Columns(text="premise", text_b="hypothesis"),
            ["entailment", "contradiction", "neutral"],
            ["f1_macro", "accuracy"],
        ),
        Task(
            name="copa",
            kind="multiple_choice",
            data=TaskData(hub="aps/super_glue:copa", validation_split="validation"),
            columns=Columns(text="premise", text_b="question", choices=["choice1", "choice2"]),
            protocol=_SUPERGLUE,
        ),
        _superglue(
            "multirc", "multirc", Columns(text="paragraph", text_b="{question} {answer}"), ["wrong", "right"], ["f1"]
        ),
        _superglue("superglue-rte", "rte", Columns(text="premise", text_b="hypothesis"), _ENTAILMENT, ["accuracy"]),
        _superglue(
            "wic", "wic", Columns(text="{word}: {sentence1}", text_b="{sentence2}"), ["other", "same"], ["accuracy"]
        ),
        _superglue(
            "wsc", "wsc.fixed", Columns(text="text", text_b="{span2_text}: {span1_text}"), ["no", "yes"], ["accuracy"]
        ),
        Task(
            name="squad",
            kind="question_answering",
            data=TaskData(hub="rajpurkar/squad", validation_split="validation"),
            protocol=_SQUAD,
        ),
        Task(
            name="squad2",
            kind="question_answering",
            data=TaskData(hub="rajpurkar/squad_v2", validation_split="validation", unanswerable=True),
            protocol=f"{_SQUAD}; best thresholds are told apart",
        ),
        _tags("conll2003", f"eriktks/conll2003:conll2003@{PARQUET}", "ner_tags", ["seqeval_f1"], _TAGS),
        _tags("wnut17", f"leondz/wnut_17:wnut_17@{PARQUET}", "ner_tags", ["seqeval_f1"], _TAGS),
        _tags(
            "ud_ewt",
            f"universal-dependencies/universal_dependencies:en_ewt@{PARQUET}",
            "upos",
            ["accuracy"],
            "test set, accuracy over words, gold tokens",
        ),
        Task(
            name="swag",
            kind="multiple_choice",
            data=TaskData(hub="allenai/swag:regular", validation_split="validation"),
            columns=Columns(text="sent1", text_b="sent2", choices=["ending0", "ending1", "ending2", "ending3"]),
            protocol="dev set, accuracy; rate 2e-5, batch 16, 3 epochs (Devlin et al. 2019)",
        ),
        _texts("agnews", "fancyzhx/ag_news", ["World", "Sports", "Business", "Sci/Tech"], ["accuracy", "f1_macro"]),
        _texts(
            "trec",
            f"CogComp/trec@{PARQUET}",
            ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"],
            ["accuracy", "f1_macro"],
            "coarse_label",
        ),
        _texts("imdb", "stanfordnlp/imdb", ["neg", "pos"], ["accuracy"]),
    )
}

SUITES: dict[str, tuple[str, ...]] = {
    "glue": ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"),
    "superglue": ("boolq", "cb", "copa", "multirc", "superglue-rte", "wic", "wsc"),
}
