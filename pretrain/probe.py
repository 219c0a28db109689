"""The fixed probe: one masked-token loss that recipes with other masking rates and lengths compare on.

15% of the tokens of the held-out documents, chosen by document and seed, all replaced by [MASK], in pieces of at most
128 tokens. Nothing of a recipe enters, so two runs on one store and tokenizer meet the same questions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from encoderkit.encoder.batch import IGNORE_INDEX, TokenBatch
from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.errors import InputError
from encoderkit.kernels.loss import LossSum
from encoderkit.pretrain.data_settings import EvalSettings
from encoderkit.pretrain.masking import Pieces, select_targets
from encoderkit.pretrain.order import NUM_SPECIAL_TOKENS
from encoderkit.pretrain.pairs import NO_PAIR, SentencePairs
from encoderkit.pretrain.randomness import Purpose
from encoderkit.pretrain.settings import Pairs
from encoderkit.pretrain.text_bounds import sentence_lengths, token_spans, token_stops
from encoderkit.pretrain.tokenizer import TokenIds, check_vocabulary, load_tokenizer, num_ids, tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RATE = 0.15
MAX_TOKENS = 128  # of a piece, [CLS] and [SEP] counted in
PROBE_TOKENS = 262_144  # held-out text beyond this is left out, whole documents by the hash of their text


@dataclass(frozen=True)
class ProbeSequence:
    """[CLS] ... [SEP] with [MASK] at the positions that targets maps to their token ids."""

    input_ids: list[int]
    targets: dict[int, int]


@dataclass(frozen=True)
class ProbeScore:
    """loss: mean nats of a target. accuracy: share of targets that rank first. count: targets."""

    loss: float
    accuracy: float
    count: int

    @classmethod
    def of(cls, sums: torch.Tensor) -> ProbeScore:
        """The score of what probe_sums gives, added up."""
        loss, count, correct = sums.tolist()
        return cls(loss=loss / count, accuracy=correct / count, count=int(count))

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class HeldOutScore:
    """What a run measures on held-out documents: the fixed probe, and sentence pairs where it learns them."""

    probe: ProbeScore
    pairs: ProbeScore | None

    @classmethod
    def of(cls, sums: torch.Tensor) -> HeldOutScore:
        """The scores of (2, 3) sums: the probe's and the pairs'; no pair counted where there are none."""
        return cls(ProbeScore.of(sums[0]), ProbeScore.of(sums[1]) if sums[1, 1] else None)

    def record(self) -> dict[str, float]:
        """As a line of log.jsonl has them."""
        pairs = {} if self.pairs is None else {f"pair_{name}": value for name, value in vars(self.pairs).items()}
        return {**vars(self.probe), **pairs}

    def told(self) -> str:
        """In words."""
        pairs = "" if self.pairs is None else f"; pairs {self.pairs.loss:.4f}, accuracy {self.pairs.accuracy:.3f}"
        return f"held-out loss {self.probe.loss:.4f}, accuracy {self.probe.accuracy:.3f}{pairs}"


@dataclass(frozen=True)
class HeldOut:
    """The batches that a run is scored on, CPU tensors: the fixed probe, and sentence pairs where it learns them."""

    probe: list[TokenBatch]
    pairs: list[TokenBatch]

    @classmethod
    def of(
        cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, pairs: Pairs, *, language: str, batch_tokens: int
    ) -> HeldOut:
        """Of these documents; see probe_sequences and pair_batches."""
        sequences = probe_sequences(texts, tokenizer, seed=0)
        paired = []
        if pairs != "none":
            paired = pair_batches(texts, tokenizer, pairs, language=language, tokens_per_batch=batch_tokens)
        return cls(probe_batches(sequences, tokens_per_batch=batch_tokens), paired)

    def targets(self) -> np.ndarray:
        """(M,) int64 target ids of the whole probe."""
        return torch.cat([batch.targets for batch in self.probe if batch.targets is not None]).numpy()

    @torch.no_grad()
    def score(self, model: MaskedLM, device: torch.device) -> HeldOutScore:
        """Score a model on this device, in evaluation mode from then on."""
        model.eval()
        sums = [probe_sums(model, self.probe, device), probe_sums(lambda b: model.losses(b)[1], self.pairs, device)]
        return HeldOutScore.of(torch.stack(sums))


def probe_sequences(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, seed: int, *, max_tokens: int = PROBE_TOKENS
) -> list[ProbeSequence]:
    """The probe's questions on these documents, in their order. A document's own do not depend on the others.

    max_tokens: of the whole probe. Raises InputError when the documents give no target.
    """
    tokens = TokenIds.of(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    sequences: list[ProbeSequence] = []
    for text in _within(texts, backend, max_tokens):
        ids = np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        if len(ids):
            sequences += _questions(ids, text, tokens, seed)
    if not sequences:
        raise InputError(f"{len(texts)} held-out documents give no token to predict; hold out more text")
    return sequences


def probe_targets(sequences: Sequence[ProbeSequence]) -> np.ndarray:
    """(M,) int64 target ids of the whole probe."""
    return np.array([token for sequence in sequences for token in sequence.targets.values()], dtype=np.int64)


def unigram_entropy(counts: np.ndarray, targets: np.ndarray) -> float:
    """Mean nats of targets (M,) under the unigram of counts (V,) plus one each: what ignoring the context costs."""
    return float(np.mean(np.log(counts.sum() + len(counts)) - np.log(counts[targets] + 1.0)))


def probe_batches(sequences: Sequence[ProbeSequence], tokens_per_batch: int) -> list[TokenBatch]:
    """The probe packed into batches of at most tokens_per_batch tokens, shortest sequences first."""
    return [
        TokenBatch.from_sequences([s.input_ids for s in part], targets=[s.targets for s in part])
        for part in _groups(sequences, tokens_per_batch, padded=False)
    ]


def pair_batches(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    objective: Pairs,
    *,
    language: str,
    tokens_per_batch: int,
    max_tokens: int = PROBE_TOKENS,
) -> list[TokenBatch]:
    """Sentence pairs of held-out documents, nothing masked, by seed 0: the same for every recipe.

    language: of the sentence splitter, as the store was prepared with. Sequences are of at most 128 tokens. Raises
    InputError where the documents give no pair.
    """
    tokens, backend = TokenIds.of(tokenizer), tokenizer.backend_tokenizer
    kept = _within(texts, backend, max_tokens)
    encodings = [backend.encode(text, add_special_tokens=False) for text in kept]
    lengths = [sentence_lengths(text, token_stops(token_spans(e)), language) for text, e in zip(kept, encodings)]
    source = SentencePairs(objective, lengths, seed=0, room=MAX_TOKENS - NUM_SPECIAL_TOKENS - 1, source="held-out part")
    pairs = source.draw(0)
    pairs = pairs[np.flatnonzero(pairs.labels != NO_PAIR)]
    sequences: list[list[int]] = []
    types: list[list[int]] = []
    for i in range(len(pairs.labels)):
        first, second = (
            encodings[int(part.document[i])].ids[int(part.start[i]) : int(part.stop[i])]
            for part in (pairs.first, pairs.second)
        )
        sequences.append([tokens.cls, *first, tokens.sep, *second, tokens.sep])
        types.append([0] * (len(first) + 2) + [1] * (len(second) + 1))
    count = max(1, tokens_per_batch // MAX_TOKENS)
    batches = []
    for at in range(0, len(sequences), count):
        part = slice(at, at + count)
        batch = TokenBatch.from_sequences(
            sequences[part], targets=[{0: IGNORE_INDEX}] * len(sequences[part]), token_types=types[part]
        )
        labels = torch.from_numpy(pairs.labels[part])
        batches.append(replace(batch, pair_reads=torch.arange(len(labels)), pair_labels=labels))
    return batches


@torch.no_grad()
def probe_sums(
    loss: Callable[[TokenBatch], LossSum], batches: Sequence[TokenBatch], device: torch.device
) -> torch.Tensor:
    """Loss, targets and right guesses over these batches, (3,) fp64; ProbeScore.of makes a score of their sums.

    loss: of one batch, such as a MaskedLM.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        sums += torch.stack([part.double() for part in loss(batch.to(device))])
    return sums


@torch.inference_mode()
def evaluate_probe_hf(
    model: torch.nn.Module, sequences: Sequence[ProbeSequence], *, pad_token_id: int, batch_tokens: int = 4096
) -> ProbeScore:
    """Score any Hugging Face masked language model in padded batches; it is left in the mode it was in.

    batch_tokens: padding counted in. Log-probabilities are computed in fp32, at the targets only.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for part in _groups(sequences, batch_tokens, padded=True):
        longest = max(len(s.input_ids) for s in part)
        ids_BL = torch.full((len(part), longest), pad_token_id)
        keep_BL = torch.zeros_like(ids_BL)
        for row, sequence in enumerate(part):
            ids_BL[row, : len(sequence.input_ids)] = torch.tensor(sequence.input_ids)
            keep_BL[row, : len(sequence.input_ids)] = 1
        at_M = torch.tensor([(row, position) for row, s in enumerate(part) for position in s.targets])
        targets_M = torch.tensor([token for s in part for token in s.targets.values()], device=device)
        logits_BLV = model(input_ids=ids_BL.to(device), attention_mask=keep_BL.to(device)).logits
        logits_MV = logits_BLV[at_M[:, 0].to(device), at_M[:, 1].to(device)].float()
        loss += float(torch.nn.functional.cross_entropy(logits_MV, targets_M, reduction="sum"))
        correct += int((logits_MV.argmax(1) == targets_M).sum())
        count += len(targets_M)
    model.train(was_training)
    return ProbeScore(loss / count, correct / count, count)


def run_eval(settings: EvalSettings) -> None:
    """Score a model at a store's probe and print a table: the command encoderkit-pretrain eval."""
    from encoderkit.encoder.checkpoint import load_transformers
    from encoderkit.pretrain.store import Store
    from encoderkit.pretrain.terminal import plain_console, print_table

    store = Store.open(settings.store)
    tokenizer = load_tokenizer(settings.model)
    model = load_transformers(settings.model)
    check_vocabulary(tokenizer, model.config.vocab_size, settings.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = store.held_out_texts()
    sequences = probe_sequences(texts, tokenizer, settings.seed)
    pad = tokenizer.pad_token_id
    score = evaluate_probe_hf(model.to(device), sequences, pad_token_id=pad, batch_tokens=settings.batch_tokens)
    same_tokens = tokenizer_hash(tokenizer) == store.manifest["tokenizer"]
    unigram = f"{unigram_entropy(store.unigram_counts, probe_targets(sequences)):.3f}" if same_tokens else "-"
    figures = {
        "targets": f"{score.count:,}",
        "loss (nats)": f"{score.loss:.3f}",
        "perplexity": f"{score.perplexity:,.1f}",
        "accuracy": f"{score.accuracy:.1%}",
        "unigram entropy": unigram,
        "ln V": f"{math.log(num_ids(tokenizer)):.3f}",
    }
    console = plain_console()
    console.print(f"{settings.model} at the probe of {settings.store}")
    print_table(console, list(figures), [list(figures.values())])
    if not same_tokens:
        console.print("the model's tokenizer is not the store's: its loss does not compare with the store's own models")


def _questions(ids: np.ndarray, text: str, tokens: TokenIds, seed: int) -> Iterator[ProbeSequence]:
    room = MAX_TOKENS - NUM_SPECIAL_TOKENS
    start = np.arange(0, len(ids), room)
    lengths = np.minimum(room, len(ids) - start)
    document = np.full(len(start), int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little"))
    pieces = Pieces(lengths, np.zeros_like(start), document, start)
    positions, _ = select_targets(
        ids, pieces, rate=RATE, seed=seed, is_ordinary=tokens.is_ordinary, purpose=Purpose.PROBE
    )
    masked = ids.copy()
    masked[positions] = tokens.mask
    for first, length in zip(start.tolist(), lengths.tolist()):
        chosen = positions[(positions >= first) & (positions < first + length)].tolist()
        if chosen:
            input_ids = [tokens.cls, *masked[first : first + length].tolist(), tokens.sep]
            yield ProbeSequence(input_ids, {p - first + 1: int(ids[p]) for p in chosen})


def _within(texts: Sequence[str], backend, max_tokens: int) -> list[str]:
    """The documents, or those with the smallest hashes that max_tokens allow, at least one; in the given order."""
    ranked = sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i].encode()).digest())
    kept: set[int] = set()
    total = 0
    for i in ranked:
        total += len(backend.encode(texts[i], add_special_tokens=False).ids)
        if kept and total > max_tokens:
            break
        kept.add(i)
    return [text for i, text in enumerate(texts) if i in kept]


def _groups(sequences: Sequence[ProbeSequence], tokens: int, *, padded: bool) -> Iterator[list[ProbeSequence]]:
    """Sequences by rising length, in groups of at most this many tokens and at least one sequence."""
    group: list[ProbeSequence] = []
    held = 0
    for sequence in sorted(sequences, key=lambda s: len(s.input_ids)):
        length = len(sequence.input_ids)
        held = (len(group) + 1) * length if padded else held + length
        if group and held > tokens:
            yield group
            group, held = [], length
        group.append(sequence)
    yield group
