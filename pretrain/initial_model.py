"""The model that a run begins with: a preset with random weights, or a pretrained one made to fit tokenizer and length.

V vocabulary, P positions, D hidden size
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from encoderkit.encoder.checkpoint import load_masked_lm
from encoderkit.encoder.config import EncoderConfig, check_rotary
from encoderkit.encoder.model import MaskedLM, padded_rows
from encoderkit.encoder.native import pad_rows
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.host_memory import ram_bytes
from encoderkit.pretrain.memory import empty_model
from encoderkit.pretrain.settings import Model, PretrainSettings
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.token_vectors import unigram_bias
from encoderkit.pretrain.tokenizer import ROLES, check_vocabulary, load_tokenizer, num_ids


def plan_model(
    settings: PretrainSettings, store: Store, tokenizer: Any
) -> tuple[EncoderConfig, Callable[[], MaskedLM]]:
    """What the model will be, and what builds it; tokenizer: the store's. Random weights are drawn from the seed.

    Raises InputError where the settings do not fit together, or a pretrained model does not fit the tokenizer.
    """
    asked = _with_pair_head(settings)
    if asked.init_from is not None:
        model, drawn = load_masked_lm(asked.init_from, head_seed=settings.seed)
        old = load_tokenizer(asked.init_from)
        _check_own_tokenizer(asked.init_from, old, model.config)
        check_tokenizer(asked.init_from, old, tokenizer)
        if settings.pairs != "none" and not (model.config.sentence_pairs and model.config.token_types >= 2):
            raise InputError(
                f"pairs is {settings.pairs}, but model.init_from {asked.init_from} has no sentence-pair head or fewer "
                "than 2 token types; set pairs none, or go on with a BERT that has its next-sentence head"
            )
        if "decoder_bias" in drawn and model.decoder_bias is not None:  # a head that knows nothing
            counted = unigram_bias(store)[: len(model.decoder_bias)]
            model.decoder_bias.data[: len(counted)] = counted
        config = continued_config(model.config, asked, num_ids(tokenizer))
        return config, lambda: continue_from(model, config, old, tokenizer)

    config = asked.encoder_config(vocab_size=store.vocab_size, pad_token_id=tokenizer.pad_token_id)

    def build() -> MaskedLM:
        torch.manual_seed(settings.seed)
        return MaskedLM(config)

    return config, build


def check_memory(config: EncoderConfig) -> None:
    """Raise InputError where not even the weights fit the host's memory, in which they are drawn."""
    model = empty_model(config)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if needed > ram_bytes():
        raise InputError(
            f"a model of model.hidden_size {config.hidden_size:,} and model.num_layers {config.num_layers:,} has "
            f"{needed / 2**30:,.1f} GiB of weights; this machine has {ram_bytes() / 2**30:,.1f} GiB of memory"
        )


def _with_pair_head(settings: PretrainSettings) -> Model:
    """The model's settings with what sentence pairs need: their head, and two token types at least."""
    model = settings.model
    if settings.pairs == "none" and model.sentence_pairs:
        raise InputError(
            "model.sentence_pairs is true, but pairs is none: its head would never be trained; set pairs nsp or sop"
        )
    if settings.pairs == "none" or model.init_from is not None:
        return model
    if model.sentence_pairs is False:
        raise InputError(
            f"model.sentence_pairs is false, but pairs is {settings.pairs}; leave it out, or set pairs none"
        )
    if model.token_types is not None and model.token_types < 2:
        raise InputError(
            f"model.token_types is {model.token_types}, but pairs is {settings.pairs}; expected at least 2, one for "
            "each part of a pair"
        )
    return dataclasses.replace(model, sentence_pairs=True, token_types=model.token_types or 2)


def continued_config(config: EncoderConfig, settings: Model, vocab_size: int) -> EncoderConfig:
    """A pretrained model's config with more tokens, more positions or other dropout.

    Raises InputError where settings ask for fewer positions, or for what this encoder has no use for.
    """
    check_rotary(config, vars(settings))
    changes: dict[str, Any] = {
        name: getattr(settings, name)
        for name in ("max_positions", "rope_base", "rope_scaling", "hidden_dropout", "attention_dropout")
        if getattr(settings, name) is not None
    }
    if changes.get("max_positions", config.max_positions) < config.max_positions:
        raise InputError(
            f"model.max_positions is {changes['max_positions']}; model.init_from has {config.max_positions}, "
            "expected at least that"
        )
    if settings.local_rope_base is not None and config.local_attention is not None:
        changes["local_attention"] = dataclasses.replace(config.local_attention, rope_base=settings.local_rope_base)
    return dataclasses.replace(config, vocab_size=max(config.vocab_size, vocab_size), **changes)


def _check_own_tokenizer(name: str, old: Any, config: EncoderConfig) -> None:
    check_vocabulary(old, config.vocab_size, name)
    if old.pad_token_id != config.pad_token_id:
        raise InputError(f"{name}: its tokenizer pads with {old.pad_token_id}, its model with {config.pad_token_id}")


def check_tokenizer(name: str, old: Any, new: Any) -> None:
    """Raise InputError unless the store's tokenizer cuts text as the pretrained model's does, tokens added aside.

    Every token of the model has the same number, the same ones are special, and text is normalised and split alike.
    """
    advice = f"prepare the store with --tokenizer {name}, or with that tokenizer and tokens added behind"
    was, now = old.get_vocab(), new.get_vocab()
    moved = [token for token in sorted(was, key=was.__getitem__) if now.get(token) != was[token]]
    if moved:
        there = f"number {now[moved[0]]}" if moved[0] in now else "missing"
        raise InputError(
            f"model.init_from {name}: its token {moved[0]!r} is number {was[moved[0]]}, in the store's tokenizer it is "
            f"{there}; {advice}"
        )
    for role in ROLES:
        if getattr(old, role) != getattr(new, role):
            raise InputError(
                f"model.init_from {name}: its {role} is {getattr(old, role)!r}, that of the store's tokenizer "
                f"{getattr(new, role)!r}; {advice}"
            )
    pipes = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (old, new)]
    for part in ("normalizer", "pre_tokenizer"):
        if pipes[0][part] != pipes[1][part]:
            raise InputError(f"model.init_from {name}: the store's tokenizer has another {part}; {advice}")


@torch.no_grad()
def continue_from(model: MaskedLM, config: EncoderConfig, old: Any, new: Any) -> MaskedLM:
    """The model at its new config.

    A new token begins at the mean of the pieces that the old tokenizer cuts it into, or of all tokens (Hewitt 2021,
    "Initializing new word embeddings for pretrained language models"); learned positions begin anew at position 0
    where they end (Beltagy et al. 2020, arXiv:2004.05150).
    """
    weights = model.state_dict()
    pieces = _pieces_of_new_tokens(old, new)
    for name in ("encoder.embeddings.tokens.weight", "decoder.weight", "decoder_bias"):
        if name in weights:
            rows = config.vocab_size if name == "decoder_bias" else padded_rows(config)
            weights[name] = _with_new_rows(weights[name][: model.config.vocab_size], rows, pieces, num_ids(old))
    table = weights.get("encoder.positions.table.weight")
    if table is not None:
        times = -(-config.max_positions // len(table))
        weights["encoder.positions.table.weight"] = table.repeat(times, 1)[: config.max_positions]
    continued = MaskedLM(config)
    continued.load_state_dict(weights, strict=True)
    return continued


def _pieces_of_new_tokens(old: Any, new: Any) -> dict[int, list[int]]:
    """For each token that only the new tokenizer has, its ids in the old one."""
    known = old.get_vocab()
    added = {token: number for token, number in new.get_vocab().items() if token not in known}
    texts = {
        number: new.convert_tokens_to_string([token]).strip().removeprefix("##") for token, number in added.items()
    }
    ids = {number: old(text, add_special_tokens=False)["input_ids"] for number, text in texts.items()}
    return {number: [piece for piece in part if piece != old.unk_token_id] for number, part in ids.items()}


def _with_new_rows(table: Tensor, rows: int, pieces: dict[int, list[int]], known: int) -> Tensor:
    """A (V, ...) table of this many rows, with the rows of new tokens."""
    longer, everything = pad_rows(table, rows), table[:known].mean(0)
    for number, part in pieces.items():
        longer[number] = table[part].mean(0) if part else everything
    return longer
