"""What an encoder is made of, and the presets with their published sizes. Imports no torch.

Sizes: Devlin et al. 2019 (arXiv:1810.04805); Turc et al. 2019 (arXiv:1908.08962) for bert tiny to small; Warner et al.
2024 (ModernBERT, arXiv:2412.13663) and Weller et al. 2025 (Ettin, arXiv:2507.11412) for modern.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from encoderkit.kernels.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LocalAttention:
    """Sliding-window layers between global ones: layer i is global when i % global_every == 0.

    window_tokens: a token sees |i - j| <= window_tokens. rope_base: rotary base of the local layers.
    """

    window_tokens: int = 64
    global_every: int = 3
    rope_base: float = 10_000.0


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """One encoder. Raises InputError naming the field, its value and what it may be."""

    architecture: Literal["bert", "modern"]  # the family whose parts these are, and whose native class it exports to
    vocab_size: int  # token types
    hidden_size: int  # width D
    num_layers: int
    num_heads: int  # head size is hidden_size / num_heads, a multiple of 8
    intermediate_size: int  # feed-forward width; for GeGLU the width after gating
    max_positions: int  # longest sequence, tokens
    positions: Literal["learned", "rope"]
    rope_base: float = 160_000.0  # rotary base of the global layers
    local_attention: LocalAttention | None = None
    norm_placement: Literal["pre", "post"]
    norm_eps: float = 1e-5
    feed_forward: Literal["gelu", "geglu"]
    bias: bool  # biases in linear layers and norms; the decoder has one always
    token_types: int = 0  # number of token types, 0 for none
    hidden_dropout: float = 0.0  # probability, after embeddings, attention output and feed-forward output
    attention_dropout: float = 0.0  # probability, on attention weights
    init_std: float = 0.02  # standard deviation of initial weights
    pad_token_id: int = 0
    pooling: Literal["cls", "mean"] = "cls"  # what a sequence head reads: the first token, or the mean of all

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} is {getattr(self, name)}; expected at least 1")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"model.{name} is {getattr(self, name)}; expected 0 <= p < 1")
        if self.hidden_size % self.num_heads or self.head_size % 8:
            raise InputError(
                f"model.hidden_size {self.hidden_size} over model.num_heads {self.num_heads} gives head size "
                f"{self.hidden_size / self.num_heads:g}; expected a multiple of 8"
            )
        if self.pooling == "mean" and self.architecture == "bert":
            raise InputError("model.pooling is mean; the bert architecture pools the first token, expected cls")
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise InputError(f"model.pad_token_id is {self.pad_token_id}; expected 0 <= id < {self.vocab_size}")
        for name in ("window_tokens", "global_every"):
            if self.local_attention and getattr(self.local_attention, name) < 1:
                raise InputError(f"model.{name} is {getattr(self.local_attention, name)}; expected at least 1")

    @property
    def head_size(self) -> int:
        """Width of one attention head, K."""
        return self.hidden_size // self.num_heads

    def is_global(self, layer: int) -> bool:
        """Whether this layer sees the whole sequence."""
        return self.local_attention is None or layer % self.local_attention.global_every == 0


# hidden size, layers, heads, intermediate size
SIZES: dict[str, dict[str, tuple[int, int, int, int]]] = {
    "bert": {
        "tiny": (128, 2, 2, 512),
        "mini": (256, 4, 4, 1024),
        "small": (512, 4, 8, 2048),
        "base": (768, 12, 12, 3072),
    },
    "modern": {
        "tiny": (256, 7, 4, 384),
        "mini": (384, 10, 6, 576),
        "small": (512, 19, 8, 768),
        "base": (768, 22, 12, 1152),
    },
}

_PARTS = {
    "bert": {
        "max_positions": 512,
        "positions": "learned",
        "norm_placement": "post",
        "norm_eps": 1e-12,
        "feed_forward": "gelu",
        "bias": True,
        "token_types": 2,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    },
    "modern": {
        "max_positions": 8192,
        "positions": "rope",
        "local_attention": LocalAttention(),
        "norm_placement": "pre",
        "feed_forward": "geglu",
        "bias": False,
    },
}


def preset(architecture: str, size: str, *, vocab_size: int, **overrides) -> EncoderConfig:
    """A preset at a size, with some fields replaced, those of its local attention too.

    >>> preset("modern", "tiny", vocab_size=8192, num_layers=4, window_tokens=8).local_attention.window_tokens
    8
    """
    if architecture not in SIZES:
        raise InputError(f"model.preset is {architecture!r}; expected one of {', '.join(SIZES)}")
    if size not in SIZES[architecture]:
        raise InputError(f"model.size is {size!r}; expected one of {', '.join(SIZES[architecture])}")
    hidden, layers, heads, intermediate = SIZES[architecture][size]
    parts = {**_PARTS[architecture], **overrides}
    local = {name: parts.pop(name) for name in ("window_tokens", "global_every") if name in parts}
    if local and not parts.get("local_attention"):
        name, value = next(iter(local.items()))
        raise InputError(f"model.{name} is {value}; this encoder has no local attention, use preset modern")
    if local:
        parts["local_attention"] = dataclasses.replace(parts["local_attention"], **local)
    unknown = sorted(set(parts) - {field.name for field in dataclasses.fields(EncoderConfig)})
    if unknown:
        raise InputError(f"unknown model field {', '.join(unknown)}")
    fields = {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "intermediate_size": intermediate,
        **parts,
    }
    return EncoderConfig(architecture=architecture, vocab_size=vocab_size, **fields)  # type: ignore[arg-type]
