"""Attention in plain torch: packing, windows, ALiBi, dropout, every dtype, CPU and GPU.

Sequences are gathered into buckets of equal length, attended to inside their tiles, and gathered back. The backward
pass is written by hand, with gathers only, so nothing of size (T, T) exists and equal inputs give equal bits.

T tokens (Tq of queries, Tk of keys), H heads, K head size, R rows: one for each head of each slot in a bucket
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from encoderkit.kernels.attention_mask import AttentionMask, Request
from encoderkit.kernels.length_buckets import Plan, Three, plan
from encoderkit.kernels.tile_kernels import Kept, TileKernels


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
        ctx.save_for_backward(*saved.rows, *(part for parts in saved.of_buckets for part in parts))
        return out_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor | None, ...]:
        q_RK, k_RK, v_RK, *parts = ctx.saved_tensors
        saved = _Saved((q_RK, k_RK, v_RK), list(zip(parts[::2], parts[1::2])))
        return *_backward(grad_THK, saved, ctx.tiles, ctx.kernels), None, None


class _Saved(NamedTuple):
    """What the backward pass needs. rows: of q, k and v."""

    rows: Three
    of_buckets: list[Kept]


def _forward(q: Tensor, k: Tensor, v: Tensor, tiles: Plan, kernels: TileKernels) -> tuple[Tensor, _Saved]:
    H = q.shape[1]
    rows = tiles.queries.gather(q), tiles.keys.gather(k), tiles.keys.gather(v)
    out_RK, kept = tiles.queries.new_rows(q), []
    with torch.autocast(q.device.type, enabled=False):  # q has decided the dtype
        for bucket in tiles.buckets:
            out = bucket.queries_of(out_RK, H)
            kept.append(kernels.of(bucket).forward(*bucket.parts(rows, H), bucket, out=out))
    return tiles.queries.collect(out_RK, H), _Saved(rows, kept)


def _backward(grad_THK: Tensor, saved: _Saved, tiles: Plan, kernels: TileKernels) -> tuple[Tensor, Tensor, Tensor]:
    H = grad_THK.shape[1]
    grad_RK = tiles.queries.gather(grad_THK, blank=True)
    dq_RK, dk_RK, dv_RK = (side.new_rows(grad_THK) for side in (tiles.queries, tiles.keys, tiles.keys))
    with torch.autocast(grad_THK.device.type, enabled=False):
        for bucket, kept in zip(tiles.buckets, saved.of_buckets):
            inputs, out = bucket.parts(saved.rows, H), bucket.parts((dq_RK, dk_RK, dv_RK), H)
            kernels.of(bucket).backward(bucket.queries_of(grad_RK, H), *inputs, kept, bucket, out=out)
    return tiles.queries.collect(dq_RK, H), tiles.keys.collect(dk_RK, H), tiles.keys.collect(dv_RK, H)
