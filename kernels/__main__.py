"""`python -m encoderkit.kernels info|bench`. Imports no torch until a command runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from encoderkit.kernels.errors import InputError

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 2 where the input cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m encoderkit.kernels", description="Attention kernels and the loss.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, devices, and which kernel serves what here")
    info.add_argument(
        "--measure",
        action="store_true",
        help="measure this machine again: fp32 products now, bf16 when it is next asked for",
    )
    bench = commands.add_parser("bench", help="times against padded SDPA, eager attention and full logits")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    bench.add_argument("--dtype", choices=DTYPES, default="bf16")
    bench.add_argument("--lengths", type=int, nargs="+", default=[128, 512], metavar="TOKENS", help="longest sequences")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    options = parser.parse_args(argv)
    try:
        if options.command == "info":
            from encoderkit.kernels.info import print_info

            print_info(measure=options.measure)
        else:
            _bench(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _bench(options: argparse.Namespace) -> None:
    if min(options.lengths) < 2:
        raise InputError(f"--lengths has {min(options.lengths)}; expected at least 2 tokens")
    if options.json is not None:
        _check_writable(options.json)
    import torch
    from rich.console import Console
    from rich.table import Column, Table

    from encoderkit.kernels.bench import bench_attention, bench_loss
    from encoderkit.kernels.matrix_route import fastest_route, use_route

    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but torch finds no GPU here; use --device cpu")
    dtype = getattr(torch, DTYPES[options.dtype])
    if options.device == "cpu":
        use_route(fastest_route().name)  # as the encoder does
    rows = bench_attention(options.device, options.lengths, dtype) + bench_loss(options.device, dtype)
    console = Console()
    names = ("kernel", "length", "window", "forward ms", "total ms", "speedup", "peak MiB")
    table = Table(*(Column(name, no_wrap=True) for name in names))
    console.width = max(console.width, 100)  # of a file too, where numbers would be cut off
    for row in rows:
        numbers = (row.get("forward_ms"), row["total_ms"], row["speedup"], row["peak_mib"])
        shown = ("" if number is None else f"{number:.2f}" for number in numbers)
        table.add_row(row["kernel"], str(row.get("length", "")), str(row.get("window") or ""), *shown)
    console.print(table)
    console.print("speedup: padded SDPA's total time over the kernel's; for the loss, that of full logits.")
    if options.json is not None:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


def _check_writable(file: Path) -> None:
    folder = file.absolute().parent
    if not folder.is_dir():
        raise InputError(f"--json {file}: there is no folder {folder}; make it first")
    if file.is_dir():
        raise InputError(f"--json {file} is a folder; expected a file, such as {file / 'rows.json'}")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise InputError(f"--json {file} cannot be written; give another file")


if __name__ == "__main__":
    sys.exit(main())
