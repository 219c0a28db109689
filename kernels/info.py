"""What `python -m encoderkit.kernels info` shows: versions, devices, and which kernel serves what here."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from encoderkit.kernels import measured
from encoderkit.kernels.attention import BACKENDS, select_backend
from encoderkit.kernels.attention_mask import Request
from encoderkit.kernels.matrix_route import fastest_route

# The GPU on which a committed result shows that a kernel passed its tests, None where there is no such result yet.
GPU_RESULTS: dict[str, str | None] = {"xformers": None, "varlen": None, "torch": None}

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def print_info(*, measure: bool = False) -> None:
    """Print to standard output what is installed and what would run. measure: the speed of products, again."""
    if measure:
        measured.forget()
        fastest_route.cache_clear()
    console = Console()
    versions = ", ".join(f"{name} {_version(name)}" for name in ("encoderkit", "torch", "xformers", "transformers"))
    console.print(f"Python {platform.python_version()}, {versions}", highlight=False)
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        console.print(f"{device}: {_describe(device)}", highlight=False)
        console.print(_backends(device))
        console.print(_choices(device))
    where = f"measured once on this machine and kept in {measured.file()}; again: info --measure"
    console.print(f"fp32 products: {where}", highlight=False, soft_wrap=True)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        about = f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        return f"{about}; fp32 products by {fastest_route().name} ({fastest_route().reason})"
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"


def _backends(device: torch.device) -> Table:
    table = Table("backend", "full attention, bf16", "GPU result", title=f"backends on {device}")
    for name, module in BACKENDS.items():
        reason = module.unavailable(Request(device, torch.bfloat16, 64, window=False, dropout=False))
        result = (GPU_RESULTS[name] or "not yet run on GPU") if name in GPU_RESULTS else "for tests only"
        table.add_row(name, "serves" if reason is None else reason, result)
    return table


def _choices(device: torch.device) -> Table:
    table = Table("precision", "full", "window", "full, dropout", "full, ALiBi", title=f'what "auto" picks on {device}')
    for precision, dtype in _DTYPES.items():
        cases = ((False, False, False), (True, False, False), (False, True, False), (False, False, True))
        picks = (
            select_backend(
                "auto", device=device, dtype=dtype, head_size=64, window=window, dropout=dropout, alibi=alibi
            ).name
            for window, dropout, alibi in cases
        )
        table.add_row(precision, *picks)
    return table
