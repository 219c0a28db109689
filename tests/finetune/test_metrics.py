"""Metrics against values worked out by hand, scikit-learn, scipy, and the examples of seqeval."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from encoderkit.finetune.metrics import (
    F1,
    MAP,
    NDCG10,
    Accuracy,
    ChunkF1,
    MacroF1,
    Matthews,
    Squad,
    Squad2,
    compute_metrics,
    metric_names,
    tag_metric_names,
)
from encoderkit.finetune.squad import normalize_answer, squad2_scores
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
    with pytest.raises(InputError, match="f1 needs two labels, and the data has 3; use --metric f1_macro"):
        metric_names(3, None, ("f1", "accuracy"))
    assert metric_names(3, "f1_macro", ("f1", "accuracy")) == ["f1_macro", "accuracy", "matthews"]


def test_correlations_equal_scipy():
    generator = np.random.default_rng(0)
    references = generator.integers(0, 6, 50) / 2.0  # with ties
    predictions = references + generator.normal(size=50)
    values = compute_metrics(["pearson", "spearman"], predictions.tolist(), references.tolist(), "regression")
    assert values["pearson"] == pytest.approx(scipy.stats.pearsonr(predictions, references)[0], abs=1e-12)
    assert values["spearman"] == pytest.approx(scipy.stats.spearmanr(predictions, references)[0], abs=1e-12)
    constant = compute_metrics(["pearson", "spearman"], [2.0] * 50, references.tolist(), "regression")
    assert constant == {"pearson": 0.0, "spearman": 0.0}


def test_several_labels_a_row_equal_scikit_learn():
    references, predictions = np.random.default_rng(1).integers(0, 2, (2, 40, 4))
    names = ["f1_micro", "f1_macro", "accuracy"]
    values = compute_metrics(names, predictions.tolist(), references.tolist(), "multi_label")
    assert values["f1_micro"] == pytest.approx(sklearn.metrics.f1_score(references, predictions, average="micro"))
    assert values["f1_macro"] == pytest.approx(sklearn.metrics.f1_score(references, predictions, average="macro"))
    assert values["accuracy"] == pytest.approx((references == predictions).all(1).mean())


def test_chunks_as_in_seqeval_s_examples():
    references = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    predictions = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    values = compute_metrics(["seqeval_f1", "accuracy"], predictions, references, "tagging")
    assert values == {"seqeval_f1": pytest.approx(0.5), "accuracy": pytest.approx(0.8)}  # its README
    strict = ChunkF1(keep_in_memory=True).compute(
        predictions=[["I-NP", "I-NP", "O"]], references=[["B-NP", "I-NP", "O"]]
    )
    assert strict == {"seqeval_f1": 0.0}  # 1 without mode="strict", as its README shows
    assert ChunkF1(keep_in_memory=True).compute(predictions=[["O"]], references=[["B-x"]]) == {"seqeval_f1": 0.0}


def test_chunk_f1_is_for_chunk_tags():
    assert tag_metric_names(["O", "B-x", "I-x"], None) == ["seqeval_f1", "accuracy"]
    assert tag_metric_names(["NOUN", "VERB"], None) == ["accuracy"]
    with pytest.raises(InputError, match="needs tags with B- and I-"):
        tag_metric_names(["NOUN", "VERB"], "seqeval_f1")


@pytest.mark.parametrize(
    ("answer", "golds", "exact", "f1"),
    [
        ("The  Eiffel-Tower!", ["eiffeltower"], 1, 1),  # articles, case, spaces and punctuation do not count
        ("an apple a day", ["Apple day"], 1, 1),
        ("theatre", ["the atre"], 0, 0),  # only whole words are articles
        ("red cat", ["the cat", "a red cat"], 1, 1),  # the best of several answers
        ("big red cat", ["cat", "red cat sat"], 0, 2 * (2 / 3) * (2 / 3) / (4 / 3)),
        ("cat cat", ["cat"], 0, 2 / 3),  # a word counts as often as both have it
        ("dog", ["cat"], 0, 0),
        ("the", ["a"], 1, 0),  # nothing is left of either: evaluate-v1.1.py finds no common word
    ],
)
def test_squad_1_as_the_official_script_defines_it(answer, golds, exact, f1):
    predictions = [{"id": "q", "prediction_text": answer}]
    values = Squad(keep_in_memory=True).compute(predictions=predictions, references=[{"id": "q", "answers": golds}])
    assert values == {"squad_f1": pytest.approx(f1), "exact_match": exact}


def test_normalisation_keeps_what_is_no_ascii_punctuation():
    assert normalize_answer("A “Café”, the 3.5 %") == "“café” 35"


def test_squad_2_with_and_without_answers():
    golds = {"a": ["red cat"], "b": ["dog"], "n": [], "m": [], "e": ["the"]}
    answers = {"a": "cat", "b": "dog", "n": "bird", "m": "bird", "e": ""}
    no_answer = {"a": -2.0, "b": 1.0, "n": 3.0, "m": -1.0, "e": -3.0}
    values = squad2_scores(answers, golds, no_answer, threshold=0.0)
    # a: 0 and 2/3; b: dropped, though right; n: dropped, right; m: not dropped, wrong; e: "the" is nothing, as ""
    assert values["exact_match"] == pytest.approx(2 / 5)
    assert values["squad_f1"] == pytest.approx((2 / 3 + 2) / 5)
    assert values["has_answer_exact_match"] == pytest.approx(1 / 3)
    assert values["no_answer_exact_match"] == pytest.approx(1 / 2)
    # From all dropped (n, m right): e +1, a +0, m -1, b +1, n -1; the first of the best stands
    assert (values["best_exact_match"], values["best_exact_match_threshold"]) == (pytest.approx(3 / 5), -3.0)
    # e +1, a +2/3, m -1, b +1: 3.667, over 2 + 5/3 by nothing
    assert values["best_squad_f1"] == pytest.approx((2 + 1 + 2 / 3) / 5)
    assert values["best_squad_f1_threshold"] == -2.0
    rows = [{"id": id, "prediction_text": answers[id], "no_answer": no_answer[id]} for id in golds]
    references = [{"id": id, "answers": texts} for id, texts in golds.items()]
    assert Squad2(keep_in_memory=True).compute(predictions=rows, references=references, threshold=0.0) == values


def test_ranking_equals_scikit_learn():
    generator = np.random.default_rng(2)
    gains, scores = generator.integers(0, 4, (6, 30)), generator.normal(size=(6, 30))
    gains[3] = 0  # a query without relevant documents does not count
    counted = gains.any(1)
    arguments = {"predictions": scores.tolist(), "references": gains.astype(float).tolist()}
    expected = sklearn.metrics.ndcg_score(gains[counted], scores[counted], k=10)
    assert NDCG10(keep_in_memory=True).compute(**arguments)["ndcg@10"] == pytest.approx(expected)
    by_hand = []
    for relevant, row in zip(gains[counted] > 0, scores[counted]):
        ranked = relevant[np.argsort(-row)]
        by_hand.append(np.mean([ranked[: i + 1].mean() for i in np.flatnonzero(ranked)]))
    assert MAP(keep_in_memory=True).compute(**arguments)["map"] == pytest.approx(np.mean(by_hand))
    with pytest.raises(InputError, match="no query has a relevant document"):
        MAP(keep_in_memory=True).compute(predictions=[[1.0, 2.0]], references=[[0.0, 0.0]])
