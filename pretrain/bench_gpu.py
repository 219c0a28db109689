"""GPU tests and benchmarks in one go: `make bench-gpu`. Needs no network and stays under ten minutes.

Tests of the CUDA kernels, attention and loss kernels against torch and eager, and the loop's own training steps of
`bert` base and large and `modern` base at 512 and 1,024 tokens. Writes one JSON file and prints tables.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from encoderkit.encoder.config import Architecture, Size
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import run_command

STEP_TOKENS = 32_768  # of one training step
ROW_TOKENS = 4096  # that are packed together
DOCUMENT_TOKENS = 10_200  # twenty sequences of 512, or ten of 1,024
VOCAB_SIZE = 50_368
MASK_RATE = 0.30
TARGETS = (9830, 19_660)  # of such a step, and of one of 65,536 tokens
MOST_SECONDS = 570  # of everything
TESTS_SECONDS = 180  # of the tests among it
CASE_SECONDS = 45  # that a training case may take: with less left, none begins
WARM_UP_STEPS = 5
LOG_STEPS = 10  # between two times that the host waits for the device, as the log's default has it


def main() -> int:
    """Run everything; exit status 2 without a GPU, 1 where a section fails."""
    parser = argparse.ArgumentParser(prog="python -m encoderkit.pretrain.bench_gpu", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("runs/bench_gpu.json"), help="file for the figures")
    arguments = parser.parse_args()
    failed: list[str] = []
    end = time.perf_counter() + MOST_SECONDS

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
        sections: dict[str, Callable[[], Any]] = {
            "attention": _attention,
            "loss": _loss,
            "training": lambda: _training(end),
        }
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


@dataclass(frozen=True)
class Case:
    """A training step that is timed: length tokens in each sequence but the remainders of documents."""

    architecture: Architecture
    size: Size
    length: int
    compiled: bool = True
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    cuda_graphs: bool = False

    def __str__(self) -> str:
        ways = ["compiled"] * self.compiled + ["CUDA graphs"] * self.cuda_graphs
        return ", ".join([f"{self.architecture} {self.size}", f"{self.length}", self.precision, *ways])


CASES = (
    Case("modern", "base", 1024),
    Case("bert", "large", 512),
    Case("bert", "base", 512),
    Case("modern", "base", 512),
    Case("modern", "base", 1024, compiled=False),
    Case("bert", "base", 1024),
    Case("bert", "large", 1024),
    Case("bert", "large", 512, precision="fp8"),
    Case("modern", "base", 1024, cuda_graphs=True),
)


def training_step(case: Case, store: Path, seconds: float = 8.0) -> dict[str, Any]:
    """The loop's own steps on made-up text, from the store on: tokens/s, and model FLOP utilisation.

    graphs_after_warm_up: what torch.compile built once the first steps were made; host_waits: how often the host
    waited for the GPU within a step. Both should be 0.
    """
    import torch
    from torch._dynamo.utils import counters

    from encoderkit.pretrain.flops import forward_flops, peak_flops
    from encoderkit.pretrain.job import build_job
    from encoderkit.pretrain.loop import check_finite, train_step
    from encoderkit.pretrain.settings import Data, Masking, Model, Optimizer, PretrainSettings
    from encoderkit.pretrain.trial import steady, step

    settings = PretrainSettings(
        data=Data(store=str(store), max_tokens=case.length, row_tokens=ROW_TOKENS),
        model=Model(preset=case.architecture, size=case.size, max_positions=max(512, case.length)),
        masking=Masking(rate=MASK_RATE),
        optimizer=Optimizer(name="adamw"),
        batch_tokens=STEP_TOKENS,
        micro_batch_tokens=STEP_TOKENS,
        precision=case.precision,
        compile=case.compiled,
        cuda_graphs=case.cuda_graphs,
    )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    job = build_job(steady(settings, STEP_TOKENS), resume=False, in_memory=True)
    try:
        for _ in range(WARM_UP_STEPS):
            step(job)
        check_finite(job)
        graphs, batches = counters["stats"]["unique_graphs"], next(job.loader)
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            if on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            train_step(job, batches)
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
        job.state.step += 1
        check_finite(job)  # which waits for the device
        began, steps, tokens = time.perf_counter(), 0, 0
        while steps == 0 or time.perf_counter() - began < seconds:
            tokens += sum(step(job) for _ in range(LOG_STEPS))
            check_finite(job)
            steps += LOG_STEPS
        took = time.perf_counter() - began
    finally:
        job.loader.close()
    dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
    peak = peak_flops(job.accelerator.device, dtype)
    flops = steps * 3 * sum(forward_flops(job.model.config, batch) for batch in batches)
    return {
        "model": f"{case.architecture} {case.size}",
        "length": case.length,
        "precision": case.precision,
        "compiled": case.compiled,
        "cuda_graphs": case.cuda_graphs,
        "attention": job.facts["attention"],
        "tokens_per_second": round(tokens / took),
        "utilisation": None if peak is None else round(flops / took / peak, 4),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "steps": steps,
        "graphs_after_warm_up": counters["stats"]["unique_graphs"] - graphs,
        "host_waits": sum("called a synchronizing" in str(wait.message) for wait in waits),
    }


def made_up_store(folder: Path, documents: int = 100) -> Path:
    """A store of random words from VOCAB_SIZE types, in long documents: nearly all sequences are full."""
    import numpy as np

    from encoderkit.pretrain.prepare import prepare
    from encoderkit.pretrain.tokenizer import SPECIAL_TOKENS

    words = [f"w{i}" for i in range(VOCAB_SIZE - len(SPECIAL_TOKENS))]
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *words]) + "\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    drawn = np.random.default_rng(0).choice(words, (documents, DOCUMENT_TOKENS))
    (folder / "text.txt").write_text("\n".join(" ".join(document) for document in drawn))
    prepare([str(folder / "text.txt")], folder / "tokenizer", folder / "store", documents="line", held_out=0.02)
    return folder / "store"


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

    rows = []
    for targets in TARGETS:
        rows += bench_loss("cuda", torch.bfloat16, targets=targets, vocab_size=VOCAB_SIZE, hidden_size=768)
    _show("Loss of masked tokens, forward and backward, bf16", rows)
    return rows


def _training(end: float) -> dict[str, Any]:
    """Every case that can still begin; one that fails does not cost the others their figures."""
    import torch

    rows, others = [], {}
    with tempfile.TemporaryDirectory() as folder:
        store = made_up_store(Path(folder))
        for case in CASES:
            if time.perf_counter() + CASE_SECONDS > end:
                others[str(case)] = "left out, no time"
            elif case.precision == "fp8" and importlib.util.find_spec("torchao") is None:
                others[str(case)] = "left out, torchao is not installed"
            else:
                try:
                    rows.append(training_step(case, store))
                except Exception as error:
                    others[str(case)] = f"failed: {type(error).__name__}: {str(error)[:500]}"
                torch.compiler.reset()
                gc.collect()  # a job refers to itself, and the next case begins with what is still held
                torch.cuda.empty_cache()
    _show("Training step, AdamW; share of the bf16 peak", rows)
    for case_name, reason in others.items():
        print(f"{case_name}: {reason}")
    failed = [name for name, reason in others.items() if reason.startswith("failed")]
    return {"rows": rows, "others": others, **({"failed": "; ".join(failed)} if failed else {})}


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    table = Table(*[str(name) for name in rows[0]], title=title)
    for row in rows:
        table.add_row(*[str(value) for value in row.values()])
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
