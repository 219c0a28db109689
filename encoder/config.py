"""What an encoder is made of, and the presets with their published sizes. Imports no torch.

Sizes: Devlin et al. 2019 (arXiv:1810.04805) and Liu et al. 2019 (RoBERTa, arXiv:1907.11692) for base and large; Turc et
al. 2019 (arXiv:1908.08962) for tiny to medium; Warner et al. 2024 (ModernBERT, arXiv:2412.13663) and Weller et al. 2025
(Ettin, arXiv:2507.11412) for modern.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from encoderkit.kernels.errors import InputError

Architecture = Literal["bert", "roberta", "modern"]
Size = Literal["tiny", "mini", "small", "medium", "base", "large"]
Positions = Literal["learned", "sinusoidal", "rope", "alibi", "none"]
Norm = Literal["layernorm", "rmsnorm"]
NormPlacement = Literal["pre", "post"]
FeedForward = Literal["gelu", "gelu_tanh", "geglu", "swiglu"]
HeadActivation = Literal["gelu", "gelu_tanh"]
BiasSite = Literal["norm", "attention", "feed_forward", "head", "decoder"]
Init = Literal["normal", "truncated", "depth_scaled"]
Pooling = Literal["cls", "mean"]


@dataclass(frozen=True, kw_only=True)
class LocalAttention:
    """Sliding-window layers between global ones: layer i is global when i % global_every == 0.

    window_tokens: a token sees |i - j| <= window_tokens. global_every: 0 where no layer is global. rope_base: rotary
    base of the local layers.
    """

    window_tokens: int = 64
    global_every: int = 3
    rope_base: float = 10_000.0


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary positions stretched by factor, for sequences longer than those trained on; global layers only.

    linear: positions divided by factor (Chen et al. 2023, arXiv:2306.15595). ntk: base times factor^(K / (K - 2)), so
    that the slowest pair turns as with linear and the fastest stays as it is.
    """

    kind: Literal["linear", "ntk"] = "ntk"
    factor: float  # longest sequence over the longest that was trained on


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """One encoder. Raises InputError naming the field, its value and what it may be."""

    architecture: Architecture  # whose heads these are, and whose native class it exports to where its parts allow
    vocab_size: int  # token types
    hidden_size: int  # width D
    num_layers: int
    num_heads: int  # head size is hidden_size / num_heads, a multiple of 8
    intermediate_size: int  # feed-forward width; of gated ones the width after gating
    max_positions: int  # longest sequence, tokens
    positions: Positions
    rope_base: float = 160_000.0  # rotary base of the global layers
    rope_scaling: RopeScaling | None = None
    local_attention: LocalAttention | None = None
    norm: Norm = "layernorm"
    norm_placement: NormPlacement
    embedding_norm: bool = True  # whether the embeddings are normalised before the first block
    norm_eps: float = 1e-5
    feed_forward: FeedForward
    head_activation: HeadActivation = "gelu"  # of the prediction head
    biases: tuple[BiasSite, ...]  # which linear layers and norms have one
    token_types: int = 0  # number of token types, 0 for none
    tied_decoder: bool = True  # whether the decoder's weight is the token table
    sentence_pairs: bool = False  # a pooler and a two-way head beside the masked LM, for NSP and SOP
    pooler: bool = False  # a pooler without that head, which a checkpoint brought along and keeps
    hidden_dropout: float = 0.0  # probability, after embeddings, attention output and feed-forward output
    attention_dropout: float = 0.0  # probability, on attention weights
    init: Init = "normal"  # scheme of the initial weights: see encoderkit.encoder.layers.init_encoder
    init_std: float = 0.02  # standard deviation of initial weights
    pad_token_id: int = 0
    pooling: Pooling = "cls"  # what a sequence head reads: the first token, or the mean of all

    def __post_init__(self) -> None:
        object.__setattr__(self, "biases", tuple(self.biases))  # YAML and JSON bring lists
        for name, most in _LARGEST.items():
            _expect(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
            _expect(getattr(self, name) <= most, name, getattr(self, name), f"at most {most:,}")
        for name in ("hidden_dropout", "attention_dropout"):
            _expect(0.0 <= getattr(self, name) < 1.0, name, getattr(self, name), "0 <= p < 1")
        for name, choices in _CHOICES.items():
            _expect(getattr(self, name) in choices, name, repr(getattr(self, name)), f"one of {', '.join(choices)}")
        if self.hidden_size % self.num_heads or self.head_size % 8:
            raise InputError(
                f"model.hidden_size {self.hidden_size} over model.num_heads {self.num_heads} gives head size "
                f"{self.hidden_size / self.num_heads:g}; expected a multiple of 8"
            )
        _expect(
            0 <= self.pad_token_id < self.vocab_size, "pad_token_id", self.pad_token_id, f"0 to {self.vocab_size - 1}"
        )
        _expect(self.token_types >= 0, "token_types", self.token_types, "at least 0")
        _expect(self.token_types <= 2**16, "token_types", self.token_types, f"at most {2**16:,}")
        for name in ("init_std", "norm_eps", "rope_base"):
            _expect(0 < getattr(self, name) < math.inf, name, getattr(self, name), "a positive number")
        for site in self.biases:
            _expect(site in get_args(BiasSite), "biases", list(self.biases), f"some of {', '.join(get_args(BiasSite))}")
        if self.norm == "rmsnorm" and "norm" in self.biases:
            raise InputError("model.biases has norm, but rmsnorm has no bias; leave norm out of model.biases")
        if self.rope_scaling is not None:
            factor = self.rope_scaling.factor
            _expect(1 <= factor < math.inf, "rope_scaling.factor", factor, "at least 1")
            _expect(
                self.rope_scaling.kind in ("linear", "ntk"),
                "rope_scaling.kind",
                self.rope_scaling.kind,
                "linear or ntk",
            )
            if self.positions != "rope":
                raise InputError(f"model.rope_scaling is set, but model.positions is {self.positions}; expected rope")
        if self.local_attention is not None:
            local = self.local_attention
            _expect(local.window_tokens >= 1, "window_tokens", local.window_tokens, "at least 1")
            _expect(local.global_every >= 0, "global_every", local.global_every, "at least 0")
            _expect(0 < local.rope_base < math.inf, "local_rope_base", local.rope_base, "a positive number")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EncoderConfig:
        """The config of a mapping such as dataclasses.asdict gives, or JSON of it, which anybody may have written.

        Raises InputError naming a field that is missing, unknown or of another type.
        """
        return _read(cls, {"pooler": False, **fields}, "model")  # runs began to note it after the other fields

    @property
    def head_size(self) -> int:
        """Width of one attention head, K."""
        return self.hidden_size // self.num_heads

    def is_global(self, layer: int) -> bool:
        """Whether this layer sees the whole sequence."""
        if self.local_attention is None:
            return True
        every = self.local_attention.global_every
        return every > 0 and layer % every == 0

    @property
    def has_global_layers(self) -> bool:
        """Whether some layer sees the whole sequence."""
        return self.is_global(0)

    @property
    def has_local_layers(self) -> bool:
        """Whether some layer sees a window."""
        return not all(self.is_global(layer) for layer in range(self.num_layers))


def _read(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """The dataclass with these values, as JSON brings them: nested ones as mappings, tuples as lists."""
    hints = get_type_hints(kind)
    if values.keys() != hints.keys():
        raise InputError(f"{where} has the fields {', '.join(values)}; expected {', '.join(hints)}")
    return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, choices = get_origin(hint), get_args(hint)
    if origin is UnionType:  # a nested dataclass or None
        if value is None:
            return None
        hint = choices[0]
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _read(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_value(choices[0], item, where) for item in value)
    if origin is Literal and isinstance(value, str) and value in choices:
        return value
    if type(value) in {float: (int, float), int: (int,), bool: (bool,)}.get(hint, ()):
        return value
    expected = f"one of {', '.join(choices)}" if origin is Literal else getattr(hint, "__name__", hint)
    raise InputError(f"{where} is {value!r}; expected {expected}")


_LARGEST = {  # beyond every encoder there is; what fits a machine's memory is looked at where a model is built
    "vocab_size": 2**31,
    "hidden_size": 2**20,
    "num_layers": 10_000,
    "num_heads": 2**17,
    "intermediate_size": 2**22,
    "max_positions": 2**26,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "architecture": get_args(Architecture),
    "positions": get_args(Positions),
    "norm": get_args(Norm),
    "norm_placement": get_args(NormPlacement),
    "feed_forward": get_args(FeedForward),
    "head_activation": get_args(HeadActivation),
    "init": get_args(Init),
    "pooling": get_args(Pooling),
}


def _expect(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InputError(f"model.{name} is {value}; expected {allowed}")


_TURC = {
    "tiny": (128, 2, 2, 512),
    "mini": (256, 4, 4, 1024),
    "small": (512, 4, 8, 2048),
    "medium": (512, 8, 8, 2048),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}
# hidden size, layers, heads, intermediate size
SIZES: dict[str, dict[str, tuple[int, int, int, int]]] = {
    "bert": _TURC,
    "roberta": _TURC,
    "modern": {
        "tiny": (256, 7, 4, 384),
        "mini": (384, 10, 6, 576),
        "small": (512, 19, 8, 768),
        "medium": (640, 20, 10, 960),  # no paper's: between its neighbours, in their proportions
        "base": (768, 22, 12, 1152),
        "large": (1024, 28, 16, 2624),
    },
}

_BERT_PARTS = {
    "max_positions": 512,
    "positions": "learned",
    "norm_placement": "post",
    "norm_eps": 1e-12,
    "feed_forward": "gelu",
    "biases": get_args(BiasSite),
    "token_types": 2,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
}
_PARTS = {
    "bert": _BERT_PARTS,
    "roberta": {**_BERT_PARTS, "norm_eps": 1e-5, "token_types": 1},
    "modern": {
        "max_positions": 8192,
        "positions": "rope",
        "local_attention": LocalAttention(),
        "norm_placement": "pre",
        "feed_forward": "geglu",
        "biases": ("decoder",),
        "init": "depth_scaled",
    },
}
_LOCAL = {"window_tokens": "window_tokens", "global_every": "global_every", "local_rope_base": "rope_base"}


def preset(architecture: str, size: str, *, vocab_size: int, **overrides) -> EncoderConfig:
    """A preset at a size, with some fields replaced; window_tokens, global_every, local_rope_base: of its local layers.

    Raises InputError for a field that is unknown, out of range, or would change nothing.

    >>> preset("modern", "tiny", vocab_size=8192, num_layers=4, window_tokens=8).local_attention.window_tokens
    8
    """
    _expect(architecture in SIZES, "preset", repr(architecture), f"one of {', '.join(SIZES)}")
    _expect(size in SIZES[architecture], "size", repr(size), f"one of {', '.join(SIZES[architecture])}")
    hidden, layers, heads, intermediate = SIZES[architecture][size]
    fields = {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "intermediate_size": intermediate,
        **_PARTS[architecture],
        **overrides,
    }
    local = {field: fields.pop(name) for name, field in _LOCAL.items() if name in fields}
    if "window_tokens" in local or "global_every" in local or (local and fields.get("local_attention")):
        fields["local_attention"] = dataclasses.replace(fields.get("local_attention") or LocalAttention(), **local)
        if fields["local_attention"].global_every == 1:
            fields["local_attention"] = None
    known = [field.name for field in dataclasses.fields(EncoderConfig)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise InputError(f"unknown model field {', '.join(unknown)}; {hint}")
    config = EncoderConfig(architecture=architecture, vocab_size=vocab_size, **fields)  # type: ignore[arg-type]
    if overrides.get("window_tokens") is not None and not config.has_local_layers:
        raise InputError(
            f"model.window_tokens is {overrides['window_tokens']}, but each of the {config.num_layers} layers sees the "
            "whole sequence; leave it out, or set model.global_every 0 or above 1"
        )
    check_rotary(config, overrides)
    return config


def check_rotary(config: EncoderConfig, given: Mapping[str, Any]) -> None:
    """Raise InputError for a rotary field of given that this encoder does not use."""
    for name in ("rope_base", "rope_scaling", "local_rope_base"):
        if given.get(name) is None:
            continue
        if config.positions != "rope":
            raise InputError(f"model.{name} is set, but model.positions is {config.positions}; leave it out")
        if name == "local_rope_base" and not config.has_local_layers:
            raise InputError(f"model.{name} is set, but no layer has a window; leave it out, or set window_tokens")
        if name != "local_rope_base" and not config.has_global_layers:
            raise InputError(f"model.{name} is set, but every layer has a window; it is for global ones, leave it out")
