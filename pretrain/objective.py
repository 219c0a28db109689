"""What a training step minimises: the loss of the masked tokens, and that of the sentence pairs where there are any."""

from __future__ import annotations

from torch import nn

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.loss import LossSum


class Objective(nn.Module):
    """Both losses in one forward pass of the model, so that what wraps a module (DDP, autocast) sees one call."""

    def __init__(self, model: MaskedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> tuple[LossSum, LossSum]:
        """(masked tokens, sentence pairs); their mean losses are added (Devlin et al. 2019)."""
        return self.model.losses(batch)
