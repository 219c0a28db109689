"""Settings of the command scaling. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.settings import Model, check_range


@dataclass(frozen=True, kw_only=True)
class Network:
    """How fast ranks exchange tensors: bus bandwidth, as all_reduce_perf of nccl-tests prints it.

    The defaults are 80% of the makers' figures for H100 SXM servers: NVLink at 450 GB/s, eight cards of 50 GB/s.
    """

    inside: float = 360.0  # GB/s, while all GPUs are in one server
    between: float = 320.0  # GB/s, as soon as there are several
    gpus_per_node: int = 8
    latency: float = 10.0  # microseconds of each doubling of the number of ranks, in each collective call

    def __post_init__(self) -> None:
        check_range("network.inside", self.inside, 0.001)
        check_range("network.between", self.between, 0.001)
        check_range("network.gpus_per_node", self.gpus_per_node, 1)
        check_range("network.latency", self.latency, 0)


@dataclass(frozen=True, kw_only=True)
class ScalingSettings:
    """A pretraining job on many GPUs, by what one GPU does and what the network carries."""

    gpus: list[int] = field(default_factory=lambda: [8, 64, 512])  # how many, a column for each
    model: Model = field(default_factory=Model)  # without a size: base
    vocab_size: int = 50_368  # token types
    max_tokens: int = 512  # length of every sequence
    mask_rate: float = 0.30  # share of the tokens that are predicted
    tokens: int = 100_000_000_000  # of the whole job
    batch_tokens: int = 4_194_304  # tokens an optimizer step, over all ranks
    micro_batch_tokens: int = 32_768  # tokens that one rank holds at once
    tokens_per_second: float | None = (
        None  # of one GPU, as doctor or bench_gpu measured it; null: by gpu and utilisation
    )
    measured: str | None = None  # figures of make bench-gpu, which have tokens/s of this model at max_tokens
    gpu: str = "NVIDIA H100 80GB HBM3"  # name that torch gives it; its peak in 16 bits comes from the data sheet
    utilisation: float = 0.22  # share of that peak; Ettin 150M's on H100 is 24% (arXiv:2507.11412)
    optimizer: Literal["adamw", "muon"] = "adamw"
    parallel: Literal["ddp", "fsdp2"] = "ddp"  # whole models, or shards
    gradient_reduction: Literal["fp32", "bf16"] = "fp32"  # of gradients, over ranks
    network: Network = field(default_factory=Network)
    price_per_gpu_hour: float | None = None  # in any currency

    def __post_init__(self) -> None:
        if not self.gpus:
            raise InputError("gpus is empty; expected numbers of GPUs, such as 8 64 512")
        for count in self.gpus:
            check_range("gpus", count, 1)
        for name in ("vocab_size", "max_tokens", "tokens", "batch_tokens", "micro_batch_tokens"):
            check_range(name, getattr(self, name), 8)
        check_range("mask_rate", self.mask_rate, 0.01, 0.9)
        check_range("tokens_per_second", self.tokens_per_second, 1)
        if self.measured is not None and self.tokens_per_second is not None:
            raise InputError("measured and tokens_per_second are both set; leave one of them out")
        check_range("utilisation", self.utilisation, 0.001, 1)
        check_range("price_per_gpu_hour", self.price_per_gpu_hour, 0)
        if self.model.init_from is not None:
            raise InputError("model.init_from is set; name the preset and size of that model instead")
