"""encoderkit beside transformers on this machine's CPU: python -m encoderkit.finetune.bench

Training steps on full rows and on real lines, fine-tuning and inference on short texts, and batch building. All
candidates of a case alternate, so that a slow moment of the machine hits all; figures are medians over the rounds, and
ratios are of figures of the same case. FLOPs are those executed, as a share of the matrix rate measured beside.
"""

from __future__ import annotations

import datetime
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import parse_settings, run_command
from encoderkit.pretrain.settings import check_range

if TYPE_CHECKING:
    import torch

    from encoderkit.finetune.bench_candidates import Sequences, Trainer

PROG = "python -m encoderkit.finetune.bench"
VOCAB_SIZE = 8192
BATCHES, LINES = 2, 32  # of a pass over lines; lines of a batch
SHORT = 64  # tokens that short texts are cut to
MEGABYTES = 4  # of text that lines are taken from
MATRIX = 1536  # rows and columns of the products that measure the matrix rate


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is timed, and for how long."""

    sources: list[str] = field(default_factory=lambda: ["python-docs"])  # text whose lines are used, as for prepare
    seconds: float = 12.0  # of each case at least; 0 runs every candidate twice
    precisions: list[str] = field(default_factory=lambda: ["fp32", "bf16"])  # number formats
    cases: list[str] = field(default_factory=lambda: ["rows", "lines", "finetune", "batches"])  # parts to run
    json: str | None = None  # file for the figures

    def __post_init__(self) -> None:
        check_range("seconds", self.seconds, 0)
        for key, allowed in (("precisions", ("fp32", "bf16")), ("cases", ("rows", "lines", "finetune", "batches"))):
            for value in getattr(self, key):
                if value not in allowed:
                    raise InputError(f"{key} has {value!r}; expected some of {', '.join(allowed)}")
        if self.json is not None and not Path(self.json).absolute().parent.is_dir():
            raise InputError(f"json {self.json}: there is no folder {Path(self.json).absolute().parent}; make it first")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    return run_command(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> None:
    settings = parse_settings(
        BenchSettings,
        argv,
        prog=PROG,
        description="Training, fine-tuning and inference beside transformers, on this machine's CPU.",
        examples=[PROG, f"{PROG} --sources corpus.parquet --json bench.json", f"{PROG} --cases '[lines]'"],
    )
    bench(settings)


def bench(settings: BenchSettings) -> list[dict[str, Any]]:
    """Time everything, print tables, and return their rows."""
    import torch

    from encoderkit.pretrain.run_folder import hardware

    parts: dict[str, Callable[[_Text, BenchSettings], Iterator[dict[str, Any]]]] = {
        "rows": _rows, "lines": _lines, "finetune": _finetune, "batches": _building
    }  # fmt: skip
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        text = _Text.read(settings.sources, Path(folder))
        for name in settings.cases:
            began = len(results)
            for row in parts[name](text, settings):
                results.append(row)
                print(f"{row['case']}, {row['precision']}: done", file=sys.stderr, flush=True)
            _show(name, results[began:])
    if settings.json is not None:
        about: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(),
            "torch": torch.__version__,
        }
        about |= {"threads": torch.get_num_threads(), "lines": text.about}
        Path(settings.json).write_text(json.dumps({**about, "rows": results}, indent=1) + "\n")
    return results


@dataclass(frozen=True)
class _Text:
    """Lines of a corpus, tokenized. store: the same lines, a hundred to a document."""

    lines: Sequences
    store: Any
    tokens: Any

    @classmethod
    def read(cls, sources: list[str], folder: Path) -> _Text:
        from encoderkit.pretrain.corpora import Corpora
        from encoderkit.pretrain.prepare import prepare
        from encoderkit.pretrain.store import Store
        from encoderkit.pretrain.tokenizer import TokenIds, load_tokenizer, train_tokenizer

        lines: list[str] = []
        size = 0
        for document in Corpora(sources, text_column="text", documents="blank-line"):
            lines += [line for line in document.text.split("\n") if line.strip()]
            size += len(document.text)
            if size > MEGABYTES * 10**6:
                break
        documents = [" ".join(lines[first : first + 100]) for first in range(0, len(lines), 100)]
        (folder / "documents.txt").write_text("\n".join(documents), encoding="utf-8")
        train_tokenizer("wordpiece", lines, VOCAB_SIZE, lowercase=True, out=folder / "tokenizer")
        prepare([str(folder / "documents.txt")], folder / "tokenizer", folder / "store", documents="line")
        tokenizer = load_tokenizer(folder / "tokenizer")
        return cls(tokenizer(lines)["input_ids"], Store.open(folder / "store"), TokenIds.of(tokenizer))

    @property
    def about(self) -> str:
        lengths = sorted(map(len, self.lines))
        shares = ", ".join(f"{lengths[int(q * (len(lengths) - 1))]}" for q in (0.5, 0.9, 0.99, 1))
        return f"{len(lengths):,} lines; tokens at the median, 90%, 99%, most: {shares}"

    def batches(self, count: int, lines: int, longest: int) -> list[Sequences]:
        """Batches of lines drawn at random, cut to a length; always the same."""
        import numpy as np

        chosen = np.random.default_rng(0).choice(len(self.lines), count * lines, replace=False)
        cut = [[*self.lines[i][: longest - 1], self.tokens.sep] for i in chosen]
        return [cut[first : first + lines] for first in range(0, len(cut), lines)]

    def rows(self, count: int, longest: int) -> Sequences:
        """Sequences of exactly this length: lines end to end."""
        stream = itertools.chain.from_iterable(line[1:-1] for line in itertools.cycle(self.lines))
        return [[self.tokens.cls, *itertools.islice(stream, longest - 2), self.tokens.sep] for _ in range(count)]


def _rows(text: _Text, settings: BenchSettings) -> Iterator[dict[str, Any]]:
    """Training steps on rows that are full for everyone."""
    from encoderkit.finetune import bench_candidates as them

    for size, longest in [*((size, 128) for size in them.SIZES), (them.SIZES[0], 512)]:
        sequences = text.rows(size.step_tokens // longest, longest)
        targets = them.targets_of(sequences, seed=0)
        for precision, dtype in _dtypes(settings):
            passes: dict[str, Callable[[], None]] = {}
            for architecture in ("bert", "modern"):
                config = them.config_of(architecture, size, VOCAB_SIZE)
                ours, theirs = them.our_masked_lm(config, dtype), them.their_masked_lm(config, dtype)
                passes[f"encoderkit {architecture}"] = _pass(ours, [them.packed(sequences, targets, config)])
                passes[f"transformers {architecture}"] = _pass(theirs, [them.padded(sequences, targets)])
            config = them.config_of("bert", size, VOCAB_SIZE)
            flops = _step_flops(config, them.packed(sequences, targets, config))
            yield _raced(f"{size}, rows of {longest}", precision, passes, size.step_tokens, settings, dtype, flops)


def _lines(text: _Text, settings: BenchSettings) -> Iterator[dict[str, Any]]:
    """Training steps on real lines: packed, padded to the longest of the batch, and sorted by length before."""
    from encoderkit.finetune import bench_candidates as them

    for size, longest in itertools.product(them.SIZES[:2], (128, 512)):
        batches = text.batches(BATCHES, LINES, longest)
        everything = [line for batch in batches for line in batch]
        ordered = them.by_length(everything, BATCHES)
        tokens = sum(map(len, everything))
        for precision, dtype in _dtypes(settings):
            passes: dict[str, Callable[[], None]] = {}
            for architecture in ("bert", "modern"):
                config = them.config_of(architecture, size, VOCAB_SIZE)
                ours, theirs = them.our_masked_lm(config, dtype), them.their_masked_lm(config, dtype)
                targets = [them.targets_of(batch, seed=0) for batch in batches]
                sorted_targets = [them.targets_of(batch, seed=0) for batch in ordered]
                mine = [them.packed(batch, chosen, config) for batch, chosen in zip(batches, targets)]
                passes[f"encoderkit {architecture}"] = _pass(ours, mine)
                yours = [them.padded(batch, chosen) for batch, chosen in zip(batches, targets)]
                passes[f"transformers {architecture}"] = _pass(theirs, yours)
                best = [them.padded(batch, chosen) for batch, chosen in zip(ordered, sorted_targets)]
                passes[f"transformers {architecture}, sorted"] = _pass(theirs, best)
            yield _raced(f"{size}, lines up to {longest}", precision, passes, tokens, settings, dtype)


def _finetune(text: _Text, settings: BenchSettings) -> Iterator[dict[str, Any]]:
    """Classification of short texts: training and inference, transformers sorted by length."""
    import torch

    from encoderkit.finetune import bench_candidates as them

    batches = text.batches(BATCHES, LINES, SHORT)
    everything = [line for batch in batches for line in batch]
    ordered = them.by_length(everything, BATCHES)
    tokens = sum(map(len, everything))
    labels = torch.arange(LINES) % len(them.LABELS)
    for size, (precision, dtype) in itertools.product(them.SIZES[:2], _dtypes(settings)):
        training: dict[str, Callable[[], None]] = {}
        inference: dict[str, Callable[[], None]] = {}
        for architecture in ("bert", "modern"):
            config = them.config_of(architecture, size, VOCAB_SIZE)
            ours, theirs = them.our_classifier(config, dtype), them.their_classifier(config, dtype)
            mine = [them.packed(batch, None, config) for batch in batches]
            yours = [them.padded(batch) for batch in ordered]
            training[f"encoderkit {architecture}"] = _pass(ours, [(batch, labels) for batch in mine])
            training[f"transformers {architecture}, sorted"] = _pass(theirs, [{**b, "labels": labels} for b in yours])
            inference[f"encoderkit {architecture}"] = _inference(ours, mine)
            inference[f"transformers {architecture}, sorted"] = _inference(theirs, yours)
        yield _raced(f"{size}, fine-tuning", precision, training, tokens, settings, dtype)
        yield _raced(f"{size}, inference", precision, inference, tokens, settings, dtype)


def _building(text: _Text, settings: BenchSettings) -> Iterator[dict[str, Any]]:
    """Batches of masked tokens from the store, in one process."""
    from encoderkit.pretrain.batches import StepBatches
    from encoderkit.pretrain.job import make_order
    from encoderkit.pretrain.settings import Data, Masking, PretrainSettings, Select

    passes: dict[str, Callable[[], Any]] = {}
    for select in get_args(Select):
        recipe = PretrainSettings(
            data=Data(max_tokens=512, row_tokens=4096),
            masking=Masking(select=select),
            batch_tokens=65536,
            micro_batch_tokens=65536,
        )
        order = make_order(recipe, text.store)
        batches = StepBatches(text.store, order, recipe, text.tokens, lambda step: 0.3)
        passes[f"by {select}"] = partial(batches.plain, 0)
    yield _raced("batches of 65,536 tokens in sequences of 512", "one process", passes, 65536, settings, None)


def _pass(trainer: Trainer, batches: list[Any]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            trainer.step(batch)

    return run


def _inference(trainer: Trainer, batches: list[Any]) -> Callable[[], None]:
    from encoderkit.finetune.bench_candidates import infer

    return lambda: infer(trainer, batches)


def _raced(
    case: str,
    precision: str,
    passes: dict[str, Callable[[], Any]],
    tokens: int,
    settings: BenchSettings,
    dtype: torch.dtype | None,
    flops: float | None = None,
) -> dict[str, Any]:
    """Tokens/s of each pass over the same tokens. flops: of the first one's, told as a share of the matrix rate."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    rates: list[float] = []
    began, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - began < settings.seconds:
        if dtype is not None and flops is not None:
            rates.append(_matrix_rate(dtype))
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        rounds += 1
    speed = {name: tokens / statistics.median(times[1:]) for name, times in seconds.items()}  # the first warms up
    row: dict[str, Any] = {"case": case, "precision": precision, "rounds": rounds - 1, "tokens_per_second": speed}
    if rates and flops is not None:
        row["matrix_gflops"] = statistics.median(rates) / 1e9
        row["matrix_share"] = flops * next(iter(speed.values())) / tokens / statistics.median(rates)
    return row


def _matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of square matrices."""
    import torch

    a = torch.ones(MATRIX, MATRIX, dtype=dtype)
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * MATRIX**3 / (time.perf_counter() - start)


def _step_flops(config: Any, batch: Any) -> float:
    from encoderkit.pretrain.flops import forward_flops

    return 3 * forward_flops(config, batch)


def _dtypes(settings: BenchSettings) -> list[tuple[str, torch.dtype]]:
    import torch

    return [(name, {"fp32": torch.float32, "bf16": torch.bfloat16}[name]) for name in settings.precisions]


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title, "tokens/s", "encoderkit's over it")
    for row in rows:
        speed = row["tokens_per_second"]
        shared = "matrix_share" in row
        share = f", {row['matrix_share']:.0%} of {row['matrix_gflops']:,.0f} GFLOP/s" if shared else ""
        table.add_row(f"[bold]{row['case']}, {row['precision']}{share}")
        for name, value in speed.items():
            ours = name.split(",")[0].replace("transformers", "encoderkit")
            table.add_row(f"  {name}", f"{value:,.0f}", f"{speed[ours] / value:.2f}" if ours != name else "")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
