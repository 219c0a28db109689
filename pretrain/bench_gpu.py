"""GPU tests and benchmarks in one go: `make bench-gpu`. Needs no network and stays under ten minutes.

Tests of the CUDA kernels, attention and loss kernels against torch and eager, and whole training steps of `bert` base
and large and `modern` base at 512 and 1,024 tokens. Writes one JSON file and prints tables.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import run_command

ROW_TOKENS = 32_768  # tokens of one training step
VOCAB_SIZE = 50_368
MASK_RATE = 0.30
TARGETS = 9830  # of such a step
TESTS_SECONDS = 240  # the rest needs about six minutes
MODELS = (("modern", "base"), ("bert", "base"), ("bert", "large"))
WARM_UP_STEPS = 5


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
        sections: dict[str, Callable[[], Any]] = {"attention": _attention, "loss": _loss, "training": _training}
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


def training_step(
    architecture: str, size: str, length: int, compiled: bool, seconds: float = 8.0, precision: str = "bf16"
) -> dict[str, Any]:
    """Whole steps on packed random tokens, every sequence of this length: tokens/s, and model FLOP utilisation.

    graphs_after_warm_up: what torch.compile built once the first steps were made; host_waits: how often the host
    waited for the GPU within a step. Both should be 0.
    """
    import torch
    from torch._dynamo.utils import counters

    from encoderkit.encoder.config import preset
    from encoderkit.encoder.model import MaskedLM, choose_attention
    from encoderkit.encoder.precision import use_fp8
    from encoderkit.pretrain.flops import forward_flops, peak_flops
    from encoderkit.pretrain.optimizer import build_optimizers
    from encoderkit.pretrain.settings import Optimizer

    device = torch.device("cuda")
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    config = preset(architecture, size, vocab_size=VOCAB_SIZE, max_positions=max(512, length))
    choices = choose_attention(config, "auto", device=device, dtype=torch.bfloat16)
    model = MaskedLM(config).to(device)
    model.encoder.use_attention(choices)
    optimizers = build_optimizers(model, Optimizer(name="adamw"))
    if precision == "fp8":
        use_fp8(model.encoder.blocks)
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

    for _ in range(WARM_UP_STEPS):
        step()
    torch.cuda.synchronize()
    graphs = counters["stats"]["unique_graphs"]
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
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
        "model": f"{architecture} {size}",
        "length": length,
        "precision": precision,
        "compiled": compiled,
        "attention": {span: choice.name for span, choice in choices.items()},
        "tokens_per_second": round(tokens_per_second),
        "utilisation": None if peak is None else round(tokens_per_second * flops_per_token / peak, 4),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "steps": steps,
        "graphs_after_warm_up": counters["stats"]["unique_graphs"] - graphs,
        "host_waits": sum("called a synchronizing" in str(wait.message) for wait in waits),
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


def _loss() -> list[dict[str, Any]]:
    import torch

    from encoderkit.kernels.bench import bench_loss

    rows = bench_loss("cuda", torch.bfloat16, targets=TARGETS, vocab_size=VOCAB_SIZE, hidden_size=768)
    _show("Loss of masked tokens, forward and backward, bf16", rows)
    return rows


def _training() -> list[dict[str, Any]]:
    cases = [(*model, length, True) for model in MODELS for length in (512, 1024)]
    rows = [training_step(*case) for case in [("modern", "base", 1024, False), *cases]]
    if importlib.util.find_spec("torchao") is not None:
        rows.append(training_step("bert", "large", 512, True, precision="fp8"))
    _show("Training step, AdamW; share of the bf16 peak", rows)
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
