"""Everything a pretraining run is made of, built from its settings and checked before anything is written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Generator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.model import MaskedLM
from encoderkit.encoder.precision import use_fp8
from encoderkit.kernels.errors import InputError, first_line
from encoderkit.pretrain.batches import StepBatches, step_loader
from encoderkit.pretrain.checkpoint import ALONE, Checkpoint, CheckpointWriter, Ranks
from encoderkit.pretrain.clock import Clock
from encoderkit.pretrain.initial_model import check_memory, plan_model
from encoderkit.pretrain.machine import Machine, check_trackers
from encoderkit.pretrain.minimal_pairs import MinimalPairs, read_pairs, sample_pairs
from encoderkit.pretrain.objective import Objective
from encoderkit.pretrain.optimizer import build_optimizers, keep_gradients
from encoderkit.pretrain.optimizer_state import flatten_optimizer
from encoderkit.pretrain.order import NUM_SPECIAL_TOKENS, Order
from encoderkit.pretrain.pairs import SentencePairs
from encoderkit.pretrain.parallel import own_rows, spread
from encoderkit.pretrain.probe import MAX_TOKENS as PROBE_MAX_TOKENS
from encoderkit.pretrain.probe import HeldOut, unigram_entropy
from encoderkit.pretrain.restoring import (
    State,
    check_same_checkpoint,
    newest_checkpoint,
    restore,
    restore_optimizers,
    sum_as_before,
)
from encoderkit.pretrain.run_folder import RunFolder, clear_folder, read_facts, read_log
from encoderkit.pretrain.schedule import Stage, mask_rate
from encoderkit.pretrain.settings import Budget, Masking, PretrainSettings, Validation
from encoderkit.pretrain.spikes import SpikeGuard
from encoderkit.pretrain.step_log import StepLog
from encoderkit.pretrain.store import Store
from encoderkit.pretrain.token_vectors import start_from_counts
from encoderkit.pretrain.tokenizer import TokenIds, load_tokenizer


@dataclass(frozen=True)
class MaskRate:
    """Masking rate of a step; loader workers ask it too."""

    masking: Masking
    clock: Clock

    def __call__(self, step: int) -> float:
        return mask_rate(self.masking, self.clock.during(step))


@dataclass
class Job:
    """One run in one process. run is None on all ranks but the first, writer on those that write no checkpoint."""

    settings: PretrainSettings
    accelerator: Accelerator
    tokenizer: Any
    model: MaskedLM
    wrapped: nn.Module  # the Objective of the model as Accelerate prepared it
    optimizers: list[torch.optim.Optimizer]
    prepared: list[Any]  # the optimizers as Accelerate prepared them
    clock: Clock
    log: StepLog
    dataset: StepBatches
    loader: Generator[list[TokenBatch]]
    held_out: HeldOut
    minimal_pairs: MinimalPairs | None
    state: State
    facts: dict[str, Any]  # what the bits of a run depend on
    run: RunFolder | None
    writer: CheckpointWriter | None
    async_device: bool  # whether the device computes behind the host, which then never waits for it within a step
    spikes: SpikeGuard
    ranks_asked: torch.Tensor  # () on the device: ranks that were asked to stop before the last step

    def begin_stage(self, stage: Stage) -> None:
        """Go over to another length and batch size; the loader starts anew."""
        self.loader.close()
        self.clock.stage = self.dataset.stage = stage
        self.spikes.forget()
        self.loader = _loader(self.settings, self.dataset, self.state.step)

    def save(self, score: float | None = None, *, due: bool = True) -> None:
        """Write a checkpoint; every rank calls this. score: held-out loss, where it is known.

        The first rank writes it, or of sharded weights each rank its own rows. due: not one that a signal asked for.
        """
        self.state.seconds = self.clock.seconds
        self.state.window = self.log.window()
        self.state.epoch_ends, self.state.order = list(self.dataset.order.ends), self.dataset.order.fingerprint
        self.state.stage = asdict(self.clock.stage)
        self.state.spikes = self.spikes.state()
        if self.writer is None:
            return
        flat = [flatten_optimizer(optimizer.state_dict()) for optimizer in self.optimizers]
        tensors = {"model": self.model.state_dict(), **{f"optimizer-{i}": part for i, (part, _) in enumerate(flat)}}
        rows: dict[str, list[str]] = {}
        if self.facts["weights"] == "sharded":
            for stem, group in tensors.items():
                tensors[stem], rows[stem] = own_rows(group)
        described = {
            "model": asdict(self.model.config),
            "run": asdict(self.state),
            "facts": self.facts,
            "optimizers": [about for _, about in flat],
            "score": score if score is not None and math.isfinite(score) else None,
            "due": due,
        }
        if self.run is not None:
            self.run.log.flush()  # a checkpoint is never ahead of its log
        self.writer.save(self.state.step, tensors, described, rows)

    def finish_saving(self) -> None:
        """Wait, on every rank, until the last checkpoint is on the disk. Raises InputError where it is not."""
        if self.writer is not None:
            self.writer.finish()
        self.accelerator.wait_for_everyone()

    def end_workers(self) -> None:
        """End the loader's processes and the thread that saves.

        Well before the process ends: a thread of torch that is still leaving when Python shuts down may abort it.
        """
        self.loader.close()
        if self.writer is not None:
            self.writer.close()

    def close(self) -> None:
        """End what works for the run, and let other processes use its folder."""
        self.end_workers()
        if self.run is not None:
            self.run.close()

    def tell(self, record: dict[str, Any]) -> None:
        """Write a line of log.jsonl and send its numbers to the trackers."""
        if self.run is not None:
            self.run.log.append(record)
        if self.settings.log.trackers:
            flat = {**record, **{f"time/{name}": value for name, value in record.get("time", {}).items()}}
            numbers = {f"{record['kind']}/{k}": v for k, v in flat.items() if isinstance(v, (int, float))}
            self.accelerator.log(numbers, step=record["step"])


def make_order(settings: PretrainSettings, store: Store) -> Order:
    """The rows of a run. Raises InputError where the store cannot fill them."""
    data, pairs = settings.data, None
    if settings.pairs != "none":
        lengths = [store.sentence_lengths(document) for document in range(store.num_documents)]
        room = data.max_tokens - NUM_SPECIAL_TOKENS - 1
        pairs = SentencePairs(settings.pairs, lengths, seed=settings.seed, room=room)
    return Order(
        store.document_lengths,
        seed=settings.seed,
        max_tokens=data.max_tokens,
        row_tokens=data.row_tokens,
        shortest=min([data.max_tokens, *(length for _, length in data.length_curriculum)]),
        layout=data.layout,
        pairs=pairs,
    )


def build_job(
    settings: PretrainSettings, resume: bool, *, allow_change: Collection[str] = (), in_memory: bool = False
) -> Job:
    """Build a run, or go on with the run folder settings.out; in_memory: without a folder, so that nothing is written.

    allow_change: keys, or "data.*" for a section, that may differ from those of the run that is resumed.
    Raises InputError, with nothing written, where the settings cannot be served here.
    """
    check_trackers(settings.log.trackers)
    out, clock = Path(settings.out), Clock(settings)
    store = Store.open(Path(settings.data.store), verify=resume)
    tokenizer = load_tokenizer(store.tokenizer_folder)
    checkpoint = newest_checkpoint(out) if resume else None
    config, build = _plan(settings, store, tokenizer, checkpoint, allow_change)
    machine = Machine.find(settings, config)
    accelerator, precision = machine.accelerator, machine.precision
    if resume:
        check_same_checkpoint(checkpoint, out)
    settings = replace(settings, precision=precision.name)  # a resumed run keeps it
    dataset = StepBatches(
        store,
        make_order(settings, store),
        settings,
        TokenIds.of(tokenizer),
        rate_at=MaskRate(settings.masking, clock),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        static_shapes=accelerator.device.type == "cuda",
    )
    model = build()
    model.encoder.use_attention(machine.attention)
    model.encoder.checkpoint_blocks = settings.gradient_checkpointing
    if settings.pairs == "none":
        for part in filter(None, (model.pooler, model.pair_classifier)):
            part.requires_grad_(False)  # masked language modelling does not read them
    held_out = HeldOut.of(
        store.held_out_texts(),
        tokenizer,
        settings.pairs,
        language=store.manifest["sentences"],
        batch_tokens=settings.micro_batch_tokens,
    )
    minimal_pairs = _minimal_pairs(settings.validation, tokenizer, config, sharded=machine.is_sharded)
    facts = {"data": store.hash, "tokenizer": store.manifest["tokenizer"], **machine.facts()}
    run = None
    if accelerator.is_main_process and not in_memory:
        run = RunFolder.resume(settings, allow_change) if resume else RunFolder.create(settings)
    try:
        state = _resumed(out, checkpoint, model, facts, allow_change) if resume else State()
        if state.step == 0 and settings.model.token_vectors == "cooccurrence":
            state.seconds = _start_from_counts(model, store, accelerator, settings.budget)
        rows_per_epoch = len(dataset.order.epoch(0))  # before the present epoch is planned: one plan is kept
        _stand_at(state, clock, dataset)
        wrapped, optimizers = _prepare(settings, machine, model)
        if checkpoint is not None:
            restore_optimizers(checkpoint, optimizers, allow_change)
        if settings.log.trackers:
            accelerator.init_trackers("encoderkit")
        if run is not None:
            before = None if checkpoint is None else checkpoint.state["facts"]
            reasons = machine.reasons(facts, before, resume)
            about = {
                "parameters": model.num_parameters(),
                "vocab_size": config.vocab_size,
                "unigram_entropy": unigram_entropy(store.unigram_counts, held_out.targets()),
                "ln_vocab": math.log(config.vocab_size),
                "rows_per_epoch": rows_per_epoch,
            }
            run.describe(
                model=asdict(config),
                data={"store": str(store.folder), "hash": store.hash, **store.manifest},
                bits=facts,
                reasons=reasons,
                **about,
            )
            run.log.cut_back(-1 if checkpoint is None else state.step)  # the start is logged anew
            if not resume or not read_log(run.log.path):
                run.log.append({"kind": "start", "step": 0, "tokens": 0, "batch_rows": clock.stage.step_rows, **about})
            _tell_start(store, about, reasons, state, resume)
    except BaseException as error:
        is_full = isinstance(error, torch.OutOfMemoryError) and not in_memory
        if run is not None:
            if is_full and not resume:
                clear_folder(run.path)
            run.close()
        if is_full:
            how = "free it there, or take a smaller model"
            raise InputError(f"the model does not fit beside what is in memory; {how}: {first_line(error)}") from error
        raise
    spikes = SpikeGuard(settings.optimizer.skip_sigmas, accelerator.device)
    if state.spikes:
        spikes.load(state.spikes)
    return Job(
        settings=settings,
        accelerator=accelerator,
        tokenizer=tokenizer,
        model=model,
        wrapped=wrapped,
        optimizers=optimizers,
        prepared=[accelerator.prepare_optimizer(optimizer) for optimizer in optimizers],
        clock=clock,
        log=StepLog(accelerator, config, precision.dtype, state.window),
        dataset=dataset,
        loader=_loader(settings, dataset, state.step),
        held_out=held_out,
        minimal_pairs=minimal_pairs,
        state=state,
        facts=facts,
        run=run,
        writer=None if in_memory else _writer(settings, machine),
        async_device=accelerator.device.type != "cpu",
        spikes=spikes,
        ranks_asked=torch.zeros((), device=accelerator.device),
    )


def _plan(
    settings: PretrainSettings,
    store: Store,
    tokenizer: Any,
    checkpoint: Checkpoint | None,
    allow_change: Collection[str],
) -> tuple[EncoderConfig, Callable[[], MaskedLM]]:
    """What the model is and what builds it; the checkpoint's, unless settings of the model may change."""
    if checkpoint is not None and not any(name.startswith("model.") for name in allow_change):
        config = EncoderConfig.from_dict(checkpoint.state["model"])
        build: Callable[[], MaskedLM] = partial(MaskedLM, config)
    else:
        config, build = plan_model(settings, store, tokenizer)
        check_memory(config)
    for key, needed in (("data.max_tokens", settings.data.max_tokens), ("the fixed probe", PROBE_MAX_TOKENS)):
        if needed > config.max_positions:
            raise InputError(f"{key} has sequences of {needed} tokens; model.max_positions is {config.max_positions}")
    return config, build


def _resumed(
    out: Path, checkpoint: Checkpoint | None, model: MaskedLM, facts: dict[str, Any], allow_change: Collection[str]
) -> State:
    """The state of the run in out, whose weights the model takes; facts become those of then where bits can be kept."""
    if checkpoint is not None:
        return restore(checkpoint, model, facts, allow_change)
    begun = read_facts(out)
    if begun is not None:  # stopped before the first checkpoint: what was measured then stays
        sum_as_before(facts, begun["bits"])
    return State()


def _stand_at(state: State, clock: Clock, dataset: StepBatches) -> None:
    """Bring clock and batches to the state's step, whose epoch is planned here, before loader workers are forked."""
    order = dataset.order
    if state.order == order.fingerprint:  # else seed or data were changed, and the epochs are planned anew
        order.ends = list(state.epoch_ends)
    if state.stage:
        clock.stage = dataset.stage = Stage(**state.stage)
    dataset.counts(state.step)


def _prepare(
    settings: PretrainSettings, machine: Machine, model: MaskedLM
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """The objective as all ranks train it, and its optimizers."""
    encoder = model.encoder
    if machine.precision.name == "fp8":
        use_fp8(encoder.blocks)
    if settings.compile:
        encoder.compile_blocks(cuda_graphs=settings.cuda_graphs)
    bf16 = settings.gradient_reduction == "bf16"
    wrapped = spread(machine.accelerator, Objective(model), machine.plugin, bf16=bf16)
    if settings.cuda_graphs:
        keep_gradients(model)
    return wrapped, build_optimizers(model, settings.optimizer, dtype=machine.precision.dtype)


def _writer(settings: PretrainSettings, machine: Machine) -> CheckpointWriter | None:
    """Of sharded weights every rank writes its own rows, else the first one everything."""
    accelerator, saving, ranks = machine.accelerator, settings.checkpoints, ALONE
    if not (machine.is_sharded or accelerator.is_main_process):
        return None
    if machine.is_sharded:
        rank, count, meet = accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
        ranks = Ranks(rank, count, meet, settings.timeouts.collective)
    folder = Path(settings.out) / "checkpoints"
    return CheckpointWriter(folder, saving.keep, asynchronous=saving.asynchronous, ranks=ranks)


def _minimal_pairs(asked: Validation, tokenizer: Any, config: EncoderConfig, *, sharded: bool) -> MinimalPairs | None:
    if asked.minimal_pairs is None:
        return None
    if sharded:  # logits are no forward pass, for which FSDP gathers the weights
        raise InputError("validation.minimal_pairs is set, but weights are sharded; score the finished model instead")
    pairs = sample_pairs(read_pairs([asked.minimal_pairs]), asked.num_pairs)
    return MinimalPairs.of(pairs, tokenizer, config.max_positions)


def _start_from_counts(model: MaskedLM, store: Store, accelerator: Accelerator, budget: Budget) -> float:
    """Set the first token vectors, on one rank for all (DDP spreads them); returns the seconds that took."""
    began = time.perf_counter()
    if accelerator.is_main_process:
        start_from_counts(model, store)
    seconds = broadcast_object_list([time.perf_counter() - began])[0]
    accelerator.print(f"token vectors: from co-occurrence counts, {seconds:.1f} s", flush=True)
    if budget.minutes is not None and seconds >= 60 * budget.minutes:
        accelerator.print(f"budget.minutes is {budget.minutes:g}: all spent on token vectors; raise it", flush=True)
    return seconds


def _loader(settings: PretrainSettings, dataset: StepBatches, first_step: int) -> Generator[list[TokenBatch]]:
    timeout, workers = settings.timeouts.loader, settings.data.workers
    return step_loader(dataset, first_step, settings.budget.steps, workers, timeout_seconds=timeout)


def _tell_start(store: Store, about: dict[str, Any], reasons: dict[str, str], state: State, resume: bool) -> None:
    """A few lines on what will run, and why."""
    lines = [
        f"data: {store.num_tokens:,} tokens, {store.num_documents:,} documents, {about['rows_per_epoch']:,} rows",
        f"model: {about['parameters']:,} parameters; ln V {about['ln_vocab']:.3f}, unigram entropy of the probe "
        f"{about['unigram_entropy']:.3f} nats",
        *(
            f"{name} attention: {why}" if name in ("global", "local") else f"{name}: {why}"
            for name, why in reasons.items()
        ),
        *([f"resuming after step {state.step:,}"] if resume else []),
    ]
    print("\n".join(lines), flush=True)
