"""SQuAD: the official JSON of versions 1.1 and 2.0, and its scores as the official scripts define them.

Rajpurkar et al. 2016 (arXiv:1606.05250) and 2018 (arXiv:1806.03822); evaluate-v1.1.py and evaluate-v2.0.py. Imports no
torch. Scores are shares, a hundredth of the scripts' figures.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from encoderkit.finetune.tables import Table, read_file
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.corpus_files import CorpusFile, read_whole

COLUMNS = ("question", "context", "answers", "id")


def read_squad_or_file(path: str, wanted: list[str]) -> Table:
    """Questions of an official SQuAD file, .json, .json.gz or .json.zst, or of a table with the wanted columns.

    Raises InputError naming the file, and the question where one is not as it should be.
    """
    file = CorpusFile(path, Path(path).name)
    if file.kind != ".json" or not Path(path).is_file():
        return read_file(path, wanted)
    text = read_whole(file, "{")
    try:
        content = json.loads(text or "null")
    except (ValueError, RecursionError):
        content = None  # perhaps one object a line
    if not (isinstance(content, dict) and isinstance(content.get("data"), list)):
        return read_file(path, wanted)
    table = _official(path, content["data"], answered="answers" in wanted)
    for name in wanted:
        if name not in table.columns:
            raise InputError(f"{path}: no column {name}; an official SQuAD file has {', '.join(table.columns)}")
    return table


def _official(path: str, articles: list[Any], *, answered: bool) -> Table:
    """answered: whether answers are wanted; a test set has none."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS if answered or name != "answers"}
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    columns["question"].append(question["question"])
                    columns["context"].append(paragraph["context"])
                    if answered:
                        columns["answers"].append([] if question.get("is_impossible") else question["answers"])
                    columns["id"].append(question["id"])
    except (KeyError, TypeError) as error:
        where = f"question {len(columns['id']) + 1}"
        raise InputError(
            f"{path}: {where} is not as in SQuAD's JSON ({error}); expected data, paragraphs, qas"
        ) from error
    if not columns["id"]:
        raise InputError(f"{path}: 0 questions; expected at least one")
    return Table(path, columns, list(range(1, len(columns["id"]) + 1)))


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces.

    >>> normalize_answer("The  Eiffel-Tower!")
    'eiffeltower'
    """
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(gold: str, answer: str) -> float:
    """1 where both are the same, normalised."""
    return float(normalize_answer(gold) == normalize_answer(answer))


def f1(gold: str, answer: str) -> float:
    """Harmonic mean of precision and recall of words, normalised: of version 1.1, where two empty texts have 0."""
    gold_words, words = normalize_answer(gold).split(), normalize_answer(answer).split()
    same = sum((Counter(gold_words) & Counter(words)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(words), same / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def f1_or_both_empty(gold: str, answer: str) -> float:
    """f1 of version 2.0, where two empty texts have 1."""
    return 1.0 if normalize_answer(gold) == normalize_answer(answer) == "" else f1(gold, answer)


def squad_scores(answers: Mapping[str, str], golds: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """exact_match and squad_f1 of version 1.1: the best over several right answers, its mean over the questions.

    answers, golds: id -> text, and id -> right texts; an id without an answer counts as wrong.
    """
    return {
        "squad_f1": _mean(_best(f1, golds, answers)),
        "exact_match": _mean(_best(exact, golds, answers)),
    }


def squad2_scores(
    answers: Mapping[str, str],
    golds: Mapping[str, Sequence[str]],
    no_answer: Mapping[str, float],
    threshold: float = 1.0,
) -> dict[str, float]:
    """Version 2.0: also over the questions with and without answer, and at the best threshold of no_answer.

    no_answer: id -> how much speaks for no answer; above the threshold the answer counts as empty. Right texts that are
    empty once normalised do not count. best_*: over all thresholds.
    """
    has_answer = {id: bool(texts) for id, texts in golds.items()}
    golds = {id: [text for text in texts if normalize_answer(text)] or [""] for id, texts in golds.items()}
    raw = {"squad_f1": _best(f1_or_both_empty, golds, answers), "exact_match": _best(exact, golds, answers)}
    values = {
        name: {id: float(not has_answer[id]) if no_answer.get(id, 0.0) > threshold else x for id, x in by_id.items()}
        for name, by_id in raw.items()
    }
    scores = {name: _mean(by_id) for name, by_id in values.items()}
    for kind, wanted in (("has_answer", True), ("no_answer", False)):
        ids = [id for id in golds if has_answer[id] == wanted]
        for name, by_id in values.items():
            if ids:
                scores[f"{kind}_{name}"] = _mean({id: by_id[id] for id in ids})
    for name, by_id in raw.items():
        best, at = _best_threshold(answers, has_answer, by_id, no_answer)
        scores[f"best_{name}"], scores[f"best_{name}_threshold"] = best, at
    return scores


def _best(
    score: Callable[[str, str], float], golds: Mapping[str, Sequence[str]], answers: Mapping[str, str]
) -> dict[str, float]:
    return {
        id: max((score(gold, answers[id]) for gold in texts), default=0.0) if id in answers else 0.0
        for id, texts in golds.items()
    }


def _best_threshold(
    answers: Mapping[str, str],
    has_answer: Mapping[str, bool],
    scores: Mapping[str, float],
    no_answer: Mapping[str, float],
) -> tuple[float, float]:
    """The best mean score over all thresholds, and its threshold: find_best_thresh of the official script."""
    current = best = float(sum(not has for has in has_answer.values()))
    threshold = 0.0
    for id in sorted(no_answer, key=lambda id: no_answer[id]):
        if id not in scores:
            continue
        if has_answer[id]:
            current += scores[id]
        elif answers.get(id):
            current -= 1
        if current > best:
            best, threshold = current, no_answer[id]
    return best / max(1, len(scores)), threshold


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / max(1, len(scores))
