"""How packed sequences are cut into tiles of equal shape, so that attention is a handful of batched products.

A tile is a run of queries and the run of keys that they see. Without a window a sequence is one tile; with a window a
long sequence is cut into blocks of queries, each with its neighbourhood of keys, so that the cost grows with its length
and not with its square. Tiles whose lengths round up to the same multiple of GRAIN share a bucket.

Tq, Tk query and key tokens, n tiles in a bucket, Lq and Lk padded tile lengths
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from encoderkit.kernels.attention_mask import AttentionMask
from encoderkit.kernels.segments import send

GRAIN = 16  # tokens; sequences of 5 to 60 cost 1.05 (bf16) to 1.3 (fp32) times as much with 32, on one CPU thread
WINDOW_BLOCK = 128  # queries in a block of a windowed sequence, at least


@dataclass(frozen=True, eq=False)
class Bucket:
    """Tiles of one shape.

    queries, keys: (n * Lq,) and (n * Lk,) tokens to gather, None where the bucket is all tokens in order. A padded slot
    repeats the last token of its own tile, so nothing crosses sequences. bias: (1 or n, 1, 1 or Lq, Lk) added to
    scores, 0 or a large negative number, None where every query sees every key. slopes: (H, 1, 1) of ALiBi; times the
    distances, which are those of every tile, they are taken from scores, None without. offset: tokens from the first
    key of a tile to its first query. padded_queries: slots, counted within the bucket, that hold no query. first_query,
    first_key: where it begins among the slots of all buckets.
    """

    count: int
    query_length: int
    key_length: int
    queries: Tensor | None
    keys: Tensor | None
    bias: Tensor | None
    slopes: Tensor | None
    offset: int
    padded_queries: Tensor | None
    first_query: int
    first_key: int


@dataclass(frozen=True, eq=False)
class Plan:
    """All buckets of a mask, and the way back from padded slots to tokens.

    query_slots, key_slots: (Tq,) and (Tk,) padded slot of each token, None where slots are the tokens. In a windowed
    sequence a key lies in several tiles and has as many slots; a token with fewer than another, or in no tile at all,
    points to the slot after the last, a row of zeros. num_query_slots, num_key_slots: that one included where used.
    """

    buckets: tuple[Bucket, ...]
    query_slots: tuple[Tensor, ...] | None
    key_slots: tuple[Tensor, ...] | None
    num_query_slots: int
    num_key_slots: int


def plan(mask: AttentionMask, device: torch.device, dtype: torch.dtype) -> Plan:
    """The tiles of this mask; equal lengths give the same object, so layers and equal batches share it."""
    keys = tuple(mask.keys.lengths.tolist())
    queries = keys if mask.queries is None else tuple(mask.queries.lengths.tolist())
    return _plan(keys, queries, mask.window, mask.alibi_slopes, device, dtype)


def distances(queries: slice, keys: int, offset: int, device: torch.device | None = None) -> Tensor:
    """(queries, keys) int64: tokens between query and key slots of a tile whose first query is key number offset."""
    at_Q = torch.arange(queries.start + offset, queries.stop + offset, device=device)
    return (at_Q[:, None] - torch.arange(keys, device=device)).abs_()


@lru_cache(maxsize=16)
def _plan(
    key_lengths: tuple[int, ...],
    query_lengths: tuple[int, ...],
    window: int | None,
    slopes: tuple[float, ...] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Plan:
    groups: dict[tuple[int, int, int, bool], list[tuple[int, int, int, int]]] = {}
    for tile in _tiles(key_lengths, query_lengths, window):
        q_start, q_length, k_start, k_length = tile
        offset = 0 if window is None else q_start - k_start
        shape = (-(-q_length // GRAIN) * GRAIN, -(-k_length // GRAIN) * GRAIN, offset, k_length % GRAIN == 0)
        groups.setdefault(shape, []).append(tile)
    slopes_H11 = None if slopes is None else send(torch.tensor(slopes, dtype=dtype), device)[:, None, None]
    return _assemble(groups, sum(query_lengths), sum(key_lengths), window, slopes_H11, device, dtype)


def _tiles(keys: tuple[int, ...], queries: tuple[int, ...], window: int | None):
    """(first query, queries, first key, keys) of each tile that has both."""
    q_start = k_start = 0
    for q_length, k_length in zip(queries, keys):
        if q_length and k_length:
            block = q_length if window is None else max(WINDOW_BLOCK, -(-window // GRAIN) * GRAIN)
            reach = k_length if window is None else window
            if q_length <= block + reach:
                yield q_start, q_length, k_start, k_length
            else:
                for at in range(0, q_length, block):
                    first, last = max(0, at - reach), min(k_length, at + block + reach)
                    yield q_start + at, min(block, q_length - at), k_start + first, last - first
        q_start, k_start = q_start + q_length, k_start + k_length


def _assemble(groups, num_queries: int, num_keys: int, window: int | None, slopes, device, dtype) -> Plan:
    buckets, query_slots, key_slots = [], _Slots(num_queries), _Slots(num_keys)
    for (Lq, Lk, offset, exact), tiles in groups.items():
        q_start_n, q_length_n, k_start_n, k_length_n = torch.tensor(tiles).unbind(1)
        alike = (q_length_n == q_length_n[0]).all() and (k_length_n == k_length_n[0]).all()
        if alike and (len(tiles) > 1 or len(groups) == 1):  # a shape of its own for each single tile would be too many
            Lq, Lk, exact = int(q_length_n[0]), int(k_length_n[0]), True
        first_query, queries_nQ, real_nQ = query_slots.add(q_start_n, q_length_n, Lq)
        first_key, keys_nK, real_nK = key_slots.add(k_start_n, k_length_n, Lk)
        hidden = torch.zeros(1, 1, 1, Lk, dtype=torch.bool) if exact else ~real_nK[:, None, None, :]
        if window is not None:
            hidden = hidden | (distances(slice(0, Lq), Lk, offset) > window)
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min / 2)
        padded = (~real_nQ).flatten().nonzero().flatten()
        buckets.append(
            Bucket(
                count=len(tiles),
                query_length=Lq,
                key_length=Lk,
                queries=_gather_index(queries_nQ, num_queries, device),
                keys=_gather_index(keys_nK, num_keys, device),
                bias=send(bias, device) if hidden.any() else None,
                slopes=slopes,
                offset=offset,
                padded_queries=send(padded, device) if len(padded) else None,
                first_query=first_query,
                first_key=first_key,
            )
        )
    query_table, num_query_slots = query_slots.table(device)
    key_table, num_key_slots = key_slots.table(device)
    return Plan(tuple(buckets), query_table, key_table, num_query_slots, num_key_slots)


class _Slots:
    """Padded slots handed out so far, and the tokens that lie in them."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens, self.num_slots = num_tokens, 0
        self.tokens: list[Tensor] = []
        self.slots: list[Tensor] = []

    def add(self, start_n: Tensor, length_n: Tensor, L: int) -> tuple[int, Tensor, Tensor]:
        """Take n * L slots; returns the first, the (n, L) tokens to gather, and which of them are real."""
        at_L = torch.arange(L)
        tokens_nL = start_n[:, None] + torch.minimum(at_L[None, :], length_n[:, None] - 1)
        real_nL = at_L[None, :] < length_n[:, None]
        first = self.num_slots
        self.tokens.append(tokens_nL[real_nL])
        self.slots.append(first + real_nL.flatten().nonzero().flatten())
        self.num_slots += tokens_nL.numel()
        return first, tokens_nL, real_nL

    def table(self, device: torch.device) -> tuple[tuple[Tensor, ...] | None, int]:
        """The slots of each token, None where slot t is token t; and the number of slots."""
        empty = torch.zeros(0, dtype=torch.int64)
        tokens, slots = torch.cat([*self.tokens, empty]), torch.cat([*self.slots, empty])
        if self.num_slots == self.num_tokens and torch.equal(tokens, slots):
            return None, self.num_slots
        counts = torch.bincount(tokens, minlength=self.num_tokens)
        copies = max(1, int(counts.max()) if len(counts) else 0)
        order = tokens.argsort(stable=True)
        copy = torch.arange(len(tokens)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        table = torch.full((copies, self.num_tokens), self.num_slots)
        table[copy, tokens[order]] = slots[order]
        return tuple(send(table, device).unbind(0)), self.num_slots + int((table == self.num_slots).any())


def _gather_index(tokens_nL: Tensor, num_tokens: int, device: torch.device) -> Tensor | None:
    tokens = tokens_nL.flatten()
    if len(tokens) == num_tokens and torch.equal(tokens, torch.arange(num_tokens)):
        return None
    return send(tokens, device)
