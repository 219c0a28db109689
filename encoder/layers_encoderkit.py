"""The layers of the encoders in modeling_encoderkit.py; torch and transformers are all they need.

This file lies beside that one in the folders of encoders that transformers has no class for. Each choice is a field of
the config.

B sequences, L tokens of the longest, D hidden size, H heads, K head size, R = K / 2 pairs
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_encoderkit import EncoderkitConfig

GELU: dict[str, Callable] = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
GATES: dict[str, Callable] = {"geglu": F.gelu, "swiglu": F.silu}

Rotation = tuple[Tensor, Tensor]  # cosines and sines, (B, L, 1, R) each


def make_norm(config: EncoderkitConfig) -> nn.Module:
    """LayerNorm, with or without bias, or RMSNorm over D."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias="norm" in config.biases)


def angles(position_ids_BL: Tensor, size: int, base: float, stretch: float = 1.0) -> Tensor:
    """position / (stretch * base^(2i / size)) for i < size / 2: (B, L, size / 2) fp32, whatever the model's dtype."""
    exponents_R = torch.arange(0, size, 2, device=position_ids_BL.device).float() / size
    return position_ids_BL.float().unsqueeze(-1) * (1.0 / base**exponents_R / stretch)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """What a score of each head loses per token of distance (Press et al. 2022, arXiv:2108.12409)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2 ** (-4 * i / power) for i in range(1, 2 * power, 2)]  # of twice as many heads, every other one
    return (*slopes, *between)[:num_heads]


class EncoderkitPositions(nn.Module):
    """How a token knows where it stands: added to embeddings, by turning queries and keys, by scores, or not at all."""

    def __init__(self, config: EncoderkitConfig) -> None:
        super().__init__()
        self.config = config
        if config.positions == "learned":
            self.table = nn.Embedding(config.max_positions, config.hidden_size)

    def embed(self, tokens_BLD: Tensor, position_ids_BL: Tensor) -> Tensor:
        """Token embeddings with their positions: (B, L, D)."""
        if self.config.positions == "learned":
            return tokens_BLD + self.table(position_ids_BL)
        if self.config.positions == "sinusoidal":  # Vaswani et al. 2017, arXiv:1706.03762, sines and cosines in turn
            D = tokens_BLD.shape[-1]
            angles_BLR = angles(position_ids_BL, D + D % 2, 10_000.0)
            waves_BLD = torch.stack([angles_BLR.sin(), angles_BLR.cos()], dim=-1).flatten(-2)[..., :D]
            return tokens_BLD * math.sqrt(D) + waves_BLD.to(tokens_BLD.dtype)
        return tokens_BLD

    def rotation(self, span: str, position_ids_BL: Tensor) -> Rotation | None:
        """What turns queries and keys in the layers of a span, where positions are rotary."""
        if self.config.positions != "rope":
            return None
        K = self.config.hidden_size // self.config.num_heads
        angles_BL1R = angles(position_ids_BL, K, *self.config.rope(span)).unsqueeze(2)
        return angles_BL1R.cos(), angles_BL1R.sin()

    def lower_scores(self, mask, position_ids_BL: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask of transformers' eager or sdpa with ALiBi in it, looking both ways: (B, H, L, L), added to scores."""
        slopes_H = torch.tensor(alibi_slopes(self.config.num_heads), device=position_ids_BL.device)
        distance_BLL = (position_ids_BL.unsqueeze(2) - position_ids_BL.unsqueeze(1)).abs()
        bias_BHLL = (-slopes_H.view(1, -1, 1, 1) * distance_BLL.unsqueeze(1)).to(dtype)
        if mask is None:
            return bias_BHLL
        visible = mask if mask.dtype == torch.bool else mask == 0
        return torch.where(visible, bias_BHLL, torch.finfo(dtype).min)


def rotate(x_BLHK: Tensor, rotation: Rotation) -> Tensor:
    """Turn pair i of every head, numbers 2i and 2i + 1, by its token's angle i (Su et al. 2021, arXiv:2104.09864)."""
    cos, sin = rotation
    first, second = x_BLHK.to(torch.promote_types(x_BLHK.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(-2).to(x_BLHK.dtype)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Attention written out: query, key and value (B, H, L, K) to (B, L, H, K), and the weights (B, H, L, L)."""
    scores_BHLL = query @ key.transpose(2, 3) * scaling
    scores_BHLL = scores_BHLL.to(torch.promote_types(query.dtype, torch.float32))  # a masked fp16 score would overflow
    if attention_mask is not None:
        scores_BHLL = scores_BHLL + attention_mask
    weights_BHLL = F.dropout(scores_BHLL.softmax(-1), dropout, training=module.training).to(value.dtype)
    return (weights_BHLL @ value).transpose(1, 2).contiguous(), weights_BHLL


class EncoderkitAttention(nn.Module):
    """Bidirectional multi-head attention, by the attention implementation of the config."""

    def __init__(self, config: EncoderkitConfig, span: str) -> None:
        super().__init__()
        self.config = config
        self.is_causal = False
        bias = "attention" in config.biases
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)
        # For implementations that do not read them from the mask; transformers' window counts the token itself.
        self.sliding_window = 1 + config.sliding_window if config.sliding_window and span == "local" else None
        self.alibi_slopes = alibi_slopes(config.num_heads) if config.positions == "alibi" else None

    def forward(self, hidden_BLD: Tensor, mask, rotation: Rotation | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        q_BLHK, k_BLHK, v_BLHK = self.qkv(hidden_BLD).unflatten(-1, (3, self.config.num_heads, -1)).unbind(-3)
        if rotation is not None:
            q_BLHK, k_BLHK = rotate(q_BLHK, rotation), rotate(k_BLHK, rotation)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended_BLHK, weights = attend(
            self,
            q_BLHK.transpose(1, 2),
            k_BLHK.transpose(1, 2),
            v_BLHK.transpose(1, 2),
            mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=q_BLHK.shape[-1] ** -0.5,
            sliding_window=self.sliding_window,
            alibi_slopes=self.alibi_slopes,
            **kwargs,
        )
        return self.out(attended_BLHK.flatten(2)), weights


class EncoderkitFeedForward(nn.Module):
    """down(activation(up(x))); gated: down(activation(a) * b), a and b the halves of up(x) (arXiv:2002.05202)."""

    def __init__(self, config: EncoderkitConfig) -> None:
        super().__init__()
        bias = "feed_forward" in config.biases
        self.gated, self.activation = config.feed_forward in GATES, {**GELU, **GATES}[config.feed_forward]
        self.up = nn.Linear(config.hidden_size, config.intermediate_size * (2 if self.gated else 1), bias=bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        up = self.up(hidden_BLD)
        if not self.gated:
            return self.down(self.activation(up))
        a, b = up.chunk(2, dim=-1)
        return self.down(self.activation(a) * b)


class EncoderkitBlock(GradientCheckpointingLayer):
    """x + f(norm(x)), twice, where norms come first; norm(x + f(x)), twice, where they come last."""

    def __init__(self, config: EncoderkitConfig, layer: int) -> None:
        super().__init__()
        self.pre_norm = config.norm_placement == "pre"
        normed_already = self.pre_norm and layer == 0 and config.embedding_norm
        self.attention_norm = nn.Identity() if normed_already else make_norm(config)
        self.attention = EncoderkitAttention(config, config.span(layer))
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = EncoderkitFeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_BLD: Tensor, mask, rotation: Rotation | None, **kwargs) -> Tensor:
        if self.pre_norm:
            attended_BLD, _ = self.attention(self.attention_norm(hidden_BLD), mask, rotation, **kwargs)
            hidden_BLD = hidden_BLD + self.dropout(attended_BLD)
            return hidden_BLD + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_BLD)))
        attended_BLD, _ = self.attention(hidden_BLD, mask, rotation, **kwargs)
        hidden_BLD = self.attention_norm(hidden_BLD + self.dropout(attended_BLD))
        return self.feed_forward_norm(hidden_BLD + self.dropout(self.feed_forward(hidden_BLD)))


class EncoderkitEmbeddings(nn.Module):
    """The token table, and token types where the config has them, normalised."""

    def __init__(self, config: EncoderkitConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_types = nn.Embedding(config.token_types, config.hidden_size) if config.token_types else None
        self.norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, placed_BLD: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Tokens with their positions to what the first block reads; token types are 0 unless given."""
        if self.token_types is not None:
            if token_type_ids is None:
                token_type_ids = torch.zeros(placed_BLD.shape[:2], dtype=torch.long, device=placed_BLD.device)
            placed_BLD = placed_BLD + self.token_types(token_type_ids)
        return self.dropout(self.norm(placed_BLD))


class EncoderkitPredictionHead(nn.Module):
    """norm(activation(dense(x))), before the decoder (Devlin et al. 2019, arXiv:1810.04805)."""

    def __init__(self, config: EncoderkitConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias="head" in config.biases)
        self.activation = GELU[config.head_activation]
        self.norm = make_norm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(hidden)))


class EncoderkitTanhPooler(nn.Module):
    """tanh(dense(x)) (Devlin et al. 2019)."""

    def __init__(self, config: EncoderkitConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BD: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_BD))
