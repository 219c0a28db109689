"""Inputs of every kind of task as packed token batches: tokenized once, flat in memory, never padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from encoderkit.encoder.batch import TokenBatch
from encoderkit.kernels.segments import Segments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 4096  # texts that are tokenized at once, in as many threads as there are cores


@dataclass(frozen=True)
class EncodedTexts:
    """N inputs of one sequence or several, end to end; an input's sequences stay in one batch.

    token_ids: (T,) int32. token_types: (T,) int8, or None where the model has none. starts: (S + 1,) int64, of the
    sequences. input_starts: (N + 1,) int64 into the sequences. reads: (T,) bool, the positions that the head reads, or
    None: the first of each sequence. origins: (N,) int64, the example that an input is part of. truncated: how many of
    the inputs were cut to the longest allowed length; cut_tokens: how many tokens that took away.
    """

    token_ids: np.ndarray
    token_types: np.ndarray | None
    starts: np.ndarray
    truncated: int
    cut_tokens: int
    input_starts: np.ndarray
    reads: np.ndarray | None
    origins: np.ndarray

    @classmethod
    def from_sequences(
        cls,
        token_ids: list[Any],
        token_types: list[Any] | None,
        *,
        reads: list[Any] | None = None,
        sizes: Sequence[int] | None = None,
        origins: Sequence[int] | None = None,
        truncated: int = 0,
        cut_tokens: int = 0,
    ) -> EncodedTexts:
        """Lists of token ids; sizes: how many sequences each input has, one unless given."""
        sizes = [1] * len(token_ids) if sizes is None else sizes
        return cls(
            _flat(token_ids, np.int32),
            None if token_types is None else _flat(token_types, np.int8),
            np.cumsum([0, *map(len, token_ids)]),
            truncated,
            cut_tokens,
            np.cumsum([0, *sizes]),
            None if reads is None else _flat(reads, np.bool_),
            np.arange(len(sizes)) if origins is None else np.asarray(origins, dtype=np.int64),
        )

    def __len__(self) -> int:
        """Number of inputs."""
        return len(self.input_starts) - 1

    def lengths(self) -> np.ndarray:
        """(N,) tokens of each input."""
        return np.diff(self.starts[self.input_starts])

    def read_starts(self) -> np.ndarray:
        """(N + 1,) where the read positions of each input begin among the M of all."""
        if self.reads is None:
            return self.input_starts
        return np.concatenate([[0], np.cumsum(self.reads)])[self.starts[self.input_starts]]

    def reads_of(self, inputs: np.ndarray) -> np.ndarray:
        """Where the read positions of these inputs, one after another, are among the M of all."""
        return _ranges(self.read_starts(), inputs)

    def batch(self, inputs: Sequence[int] | np.ndarray) -> TokenBatch:
        """These inputs as one packed batch with their read positions."""
        sequences = _ranges(self.input_starts, np.asarray(inputs))
        starts_S = self.starts[sequences]
        lengths_S = self.starts[sequences + 1] - starts_S
        tokens_T = _ranges(self.starts, sequences)
        firsts_S = np.cumsum(lengths_S) - lengths_S
        if self.reads is None:
            positions_M, counts_S = firsts_S, np.ones_like(lengths_S)
        else:
            read_T = self.reads[tokens_T]
            positions_M, counts_S = np.flatnonzero(read_T), np.add.reduceat(read_T.astype(np.int64), firsts_S)
        types = self.token_types
        return TokenBatch(
            input_ids=torch.from_numpy(self.token_ids[tokens_T].astype(np.int64)),
            segments=Segments.from_lengths(torch.from_numpy(lengths_S)),
            position_ids=torch.from_numpy(np.arange(len(tokens_T)) - np.repeat(firsts_S, lengths_S)),
            target_positions=torch.from_numpy(positions_M),
            target_segments=Segments.from_lengths(torch.from_numpy(counts_S)),
            token_type_ids=None if types is None else torch.from_numpy(types[tokens_T].astype(np.int64)),
        )

    def pieces(self, inputs: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
        """Cut inputs into consecutive runs of at most max_tokens tokens together, one input at least."""
        lengths = self.lengths()[inputs]
        first, tokens = 0, 0
        for position, length in enumerate(lengths.tolist()):
            if tokens and tokens + length > max_tokens:
                yield inputs[first:position]
                first, tokens = position, 0
            tokens += length
        if tokens:
            yield inputs[first:]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    texts_b: list[str] | None,
    *,
    max_tokens: int,
    token_types: bool,
    sizes: Sequence[int] | None = None,
) -> EncodedTexts:
    """Tokenize texts or pairs with special tokens; inputs over max_tokens lose tokens from the longer text first.

    sizes: how many of the texts make up each input, one unless given.
    """
    all_ids: list[list[int]] = []
    all_types: list[list[int]] = []
    cut: list[int] = []  # of texts, those that lose tokens
    cut_tokens = 0
    for first in range(0, len(texts), _CHUNK):
        chunk = texts[first : first + _CHUNK]
        chunk_b = None if texts_b is None else texts_b[first : first + _CHUNK]
        encoded = tokenizer(chunk, chunk_b, return_token_type_ids=True, return_attention_mask=False, verbose=False)
        ids, types = encoded["input_ids"], encoded["token_type_ids"]
        long = [i for i, item in enumerate(ids) if len(item) > max_tokens]
        if long:
            again = tokenizer(
                [chunk[i] for i in long],
                None if chunk_b is None else [chunk_b[i] for i in long],
                truncation="longest_first",
                max_length=max_tokens,
                return_token_type_ids=True,
                return_attention_mask=False,
            )
            cut += [first + i for i in long]
            for i, item, item_types in zip(long, again["input_ids"], again["token_type_ids"]):
                cut_tokens += len(ids[i]) - len(item)
                ids[i], types[i] = item, item_types
        all_ids += ids
        all_types += types
    truncated = len(cut) if sizes is None else len(set(np.repeat(np.arange(len(sizes)), sizes)[cut]))
    return EncodedTexts.from_sequences(
        all_ids, all_types if token_types else None, sizes=sizes, truncated=truncated, cut_tokens=cut_tokens
    )


def encode_words(
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[list[str]],
    *,
    max_tokens: int,
    token_types: bool,
    all_pieces: bool = False,
) -> tuple[EncodedTexts, np.ndarray]:
    """Sentences of words, [CLS] words [SEP]; the first piece of each word is read, or all of them.

    A sentence over max_tokens becomes several inputs, cut between words, so that every word is read; only a word that
    is longer than that alone loses pieces. A word that the tokenizer makes nothing of is the unknown token. Returns the
    word of each read position too: (M,) int64, counted through all sentences.
    """
    unique = list(dict.fromkeys(word for words in sentences for word in words))
    encoded = tokenizer([f" {word}" for word in unique], add_special_tokens=False, return_attention_mask=False)
    room = max_tokens - 2
    pieces = {w: (ids or [tokenizer.unk_token_id])[:room] for w, ids in zip(unique, encoded["input_ids"])}
    sequences: list[list[int]] = []
    reads: list[list[bool]] = []
    origins: list[int] = []
    read_words: list[int] = []
    number = 0
    for origin, words in enumerate(sentences):
        held = room + 1  # so that the first word opens a sequence
        for word in words:
            ids = pieces[word]
            if held + len(ids) > room:
                sequences.append([tokenizer.cls_token_id])
                reads.append([False])
                origins.append(origin)
                held = 0
            sequences[-1] += ids
            reads[-1] += [True, *[all_pieces] * (len(ids) - 1)]
            read_words += [number] * (len(ids) if all_pieces else 1)
            held += len(ids)
            number += 1
    for sequence, read in zip(sequences, reads):
        sequence.append(tokenizer.sep_token_id)
        read.append(False)
    types = [[0] * len(sequence) for sequence in sequences] if token_types else None
    return EncodedTexts.from_sequences(sequences, types, reads=reads, origins=origins), np.array(read_words)


@dataclass(frozen=True)
class Windows:
    """Questions with windows of their contexts, one input each; all tokens are read.

    offsets: for each token of all windows, where it begins and ends in its context, (T, 2) int32 characters; -1 where
    it is no token of the context.
    """

    encoded: EncodedTexts
    offsets: np.ndarray


def encode_windows(
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    contexts: list[str],
    *,
    max_tokens: int,
    stride: int,
    token_types: bool,
) -> Windows:
    """[CLS] question [SEP] window [SEP], windows of one context sharing stride tokens; nothing of a context is lost.

    A question takes at most a quarter of max_tokens; the rest of it is cut, which its windows count as truncated.
    """
    lost, questions = _cut_questions(tokenizer, [question.lstrip() for question in questions], max_tokens // 4)
    ids: list[list[int]] = []
    types: list[list[int]] = []
    origins: list[int] = []
    offsets: list[np.ndarray] = []
    for first in range(0, len(questions), _CHUNK):
        encoded = tokenizer(
            questions[first : first + _CHUNK],
            contexts[first : first + _CHUNK],
            truncation="only_second",
            max_length=max_tokens,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
            return_attention_mask=False,
        )
        ids += encoded["input_ids"]
        types += encoded["token_type_ids"]
        origins += [first + origin for origin in encoded["overflow_to_sample_mapping"]]
        for i, pairs in enumerate(encoded["offset_mapping"]):
            in_context = np.array([part == 1 for part in encoded.sequence_ids(i)])
            offsets.append(np.where(in_context[:, None], np.asarray(pairs), -1))
    reads = [[True] * len(sequence) for sequence in ids]
    flat = EncodedTexts.from_sequences(
        ids,
        types if token_types else None,
        reads=reads,
        origins=origins,
        truncated=sum(origin in lost for origin in origins),
        cut_tokens=sum(lost.values()),
    )
    return Windows(flat, np.concatenate(offsets).astype(np.int32))


def _cut_questions(
    tokenizer: PreTrainedTokenizerBase, questions: list[str], room: int
) -> tuple[dict[int, int], list[str]]:
    """All questions without what is beyond room tokens, and how many tokens those that are longer lose."""
    encoded = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    lost = {}
    for i, pairs in enumerate(encoded["offset_mapping"]):
        if len(pairs) > room:
            questions[i] = questions[i][: pairs[room - 1][1]]
            lost[i] = len(pairs) - room
    return lost, questions


def _ranges(starts: np.ndarray, which: np.ndarray) -> np.ndarray:
    """starts[i] ... starts[i + 1] - 1 for each i of which, end to end."""
    firsts, lengths = starts[which], starts[which + 1] - starts[which]
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(firsts - before, lengths)


def _flat(lists: list[Any], dtype: Any) -> np.ndarray:
    """Lists end to end."""
    return np.concatenate([np.asarray(item, dtype=dtype) for item in lists])
