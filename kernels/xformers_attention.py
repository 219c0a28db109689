"""Attention by xformers' memory-efficient kernels (Lefaudeux et al. 2022), on CUDA.

Packing is a BlockDiagonalMask, never a tensor of biases. xformers is imported on first use: it takes a second, logs to
the console, and may be built for another torch.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from encoderkit.kernels.attention_mask import AttentionMask, Request
from encoderkit.kernels.errors import first_line
from encoderkit.kernels.segments import Segments


def unavailable(request: Request) -> str | None:
    """Why this kernel cannot serve, or None."""
    if request.device.type != "cuda":
        return f"it runs on CUDA, not on {request.device.type}"
    if request.window:
        return "it cannot train sliding windows over packed sequences; use varlen or torch"
    if request.alibi:
        return "it has no ALiBi slopes over packed sequences; use torch"
    if request.deterministic:
        return "its backward pass is declared non-deterministic; use torch"
    if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it has no {str(request.dtype).removeprefix('torch.')} kernels; use torch"
    if request.head_size % 8:
        return f"head size {request.head_size} is not a multiple of 8"
    try:
        fmha = _fmha()
    except Exception as error:  # a build for another torch fails in ways of its own
        return f"xformers cannot be imported: {type(error).__name__}: {first_line(error)}"
    probe = torch.empty(1, 8, 1, request.head_size, dtype=request.dtype, device=request.device)
    mask = block_diagonal(AttentionMask(Segments.from_lengths([8]).to(request.device)))
    inputs = fmha.Inputs(probe, probe, probe, attn_bias=mask, p=0.1 if request.dropout else 0.0)
    pairs = ((fmha.flash.FwOp, fmha.flash.BwOp), (fmha.cutlass.FwOp, fmha.cutlass.BwOp))
    reasons = [[reason for op in pair for reason in op.not_supported_reasons(inputs)] for pair in pairs]
    if all(reasons):
        return "; ".join(dict.fromkeys(reason for pair in reasons for reason in pair))
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout_p: float, scale: float, op: Any = None
) -> Tensor:
    """Softmax attention inside each packed sequence, without windows.

    q: (Tq, H, K). k, v: (Tk, H, K), the dtype of q. op: a pair of xformers operators instead of xformers' own choice.
    Returns (Tq, H, K).
    """
    return _fmha().memory_efficient_attention(q[None], k[None], v[None], block_diagonal(mask), dropout_p, scale, op=op)[
        0
    ]


def forward(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout_p: float, scale: float, seed: int) -> Tensor:
    """attend with given dropout draws, out of autograd's sight."""
    with _drawing(seed, dropout_p, q.device):
        return _run(q, k, v, mask, dropout_p, scale)[1].out[0]


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout_p: float, scale: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of forward's result, which is computed again."""
    with _drawing(seed, dropout_p, q.device):
        inputs, context = _run(q, k, v, mask, dropout_p, scale)
    found = _fmha()._memory_efficient_attention_backward(context, inputs, grad[None].contiguous(), op=context.op_bw)
    return found.dq[0], found.dk[0], found.dv[0]


def block_diagonal(mask: AttentionMask) -> Any:
    """xformers' mask of these segments, made from what is on the CPU already: no copy, no device sync."""
    if mask.window is not None:
        raise ValueError("xformers attention has no windows over packed sequences; use varlen or torch")
    if mask.alibi_slopes is not None:
        raise ValueError("xformers attention has no ALiBi slopes over packed sequences; use torch")
    attn_bias = _fmha().attn_bias
    keys = _seqlen_info(attn_bias, mask.keys)
    queries = keys if mask.queries is None else _seqlen_info(attn_bias, mask.queries)
    return attn_bias.BlockDiagonalMask(q_seqinfo=queries, k_seqinfo=keys)


def _seqlen_info(attn_bias: ModuleType, segments: Segments) -> Any:
    # Private, because the public from_seqlens copies the lengths to the device for every mask.
    lengths = segments.lengths.tolist()
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return attn_bias._SeqLenInfo(
        seqstart=segments.cu_seqlens,
        max_seqlen=segments.longest,
        min_seqlen=min(lengths, default=0),
        seqstart_py=starts,
    )


def _run(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout_p: float, scale: float) -> tuple[Any, Any]:
    # Private, because the public functions without autograd refuse dropout.
    fmha = _fmha()
    inputs = fmha.Inputs(q[None], k[None], v[None], attn_bias=block_diagonal(mask), p=dropout_p, scale=scale)
    return inputs, fmha._memory_efficient_attention_forward_requires_grad(inputs, op=None)[1]


class _drawing:
    """Dropout draws inside come from seed; the device's own random state is left as it was."""

    def __init__(self, seed: int, dropout_p: float, device: torch.device) -> None:
        self.seed, self.used, self.device = seed, dropout_p > 0 and device.type == "cuda", device

    def __enter__(self) -> None:
        if self.used:
            self.state = torch.cuda.get_rng_state(self.device)
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        if self.used:
            torch.cuda.set_rng_state(self.state, self.device)


@cache
def _fmha() -> ModuleType:
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from xformers.ops import fmha
    finally:
        logger.setLevel(level)
    return fmha
