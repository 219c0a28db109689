"""Which library multiplies fp32 matrices on the CPU: MKL, or oneDNN where it is measured to be faster and as exact.

MKL's fp32 products run at half of the speed of oneDNN's on some AMD processors. torch hands them to oneDNN when
set_float32_matmul_precision allows "medium", that is bf16 inside; oneDNN makes use of that only where the chip
multiplies bf16 in tiles (AMX), and there the error tells and MKL stays.
"""

from __future__ import annotations

import functools
import time
from typing import Any, Literal, NamedTuple

import torch

from encoderkit.kernels.measured import kept

Name = Literal["mkl", "onednn"]

SETTINGS: dict[Name, str] = {"mkl": "highest", "onednn": "medium"}
FASTER = 1.2  # how much, for a choice that is the same each time it is measured
EXACT = 2.0  # times MKL's error that is still rounding to fp32
TRIALS = 10


class Route(NamedTuple):
    """name: the library. reason: what was measured."""

    name: Name
    reason: str


def use_route(name: Name) -> None:
    """Multiply fp32 matrices this way from now on, in this process."""
    torch.set_float32_matmul_precision(SETTINGS[name])


def onednn_multiplies() -> bool:
    """Whether that route is in use; asked so that torch's other ways to set it do not matter."""
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]  # made when torch starts


@functools.cache
def fastest_route() -> Route:
    """Measured once on a machine, in a fraction of a second; torch's setting is left as it was."""
    found: Any = kept("matrix route", _measure, _is_route)
    return Route(*found)


def _is_route(found: Any) -> bool:
    return isinstance(found, list) and [*map(type, found)] == [str, str] and found[0] in SETTINGS


def _measure() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 512, generator=generator) for size in (2048, 512))
    exact = x.double() @ weight.double().T
    seconds, errors = dict.fromkeys(SETTINGS, float("inf")), dict.fromkeys(SETTINGS, 0.0)
    before = torch.get_float32_matmul_precision()
    try:
        for trial in range(TRIALS):  # alternating, so that a slow moment meets both
            for name in SETTINGS:
                use_route(name)
                start = time.perf_counter()
                product = x @ weight.T
                if trial > 1:  # kernels are built in the first calls
                    seconds[name] = min(seconds[name], time.perf_counter() - start)
                errors[name] = float((product.double() - exact).norm() / exact.norm())
    finally:
        torch.set_float32_matmul_precision(before)
    speedup = seconds["mkl"] / seconds["onednn"]
    error = f"error {errors['onednn']:.1e}, MKL's {errors['mkl']:.1e}"
    told = f"oneDNN measured {speedup:.1f} times as fast as MKL, {error}"
    return ["onednn" if speedup > FASTER and errors["onednn"] < EXACT * errors["mkl"] else "mkl", told]
