"""Which number format matrix products run in. Weights, gradients and optimizer state stay fp32 (master weights)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from encoderkit.kernels.errors import InputError


@dataclass(frozen=True)
class Precision:
    """name: fp32 or bf16. reason: why it was chosen."""

    name: str
    dtype: torch.dtype
    reason: str

    @property
    def accelerate(self) -> str:
        """The value of Accelerator(mixed_precision=...)."""
        return "no" if self.name == "fp32" else self.name


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Turn "auto" into what this device does fast; refuse what it cannot do.

    Raises InputError for a format that the device has no instructions for.
    """
    if device.type == "cuda":
        has_bf16, where = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name(device)
    else:
        has_bf16, where = cpu_has_bf16(), "this CPU"
    if name == "auto":
        name = "bf16" if has_bf16 else "fp32"
        return Precision(name, _DTYPES[name], f"{where} has {'' if has_bf16 else 'no '}bf16 instructions")
    if name == "bf16" and not has_bf16:
        raise InputError(f"precision is bf16, but {where} has no bf16 instructions; use fp32 or auto")
    return Precision(name, _DTYPES[name], "as configured")


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (x86: AVX512-BF16 or AMX)."""
    return any(getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
