"""Metrics as evaluate.Metric classes that live here and need no hub; values from scikit-learn, scipy and seqeval.

Importing evaluate takes seconds: import this module where figures are computed, not where settings are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
import sklearn.metrics
from datasets import Features, Value

from encoderkit.finetune import squad
from encoderkit.finetune.iob import is_iob
from encoderkit.finetune.retrieval import average_precision, ndcg
from encoderkit.finetune.tasks import METRICS, Kind, check_metric
from encoderkit.kernels.errors import InputError


class _Metric(evaluate.Metric):
    """A metric whose docstring describes it. types: of predictions and of references."""

    types: ClassVar[tuple[Any, Any]]

    def _info(self) -> evaluate.MetricInfo:
        predictions, references = self._types()
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions, references: lists of one length",
            features=Features({"predictions": predictions, "references": references}),
        )

    def _types(self) -> tuple[Any, Any]:
        return self.types


class _LabelMetric(_Metric):
    """A metric over integer labels; with config_name multilabel over rows of 0 and 1, one number a label."""

    def _types(self) -> tuple[Any, Any]:
        one = datasets.List(Value("int64")) if self.config_name == "multilabel" else Value("int64")
        return one, one


class Accuracy(_LabelMetric):
    """Share of the predictions that are right; of several labels a row, all of them."""

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        return {"accuracy": float(sklearn.metrics.accuracy_score(np.asarray(references), np.asarray(predictions)))}


class F1(_LabelMetric):
    """Harmonic mean of precision and recall of label 1; 0 where nothing is predicted or present."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {
            "f1": float(sklearn.metrics.f1_score(references, predictions, labels=[1], average=None, zero_division=0)[0])
        }


class MacroF1(_LabelMetric):
    """Mean over the labels of each label's F1; without config multilabel over those that occur on either side."""

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        return {"f1_macro": _average_f1("macro", predictions, references)}


class MicroF1(_LabelMetric):
    """F1 of all labels' hits, false alarms and misses together; accuracy where each row has one label."""

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        return {"f1_micro": _average_f1("micro", predictions, references)}


class Matthews(_LabelMetric):
    """Matthews correlation (Gorodkin 2004 for several labels): 1 all right, 0 as good as a constant answer."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"matthews": float(sklearn.metrics.matthews_corrcoef(references, predictions))}


class Pearson(_Metric):
    """Linear correlation; 0 where one side is constant."""

    types = (Value("float64"), Value("float64"))

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        from scipy.stats import pearsonr

        return {"pearson": _correlation(pearsonr, predictions, references)}


class Spearman(_Metric):
    """Correlation of ranks; 0 where one side is constant."""

    types = (Value("float64"), Value("float64"))

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        from scipy.stats import spearmanr

        return {"spearman": _correlation(spearmanr, predictions, references)}


class TagAccuracy(_Metric):
    """Share of the words whose tag is right."""

    types = (datasets.List(Value("string")), datasets.List(Value("string")))

    def _compute(self, predictions: Sequence[list[str]], references: Sequence[list[str]]) -> dict[str, float]:
        flat = [[tag for row in rows for tag in row] for rows in (references, predictions)]
        return {"accuracy": float(sklearn.metrics.accuracy_score(*flat))}


class ChunkF1(_Metric):
    """F1 of whole chunks, strict IOB2: a chunk that begins with I- is none. By seqeval (Nakayama 2018)."""

    types = (datasets.List(Value("string")), datasets.List(Value("string")))

    def _compute(self, predictions: Sequence[list[str]], references: Sequence[list[str]]) -> dict[str, float]:
        from seqeval.metrics import f1_score
        from seqeval.scheme import IOB2

        return {"seqeval_f1": float(f1_score(references, predictions, mode="strict", scheme=IOB2, zero_division=0))}


class Squad(_Metric):
    """exact_match and squad_f1 of SQuAD 1.1; predictions: id and prediction_text, references: id and answers."""

    types = (
        {"id": Value("string"), "prediction_text": Value("string")},
        {"id": Value("string"), "answers": datasets.List(Value("string"))},
    )

    def _compute(self, predictions: Sequence[dict], references: Sequence[dict]) -> dict[str, float]:
        golds = {row["id"]: row["answers"] for row in references}
        return squad.squad_scores({row["id"]: row["prediction_text"] for row in predictions}, golds)


class Squad2(_Metric):
    """The scores of SQuAD 2.0; predictions also have no_answer, above the threshold of which the answer is empty."""

    types = (
        {"id": Value("string"), "prediction_text": Value("string"), "no_answer": Value("float64")},
        {"id": Value("string"), "answers": datasets.List(Value("string"))},
    )

    def _compute(
        self, predictions: Sequence[dict], references: Sequence[dict], threshold: float = 1.0
    ) -> dict[str, float]:
        return squad.squad2_scores(
            {row["id"]: row["prediction_text"] for row in predictions},
            {row["id"]: row["answers"] for row in references},
            {row["id"]: row["no_answer"] for row in predictions},
            threshold,
        )


class _RankingMetric(_Metric):
    """A mean over queries: predictions are scores of the documents, references their gains; a list a query.

    Gains above 0 are relevant, queries without any do not count; of equal scores the first document is ranked first.
    """

    types = (datasets.List(Value("float64")), datasets.List(Value("float64")))

    def _mean(self, one: Callable[[list[int], dict[int, float]], float], predictions: Any, references: Any) -> float:
        relevant = [{i: gain for i, gain in enumerate(gains) if gain > 0} for gains in references]
        ranked = [np.argsort(-np.asarray(scores), kind="stable").tolist() for scores in predictions]
        values = [one(*pair) for pair in zip(ranked, relevant) if pair[1]]
        if not values:
            raise InputError("no query has a relevant document; expected gains above 0")
        return float(np.mean(values))


class NDCG10(_RankingMetric):
    """Normalised discounted cumulative gain of the ten best ranked (Järvelin and Kekäläinen 2002), mean over queries.

    predictions: scores of the documents, references: their gains, 0 where not relevant; a list a query.
    """

    def _compute(self, predictions: Sequence[list[float]], references: Sequence[list[float]]) -> dict[str, float]:
        return {"ndcg@10": self._mean(lambda ranked, gains: ndcg(ranked, gains, 10), predictions, references)}


class MAP(_RankingMetric):
    """Mean average precision over queries: predictions and references as for nDCG; gains above 0 are relevant."""

    def _compute(self, predictions: Sequence[list[float]], references: Sequence[list[float]]) -> dict[str, float]:
        return {"map": self._mean(average_precision, predictions, references)}


_LABELS: dict[str, type[_Metric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "f1_macro": MacroF1,
    "f1_micro": MicroF1,
    "matthews": Matthews,
    "pearson": Pearson,
    "spearman": Spearman,
}
_TAGS: dict[str, type[_Metric]] = {"seqeval_f1": ChunkF1, "accuracy": TagAccuracy}


def metric_names(
    num_labels: int, first: str | None, task_metrics: Sequence[str] = (), kind: Kind = "classification"
) -> list[str]:
    """What is reported: first (it chooses the best epoch), then the task's, then all that fit the kind and its labels.

    f1 is the F1 of label 1, so it needs exactly two labels.
    """
    if first is not None:
        check_metric(first, kind)
    names = list(dict.fromkeys([*([first] if first else []), *task_metrics, *METRICS[kind]]))
    if names[0] == "f1" and num_labels != 2:
        raise InputError(f"metric f1 needs two labels, and the data has {num_labels}; use --metric f1_macro")
    return [name for name in names if name != "f1" or num_labels == 2]


def tag_metric_names(labels: Sequence[str], first: str | None, task_metrics: Sequence[str] = ()) -> list[str]:
    """metric_names for tags: chunks are counted only where tags have B- and I-."""
    names = metric_names(len(labels), first, task_metrics, "tagging")
    if is_iob(labels):
        return names
    if "seqeval_f1" in (first, *task_metrics):
        raise InputError("metric seqeval_f1 needs tags with B- and I-, and the data has none; use accuracy")
    return [name for name in names if name != "seqeval_f1"]


def compute_metrics(
    names: Sequence[str], predictions: Sequence[Any], references: Sequence[Any], kind: Kind = "classification"
) -> dict[str, float]:
    """The metrics of these names: name -> value. multi_label: rows of 0 and 1; tagging: lists of tags."""
    classes = _TAGS if kind == "tagging" else _LABELS
    config = "multilabel" if kind == "multi_label" else "default"
    made = [classes[name](config_name=config, keep_in_memory=True) for name in names]
    return evaluate.combine(made).compute(predictions=list(predictions), references=list(references))


def _average_f1(average: str, predictions: Sequence[Any], references: Sequence[Any]) -> float:
    arrays = np.asarray(references), np.asarray(predictions)
    return float(sklearn.metrics.f1_score(*arrays, average=average, zero_division=0))


def _correlation(correlate: Any, predictions: Sequence[float], references: Sequence[float]) -> float:
    constant = min(len(set(predictions)), len(set(references))) < 2
    return 0.0 if constant else float(correlate(predictions, references)[0])
