"""Which number format matrix products run in. Weights, gradients and optimizer state stay fp32 (master weights)."""

from __future__ import annotations

import functools
import importlib.util
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from encoderkit.kernels.errors import InputError
from encoderkit.kernels.matrix_route import Route, fastest_route, use_route
from encoderkit.kernels.measured import kept


@dataclass(frozen=True)
class Precision:
    """name: of the format. dtype: of what goes into products and attention; fp8 products round it further.

    reason: why it was chosen. route: of fp32 products on a CPU, None on a GPU.
    """

    name: Literal["fp32", "bf16", "fp8"]
    dtype: torch.dtype
    reason: str
    route: Route | None = None

    @property
    def accelerate(self) -> str:
        """The value of Accelerator(mixed_precision=...)."""
        return "no" if self.name == "fp32" else "bf16"


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def resolve_precision(name: Literal["auto", "fp32", "bf16", "fp8"], device: torch.device) -> Precision:
    """Turn "auto" into what this device does fast; refuse what it cannot do. On a CPU, fp32 products go their fastest
    route from then on.

    Raises InputError for a format that the device has no instructions for, and for fp8 without torchao.
    """
    route = fastest_route() if device.type == "cpu" else None
    use_route("mkl" if route is None else route.name)  # the other one would round fp32 products on a GPU
    able, where = has_bf16(device), torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    if name == "auto":
        fast, reason = able, f"{where} has {'' if able else 'no '}bf16 instructions"
        if able and device.type == "cpu":
            speedup = bf16_speedup()
            fast, reason = speedup > 1, f"bf16 products measured {speedup:.1f} times as fast as fp32 on {where}"
        name = "bf16" if fast else "fp32"
        return Precision(name, _DTYPES[name], reason, route)
    if name == "fp8":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            raise InputError(f"precision is fp8, but {where} has no fp8 instructions; use bf16, fp32 or auto")
        if importlib.util.find_spec("torchao") is None:
            raise InputError("precision is fp8, which needs torchao; pip install 'encoderkit[fp8]'")
    if name == "bf16" and not able:
        raise InputError(f"precision is bf16, but {where} has no bf16 instructions; use fp32 or auto")
    return Precision(name, _DTYPES[name], "as configured", route)


def use_fp8(blocks: nn.Module, *, emulate: bool = False) -> None:
    """Let every linear map of these blocks multiply in fp8: e4m3 for weights and inputs, e5m2 for gradients.

    By torchao, with a scale a tensor (Micikevicius et al. 2022, arXiv:2209.05433); parameters keep their names and
    their fp32. emulate: round to fp8 and multiply in bf16, for machines without fp8. Not yet run on a GPU.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)  # a number of tokens need not divide by 16
    convert_to_float8_training(blocks, config=config)


def has_bf16(device: torch.device) -> bool:
    """Whether this device multiplies bf16 matrices in hardware (x86: AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


@functools.cache
def bf16_speedup() -> float:
    """How many times as fast this CPU multiplies matrices in bf16 as in fp32, measured once on a machine.

    Having the instructions does not tell: on a Xeon with AVX512-BF16 but without AMX it is 0.6. fp32 goes the route
    that is in use.
    """
    return kept(f"bf16 speedup, fp32 {torch.get_float32_matmul_precision()}", _measure_bf16, _is_speedup)


def _is_speedup(found: Any) -> bool:
    return isinstance(found, float) and found > 0


def _measure_bf16() -> float:
    rows = torch.ones(1024, 512)
    seconds = {dtype: float("inf") for dtype in _DTYPES.values()}
    for trial in range(12):  # alternating, so that a slow moment meets both
        for dtype in seconds:
            x = rows.to(dtype)
            start = time.perf_counter()
            x @ x[:512].T
            if trial > 1:  # kernels are built in the first calls
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.float32] / seconds[torch.bfloat16]
