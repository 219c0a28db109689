"""Attention by torch's own variable-length flash kernel (Dao 2023, arXiv:2307.08691), on CUDA, in 16 bits.

The one kernel here that trains packed sliding windows on a GPU. It has no dropout. Its signature has grown since
torch 2.10; what this torch's has is read from it, in this file only.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from encoderkit.kernels.attention_mask import AttentionMask, Request

# The names of the arguments that this torch's kernel has: 2.10 has neither scale nor window_size.
OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)


def unavailable(request: Request) -> str | None:
    """Why this kernel cannot serve, or None."""
    if request.device.type != "cuda":
        return f"it runs on CUDA, not on {request.device.type}"
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"it runs in bf16 and fp16, not in {str(request.dtype).removeprefix('torch.')}"
    if request.alibi:
        return "it has no ALiBi slopes; use torch"
    if request.dropout:
        return "it has no dropout; set attention dropout to 0 or use torch"
    if request.deterministic:
        return "its backward pass is not proven deterministic; use torch"
    if request.head_size % 8 or request.head_size > 256:
        return f"head size {request.head_size} is not a multiple of 8 up to 256"
    if request.window and "window_size" not in OPTIONS:
        return f"varlen_attn of torch {torch.__version__} has no window_size; torch 2.11 has"
    capability = torch.cuda.get_device_capability(request.device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout_p: float, scale: float) -> Tensor:
    """Softmax attention inside each packed sequence, without dropout and ALiBi.

    q: (Tq, H, K). k, v: (Tk, H, K), the dtype of q, 16 bits. Returns (Tq, H, K).
    """
    if dropout_p:
        raise ValueError(f"varlen attention has no dropout, but dropout_p is {dropout_p}")
    if mask.alibi_slopes is not None:
        raise ValueError("varlen attention has no ALiBi slopes; use torch")
    options: dict[str, Any] = {}
    if "scale" in OPTIONS:
        options["scale"] = scale
    elif scale != q.shape[-1] ** -0.5:
        q = q * (scale * q.shape[-1] ** 0.5)  # without the option the kernel divides by sqrt(K)
    if mask.window is not None:
        options["window_size"] = (mask.window, mask.window)
    queries, keys = mask.query_segments, mask.keys
    out = varlen_attn(q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest, **options)
    assert isinstance(out, Tensor)  # a pair only where return_aux asks for one
    return out
