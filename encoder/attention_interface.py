"""encoderkit's attention kernels for any Hugging Face encoder, under the name attn_implementation="encoderkit".

transformers calls two functions. packing, once a forward pass, turns the padding mask into the places of the real
tokens; attention, in every layer, computes on those alone and lays the result back.

B sequences, L tokens of the longest with padding, T real tokens, H heads, K head size
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from encoderkit.kernels.attention import AttentionMask, Choice, attend, select_backend
from encoderkit.kernels.errors import InputError
from encoderkit.kernels.segments import Segments

NAME = "encoderkit"

# What some models hand to attention functions and no kernel here knows.
REFUSED = ("softcap", "s_aux", "position_bias", "head_mask", "cache", "block_table", "output_attentions")

_log = logging.getLogger(__name__)


def register() -> None:
    """Make attn_implementation="encoderkit" known to transformers; to repeat it does no harm.

    Served: bidirectional self-attention over padded batches, with the sliding windows of the model's own masks, with
    dropout; or over one flat row of packed sequences, told by cu_seq_lens_q as DataCollatorWithFlattening makes it.
    Padding comes out as zeros. Anything else raises InputError, which names it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, packing)


class Packing:
    """Who sees whom in one forward pass, in all layers of one attention span.

    segments: the sequences without their padding. tokens: (T,) places of the real tokens among all B * L, None where
    nothing is padded. window_tokens: a token sees |i - j| <= window_tokens.
    """

    def __init__(self, segments: Segments, tokens: Tensor | None, window_tokens: int | None) -> None:
        self.segments, self.tokens, self.window_tokens = segments, tokens, window_tokens
        self._row: tuple[Tensor, Segments] | None = None

    def row(self, starts: Tensor, key_starts: Tensor | None, batch_size: int) -> Segments:
        """The packed sequences of a flat row, read from the device once and not in every layer."""
        if self.tokens is not None:
            raise InputError("cu_seq_lens_q and an attention_mask with padding are both given; expected one of them")
        if self._row is None or self._row[0] is not starts:
            self._row = starts, _row_segments(starts, key_starts, batch_size, self.segments.total)
        return self._row[1]


def packing(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Packing:
    """transformers' mask function: what attention needs in place of a (B, 1, L, L) mask.

    attention_mask: (B, L) bool, True on real tokens, or None. local_size: the window. Raises InputError.
    """
    if not allow_is_bidirectional_skip:  # transformers says so for whole bidirectional masks and their windows only
        raise InputError(f"a causal or custom attention mask; {NAME} attention serves bidirectional encoders, use sdpa")
    if q_length != kv_length or kv_offset or not isinstance(q_offset, int) or q_offset:
        raise InputError(
            f"{q_length} queries for {kv_length} keys; {NAME} attention serves self-attention without a cache, use sdpa"
        )
    if attention_mask is None:
        return _unpadded(batch_size, q_length, local_size, device)
    keep_BL = attention_mask.cpu()  # the one wait for the device
    if keep_BL.all():
        return _unpadded(batch_size, q_length, local_size, device)
    runs_B = keep_BL[:, :1].sum(1) + (keep_BL[:, 1:] & ~keep_BL[:, :-1]).sum(1)
    if local_size is not None and (runs_B > 1).any():
        raise InputError("padding between real tokens, which would stretch the sliding window; pad at one end")
    tokens_T = keep_BL.flatten().nonzero().flatten().to(device)
    return Packing(Segments.from_lengths(keep_BL.sum(1)).to(device), tokens_T, local_size)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Packing | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    deterministic: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    alibi_slopes: tuple[float, ...] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function, on the real tokens alone.

    query, key, value: (B, H, L, K), keys and values with fewer heads where heads share them. attention_mask: what
    packing returned; None of models that make no masks. sliding_window says nothing that the mask does not.
    alibi_slopes: of each head, from EncoderkitModel. Returns (B, L, H, K), zeros at padding, and no weights.
    Raises InputError.
    """
    B, H, L, _ = query.shape
    if is_causal or (is_causal is None and getattr(module, "is_causal", attention_mask is None)):
        raise InputError(
            f"{type(module).__name__} is causal, or does not say; {NAME} attention serves encoders, use sdpa"
        )
    for name in REFUSED:
        if others.get(name) is not None and others[name] is not False:
            raise InputError(f"{name} is given; {NAME} attention does not know it, use eager")
    if key.shape[2] != L:
        raise InputError(f"{L} queries for {key.shape[2]} keys; {NAME} attention serves self-attention, use sdpa")
    if isinstance(attention_mask, Tensor):
        raise InputError(f"an attention mask of shape {tuple(attention_mask.shape)}; expected one of (batch, tokens)")
    where = _unpadded(B, L, None, query.device) if attention_mask is None else attention_mask
    if sliding_window is not None and where.window_tokens is None:
        raise InputError(f"sliding_window is {sliding_window}, but the model's mask has no window; use eager")

    if cu_seq_lens_q is None and cu_seq_lens_k is not None:
        raise InputError("cu_seq_lens_k is given without cu_seq_lens_q; expected both")
    segments = where.segments if cu_seq_lens_q is None else where.row(cu_seq_lens_q, cu_seq_lens_k, B)
    choice = _choose(
        query.device,
        query.dtype,
        query.shape[-1],
        window=where.window_tokens is not None,
        dropout=dropout > 0,
        deterministic=bool(deterministic) or torch.are_deterministic_algorithms_enabled(),
        alibi=alibi_slopes is not None,
    )
    q_THK, k_THK, v_THK = (_real_tokens(x, where.tokens) for x in (query, key, value))
    if key.shape[1] != H:
        k_THK, v_THK = (x.repeat_interleave(H // key.shape[1], dim=1) for x in (k_THK, v_THK))
    mask = AttentionMask(segments, window_tokens=where.window_tokens, alibi_slopes=alibi_slopes)
    out_THK = attend(q_THK, k_THK, v_THK, mask, dropout_p=dropout, scale=scaling, backend=choice.name)
    if where.tokens is not None:
        out_THK = out_THK.new_zeros(B * L, *out_THK.shape[1:]).index_copy(0, where.tokens, out_THK)
    return out_THK.unflatten(0, (B, L)), None


def _unpadded(batch_size: int, length: int, window_tokens: int | None, device: torch.device | str) -> Packing:
    return Packing(Segments.from_lengths([length] * batch_size).to(device), None, window_tokens)


def _real_tokens(x_BHLK: Tensor, tokens_T: Tensor | None) -> Tensor:
    """(T, H, K)."""
    x_NHK = x_BHLK.transpose(1, 2).flatten(0, 1)
    return x_NHK if tokens_T is None else x_NHK.index_select(0, tokens_T)


def _row_segments(starts: Tensor, key_starts: Tensor | None, batch_size: int, total: int) -> Segments:
    if batch_size != 1:
        raise InputError(f"cu_seq_lens_q with a batch of {batch_size} rows; expected one flat row")
    if key_starts is not None and key_starts is not starts and not torch.equal(key_starts, starts):
        raise InputError(f"cu_seq_lens_k is not cu_seq_lens_q; {NAME} attention serves self-attention, use sdpa")
    cpu_starts = starts.cpu()
    lengths_S = cpu_starts.diff()
    if cpu_starts[0] != 0 or cpu_starts[-1] != total or (lengths_S < 0).any():
        raise InputError(f"cu_seq_lens_q is {cpu_starts.tolist()}; expected 0 up to {total}, never falling")
    return Segments.from_lengths(lengths_S).to(starts.device)


@lru_cache
def _choose(device: torch.device, dtype: torch.dtype, head_size: int, **needs: bool) -> Choice:
    choice = select_backend("auto", device=device, dtype=dtype, head_size=head_size, **needs)
    _log.info("attention by %s: %s", choice.name, choice.reason)
    return choice
