"""Times of the kernels against the usual alternatives: `python -m encoderkit.kernels bench`.

Sequences of half to full length; everyone gets the same ones. Times are medians of runs that alternate between the
candidates, so that a slow moment of the machine hits all of them.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from encoderkit.kernels.attention import BACKENDS, AttentionMask, attend
from encoderkit.kernels.attention_mask import Request
from encoderkit.kernels.loss import masked_cross_entropy
from encoderkit.kernels.segments import Segments

HEADS, HEAD_SIZE, WINDOW = 4, 64, 64
TOKENS = {"cpu": 4096, "cuda": 65536}
EAGER_BYTES = 6 << 30
WARM_UP = 2  # passes that are not counted
MOST_SECONDS = 30.0  # of a case, after which no further pass begins
BASELINE = "padded SDPA"


def bench_attention(device: str, lengths: list[int], dtype: torch.dtype, repeats: int = 15) -> list[dict[str, Any]]:
    """One row for each length, window and kernel.

    lengths: longest sequence, tokens. Each row: forward_ms, total_ms (forward and backward), speedup (padded SDPA's
    total over this one's) and peak_mib, of tensors beside the inputs. Eager attention is left out where its scores
    alone take EAGER_BYTES.
    """
    rows: list[dict[str, Any]] = []
    for length, window in itertools.product(lengths, (None, WINDOW)):
        if window is not None and window >= length - 1:
            continue
        mask = _mask(TOKENS[device], length, window, device)
        packed = [torch.randn(mask.keys.total, HEADS, HEAD_SIZE, device=device).to(dtype) for _ in range(4)]
        padded = [_pad(x, mask.keys) for x in packed]
        candidates: dict[str, Callable[[], list[Tensor]]] = {BASELINE: _candidate(_padded_sdpa(mask, device), padded)}
        batch, _, longest, _ = padded[0].shape
        if 3 * batch * HEADS * longest**2 * dtype.itemsize < EAGER_BYTES:  # scores, weights and their gradients
            candidates["padded eager"] = _candidate(_padded_eager(mask, device), padded)
        for name, module in BACKENDS.items():
            request = Request(torch.device(device), dtype, HEAD_SIZE, window is not None, dropout=False)
            if name != "reference" and module.unavailable(request) is None:
                candidates[name] = _candidate(partial(attend, mask=mask, backend=name), packed)
        times = _alternate(candidates, repeats, device)
        for name, (forward_ms, total_ms, peak_mib) in times.items():
            speedup = times[BASELINE][1] / total_ms
            place = {"kernel": name, "length": length, "window": window, "dtype": str(dtype).removeprefix("torch.")}
            figures = {"forward_ms": forward_ms, "total_ms": total_ms, "speedup": speedup, "peak_mib": peak_mib}
            rows.append({**place, "device": device, "tokens": mask.keys.total, **figures})
    return rows


def bench_loss(
    device: str,
    dtype: torch.dtype,
    repeats: int = 7,
    targets: int = 2000,
    vocab_size: int = 8192,
    hidden_size: int = 256,
) -> list[dict[str, Any]]:
    """masked_cross_entropy against full logits and torch's own chunked loss, forward and backward."""
    V, D = vocab_size, hidden_size
    hidden = torch.randn(targets, D, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device) * 0.05).requires_grad_()
    bias = torch.zeros(V, device=device, requires_grad=True)
    target = torch.randint(0, V, (targets,), device=device)

    def full_logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(hidden, weight.to(dtype), bias.to(dtype)).float()
        return F.cross_entropy(logits, target, reduction="sum")

    def torch_chunked(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.to(dtype), bias.to(dtype)
        return F.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction="sum")

    functions: dict[str, Callable[..., Tensor]] = {
        "full logits": full_logits,
        "masked_cross_entropy": lambda h, w, b: masked_cross_entropy(h, w, b, target).loss,
    }
    if hasattr(F, "linear_cross_entropy"):
        functions["torch linear_cross_entropy"] = torch_chunked
    inputs = [hidden, weight, bias, torch.ones((), device=device)]
    times = _alternate({name: _candidate(f, inputs) for name, f in functions.items()}, repeats, device)
    return [
        {
            "kernel": name,
            "device": device,
            "dtype": str(dtype).removeprefix("torch."),
            "targets": targets,
            "total_ms": total_ms,
            "speedup": times["full logits"][1] / total_ms,
            "peak_mib": peak_mib,
        }
        for name, (_, total_ms, peak_mib) in times.items()
    ]


def _mask(tokens: int, length: int, window: int | None, device: str) -> AttentionMask:
    generator = torch.Generator().manual_seed(length)
    count = max(1, round(tokens / (0.75 * length)))
    lengths = torch.randint(length // 2, length + 1, (count,), generator=generator)
    lengths[0] = length
    return AttentionMask(Segments.from_lengths(lengths, longest=length).to(device), window_tokens=window)


def _pad(x_THK: Tensor, segments: Segments) -> Tensor:
    """(B, H, L, K), as padded models hold it."""
    return torch.nn.utils.rnn.pad_sequence(x_THK.split(segments.lengths.tolist()), batch_first=True).transpose(1, 2)


def _visible(mask: AttentionMask, device: str) -> Tensor:
    """(B, 1, 1 or L, L) bool."""
    longest = int(mask.keys.lengths.max())
    visible = (torch.arange(longest) < mask.keys.lengths[:, None])[:, None, None, :]
    if mask.window is not None:
        distance = torch.arange(longest)[:, None] - torch.arange(longest)[None, :]
        visible = visible & (distance.abs() <= mask.window) | torch.eye(longest, dtype=torch.bool)
    return visible.to(device)


def _padded_sdpa(mask: AttentionMask, device: str) -> Callable[..., Tensor]:
    visible = _visible(mask, device)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def _padded_eager(mask: AttentionMask, device: str) -> Callable[..., Tensor]:
    hidden = ~_visible(mask, device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, torch.finfo(q.dtype).min)
        return scores.softmax(-1) @ v

    return attention


def _candidate(function: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[..., list[Tensor]]:
    inputs, grad = [x.detach().requires_grad_() for x in tensors[:3]], tensors[3]

    def run(backward: bool) -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            out = function(*inputs)
        return list(torch.autograd.grad(out, inputs, grad.to(out.dtype))) if backward else [out]

    return run


def _alternate(
    candidates: dict[str, Callable[..., list[Tensor]]], repeats: int, device: str
) -> dict[str, tuple[float, float, float | None]]:
    """Median forward and forward-backward milliseconds, and peak MiB, of each candidate."""
    seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in itertools.product(candidates, (False, True))}
    peaks: dict[str, float | None] = dict.fromkeys(candidates)
    began = time.perf_counter()
    for repeat in range(repeats + WARM_UP):
        if repeat > 1 and time.perf_counter() - began > MOST_SECONDS:  # the last one of two, for very long sequences
            break
        for name, backward in seconds:
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            candidates[name](backward)
            if device == "cuda":
                torch.cuda.synchronize()
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            seconds[name, backward].append(time.perf_counter() - start)
    median = {key: 1e3 * statistics.median(values[WARM_UP:] or values[-1:]) for key, values in seconds.items()}
    if device == "cpu":
        peaks = {name: _peak_mib(run) for name, run in candidates.items()}
    return {name: (median[name, False], median[name, True], peaks[name]) for name in candidates}


def _peak_mib(run: Callable[[bool], list[Tensor]]) -> float:
    """The most memory that tensors made in a forward and backward pass take at once, on the CPU."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = run(True)
    del kept
    changes = [event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0) / 2**20
