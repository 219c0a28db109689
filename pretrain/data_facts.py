"""What a store holds and how a recipe lays it out, counted: the figures of encoderkit-pretrain doctor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.order import NUM_SPECIAL_TOKENS, Order
from encoderkit.pretrain.probe import probe_sequences, probe_targets, unigram_entropy
from encoderkit.pretrain.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLE_CHARACTERS = 2_000_000  # of held-out text, in which words are counted


@dataclass(frozen=True, kw_only=True, eq=False)
class DataFacts:
    """Shares are 0 to 1. lengths: (N,) tokens of each document. sequences: (P,) tokens of each, special ones too."""

    tokens: int
    documents: int
    fertility: float  # tokens a word of held-out text, words as white space parts them
    unknown: float  # share of the tokens
    unused_types: float  # share of the vocabulary that never occurs
    duplicate_documents: float  # share of the documents that repeat another one, token for token; passes left out
    duplicate_tokens: float  # share of the tokens in those
    lengths: np.ndarray
    sequences: np.ndarray
    cut: float  # share of the documents that are longer than a sequence
    cut_at_twice: float  # the same if sequences were twice as long
    rows: int  # in one pass over the data
    padding: float  # share of the row tokens
    probe_targets: int  # held-out tokens that are predicted
    unigram_entropy: float  # nats, of the probe
    ln_vocab: float

    @classmethod
    def of(cls, store: Store, tokenizer: PreTrainedTokenizerFast, order: Order) -> DataFacts:
        """Count; takes about a microsecond a document and a nanosecond a token.

        Raises InputError where the held-out documents give no token to predict.
        """
        texts, lengths = store.held_out_texts(), store.document_lengths
        targets = probe_targets(probe_sequences(texts, tokenizer, seed=0))
        read, distinct = _distinct(store)
        rows = len(order.epoch(0))
        # order.sizes has room for more special tokens, where a curriculum cuts pieces again.
        sequences = order.stop - order.start + NUM_SPECIAL_TOKENS + (order.pairs is not None)
        counts = store.unigram_counts
        return cls(
            tokens=store.num_tokens,
            documents=store.num_documents,
            fertility=_fertility(texts, tokenizer),
            unknown=float(counts[tokenizer.unk_token_id] / counts.sum()),
            unused_types=float(np.mean(counts == 0)),
            duplicate_documents=1 - len(distinct) / len(read),
            duplicate_tokens=1 - float(lengths[distinct].sum() / lengths[read].sum()),
            lengths=lengths,
            sequences=sequences,
            cut=float(np.mean(lengths > order.max_tokens - NUM_SPECIAL_TOKENS)),
            cut_at_twice=float(np.mean(lengths > 2 * order.max_tokens - NUM_SPECIAL_TOKENS)),
            rows=rows,
            padding=1 - float(sequences.sum()) / (rows * order.row_tokens),
            probe_targets=len(targets),
            unigram_entropy=unigram_entropy(counts, targets),
            ln_vocab=math.log(store.vocab_size),
        )


def length_histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(Shortest length, documents) of each bin; a bin ends where twice its shortest length begins, from 1 token on."""
    doublings = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    counts = np.bincount(doublings)
    first = int(np.flatnonzero(counts)[0])
    return [(1 << power, int(count)) for power, count in enumerate(counts) if power >= first]


def _distinct(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents without the later passes over each, and of one of each of those that are equal.

    Equal by 64-bit hashes of the tokens. Passes over a document stand side by side, in stores of SOURCE@PASSES.
    """
    found = (hash(store.tokens(document).tobytes()) for document in range(store.num_documents))
    hashes = np.fromiter(found, np.int64, store.num_documents)
    is_pass = np.zeros(len(hashes), dtype=bool)
    if any(source["passes"] > 1 for source in store.manifest["sources"]):
        is_pass[1:] = hashes[1:] == hashes[:-1]
    read = np.flatnonzero(~is_pass)
    return read, read[np.unique(hashes[read], return_index=True)[1]]


def _fertility(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> float:
    within = np.cumsum([0] + [len(text) for text in texts[:-1]]) < SAMPLE_CHARACTERS
    sample = [text for text, kept in zip(texts, within) if kept]
    words = sum(len(text.split()) for text in sample)
    if not words:
        raise InputError(f"{len(texts)} held-out documents hold no word; hold out more text")
    tokenizer.backend_tokenizer.no_truncation()
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(sample, add_special_tokens=False)
    return sum(len(encoding.ids) for encoding in encoded) / words
