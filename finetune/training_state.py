"""What a fine-tuning run carries from epoch to epoch, and how it is written and read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from encoderkit.pretrain.checkpoint import Checkpoint, keep, save_checkpoint
from encoderkit.pretrain.optimizer_state import flatten_optimizer, unflatten_optimizer


@dataclass
class State:
    """How far training is. best: the weights of the best epoch; outputs: theirs on validation."""

    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))

    def save(self, folder: Path, model: nn.Module, optimizers: list[Optimizer], facts: dict[str, Any]) -> None:
        """Write the state after an epoch, and what has to be the same when the run goes on."""
        tensors = {"model": model.state_dict(), "best": self.best, "outputs": {"validation": self.outputs}}
        described = []
        for i, optimizer in enumerate(optimizers):
            tensors[f"optimizer-{i}"], state = flatten_optimizer(optimizer.state_dict())
            described.append(state)
        plain = {"epoch": self.epoch, "history": self.history, "best_epoch": self.best_epoch}
        plain |= {"optimizers": described, "facts": facts}
        save_checkpoint(folder, self.step, tensors, plain)
        keep(folder, 2)

    @classmethod
    def load(cls, checkpoint: Checkpoint, model: nn.Module, optimizers: list[Optimizer]) -> State:
        """Put what save wrote back into the model and the optimizers."""
        plain = checkpoint.state
        model.load_state_dict(checkpoint.tensors("model"))
        for i, (optimizer, described) in enumerate(zip(optimizers, plain["optimizers"])):
            optimizer.load_state_dict(unflatten_optimizer(checkpoint.tensors(f"optimizer-{i}"), described))
        return cls(
            plain["epoch"],
            checkpoint.step,
            plain["history"],
            plain["best_epoch"],
            checkpoint.tensors("best"),
            checkpoint.tensors("outputs")["validation"],
        )
