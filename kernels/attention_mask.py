"""Who sees whom in a packed batch, what attention kernels are asked for, and the error when one cannot serve."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from encoderkit.kernels.errors import InputError
from encoderkit.kernels.segments import Segments


class BackendUnavailable(InputError):
    """A named attention backend cannot serve here; the message says why."""


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which keys each query of a packed batch sees.

    keys: the packed sequences. queries: the segments of the queries where they are not the keys' (same number of
    segments); a query of segment s sees all keys of segment s. window_tokens: a query sees keys at
    |i - j| <= window_tokens. alibi_slopes: one of each head; slope * |i - j| is taken from the scaled score of query i
    and key j (ALiBi, Press et al. 2022, arXiv:2108.12409, looking both ways). A window and slopes are for queries and
    keys of the same tokens.
    """

    keys: Segments
    queries: Segments | None = None
    window_tokens: int | None = None
    alibi_slopes: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.queries is not None:
            if self.window_tokens is not None:
                raise ValueError("a window needs queries and keys of the same tokens: leave out queries")
            if self.alibi_slopes is not None:
                raise ValueError("ALiBi needs queries and keys of the same tokens: leave out queries")
            if len(self.queries.lengths) != len(self.keys.lengths):
                raise ValueError(
                    f"{len(self.queries.lengths)} query segments for {len(self.keys.lengths)} key segments; "
                    "expected as many, empty ones included"
                )
        if self.window_tokens is not None and self.window_tokens < 0:
            raise ValueError(f"window_tokens is {self.window_tokens}; expected at least 0")

    @property
    def query_segments(self) -> Segments:
        """The segments of the queries."""
        return self.keys if self.queries is None else self.queries

    @property
    def window(self) -> int | None:
        """window_tokens, or None where no sequence is long enough to notice it."""
        if self.window_tokens is None or self.window_tokens >= self.keys.longest - 1:
            return None
        return self.window_tokens


@dataclass(frozen=True)
class Request:
    """What a caller needs of an attention kernel.

    head_size: K. window: a sliding window narrower than the sequences. dropout: on attention weights.
    deterministic: equal bits in every run, backward included. alibi: slopes on distances.
    """

    device: torch.device
    dtype: torch.dtype
    head_size: int
    window: bool
    dropout: bool
    deterministic: bool = False
    alibi: bool = False
