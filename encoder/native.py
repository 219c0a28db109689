"""Our configuration and weights as transformers' native classes know them, both ways.

A mapping pairs each of our parameters with native ones; a fused matrix pairs with several, stacked by rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from encoderkit.encoder.config import BiasSite, EncoderConfig, FeedForward, HeadActivation, LocalAttention, RopeScaling
from encoderkit.kernels.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Names = dict[str, tuple[str, ...]]
Head = Literal["masked_lm", "classifier", "choice", "tokens", "spans"]

# Our parameters whose rows are token types, padded in the model, without padding in folders.
TOKEN_TABLES = ("encoder.embeddings.tokens.weight", "decoder.weight")
_POSITION_TABLE = "encoder.positions.table.weight"


@dataclass(frozen=True)
class _Family:
    """How one of transformers' families names its parameters. tied: copies where the decoder is tied, and of what."""

    body: Names
    layer_prefix: str
    layer: Names
    heads: dict[Head, Names]
    tied: dict[str, str]
    untied: Names  # in place of those in heads, where the decoder is not tied


_BERT_LAYER: Names = {
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "feed_forward.up": ("intermediate.dense",),
    "feed_forward.down": ("output.dense",),
    "feed_forward_norm": ("output.LayerNorm",),
}


def _bert_body(prefix: str) -> Names:
    return {
        "encoder.embeddings.tokens": (f"{prefix}.embeddings.word_embeddings",),
        "encoder.positions.table": (f"{prefix}.embeddings.position_embeddings",),
        "encoder.embeddings.token_types": (f"{prefix}.embeddings.token_type_embeddings",),
        "encoder.embeddings.norm": (f"{prefix}.embeddings.LayerNorm",),
    }


_MODERN_CLASSIFIER: Names = {
    "head.dense": ("head.dense",),
    "head.norm": ("head.norm",),
    "classifier": ("classifier",),
}

_FAMILIES = {
    "bert": _Family(
        body=_bert_body("bert"),
        layer_prefix="bert.encoder.layer.",
        layer=_BERT_LAYER,
        heads={
            "masked_lm": {
                "head.dense": ("cls.predictions.transform.dense",),
                "head.norm": ("cls.predictions.transform.LayerNorm",),
                "decoder_bias": ("cls.predictions.bias",),
                "pooler.dense": ("bert.pooler.dense",),
                "pair_classifier": ("cls.seq_relationship",),
            },
            "classifier": {"pooler.dense": ("bert.pooler.dense",), "classifier": ("classifier",)},
            "choice": {"pooler.dense": ("bert.pooler.dense",), "classifier": ("classifier",)},
            "tokens": {"classifier": ("classifier",)},
            "spans": {"classifier": ("qa_outputs",)},
        },
        tied={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        untied={"decoder": ("cls.predictions.decoder",), "decoder_bias": ("cls.predictions.decoder.bias",)},
    ),
    "roberta": _Family(
        body=_bert_body("roberta"),
        layer_prefix="roberta.encoder.layer.",
        layer=_BERT_LAYER,
        heads={
            "masked_lm": {
                "head.dense": ("lm_head.dense",),
                "head.norm": ("lm_head.layer_norm",),
                "decoder_bias": ("lm_head.bias",),
                "pooler.dense": ("roberta.pooler.dense",),
            },
            "classifier": {"pooler.dense": ("classifier.dense",), "classifier": ("classifier.out_proj",)},
            "choice": {"pooler.dense": ("roberta.pooler.dense",), "classifier": ("classifier",)},
            "tokens": {"classifier": ("classifier",)},
            "spans": {"classifier": ("qa_outputs",)},
        },
        tied={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        untied={"decoder": ("lm_head.decoder",), "decoder_bias": ("lm_head.decoder.bias",)},
    ),
    "modern": _Family(
        body={
            "encoder.embeddings.tokens": ("model.embeddings.tok_embeddings",),
            "encoder.embeddings.norm": ("model.embeddings.norm",),
            "encoder.final_norm": ("model.final_norm",),
        },
        layer_prefix="model.layers.",
        layer={
            "attention.qkv": ("attn.Wqkv",),
            "attention.out": ("attn.Wo",),
            "attention_norm": ("attn_norm",),
            "feed_forward.up": ("mlp.Wi",),
            "feed_forward.down": ("mlp.Wo",),
            "feed_forward_norm": ("mlp_norm",),
        },
        heads={
            "masked_lm": {
                "head.dense": ("head.dense",),
                "head.norm": ("head.norm",),
                "decoder_bias": ("decoder.bias",),
            },
            **dict.fromkeys(("classifier", "choice", "tokens", "spans"), _MODERN_CLASSIFIER),
        },
        tied={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
        untied={"decoder": ("decoder",)},
    ),
}
_MODEL_TYPES = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "modernbert": "modern"}
_GELUS: dict[str, HeadActivation] = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_GATED: dict[str, FeedForward] = {"gelu": "geglu", "silu": "swiglu"}


def native_names(ours: str, config: EncoderConfig, head: Head) -> tuple[str, ...]:
    """The native parameters that make up one of ours, in row order; none where the family has no such part."""
    family = _FAMILIES[config.architecture]
    names = {**family.body, **family.heads[head], **({} if config.tied_decoder else family.untied)}
    if ours in names:
        return names[ours]
    stem, _, leaf = ours.rpartition(".")
    if ours.startswith("encoder.blocks."):
        _, _, index, part = stem.split(".", 3)
        return tuple(f"{family.layer_prefix}{index}.{native}.{leaf}" for native in family.layer[part])
    return tuple(f"{native}.{leaf}" for native in names.get(stem, ()))


def to_native(weights: dict[str, Tensor], config: EncoderConfig, head: Head) -> dict[str, Tensor]:
    """Our parameters under native names, copies of tied ones included; padding rows of the token table are cut off."""
    native: dict[str, Tensor] = {}
    for ours, tensor in weights.items():
        names = native_names(ours, config, head)
        if ours in TOKEN_TABLES:
            tensor = tensor[: config.vocab_size]
        elif ours == _POSITION_TABLE:
            tensor = torch.cat([tensor.new_zeros(_first_position(config), tensor.shape[1]), tensor])
        elif _is_rotated(ours, config):
            tensor = _reorder_pairs(tensor, config, (config.head_size // 2, 2))
        native.update({name: part.contiguous() for name, part in zip(names, tensor.chunk(len(names)))})
    family = _FAMILIES[config.architecture]
    if head == "masked_lm" and config.tied_decoder:
        native.update({copy: native[source] for copy, source in family.tied.items()})
    elif head == "masked_lm" and config.architecture != "modern":  # named twice; transformers reads the decoder's
        name = family.heads[head]["decoder_bias"][0]
        native[name] = native[family.untied["decoder_bias"][0]].clone()  # tensors that share memory are saved once
    return native


def from_native(
    native: dict[str, Tensor], ours: dict[str, Tensor], config: EncoderConfig, head: Head
) -> dict[str, Tensor]:
    """Native parameters under our names, for each name in ours that has all its native parts."""
    loaded: dict[str, Tensor] = {}
    for name, template in ours.items():
        parts = native_names(name, config, head)
        if not parts or not all(part in native for part in parts):
            continue
        tensor = torch.cat([native[part] for part in parts])
        if name in TOKEN_TABLES:
            tensor = pad_rows(tensor, len(template))
        elif name == _POSITION_TABLE:
            tensor = tensor[_first_position(config) :]
        elif _is_rotated(name, config):
            tensor = _reorder_pairs(tensor, config, (2, config.head_size // 2))
        loaded[name] = tensor
    return loaded


def pad_rows(table: Tensor, rows: int) -> Tensor:
    """The table with zero rows behind, up to this many."""
    return torch.cat([table, table.new_zeros(rows - len(table), *table.shape[1:])])


def _first_position(config: EncoderConfig) -> int:
    """The native row of the first token's position; RoBERTa counts from behind the padding's id."""
    return config.pad_token_id + 1 if config.architecture == "roberta" else 0


def _is_rotated(ours: str, config: EncoderConfig) -> bool:
    return config.positions == "rope" and ".attention.qkv." in ours


def _reorder_pairs(qkv: Tensor, config: EncoderConfig, pairs: tuple[int, int]) -> Tensor:
    """Rows of queries and keys with the pairs of each head laid out the other way.

    pairs: how they lie now, side by side as (K / 2, 2) or in two half heads as (2, K / 2).
    """
    q_k, v = qkv.tensor_split((2 * config.hidden_size,))
    return torch.cat([q_k.unflatten(0, (2 * config.num_heads, *pairs)).transpose(1, 2).flatten(0, 2), v])


def unlike_native(config: EncoderConfig) -> str | None:
    """What of this encoder its family's class in transformers cannot express, or None."""
    modern = config.architecture == "modern"
    wanted: dict[str, tuple[Any, ...]] = {
        "positions": ("rope",) if modern else ("learned",),
        "norm": ("layernorm",),
        "norm_placement": ("pre",) if modern else ("post",),
        "embedding_norm": (True,),
        "feed_forward": ("geglu", "swiglu") if modern else ("gelu", "gelu_tanh"),
    }
    if modern:
        wanted["pooler"] = (False,)
    else:
        wanted["biases"] = (get_args(BiasSite),)
        wanted["local_attention"] = (None,)
        wanted["pooling"] = ("cls",)
        wanted["head_activation"] = (config.feed_forward,) if config.architecture == "bert" else ("gelu",)
    if config.architecture != "bert":
        wanted["sentence_pairs"] = (False,)
    for name, values in wanted.items():
        value = getattr(config, name)
        if (set(value) != set(values[0])) if name == "biases" else (value not in values):
            return f"model.{name} is {value!r}; {config.architecture} has {' or '.join(map(repr, values))}"
    if (config.token_types == 0) != modern:
        return f"model.token_types is {config.token_types}; {config.architecture} has {'none' if modern else 'some'}"
    return None


def to_native_config(config: EncoderConfig) -> PreTrainedConfig:
    """transformers' configuration of the same network; unlike_native(config) is None."""
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions + _first_position(config),
        "initializer_range": config.init_std,
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": config.tied_decoder,
    }
    if config.architecture != "modern":
        make = transformers.BertConfig if config.architecture == "bert" else transformers.RobertaConfig
        return make(
            **shared,
            hidden_act=_key(_GELUS, config.feed_forward),
            type_vocab_size=config.token_types,
            layer_norm_eps=config.norm_eps,
            hidden_dropout_prob=config.hidden_dropout,
            attention_probs_dropout_prob=config.attention_dropout,
        )
    local = config.local_attention or LocalAttention(rope_base=config.rope_base)
    kinds = ["full_attention" if config.is_global(i) else "sliding_attention" for i in range(config.num_layers)]
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        full.update(rope_type="linear", factor=scaling.factor)
    elif scaling is not None:
        full["rope_theta"] *= scaling.factor ** (config.head_size / (config.head_size - 2))
    return transformers.ModernBertConfig(
        **shared,
        hidden_activation=_key(_GATED, config.feed_forward),
        classifier_activation=_key(_GELUS, config.head_activation),
        norm_eps=config.norm_eps,
        norm_bias="norm" in config.biases,
        attention_bias="attention" in config.biases,
        mlp_bias="feed_forward" in config.biases,
        classifier_bias="head" in config.biases,
        decoder_bias="decoder" in config.biases,
        attention_dropout=config.attention_dropout,
        embedding_dropout=config.hidden_dropout,
        mlp_dropout=config.hidden_dropout,
        classifier_dropout=config.hidden_dropout,
        classifier_pooling=config.pooling,
        local_attention=2 * local.window_tokens,
        layer_types=kinds,
        rope_parameters={
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": local.rope_base},
        },
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
    )


def from_native_config(native: PreTrainedConfig, where: str) -> EncoderConfig:
    """Our configuration of a native one; InputError names what has no counterpart here.

    classifier_dropout is left behind: task heads drop with hidden_dropout.
    """
    if native.model_type not in _MODEL_TYPES:
        raise InputError(f"{where}: model type {native.model_type!r}; expected one of {', '.join(_MODEL_TYPES)}")
    architecture = _MODEL_TYPES[native.model_type]
    shared = {
        "architecture": architecture,
        "vocab_size": native.vocab_size,
        "hidden_size": native.hidden_size,
        "num_layers": native.num_hidden_layers,
        "num_heads": native.num_attention_heads,
        "intermediate_size": native.intermediate_size,
        "init_std": native.initializer_range,
        "pad_token_id": native.pad_token_id or 0,
        "tied_decoder": native.tie_word_embeddings,
    }
    if architecture != "modern":
        _expect(where, native, is_decoder=(False,), position_embedding_type=("absolute",), hidden_act=tuple(_GELUS))
        first = (native.pad_token_id or 0) + 1 if architecture == "roberta" else 0
        activation = _GELUS[native.hidden_act]
        return EncoderConfig(
            **shared,
            max_positions=native.max_position_embeddings - first,
            positions="learned",
            norm_placement="post",
            norm_eps=native.layer_norm_eps,
            feed_forward=activation,
            head_activation=activation if architecture == "bert" else "gelu",
            biases=get_args(BiasSite),
            token_types=native.type_vocab_size,
            hidden_dropout=native.hidden_dropout_prob,
            attention_dropout=native.attention_probs_dropout_prob,
        )
    _expect(where, native, hidden_activation=tuple(_GATED), classifier_activation=tuple(_GELUS))
    if native.embedding_dropout != native.mlp_dropout:
        raise InputError(
            f"{where}: embedding_dropout is {native.embedding_dropout}, mlp_dropout {native.mlp_dropout}; expected one "
            "number for both, which serves all hidden layers here; make them equal in config.json"
        )
    full, sliding = (native.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    local_layers = [i for i, kind in enumerate(native.layer_types) if kind == "sliding_attention"]
    if full.get("rope_type", "default") not in ("default", "linear") or (
        local_layers and sliding.get("rope_type", "default") != "default"
    ):
        raise InputError(f"{where}: rope_parameters {native.rope_parameters}; expected rope_type default, or linear")
    local = None
    if local_layers:
        every = next((i for i in range(1, len(native.layer_types)) if i not in local_layers), len(native.layer_types))
        local = LocalAttention(
            window_tokens=native.local_attention // 2,
            global_every=0 if 0 in local_layers else every,
            rope_base=sliding["rope_theta"],
        )
    sites: dict[BiasSite, bool] = {
        "norm": native.norm_bias,
        "attention": native.attention_bias,
        "feed_forward": native.mlp_bias,
        "head": native.classifier_bias,
        "decoder": native.decoder_bias,
    }
    config = EncoderConfig(
        **shared,
        max_positions=native.max_position_embeddings,
        positions="rope",
        rope_base=full["rope_theta"],
        rope_scaling=RopeScaling(kind="linear", factor=full["factor"]) if full.get("rope_type") == "linear" else None,
        local_attention=local,
        norm_placement="pre",
        norm_eps=native.norm_eps,
        feed_forward=_GATED[native.hidden_activation],
        head_activation=_GELUS[native.classifier_activation],
        biases=tuple(site for site, present in sites.items() if present),
        hidden_dropout=native.mlp_dropout,
        attention_dropout=native.attention_dropout,
        init="depth_scaled",
        pooling=native.classifier_pooling,
    )
    if [i for i in range(config.num_layers) if not config.is_global(i)] != local_layers:
        raise InputError(f"{where}: layer_types {native.layer_types}; expected a global layer every n layers, from 0")
    return config


def _key(table: Mapping[str, str], value: str) -> str:
    """The first native name of ours."""
    return next(native for native, ours in table.items() if ours == value)


def _expect(where: str, native: PreTrainedConfig, **expected: tuple[Any, ...]) -> None:
    for name, values in expected.items():
        value = getattr(native, name, values[0])
        if value not in values:
            raise InputError(f"{where}: {name} is {value!r}; expected {' or '.join(map(repr, values))}")
