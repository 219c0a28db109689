"""Where each packed sequence begins and ends.

Sequences lie end to end in one flat (T, ...) tensor, without padding between them (Krell et al. 2021,
arXiv:2107.02027). Lengths stay on the CPU, so that no kernel has to ask the device for a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Lengths of the packed sequences of one flat tensor.

    lengths: (S,) int32 on the CPU, tokens. cu_seqlens: (S + 1,) int32 on the device of the data: 0, then the running
    sum of lengths. longest: an upper bound of the lengths, tokens; a fixed one keeps compiled shapes static.
    """

    lengths: Tensor
    cu_seqlens: Tensor
    longest: int

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int] | Tensor, *, pad_to: int | None = None, longest: int | None = None
    ) -> Segments:
        """Segments of these lengths, in order; pad_to appends empty segments up to that number of segments."""
        lengths_S = torch.as_tensor(lengths, dtype=torch.int32).cpu()
        if pad_to is not None:
            if len(lengths_S) > pad_to:
                raise ValueError(f"{len(lengths_S)} segments do not fit into pad_to={pad_to}")
            lengths_S = torch.cat([lengths_S, lengths_S.new_zeros(pad_to - len(lengths_S))])
        found = int(lengths_S.max()) if len(lengths_S) else 0
        if longest is not None and found > longest:
            raise ValueError(f"a segment of {found} tokens is longer than longest={longest}")
        cu_seqlens = torch.zeros(len(lengths_S) + 1, dtype=torch.int32)
        torch.cumsum(lengths_S, 0, out=cu_seqlens[1:])
        return cls(lengths_S, cu_seqlens, found if longest is None else longest)

    def __len__(self) -> int:
        """Number of segments, empty ones included."""
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Tokens in all segments, read on the CPU."""
        return int(self.lengths.sum())

    def ids(self) -> Tensor:
        """(T,) int64 on the CPU: the segment that each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths.long())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """The same segments with cu_seqlens on device."""
        return Segments(self.lengths, self.cu_seqlens.to(device, non_blocking=non_blocking), self.longest)

    def pin_memory(self) -> Segments:
        """The same segments with cu_seqlens in memory that a GPU copies from while the host goes on."""
        return Segments(self.lengths, self.cu_seqlens.pin_memory(), self.longest)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on device; the host does not wait for the copy, which a GPU makes from pinned memory."""
    return (tensor.pin_memory() if copies_behind(device) else tensor).to(device, non_blocking=True)


def copies_behind(device: torch.device) -> bool:
    """Whether this device copies while the host goes on."""
    return device.type == "cuda"
