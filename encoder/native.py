"""Our configuration and weights as transformers' native classes know them, both ways.

A mapping pairs each of our parameters with native ones; a fused matrix pairs with several, stacked by rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from encoderkit.encoder.config import EncoderConfig, LocalAttention
from encoderkit.kernels.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Names = dict[str, tuple[str, ...]]

_BERT_LAYER: Names = {
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "feed_forward.up": ("intermediate.dense",),
    "feed_forward.down": ("output.dense",),
    "feed_forward_norm": ("output.LayerNorm",),
}
_BERT: Names = {
    "encoder.embeddings.tokens": ("bert.embeddings.word_embeddings",),
    "encoder.embeddings.positions": ("bert.embeddings.position_embeddings",),
    "encoder.embeddings.token_types": ("bert.embeddings.token_type_embeddings",),
    "encoder.embeddings.norm": ("bert.embeddings.LayerNorm",),
}
_BERT_HEADS: dict[str, Names] = {
    "masked_lm": {
        "head.dense": ("cls.predictions.transform.dense",),
        "head.norm": ("cls.predictions.transform.LayerNorm",),
        "decoder_bias": ("cls.predictions.bias",),
    },
    "classifier": {"head.dense": ("bert.pooler.dense",), "classifier": ("classifier",)},
}
_MODERN_LAYER: Names = {
    "attention.qkv": ("attn.Wqkv",),
    "attention.out": ("attn.Wo",),
    "attention_norm": ("attn_norm",),
    "feed_forward.up": ("mlp.Wi",),
    "feed_forward.down": ("mlp.Wo",),
    "feed_forward_norm": ("mlp_norm",),
}
_MODERN: Names = {
    "encoder.embeddings.tokens": ("model.embeddings.tok_embeddings",),
    "encoder.embeddings.norm": ("model.embeddings.norm",),
    "encoder.final_norm": ("model.final_norm",),
}
_MODERN_HEAD = {"head.dense": ("head.dense",), "head.norm": ("head.norm",)}
_MODERN_HEADS: dict[str, Names] = {
    "masked_lm": {**_MODERN_HEAD, "decoder_bias": ("decoder.bias",)},
    "classifier": {**_MODERN_HEAD, "classifier": ("classifier",)},
}
_MAPPINGS: dict[str, tuple[Names, str, Names, dict[str, Names]]] = {
    "bert": (_BERT, "bert.encoder.layer.", _BERT_LAYER, _BERT_HEADS),
    "modern": (_MODERN, "model.layers.", _MODERN_LAYER, _MODERN_HEADS),
}
# Native weights that are copies of others: (native name, the name that it repeats).
TIED = {
    "bert": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "modern": {"decoder.weight": "model.embeddings.tok_embeddings.weight"},
}


def native_names(ours: str, architecture: str, head: str) -> tuple[str, ...]:
    """The native parameters that make up one of ours, in row order. head: masked_lm or classifier."""
    body, layer_prefix, layer, heads = _MAPPINGS[architecture]
    stem, _, leaf = ours.rpartition(".")
    if ours in heads[head]:
        return heads[head][ours]
    if ours.startswith("encoder.blocks."):
        _, _, index, part = stem.split(".", 3)
        return tuple(f"{layer_prefix}{index}.{native}.{leaf}" for native in layer[part])
    return tuple(f"{native}.{leaf}" for native in {**body, **heads[head]}[stem])


def to_native(weights: dict[str, Tensor], config: EncoderConfig, head: str) -> dict[str, Tensor]:
    """Our parameters under native names; padding rows of the token table are cut off."""
    native: dict[str, Tensor] = {}
    for ours, tensor in weights.items():
        names = native_names(ours, config.architecture, head)
        if ours == "encoder.embeddings.tokens.weight":
            tensor = tensor[: config.vocab_size]
        elif _is_rotated(ours, config):
            tensor = _reorder_pairs(tensor, config, (config.head_size // 2, 2))
        native.update({name: part.contiguous() for name, part in zip(names, tensor.chunk(len(names)))})
    return native


def from_native(
    native: dict[str, Tensor], ours: dict[str, Tensor], config: EncoderConfig, head: str
) -> dict[str, Tensor]:
    """Native parameters under our names, for each name in ours that has all its native parts."""
    loaded: dict[str, Tensor] = {}
    for name, template in ours.items():
        parts = native_names(name, config.architecture, head)
        if not all(part in native for part in parts):
            continue
        tensor = torch.cat([native[part] for part in parts])
        if name == "encoder.embeddings.tokens.weight":
            tensor = torch.cat([tensor, tensor.new_zeros(len(template) - len(tensor), *tensor.shape[1:])])
        elif _is_rotated(name, config):
            tensor = _reorder_pairs(tensor, config, (2, config.head_size // 2))
        loaded[name] = tensor
    return loaded


def _is_rotated(ours: str, config: EncoderConfig) -> bool:
    return config.positions == "rope" and ".attention.qkv." in ours


def _reorder_pairs(qkv: Tensor, config: EncoderConfig, pairs: tuple[int, int]) -> Tensor:
    """Rows of queries and keys with the pairs of each head laid out the other way.

    pairs: how they lie now, side by side as (K / 2, 2) or in two half heads as (2, K / 2).
    """
    q_k, v = qkv.tensor_split((2 * config.hidden_size,))
    return torch.cat([q_k.unflatten(0, (2 * config.num_heads, *pairs)).transpose(1, 2).flatten(0, 2), v])


def to_native_config(config: EncoderConfig) -> PreTrainedConfig:
    """transformers' configuration of the same network."""
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "pad_token_id": config.pad_token_id,
    }
    if config.architecture == "bert":
        return transformers.BertConfig(
            **shared,
            type_vocab_size=config.token_types,
            layer_norm_eps=config.norm_eps,
            hidden_dropout_prob=config.hidden_dropout,
            attention_probs_dropout_prob=config.attention_dropout,
        )
    local = config.local_attention or LocalAttention(rope_base=config.rope_base)
    kinds = ["full_attention" if config.is_global(i) else "sliding_attention" for i in range(config.num_layers)]
    return transformers.ModernBertConfig(
        **shared,
        norm_eps=config.norm_eps,
        norm_bias=config.bias,
        attention_bias=config.bias,
        mlp_bias=config.bias,
        classifier_bias=config.bias,
        attention_dropout=config.attention_dropout,
        embedding_dropout=config.hidden_dropout,
        mlp_dropout=config.hidden_dropout,
        classifier_dropout=config.hidden_dropout,
        classifier_pooling=config.pooling,
        local_attention=2 * local.window_tokens,
        layer_types=kinds,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": config.rope_base},
            "sliding_attention": {"rope_type": "default", "rope_theta": local.rope_base},
        },
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
    )


def from_native_config(native: PreTrainedConfig, where: str) -> EncoderConfig:
    """Our configuration of a native one; InputError names what has no counterpart here."""
    if native.model_type not in ("bert", "modernbert"):
        raise InputError(f"{where}: model type {native.model_type!r}; expected bert or modernbert")
    shared = {
        "vocab_size": native.vocab_size,
        "hidden_size": native.hidden_size,
        "num_layers": native.num_hidden_layers,
        "num_heads": native.num_attention_heads,
        "intermediate_size": native.intermediate_size,
        "max_positions": native.max_position_embeddings,
        "init_std": native.initializer_range,
        "pad_token_id": native.pad_token_id or 0,
    }
    if native.model_type == "bert":
        _expect(where, native, hidden_act="gelu", is_decoder=False, tie_word_embeddings=True)
        return EncoderConfig(
            architecture="bert",
            **shared,
            positions="learned",
            norm_placement="post",
            norm_eps=native.layer_norm_eps,
            feed_forward="gelu",
            bias=True,
            token_types=native.type_vocab_size,
            hidden_dropout=native.hidden_dropout_prob,
            attention_dropout=native.attention_probs_dropout_prob,
        )
    biases = {native.norm_bias, native.attention_bias, native.mlp_bias, native.classifier_bias}
    if len(biases) > 1:
        raise InputError(f"{where}: biases in some parts only; expected all of norm, attention, mlp and head, or none")
    _expect(where, native, hidden_activation="gelu", classifier_activation="gelu", decoder_bias=True)
    _expect(where, native, tie_word_embeddings=True)
    ropes = native.rope_parameters
    if any(rope.get("rope_type", "default") != "default" for rope in ropes.values()):
        raise InputError(f"{where}: rope_parameters {ropes}; expected rope_type default")
    local_layers = [i for i, kind in enumerate(native.layer_types) if kind == "sliding_attention"]
    local = None
    if local_layers:
        every = next((i for i in range(1, len(native.layer_types)) if i not in local_layers), len(native.layer_types))
        local = LocalAttention(
            window_tokens=native.local_attention // 2,
            global_every=every,
            rope_base=ropes["sliding_attention"]["rope_theta"],
        )
    config = EncoderConfig(
        architecture="modern",
        **shared,
        positions="rope",
        rope_base=ropes["full_attention"]["rope_theta"],
        local_attention=local,
        norm_placement="pre",
        norm_eps=native.norm_eps,
        feed_forward="geglu",
        bias=native.norm_bias,
        hidden_dropout=native.mlp_dropout,
        attention_dropout=native.attention_dropout,
        pooling=native.classifier_pooling,
    )
    if [i for i in range(config.num_layers) if not config.is_global(i)] != local_layers:
        raise InputError(f"{where}: layer_types {native.layer_types}; expected a global layer every n layers, from 0")
    return config


def _expect(where: str, native: PreTrainedConfig, **expected) -> None:
    for name, value in expected.items():
        if getattr(native, name, value) != value:
            raise InputError(f"{where}: {name} is {getattr(native, name)!r}; expected {value!r}")
