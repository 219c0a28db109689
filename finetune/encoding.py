"""Texts and pairs of texts as packed token batches: tokenized once, flat in memory, never padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from encoderkit.encoder.batch import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 4096  # texts that are tokenized at once, in as many threads as there are cores


@dataclass(frozen=True)
class EncodedTexts:
    """N tokenized inputs end to end.

    token_ids: (T,) int32. token_types: (T,) int8, or None where the model has none. starts: (N + 1,) int64.
    truncated: how many of the N were cut to the longest allowed length; cut_tokens: how many tokens that took away.
    """

    token_ids: np.ndarray
    token_types: np.ndarray | None
    starts: np.ndarray
    truncated: int
    cut_tokens: int

    def __len__(self) -> int:
        """Number of inputs."""
        return len(self.starts) - 1

    def batch(self, indices: Sequence[int] | np.ndarray) -> TokenBatch:
        """These inputs as one packed batch whose read positions are the first tokens."""
        bounds = [(int(self.starts[i]), int(self.starts[i + 1])) for i in indices]
        types = self.token_types
        return TokenBatch.from_sequences(
            [self.token_ids[start:stop].tolist() for start, stop in bounds],
            token_types=None if types is None else [types[start:stop].tolist() for start, stop in bounds],
        )

    def pieces(self, indices: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
        """Cut indices into consecutive runs of at most max_tokens tokens together, one input at least."""
        lengths = np.diff(self.starts)[indices]
        first, tokens = 0, 0
        for position, length in enumerate(lengths.tolist()):
            if tokens and tokens + length > max_tokens:
                yield indices[first:position]
                first, tokens = position, 0
            tokens += length
        yield indices[first:]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    texts_b: list[str] | None,
    *,
    max_tokens: int,
    token_types: bool,
) -> EncodedTexts:
    """Tokenize texts or pairs with special tokens; inputs over max_tokens lose tokens from the longer text first."""
    flat: list[np.ndarray] = []
    flat_types: list[np.ndarray] = []
    truncated = cut_tokens = 0
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
            truncated += len(long)
            for i, item, item_types in zip(long, again["input_ids"], again["token_type_ids"]):
                cut_tokens += len(ids[i]) - len(item)
                ids[i], types[i] = item, item_types
        flat += [np.asarray(item, dtype=np.int32) for item in ids]
        if token_types:
            flat_types += [np.asarray(item, dtype=np.int8) for item in types]
    return EncodedTexts(
        np.concatenate(flat),
        np.concatenate(flat_types) if token_types else None,
        np.cumsum([0, *map(len, flat)]),
        truncated,
        cut_tokens,
    )
