"""Texts to tokens: as the tokenizer gives them, or by looking up words that were tokenized before.

Most tokenizers treat what lies between two white spaces alone, whatever stands around it. For those a word is tokenized
when it first occurs and looked up from then on, which gives the same tokens in less than half the time.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from encoderkit.pretrain.text_bounds import token_spans, token_stops, word_starts

# stop, starts_word: see token_stops and word_starts of encoderkit.pretrain.text_bounds.
TOKEN = np.dtype([("id", np.uint32), ("stop", np.uint32), ("starts_word", np.bool_)])

CACHED_CHARACTERS = 1 << 22  # of words that are kept, some 100 MB: all that occur in 5M words of English
WORDS_TOGETHER = 64  # new words that are tokenized as one text: alone or all at once takes longer
# Words begin before one of the blanks that every tokenizer takes for white space, and after no white space at all.
_WORD_BEGIN = re.compile(r"(?<=\S)(?=[ \t\n\r])")

NORMALIZERS = {"BertNormalizer", "Lowercase", "StripAccents", "NFC", "NFD", "NFKC", "NFKD"}
PRE_TOKENIZERS = {"BertPreTokenizer", "ByteLevel"}


def tokenize(backend: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """An array of TOKEN for each text."""
    rows = []
    for text, encoding in zip(texts, backend.encode_batch(list(texts), add_special_tokens=False)):
        spans = token_spans(encoding)
        tokens = np.empty(len(spans), TOKEN)
        tokens["id"] = encoding.ids
        tokens["stop"] = token_stops(spans)
        tokens["starts_word"] = word_starts(text, encoding, spans)
        rows.append(tokens)
    return rows


def splits_at_blanks(backend: Tokenizer) -> bool:
    """Whether the tokens of any text are those of its words, which begin where WordCache says."""
    parts: dict[str, Any] = json.loads(backend.to_str())
    pre_tokenizer = parts["pre_tokenizer"] or {}
    return (
        all(step["type"] in NORMALIZERS for step in _steps(parts["normalizer"], "normalizers"))
        and pre_tokenizer.get("type") in PRE_TOKENIZERS
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer.get("add_prefix_space")
        and not parts["model"].get("dropout")
        # The first token of a text has other offsets then.
        and not any(
            s.get("trim_offsets") and s["add_prefix_space"] for s in _steps(parts["post_processor"], "processors")
        )
        and all(token["special"] for token in parts["added_tokens"])  # others are found across blanks
    )


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The parts of a sequence of them; a single one; or none."""
    return [] if part is None else part.get(name, [part])


class WordCache:
    """As tokenize, with a backend that splits_at_blanks and takes special tokens for text."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self._known: dict[str, bytes] = {}  # TOKENs of each word, stops counted from its beginning
        self._characters = 0  # of the known words

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._characters > CACHED_CHARACTERS:
            self._known, self._characters = {}, 0
        rows = [_WORD_BEGIN.split(text) for text in texts]
        words = dict.fromkeys(itertools.chain.from_iterable(rows))
        new = [word for word in words if word not in self._known]
        self._known |= self._learn(new, ends={word for row in rows for word in (row[0], row[-1])})
        self._characters += sum(map(len, new))
        # Words occur again and again in these texts; a small dictionary finds them sooner than the large one.
        tokens = {word: self._known[word] for word in words}
        return [_join(row, [tokens[word] for word in row]) for row in rows]

    def _learn(self, words: list[str], ends: set[str]) -> dict[str, bytes]:
        """TOKENs of words; ends: those that begin or end a text, so that others cannot stand on both sides."""
        inner = [word for word in words if word not in ends]
        groups = [inner[i : i + WORDS_TOGETHER] for i in range(0, len(inner), WORDS_TOGETHER)]
        groups += [[word] for word in words if word in ends]
        learned: dict[str, bytes] = {}
        for group, tokens in zip(groups, tokenize(self.backend, ["".join(group) for group in groups])):
            learned.update(zip(group, _cut(group, tokens)))
        return learned


def _cut(words: list[str], tokens: np.ndarray) -> list[bytes]:
    """TOKENs of each word, of those of the text that these words make."""
    stops = np.cumsum([0, *map(len, words)])
    bounds = np.append(0, np.searchsorted(tokens["stop"], stops[1:], side="right"))
    tokens["stop"] -= np.repeat(stops[:-1], np.diff(bounds)).astype(np.uint32)
    content = tokens.tobytes()
    return [content[a:b] for a, b in itertools.pairwise((bounds * TOKEN.itemsize).tolist())]


def _join(words: list[str], tokens: list[bytes]) -> np.ndarray:
    """TOKENs of the text that these words make."""
    joined = np.frombuffer(bytearray().join(tokens), TOKEN)
    starts = np.cumsum([0, *map(len, words[:-1])])
    sizes = np.fromiter(map(len, tokens), np.int64, len(tokens)) // TOKEN.itemsize
    joined["stop"] += np.repeat(starts, sizes).astype(np.uint32)
    return joined
