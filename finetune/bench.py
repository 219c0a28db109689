"""encoderkit beside transformers on this machine's CPU: python -m encoderkit.finetune.bench

Training steps on full rows and on real lines, fine-tuning and inference on short texts, whole jobs beside the Trainer,
and batch building. All candidates of a case alternate, so that a slow moment of the machine hits all; figures are
medians over the rounds, and ratios are of figures of the same case. FLOPs are those executed, as a share of the matrix
rate measured beside.

The minutes are shared out: each case gets the rounds it needs, by its operations and the pace so far, and an equal part
of what is over. Cheap cases come first, and what no longer fits is left out and named.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import parse_settings, run_command
from encoderkit.pretrain.settings import check_range

if TYPE_CHECKING:
    from encoderkit.finetune.bench_candidates import Sequences
    from encoderkit.pretrain.batches import StepBatches

PROG = "python -m encoderkit.finetune.bench"
VOCAB_SIZE = 8192
LINES = 32  # of a batch
POOL = 48  # batches that are drawn, and sorted by length among each other
LENGTHS = (128, 512)  # tokens of a row, and of a line at most
SHORT = 64  # tokens that short texts are cut to
LEARNED_LINES, ANSWERED_LINES = 1024, 2048  # rows of a whole job
MEGABYTES = 4  # of text that lines are taken from
MATRIX = 1536  # rows and columns of the products that measure the matrix rate
ROUNDS = (3, 15)  # of a case, at least and at most; the first warms up and is not counted
PROFILED = 3  # rounds through the profiler, after the first
FIRST_PACE = 0.3  # share of the matrix rate that the first case is expected to reach
RESERVE = 1.25  # times the seconds that a case is expected to need, for building its models and for slow moments

PEERS = {"bert": "Bert", "modern": "ModernBERT"}  # presets, and what transformers calls them

Cases = Literal["rows", "lines", "finetune", "jobs", "batches"]
Precisions = Literal["fp32", "bf16"]
PROFILED_PARTS = ("rows", "lines", "finetune")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is timed, and for how long."""

    sources: list[str] = field(default_factory=lambda: ["python-docs"])  # text whose lines are used, as for prepare
    minutes: float = 10.0  # in which it ends, reading the text included
    precisions: list[str] = field(default_factory=list)  # number formats; empty: fp32, and bf16 where the CPU has it
    cases: list[str] = field(default_factory=lambda: [*get_args(Cases)])  # parts to run
    profile: bool = False  # where the time of rows, lines and finetune goes, by torch's profiler
    json: str = "runs/bench.json"  # file for the figures

    def __post_init__(self) -> None:
        check_range("minutes", self.minutes, 0)
        for key, allowed in (("precisions", get_args(Precisions)), ("cases", get_args(Cases))):
            for value in getattr(self, key):
                if value not in allowed:
                    raise InputError(f"{key} has {value!r}; expected some of {', '.join(allowed)}")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    return run_command(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> None:
    settings = parse_settings(
        BenchSettings,
        argv,
        prog=PROG,
        description="Training, fine-tuning and inference beside transformers, on this machine's CPU. Two processes "
        "beside one are another command: python -m encoderkit.pretrain.bench_ranks.",
        examples=[PROG, f"{PROG} --sources corpus.parquet --minutes 20", f"{PROG} --cases '[finetune]' --profile true"],
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # everyone runs on the CPU
    bench(settings)


def bench(settings: BenchSettings) -> list[dict[str, Any]]:
    """Time everything, print tables, and return their rows."""
    end = time.perf_counter() + 60 * settings.minutes
    import torch

    from encoderkit.encoder.precision import has_bf16, resolve_precision
    from encoderkit.pretrain.run_folder import hardware

    able = [name for name in get_args(Precisions) if name == "fp32" or has_bf16(torch.device("cpu"))]
    if unable := set(settings.precisions) - set(able):
        raise InputError(f"precisions has {unable.pop()}, but this CPU has no bf16 instructions; leave it out")
    settings = replace(settings, precisions=settings.precisions or able)
    route = resolve_precision("fp32", torch.device("cpu")).route  # fp32 products of everyone go the fastest route
    file = Path(settings.json)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        text = _Text.read(settings.sources, Path(folder))
        about: dict[str, Any] = {"date": datetime.date.today().isoformat(), "hardware": hardware()}
        about |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "lines": text.about}
        about |= {"fp32 products": None if route is None else f"{route.name} ({route.reason})"}
        races = [race for name in settings.cases for race in PARTS[name](text, settings)]
        for race in races:
            race.profile = settings.profile and race.part in PROFILED_PARTS
        races.sort(key=lambda race: race.operations)
        rows: list[dict[str, Any]] = []
        late: list[str] = []
        pace = {precision: FIRST_PACE * _matrix_rate(precision) for precision in settings.precisions}
        while races:
            now, race = time.perf_counter(), races.pop(0)
            needed = [
                RESERVE * other.least * other.operations / pace.get(other.precision, math.inf)
                for other in (race, *races)
            ]
            if now + needed[0] > end:
                late.append(str(race))
            else:
                spare = max(0.0, end - now - sum(needed)) / len(needed)
                row = race.run(until=now + needed[0] + spare)
                if race.operations and race.part != "jobs":  # those do more than multiply
                    pace[race.precision] = race.operations / row["seconds_per_round"]
                rows.append(row)
                print(f"{race}: {row['rounds']} rounds, {time.perf_counter() - now:.0f} s", file=sys.stderr, flush=True)
            # after each case, so that a bench that is stopped has what it measured
            file.write_text(json.dumps({**about, "left_out": late, "rows": rows}, indent=1) + "\n")
    show(rows)
    if late:
        print(f"left out, as {settings.minutes:g} minutes are too few here: {'; '.join(late)}")
    print(f"figures: {file}")
    return rows


@dataclass(frozen=True)
class _Text:
    """Lines of a corpus, as text and tokenized. store: the same lines, a hundred to a document. folder: for files."""

    lines: Sequences
    store: Any
    tokens: Any
    folder: Path
    texts: list[str]

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
        # [CLS] and [SEP] alone are no line
        every = [(ids, line) for ids, line in zip(tokenizer(lines)["input_ids"], lines) if len(ids) > 2]
        ids, texts = map(list, zip(*every))
        return cls(ids, Store.open(folder / "store"), TokenIds.of(tokenizer), folder, texts)

    @property
    def about(self) -> str:
        lengths = sorted(map(len, self.lines))
        shares = ", ".join(f"{lengths[int(q * (len(lengths) - 1))]}" for q in (0.5, 0.9, 0.99, 1))
        return f"{len(lengths):,} lines; tokens at the median, 90%, 99%, most: {shares}"

    def batches(self, longest: int, *, timed: int = 2, by_length: bool = False) -> list[Sequences]:
        """So many batches of lines drawn at random, cut to a length; or of the same lines sorted. Always the same.

        Evenly spaced ones, and of these the ones that are most like all: in tokens, and in tokens when padded.
        """
        import numpy as np

        chosen = np.random.default_rng(0).choice(len(self.lines), POOL * LINES, replace=False)
        cut = [[*self.lines[i][:-1][: longest - 1], self.tokens.sep] for i in chosen]
        if by_length:
            cut.sort(key=len)
        pool = [cut[first : first + LINES] for first in range(0, len(cut), LINES)]
        spaced = [pool[first :: POOL // timed] for first in range(POOL // timed)]
        sizes = np.array([(sum(map(len, batch)), max(map(len, batch)) * LINES) for batch in pool])
        share = np.stack([sizes[first :: POOL // timed].mean(0) for first in range(len(spaced))]) / sizes.mean(0)
        return spaced[int(np.abs(share - 1).sum(1).argmin())]

    def some(self, count: int) -> list[str]:
        """So many lines drawn at random, as text. Always the same."""
        import numpy as np

        return [self.texts[i] for i in np.random.default_rng(0).choice(len(self.texts), count)]

    def rows(self, count: int, longest: int) -> Sequences:
        """Sequences of exactly this length: lines end to end."""
        stream = itertools.chain.from_iterable(line[1:-1] for line in itertools.cycle(self.lines))
        return [[self.tokens.cls, *itertools.islice(stream, longest - 2), self.tokens.sep] for _ in range(count)]


def _rows(text: _Text, settings: BenchSettings) -> Iterator[_Race]:
    """Training steps on rows that are full for everyone."""
    from encoderkit.finetune import bench_candidates as them

    for size, longest, precision in itertools.product(them.SIZES, LENGTHS, settings.precisions):
        batches = [text.rows(size.step_tokens // longest, longest)]
        race = _Race("rows", f"{size}, rows of {longest}", precision)
        for architecture in PEERS:
            config = them.config_of(architecture, size, VOCAB_SIZE)
            race.enter(f"encoderkit {architecture}", partial(them.our_training, config, precision, batches))
            race.enter(f"transformers {architecture}", partial(them.their_training, config, precision, batches))
            race.flops[f"encoderkit {architecture}"] = them.step_flops(config, batches)
            race.operations += them.step_flops(config, batches) + them.padded_flops(config, batches)
        yield race


def _lines(text: _Text, settings: BenchSettings) -> Iterator[_Race]:
    """Training steps on real lines: packed, padded to the longest of the batch, and sorted by length before."""
    from encoderkit.finetune import bench_candidates as them

    for size, longest, precision in itertools.product(them.SIZES, LENGTHS, settings.precisions):
        batches, ordered = (text.batches(longest, timed=size.line_batches, by_length=sort) for sort in (False, True))
        race = _Race("lines", f"{size}, lines up to {longest}", precision)
        for architecture in PEERS:
            config = them.config_of(architecture, size, VOCAB_SIZE)
            race.enter(f"encoderkit {architecture}", partial(them.our_training, config, precision, batches))
            race.enter(f"transformers {architecture}", partial(them.their_training, config, precision, batches))
            race.enter(f"transformers {architecture}, sorted", partial(them.their_training, config, precision, ordered))
            race.operations += them.step_flops(config, batches)
            race.operations += them.padded_flops(config, batches) + them.padded_flops(config, ordered)
        yield race


def _finetune(text: _Text, settings: BenchSettings) -> Iterator[_Race]:
    """Classification of short texts, training and inference: packed, padded, and sorted by length before.

    encoderkit trains on batches as they come; it answers sorted ones, as predict and validation sort their inputs.
    """
    from encoderkit.finetune import bench_candidates as them

    batches, ordered = (text.batches(SHORT, timed=8, by_length=sort) for sort in (False, True))
    for size, precision, learns in itertools.product(them.SIZES[:2], settings.precisions, (True, False)):
        race = _Race("finetune", f"{size}, {'fine-tuning' if learns else 'inference'}", precision)
        for architecture in PEERS:
            config = them.config_of(architecture, size, VOCAB_SIZE)
            mine = batches if learns else ordered
            ours = partial(them.our_classification, config, precision, mine, learns)
            race.enter(f"encoderkit {architecture}", ours)
            flops = them.step_flops(config, mine)  # the head's are too many
            for name, order in (("", batches), (", sorted", ordered)):
                theirs = partial(them.their_classification, config, precision, order, learns)
                race.enter(f"transformers {architecture}{name}", theirs)
                flops += them.padded_flops(config, order)
            race.operations += flops if learns else flops / 3
        yield race


def _jobs(text: _Text, settings: BenchSettings) -> Iterator[_Race]:
    """Fine-tuning and answering rows of short text, from files to files."""
    from encoderkit.finetune import bench_candidates as them
    from encoderkit.finetune import bench_trainer as jobs

    size, batches = them.SIZES[0], text.batches(SHORT, timed=8)
    config = them.config_of("bert", size, VOCAB_SIZE)
    flops = them.step_flops(config, batches) / (len(batches) * LINES)  # of a line that is learned
    for precision, learns in itertools.product(settings.precisions, (True, False)):
        count = LEARNED_LINES if learns else ANSWERED_LINES
        race = _Race("jobs", f"{size}, {'fine-tuning' if learns else 'answers'}", precision)
        folder = text.folder / f"job-{precision}-{learns}"
        job = cache(partial(jobs.Job, config, text.folder / "tokenizer", text.some(count), SHORT, folder))
        race.enter("encoderkit bert", partial(jobs.our_job, job, learns, precision))
        for name, by_length in (("", False), (", sorted", True)):
            race.enter(f"transformers bert{name}", partial(jobs.their_job, job, learns, precision, by_length))
        race.operations = 6 * count * flops  # the padded side takes thrice as long, the sorted one twice
        yield race


def _building(text: _Text, settings: BenchSettings) -> Iterator[_Race]:
    """Batches of masked tokens from the store, in one process."""
    from encoderkit.pretrain.batches import StepBatches
    from encoderkit.pretrain.job import make_order
    from encoderkit.pretrain.settings import Data, Masking, PretrainSettings, Select

    race = _Race("batches", "65,536 tokens in sequences of 512", "one process")
    for select in get_args(Select):
        recipe = PretrainSettings(
            data=Data(max_tokens=512, row_tokens=4096),
            masking=Masking(select=select),
            batch_tokens=65536,
            micro_batch_tokens=65536,
        )
        order = make_order(recipe, text.store)
        batches = StepBatches(text.store, order, recipe, text.tokens, lambda step: 0.3)
        race.enter(f"by {select}", partial(_plain_batches, batches))
    yield race


def _plain_batches(batches: StepBatches) -> tuple[Callable[[], Any], int]:
    return partial(batches.plain, 0), 65536


PARTS: dict[str, Callable[[_Text, BenchSettings], Iterator[_Race]]] = {
    "rows": _rows, "lines": _lines, "finetune": _finetune, "jobs": _jobs, "batches": _building
}  # fmt: skip


class _Race:
    """Candidates that do the same work in turn.

    operations: of a round, about. flops: executed by a candidate. profile: whether to tell where the time goes, too.
    """

    def __init__(self, part: str, case: str, precision: str) -> None:
        self.part, self.case, self.precision = part, case, precision
        self.operations, self.profile = 0.0, False
        self.flops: dict[str, float] = {}
        self._builders: dict[str, Callable[[], tuple[Callable[[], Any], int]]] = {}

    def __str__(self) -> str:
        return f"{self.part}: {self.case}, {self.precision}"

    @property
    def least(self) -> int:
        """Rounds that are needed, profiled ones counted in."""
        return ROUNDS[0] + PROFILED * self.profile

    def enter(self, name: str, build: Callable[[], tuple[Callable[[], Any], int]]) -> None:
        """Take part with what build() gives: the work, and its tokens, padding not counted."""
        self._builders[name] = build

    def run(self, *, until: float) -> dict[str, Any]:
        """Tokens/s of each, medians over the rounds but the first. until: of perf_counter, when no round goes on."""
        from encoderkit.finetune.bench_profile import profile_candidates  # torch is imported after CUDA is hidden

        passes = {name: build() for name, build in self._builders.items()}
        times: dict[str, list[float]] = {name: [] for name in passes}
        rounds: list[float] = []
        rates: list[float] = []
        profiled: dict[str, dict[str, float]] = {}
        least, most = ROUNDS
        while len(rounds) < least or (len(rounds) < most and time.perf_counter() + rounds[-1] < until):
            began = time.perf_counter()
            if self.flops:
                rates.append(_matrix_rate(self.precision))
            for name, (work, _) in passes.items():
                start = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - start)
            rounds.append(time.perf_counter() - began)
            if self.profile and len(rounds) == 1:
                profiled = profile_candidates(passes, PROFILED)
        seconds = {name: statistics.median(each[1:]) for name, each in times.items()}
        row = {
            "part": self.part,
            "case": self.case,
            "precision": self.precision,
            "rounds": len(rounds) - 1,
            "seconds_per_round": statistics.median(rounds[1:]),
            "tokens_per_second": {name: tokens / seconds[name] for name, (_, tokens) in passes.items()},
        }
        if profiled:
            row["microseconds_per_token"] = profiled
        if self.flops:
            rate = statistics.median(rates[1:])
            row["matrix_gflops"] = rate / 1e9
            row["matrix_share"] = {name: flops / seconds[name] / rate for name, flops in self.flops.items()}
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


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table of each part: encoderkit's tokens/s, and how many times those of transformers they are."""
    from rich.console import Console
    from rich.table import Column, Table

    from encoderkit.finetune.bench_profile import show_profiles

    console = Console(highlight=False)
    console.width = max(console.width, 140)  # of a file too, where numbers would be cut off
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        names = list(mine[0]["tokens_per_second"])
        header = [_heading(name) for name in names]
        if "matrix_share" in mine[0]:
            header += [f"{_heading(name)}, of the matrix rate" for name in mine[0]["matrix_share"]]
        table = Table(part, "", "rounds", *(Column(text, justify="right") for text in header))
        for row in sorted(mine, key=lambda row: row["precision"]):
            speed = row["tokens_per_second"]
            figures = [_figure(name, speed) for name in names]
            rate = row.get("matrix_gflops")
            figures += [f"{share:.0%} of {rate:,.0f} GFLOP/s" for share in row.get("matrix_share", {}).values()]
            table.add_row(row["case"], row["precision"], f"{row['rounds']}", *figures)
        console.print(table)
        show_profiles(console, mine)
    console.print("tokens/s; under `over`: how many times the tokens/s of transformers those of encoderkit are")


def _heading(name: str) -> str:
    for kind, peer in PEERS.items():
        name = name.replace(f"transformers {kind}", f"over {peer}")
    return name


def _figure(name: str, speed: dict[str, float]) -> str:
    """tokens/s; of transformers' candidates, how many times theirs those of encoderkit are."""
    ours = name.split(",")[0].replace("transformers", "encoderkit")
    return f"{speed[ours] / speed[name]:.2f}" if name.startswith("transformers") else f"{speed[name]:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
