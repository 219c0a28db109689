"""The kinds of task, one class each: how examples become inputs and targets, the loss, and the answers.

Softmax over the tokens of a window: Devlin et al. 2019; over the choices of a question: Radford et al. 2018.

N inputs, S sequences, M read positions, C labels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from encoderkit.encoder.classifier import ChoiceClassifier, Classifier, SpanClassifier, TokenClassifier
from encoderkit.finetune.encoding import EncodedTexts, encode, encode_windows, encode_words
from encoderkit.finetune.task_head import Answer, Limits, Prepared, TaskHead
from encoderkit.finetune.tasks import Kind


class ClassHead(TaskHead):
    """One label of several for a text or a pair."""

    kind: ClassVar[Kind] = "classification"

    def prepare(self, tokenizer, examples):
        texts = [example.text for example in examples]
        texts_b = [example.text_b for example in examples]
        pairs = texts_b if texts_b and texts_b[0] is not None else None
        encoded = _encode(tokenizer, texts, pairs, self.limits)
        labelled = examples[0].label is not None
        return Prepared(examples, encoded, self._targets(examples) if labelled else None, np.arange(len(examples) + 1))

    def _targets(self, examples: list[Any]) -> np.ndarray:
        return np.array([example.label for example in examples], dtype=np.int64)

    def loss(self, logits, targets, sizes, *, training):
        return _class_loss(self, logits, targets, training)

    def weight(self, targets, *, training):
        return _class_weight(self, targets, training)

    def answers(self, prepared, logits):
        return [
            {"prediction": self.labels[int(np.argmax(row))], "probabilities": _named(self.labels, row)}
            for row in logits.softmax(1).tolist()
        ]

    def label(self, example):
        return self.labels[example.label]

    def _number(self, value):
        return self.labels.index(value)


class MultiLabelHead(ClassHead):
    """Any of several labels, each on its own: those of a probability above one half."""

    kind = "multi_label"
    problem_type = "multi_label_classification"

    def _targets(self, examples):
        targets = np.zeros((len(examples), len(self.labels)), dtype=np.float32)
        for row, example in zip(targets, examples):
            row[list(example.label)] = 1
        return targets

    def loss(self, logits, targets, sizes, *, training):
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(self.labels)

    def weight(self, targets, *, training):
        return float(len(targets))

    def answers(self, prepared, logits):
        return [
            {
                "prediction": [name for name, p in zip(self.labels, row) if p > 0.5],
                "probabilities": _named(self.labels, row),
            }
            for row in logits.sigmoid().tolist()
        ]

    def label(self, example):
        return [self.labels[i] for i in example.label]

    def _number(self, value):
        return [int(name in value) for name in self.labels]


class ScoreHead(ClassHead):
    """A number. Scores are learned with mean 0 and variance 1, so that their unit does not matter.

    The loss is the squared error as a share of the variance of train: 1 is as good as always saying its mean.
    """

    kind = "regression"
    problem_type = "regression"
    loss_unit = "share of the variance of train"
    mean, scale = 0.0, 1.0  # of the scores of train

    @property
    def outputs(self):
        return ["score"]

    def _targets(self, examples):
        return np.array([example.label for example in examples], dtype=np.float64)

    def begin(self, targets):
        self.mean, self.scale = float(targets.mean()), float(targets.std())

    def restore(self, outputs):
        return outputs * self.scale + self.mean

    def finish(self, model):
        with torch.no_grad():
            model.classifier.weight.mul_(self.scale)
            model.classifier.bias.mul_(self.scale).add_(self.mean)

    def loss(self, logits, targets, sizes, *, training):
        errors = (logits if training else (logits - self.mean) / self.scale).squeeze(1)
        wanted = ((targets - self.mean) / self.scale).to(errors.dtype)
        return F.mse_loss(errors, wanted, reduction="sum")

    def weight(self, targets, *, training):
        return float(len(targets))

    def answers(self, prepared, logits):
        return [{"prediction": float(f"{value:.7g}")} for value in logits.squeeze(1).tolist()]

    def label(self, example):
        return example.label

    def _number(self, value):
        return value


class TagHead(TaskHead):
    """A tag for each word, told by its first piece."""

    kind = "tagging"
    model_class = TokenClassifier

    def prepare(self, tokenizer, examples):
        words = [example.words for example in examples]
        limits = self.limits
        labelled = examples[0].tags is not None
        every = labelled and limits.tag_pieces == "all"
        encoded, read_words = encode_words(
            tokenizer, words, max_tokens=limits.max_tokens, token_types=limits.token_types, all_pieces=every
        )
        starts = encoded.read_starts()
        targets = None
        if labelled:
            targets = np.array([tag for example in examples for tag in example.tags], dtype=np.int64)[read_words]
        return Prepared(examples, encoded, targets, starts, read_words)

    def loss(self, logits, targets, sizes, *, training):
        return _class_loss(self, logits, targets, training)

    def weight(self, targets, *, training):
        return _class_weight(self, targets, training)

    def answers(self, prepared, logits):
        _, firsts = np.unique(prepared.extra, return_index=True)  # the first read position of each word
        tags = iter(logits.argmax(1)[torch.from_numpy(firsts)].tolist())
        return [{"prediction": [self.labels[next(tags)] for _ in example.words]} for example in prepared.examples]

    def label(self, example):
        return [self.labels[tag] for tag in example.tags]

    def metric_names(self, first, task_metrics):
        from encoderkit.finetune.metrics import tag_metric_names

        return tag_metric_names(self.labels, first, task_metrics)


class ChoiceHead(TaskHead):
    """Which of any number of choices follows a context."""

    kind = "multiple_choice"
    model_class = ChoiceClassifier

    @property
    def outputs(self):
        return ["score"]

    def prepare(self, tokenizer, examples):
        sizes = [len(example.choices) for example in examples]
        texts = [example.text for example in examples for _ in example.choices]
        choices = [choice for example in examples for choice in example.choices]
        encoded = _encode(tokenizer, texts, choices, self.limits, sizes)
        targets = None
        if examples[0].label is not None:
            targets = np.array([example.label for example in examples], dtype=np.int64)
        return Prepared(examples, encoded, targets, np.arange(len(examples) + 1))

    def loss(self, logits, targets, sizes, *, training):
        return F.cross_entropy(_grouped(logits.squeeze(1), sizes), targets, reduction="sum")

    def answers(self, prepared, logits):
        groups = logits.squeeze(1).split([len(example.choices) for example in prepared.examples])
        return [
            {"prediction": int(group.argmax()), "probabilities": [round(p, 8) for p in group.softmax(0).tolist()]}
            for group in groups
        ]

    def label(self, example):
        return example.label


class QuestionHead(TaskHead):
    """The span of a context that answers a question, or none; windows that do not hold it point at [CLS]."""

    kind = "question_answering"
    model_class = SpanClassifier

    @property
    def outputs(self):
        return ["start", "end"]

    def prepare(self, tokenizer, examples):
        limits = self.limits
        stride = limits.max_tokens // 3 if limits.qa.stride is None else limits.qa.stride
        windows = encode_windows(
            tokenizer,
            [example.question for example in examples],
            [example.context for example in examples],
            max_tokens=limits.max_tokens,
            stride=stride,
            token_types=limits.token_types,
        )
        encoded = windows.encoded
        targets = None
        if examples[0].answers is not None:
            bounds = zip(encoded.starts, encoded.starts[1:], encoded.origins)
            targets = np.array([_span(windows.offsets[a:b], examples[origin].answers) for a, b, origin in bounds])
        return Prepared(examples, encoded, targets, np.arange(len(encoded) + 1), windows.offsets)

    def sizes(self, encoded, inputs):
        return encoded.lengths()[inputs].tolist()

    def loss(self, logits, targets, sizes, *, training):
        losses = [F.cross_entropy(_grouped(logits[:, i], sizes), targets[:, i], reduction="sum") for i in (0, 1)]
        return (losses[0] + losses[1]) / 2

    def answers(self, prepared, logits):
        encoded, scores = prepared.encoded, logits.numpy()
        by_example: list[list[tuple[float, int, int]]] = [[] for _ in prepared.examples]
        nulls = np.full(len(prepared.examples), np.inf)
        for a, b, origin in zip(encoded.starts, encoded.starts[1:], encoded.origins):
            by_example[origin] += self._spans(scores[a:b], prepared.extra[a:b])
            nulls[origin] = min(nulls[origin], scores[a].sum())
        return [
            self._answer(example, spans, float(null))
            for example, spans, null in zip(prepared.examples, by_example, nulls)
        ]

    def _spans(self, scores_L2: np.ndarray, offsets_L2: np.ndarray) -> list[tuple[float, int, int]]:
        """The likeliest spans of a window: score, first and last character."""
        qa, inside = self.limits.qa, np.flatnonzero(offsets_L2[:, 1] > 0)
        starts, ends = (inside[np.argsort(-scores_L2[inside, i], kind="stable")[: qa.n_best]] for i in (0, 1))
        lengths = ends[None] - starts[:, None] + 1
        pairs = np.argwhere((lengths >= 1) & (lengths <= qa.max_answer_tokens))
        return [
            (
                float(scores_L2[starts[i], 0] + scores_L2[ends[j], 1]),
                int(offsets_L2[starts[i], 0]),
                int(offsets_L2[ends[j], 1]),
            )
            for i, j in pairs
        ]

    def _answer(self, example: Any, spans: list[tuple[float, int, int]], null: float) -> Answer:
        qa = self.limits.qa
        best: dict[str, float] = {}
        for score, first, last in sorted(spans, key=lambda span: -span[0]):
            if len(best) == qa.n_best:
                break
            if span := example.context[first:last].strip():  # tokens of bytes begin with their blank
                best.setdefault(span, score)
        best = best or {"": null}  # a context without tokens, or without a span that is short enough
        text, score = next(iter(best.items()))
        answer: Answer = {"id": example.id}
        if self.unanswerable:
            answer["no_answer"] = round(null - score, 6)
            answer["best_span"] = text
            best.setdefault("", null)
            text = "" if null - score > qa.null_threshold else text
        exps = np.exp(np.array(list(best.values())) - max(best.values()))
        shares = (exps / exps.sum()).tolist()
        answer["prediction"] = text
        answer["n_best"] = [{"text": t, "probability": round(p, 8)} for t, p in zip(best, shares)]
        return answer

    def label(self, example):
        return [text for text, _ in example.answers]

    def measure(self, names, examples, answers):
        from encoderkit.finetune.metrics import Squad, Squad2

        golds = [{"id": example.id, "answers": self.label(example)} for example in examples]
        if not self.unanswerable:
            predictions = [{"id": answer["id"], "prediction_text": answer["prediction"]} for answer in answers]
            scores = Squad(keep_in_memory=True).compute(predictions=predictions, references=golds)
        else:
            predictions = [
                {"id": answer["id"], "prediction_text": answer["best_span"], "no_answer": answer["no_answer"]}
                for answer in answers
            ]
            threshold = self.limits.qa.null_threshold
            scores = Squad2(keep_in_memory=True).compute(predictions=predictions, references=golds, threshold=threshold)
        return {**{name: scores[name] for name in names}, **scores}


HEADS: dict[Kind, type[TaskHead]] = {
    head.kind: head for head in (ClassHead, MultiLabelHead, ScoreHead, TagHead, ChoiceHead, QuestionHead)
}


def head_of(model: Classifier) -> type[TaskHead]:
    """The kind of task that a model was made for."""
    return next(
        head for head in HEADS.values() if head.model_class is type(model) and head.problem_type == model.problem_type
    )


def _encode(
    tokenizer: Any, texts: list[str], texts_b: list[str] | None, limits: Limits, sizes: list[int] | None = None
) -> EncodedTexts:
    return encode(tokenizer, texts, texts_b, max_tokens=limits.max_tokens, token_types=limits.token_types, sizes=sizes)


def _class_loss(head: TaskHead, logits: Tensor, targets: Tensor, training: bool) -> Tensor:
    weights = None if head.weights is None or not training else head.weights.to(logits.device)
    smoothing = head.smoothing if training else 0.0
    return F.cross_entropy(logits, targets, weight=weights, label_smoothing=smoothing, reduction="sum")


def _class_weight(head: TaskHead, targets: np.ndarray, training: bool) -> float:
    """Rows, or their weights: the denominator of torch's weighted mean."""
    return float(len(targets) if head.weights is None or not training else head.weights[targets].sum())


def _grouped(scores: Tensor, sizes: list[int]) -> Tensor:
    """Scores end to end as (groups, longest), minus infinity behind."""
    return torch.nn.utils.rnn.pad_sequence(scores.split(sizes), batch_first=True, padding_value=-torch.inf)


def _span(offsets_L2: np.ndarray, answers: list[tuple[str, int]]) -> tuple[int, int]:
    """First and last token of the first answer in a window; [CLS], token 0, where the window does not hold it."""
    inside = np.flatnonzero(offsets_L2[:, 1] > 0)
    if not answers or not len(inside):
        return 0, 0
    text, begin = answers[0]
    end = begin + len(text)
    if offsets_L2[inside[0], 0] > begin or offsets_L2[inside[-1], 1] < end:
        return 0, 0
    first = inside[np.argmax(offsets_L2[inside, 1] > begin)]
    last = inside[np.flatnonzero(offsets_L2[inside, 0] < end)[-1]]
    return int(first), int(max(first, last))


def _named(labels: list[str], shares: list[float]) -> dict[str, float]:
    return {name: round(share, 8) for name, share in zip(labels, shares)}
