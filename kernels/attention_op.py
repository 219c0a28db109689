"""Attention as one opaque operator, so that torch.compile takes a whole block in one graph.

Lengths travel as tensors and the longest as a symbol, so batches of other lengths run the same graph; the only numbers
that are baked into it are the window, the ALiBi slopes and the dropout. The backward operator computes the forward pass
again.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from encoderkit.kernels import torch_attention, xformers_attention
from encoderkit.kernels.attention_mask import AttentionMask
from encoderkit.kernels.segments import Segments

# Kernels that run inside the operator. varlen is an operator of its own; reference is for tests and is not compiled.
KERNELS: dict[str, ModuleType] = {"torch": torch_attention, "xformers": xformers_attention}

_MASK = (
    "Tensor key_lengths, Tensor key_starts, SymInt key_longest, "
    "Tensor? query_lengths, Tensor? query_starts, SymInt query_longest, "
    "int? window_tokens, float[]? alibi_slopes"
)
_REST = "float dropout_p, Tensor? seed, float scale, str backend"


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout_p: float, scale: float, backend: str
) -> Tensor:
    """attention.attend through the operator; backend: a key of KERNELS."""
    keys, queries = mask.keys, mask.queries
    return torch.ops.encoderkit.attend(
        q,
        k,
        v,
        keys.lengths,
        keys.cu_seqlens,
        keys.longest,
        None if queries is None else queries.lengths,
        None if queries is None else queries.cu_seqlens,
        0 if queries is None else queries.longest,
        mask.window_tokens,
        mask.alibi_slopes,
        dropout_p,
        torch.randint(1 << 31, ()) if dropout_p else None,
        scale,
        backend,
    )


@torch.library.custom_op(
    "encoderkit::attend",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_MASK}, {_REST}) -> Tensor",
    tags=torch.Tag.cudagraph_unsafe,  # lengths are read on the CPU, anew for each batch
)
def _attend(q, k, v, *rest):
    mask, dropout_p, seed, scale, kernel = _unpack(rest)
    return kernel.forward(q, k, v, mask, dropout_p, scale, seed)


@torch.library.custom_op(
    "encoderkit::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, {_MASK}, {_REST}) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.cudagraph_unsafe,
)
def _attend_backward(grad, q, k, v, *rest):
    mask, dropout_p, seed, scale, kernel = _unpack(rest)
    # Contiguous, as promised to the compiler below; free where it is so already.
    return tuple(x.contiguous() for x in kernel.gradients(grad, q, k, v, mask, dropout_p, scale, seed))


@_attend.register_fake
def _(q, k, v, *rest):
    return q.new_empty(q.shape)


@_attend_backward.register_fake
def _(grad, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.numbers = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = list(ctx.numbers)
    for place, tensor in zip(ctx.places, ctx.saved_tensors):
        inputs[place] = tensor
    return *torch.ops.encoderkit.attend_backward(grad, *inputs), *[None] * (len(inputs) - 3)


_attend.register_autograd(_backward, setup_context=_setup_context)


def _unpack(rest: tuple[Any, ...]) -> tuple[AttentionMask, float, int, float, ModuleType]:
    *visible, dropout_p, seed, scale, backend = rest
    key_lengths, key_starts, key_longest, query_lengths, query_starts, query_longest, window_tokens, slopes = visible
    queries = None if query_lengths is None else Segments(query_lengths, query_starts, query_longest)
    slopes = None if slopes is None else tuple(slopes)
    mask = AttentionMask(Segments(key_lengths, key_starts, key_longest), queries, window_tokens, slopes)
    return mask, dropout_p, 0 if seed is None else int(seed), scale, KERNELS[backend]
