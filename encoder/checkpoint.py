"""Model folders: transformers' own in and out, with modelling code where transformers has no class for a model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from encoderkit.encoder.classifier import CLASSIFIERS, Classifier, ProblemType, SequenceClassifier
from encoderkit.encoder.config import EncoderConfig, Pooling
from encoderkit.encoder.containment import check_source
from encoderkit.encoder.model import Encoder, MaskedLM
from encoderkit.encoder.native import (
    TOKEN_TABLES,
    Head,
    from_native,
    from_native_config,
    pad_rows,
    to_native,
    to_native_config,
    unlike_native,
)
from encoderkit.kernels.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Format = Literal["auto", "native", "code"]
# what a folder with modelling code holds
CODE = ("configuration_encoderkit.py", "layers_encoderkit.py", "modeling_encoderkit.py")

_HEADS: dict[Head, str] = {  # how transformers' classes end
    "masked_lm": "MaskedLM",
    "classifier": "SequenceClassification",
    "choice": "MultipleChoice",
    "tokens": "TokenClassification",
    "spans": "QuestionAnswering",
}
_FAMILIES = {"bert": "Bert", "roberta": "Roberta", "modern": "ModernBert"}  # how they begin
C = TypeVar("C", bound=Classifier)


def load(name_or_folder: str | os.PathLike, *, head_seed: int | None = None) -> MaskedLM:
    """Open a checkpoint of a masked language model as ours, in evaluation mode.

    Bert, Roberta, XLM-Roberta and ModernBert checkpoints of transformers, from a folder or the hub, and folders that
    save wrote; a pooler comes along, with its next-sentence head where there is one. head_seed: where the prediction
    head has no weights, it is drawn from this seed; without a seed that is an error. Raises InputError where the folder
    is missing, of another architecture, lacks weights, or names files outside itself. Nothing in it is executed.
    """
    return load_masked_lm(name_or_folder, head_seed=head_seed)[0]


def load_masked_lm(name_or_folder: str | os.PathLike, *, head_seed: int | None) -> tuple[MaskedLM, list[str]]:
    """What load gives, and the names of the parameters that were drawn."""
    where = str(name_or_folder)
    with _told(where):
        opened = _open(where, "masked_lm")
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(head_seed or 0)  # torch.manual_seed also seeds GPUs
            model = MaskedLM(opened.config)
        may_lack = () if head_seed is None else ("head.", "decoder_bias")
        drawn = _fill(model, opened, "masked_lm", may_lack)
    return model.eval(), drawn


def load_config(name_or_folder: str | os.PathLike) -> EncoderConfig:
    """The configuration of any checkpoint that load opens, without reading its weights."""
    where = str(name_or_folder)
    with _told(where):
        return _as_ours(_read_config(where), where)


def load_encoder(name_or_folder: str | os.PathLike) -> Encoder:
    """The encoder of any checkpoint that load opens, and of those that have no prediction head; in evaluation mode."""
    return load(name_or_folder, head_seed=0).encoder


def load_transformers(name_or_folder: str | os.PathLike) -> Any:
    """Open any masked language model of transformers, a PreTrainedModel, in fp32 and evaluation mode; as safe as load.

    Raises InputError where the folder is missing, has no such model, lacks weights, or names files outside itself.
    """
    import transformers

    import encoderkit.encoder.hub  # noqa: F401  # our own folders with code open without trusting them

    where = str(name_or_folder)
    with _told(where):
        model, missing = _read_model(transformers.AutoModelForMaskedLM, where, _read_config(where))
        if missing:
            raise InputError(f"no weights for {sorted(missing)[0]} and {len(missing) - 1} more; expected a whole model")
    return model.eval()


def save(
    model: MaskedLM,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    format: Format = "auto",
) -> None:
    """Write a folder that transformers' AutoModelForMaskedLM opens, with the tokenizer where one is given.

    format: native is a class of transformers, code the modelling code in the folder (trust_remote_code), auto native
    where there is such a class. Raises InputError where native cannot express the model.
    """
    _write(model, "masked_lm", folder, tokenizer, format)


def load_classifier(
    name_or_folder: str | os.PathLike,
    labels: list[str] | None = None,
    kind: type[C] = SequenceClassifier,  # type: ignore[assignment]
    *,
    seed: int = 0,
    dropout: float | None = None,
    pooling: Pooling | None = None,
) -> C:
    """Open a checkpoint as a task model of this kind, in evaluation mode.

    A task model brings its own labels; with labels, any checkpoint gets a fresh head for them, drawn from seed.
    dropout and pooling replace those of its configuration. Raises InputError as load does, and where the folder holds
    a task model of another kind.
    """
    where, head = str(name_or_folder), kind.head_name
    with _told(where):
        opened = _open(where, head if labels is None else "masked_lm")
        changes: dict[str, Any] = {"hidden_dropout": dropout, "pooling": pooling}
        changes = {name: value for name, value in changes.items() if value is not None}
        config = dataclasses.replace(opened.config, pooler=False, **changes)  # its own, if any, comes with its head
        model = untrained_classifier(config, opened.labels if labels is None else labels, seed, kind)
        if labels is None:
            model.problem_type = opened.problem_type
        _fill(model, opened, head, () if labels is None else ("pooler.", "head.", "classifier."))
    return model.eval()


def classifier_kind(name_or_folder: str | os.PathLike) -> type[Classifier]:
    """Which task model a folder or hub name holds. Raises InputError where it holds none."""
    where = str(name_or_folder)
    with _told(where):
        names = _read_config(where).architectures or ["no head"]
        for head, kind in CLASSIFIERS.items():
            if names[0].endswith(f"For{_HEADS[head]}"):
                return kind
        raise InputError(f"holds {', '.join(names)}; expected a fine-tuned model, the final/ folder of a run")


def untrained_classifier(
    config: EncoderConfig,
    labels: list[str],
    seed: int,
    kind: type[C] = SequenceClassifier,  # type: ignore[assignment]
) -> C:
    """The same network with initial weights drawn from seed; torch's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return kind(config, labels)


def save_classifier(
    model: Classifier,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    format: Format = "auto",
) -> None:
    """Write a folder that transformers' class of this task opens, label names included; see save."""
    _write(model, model.head_name, folder, tokenizer, format)


@dataclass(frozen=True)
class _Opened:
    """A checkpoint as transformers read it. weights: under native names, or ours where model type is encoderkit."""

    config: EncoderConfig
    weights: dict[str, Tensor]
    is_native: bool
    labels: list[str]
    problem_type: ProblemType | None


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Whatever a damaged or hostile folder, or a hub out of reach, raises becomes one line that names it.

    huggingface_hub's lines on each of its attempts are left out.
    """
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except InputError as error:
        if str(error).startswith(where):
            raise
        raise InputError(f"{where}: {error}") from error
    except Exception as error:
        place = "" if os.path.exists(where) else "no folder here, and "
        raise InputError(f"{where}: {place}not a model that transformers can open: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _open(where: str, head: Head) -> _Opened:
    """Read a folder or hub name; local folders never reach for the network, and nothing in them is executed."""
    config: Any = _read_config(where)
    is_native, ours = _is_native(config), _as_ours(config, where)
    if head != "masked_lm" and not (config.architectures or [""])[0].endswith(f"For{_HEADS[head]}"):
        found = ", ".join(config.architectures or ["no head"])
        raise InputError(f"holds {found}; expected a model for {_HEADS[head]}")
    native, missing = _read_model(_reader(config, head), where, config)
    weights = {name: tensor for name, tensor in native.state_dict().items() if name not in missing}
    has_pooler = any(name.endswith("pooler.dense.weight") for name in weights)
    if is_native:
        ours = dataclasses.replace(ours, sentence_pairs=has_pooler and "cls.seq_relationship.weight" in weights)
    ours = dataclasses.replace(ours, pooler=has_pooler and not ours.sentence_pairs)
    labels = [] if head == "masked_lm" else [config.id2label[i] for i in range(len(config.id2label))]
    if head == "choice":
        labels = labels[:1]  # one score, whatever number transformers has noted
    problem_type = config.problem_type if config.problem_type in get_args(ProblemType) else None
    if head == "classifier" and problem_type is None and len(labels) == 1:
        problem_type = "regression"  # as transformers takes it
    return _Opened(ours, weights, is_native, labels, problem_type)


def _read_config(where: str) -> PreTrainedConfig:
    """The configuration of a folder or hub name. Raises InputError where there is none, or it would read others."""
    import transformers

    from encoderkit.encoder import hub  # noqa: F401 - makes AutoConfig know our own

    local = check_source(where)
    return transformers.AutoConfig.from_pretrained(where, local_files_only=local, trust_remote_code=False)


def _is_native(config: PreTrainedConfig) -> bool:
    from encoderkit.encoder import hub

    return config.model_type != hub.EncoderkitConfig.model_type


def _as_ours(config: PreTrainedConfig, where: str) -> EncoderConfig:
    from encoderkit.encoder import hub

    return from_native_config(config, where) if _is_native(config) else hub.from_hub_config(config)


def _read_model(reader: Any, where: str, config: PreTrainedConfig) -> tuple[Any, list[str]]:
    """A model of transformers in fp32, and the names of the parameters that it has no weights for."""
    with quiet_transformers():
        native, info = reader.from_pretrained(
            where,
            config=config,
            local_files_only=os.path.isdir(where),
            trust_remote_code=False,
            weights_only=True,
            attn_implementation="eager",  # whatever the folder asks for, it may be code from the hub
            dtype=torch.float32,
            output_loading_info=True,
        )
    return native, info["missing_keys"]


def _reader(config: PreTrainedConfig, head: Head) -> Any:
    """The class that reads all that a checkpoint may hold for this head."""
    import transformers

    if head == "masked_lm" and (config.model_type == "bert" or getattr(config, "sentence_pairs", False)):
        return transformers.AutoModelForPreTraining  # the prediction head, and a pooler with a next-sentence head
    if head == "masked_lm" and config.model_type in ("roberta", "xlm-roberta"):
        return _with_pooler(transformers.AutoModelForMaskedLM._model_mapping[type(config)])
    return getattr(transformers, f"AutoModelFor{_HEADS[head]}")


def _with_pooler(kind: Any) -> Any:
    """transformers' masked language model with the pooler that its body has alone, and that it leaves out."""

    class WithPooler(kind):
        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.base_model.pooler = type(self.base_model)(config).pooler

    WithPooler.__name__ = kind.__name__  # save_pretrained notes it
    return WithPooler


def _fill(model: MaskedLM | Classifier, opened: _Opened, head: Head, may_lack: tuple[str, ...]) -> list[str]:
    """Copy weights into model; returns the parameters without any, which may start with one of may_lack."""
    own = model.state_dict()
    if opened.is_native:
        ours = from_native(opened.weights, own, model.config, head)
    else:
        ours = {
            name: pad_rows(tensor, len(own[name])) if name in TOKEN_TABLES else tensor
            for name, tensor in opened.weights.items()
            if name in own
        }
    lacking = [name for name in own if name not in ours]
    wanted = [name for name in lacking if not name.startswith(may_lack or ("\0",))]
    if wanted:
        raise InputError(f"no weights for {wanted[0]} and {len(wanted) - 1} more; expected a whole model")
    model.load_state_dict({**own, **ours}, strict=True)
    return lacking


def _write(
    model: MaskedLM | Classifier,
    head: Head,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None,
    format: Format,
) -> None:
    reason = unlike_native(model.config)
    if format == "native" and reason:
        raise InputError(f"no class of transformers has these parts: {reason}; use format code or auto")
    as_code = format == "code" or reason is not None
    kind, native_config, weights = _as_code(model, head) if as_code else _as_native(model, head)
    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
            if hasattr(native_config, name):
                setattr(native_config, name, getattr(tokenizer, name))
    if isinstance(model, Classifier):
        native_config.problem_type = model.problem_type
        native_config.id2label = dict(enumerate(model.labels))
        native_config.label2id = {label: i for i, label in enumerate(model.labels)}
    with torch.device("meta"):
        native = kind(native_config)
    native.load_state_dict({name: tensor.detach().cpu() for name, tensor in weights.items()}, strict=True, assign=True)
    native.tie_weights()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in CODE:
            (Path(folder) / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; give another folder") from error
    with quiet_transformers():
        native.save_pretrained(folder)
    if tokenizer is not None:
        types = ["token_type_ids"] if model.config.token_types >= 2 else []  # 1 for the second of a pair
        names = ["input_ids", *types, "attention_mask"]
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
        tokenizer.save_pretrained(folder)


def _as_native(model: MaskedLM | Classifier, head: Head) -> tuple[Any, PreTrainedConfig, dict[str, Tensor]]:
    """transformers' class, configuration and weights of this model."""
    import transformers

    config = model.config
    name = f"{_FAMILIES[config.architecture]}For{_HEADS[head]}"
    if head == "masked_lm" and config.sentence_pairs:
        name = "BertForPreTraining"
    kind = getattr(transformers, name)
    if head == "masked_lm" and config.pooler:
        kind = _with_pooler(kind)
    return kind, to_native_config(config), to_native(model.state_dict(), config, head)


def _as_code(model: MaskedLM | Classifier, head: Head) -> tuple[Any, PreTrainedConfig, dict[str, Tensor]]:
    """The class of modeling_encoderkit.py, configuration and weights of this model."""
    from encoderkit.encoder import hub, modeling_encoderkit

    config = model.config
    name = "PreTraining" if head == "masked_lm" and config.sentence_pairs else _HEADS[head]
    weights = {n: t[: config.vocab_size] if n in TOKEN_TABLES else t for n, t in model.state_dict().items()}
    return getattr(modeling_encoderkit, f"EncoderkitFor{name}"), hub.to_hub_config(config), weights


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars of transformers for folders that it reads or writes, and no reports of heads without weights."""
    from transformers.utils import logging

    was_enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_enabled:
            logging.enable_progress_bar()
