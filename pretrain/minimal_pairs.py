"""Minimal pairs: of two sentences that differ in one thing, does the model find the grammatical one more likely?

BLiMP (Warstadt et al. 2020, arXiv:1912.00582) and files of its shape: columns good and bad, or sentence_good and
sentence_bad; uid (or UID) names the paradigm, else the file does, and field what it belongs to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from encoderkit.encoder.pseudo_likelihood import Logits, Sentences, Variant, check_fits, pseudo_log_likelihoods
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.corpora import CorpusSpec, check_text, open_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COLUMNS = (("good", "bad"), ("sentence_good", "sentence_bad"))


@dataclass(frozen=True)
class Pair:
    """A grammatical sentence and one that is not. where: file and place, for messages."""

    good: str
    bad: str
    paradigm: str
    field: str
    where: str


def read_pairs(files: Sequence[str]) -> list[Pair]:
    """The pairs of these files, in order. Raises InputError naming file and line of a row that is none."""
    pairs: list[Pair] = []
    for file in files:
        held = len(pairs)
        for where, _, row in open_rows(CorpusSpec(source=file)):
            if row:
                pairs.append(_pair(row, Path(file).name.split(".")[0], where))
        if len(pairs) == held:
            raise InputError(f"{file}: 0 pairs; expected rows with {' and '.join(COLUMNS[0])}")
    return pairs


def fingerprint(pairs: Sequence[Pair]) -> str:
    """What changes when a pair does, wherever they lie."""
    rows = [(pair.good, pair.bad, pair.paradigm, pair.field) for pair in pairs]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def sample_pairs(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """At most count of the pairs, those with the smallest hashes: the same for every run."""
    hashes = [hashlib.sha256(f"{pair.good}\n{pair.bad}".encode()).digest() for pair in pairs]
    ranked = sorted(range(len(pairs)), key=hashes.__getitem__)
    return [pairs[i] for i in sorted(ranked[:count])]


@dataclass(frozen=True)
class MinimalPairs:
    """N pairs, tokenized: good sentence, bad sentence, good sentence, and so on."""

    pairs: list[Pair]
    sentences: Sentences
    mask_token_id: int

    @classmethod
    def of(cls, pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, max_positions: int) -> MinimalPairs:
        """Raises InputError where a sentence is longer than the model's positions."""
        sentences = Sentences.of([text for pair in pairs for text in (pair.good, pair.bad)], tokenizer)
        check_fits(sentences, max_positions, "minimal pairs")
        return cls(pairs, sentences, tokenizer.mask_token_id)

    def score(
        self, logits: Logits, *, batch_tokens: int = 4096, tell: Callable[[int], None] = lambda done: None
    ) -> dict[Variant, np.ndarray]:
        """(N, 2) float64 nats of each variant: the good sentence and the bad one."""
        found = pseudo_log_likelihoods(
            logits, self.sentences, mask_token_id=self.mask_token_id, batch_tokens=batch_tokens, tell=tell
        )
        return {variant: values.reshape(-1, 2) for variant, values in found.items()}


def accuracy(scores_N2: np.ndarray) -> float:
    """Share of pairs whose good sentence is strictly more likely."""
    return float(np.mean(scores_N2[:, 0] > scores_N2[:, 1]))


def _pair(row: dict[str, Any], file: str, where: str) -> Pair:
    names = next((names for names in COLUMNS if all(name in row for name in names)), None)
    if names is None:
        wanted = ", or ".join(" and ".join(names) for names in COLUMNS)
        raise InputError(f"{where}: no columns {wanted}; present: {', '.join(map(str, row))}")
    good, bad = (row[name] for name in names)
    for name, text in zip(names, (good, bad)):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: column {name} holds no text; expected a sentence")
        check_text(text, f"{where}: column {name}")
    field = str(row.get("field") or "").replace("/", "_")  # BLiMP spells syntax_semantics both ways
    return Pair(good, bad, str(row.get("uid") or row.get("UID") or file), field, where)
