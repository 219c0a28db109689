"""Our encoders as Hugging Face models: importing this module makes transformers' Auto classes know them.

The models themselves are encoderkit.encoder.modeling_encoderkit with layers and configuration, files that stand alone:
whatever folder save_pretrained writes holds copies, and opens with trust_remote_code where encoderkit is not installed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from encoderkit.encoder import attention_interface
from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.configuration_encoderkit import EncoderkitConfig
from encoderkit.encoder.modeling_encoderkit import (
    EncoderkitForMaskedLM,
    EncoderkitForMultipleChoice,
    EncoderkitForPreTraining,
    EncoderkitForQuestionAnswering,
    EncoderkitForSequenceClassification,
    EncoderkitForTokenClassification,
    EncoderkitModel,
)
from encoderkit.kernels.errors import InputError

MODELS: dict[Any, type] = {
    AutoModel: EncoderkitModel,
    AutoModelForMaskedLM: EncoderkitForMaskedLM,
    AutoModelForPreTraining: EncoderkitForPreTraining,
    AutoModelForSequenceClassification: EncoderkitForSequenceClassification,
    AutoModelForMultipleChoice: EncoderkitForMultipleChoice,
    AutoModelForTokenClassification: EncoderkitForTokenClassification,
    AutoModelForQuestionAnswering: EncoderkitForQuestionAnswering,
}
# What config.auto_map holds in a folder with copies of the code.
AUTO_MAP = {
    auto.__name__: f"{ours.__module__.rpartition('.')[2]}.{ours.__name__}"
    for auto, ours in {AutoConfig: EncoderkitConfig, **MODELS}.items()
}


def register() -> None:
    """Make transformers know our models and attn_implementation="encoderkit"; to repeat it does no harm."""
    AutoConfig.register(EncoderkitConfig.model_type, EncoderkitConfig, exist_ok=True)
    EncoderkitConfig.register_for_auto_class()
    for auto, ours in MODELS.items():
        auto.register(EncoderkitConfig, ours, exist_ok=True)
        ours.register_for_auto_class(auto.__name__)  # type: ignore[attr-defined]
    attention_interface.register()


def to_hub_config(config: EncoderConfig) -> EncoderkitConfig:
    """The same encoder for transformers, with AUTO_MAP."""
    fields = {**dataclasses.asdict(config), "auto_map": dict(AUTO_MAP)}
    return EncoderkitConfig(**fields)


def from_hub_config(hub: PreTrainedConfig) -> EncoderConfig:
    """The same encoder for us. Raises InputError naming a field that is missing or wrong."""
    if hub.model_type != EncoderkitConfig.model_type:
        raise InputError(f"model type {hub.model_type!r}; expected {EncoderkitConfig.model_type}")
    names = [field.name for field in dataclasses.fields(EncoderConfig)]
    return EncoderConfig.from_dict({name: getattr(hub, name) for name in names if hasattr(hub, name)})


register()
