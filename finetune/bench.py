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
    from encoderkit.finetune.bench_candidates import Sequences

PROG = "python -m encoderkit.finetune.bench"
VOCAB_SIZE = 8192
LINES = 32  # of a batch
POOL = 48  # batches that are drawn, and sorted by length among each other
TIMED = 2  # of these are timed
SHORT = 64  # tokens that short texts are cut to
MEGABYTES = 4  # of text that lines are taken from
MATRIX = 1536  # rows and columns of the products that measure the matrix rate


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is timed, and for how long."""

    sources: list[str] = field(default_factory=lambda: ["python-docs"])  # text whose lines are used, as for prepare
    seconds: float = 5.0  # of each case at least; 0 runs every candidate three times, the first not counted
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

    from encoderkit.encoder.precision import resolve_precision
    from encoderkit.pretrain.run_folder import hardware

    resolve_precision("fp32", torch.device("cpu"))  # fp32 products of everyone go the fastest route
    parts: dict[str, Callable[[_Text, BenchSettings], Iterator[dict[str, Any]]]] = {
        "rows": _rows, "lines": _lines, "finetune": _finetune, "batches": _building
    }  # fmt: skip
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        text = _Text.read(settings.sources, Path(folder))
        about: dict[str, Any] = {"date": datetime.date.today().isoformat(), "hardware": hardware()}
        about |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "lines": text.about}
        for name in settings.cases:
            began = len(results)
            for row in parts[name](text, settings):
                results.append(row)
                print(f"{row['case']}, {row['precision']}: done", file=sys.stderr, flush=True)
                if settings.json is not None:  # after each case, so that a bench that is stopped has what it measured
                    Path(settings.json).write_text(json.dumps({**about, "rows": results}, indent=1) + "\n")
            _show(name, results[began:])
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
        if len(lines) < POOL * LINES:
            raise InputError(f"sources hold {len(lines)} lines; expected at least {POOL * LINES}; give more text")
        (folder / "documents.txt").write_text("\n".join(documents), encoding="utf-8")
        try:
            train_tokenizer("wordpiece", lines, VOCAB_SIZE, lowercase=True, out=folder / "tokenizer")
        except InputError as error:
            raise InputError(f"sources give fewer than {VOCAB_SIZE} token types; give more text ({error})") from error
        prepare([str(folder / "documents.txt")], folder / "tokenizer", folder / "store", documents="line")
        tokenizer = load_tokenizer(folder / "tokenizer")
        every = [ids for ids in tokenizer(lines)["input_ids"] if len(ids) > 2]  # [CLS] and [SEP] alone are no line
        return cls(every, Store.open(folder / "store"), TokenIds.of(tokenizer))

    @property
    def about(self) -> str:
        lengths = sorted(map(len, self.lines))
        shares = ", ".join(f"{lengths[int(q * (len(lengths) - 1))]}" for q in (0.5, 0.9, 0.99, 1))
        return f"{len(lengths):,} lines; tokens at the median, 90%, 99%, most: {shares}"

    def batches(self, longest: int, *, by_length: bool = False) -> list[Sequences]:
        """TIMED batches of lines drawn at random, cut to a length; or of the same lines sorted. Always the same.

        Evenly spaced ones, and of these the ones that are most like all: in tokens, and in tokens when padded.
        """
        import numpy as np

        chosen = np.random.default_rng(0).choice(len(self.lines), POOL * LINES, replace=False)
        cut = [[*self.lines[i][:-1][: longest - 1], self.tokens.sep] for i in chosen]
        if by_length:
            cut.sort(key=len)
        pool = [cut[first : first + LINES] for first in range(0, len(cut), LINES)]
        spaced = [pool[first :: POOL // TIMED] for first in range(POOL // TIMED)]
        sizes = np.array([(sum(map(len, batch)), max(map(len, batch)) * LINES) for batch in pool])
        share = np.stack([sizes[first :: POOL // TIMED].mean(0) for first in range(len(spaced))]) / sizes.mean(0)
        return spaced[int(np.abs(share - 1).sum(1).argmin())]

    def rows(self, count: int, longest: int) -> Sequences:
        """Sequences of exactly this length: lines end to end."""
        stream = itertools.chain.from_iterable(line[1:-1] for line in itertools.cycle(self.lines))
        return [[self.tokens.cls, *itertools.islice(stream, longest - 2), self.tokens.sep] for _ in range(count)]


def _rows(text: _Text, settings: BenchSettings) -> Iterator[dict[str, Any]]:
    """Training steps on rows that are full for everyone."""
    from encoderkit.finetune import bench_candidates as them

    for size, longest in [*((size, 128) for size in them.SIZES), (them.SIZES[0], 512)]:
        batches = [text.rows(size.step_tokens // longest, longest)]
        for precision in settings.precisions:
            race = _Race(f"{size}, rows of {longest}", precision)
            for architecture in ("bert", "modern"):
                config = them.config_of(architecture, size, VOCAB_SIZE)
                race.enter(f"encoderkit {architecture}", *them.our_training(config, precision, batches))
                race.enter(f"transformers {architecture}", *them.their_training(config, precision, batches))
                if architecture == "bert":
                    race.flops = them.step_flops(config, batches)
            yield race.run(settings.seconds)


def _lines(text: _Text, settings: BenchSettings) -> Iterator[dict[str, Any]]:
    """Training steps on real lines: packed, padded to the longest of the batch, and sorted by length before."""
    from encoderkit.finetune import bench_candidates as them

    for size, longest in [(them.SIZES[0], 128), (them.SIZES[1], 128), (them.SIZES[0], 512)]:
        batches, ordered = text.batches(longest), text.batches(longest, by_length=True)
        for precision in settings.precisions:
            race = _Race(f"{size}, lines up to {longest}", precision)
            for architecture in ("bert", "modern"):
                config = them.config_of(architecture, size, VOCAB_SIZE)
                race.enter(f"encoderkit {architecture}", *them.our_training(config, precision, batches))
                race.enter(f"transformers {architecture}", *them.their_training(config, precision, batches))
                race.enter(f"transformers {architecture}, sorted", *them.their_training(config, precision, ordered))
            yield race.run(settings.seconds)


def _finetune(text: _Text, settings: BenchSettings) -> Iterator[dict[str, Any]]:
    """Classification of short texts: training and inference, transformers sorted by length."""
    from encoderkit.finetune import bench_candidates as them

    batches, ordered = text.batches(SHORT), text.batches(SHORT, by_length=True)
    for size, precision, learns in itertools.product(them.SIZES[:2], settings.precisions, (True, False)):
        race = _Race(f"{size}, {'fine-tuning' if learns else 'inference'}", precision)
        for architecture in ("bert", "modern"):
            config = them.config_of(architecture, size, VOCAB_SIZE)
            ours = them.our_classification(config, precision, batches, learns)
            theirs = them.their_classification(config, precision, ordered, learns)
            race.enter(f"encoderkit {architecture}", *ours)
            race.enter(f"transformers {architecture}, sorted", *theirs)
        yield race.run(settings.seconds)


def _building(text: _Text, settings: BenchSettings) -> Iterator[dict[str, Any]]:
    """Batches of masked tokens from the store, in one process."""
    from encoderkit.pretrain.batches import StepBatches
    from encoderkit.pretrain.job import make_order
    from encoderkit.pretrain.settings import Data, Masking, PretrainSettings, Select

    race = _Race("batches of 65,536 tokens in sequences of 512", "one process")
    for select in get_args(Select):
        recipe = PretrainSettings(
            data=Data(max_tokens=512, row_tokens=4096),
            masking=Masking(select=select),
            batch_tokens=65536,
            micro_batch_tokens=65536,
        )
        order = make_order(recipe, text.store)
        batches = StepBatches(text.store, order, recipe, text.tokens, lambda step: 0.3)
        race.enter(f"by {select}", partial(batches.plain, 0), 65536)
    yield race.run(settings.seconds)


class _Race:
    """Candidates that do the same work in turn. flops: of a pass of the first one, where it is told."""

    def __init__(self, case: str, precision: str) -> None:
        self.case, self.precision = case, precision
        self.flops: float | None = None
        self._passes: dict[str, tuple[Callable[[], Any], int]] = {}

    def enter(self, name: str, work: Callable[[], Any], tokens: int) -> None:
        """Take part: work on so many tokens, padding not counted."""
        self._passes[name] = work, tokens

    def run(self, least_seconds: float) -> dict[str, Any]:
        """Tokens/s of each, medians over the rounds; the first round warms up and is not counted."""
        times: dict[str, list[float]] = {name: [] for name in self._passes}
        rates: list[float] = []
        began = time.perf_counter()
        while len(rates) < 3 or time.perf_counter() - began < least_seconds:
            rates.append(_matrix_rate(self.precision))
            for name, (work, _) in self._passes.items():
                start = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - start)
        speed = {name: tokens / statistics.median(times[name][1:]) for name, (_, tokens) in self._passes.items()}
        row = {"case": self.case, "precision": self.precision, "rounds": len(rates) - 1, "tokens_per_second": speed}
        if self.flops is not None:
            first, rate = next(iter(self._passes)), statistics.median(rates[1:])
            tokens = self._passes[first][1]
            row |= {"matrix_gflops": rate / 1e9, "matrix_share": self.flops * speed[first] / tokens / rate}
        return row


def _matrix_rate(precision: str) -> float:
    """FLOP/s of a product of square matrices."""
    import torch

    a = torch.ones(MATRIX, MATRIX, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * MATRIX**3 / (time.perf_counter() - start)


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
