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
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoderkit.kernels.attention_mask import AttentionMask
from encoderkit.kernels.segments import send

GRAIN = 16  # tokens; sequences of 5 to 60 cost 1.05 (bf16) to 1.3 (fp32) times as much with 32, on one CPU thread
WINDOW_BLOCK = 128  # queries in a block of a windowed sequence, at least


Integers = NDArray[np.int64]
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

    token: Integers
    is_padded: NDArray[np.bool_]
    tile: Integers
    length: Integers
    copies: Integers
    has_blank: bool
    device: torch.device
    _tables: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of_tiles(cls, runs_2n: Integers, slots_n: Integers, T: int, device: torch.device) -> Slots:
        """Of tiles one after another. runs: the first of T tokens of each, and how many it has."""
        (start_n, real_n), first_n, N = runs_2n, slots_n.cumsum() - slots_n, int(slots_n.sum())
        tile_N = np.repeat(np.arange(len(slots_n)), slots_n)
        at_N, real_N = np.arange(N) - first_n[tile_N], real_n[tile_N]
        token_N, is_padded_N = start_n[tile_N] + np.minimum(at_N, real_N - 1), at_N >= real_N
        slot_F = np.flatnonzero(~is_padded_N)
        slot_F = slot_F[token_N[slot_F].argsort(kind="stable")]
        counts_T = np.bincount(token_N[slot_F], minlength=T)
        copy_F = np.arange(len(slot_F)) - np.repeat(counts_T.cumsum() - counts_T, counts_T)
        copies_CT = np.full((counts_T.max(initial=1), T), N)
        copies_CT[copy_F, token_N[slot_F]] = slot_F
        has_blank = bool((copies_CT == N).any())
        return cls(token_N, is_padded_N, first_n[tile_N], slots_n[tile_N], copies_CT, has_blank, device)

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
            N, head_H = len(self.token), np.arange(H)
            row_NH = (self.tile * (H - 1) + np.arange(N))[:, None] + self.length[:, None] * head_H
            table: NDArray[Any]
            if name == "gather":
                table = np.empty(N * H, np.int32)
                table[row_NH] = self.token[:, None] * step + head_H
            elif name == "collect":
                rows = np.concatenate([row_NH, np.full((1, H), N * H)]).astype(np.int32)
                table = rows.take(self.copies, axis=0).reshape(len(self.copies), -1)
            else:
                table = row_NH[self.is_padded].ravel()
            self._tables[name, H, step] = send(torch.from_numpy(table), self.device)
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
    tiles_4n = _tiles(np.array(key_lengths, np.int64), np.array(query_lengths, np.int64), window)
    tiles_4n, slots_2n, edges = _by_shape(tiles_4n, window)
    queries = Slots.of_tiles(tiles_4n[:2], slots_2n[0], sum(query_lengths), device)
    alike = key_lengths == query_lengths and np.array_equal(tiles_4n[:2], tiles_4n[2:])
    keys = queries if alike else Slots.of_tiles(tiles_4n[2:], slots_2n[1], sum(key_lengths), device)
    slopes_H11 = None if slopes is None else send(torch.tensor(slopes, dtype=dtype), device)[:, None, None]
    buckets, first_query, first_key = [], 0, 0
    for first, last in pairwise(edges):
        n, (Lq, Lk) = last - first, slots_2n[:, first].tolist()
        offset = 0 if window is None else int(tiles_4n[0, first] - tiles_4n[2, first])
        hidden = keys.is_padded[first_key : first_key + n * Lk].reshape(n, 1, 1, Lk)
        if not hidden.any():
            hidden = hidden[:1]
        if window is not None:
            hidden = hidden | (distances(slice(0, Lq), Lk, offset) > window).numpy()
        bias = None
        if hidden.any():
            bias = torch.zeros(hidden.shape, dtype=dtype)
            bias = send(bias.masked_fill_(torch.from_numpy(hidden), torch.finfo(dtype).min / 2), device)
        buckets.append(Bucket(n, Lq, Lk, bias, slopes_H11, offset, first_query, first_key))
        first_query, first_key = first_query + n * Lq, first_key + n * Lk
    return Plan(tuple(buckets), queries, keys)


def _by_shape(tiles_4n: Integers, window: int | None) -> tuple[Integers, Integers, list[int]]:
    """The tiles, those of a bucket together; their slots of queries and of keys, (2, n); where buckets begin, and n."""
    q_start_n, q_length_n, k_start_n, k_length_n = tiles_4n
    offset_n = np.zeros_like(q_start_n) if window is None else q_start_n - k_start_n
    query_grain = 1 if (q_length_n == 1).all() else GRAIN  # 1: only the first token of each sequence is read
    q_slots_n, k_slots_n = -(-q_length_n // query_grain) * query_grain, -(-k_length_n // GRAIN) * GRAIN
    shapes_4n = np.stack([k_length_n % GRAIN == 0, offset_n, q_slots_n, k_slots_n])
    order = np.lexsort(shapes_4n)
    tiles_4n, shapes_4n = tiles_4n[:, order], shapes_4n[:, order]
    others = np.flatnonzero((shapes_4n[:, 1:] != shapes_4n[:, :-1]).any(axis=0)) + 1
    edges = sorted({0, *others.tolist(), len(order)})
    slots_2n = shapes_4n[2:].copy()
    for first, last in pairwise(edges):
        lengths_2n = tiles_4n[1::2, first:last]
        alike = (lengths_2n == lengths_2n[:, :1]).all()
        if alike and (last - first > 1 or len(edges) == 2):  # a shape of its own for each single tile would be too many
            slots_2n[:, first:last] = lengths_2n
    return tiles_4n, slots_2n, edges


def _tiles(keys_S: Integers, queries_S: Integers, window: int | None) -> Integers:
    """First query, queries, first key and keys of each tile that has both: (4, n)."""
    q_start_S, k_start_S = queries_S.cumsum() - queries_S, keys_S.cumsum() - keys_S
    if window is None:
        return np.stack([q_start_S, queries_S, k_start_S, keys_S])[:, (queries_S > 0) & (keys_S > 0)]
    block = max(WINDOW_BLOCK, -(-window // GRAIN) * GRAIN)
    is_cut_S = keys_S > block + window  # into blocks of queries
    blocks_S = np.where(is_cut_S, -(-keys_S // block), keys_S > 0)
    of_n = np.repeat(np.arange(len(keys_S)), blocks_S)
    start_n, length_n, is_cut_n = k_start_S[of_n], keys_S[of_n], is_cut_S[of_n]
    at_n = (np.arange(len(of_n)) - (blocks_S.cumsum() - blocks_S)[of_n]) * block
    first_n = np.maximum(0, at_n - window)
    last_n = np.where(is_cut_n, np.minimum(length_n, at_n + block + window), length_n)
    queries_n = np.where(is_cut_n, np.minimum(block, length_n - at_n), length_n)
    return np.stack([start_n + at_n, queries_n, start_n + first_n, last_n - first_n])
