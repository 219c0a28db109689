"""Which number format matrix products run in. Weights, gradients and optimizer state stay fp32 (master weights)."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Literal

import torch

from encoderkit.kernels.errors import InputError
from encoderkit.kernels.matrix_route import Route, fastest_route, use_route


@dataclass(frozen=True)
class Precision:
    """name: fp32 or bf16. reason: why it was chosen. route: of fp32 products on a CPU, None on a GPU."""

    name: Literal["fp32", "bf16"]
    dtype: torch.dtype
    reason: str
    route: Route | None = None

    @property
    def accelerate(self) -> str:
        """The value of Accelerator(mixed_precision=...)."""
        return "no" if self.name == "fp32" else self.name


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """Turn "auto" into what this device does fast; refuse what it cannot do. On a CPU, fp32 products go their fastest
    route from then on.

    Raises InputError for a format that the device has no instructions for.
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
    if name == "bf16" and not able:
        raise InputError(f"precision is bf16, but {where} has no bf16 instructions; use fp32 or auto")
    return Precision(name, _DTYPES[name], "as configured", route)


def has_bf16(device: torch.device) -> bool:
    """Whether this device multiplies bf16 matrices in hardware (x86: AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


@functools.cache
def bf16_speedup() -> float:
    """How many times as fast this CPU multiplies matrices in bf16 as in fp32, measured once, in a fraction of a second.

    Having the instructions does not tell: on a Xeon with AVX512-BF16 but without AMX it is 0.6.
    """
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
