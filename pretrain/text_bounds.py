"""Where words and sentences of tokenized text begin, for any fast tokenizer.

Both are read off the offsets and word numbers that the tokenizer gives with the ids, so the ids are those of the whole
text and no sentence or word bound changes them. Sentences are found by sentencex (Wikimedia, about 300 languages,
2.5 million words a second), which knows abbreviations, quotes and paragraphs.
"""

from __future__ import annotations

import itertools
import re
import unicodedata

import numpy as np
from tokenizers import Encoding

from encoderkit.kernels.errors import InputError

# Languages that the English rules serve, by intent: all rules of sentencex end Chinese sentences, and it has no others.
ENGLISH_RULES = ("en", "zh")
# Abbreviations that tell rules apart: no others treat all of them as the English ones do.
TELLING = ("bs. as.", "ntra. sra.", "A.", "N\u00ba.", "H.", "wisc.", "ala.", "Mr.")
LONGEST = (1 << 16) - 1  # tokens of one sentence in a store; a longer one is split


def check_language(sentences: str) -> None:
    """Raise InputError unless sentences is none or a language that the splitter has rules for, by its code.

    For any other code sentencex takes its English rules without a word.
    """
    if sentences == "none":
        return
    if not re.fullmatch(r"[a-z]{2,3}(-[a-z]{2,8})*", sentences):
        raise InputError(f"sentences is {sentences!r}; expected a language code such as en, de or zh, or none")
    import sentencex

    segments, english = ([sentencex.segment(code, f"x {part} X y") for part in TELLING] for code in (sentences, "en"))
    if segments == english and sentences.split("-")[0] not in ENGLISH_RULES:
        raise InputError(
            f"sentences is {sentences!r}, for which the splitter has no rules; expected a language that it knows, such "
            "as en, de or zh, or none; en serves other languages too, all but its abbreviations"
        )


def token_spans(encoding: Encoding) -> np.ndarray:
    """(tokens, 2) int64: the characters from start to stop that each token stands for."""
    flat = np.fromiter(itertools.chain.from_iterable(encoding.offsets), np.int64, 2 * len(encoding))
    return flat.reshape(-1, 2)


def token_stops(spans: np.ndarray) -> np.ndarray:
    """(tokens,) int64: the character after each token, never one before that of an earlier token."""
    return np.maximum.accumulate(spans[:, 1])


def word_starts(text: str, encoding: Encoding, spans: np.ndarray) -> np.ndarray:
    """(tokens,) bool: whether a token begins a word, by the tokenizer's own splitting or after white space.

    The second serves tokenizers that do not split before they merge, such as some Unigram ones.
    """
    starts = np.ones(len(spans), dtype=bool)
    words = np.array(encoding.word_ids, dtype=np.float64)  # None becomes nan, which differs from everything
    starts[1:] = words[1:] != words[:-1]
    spaces = np.concatenate([[0], np.cumsum(_is_space(text))])  # white space before each character
    begins = np.minimum(spans[1:, 0] + 1, len(text))
    # White space between the token before and this one's first character, that character counted in.
    starts[1:] |= spaces[begins] > spaces[np.maximum(spans[:-1, 1], spans[:-1, 0])]
    return starts


def sentence_lengths(text: str, stops: np.ndarray, language: str) -> np.ndarray:
    """(sentences,) uint16 tokens of each sentence, summing to all tokens; language none makes one sentence.

    stops: see token_stops. A token belongs to the sentence that holds its last character; white space alone is no
    sentence.
    """
    ends = [] if language == "none" else _sentence_ends(text, language)
    bounds = np.searchsorted(stops, np.array(ends, dtype=stops.dtype), side="right")
    lengths = np.diff(bounds, prepend=0, append=len(stops))
    return np.array([part for n in lengths.tolist() for part in _split(n)], dtype=np.uint16)


def _sentence_ends(text: str, language: str) -> list[int]:
    """Where sentences end, but for the last one."""
    import sentencex

    pieces = sentencex.segment(language, text)  # every character is in one
    begins = itertools.accumulate(map(len, pieces), initial=0)
    return [begin for begin, piece in zip(begins, pieces) if not piece.isspace()][1:]


def _split(length: int) -> list[int]:
    parts = [LONGEST] * (length // LONGEST)
    return [*parts, length % LONGEST] if length % LONGEST else parts


def _is_space(text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return _SPACES[np.minimum(codes, len(_SPACES) - 1)]


_SPACES = np.array([chr(i).isspace() or unicodedata.category(chr(i)) == "Zs" for i in range(0x3002)])
