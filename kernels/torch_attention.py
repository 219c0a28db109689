"""Attention in plain torch: packing, windows, ALiBi, dropout, every dtype, CPU and GPU.

Sequences are gathered into buckets of equal length, attended to inside their tiles, and laid back. The backward pass is
written by hand, with gathers only, so nothing of size (T, T) exists and equal inputs give equal bits.

T tokens (Tq of queries, Tk of keys), H heads, K head size, n tiles of L slots in a bucket, N slots in all buckets
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from encoderkit.kernels.attention_mask import AttentionMask, Request
from encoderkit.kernels.length_buckets import Plan, plan
from encoderkit.kernels.tile_kernels import Saved, TileKernels


def unavailable(request: Request) -> str | None:
    """Why this kernel cannot serve, or None."""
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout_p: float, scale: float) -> Tensor:
    """Softmax attention inside each packed sequence.

    q: (Tq, H, K). k, v: (Tk, H, K), the dtype of q. Returns (Tq, H, K), zero where a query sees no key.
    """
    seed = int(torch.randint(1 << 31, ())) if dropout_p else 0
    tiles, kernels = plan(mask, q.device, q.dtype), TileKernels.choose(q, mask, dropout_p, scale, seed)
    return _BucketAttention.apply(q, k, v, tiles, kernels)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout_p: float, scale: float, seed: int) -> Tensor:
    """attend with given dropout draws, out of autograd's sight."""
    tiles, kernels = plan(mask, q.device, q.dtype), TileKernels.choose(q, mask, dropout_p, scale, seed)
    return _forward(q, k, v, tiles, kernels)[0]


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout_p: float, scale: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of forward's result, which is computed again."""
    tiles, kernels = plan(mask, q.device, q.dtype), TileKernels.choose(q, mask, dropout_p, scale, seed)
    return _backward(grad, _forward(q, k, v, tiles, kernels)[1], tiles, kernels)


class _BucketAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Plan, kernels: TileKernels) -> Tensor:
        ctx.tiles, ctx.kernels = tiles, kernels
        out_THK, saved = _forward(q, k, v, tiles, kernels)
        ctx.save_for_backward(*(part for kept in saved for part in kept))
        return out_THK

    @staticmethod
    def backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor | None, ...]:
        parts, count = ctx.saved_tensors, max(1, len(ctx.tiles.buckets))
        each = len(parts) // count
        saved = [parts[i * each : (i + 1) * each] for i in range(count)]
        return *_backward(grad_THK, saved, ctx.tiles, ctx.kernels), None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, tiles: Plan, kernels: TileKernels) -> tuple[Tensor, list[Saved]]:
    out_NHK, saved = _new_slots(tiles.num_query_slots, q), []
    with torch.autocast(q.device.type, enabled=False):  # q has decided the dtype
        for bucket in tiles.buckets:
            q_nLHK = _gather(q, bucket.queries, bucket.count)
            k_nLHK, v_nLHK = (_gather(x, bucket.keys, bucket.count) for x in (k, v))
            out_nLHK, kept = kernels.of(bucket).forward(q_nLHK, k_nLHK, v_nLHK, bucket)
            _lay(out_NHK, bucket.first_query, out_nLHK)
            saved.append(kept)
    return _collect(out_NHK, tiles.query_slots), saved


def _backward(grad_THK: Tensor, saved: list[Saved], tiles: Plan, kernels: TileKernels) -> tuple[Tensor, Tensor, Tensor]:
    dq_NHK = _new_slots(tiles.num_query_slots, grad_THK)
    dk_NHK, dv_NHK = (_new_slots(tiles.num_key_slots, grad_THK) for _ in range(2))
    with torch.autocast(grad_THK.device.type, enabled=False):
        for bucket, kept in zip(tiles.buckets, saved):
            grad_nLHK = _gather(grad_THK, bucket.queries, bucket.count, blank=bucket.padded_queries)
            dq_nLHK, dk_nLHK, dv_nLHK = kernels.of(bucket).backward(grad_nLHK, kept, bucket)
            _lay(dq_NHK, bucket.first_query, dq_nLHK)
            _lay(dk_NHK, bucket.first_key, dk_nLHK)
            _lay(dv_NHK, bucket.first_key, dv_nLHK)
    dk, dv = (_collect(slots, tiles.key_slots) for slots in (dk_NHK, dv_NHK))
    return _collect(dq_NHK, tiles.query_slots), dk, dv


def _gather(x_THK: Tensor, tokens: Tensor | None, count: int, blank: Tensor | None = None) -> Tensor:
    """The slots of a bucket, (n, L, H, K); slots in blank are zero."""
    if tokens is not None:
        x_THK = x_THK.index_select(0, tokens)
        if blank is not None:
            x_THK.index_fill_(0, blank, 0.0)
    return x_THK.unflatten(0, (count, x_THK.shape[0] // count))


def _new_slots(count: int, like: Tensor) -> Tensor:
    """(N, H, K), uninitialised but for the last row, which is the zero of tokens that lie in no tile."""
    slots_NHK = like.new_empty(count, *like.shape[1:])
    if count:
        slots_NHK[-1].zero_()
    return slots_NHK


def _lay(slots_NHK: Tensor, first: int, part_nLHK: Tensor) -> None:
    n, L = part_nLHK.shape[:2]
    slots_NHK[first : first + n * L].unflatten(0, (n, L)).copy_(part_nLHK)


def _collect(slots_NHK: Tensor, table: tuple[Tensor, ...] | None) -> Tensor:
    """The rows of tokens, summed over the slots that a token has."""
    if table is None:
        return slots_NHK
    first, *others = table
    total_THK = slots_NHK.index_select(0, first)
    for slots in others:
        total_THK.add_(slots_NHK.index_select(0, slots))
    return total_THK
