"""A recipe, its store and this machine looked at before hours are spent on them: figures, then warnings.

The run's own parts are built in memory for a few steps; neither the run folder nor the store is written to.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.model import choose_attention
from encoderkit.encoder.precision import Precision, resolve_precision
from encoderkit.kernels.attention import Choice
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.batches import StepBatches
from encoderkit.pretrain.clock import Clock
from encoderkit.pretrain.data_facts import DataFacts, length_histogram
from encoderkit.pretrain.doctor_warnings import Finding, data_findings, memory_findings, recipe_findings, run_findings
from encoderkit.pretrain.host_memory import ram_bytes
from encoderkit.pretrain.initial_model import check_tokenizer, plan_model
from encoderkit.pretrain.job import MaskRate, make_order
from encoderkit.pretrain.memory import empty_model, estimate_memory
from encoderkit.pretrain.order import NUM_SPECIAL_TOKENS, Order
from encoderkit.pretrain.progress import duration
from encoderkit.pretrain.report import BLUE, GREY, PHASES, Run
from encoderkit.pretrain.schedule import mask_rate
from encoderkit.pretrain.settings import DoctorSettings
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.terminal import plain_console
from encoderkit.pretrain.tokenizer import TokenIds, load_tokenizer, tokenizer_hash
from encoderkit.pretrain.trial import Trial, run_trial

BAR = 40  # characters of the longest bar
Rows = list[tuple[str, str]]


def run_doctor(settings: DoctorSettings, *, run: str | None = None, out: str | None = None) -> list[Finding]:
    """Print figures and warnings, and return the warnings: the command encoderkit-pretrain doctor.

    run: a run folder whose log is read. out: a new folder for report.md and lengths.png. Raises InputError where the
    run itself would.
    """
    if out is not None and (Path(out).exists() or Path(out).resolve() == Path(settings.out).resolve()):
        raise InputError(f"--out {out} exists or is the recipe's run folder; expected a new folder for the report")
    log = None if run is None else Run.read(Path(run))
    case = _Case.of(settings)
    facts = DataFacts.of(case.store, case.tokenizer, case.order)
    console = plain_console(record=out is not None)
    _print(console, f"data: {case.store.folder}", _data_rows(facts, settings.data.layout))
    _print(console, "documents by length (tokens)", _histogram(facts, settings.data.max_tokens))
    findings = [*data_findings(facts, settings), *_tokenizer_findings(case)]
    if any(finding.about == "model.init_from" for finding in findings):
        console.print("no trial: the run would refuse model.init_from", style="yellow")
    else:
        findings += _examine_machine(console, case, facts)
    if log is not None:
        _print(console, f"run: {log.path}", _log_rows(log))
        findings += run_findings(log)
    console.print(f"{len(findings) or 'no'} warning{'s' * (len(findings) != 1)}", style="bold")
    for finding in findings:
        console.print(f"- {finding}")
    if out is not None:
        _write(Path(out), console.export_text(), facts, settings.data.max_tokens)
    return findings


@dataclasses.dataclass(frozen=True)
class _Case:
    """What is looked at, and the machine that it would run on."""

    settings: DoctorSettings
    clock: Clock
    store: Store
    tokenizer: Any
    order: Order
    device: torch.device
    precision: Precision

    @classmethod
    def of(cls, settings: DoctorSettings) -> _Case:
        clock, store = Clock(settings), Store.open(settings.data.store)
        order = make_order(settings, store)
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        precision = resolve_precision(settings.precision, device)
        return cls(settings, clock, store, load_tokenizer(store.tokenizer_folder), order, device, precision)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "this machine"

    @property
    def device_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else ram_bytes()

    def attention(self, config: EncoderConfig) -> dict[str, Choice]:
        """The backend of each span."""
        settings, dtype = self.settings, self.precision.dtype
        return choose_attention(
            config, settings.attention, device=self.device, dtype=dtype, deterministic=settings.deterministic
        )

    def memory(self, config: EncoderConfig) -> dict[str, int]:
        """Bytes that training takes here, by what for."""
        settings, dtype = self.settings, self.precision.dtype
        one_micro_batch = dataclasses.replace(
            settings, batch_tokens=min(settings.batch_tokens, settings.micro_batch_tokens), batch_ramp=[]
        )
        batches = StepBatches(
            self.store,
            self.order,
            one_micro_batch,
            TokenIds.of(self.tokenizer),
            rate_at=MaskRate(settings.masking, self.clock),
            static_shapes=self.device.type == "cuda",
        )
        return estimate_memory(config, settings, batches[0][0], device=self.device, dtype=dtype)

    def step_targets(self, facts: DataFacts) -> float:
        """The fewest targets that a step has on average, over the masking rates and batch sizes of the run."""
        masking, ends = self.settings.masking, [*self.settings.batch_ramp, (1.0, self.settings.batch_tokens)]
        begins = [0.0, *(until for until, _ in ends)]
        fewest = min(
            tokens * min(mask_rate(masking, progress) for progress in (begin, end))
            for begin, (end, tokens) in zip(begins, ends)
        )
        selectable = facts.tokens * (1 - facts.unknown)
        return fewest * selectable / (facts.rows * self.order.row_tokens)

    def extent(self, trial: Trial | None) -> tuple[int, float] | None:
        """(steps of the whole run, how many of full size they are worth); None where that needs a trial."""
        minutes = self.settings.budget.minutes
        if minutes is not None:
            return None if trial is None else (max(1, round(60 * minutes / trial.seconds_per_step)),) * 2
        clock, steps = Clock(self.settings), 0
        shares = sorted(
            {until for until, _ in (*self.settings.batch_ramp, *self.settings.data.length_curriculum)} | {1.0}
        )
        for share in shares:  # progress is linear in the steps of a stage
            if clock.progress(steps) < share:
                clock.stage = clock.due_stage(steps)
                missing = (share - clock.progress(steps)) / (clock.progress(steps + 1) - clock.progress(steps))
                steps += max(0, math.floor(missing) - 1)
            while clock.progress(steps) < share:
                steps += 1
        return steps, clock.stage.row(steps) * self.order.row_tokens / self.settings.batch_tokens


def _examine_machine(console: Console, case: _Case, facts: DataFacts) -> Iterator[Finding]:
    """Print what will run here, its memory and speed; gives what is wrong with the recipe or does not fit."""
    settings = case.settings
    config, _ = plan_model(settings, case.store, case.tokenizer)
    parameters, memory = empty_model(config).num_parameters(), case.memory(config)
    _print(console, f"model on {case.device_name}", _model_rows(case, config, parameters, memory))
    lacking = list(memory_findings(memory, case.device_bytes, case.device_name, settings))
    trial: Trial | None = None
    if lacking:
        console.print("no trial: it does not fit", style="yellow")
    else:
        try:
            trial = run_trial(settings)
        except FloatingPointError as error:
            lower = "lower optimizer.lr and optimizer.muon_lr, or raise schedule.warmup"
            yield Finding("trial", str(error).partition(";")[0], "finite gradients in the first steps", lower)
        except torch.OutOfMemoryError:
            yield Finding("trial", "out of memory", "steps that fit", "lower micro_batch_tokens")
    extent = case.extent(trial)
    passes = None if extent is None else extent[1] * settings.batch_tokens / case.order.row_tokens / facts.rows
    _print(console, "the whole run, by one process here", _run_rows(case, trial, extent, passes, facts))
    yield from recipe_findings(settings, parameters=parameters, step_targets=case.step_targets(facts), passes=passes)
    yield from lacking


def _tokenizer_findings(case: _Case) -> Iterator[Finding]:
    """Whether the tokenizer made the store's tokens, and is that of model.init_from."""
    mine, init_from = case.tokenizer, case.settings.model.init_from
    if tokenizer_hash(mine) != case.store.manifest["tokenizer"]:
        yield Finding(
            "tokenizer",
            f"{case.store.tokenizer_folder} was changed after the store was made",
            "the tokenizer that made its tokens",
            "prepare the store again",
        )
    if init_from is None:
        return
    theirs = load_tokenizer(init_from)
    try:
        check_tokenizer(init_from, theirs, mine)
    except InputError:
        yield Finding(
            "model.init_from",
            f"{init_from} has another tokenizer ({len(theirs):,} types, the store's {len(mine):,})",
            "every token of the model under its own number in the store's tokenizer",
            f"prepare the store with --tokenizer {init_from}",
        )


def _data_rows(facts: DataFacts, layout: str) -> Rows:
    padding = "padding under packing" if layout == "packed" else "padding"
    return [
        ("tokens", f"{facts.tokens:,}"),
        ("documents", f"{facts.documents:,}"),
        ("fertility", f"{facts.fertility:.2f} tokens a word"),
        ("unknown tokens", f"{facts.unknown:.3%}"),
        ("types that never occur", f"{facts.unused_types:.1%} of the vocabulary"),
        ("duplicates", f"{facts.duplicate_documents:.2%} of the documents, {facts.duplicate_tokens:.2%} of the tokens"),
        ("longer than a sequence", f"{facts.cut:.1%} of the documents, {facts.cut_at_twice:.1%} if twice as long"),
        (padding, f"{facts.padding:.3%} of the row tokens"),
        ("ln V", f"{facts.ln_vocab:.3f} nats"),
        ("unigram entropy", f"{facts.unigram_entropy:.3f} nats, at {facts.probe_targets:,} tokens of the probe"),
    ]


def _histogram(facts: DataFacts, max_tokens: int) -> Rows:
    bins = length_histogram(facts.lengths)
    most = max(count for _, count in bins)
    rows = []
    for first, count in bins:
        here = " <- a sequence" if first <= max_tokens - NUM_SPECIAL_TOKENS < 2 * first else ""
        bar = "█" * -(-BAR * count // most)
        rows.append((f"{first:,} to {2 * first - 1:,}", f"{bar} {count:,}{here}".lstrip()))
    return rows


def _model_rows(case: _Case, config: EncoderConfig, parameters: int, memory: dict[str, int]) -> Rows:
    precision, attention = case.precision, case.attention(config)
    total = f"{_size(sum(memory.values()))} of {_size(case.device_bytes)}"
    return [
        ("parameters", f"{parameters:,}"),
        ("precision", f"{precision.name} ({precision.reason})"),
        *((f"{span} attention", f"{choice.name} ({choice.reason})") for span, choice in attention.items()),
        *((f"memory, {name}", _size(size)) for name, size in memory.items()),
        ("memory, estimated", total),
    ]


def _run_rows(
    case: _Case, trial: Trial | None, extent: tuple[int, float] | None, passes: float | None, facts: DataFacts
) -> Rows:
    price = case.settings.price_per_hour
    rows = [("targets a step, at least", f"{case.step_targets(facts):,.0f}")]
    if trial is not None:
        phases = ", ".join(f"{name} {share:.0%}" for name, share in trial.phases.items())
        rows += [
            ("tokens/s", f"{trial.tokens_per_second:,.0f} (trial of {trial.steps} steps)"),
            ("time of a step", f"{trial.seconds_per_step:.3g} s: {phases}"),
        ]
    if extent is not None:
        rows += [("steps", f"{extent[0]:,}"), ("passes over the data", f"{passes:.2f}")]
    seconds = 60 * (case.settings.budget.minutes or 0)
    if not seconds and trial is not None and extent is not None:
        seconds = extent[1] * trial.seconds_per_step
    if seconds:
        rows.append(("time", f"{duration(seconds)}, {seconds / 3600:,.2f} h"))
        rows += [] if price is None else [("cost", f"{seconds / 3600 * price:,.2f} at {price:g} an hour")]
    return rows


def _log_rows(run: Run) -> Rows:
    losses = [record["loss"] for record in run.train if record["loss"] is not None]
    norms = [record["grad_norm"] for record in run.train if record["grad_norm"] is not None]
    seconds = {phase: sum(record["time"].get(phase, 0.0) for record in run.train) for phase in PHASES}
    whole = sum(seconds.values())
    rows = [("steps", f"{run.last.get('step', 0):,}")]
    rows += [("training loss", f"{losses[0]:.3f} to {losses[-1]:.3f}")] if losses else []
    rows += [("gradient norm", f"{statistics.median(norms):.3g} (median), at most {max(norms):.3g}")] if norms else []
    rows += [("time", ", ".join(f"{name} {part / whole:.0%}" for name, part in seconds.items()))] if whole else []
    return rows


def _print(console: Console, title: str, rows: Rows) -> None:
    table = Table("", "", title=title, title_justify="left", title_style="bold", show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    console.print()


def _size(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _write(out: Path, shown: str, facts: DataFacts, max_tokens: int) -> None:
    """Write what was shown as report.md, and the lengths of the documents as lengths.png."""
    from matplotlib.figure import Figure

    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made: {error.strerror or error}") from error
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes: Any = figure.subplots()
    edges = np.geomspace(facts.lengths.min(), facts.lengths.max() + 1, 40).astype(np.int64)
    axes.hist(facts.lengths, bins=np.unique(edges).tolist(), color=BLUE)
    axes.axvline(max_tokens - NUM_SPECIAL_TOKENS, color=GREY, linestyle=(0, (4, 3)), linewidth=0.8)
    axes.set(xscale="log", xlabel=f"tokens of a document (dashed: a sequence of {max_tokens})", ylabel="documents")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "lengths.png", dpi=160)
    page = ["# Doctor", "", "```", shown.rstrip(), "```", "", "![lengths of the documents](lengths.png)", ""]
    (out / "report.md").write_text("\n".join(page), encoding="utf-8")
