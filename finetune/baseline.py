"""What a network has to beat: TF-IDF of words and word pairs with logistic regression, from scikit-learn.

How strongly it is regularised is chosen by cross-validation on the training rows only. TF-IDF: Spärck Jones 1972.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from encoderkit.finetune.data import LabelledData, Split, load_data
from encoderkit.finetune.settings import BaselineSettings
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.run_folder import replace_file
from encoderkit.pretrain.terminal import plain_console

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)  # candidates for C, the inverse of the regularisation


def tfidf_baseline(
    settings: BaselineSettings, data: LabelledData | None = None, *, console: Console | None = None
) -> dict[str, Any]:
    """Fit on train, measure on validation and test, print; returns split -> metric -> value, and the chosen C.

    data: what load_data(settings.resolve()) gives, where it is read already.
    """
    console = console or plain_console()
    if settings.out and Path(settings.out).exists():
        raise InputError(f"out: {settings.out} exists; choose another --out or remove it")
    task = settings.resolve()
    if task.kind != "classification":
        raise InputError(f"kind is {task.kind}; the baseline is for classification")
    data = data or load_data(task)  # bad rows are told at once
    from encoderkit.finetune.metrics import compute_metrics, metric_names  # evaluate takes seconds to import

    names = metric_names(len(data.label_names), settings.metric, task.metrics)
    model, strength = _fit(data.train, settings.seed)
    scores: dict[str, Any] = {
        name: compute_metrics(names, model.predict(_inputs(split)).tolist(), _labels(split).tolist())
        for name, split in data.splits().items()
    }
    for name, values in scores.items():
        shown = "  ".join(f"{metric} {value:.4f}" for metric, value in values.items())
        console.print(f"TF-IDF with logistic regression, {name}: {shown}")
    result = {"metric": names[0], **scores, "C": strength, "majority_share": data.majority_share()}
    if settings.out:
        Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(settings.out), json.dumps(result, indent=2) + "\n")
    return result


def _fit(train: Split, seed: int) -> tuple[Any, float]:
    """A fitted pipeline, and its C: the best mean accuracy of up to five stratified folds of the training rows."""
    from sklearn.compose import ColumnTransformer
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\b\w+\b")
    columns = range(1 if train.examples[0].text_b is None else 2)
    labels = _labels(train)
    features = ColumnTransformer([(f"text_{i}", vectorizer, i) for i in columns])
    pipeline = make_pipeline(features, LogisticRegression(max_iter=1000))
    folds = min(5, int(np.unique(labels, return_counts=True)[1].min()))
    inputs = _inputs(train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if folds < 2:  # a label with one row cannot be in both parts of a fold
            return pipeline.fit(inputs, labels), 1.0
        search = GridSearchCV(
            pipeline,
            {"logisticregression__C": STRENGTHS},
            cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
            scoring="accuracy",
        )
        search.fit(inputs, labels)
    return search.best_estimator_, float(search.best_params_["logisticregression__C"])


def _inputs(split: Split) -> np.ndarray:
    """(N, 1) texts, or (N, 2) pairs of texts."""
    rows = [[example.text, *([] if example.text_b is None else [example.text_b])] for example in split.examples]
    return np.array(rows, dtype=object)


def _labels(split: Split) -> np.ndarray:
    """(N,) indices."""
    return np.array([example.label for example in split.examples])
