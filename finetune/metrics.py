"""Metrics as evaluate.Metric classes that live here and need no hub; the values come from scikit-learn.

Importing evaluate takes seconds: import this module where figures are computed, not where settings are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import sklearn.metrics

from encoderkit.finetune.tasks import METRICS
from encoderkit.kernels.errors import InputError


class _LabelMetric(evaluate.Metric):
    """A metric over integer labels. compute(predictions=..., references=...) -> {name: value}."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions, references: lists of integer labels of one length",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )


class Accuracy(_LabelMetric):
    """Share of the predictions that are right."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(sklearn.metrics.accuracy_score(references, predictions))}


class F1(_LabelMetric):
    """Harmonic mean of precision and recall of label 1; 0 where nothing is predicted or present."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {
            "f1": float(sklearn.metrics.f1_score(references, predictions, labels=[1], average=None, zero_division=0)[0])
        }


class MacroF1(_LabelMetric):
    """Mean over the labels that occur, in references or predictions, of each label's F1."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"f1_macro": float(sklearn.metrics.f1_score(references, predictions, average="macro", zero_division=0))}


class Matthews(_LabelMetric):
    """Matthews correlation (Gorodkin 2004 for several labels): 1 all right, 0 as good as a constant answer."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"matthews": float(sklearn.metrics.matthews_corrcoef(references, predictions))}


_CLASSES = {"accuracy": Accuracy, "f1": F1, "f1_macro": MacroF1, "matthews": Matthews}
assert tuple(_CLASSES) == METRICS


def metric_names(num_labels: int, first: str | None, task_metrics: Sequence[str] = ()) -> list[str]:
    """What is reported: first (it chooses the best epoch), then the task's, then all that fit the number of labels.

    f1 is the F1 of label 1, so it needs exactly two labels.
    """
    if first == "f1" and num_labels != 2:
        raise InputError(f"metric f1 needs two labels, and the data has {num_labels}; use f1_macro")
    fitting = [name for name in METRICS if name != "f1" or num_labels == 2]
    return list(dict.fromkeys([*([first] if first else []), *task_metrics, *fitting]))


def compute_metrics(names: Sequence[str], predictions: list[int], references: list[int]) -> dict[str, float]:
    """The metrics of these names: name -> value."""
    combined = evaluate.combine([_CLASSES[name](keep_in_memory=True) for name in names])
    return combined.compute(predictions=predictions, references=references)
