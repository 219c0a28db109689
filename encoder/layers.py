"""One encoder block and its parts: norm, attention, feed-forward.

Pre-norm with gated feed-forward follows Warner et al. 2024 (ModernBERT, arXiv:2412.13663); post-norm follows Devlin
et al. 2019 (arXiv:1810.04805).

T tokens, M read positions, D hidden size, H heads, K head size, I feed-forward width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoderkit.encoder.config import EncoderConfig
from encoderkit.kernels.attention import AttentionMask, attend
from encoderkit.kernels.rotary import rotate


@dataclass(frozen=True, eq=False)
class Span:
    """What all layers of one attention span share in a batch, made once per batch.

    mask: who sees whom. rotation: cosines and sines of the T tokens, (T, K / 2, 2), or None without rotary positions.
    """

    mask: AttentionMask
    rotation: Tensor | None


@dataclass(frozen=True, eq=False)
class Read:
    """The positions that are read after the last block, and what their queries need.

    positions: (M,) into the T tokens. mask: from M queries to T keys, or None where all T tokens have to ask: windows
    and slopes count distances, which queries taken out of their sequence no longer show. rotation: of the M positions.
    """

    positions: Tensor
    mask: AttentionMask | None
    rotation: Tensor | None


def _layer_norm(config: EncoderConfig) -> nn.Module:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias="norm" in config.biases)


def _rms_norm(config: EncoderConfig) -> nn.Module:
    return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)


# Ba et al. 2016 (arXiv:1607.06450); Zhang and Sennrich 2019 (arXiv:1910.07467).
NORMS: dict[str, Callable[[EncoderConfig], nn.Module]] = {"layernorm": _layer_norm, "rmsnorm": _rms_norm}


def make_norm(config: EncoderConfig) -> nn.Module:
    """The config's norm over D."""
    return NORMS[config.norm](config)


class Attention(nn.Module):
    """Bidirectional multi-head attention inside each packed sequence."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_heads, self.head_size = config.num_heads, config.head_size
        self.dropout = config.attention_dropout
        self.backend = "torch"
        bias = "attention" in config.biases
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)

    def forward(self, x_TD: Tensor, span: Span) -> Tensor:
        """All tokens attend: (T, D) to (T, D)."""
        q_THK, k_THK, v_THK = self._heads(self.qkv(x_TD), 3, span.rotation, 2)
        return self._attend(q_THK, k_THK, v_THK, span.mask)

    def forward_read(self, x_TD: Tensor, span: Span, read: Read) -> Tensor:
        """What the read positions see of all tokens: (T, D) to (M, D)."""
        if read.mask is None:
            q_THK, k_THK, v_THK = self._heads(self.qkv(x_TD), 3, span.rotation, 2)
            return self._attend(q_THK, k_THK, v_THK, span.mask, read.positions)
        D = x_TD.shape[1]
        if type(self.qkv) is nn.Linear:
            bias = self.qkv.bias
            x_MD = x_TD.index_select(0, read.positions)
            q_MD = F.linear(x_MD, self.qkv.weight[:D], None if bias is None else bias[:D])
            kv = F.linear(x_TD, self.qkv.weight[D:], None if bias is None else bias[D:])
        else:  # an adapter, or a map in fp8, has more than a weight
            q_TD, kv = self.qkv(x_TD).split([D, 2 * D], dim=1)
            q_MD = q_TD.index_select(0, read.positions)
        (q_MHK,) = self._heads(q_MD, 1, read.rotation, 1)
        k_THK, v_THK = self._heads(kv, 2, span.rotation, 1)
        return self._attend(q_MHK, k_THK, v_THK, read.mask)

    def _heads(self, projected: Tensor, parts: int, rotation: Tensor | None, rotated: int) -> tuple[Tensor, ...]:
        """The parts of a projection, (T, H, K) each, the first of them rotated."""
        stacked_TNHK = projected.view(-1, parts, self.num_heads, self.head_size)
        return stacked_TNHK.unbind(1) if rotation is None else rotate(stacked_TNHK, rotation, rotated)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, kept: Tensor | None = None) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        attended = attend(q, k, v, mask, dropout_p=dropout_p, backend=self.backend).flatten(1)
        return self.out(attended if kept is None else attended.index_select(0, kept))


Activation = Callable[[Tensor], Tensor]

# Hendrycks and Gimpel 2016 (arXiv:1606.08415), by the error function and by its approximation.
ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: EncoderConfig, activation: Activation) -> None:
        super().__init__()
        bias = "feed_forward" in config.biases
        self.activation = activation
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_TD)))


class GatedMLP(nn.Module):
    """down(activation(a) * b) with a and b the halves of up(x) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: EncoderConfig, activation: Activation) -> None:
        super().__init__()
        bias = "feed_forward" in config.biases
        self.activation = activation
        self.up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        a_TI, b_TI = self.up(x_TD).chunk(2, dim=-1)
        return self.down(self.activation(a_TI) * b_TI)


FEED_FORWARDS: dict[str, tuple[type[MLP] | type[GatedMLP], Activation]] = {
    "gelu": (MLP, ACTIVATIONS["gelu"]),
    "gelu_tanh": (MLP, ACTIVATIONS["gelu_tanh"]),
    "geglu": (GatedMLP, ACTIVATIONS["gelu"]),
    "swiglu": (GatedMLP, F.silu),
}


class _Block(nn.Module):
    """What both kinds of block hold. first: whether it reads the embeddings."""

    def __init__(self, config: EncoderConfig, *, first: bool) -> None:
        super().__init__()
        self.attention_norm = self.first_norm(config) if first else make_norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = make_norm(config)
        feed_forward, activation = FEED_FORWARDS[config.feed_forward]
        self.feed_forward = feed_forward(config, activation)
        self.dropout = nn.Dropout(config.hidden_dropout)

    @staticmethod
    def first_norm(config: EncoderConfig) -> nn.Module:
        """The attention norm of the first block."""
        return make_norm(config)

    def forward(self, hidden_TD: Tensor, span: Span) -> Tensor:
        """(T, D) to (T, D)."""
        raise TypeError("use PreNormBlock or PostNormBlock")


class PreNormBlock(_Block):
    """x + f(norm(x)), twice (Xiong et al. 2020, arXiv:2002.04745)."""

    @staticmethod
    def first_norm(config: EncoderConfig) -> nn.Module:
        return nn.Identity() if config.embedding_norm else make_norm(config)  # once is enough

    def forward(self, hidden_TD: Tensor, span: Span) -> Tensor:
        return self._feed(hidden_TD + self.dropout(self.attention(self.attention_norm(hidden_TD), span)))

    def forward_read(self, hidden_TD: Tensor, span: Span, read: Read) -> Tensor:
        """(T, D) to (M, D): the block at the read positions only."""
        attended_MD = self.attention.forward_read(self.attention_norm(hidden_TD), span, read)
        return self._feed(hidden_TD.index_select(0, read.positions) + self.dropout(attended_MD))

    def _feed(self, hidden: Tensor) -> Tensor:
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))


class PostNormBlock(_Block):
    """norm(x + f(x)), twice (Vaswani et al. 2017, arXiv:1706.03762)."""

    def forward(self, hidden_TD: Tensor, span: Span) -> Tensor:
        return self._feed(hidden_TD, self.attention(hidden_TD, span))

    def forward_read(self, hidden_TD: Tensor, span: Span, read: Read) -> Tensor:
        """(T, D) to (M, D): the block at the read positions only."""
        attended_MD = self.attention.forward_read(hidden_TD, span, read)
        return self._feed(hidden_TD.index_select(0, read.positions), attended_MD)

    def _feed(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = self.attention_norm(hidden + self.dropout(attended))
        return self.feed_forward_norm(hidden + self.dropout(self.feed_forward(hidden)))


BLOCKS: dict[str, type[PreNormBlock] | type[PostNormBlock]] = {"pre": PreNormBlock, "post": PostNormBlock}


def init_encoder(model: nn.Module) -> None:
    """Initial weights of an encoder with any head, from torch's random state; zero biases.

    normal: as in Devlin et al. 2019. truncated: cut at two standard deviations. depth_scaled: truncated, and the
    matrices that write to the residual stream, the prediction head with them, smaller by sqrt(2 * layers), as in Warner
    et al. 2024.
    """
    config: EncoderConfig = model.config  # type: ignore[assignment]
    for name, module in model.named_modules():
        std = config.init_std
        if config.init == "depth_scaled" and name.endswith(("attention.out", "feed_forward.down", "head.dense")):
            std /= math.sqrt(2 * config.num_layers)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if config.init == "normal":
                nn.init.normal_(module.weight, std=std)
            else:
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that matrix products of this tensor run in."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
