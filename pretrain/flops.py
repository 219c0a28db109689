"""Floating-point operations of a training step, and what the device could do at most.

Matrix products only, counted for the positions that are really computed: the last block and the decoder run on the
read positions alone, so skipping work lowers the count instead of flattering the utilisation. A backward pass costs
twice its forward pass (Kaplan et al. 2020, arXiv:2001.08361, appendix B).
"""

from __future__ import annotations

import time

import torch

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.config import EncoderConfig

# Dense peak of matrix products in 16-bit formats, FLOP/s, from the makers' data sheets.
PEAKS_16_BIT = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 125e12,
}


def forward_flops(config: EncoderConfig, batch: TokenBatch) -> float:
    """Operations of one forward pass of the masked language model over this batch; a multiply-add counts two."""
    D, width = config.hidden_size, config.intermediate_size
    T, M = len(batch.input_ids), len(batch.target_positions)
    feed_forward = D * width * (3 if config.feed_forward in ("geglu", "swiglu") else 2)
    block = 4 * D * D + feed_forward
    lengths = batch.segments.lengths.double()
    pairs = float((lengths * lengths).sum())
    local_pairs = pairs
    if config.local_attention is not None:
        window = 2 * config.local_attention.window_tokens + 1
        local_pairs = float((lengths * lengths.clamp(max=window)).sum())
    *pairs_of_layers, last_pairs = (pairs if config.is_global(n) else local_pairs for n in range(config.num_layers))
    total = sum(T * block + 2 * D * seen for seen in pairs_of_layers)
    if config.is_global(config.num_layers - 1) and config.positions != "alibi":
        read_pairs = float((batch.target_segments.lengths.double() * lengths).sum())
        total += T * 2 * D * D + M * (2 * D * D + feed_forward) + 2 * D * read_pairs
    else:  # all tokens ask, and what the read ones have seen goes on
        total += T * 3 * D * D + M * (D * D + feed_forward) + 2 * D * last_pairs
    return 2 * (total + M * (D * D + D * config.vocab_size))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most FLOP/s this device gives in this format: a data sheet's figure on GPU, measured on CPU.

    None where a GPU is not in the table.
    """
    if device.type == "cuda":
        return None if dtype == torch.float32 else PEAKS_16_BIT.get(torch.cuda.get_device_name(device))
    return _measured_peak(dtype)


def _measured_peak(dtype: torch.dtype, size: int = 1024, repeats: int = 12) -> float:
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
