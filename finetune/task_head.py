"""What a kind of task asks of the loop: inputs, a model, a loss, answers and their measure.

N inputs, S sequences, M read positions, C labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from encoderkit.encoder.classifier import Classifier, ProblemType, SequenceClassifier
from encoderkit.finetune.encoding import EncodedTexts
from encoderkit.finetune.settings import QuestionAnswering
from encoderkit.finetune.tasks import Kind

Answer = dict[str, Any]  # a line of predictions.jsonl: prediction, and what it was chosen among


@dataclass(frozen=True)
class Limits:
    """How inputs are cut and answers chosen. See encoderkit.finetune.settings."""

    max_tokens: int
    token_types: bool
    tag_pieces: str = "first"
    qa: QuestionAnswering = field(default_factory=QuestionAnswering)


@dataclass(frozen=True)
class Prepared:
    """Encoded examples. targets: what the head learns, a row for each input or for each read position; or None.

    target_starts: (N + 1,) rows of targets that each input has. extra: what only the head itself understands.
    """

    examples: list[Any]
    encoded: EncodedTexts
    targets: np.ndarray | None
    target_starts: np.ndarray
    extra: Any = None

    def targets_of(self, inputs: np.ndarray) -> np.ndarray:
        """The rows of targets of these inputs, end to end."""
        assert self.targets is not None
        return np.concatenate([self.targets[self.target_starts[i] : self.target_starts[i + 1]] for i in inputs])


class TaskHead(ABC):
    """One kind of task. labels: names of the classes; none where answers are no classes."""

    kind: ClassVar[Kind]
    model_class: ClassVar[type[Classifier]] = SequenceClassifier
    problem_type: ClassVar[ProblemType | None] = None
    loss_unit: ClassVar[str] = "nats"

    def __init__(self, labels: list[str], limits: Limits, *, unanswerable: bool = False) -> None:
        self.labels, self.limits, self.unanswerable = labels, limits, unanswerable
        self.weights: Tensor | None = None  # (C,), of the classes in the training loss
        self.smoothing = 0.0

    @property
    def outputs(self) -> list[str]:
        """Names of the model's outputs."""
        return self.labels

    @abstractmethod
    def prepare(self, tokenizer: Any, examples: list[Any]) -> Prepared:
        """Tokenize; targets where the examples have labels."""

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, sizes: list[int], *, training: bool) -> Tensor:
        """Sum of the losses in nats. sizes: sequences of each input, or tokens of each window.

        logits: of the model in training, or, not training, restored.
        """

    @abstractmethod
    def answers(self, prepared: Prepared, logits: Tensor) -> list[Answer]:
        """One answer an example, in order."""

    @abstractmethod
    def label(self, example: Any) -> Any:
        """An example's label as answers name theirs."""

    def sizes(self, encoded: EncodedTexts, inputs: np.ndarray) -> list[int]:
        """What loss takes as sizes."""
        return np.diff(encoded.input_starts)[inputs].tolist()

    def weight(self, targets: np.ndarray, *, training: bool) -> float:
        """What the sum of losses over these targets is divided by."""
        return float(len(targets))

    def balance(self, targets: np.ndarray) -> None:
        """Let classes count by 1 / their frequency in targets, with mean 1 (scikit-learn's balanced)."""
        counts = np.bincount(targets, minlength=len(self.labels))
        balanced = np.divide(len(targets), len(counts) * counts, out=np.zeros(len(counts)), where=counts > 0)
        self.weights = torch.from_numpy(balanced).float()

    def begin(self, targets: np.ndarray) -> None:  # noqa: B027 - most need not know them
        """Look at the targets of train."""

    def restore(self, outputs: Tensor) -> Tensor:
        """What the finished model gives, of outputs of the model in training: what answers are made of."""
        return outputs

    def finish(self, model: Classifier) -> None:  # noqa: B027 - most models are finished as they are
        """Let a trained model give what restore makes of its outputs."""

    def metric_names(self, first: str | None, task_metrics: Sequence[str]) -> list[str]:
        """What is reported; the first chooses the best epoch."""
        from encoderkit.finetune.metrics import metric_names

        return metric_names(len(self.labels), first, task_metrics, self.kind)

    def measure(self, names: Sequence[str], examples: list[Any], answers: list[Answer]) -> dict[str, float]:
        """Metrics of the answers."""
        from encoderkit.finetune.metrics import compute_metrics

        predictions = [self._number(answer["prediction"]) for answer in answers]
        references = [self._number(self.label(example)) for example in examples]
        return compute_metrics(names, predictions, references, self.kind)

    def _number(self, value: Any) -> Any:
        """An answer or a label as metrics take it."""
        return value
