"""The configuration of BERT-style encoders as encoderkit composes them; transformers is all it needs.

It lies beside modeling_encoderkit.py in the folders of encoders that transformers has no class for.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

CHOICES = {
    "architecture": ("bert", "roberta", "modern"),
    "positions": ("learned", "sinusoidal", "rope", "alibi", "none"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_placement": ("pre", "post"),
    "feed_forward": ("gelu", "gelu_tanh", "geglu", "swiglu"),
    "head_activation": ("gelu", "gelu_tanh"),
    "init": ("normal", "truncated", "depth_scaled"),
    "pooling": ("cls", "mean"),
}


class EncoderkitConfig(PreTrainedConfig):
    """One encoder: the fields of encoderkit's EncoderConfig, under the same names. Raises ValueError naming the field.

    local_attention: None, or window_tokens, global_every and rope_base: layer i is global where i % global_every == 0,
    elsewhere a token sees |i - j| <= window_tokens; global_every 0: no layer is global. rope_scaling: None, or kind
    (linear or ntk) and factor. biases: some of norm, attention, feed_forward, head, decoder.
    """

    model_type = "encoderkit"
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "max_positions",
        "initializer_range": "init_std",
        "tie_word_embeddings": "tied_decoder",
    }

    architecture: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    positions: str = "learned"
    rope_base: float = 160_000.0
    rope_scaling: dict | None = None  # a plain field, in the place of transformers' property that means rope_parameters
    local_attention: dict | None = None
    norm: str = "layernorm"
    norm_placement: str = "post"
    embedding_norm: bool = True
    norm_eps: float = 1e-5
    feed_forward: str = "gelu"
    head_activation: str = "gelu"
    biases: tuple | list = ("norm", "attention", "feed_forward", "head", "decoder")
    token_types: int = 0
    tied_decoder: bool = True
    sentence_pairs: bool = False
    pooler: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init: str = "normal"
    init_std: float = 0.02
    pad_token_id: int = 0
    pooling: str = "cls"

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        self.biases = list(self.biases)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")

    @property
    def sliding_window(self) -> int | None:
        """The window of local layers, where transformers' masks look for it: a token sees |i - j| <= sliding_window."""
        return self.local_attention["window_tokens"] if self.local_attention else None

    def span(self, layer: int) -> str:
        """What a layer sees: global or local."""
        every = self.local_attention["global_every"] if self.local_attention else 1
        return "global" if every > 0 and layer % every == 0 else "local"

    def rope(self, span: str) -> tuple[float, float]:
        """Base of the rotary positions in a span, and by how much positions are divided; scaling in the global one."""
        K = self.hidden_size // self.num_heads
        if span == "local" and self.local_attention:
            return self.local_attention["rope_base"], 1.0
        if self.rope_scaling is None:
            return self.rope_base, 1.0
        factor = self.rope_scaling["factor"]
        if self.rope_scaling["kind"] == "linear":  # Chen et al. 2023, arXiv:2306.15595
            return self.rope_base, factor
        return self.rope_base * factor ** (K / (K - 2)), 1.0  # ntk: the slowest pair as with linear, the fastest as is
