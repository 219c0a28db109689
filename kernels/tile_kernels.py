"""Attention inside tiles of equal shape: a forward pass that says what to keep, and the backward pass from it.

MatmulSoftmax writes it out in batched products, for any dtype, device and dropout; FusedCPU is torch's flash kernel.
Both sum in a fixed order. TileKernels says which one a bucket gets.

n tiles, H heads, K head size, B = n * H, Q queries of a block (all Lq of a tile, or some), L keys: Lk of a tile
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from encoderkit.kernels.attention_mask import AttentionMask
from encoderkit.kernels.length_buckets import Bucket, Three, distances
from encoderkit.kernels.matrix_route import onednn_multiplies

SAVED_KEYS = 512  # wider tiles compute their weights again in the backward pass, or are fused
MKL_KEYS = 128  # wider tiles are fused in fp32 where MKL multiplies, or where a bucket has more scores than SCORE_BYTES
SCORE_BYTES = 32 << 20  # larger memory comes from the system anew each time, at the price of the fused kernel and more
BLOCK_SCORES = 1 << 22  # scores that a block of queries of a wide tile holds at once

Kept = tuple[Any, Any]  # tensors, or None


class FusedCPU(NamedTuple):
    """torch's own flash attention (Dao et al. 2022, arXiv:2205.14135) for CPU: no dropout.

    No ALiBi either: it would take a bias of (n, H, Lq, Lk), and subnormal weights of far keys cost it its lead at 512
    tokens.
    """

    scale: float

    def forward(self, q_BQK: Tensor, k_BLK: Tensor, v_BLK: Tensor, bucket: Bucket, *, out: Tensor) -> Kept:
        """Attention in each tile, into out (B, Lq, K); returns what backward needs."""
        q, k, v = (x.unflatten(0, (bucket.count, -1)) for x in (q_BQK, k_BLK, v_BLK))
        attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=bucket.bias, scale=self.scale
        )
        out.unflatten(0, (bucket.count, -1)).copy_(attended)
        return attended, lse

    def backward(
        self, grad_BQK: Tensor, q_BQK: Tensor, k_BLK: Tensor, v_BLK: Tensor, kept: Kept, bucket: Bucket, *, out: Three
    ) -> None:
        """Gradients of q, k and v, into out."""
        inputs = (x.unflatten(0, (bucket.count, -1)) for x in (grad_BQK, q_BQK, k_BLK, v_BLK))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, *kept, 0.0, False, attn_mask=bucket.bias, scale=self.scale
        )
        for into, grad in zip(out, grads):
            into.unflatten(0, (bucket.count, -1)).copy_(grad)


class MatmulSoftmax(NamedTuple):
    """Batched products and a softmax; wide tiles in blocks of queries, whose weights are computed twice.

    seed: of the dropout draws, so that forward and backward see the same ones.
    """

    scale: float
    dropout_p: float = 0.0
    seed: int = 0

    def forward(self, q_BQK: Tensor, k_BLK: Tensor, v_BLK: Tensor, bucket: Bucket, *, out: Tensor) -> Kept:
        """Attention in each tile, into out (B, Lq, K); returns what backward needs."""
        blocks = _blocks(q_BQK, k_BLK)
        for rows in blocks:
            softmax_BQL, keep_BQL = self._weights(q_BQK, k_BLK, rows, bucket)
            _product(self._dropped(softmax_BQL, keep_BQL), v_BLK, out[:, rows])
        return (softmax_BQL, keep_BQL) if len(blocks) == 1 else (None, None)

    def backward(
        self, grad_BQK: Tensor, q_BQK: Tensor, k_BLK: Tensor, v_BLK: Tensor, kept: Kept, bucket: Bucket, *, out: Three
    ) -> None:
        """Gradients of q, k and v, into out."""
        blocks, (dq_BQK, dk_BLK, dv_BLK) = _blocks(q_BQK, k_BLK), out
        if len(blocks) > 1:  # sums over blocks are kept wide: a wide tile has many
            wide = torch.promote_types(q_BQK.dtype, torch.float32)
            dk_BLK, dv_BLK = (x.new_zeros(x.shape, dtype=wide) for x in (k_BLK, v_BLK))
        for rows in blocks:
            softmax_BQL, keep_BQL = kept if len(blocks) == 1 else self._weights(q_BQK, k_BLK, rows, bucket)
            do_BQK = grad_BQK[:, rows]
            dweights_BQL = self._dropped_(torch.bmm(do_BQK, v_BLK.transpose(1, 2)), keep_BQL)
            dscores_BQL = torch._softmax_backward_data(dweights_BQL, softmax_BQL, -1, softmax_BQL.dtype)
            _product(dscores_BQL, k_BLK, dq_BQK[:, rows], self.scale)
            weights_BLQ = self._dropped(softmax_BQL, keep_BQL).transpose(1, 2)
            dscores_BLQ = dscores_BQL.transpose(1, 2)
            if len(blocks) == 1:
                _product(weights_BLQ, do_BQK, dv_BLK)
                _product(dscores_BLQ, q_BQK, dk_BLK, self.scale)
            else:
                dv_BLK.add_(torch.bmm(weights_BLQ, do_BQK))
                dk_BLK.add_(torch.bmm(dscores_BLQ, q_BQK[:, rows]), alpha=self.scale)
        if len(blocks) > 1:
            out[1].copy_(dk_BLK)
            out[2].copy_(dv_BLK)

    def _weights(self, q_BQK: Tensor, k_BLK: Tensor, rows: slice, bucket: Bucket) -> tuple[Tensor, Tensor | None]:
        """Attention weights of a block of queries, and which of them dropout keeps."""
        scores_BQL = q_BQK.new_empty(len(q_BQK), rows.stop - rows.start, k_BLK.shape[1])
        _product(q_BQK[:, rows], k_BLK.transpose(1, 2), scores_BQL, self.scale)
        scores_nHQL = scores_BQL.unflatten(0, (bucket.count, -1))
        if bucket.bias is not None:
            bias = bucket.bias if bucket.bias.shape[2] == 1 else bucket.bias[:, :, rows]
            scores_nHQL.add_(bias)
        if bucket.slopes is not None:
            distance_QL = distances(rows, bucket.key_length, bucket.offset, q_BQK.device).to(scores_nHQL.dtype)
            scores_nHQL.addcmul_(bucket.slopes, distance_QL, value=-1)
        softmax_BQL = torch.softmax(scores_BQL, -1)
        if bucket.slopes is not None and softmax_BQL.dtype == torch.float32 and softmax_BQL.device.type == "cpu":
            # Far keys get subnormal weights, with which CPUs reckon slowly: 1.7x the time at 512 tokens, one thread.
            torch.threshold_(softmax_BQL, torch.finfo(torch.float32).tiny, 0.0)
        if not self.dropout_p:
            return softmax_BQL, None
        # Seeded by place, because the backward pass may draw this block again.
        generator = torch.Generator(q_BQK.device)
        generator.manual_seed(self.seed + 1_000_003 * bucket.first_query + rows.start)
        keep_BQL = torch.empty(softmax_BQL.shape, dtype=torch.bool, device=q_BQK.device)
        return softmax_BQL, keep_BQL.bernoulli_(1 - self.dropout_p, generator=generator)

    def _dropped(self, weights_BQL: Tensor, keep_BQL: Tensor | None) -> Tensor:
        return weights_BQL if keep_BQL is None else self._dropped_(weights_BQL.clone(), keep_BQL)

    def _dropped_(self, weights_BQL: Tensor, keep_BQL: Tensor | None) -> Tensor:
        return weights_BQL if keep_BQL is None else weights_BQL.mul_(keep_BQL).mul_(1 / (1 - self.dropout_p))


class TileKernels(NamedTuple):
    """Which kernel a bucket gets: matmul, or fused for more keys than fused_beyond, and where scores are many.

    fused: None where it cannot serve. score_bytes: of a query and a key in all heads.
    """

    matmul: MatmulSoftmax
    fused: FusedCPU | None
    fused_beyond: int
    score_bytes: int

    @classmethod
    def choose(cls, q: Tensor, mask: AttentionMask, dropout_p: float, scale: float, seed: int) -> TileKernels:
        """For these queries and the way fp32 matrices are multiplied now.

        Forward and backward, MatmulSoftmax over FusedCPU. fp32, MKL: equal at 128 tokens, half as fast at 512 (Xeon,
        one thread); 1.1 times as fast at 128, equal at 256 and 512 (Zen 5, two threads). fp32, oneDNN, whose products
        are costly to begin and FusedCPU begins one for each tile and head: 8 to 18 times as fast at 16 to 64 tokens, 4
        at 128, 2 at 256, 1.4 at 512, 0.8 at 1,024 (Zen 5). bf16: 3.6 times at 128, 2 at 512 (Xeon).
        """
        fused, beyond = None, MKL_KEYS
        if q.device.type == "cpu" and q.dtype == torch.float32 and not dropout_p and mask.alibi_slopes is None:
            fused, beyond = FusedCPU(scale), SAVED_KEYS if onednn_multiplies() else MKL_KEYS
        return cls(MatmulSoftmax(scale, dropout_p, seed), fused, beyond, q.shape[1] * q.element_size())

    def of(self, bucket: Bucket) -> FusedCPU | MatmulSoftmax:
        """The kernel of a bucket."""
        scores = bucket.count * bucket.query_length * bucket.key_length * self.score_bytes
        beyond = MKL_KEYS if scores > SCORE_BYTES else self.fused_beyond
        return self.matmul if self.fused is None or bucket.key_length <= beyond else self.fused


def _blocks(q_BQK: Tensor, k_BLK: Tensor) -> list[slice]:
    """Runs of queries whose scores are held at once."""
    (B, Lq, _), Lk = q_BQK.shape, k_BLK.shape[1]
    step = Lq if Lk <= SAVED_KEYS else max(16, BLOCK_SCORES // (B * Lk) // 16 * 16)
    return [slice(at, min(at + step, Lq)) for at in range(0, Lq, step)]


def _product(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """scale * a b, into out; the scale is free inside the product."""
    torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)
