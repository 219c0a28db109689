"""How much memory training takes on one device, from the recipe alone: nothing of the model's size is allocated.

The model's own forward pass runs on fake tensors, which have shapes and no storage, and what autograd would keep is
added up; so the estimate follows whatever the encoder is made of.

T tokens, D hidden size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.loss import chunk_and_group
from encoderkit.pretrain.optimizer import build_optimizers
from encoderkit.pretrain.settings import PretrainSettings


def empty_model(config: EncoderConfig) -> MaskedLM:
    """A model without storage, which knows its parameters' shapes."""
    with torch.device("meta"):
        return MaskedLM(config)


def estimate_memory(
    config: EncoderConfig, settings: PretrainSettings, batch: TokenBatch, *, device: torch.device, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes of weights, gradients, each optimizer's state, activations, and logits with the loss, at their highest.

    batch: one micro-batch, on the CPU. dtype: of the matrix products. Not counted: what allocators and libraries add,
    and what an attention kernel keeps besides queries, keys and values (on CPU 0 to 0.4 of the activations).
    """
    empty = empty_model(config)
    batch = empty.encoder.rounded(batch)  # fake tensors, which are on the CPU, could not be; 31 tokens more at most
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = empty.to_empty(device="cpu")  # whatever the device: the shapes are the same
        weights = [*model.parameters(), *model.buffers()]
        kept = _kept_for_backward(model, batch, weights, dtype)
        if settings.gradient_checkpointing:  # each block's input, and what one block keeps while it runs again
            kept = 4 * len(batch.input_ids) * config.hidden_size * config.num_layers + kept // config.num_layers
        states: dict[str, int] = {}
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        for optimizer in build_optimizers(model, settings.optimizer, dtype=dtype):
            optimizer.step()
            held = (value for state in optimizer.state.values() for value in state.values())
            states[f"{type(optimizer).__name__} state"] = sum(_bytes(value) for value in held if torch.is_tensor(value))
    table = model.encoder.embeddings.tokens.weight
    chunk, group = (
        min(len(batch.target_positions), count) for count in chunk_and_group(device, len(table), dtype.itemsize)
    )
    narrow = 0 if dtype == torch.float32 else dtype.itemsize
    return {
        "weights": sum(map(_bytes, weights)),
        "gradients": sum(_bytes(parameter) for parameter in model.parameters()),
        **states,
        "activations": kept,
        # scores of a chunk, those of a group or their gradients, and the table's gradient
        "logits and loss": len(table) * ((4 if narrow else 0) * chunk + dtype.itemsize * group)
        + (4 + narrow) * table.numel(),
    }


def _kept_for_backward(model: MaskedLM, batch: TokenBatch, weights: Sequence[Tensor], dtype: torch.dtype) -> int:
    """Bytes that autograd holds after the forward pass, weights left out."""
    held = {tensor.untyped_storage()._cdata: 0 for tensor in weights}
    alive = []  # so that no number is given twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        held.setdefault(storage._cdata, storage.nbytes())
        return tensor

    narrow = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), narrow:
        model.train().hidden(batch)
    return sum(held.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
