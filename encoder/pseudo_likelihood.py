"""Pseudo-log-likelihood of sentences: how likely a masked language model finds them, token by token, each one masked.

original: the sum of log p(token | the rest), one token masked at a time (Salazar et al. 2020, arXiv:1910.14659).
within_word: the later tokens of the same word are masked too, so that a word's pieces do not give each other away
(Kauf and Ivanova 2023, arXiv:2305.10588); words are those of the tokenizer's pre-tokenizer.

Sentences of one length are masked and scored together, so that there is no padding in any layout, and equal masked
copies, of the two variants or of sentences that differ in the masked word only, are computed once.

S sentences, L tokens, C masked copies, U different ones, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.errors import InputError
from encoderkit.kernels.segments import Segments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Variant = Literal["original", "within_word"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
Logits = Callable[[Tensor, Tensor], Tensor]  # (U, L) ids and (U,) positions to (U, V) scores of the tokens there
CHUNK = 4_000_000  # tokens of masked copies that are laid out at once: 16 MB
SPECIAL = -1


@dataclass(frozen=True)
class Sentences:
    """S tokenized sentences. ids: with special tokens. words: the word that each token is of, SPECIAL where none."""

    ids: list[list[int]]
    words: list[list[int]]

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.ids)

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Sentences:
        """Special tokens that a text spells are text."""
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        encodings = backend.encode_batch(list(texts))
        words = [[SPECIAL if word is None else word for word in encoding.word_ids] for encoding in encodings]
        return cls([encoding.ids for encoding in encodings], words)

    @property
    def longest(self) -> int:
        """Tokens of the longest sentence."""
        return max(map(len, self.ids), default=0)

    def num_copies_tokens(self) -> int:
        """Tokens of all masked copies of both variants, before equal ones are put together."""
        return sum(2 * len(ids) * sum(word != SPECIAL for word in words) for ids, words in zip(self.ids, self.words))


def packed_logits(model: MaskedLM) -> Logits:
    """Ours: packed, and only the masked positions go through the last block and the head."""
    device = next(model.parameters()).device

    def logits(ids_UL: Tensor, at_U: Tensor) -> Tensor:
        U, L = ids_UL.shape
        batch = TokenBatch(
            input_ids=ids_UL.flatten(),
            segments=Segments.from_lengths([L] * U),
            position_ids=torch.arange(L).repeat(U),
            target_positions=torch.arange(U) * L + at_U,
            target_segments=Segments.from_lengths([1] * U),
        )
        return model.logits(batch.to(device))

    return logits


def transformers_logits(model: Any) -> Logits:
    """Those of any masked language model of transformers; its head computes every position."""
    device = next(model.parameters()).device

    def logits(ids_UL: Tensor, at_U: Tensor) -> Tensor:
        ids_UL = ids_UL.to(device)
        scores_ULV = model(input_ids=ids_UL, attention_mask=torch.ones_like(ids_UL)).logits
        return scores_ULV[torch.arange(len(at_U), device=device), at_U.to(device)]

    return logits


@torch.inference_mode()
def pseudo_log_likelihoods(
    logits: Logits,
    sentences: Sentences,
    *,
    mask_token_id: int,
    batch_tokens: int = 4096,
    tell: Callable[[int], None] = lambda done: None,
) -> dict[Variant, np.ndarray]:
    """(S,) float64 nats of each variant; a sentence without tokens has 0.

    batch_tokens: given to logits at once. tell: called with the tokens of masked copies done so far, as
    num_copies_tokens counts them.
    """
    totals: dict[Variant, np.ndarray] = {variant: np.zeros(len(sentences)) for variant in VARIANTS}
    done = 0
    for chosen in _chunks(sentences):
        ids_SL = np.array([sentences.ids[i] for i in chosen], dtype=np.int32)
        words_SL = np.array([sentences.words[i] for i in chosen], dtype=np.int32)
        copies = _masked_copies(ids_SL, words_SL, mask_token_id)
        values_C = _log_probabilities(logits, copies, max(1, batch_tokens // ids_SL.shape[1]))
        for variant, part in zip(VARIANTS, np.split(np.arange(len(values_C)), 2)):
            np.add.at(totals[variant], chosen[copies.sentence[part]], values_C[part])
        done += len(values_C) * ids_SL.shape[1]
        tell(done)
    return totals


def _chunks(sentences: Sentences) -> Iterator[np.ndarray]:
    """Indices of sentences of one length, in their order, as many as CHUNK allows."""
    lengths = np.array([len(ids) for ids in sentences.ids])
    for length in np.unique(lengths[lengths > 0]):
        same = np.flatnonzero(lengths == length)
        step = max(1, CHUNK // (2 * int(length) ** 2))
        yield from (same[at : at + step] for at in range(0, len(same), step))


@dataclass(frozen=True)
class _Copies:
    """C masked copies, first those of one variant, then as many of the other.

    ids: (C, L). at: (C,) the masked position that is read. targets: (C,) what stood there. sentence: (C,).
    """

    ids: np.ndarray
    at: np.ndarray
    targets: np.ndarray
    sentence: np.ndarray


def _masked_copies(ids_SL: np.ndarray, words_SL: np.ndarray, mask: int) -> _Copies:
    sentence, at = np.nonzero(words_SL != SPECIAL)
    rows, words = ids_SL[sentence], words_SL[sentence]
    position_L = np.arange(ids_SL.shape[1])
    alone = position_L == at[:, None]
    with_rest = (words == words_SL[sentence, at][:, None]) & (position_L >= at[:, None])
    ids = np.concatenate([np.where(alone, mask, rows), np.where(with_rest, mask, rows)]).astype(np.int32)
    return _Copies(ids, np.tile(at, 2), np.tile(ids_SL[sentence, at], 2), np.tile(sentence, 2))


def _log_probabilities(logits: Logits, copies: _Copies, batch_rows: int) -> np.ndarray:
    """(C,) float64: log p of each target; equal rows that are read at the same position are computed once."""
    C = len(copies.at)
    values_C = np.zeros(C)
    keys = np.ascontiguousarray(np.column_stack([copies.ids, copies.at.astype(np.int32)]))
    rows_C = keys.view(f"V{keys.itemsize * keys.shape[1]}").reshape(C)
    _, first_U, which_C = np.unique(rows_C, return_index=True, return_inverse=True)
    order_C = np.argsort(which_C, kind="stable")
    for begin in range(0, len(first_U), batch_rows):
        rows = first_U[begin : begin + batch_rows]
        scores_UV = logits(torch.from_numpy(copies.ids[rows]).long(), torch.from_numpy(copies.at[rows])).float()
        low, high = np.searchsorted(which_C, [begin, begin + len(rows)], sorter=order_C)
        asked = order_C[low:high]
        row = torch.from_numpy(which_C[asked] - begin).to(scores_UV.device)
        target = torch.from_numpy(copies.targets[asked]).long().to(scores_UV.device)
        found = scores_UV[row, target] - scores_UV.logsumexp(1)[row]
        values_C[asked] = found.double().cpu().numpy()
    return values_C


def check_fits(sentences: Sentences, max_positions: int, where: str) -> None:
    """Raise InputError where a sentence is longer than the model's positions."""
    if sentences.longest > max_positions:
        number = int(np.argmax([len(ids) for ids in sentences.ids])) + 1
        raise InputError(
            f"{where}: sentence {number} has {sentences.longest} tokens; the model takes at most {max_positions}, "
            "so leave it out or shorten it"
        )
