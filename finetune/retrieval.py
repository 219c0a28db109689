"""Exact nearest-neighbour search, and how good its rankings are by judgements.

Files of rows: corpus and queries with id (or _id), text and perhaps a title, which goes before the text; qrels with
query, doc and grade (or query-id, corpus-id and score). So BEIR has them (Thakur et al. 2021, arXiv:2104.08663).

N documents, Q queries, D vector size, K ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.corpora import CorpusSpec, open_rows

DEPTH = 1000  # ranks that are looked at, as in trec_eval
BLOCK = 256  # queries that are compared with all documents at once


@dataclass(frozen=True)
class Judgements:
    """Texts of the documents and of the judged queries; gains: for each query, document index -> gain above 0."""

    documents: list[str]
    queries: list[str]
    gains: list[dict[int, float]]


def read_judgements(corpus: str, queries: str, qrels: str, gains: Mapping[str, float] | None) -> Judgements:
    """The three files. gains: what a grade is worth; without it a grade is its own gain, and 0 or less not relevant.

    Queries without a relevant document are left out. Raises InputError naming file and line of a bad row.
    """
    documents, asked = _texts(corpus), _texts(queries)
    number = {name: i for i, name in enumerate(documents)}
    found: dict[str, dict[int, float]] = {}
    for where, row in _rows(qrels):
        query = str(_cell(row, ("query", "query-id"), where))
        doc = str(_cell(row, ("doc", "corpus-id"), where))
        grade = _cell(row, ("grade", "score"), where)
        for kind, name, known in (("query", query, asked), ("document", doc, number)):
            if name not in known:
                raise InputError(f"{where}: {kind} {name!r} is in no row of {queries if kind == 'query' else corpus}")
        try:
            gain = float(grade) if gains is None else gains.get(str(grade), 0.0)
        except (TypeError, ValueError):
            raise InputError(f"{where}: grade {grade!r} is no number; set gains") from None
        if gain > 0:
            found.setdefault(query, {})[number[doc]] = gain
    if not found:
        raise InputError(f"{qrels}: no query has a relevant document; expected grades above 0")
    return Judgements(list(documents.values()), [asked[query] for query in found], list(found.values()))


def search(queries_QD: np.ndarray, corpus_ND: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """(Q, K) indices of the documents with the largest inner products, best first; equal ones in their order."""
    ranked = []
    for begin in range(0, len(queries_QD), BLOCK):
        scores_BN = queries_QD[begin : begin + BLOCK] @ corpus_ND.T
        ranked.append(np.argsort(-scores_BN, axis=1, kind="stable")[:, :depth])
    return np.concatenate(ranked)


def retrieval_scores(ranked_QK: np.ndarray, gains: list[dict[int, float]]) -> dict[str, Any]:
    """Means over queries of nDCG@10 (Järvelin and Kekäläinen 2002), average precision and recall@100."""
    rows = ranked_QK.tolist()
    per_query = [
        (ndcg(row, gain, 10), average_precision(row, gain), _recall(row, gain, 100)) for row, gain in zip(rows, gains)
    ]
    means = np.mean(per_query, axis=0).tolist()
    return {**dict(zip(("ndcg@10", "map", "recall@100"), means)), "queries": len(gains)}


def ndcg(ranked: list[int], gains: Mapping[int, float], k: int) -> float:
    """Normalised discounted cumulative gain of the k best. gains: of the relevant documents, by index."""

    def discounted(values: list[float]) -> float:
        return sum(value / np.log2(rank + 2) for rank, value in enumerate(values[:k]))

    return discounted([gains.get(doc, 0.0) for doc in ranked]) / discounted(sorted(gains.values(), reverse=True))


def average_precision(ranked: list[int], gains: Mapping[int, float]) -> float:
    """Mean over the relevant documents of the precision down to each; 0 for those that are not ranked."""
    at = np.flatnonzero([doc in gains for doc in ranked])
    return float(((np.arange(len(at)) + 1) / (at + 1)).sum() / len(gains))


def _recall(ranked: list[int], gains: Mapping[int, float], k: int) -> float:
    return sum(doc in gains for doc in ranked[:k]) / len(gains)


def _texts(file: str) -> dict[str, str]:
    """id -> text of each row."""
    texts: dict[str, str] = {}
    for where, row in _rows(file):
        name, text = str(_cell(row, ("id", "_id"), where)), _cell(row, ("text",), where)
        if name in texts:
            raise InputError(f"{where}: id {name!r} is there twice")
        for column, value in (("text", text), ("title", row.get("title"))):
            if not isinstance(value, str) and (column == "text" or value is not None):
                raise InputError(f"{where}: column {column} holds {type(value).__name__}; expected text")
        title = row.get("title")
        texts[name] = f"{title} {text}" if title else text
    if not texts:
        raise InputError(f"{file}: 0 rows; expected id and text")
    return texts


def _rows(file: str) -> Any:
    return ((where, row) for where, _, row in open_rows(CorpusSpec(source=file)) if row)


def _cell(row: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise InputError(f"{where}: no {' or '.join(names)}; present: {', '.join(map(str, row))}")
