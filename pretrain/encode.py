"""Batches of documents to Arrow record batches of tokens and bounds, in this process or in several, always in order."""

from __future__ import annotations

import collections
import functools
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from encoderkit.pretrain.corpus_files import Interrupted
from encoderkit.pretrain.text_bounds import sentence_lengths
from encoderkit.pretrain.tokenizer import num_ids
from encoderkit.pretrain.word_cache import WordCache, splits_at_blanks, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NOTES = ("special_in_text", "characters_without_tokens")  # counts that travel with each record batch
AHEAD = 2  # batches for each process that wait: what keeps memory bounded


@dataclass(frozen=True, eq=False)
class Encoder:
    """Texts to tokens without special ones, with the bounds of sentences and words.

    Text that spells a special token does not become one; where a tokenizer knows no other way, it becomes unknown.
    """

    tokenizer: str  # tokenizer.json
    special: tuple[int, ...]
    unknown: int
    vocab_size: int
    sentences: str  # language of the sentence splitter, or none

    @classmethod
    def of(cls, fast: PreTrainedTokenizerFast, sentences: str) -> Encoder:
        """An encoder that can be sent to other processes."""
        special = tuple(sorted(set(fast.all_special_ids) - {fast.unk_token_id}))
        return cls(fast.backend_tokenizer.to_str(), special, fast.unk_token_id, num_ids(fast), sentences)

    @property
    def dtype(self) -> np.dtype:
        """Of the stored tokens."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @functools.cached_property
    def tokenize(self) -> Callable[[Sequence[str]], list[np.ndarray]]:
        """Texts to arrays of TOKEN by the tokenizer, which is built where it is used."""
        backend = Tokenizer.from_str(self.tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return WordCache(backend) if splits_at_blanks(backend) else functools.partial(tokenize, backend)

    @functools.cached_property
    def is_special(self) -> np.ndarray:
        """(V,) bool: whether an id stands for a special token other than the unknown one."""
        table = np.zeros(self.vocab_size, dtype=bool)
        table[list(self.special)] = True
        return table

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "tokenize"}

    def __call__(self, texts: Sequence[str]) -> tuple[pa.RecordBatch, dict[str, int]]:
        """One row for each text that has tokens, and the counts named in NOTES."""
        rows: list[tuple[np.ndarray, ...]] = []
        notes = dict.fromkeys(NOTES, 0)
        for text, tokens in zip(texts, self.tokenize(texts)):
            ids = tokens["id"].astype(self.dtype)
            if not len(ids):
                notes["characters_without_tokens"] += len(text)
                continue
            is_special = self.is_special[ids]
            if is_special.any():
                notes["special_in_text"] += int(is_special.sum())
                ids[is_special] = self.unknown
            words = np.packbits(tokens["starts_word"], bitorder="little")
            rows.append((ids, sentence_lengths(text, tokens["stop"], self.sentences), words))
        kinds = {"input_ids": self.dtype, "sentence_lengths": np.dtype(np.uint16), "word_starts": np.dtype(np.uint8)}
        columns = [_lists([row[i] for row in rows], kind) for i, kind in enumerate(kinds.values())]
        return pa.RecordBatch.from_arrays(columns, names=list(kinds)), notes


def encode_all(
    batches: Iterable[Sequence[str]], encoder: Encoder, *, workers: int
) -> Iterator[tuple[pa.RecordBatch, dict[str, int]]]:
    """Encode batches in order; more than one worker are processes. One batch alone starts no process.

    Raises Interrupted when a process is killed.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core; threads would wait for each other's Python part
    batches = iter(batches)
    first = list(itertools.islice(batches, 1 if workers == 1 else 2))
    if workers == 1 or len(first) < 2:
        yield from map(encoder, itertools.chain(first, batches))
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of pyarrow hold
    waiting: collections.deque = collections.deque()
    try:
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start, initargs=(encoder,)) as pool:
            for batch in itertools.chain(first, batches):
                waiting.append(pool.submit(_encode, batch))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise Interrupted(
            "a process that tokenizes was killed, perhaps for lack of memory; "
            "run the same command again, with fewer workers: it goes on where it was"
        ) from None


_encoder: Encoder  # of this process, when it is one of the pool


def _start(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: Sequence[str]) -> tuple[pa.RecordBatch, dict[str, int]]:
    return _encoder(texts)


def _lists(arrays: Sequence[np.ndarray], dtype: np.dtype) -> pa.ListArray:
    offsets = np.cumsum([0] + [len(array) for array in arrays], dtype=np.int32)
    values = np.concatenate([np.zeros(0, dtype), *arrays])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
