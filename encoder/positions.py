"""How a token knows where it stands: one class a scheme, and POSITIONS, the only list of them.

A scheme may add to the embeddings, turn queries and keys, or lower the scores of distant pairs; what it does not do it
inherits from NoPositions.

T tokens, N positions, D hidden size, H heads, K head size, P longest sequence
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoderkit.encoder.config import EncoderConfig
from encoderkit.kernels.alibi import alibi_slopes
from encoderkit.kernels.rotary import rotary_table


class NoPositions(nn.Module):
    """A bag of tokens, but for what windows tell; and the interface of the others."""

    slopes: tuple[float, ...] | None = None  # of each head, what a score loses per token of distance

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()

    def embed(self, tokens_TD: Tensor, position_ids: Tensor) -> Tensor:
        """Token embeddings with their positions: (T, D)."""
        return tokens_TD

    def rotation(self, span: str, position_ids: Tensor) -> Tensor | None:
        """Cosines and sines of these positions in a layer of this span, (N, K / 2, 2), or None."""
        return None


class LearnedPositions(NoPositions):
    """A vector for each position, learned and added (Devlin et al. 2019)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.max_positions, config.hidden_size)

    def embed(self, tokens_TD: Tensor, position_ids: Tensor) -> Tensor:
        return tokens_TD + self.table(position_ids)


class SinusoidalPositions(NoPositions):
    """Sines and cosines of position / 10000^(2i / D), added to the tokens times sqrt(D) (Vaswani et al. 2017)."""

    table: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        pairs = rotary_table(config.max_positions, D + D % 2, 10_000.0, torch.device("cpu")).flip(-1)  # sine first
        self.register_buffer("table", pairs.flatten(1)[:, :D].contiguous(), persistent=False)

    def embed(self, tokens_TD: Tensor, position_ids: Tensor) -> Tensor:
        return tokens_TD * math.sqrt(tokens_TD.shape[1]) + F.embedding(position_ids, self.table)


class RotaryPositions(NoPositions):
    """Queries and keys turned by their position (Su et al. 2021); a base for each span, scaling in the global one."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        K, scaling, base, stretch = config.head_size, config.rope_scaling, config.rope_base, 1.0
        if scaling is not None and scaling.kind == "linear":
            stretch = scaling.factor
        elif scaling is not None:
            base *= scaling.factor ** (K / (K - 2))
        bases = {"global": (base, stretch)}
        if config.local_attention is not None:
            bases["local"] = (config.local_attention.rope_base, 1.0)
        for span, (base, stretch) in bases.items():
            table = rotary_table(config.max_positions, K, base, torch.device("cpu"), stretch=stretch)
            self.register_buffer(span, table, persistent=False)

    def rotation(self, span: str, position_ids: Tensor) -> Tensor:
        return self.get_buffer(span).index_select(0, position_ids)


class AlibiPositions(NoPositions):
    """Scores fall with distance, to both sides alike (Press et al. 2022, arXiv:2108.12409, made symmetric)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.slopes = alibi_slopes(config.num_heads)


POSITIONS: dict[str, type[NoPositions]] = {
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
    "rope": RotaryPositions,
    "alibi": AlibiPositions,
    "none": NoPositions,
}
