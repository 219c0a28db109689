"""How packed sequences are cut into tiles of equal shape, so that attention is a handful of batched products.

A tile is a run of queries and the run of keys that they see. Without a window a sequence is one tile; with a window a
long sequence is cut into blocks of queries, each with its neighbourhood of keys, so that the cost grows with its length
and not with its square. Tiles whose lengths round up to the same multiple of GRAIN share a bucket. The tokens of a tile
lie in slots; a slot is a row for each head, and the rows of one head of a tile lie together, for batched products.

T tokens (Tq of queries, Tk of keys), H heads, K head size, n tiles in a bucket, L slots of a tile (Lq and Lk), N slots
and R = N * H rows in all buckets
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from encoderkit.kernels.attention_mask import AttentionMask
from encoderkit.kernels.segments import send

GRAIN = 16  # tokens; sequences of 5 to 60 cost 1.05 (bf16) to 1.3 (fp32) times as much with 32, on one CPU thread
WINDOW_BLOCK = 128  # queries in a block of a windowed sequence, at least


Three = tuple[Tensor, Tensor, Tensor]  # of queries, keys and values


@dataclass(frozen=True, eq=False)
class Bucket:
    """Tiles of one shape.

    bias: (1 or n, 1, 1 or Lq, Lk) added to scores, 0 or a large negative number, None where every query sees every key.
    slopes: (H, 1, 1) of ALiBi; times the distances, which are those of every tile, they are taken from scores, None
    without. offset: tokens from the first key of a tile to its first query. first_query, first_key: where its slots
    begin among those of all buckets.
    """

    count: int
    query_length: int
    key_length: int
    bias: Tensor | None
    slopes: Tensor | None
    offset: int
    first_query: int
    first_key: int

    def parts(self, rows: Three, H: int) -> Three:
        """Its parts of the rows of queries, keys and values."""
        q_RK, k_RK, v_RK = rows
        return self.queries_of(q_RK, H), self.keys_of(k_RK, H), self.keys_of(v_RK, H)

    def queries_of(self, rows_RK: Tensor, H: int) -> Tensor:
        """Its part of the rows of queries, a view: (n * H, Lq, K)."""
        return self._part(rows_RK, self.first_query, self.query_length, H)

    def keys_of(self, rows_RK: Tensor, H: int) -> Tensor:
        """Its part of the rows of keys or values, a view: (n * H, Lk, K)."""
        return self._part(rows_RK, self.first_key, self.key_length, H)

    def _part(self, rows_RK: Tensor, first: int, L: int, H: int) -> Tensor:
        return rows_RK[first * H : (first + self.count * L) * H].view(self.count * H, L, -1)


@dataclass(frozen=True, eq=False)
class Slots:
    """Where the tokens of queries, or of keys, lie among the slots of all buckets.

    token: (N,) of each slot; a padded slot repeats the last token of its own tile, so nothing crosses sequences.
    is_padded: (N,) bool. tile: (N,) slot with which its tile begins. length: (N,) slots of its tile. copies: (C, T)
    slots of each token. In a windowed sequence a key lies in several tiles; where a token has fewer copies than
    another, or none, it has slot N, which is a row of zeros. has_blank: some do. device: where x is.
    """

    token: Tensor
    is_padded: Tensor
    tile: Tensor
    length: Tensor
    copies: Tensor
    has_blank: bool
    device: torch.device
    _tables: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def gather(self, x_THK: Tensor, *, blank: bool = False) -> Tensor:
        """The rows of all slots, (R, K); padded ones are zero with blank. x: contiguous, or one of several in a row."""
        T, H, K = x_THK.shape
        step = x_THK.stride(0) // K
        if not T or x_THK.stride() != (step * K, K, 1):
            x_THK, step = x_THK.contiguous(), H
        flat = x_THK.as_strided(((T - 1) * step + H, K), (K, 1))
        rows_RK = flat.index_select(0, self._table("gather", H, step))
        if blank and len(padded := self._table("padded", H, H)):
            rows_RK.index_fill_(0, padded, 0.0)
        return rows_RK

    def new_rows(self, like_THK: Tensor) -> Tensor:
        """(R, K), or (R + 1, K) with the zeros that collect looks for; else uninitialised."""
        _, H, K = like_THK.shape
        rows_RK = like_THK.new_empty(len(self.token) * H + self.has_blank, K)
        if self.has_blank:
            rows_RK[-1].zero_()
        return rows_RK

    def collect(self, rows_RK: Tensor, H: int) -> Tensor:
        """(T, H, K): for each token the sum of the rows of new_rows that it has."""
        first, *others = self._table("collect", H, H)
        total = rows_RK.index_select(0, first)
        for copy in others:
            total.add_(rows_RK.index_select(0, copy))
        return total.view(-1, H, rows_RK.shape[1])

    def _table(self, name: Literal["gather", "collect", "padded"], H: int, step: int) -> Tensor:
        """Made once. step: rows from a token to the next.

        gather: (R,), for each row the row of the tokens that it holds. collect: (C, T * H), the other way, for each
        copy. padded: rows that hold no token.
        """
        if (name, H, step) not in self._tables:
            N, head_H = len(self.token), torch.arange(H)
            row_NH = (self.tile * H + torch.arange(N) - self.tile)[:, None] + self.length[:, None] * head_H
            if name == "gather":
                table = torch.empty(N * H, dtype=torch.int32)
                table[row_NH.flatten()] = (self.token[:, None] * step + head_H).flatten().int()
            elif name == "collect":
                table = torch.cat([row_NH, torch.full((1, H), N * H)])[self.copies].flatten(1).int()
            else:
                table = row_NH[self.is_padded].flatten()
            self._tables[name, H, step] = send(table, self.device)
        return self._tables[name, H, step]


class Plan(NamedTuple):
    """All buckets of a mask, and where queries and keys lie in them."""

    buckets: tuple[Bucket, ...]
    queries: Slots
    keys: Slots


def plan(mask: AttentionMask, device: torch.device, dtype: torch.dtype) -> Plan:
    """The tiles of this mask; equal lengths give the same object, so layers and equal batches share it."""
    keys = tuple(mask.keys.lengths.tolist())
    queries = keys if mask.queries is None else tuple(mask.queries.lengths.tolist())
    return _plan(keys, queries, mask.window, mask.alibi_slopes, device, dtype)


def distances(queries: slice, keys: int, offset: int, device: torch.device | None = None) -> Tensor:
    """(queries, keys) int64: tokens between query and key slots of a tile whose first query is key number offset."""
    at_Q = torch.arange(queries.start + offset, queries.stop + offset, device=device)
    return (at_Q[:, None] - torch.arange(keys, device=device)).abs_()


@lru_cache(maxsize=6)  # spans of a micro-batch, and of the one before
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
    buckets, queries, keys = [], _Filling(num_queries), _Filling(num_keys)
    for (Lq, Lk, offset, exact), tiles in groups.items():
        q_start_n, q_length_n, k_start_n, k_length_n = torch.tensor(tiles).unbind(1)
        alike = (q_length_n == q_length_n[0]).all() and (k_length_n == k_length_n[0]).all()
        if alike and (len(tiles) > 1 or len(groups) == 1):  # a shape of its own for each single tile would be too many
            Lq, Lk, exact = int(q_length_n[0]), int(k_length_n[0]), True
        first_query, _ = queries.add(q_start_n, q_length_n, Lq)
        first_key, real_nK = keys.add(k_start_n, k_length_n, Lk)
        hidden = torch.zeros(1, 1, 1, Lk, dtype=torch.bool) if exact else ~real_nK[:, None, None, :]
        if window is not None:
            hidden = hidden | (distances(slice(0, Lq), Lk, offset) > window)
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min / 2)
        buckets.append(
            Bucket(
                count=len(tiles),
                query_length=Lq,
                key_length=Lk,
                bias=send(bias, device) if hidden.any() else None,
                slopes=slopes,
                offset=offset,
                first_query=first_query,
                first_key=first_key,
            )
        )
    return Plan(tuple(buckets), queries.slots(device), keys.slots(device))


class _Filling:
    """Slots handed out so far, and the tokens that lie in them."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens, self.num_slots = num_tokens, 0
        none = torch.zeros(0, dtype=torch.int64)
        self.parts = [(none, none.bool(), none, none)]

    def add(self, start_n: Tensor, length_n: Tensor, L: int) -> tuple[int, Tensor]:
        """Take n * L slots; returns the first, and which of the (n, L) hold a token."""
        first, at_L = self.num_slots, torch.arange(L)
        token_nL = start_n[:, None] + torch.minimum(at_L, length_n[:, None] - 1)
        real_nL = at_L < length_n[:, None]
        tile_nL = (first + torch.arange(len(start_n)) * L)[:, None].expand_as(token_nL)
        self.parts.append(
            (token_nL.flatten(), ~real_nL.flatten(), tile_nL.flatten(), torch.full((token_nL.numel(),), L))
        )
        self.num_slots += token_nL.numel()
        return first, real_nL

    def slots(self, device: torch.device) -> Slots:
        """All of them."""
        token_N, is_padded_N, tile_N, length_N = (torch.cat(part) for part in zip(*self.parts))
        slot_F = (~is_padded_N).nonzero().flatten()
        counts_T = torch.bincount(token_N[slot_F], minlength=self.num_tokens)
        copies_CT = torch.full((max(1, int(counts_T.max()) if len(counts_T) else 0), self.num_tokens), self.num_slots)
        order = token_N[slot_F].argsort(stable=True)
        copy_F = torch.arange(len(slot_F)) - torch.repeat_interleave(counts_T.cumsum(0) - counts_T, counts_T)
        copies_CT[copy_F, token_N[slot_F][order]] = slot_F[order]
        has_blank = bool((copies_CT == self.num_slots).any())
        return Slots(token_N, is_padded_N, tile_N, length_N, copies_CT, has_blank, device)
