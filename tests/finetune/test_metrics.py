"""Metrics against values worked out by hand."""

import math

import pytest

from encoderkit.finetune.metrics import F1, Accuracy, MacroF1, Matthews, compute_metrics, metric_names
from encoderkit.kernels.errors import InputError

# Label 1: 3 hits, 1 false alarm, 2 misses; label 0: 4 hits.
REFERENCES = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
PREDICTIONS = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]


def test_binary_values_by_hand():
    values = compute_metrics(["accuracy", "f1", "f1_macro", "matthews"], PREDICTIONS, REFERENCES)
    assert values["accuracy"] == pytest.approx(7 / 10)
    assert values["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert values["f1_macro"] == pytest.approx((2 / 3 + 2 * 4 / (2 * 4 + 2 + 1)) / 2)
    assert values["matthews"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))


def test_several_labels_by_hand():
    references, predictions = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]
    values = compute_metrics(["f1_macro", "matthews"], predictions, references)
    assert values["f1_macro"] == pytest.approx((2 / 4 + 4 / 5 + 2 / 3) / 3)
    # Gorodkin: (c s - sum p t) / sqrt((s^2 - sum p^2) (s^2 - sum t^2)), c right, s all, p and t counts by label
    assert values["matthews"] == pytest.approx((4 * 6 - (4 + 6 + 2)) / math.sqrt((36 - 14) * (36 - 12)))


def test_constant_answers_give_zero_and_no_warning(recwarn):
    assert F1(keep_in_memory=True).compute(predictions=[0, 0], references=[0, 1]) == {"f1": 0.0}
    assert Matthews(keep_in_memory=True).compute(predictions=[0, 0], references=[0, 1]) == {"matthews": 0.0}
    assert MacroF1(keep_in_memory=True).compute(predictions=[0, 0], references=[0, 0]) == {"f1_macro": 1.0}
    assert Accuracy(keep_in_memory=True).compute(predictions=[0, 0], references=[0, 1]) == {"accuracy": 0.5}
    assert not [w for w in recwarn if "sklearn" in str(w.filename)]


def test_f1_is_for_two_labels_and_the_chosen_metric_comes_first():
    assert metric_names(2, "f1") == ["f1", "accuracy", "f1_macro", "matthews"]
    assert metric_names(3, None) == ["accuracy", "f1_macro", "matthews"]
    assert metric_names(2, None, ("matthews",))[0] == "matthews"
    with pytest.raises(InputError, match="f1 needs two labels"):
        metric_names(3, "f1")
