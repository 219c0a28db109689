"""Evaluation texts that a corpus holds: found by runs of n words that are in both, without case and punctuation.

A word that no evaluation text has ends every run, so most of a corpus costs one look-up a word: about 10M words in a
quarter of a minute. Memory: the runs of the evaluation texts, some 100 bytes each.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.corpora import Corpora, CorpusSpec, Document, open_rows
from encoderkit.pretrain.data_settings import ContaminationSettings
from encoderkit.pretrain.duplicates import words_of
from encoderkit.pretrain.run_folder import replace_file

NAMED = 10  # documents that the report names for each evaluation text; all are counted
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it is 0 modulo 2^64


@dataclass
class EvaluationText:
    """One cell of an evaluation file. runs: how many it has; found: those that the corpus holds."""

    source: str
    id: str
    runs: int
    found: set[int] = field(default_factory=set)
    documents: list[str] = field(default_factory=list)
    num_documents: int = 0


class EvaluationTexts:
    """The texts of evaluation sources, ready to be looked for.

    ngram: words of a run. too_short: texts of fewer words, by source. Raises InputError when nothing is left.
    """

    def __init__(self, sources: Sequence[str], ngram: int) -> None:
        self.ngram = ngram
        self.texts: list[EvaluationText] = []
        self.too_short: dict[str, int] = dict.fromkeys(sources, 0)
        self._word_ids: dict[str, int] = {}
        holders: dict[int, set[int]] = defaultdict(set)  # hash of a run -> texts
        for source in sources:
            for identity, text in _cells(source):
                words = words_of(text)
                if len(words) < ngram:
                    self.too_short[source] += 1
                    continue
                for word in words:
                    self._word_ids.setdefault(word, len(self._word_ids) + 1)
                runs = set(self._runs(words).tolist())
                for run in runs:
                    holders[run].add(len(self.texts))
                self.texts.append(EvaluationText(source, identity, len(runs)))
        if not self.texts:
            raise InputError(f"{', '.join(sources)}: 0 texts of {ngram} words or more; set a smaller ngram")
        self._holders = dict(holders)
        self._known = np.sort(np.array(list(holders), dtype=np.uint64))

    def look(self, document: Document) -> bool:
        """Look for all texts in one document; returns whether it holds a run of any."""
        runs = self._runs(words_of(document.text))
        place = np.minimum(np.searchsorted(self._known, runs), len(self._known) - 1)
        found = set(runs[self._known[place] == runs].tolist())
        held = {number for run in found for number in self._holders[run]}
        for number in held:
            text = self.texts[number]
            text.num_documents += 1
            if len(text.documents) < NAMED:
                text.documents.append(document.id)
        for run in found:
            for number in self._holders[run]:
                self.texts[number].found.add(run)
        return bool(held)

    def _runs(self, words: list[str]) -> np.ndarray:
        """uint64 hashes of the runs of known words."""
        known = self._word_ids
        ids = np.array([known.get(word, 0) for word in words], dtype=np.uint64)
        if len(ids) < self.ngram:
            return ids[:0]
        hashes = np.zeros(len(ids) - self.ngram + 1, dtype=np.uint64)
        whole = np.ones(len(hashes), dtype=bool)
        for i in range(self.ngram):
            part = ids[i : i + len(hashes)]
            hashes = (hashes + part) * FACTOR
            hashes ^= hashes >> np.uint64(29)
            whole &= part > 0
        return hashes[whole]


def contamination(corpora: Iterable[Document], against: Sequence[str], *, ngram: int = 13) -> dict[str, Any]:
    """Which texts of the evaluation sources stand in the corpus, and in which documents.

    Returns the report: for each source its texts, those too short to look for, and those found with the share of their
    runs and the documents; and the number of documents of the corpus that hold any.
    """
    texts = EvaluationTexts(against, ngram)
    num_documents = num_holding = 0
    for document in corpora:
        num_documents += 1
        num_holding += texts.look(document)
    sources = []
    for source in against:
        own = [text for text in texts.texts if text.source == source]
        found = [
            {"id": t.id, "share": len(t.found) / t.runs, "num_documents": t.num_documents, "documents": t.documents}
            for t in own
            if t.found
        ]
        sources.append(
            {"source": source, "texts": len(own), "too_short": texts.too_short[source], "contaminated": found}
        )
    return {"ngram": ngram, "documents": num_documents, "documents_holding": num_holding, "sources": sources}


def run_contamination(settings: ContaminationSettings) -> None:
    """Write and say which evaluation texts a corpus holds: the command encoderkit-pretrain contamination."""
    from encoderkit.pretrain.terminal import plain_console

    if settings.out:
        _check_file(Path(settings.out))
    corpora = Corpora(
        settings.sources,
        text_column=settings.text_column,
        documents=settings.documents,
        invalid_utf8=settings.invalid_utf8,
    )
    report = contamination(corpora, settings.against, ngram=settings.ngram)
    console = plain_console()
    for source in report["sources"]:
        found = source["contaminated"]
        whole = sum(entry["share"] == 1 for entry in found)
        console.print(
            f"{source['source']}: {len(found):,} of {source['texts']:,} texts share {settings.ngram} words in a row "
            f"with the corpus, {whole:,} stand there whole; {source['too_short']:,} too short to look for"
        )
    console.print(f"{report['documents_holding']:,} of {report['documents']:,} documents hold any")
    if settings.out:
        replace_file(Path(settings.out), json.dumps(report, indent=2) + "\n")


def _check_file(path: Path) -> None:
    """Make the folder of a file that will be written, which takes a while; InputError where that cannot be."""
    if path.is_dir():
        raise InputError(f"out {path} is a folder; give a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out {path} cannot be written: {error.strerror or error}") from error


def _cells(source: str) -> Iterator[tuple[str, str]]:
    """Every text of every row, with the id of the row and the name of its column."""
    for _, identity, row in open_rows(CorpusSpec(source=source, documents="line")):
        for column, cell in row.items():
            for text in cell if isinstance(cell, list) else [cell]:
                if isinstance(text, str):
                    yield f"{identity} {column}", text
