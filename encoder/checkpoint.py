"""Model folders: native transformers folders in, native transformers folders out, no remote code."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from encoderkit.encoder.classifier import SequenceClassifier
from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.model import MaskedLM
from encoderkit.encoder.native import TIED, from_native, from_native_config, to_native, to_native_config
from encoderkit.kernels.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLASSES = {
    ("bert", "masked_lm"): "BertForMaskedLM",
    ("modern", "masked_lm"): "ModernBertForMaskedLM",
    ("bert", "classifier"): "BertForSequenceClassification",
    ("modern", "classifier"): "ModernBertForSequenceClassification",
}


def load(folder: str | os.PathLike) -> MaskedLM:
    """Open a BertForMaskedLM or ModernBertForMaskedLM folder or hub name as ours, in evaluation mode.

    Raises InputError where the folder is missing, of another architecture, or lacks weights.
    """
    native = _open(folder, "masked_lm")
    model = MaskedLM(from_native_config(native.config, str(folder)))
    _fill(model, native, "masked_lm", str(folder), may_lack=())
    return model.eval()


def save(model: MaskedLM, folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write a folder that transformers' AutoModelForMaskedLM opens, with the tokenizer where one is given."""
    _write(model, "masked_lm", folder, tokenizer)


def load_classifier(
    folder: str | os.PathLike,
    labels: list[str] | None = None,
    *,
    seed: int = 0,
    dropout: float | None = None,
    pooling: Literal["cls", "mean"] | None = None,
) -> SequenceClassifier:
    """Open a folder for sequence classification, in evaluation mode.

    A classifier folder brings its own labels; with labels, any folder gets a fresh head for them, drawn from seed.
    dropout and pooling replace those of the folder's configuration.
    """
    native = _open(folder, "classifier" if labels is None else "masked_lm")
    config = from_native_config(native.config, str(folder))
    changes: dict[str, Any] = {"hidden_dropout": dropout, "pooling": pooling}
    config = dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
    if labels is None:
        id2label = native.config.id2label
        model = SequenceClassifier(config, [id2label[i] for i in range(len(id2label))])
        _fill(model, native, "classifier", str(folder), may_lack=())
    else:
        model = untrained_classifier(config, labels, seed)
        _fill(model, native, "classifier", str(folder), may_lack=("head.", "classifier."))
    return model.eval()


def untrained_classifier(config: EncoderConfig, labels: list[str], seed: int) -> SequenceClassifier:
    """The same network with initial weights drawn from seed; torch's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SequenceClassifier(config, labels)


def save_classifier(
    model: SequenceClassifier, folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write a folder that transformers' AutoModelForSequenceClassification opens, label names included."""
    _write(model, "classifier", folder, tokenizer, labels=model.labels)


def _open(folder: str | os.PathLike, head: str) -> Any:
    """The transformers model of a folder or hub name; local folders never reach for the network."""
    import transformers

    where = str(folder)
    local = os.path.isdir(where)
    if not local and (where.startswith((".", "/", "~")) or where.count("/") > 1 or os.path.exists(where)):
        raise InputError(f"{where}: no such model folder; give a folder with config.json, or a hub name")
    try:
        config = transformers.AutoConfig.from_pretrained(where, local_files_only=local)
        architecture = from_native_config(config, where).architecture
        name = _CLASSES[architecture, head]
        if head == "classifier" and name not in (config.architectures or []):
            raise InputError(f"{where}: holds {', '.join(config.architectures or ['no head'])}; expected {name}")
        with _no_progress_bars():
            native, info = getattr(transformers, name).from_pretrained(
                where, local_files_only=local, output_loading_info=True, dtype=torch.float32
            )
    except InputError:
        raise
    except Exception as error:  # whatever a damaged folder or an unreachable hub raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{where}: not a model that transformers can open: {reason}") from error
    native.missing = set(info["missing_keys"])
    return native


def _fill(model: nn.Module, native: Any, head: str, where: str, may_lack: tuple[str, ...]) -> None:
    """Copy native weights into model; parameters that start with one of may_lack may keep their initial values."""
    config: EncoderConfig = model.config  # type: ignore[assignment]
    weights = {name: tensor for name, tensor in native.state_dict().items() if name not in native.missing}
    ours = from_native(weights, model.state_dict(), config, head)
    lacking = [name for name in model.state_dict() if name not in ours and not name.startswith(may_lack or ("\0",))]
    if lacking:
        raise InputError(f"{where}: no weights for {lacking[0]} and {len(lacking) - 1} more; expected a whole model")
    model.load_state_dict({**model.state_dict(), **ours}, strict=True)


def _write(
    model: Any, head: str, folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None, **settings
) -> None:
    import transformers

    config: EncoderConfig = model.config
    native_config = to_native_config(config)
    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
            if hasattr(native_config, name):
                setattr(native_config, name, getattr(tokenizer, name))
    if "labels" in settings:
        native_config.id2label = dict(enumerate(settings["labels"]))
        native_config.label2id = {label: i for i, label in enumerate(settings["labels"])}
    with torch.device("meta"):
        native = getattr(transformers, _CLASSES[config.architecture, head])(native_config)
    weights = to_native(model.state_dict(), config, head)
    for name, source in TIED[config.architecture].items() if head == "masked_lm" else ():
        weights[name] = weights[source]
    weights = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    native.load_state_dict(weights, strict=True, assign=True)
    native.tie_weights()
    Path(folder).mkdir(parents=True, exist_ok=True)
    with _no_progress_bars():
        native.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar for each folder that it reads or writes."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if was_enabled:
        logging.enable_progress_bar()
