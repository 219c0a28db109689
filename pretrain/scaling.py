"""What a pretraining job costs on many GPUs in time and communication: arithmetic, not a measurement.

`python -m encoderkit.pretrain.scaling` prints pretrain/recipes/scaling.md, which says how it is computed.

N ranks, P parameters, T tokens
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from encoderkit.encoder.batch import TokenBatch
from encoderkit.encoder.config import EncoderConfig
from encoderkit.encoder.model import MaskedLM
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.flops import PEAKS_16_BIT, forward_flops
from encoderkit.pretrain.memory import empty_model
from encoderkit.pretrain.report import table_lines
from encoderkit.pretrain.scaling_settings import Network, ScalingSettings
from encoderkit.pretrain.settings import Model
from encoderkit.pretrain.terminal import plain_console

FP32, BF16 = 4, 2  # bytes
BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's, each one call
BACKWARD = 2 / 3  # share of a step's computing


@dataclass(frozen=True)
class Parts:
    """What a job is made of, whatever the number of GPUs. origin: of tokens_per_second."""

    parameters: int
    block_parameters: int
    matrix_parameters: int  # that Muon trains: matrices of the blocks
    num_blocks: int
    flops_per_token: float
    tokens_per_second: float
    origin: str

    @classmethod
    def of(cls, settings: ScalingSettings) -> Parts:
        """Counted on a model without storage. Raises InputError where nobody knows how fast the GPU is."""
        kind, size = settings.model.preset or "modern", settings.model.size or "base"
        asked = replace(settings.model, preset=kind, size=size)
        config = asked.encoder_config(vocab_size=settings.vocab_size, pad_token_id=0)
        if settings.max_tokens > config.max_positions:
            raise InputError(
                f"max_tokens is {settings.max_tokens}, but model.max_positions is {config.max_positions}; lower "
                "the one or raise the other"
            )
        plain = vars(Model(preset=kind, size=size))
        changed = [name for name, value in vars(asked).items() if value != plain[name]]
        model = empty_model(config)
        batch = _even_batch(settings)
        flops = 3 * forward_flops(config, batch) / len(batch.input_ids)
        speed, origin = settings.tokens_per_second, "given"
        if settings.measured is not None and changed:
            raise InputError(f"measured is of the presets as they are; leave out model.{', model.'.join(changed)}")
        if settings.measured is not None:
            speed, origin = _measured(f"{kind} {size}", settings)
        elif speed is None:
            peak = PEAKS_16_BIT.get(settings.gpu)
            if peak is None:
                known = ", ".join(PEAKS_16_BIT)
                raise InputError(f"gpu is {settings.gpu!r}; expected {known}, or tokens_per_second of one GPU")
            speed = settings.utilisation * peak / flops
            origin = f"assumed: {settings.utilisation:.0%} of {peak / 1e12:,.0f} TFLOP/s ({settings.gpu})"
        return cls(*_count(model, config), flops, speed, origin)


@dataclass(frozen=True)
class Cost:
    """Of one optimizer step on so many GPUs: seconds, and bytes that each GPU takes part in reducing or gathering.

    hidden: communication that can run while the GPU computes, at best. state_bytes: weights, gradients and optimizer
    state that stay on a GPU.
    """

    gpus: int
    rank_tokens: float
    compute: float
    communication: float
    hidden: float
    bytes: float
    state_bytes: float

    @property
    def step(self) -> tuple[float, float]:
        """Seconds of a step at best, everything hidden that can be, and at worst, nothing hidden."""
        return self.compute + self.communication - self.hidden, self.compute + self.communication

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of the time that is computing, at worst and at best."""
        best, worst = self.step
        return self.compute / worst, self.compute / best


@dataclass(frozen=True)
class Call:
    """Collective calls of one kind in a step. passes: 2 for an all-reduce, 1 for a gather, a scatter or an exchange."""

    bytes: float
    passes: int
    calls: int = 1

    def seconds(self, gpus: int, network: Network) -> float:
        """As nccl-tests defines bus bandwidth: passes (N - 1) / N bytes / bandwidth, and the latency of a tree."""
        bandwidth = network.inside if gpus <= network.gpus_per_node else network.between
        latency = self.calls * self.passes * math.ceil(math.log2(gpus)) * network.latency * 1e-6
        return self.passes * (gpus - 1) / gpus * self.bytes / (bandwidth * 1e9) + latency


def cost(settings: ScalingSettings, parts: Parts, gpus: int) -> Cost:
    """One step on so many GPUs. Raises InputError where a GPU would have less than one sequence."""
    rank_tokens = settings.batch_tokens / gpus
    if rank_tokens < settings.max_tokens:
        raise InputError(
            f"gpus has {gpus}: {rank_tokens:g} of batch_tokens {settings.batch_tokens} each; expected at least a "
            f"sequence of {settings.max_tokens}"
        )
    micro_batches = math.ceil(rank_tokens / settings.micro_batch_tokens)
    compute = rank_tokens / parts.tokens_per_second
    backward, sync = _calls(settings, parts, micro_batches, gpus)
    while_backward, after = (sum(call.seconds(gpus, settings.network) for call in part) for part in (backward, sync))
    state = FP32 * (2 * parts.parameters + 2 * parts.parameters)
    if settings.optimizer == "muon":
        state -= FP32 * parts.matrix_parameters
    # A sharded model communicates in every micro-batch, in both directions; a replicated one in the last backward pass.
    room = compute if settings.parallel == "fsdp2" else BACKWARD * compute / micro_batches
    return Cost(
        gpus=gpus,
        rank_tokens=rank_tokens,
        compute=compute,
        communication=while_backward + after,
        hidden=min(while_backward, room),
        bytes=sum(call.bytes * call.passes for call in (*backward, *sync)),
        state_bytes=state / gpus if settings.parallel == "fsdp2" else state,
    )


def run_scaling(settings: ScalingSettings) -> None:
    """Print inputs with their origin, and a column for each number of GPUs: the command encoderkit-pretrain scaling."""
    parts, console = Parts.of(settings), plain_console()
    for title, rows in (("inputs", _inputs(settings, parts)), ("a step, and the job", _rows(settings, parts))):
        header, *body = rows
        table = Table(*header, title=title, title_justify="left", title_style="bold", box=None)
        for row in body:
            table.add_row(*row)
        console.print(table)
        console.print()


def page() -> str:
    """pretrain/recipes/scaling.md."""
    sections = []
    for title, command, settings in _EXAMPLES:
        parts = Parts.of(settings)
        sections += [f"## {title}", "", f"```\n{command}\n```", ""]
        for head, *body in (_inputs(settings, parts), _rows(settings, parts)):
            sections += [*table_lines(head, body), ""]
    return _PAGE + "\n" + "\n".join(sections)


def _measured(model: str, settings: ScalingSettings) -> tuple[float, str]:
    """The highest tokens/s that make bench-gpu wrote for this model, and where they are from."""
    try:
        found = json.loads(Path(str(settings.measured)).read_text(encoding="utf-8"))
        rows, origin = found["training"]["rows"], f"measured on {found['gpu']}, {found['date']}"
        speeds = {(row["model"], row["length"]): 0.0 for row in rows}
        for row in rows:
            at = row["model"], row["length"]
            speeds[at] = max(speeds[at], float(row["tokens_per_second"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"measured {settings.measured}: {error!r}; expected what make bench-gpu writes") from error
    if (model, settings.max_tokens) not in speeds:
        known = ", ".join(f"{name} at {length}" for name, length in speeds) or "none"
        raise InputError(f"measured {settings.measured} has no {model} at {settings.max_tokens} tokens; it has {known}")
    return speeds[model, settings.max_tokens], origin


def _count(model: MaskedLM, config: EncoderConfig) -> tuple[int, int, int, int]:
    blocks = model.encoder.blocks
    in_blocks = sum(parameter.numel() for parameter in blocks.parameters())
    matrices = sum(parameter.numel() for parameter in blocks.parameters() if parameter.ndim == 2)
    return sum(p.numel() for p in model.parameters()), in_blocks, matrices, config.num_layers


def _even_batch(settings: ScalingSettings) -> TokenBatch:
    """A micro-batch of sequences of full length, with as many targets as the masking rate says."""
    length = settings.max_tokens
    targets = dict.fromkeys(range(max(1, round(settings.mask_rate * length))), 0)
    sequences = max(1, settings.micro_batch_tokens // length)
    return TokenBatch.from_sequences([[0] * length] * sequences, targets=[targets] * sequences)


def _calls(settings: ScalingSettings, parts: Parts, micro_batches: int, gpus: int) -> tuple[list[Call], list[Call]]:
    """Communication that may go on while the GPU computes, and that of the optimizer, which nothing hides."""
    P, muon = parts.parameters, parts.matrix_parameters if settings.optimizer == "muon" else 0
    reduced = P * (BF16 if settings.gradient_reduction == "bf16" else FP32)
    if settings.parallel == "ddp":
        during = [Call(reduced, passes=2, calls=math.ceil(FP32 * P / BUCKET_BYTES))]
        return during, [Call(muon * BF16, passes=1, calls=4 if muon else 0)]
    units = parts.num_blocks + 1
    during = [
        Call(micro_batches * FP32 * (P + parts.block_parameters), passes=1, calls=micro_batches * (2 * units - 1)),
        Call(micro_batches * reduced, passes=1, calls=micro_batches * units),
    ]
    return during, [Call(muon * (FP32 + BF16) / gpus, passes=1, calls=8 if muon else 0)]


def _inputs(settings: ScalingSettings, parts: Parts) -> list[tuple[str, ...]]:
    network, usual = settings.network, Network()

    def origin(name: str) -> str:
        return "assumed" if getattr(network, name) == getattr(usual, name) else "given"

    return [
        ("input", "value", "origin"),
        ("parameters, padding rows included", f"{parts.parameters:,}", "counted"),
        ("of these in blocks", f"{parts.block_parameters:,}", "counted"),
        ("FLOPs a token, forward and backward", f"{parts.flops_per_token / 1e9:.3f}G", "counted"),
        ("tokens/s of one GPU", f"{parts.tokens_per_second:,.0f}", parts.origin),
        ("bus bandwidth in one server", f"{network.inside:g} GB/s", origin("inside")),
        ("bus bandwidth between servers", f"{network.between:g} GB/s", origin("between")),
        ("latency, by doubling of ranks", f"{network.latency:g} us", origin("latency")),
    ]


def _rows(settings: ScalingSettings, parts: Parts) -> list[tuple[str, ...]]:
    """A column for each number of GPUs."""
    price, steps = settings.price_per_gpu_hour, math.ceil(settings.tokens / settings.batch_tokens)
    names = ["GPUs", "tokens a GPU and step", "state a GPU", "sent a step", "compute", "communication", "efficiency"]
    columns = [[*names, "hours", "GPU-hours", *([] if price is None else ["cost"])]]
    for gpus in settings.gpus:
        of_step = cost(settings, parts, gpus)
        worst, best = of_step.efficiency
        hours = [steps * seconds / 3600 for seconds in of_step.step]
        column = [
            f"{gpus}",
            f"{of_step.rank_tokens:,.0f}",
            f"{of_step.state_bytes / 1e9:.3g} GB",
            f"{of_step.bytes / 1e9:.3g} GB",
            f"{1e3 * of_step.compute:,.0f} ms",
            f"{1e3 * of_step.communication:,.0f} ms",
            f"{worst:.0%} to {best:.0%}" if best - worst > 0.005 else f"{best:.0%}",
            _between(*hours),
            _between(*(gpus * part for part in hours)),
        ]
        columns.append([*column, *([] if price is None else [_between(*(gpus * part * price for part in hours))])])
    return list(zip(*columns))


def _between(low: float, high: float) -> str:
    digits = 0 if high >= 100 else 1 if high >= 10 else 2
    a, b = f"{low:,.{digits}f}", f"{high:,.{digits}f}"
    return a if a == b else f"{a} to {b}"


_BERT: dict[str, Any] = {"vocab_size": 30_522, "mask_rate": 0.15, "batch_tokens": 524_288}
_LARGE = ScalingSettings(model=Model(preset="bert", size="large"), **_BERT)
_MODERN = ScalingSettings(
    model=Model(preset="modern", size="base"), max_tokens=1024, batch_tokens=4_718_592, tokens=10**12
)
_COMMAND = "encoderkit-pretrain scaling --model.preset"
_BERT_REST = "--vocab_size 30522 --mask_rate 0.15 \\\n    --batch_tokens 524288"
_MODERN_REST = "--max_tokens 1024 --batch_tokens 4718592 \\\n    --tokens 1_000_000_000_000"
_EXAMPLES = (
    (
        "bert base, 100G tokens",
        f"{_COMMAND} bert --model.size base {_BERT_REST}",
        replace(_LARGE, model=Model(preset="bert", size="base")),
    ),
    ("bert large, 100G tokens", f"{_COMMAND} bert --model.size large {_BERT_REST}", _LARGE),
    ("modern base, 1T tokens", f"{_COMMAND} modern --model.size base {_MODERN_REST}", _MODERN),
    (
        "modern base, sharded, with Muon",
        f"{_COMMAND} modern --model.size base {_MODERN_REST} --parallel fsdp2 --optimizer muon",
        replace(_MODERN, parallel="fsdp2", optimizer="muon"),
    ),
    (
        "bert large over a slow network",
        f"{_COMMAND} bert --model.size large {_BERT_REST} --network.between 10 --gradient_reduction bf16",
        replace(_LARGE, network=Network(between=10.0), gradient_reduction="bf16"),
    ),
)

_PAGE = """# What a job costs on 8, 64 and 512 GPUs

Arithmetic, not a measurement: several GPUs have not run this yet. Each input says where it comes from: **counted** on
the model, **given** on the command line, or **assumed**. Put your own in place of what is assumed:

- `--tokens_per_second` of one GPU, which `encoderkit-pretrain doctor` prints for a recipe, or `--measured
  runs/bench_gpu.json`, the figures of `make bench-gpu` for `bert` base and large and `modern` base.
- `--network.inside` and `--network.between`: the bus bandwidth that `all_reduce_perf` of nccl-tests prints, in GB/s,
  for one server and for several.

How it is computed, for N ranks:

- compute: `batch_tokens` / N / tokens/s of one GPU, however few tokens a GPU has; below some ten thousand it is slower.
- An all-reduce of B bytes takes 2 (N - 1) / N B / bandwidth; a gather, a scatter and an exchange take half of that.
  Each call adds log2 N latencies, twice for an all-reduce. The ring and the tree of a library are not told apart.
- DDP: one all-reduce of the gradients a step, 4 bytes a parameter, 2 with `--gradient_reduction bf16`, in calls of
  25 MiB, which the backward pass of the last micro-batch may hide.
- FSDP2: in each micro-batch, weights are gathered twice in fp32 (token table and head once) and gradients scattered,
  which all computing may hide.
- Muon: DDP gathers the updates of the blocks' matrices in bf16; FSDP2 exchanges rows for whole matrices and back, 6
  bytes a parameter over N. Nothing hides that. What Muon computes is not counted beside the tokens/s of one GPU.
- state: weights, gradients and optimizer state that stay on a GPU, 16 bytes a parameter with AdamW, over N with FSDP2.
- sent: bytes that a GPU passes on in a step, about.
- efficiency: compute / step time, from nothing hidden to everything hidden that can be. Loading data, validation and
  checkpoints (12 bytes a parameter, written by the first rank under DDP, by all under FSDP2) are not in it, nor are
  slow ranks.
"""

if __name__ == "__main__":
    print(page(), end="")
