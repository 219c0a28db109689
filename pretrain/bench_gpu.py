"""GPU tests and benchmarks in one go: `make bench-gpu`. Needs no network and stays under ten minutes.

Tests of the CUDA kernels, attention kernels against torch and eager at several lengths, and whole training steps of
`modern` base at 512 and 1,024 tokens. Writes one JSON file and prints tables.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import run_command

ROW_TOKENS = 32_768  # tokens of one training step
VOCAB_SIZE = 50_368
MASK_RATE = 0.30
TESTS_SECONDS = 300  # the rest needs about four minutes


def main() -> int:
    """Run everything; exit status 2 without a GPU, 1 where a section fails."""
    parser = argparse.ArgumentParser(prog="python -m encoderkit.pretrain.bench_gpu", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("runs/bench_gpu.json"), help="file for the figures")
    arguments = parser.parse_args()
    failed: list[str] = []

    def bench() -> None:
        import torch

        if not torch.cuda.is_available():
            raise InputError("no GPU: torch sees no CUDA device here, so nothing was run; expected an NVIDIA GPU")
        results: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        sections: dict[str, Callable[[], Any]] = {"attention": _attention, "training": _training}
        tests = Path(__file__).resolve().parent.parent / "tests"
        if tests.is_dir():
            sections = {"tests": lambda: _gpu_tests(tests), **sections}
        for name, section in sections.items():
            try:
                results[name] = section()
            except Exception as error:  # one section that fails must not cost the others their figures
                results[name] = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
                print(f"{name} failed: {results[name]['failed']}")
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        failed.extend(name for name in sections if "failed" in results[name])
        print(f"figures: {arguments.json}")

    return run_command(bench) or int(bool(failed))


def training_step(length: int, compiled: bool, seconds: float = 20.0) -> dict[str, Any]:
    """Tokens/s and model FLOP utilisation of whole steps on packed random tokens, every sequence of this length."""
    import torch

    from encoderkit.encoder.config import preset
    from encoderkit.encoder.model import MaskedLM, choose_attention
    from encoderkit.pretrain.flops import forward_flops, peak_flops
    from encoderkit.pretrain.optimizer import build_optimizers
    from encoderkit.pretrain.settings import Optimizer

    device = torch.device("cuda")
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    config = preset("modern", "base", vocab_size=VOCAB_SIZE)
    choices = choose_attention(config, "auto", device=device, dtype=torch.bfloat16)
    model = MaskedLM(config).to(device)
    model.encoder.use_attention(choices)
    optimizers = build_optimizers(model, Optimizer(name="adamw"))
    if compiled:
        model.encoder.compile_blocks()
    batch = _random_batch(length).to(device)

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            result = model(batch)
        (result.loss / result.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        steps += 5
    tokens_per_second = steps * ROW_TOKENS / (time.perf_counter() - began)
    peak = peak_flops(device, torch.bfloat16)
    flops_per_token = 3 * forward_flops(config, batch) / ROW_TOKENS
    return {
        "length": length,
        "compiled": compiled,
        "attention": {span: choice.name for span, choice in choices.items()},
        "tokens_per_second": round(tokens_per_second),
        "utilisation": None if peak is None else round(tokens_per_second * flops_per_token / peak, 4),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "steps": steps,
    }


def _random_batch(length: int) -> Any:
    import torch

    from encoderkit.encoder.batch import TokenBatch

    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(5, VOCAB_SIZE, (ROW_TOKENS // length, length), generator=generator).tolist()
    every = round(1 / MASK_RATE)
    targets = [{p: sequence[p] for p in range(1, length, every)} for sequence in sequences]
    return TokenBatch.from_sequences(sequences, targets=targets)


def _gpu_tests(tests: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TESTS_SECONDS, cwd=tests.parent)
    print(done.stdout[-4000:], done.stderr[-1000:], sep="\n")
    result = {"summary": (done.stdout.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    return result if done.returncode == 0 else {**result, "failed": done.stdout[-2000:]}


def _attention() -> list[dict[str, Any]]:
    import torch

    from encoderkit.kernels.bench import bench_attention

    rows = bench_attention("cuda", [128, 512, 1024, 4096], torch.bfloat16)
    _show("Attention, forward and backward, bf16", rows)
    return rows


def _training() -> list[dict[str, Any]]:
    rows = [training_step(length, compiled) for length in (512, 1024) for compiled in (False, True)]
    _show("Training step of modern base, bf16, AdamW", rows)
    return rows


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*[str(name) for name in rows[0]], title=title)
    for row in rows:
        table.add_row(*[str(value) for value in row.values()])
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
