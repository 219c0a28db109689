"""What encoderkit-pretrain doctor warns of, each in one line: what was found, what is expected, what to do.

Pure functions of figures; each limit stands with its reason. Runs that went well raise none of these.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from encoderkit.pretrain.data_facts import DataFacts
from encoderkit.pretrain.known_recipes import FAR_RATE, comparable
from encoderkit.pretrain.report import PHASES, Run
from encoderkit.pretrain.settings import OptimizerName, PretrainSettings

MOST_UNKNOWN = 0.01  # of the tokens; a tokenizer of the text's own language leaves about 1 in 10,000
MOST_UNUSED = 0.5  # of the vocabulary; 4% and 6% where tokenizer and text belong together
MOST_DUPLICATE = 0.1  # of the tokens; Lee et al. 2022 (arXiv:2107.06499) find up to 14% in web corpora, and harm
MOST_PADDING = 0.05  # of the row tokens; packed rows of 8 sequences and more have below 0.1%
MOST_CUT = 0.5  # of the documents, where sequences twice as long would cut half as many
LEAST_FILLED = 0.5  # of data.max_tokens, in the longest sequences but 1 in 100
LEAST_PROBE_TARGETS = 2_000  # the loss of one target varies by 2.5 nats or so: 0.06 nats of standard error
LEAST_STEP_TARGETS = 150  # pretrain/recipes: 1,024 tokens a step, 150 targets at the end, cost 0.06 to 0.1 nats
MOST_PASSES = 40.0  # BERT's own; Muennighoff et al. 2023 (arXiv:2305.16264) find nothing left to learn after as many
MOST_MEMORY = 0.9  # of the device's; allocators and libraries take the rest
MOST_DATA_TIME = 0.1  # of a step

LEAST_LINES = 20  # of log.jsonl before trends are judged
PLATEAU = 0.3  # nats around the unigram entropy, at the end or where half of the log brought less than 0.1
JUMP = 0.5  # nats above the 20 lines before; 0.17 at most in runs of 265 and 600 lines that went well
EXPLODED = 10.0  # times the median gradient norm


@dataclass(frozen=True)
class Finding:
    """One warning."""

    about: str
    found: str
    expected: str
    advice: str

    def __str__(self) -> str:
        return f"{self.about}: {self.found}; expected {self.expected}; {self.advice}"


def data_findings(facts: DataFacts, settings: PretrainSettings) -> Iterator[Finding]:
    """What is wrong with the text, its tokenizer, or how it is laid out."""
    data = settings.data
    if facts.unknown > MOST_UNKNOWN:
        yield Finding(
            "unknown tokens",
            f"{facts.unknown:.1%} of the tokens",
            f"at most {MOST_UNKNOWN:.0%}",
            "train a tokenizer on this text with encoderkit-pretrain tokenizer, and prepare the store with it",
        )
    if facts.unused_types > MOST_UNUSED:
        yield Finding(
            "vocabulary",
            f"{facts.unused_types:.1%} of its types never occur in the store",
            f"at most {MOST_UNUSED:.0%}",
            "take a tokenizer made for this text, or a smaller vocabulary",
        )
    if facts.duplicate_tokens > MOST_DUPLICATE:
        yield Finding(
            "duplicates",
            f"{facts.duplicate_tokens:.0%} of the tokens are in documents that repeat an earlier one",
            f"at most {MOST_DUPLICATE:.0%}",
            "prepare the store with --duplicates exact",
        )
    if facts.padding > MOST_PADDING:
        longer_rows = (
            f"raise data.row_tokens from {data.row_tokens} to {8 * data.max_tokens}, so that sequences fill rows"
        )
        yield Finding(
            "padding",
            f"{facts.padding:.1%} of the row tokens",
            f"at most {MOST_PADDING:.0%}",
            "set data.layout packed" if data.layout == "padded" else longer_rows,
        )
    longest = int(np.quantile(facts.sequences, 0.99))
    if longest < LEAST_FILLED * data.max_tokens:
        yield Finding(
            "sequence length",
            f"99% of the sequences have at most {longest} tokens",
            f"some near data.max_tokens = {data.max_tokens}",
            f"lower data.max_tokens to {max(8, -(-longest // 8) * 8)} or join short documents: later positions are "
            "hardly trained",
        )
    if facts.cut > MOST_CUT and facts.cut_at_twice < facts.cut / 2:
        yield Finding(
            "cut documents",
            f"{facts.cut:.0%} are longer than data.max_tokens = {data.max_tokens} and continue in another sequence",
            f"at most {MOST_CUT:.0%} where that costs little",
            f"raise data.max_tokens to {2 * data.max_tokens}, which cuts {facts.cut_at_twice:.0%}",
        )
    if facts.probe_targets < LEAST_PROBE_TARGETS:
        yield Finding(
            "held-out text",
            f"{facts.probe_targets:,} tokens to predict",
            f"at least {LEAST_PROBE_TARGETS:,}",
            "prepare the store with a larger --held_out: small differences of the held-out loss are chance",
        )


def recipe_findings(
    settings: PretrainSettings, *, parameters: int, step_targets: float, passes: float | None
) -> Iterator[Finding]:
    """What is far from recipes that are known to work. step_targets: the fewest that a step predicts."""
    if step_targets < LEAST_STEP_TARGETS:
        smallest = min([settings.batch_tokens, *(tokens for _, tokens in settings.batch_ramp)])
        batch = f"batch_tokens from {smallest:,}"
        if smallest < settings.batch_tokens:
            batch = f"the {smallest:,} tokens of batch_ramp"
        yield Finding(
            "targets a step",
            f"{step_targets:,.0f}",
            f"at least {LEAST_STEP_TARGETS}",
            f"raise {batch} or masking.rate: with few targets the loss stays at the unigram",
        )
    optimizer, continued = settings.optimizer, settings.model.init_from is not None
    of_rest = "adamw" if optimizer.name == "muon" else optimizer.name
    yield from _rate("optimizer.lr", of_rest, optimizer.lr, parameters, continued)
    if optimizer.name == "muon":
        yield from _rate("optimizer.muon_lr", "muon", optimizer.muon_lr, parameters, continued)
    if passes is not None and passes > MOST_PASSES:
        yield Finding(
            "passes over the data",
            f"{passes:,.1f}",
            f"at most {MOST_PASSES:.0f}",
            "give more text or a smaller budget: the model learns the texts by heart",
        )


def _rate(key: str, optimizer: OptimizerName, rate: float, parameters: int, continued: bool) -> Iterator[Finding]:
    """continued: a pretrained model, for which a low rate is right."""
    known = sorted(comparable(optimizer, parameters), key=lambda recipe: recipe.lr)
    low, high = known[0].lr / FAR_RATE, known[-1].lr * FAR_RATE
    if rate > high or (rate < low and not continued):
        nearest = known[-1 if rate > high else 0]
        advice = f"set it near the {nearest.lr:g} of {nearest.name}, {nearest.batch_tokens:,} tokens a step"
        yield Finding(
            key,
            f"{rate:g}",
            f"{low:.2g} to {high:.2g} for {parameters / 1e6:,.1f}M parameters",
            f"{advice} ({nearest.source})",
        )


def memory_findings(
    parts: dict[str, int], available: int, device: str, settings: PretrainSettings
) -> Iterator[Finding]:
    """Whether training would run out of memory. parts, available: bytes."""
    total = sum(parts.values())
    if total <= MOST_MEMORY * available:
        return
    largest = max(parts, key=lambda name: parts[name])
    row, micro_batch = settings.data.row_tokens, min(settings.micro_batch_tokens, settings.batch_tokens)
    room = MOST_MEMORY * available - (total - parts["activations"])
    fitting = int(micro_batch * room / parts["activations"]) // row * row
    advice = f"lower micro_batch_tokens to {fitting}" if fitting >= row else "take a smaller model"
    advice += "" if settings.gradient_checkpointing else ", or set gradient_checkpointing true"
    yield Finding(
        "memory",
        f"{total / 2**30:,.1f} GiB, most of it {largest}",
        f"at most {MOST_MEMORY:.0%} of the {available / 2**30:,.1f} GiB of {device}",
        advice,
    )


def run_findings(run: Run) -> Iterator[Finding]:
    """What a run's log shows: stuck, diverging, spiking, exploding gradients, waiting for data."""
    losses = [record["loss"] for record in run.train]
    norms = [record["grad_norm"] for record in run.train]
    lower = "lower optimizer.lr and optimizer.muon_lr, or raise schedule.warmup, and start again"
    if None in losses or None in norms:
        yield Finding("diverged", "a loss or gradient that is not finite", "numbers", lower)
        return
    waited = sum(record["time"].get("data", 0.0) for record in run.train)
    busy = sum(record["time"].get(phase, 0.0) for record in run.train for phase in PHASES)
    if busy and waited / busy > MOST_DATA_TIME:
        workers = run.settings["data"]["workers"]
        yield Finding(
            "data-bound",
            f"{waited / busy:.0%} of the time is spent waiting for batches",
            f"at most {MOST_DATA_TIME:.0%}",
            f"raise data.workers from {workers}, or put the store on a faster disk",
        )
    if len(losses) < LEAST_LINES:
        return
    size = max(3, len(losses) // 10)
    newest, middle = statistics.fmean(losses[-size:]), statistics.fmean(losses[len(losses) // 2 - size :][:size])
    unigram = run.start.get("unigram_entropy")
    best = min(statistics.fmean(losses[i : i + size]) for i in range(len(losses) - size + 1))
    if newest > best + JUMP:
        yield Finding("diverging", f"loss {newest:.2f} after {best:.2f}", "a loss that falls", lower)
    elif unigram is not None and newest > unigram - PLATEAU and (run.end is not None or middle - newest < 0.1):
        yield Finding(
            "stuck",
            f"loss {newest:.2f}, no better than the unigram's {unigram:.2f}",
            f"below {unigram - PLATEAU:.2f}",
            "raise batch_tokens or masking.rate, move the learning rate towards known recipes, or set "
            "model.token_vectors cooccurrence",
        )
    jumps = [
        run.train[i]["step"]
        for i in range(LEAST_LINES, len(losses) - size)
        if losses[i] > statistics.median(losses[i - LEAST_LINES : i]) + JUMP
    ]
    if jumps:
        yield Finding(
            "loss spikes",
            f"{len(jumps)} of {len(losses)} lines over {JUMP} nats above those before, first at step {jumps[0]:,}",
            "none",
            "lower the learning rate or optimizer.clip, or raise batch_tokens",
        )
    now, before = statistics.median(norms[-size:]), statistics.median(norms[:-size])
    if now > EXPLODED * before:
        yield Finding(
            "gradient norms",
            f"{now:.3g} at the end, {before:.3g} before",
            f"at most {EXPLODED:.0f} times as large",
            lower,
        )
