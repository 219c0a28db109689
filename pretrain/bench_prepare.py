"""prepare beside datasets.map on this machine's CPU: python -m encoderkit.pretrain.bench_prepare

Both tokenize the same documents with the same tokenizer, with one and with two processes, alternating; words are what
white space parts. Each candidate runs in a process of its own; peak memory is that of the largest of its processes.
Then, where it is asked for, a corpus that is grown to a size, and an order that is planned over made-up lengths.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.command_line import parse_settings, run_command
from encoderkit.pretrain.settings import check_range

PROG = "python -m encoderkit.pretrain.bench_prepare"
PROCESSES = (1, 2)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
PIECE_TOKENS = 512  # longest piece of the order that is planned
ROW_TOKENS = 2048
LENGTH_MEDIAN, LENGTH_SIGMA = 200, 0.8  # of its made-up lognormal lengths


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is prepared, and how often."""

    sources: list[str] = field(default_factory=list)  # text, as for prepare
    tokenizer: str = ""  # tokenizer folder or hub name
    rounds: int = 2  # times that each candidate runs; figures are medians
    max_documents: int | None = None  # read at most so many of each source
    grow_to: str | None = None  # such as 1GB: repeat and perturb the text up to this size, and prepare that
    pieces: int | None = None  # plan an order of so many pieces
    json: str | None = None  # file for the figures

    def __post_init__(self) -> None:
        check_range("rounds", self.rounds, 1)
        check_range("max_documents", self.max_documents, 1)
        check_range("pieces", self.pieces, 1)
        if not self.sources and self.pieces is None:
            raise InputError("sources is empty; expected text, as for prepare, or --pieces")
        if self.sources and not self.tokenizer:
            raise InputError("tokenizer is empty; expected a tokenizer folder or hub name")
        if self.grow_to is not None:
            if not self.sources:
                raise InputError(f"grow_to is {self.grow_to}, but sources is empty; expected the text that is grown")
            bytes_of(self.grow_to)


def bytes_of(size: str) -> int:
    """Bytes of a size such as 300MB. Raises InputError where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]B|)", size)
    if not found or not float(found[1]):
        raise InputError(f"grow_to is {size!r}; expected a size such as 300MB or 1GB")
    return int(float(found[1]) * UNITS[found[2]])


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    return run_command(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> None:
    settings = parse_settings(
        BenchSettings,
        argv,
        prog=PROG,
        description="prepare beside datasets.map with the same tokenizer: words/s, peak memory and bytes on disk.",
        examples=[
            f"{PROG} corpus.parquet --tokenizer bert-base-uncased --json bench.json",
            f"{PROG} corpus.parquet --tokenizer bert-base-uncased --rounds 1 --grow_to 1GB",
            f"{PROG} --pieces 10_000_000",
        ],
        positional="sources",
    )
    bench(settings)


def bench(settings: BenchSettings) -> list[dict[str, Any]]:
    """Measure everything, print it, and return the rows."""
    from encoderkit.pretrain.run_folder import hardware

    about: dict[str, Any] = {"date": datetime.date.today().isoformat(), "hardware": hardware()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in _rows(settings, Path(folder)):
            rows.append(row)
            print(", ".join(f"{name} {_shown(value)}" for name, value in row.items()), flush=True)
            if settings.json is not None:  # after each row, so that a bench that is stopped has what it measured
                Path(settings.json).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return rows


def _rows(settings: BenchSettings, folder: Path) -> Iterator[dict[str, Any]]:
    if settings.sources:
        text = folder / "text.jsonl"
        words = _write_text(settings, text)
        yield from _race(text, words, settings, folder)
        if settings.grow_to is not None:
            grown = folder / "grown.jsonl"
            words = grow(text, grown, bytes_of(settings.grow_to))
            row = _measured(_prepare, grown, settings.tokenizer, folder / "store", max(PROCESSES))
            yield _row(f"prepare of {grown.stat().st_size:,} bytes", max(PROCESSES), words, [row])
    if settings.pieces is not None:
        yield {"case": "order", "pieces": settings.pieces, **_measured(_plan, settings.pieces)}


def _race(text: Path, words: int, settings: BenchSettings, folder: Path) -> Iterator[dict[str, Any]]:
    """Every candidate once a round, in turn, so that a slow moment of the machine hits all."""
    candidates: dict[str, Callable[..., dict[str, Any]]] = {"prepare": _prepare, "datasets.map": _map}
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(settings.rounds):
        for processes in PROCESSES:
            for name, work in candidates.items():
                out = folder / "store"
                row = _measured(work, text, settings.tokenizer, out, processes)
                shutil.rmtree(out)
                found.setdefault((name, processes), []).append(row)
    for (name, processes), measured in found.items():
        yield _row(name, processes, words, measured)


def _row(case: str, processes: int, words: int, measured: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "case": case,
        "processes": processes,
        "words_per_second": words / statistics.median(row["seconds"] for row in measured),
        "seconds": [round(row["seconds"], 3) for row in measured],
        "peak_bytes": max(row["peak_bytes"] for row in measured),
        "bytes_on_disk": measured[0]["bytes_on_disk"],
        "tokens": measured[0]["tokens"],
    }


def _measured(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What work returns, with the peak memory of its process, the largest where it starts others."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_in_process, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        raise ChildProcessError(f"{work.__name__.strip('_')} of {arguments[0]} ended without a result") from None
    finally:
        process.join()
    return found


def _in_process(sender: Any, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    found = work(*arguments)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is told in bytes there, in KiB elsewhere
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    sender.send(found | {"peak_bytes": unit * max(peaks)})


def _prepare(text: Path, tokenizer: str, out: Path, processes: int) -> dict[str, Any]:
    from encoderkit.pretrain.prepare import prepare

    began = time.perf_counter()
    manifest = prepare([str(text)], tokenizer, out, workers=processes)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": manifest["tokens"], "bytes_on_disk": _bytes_below(out / "tokens")}


def _map(text: Path, tokenizer: str, out: Path, processes: int) -> dict[str, Any]:
    import datasets

    from encoderkit.pretrain.tokenizer import load_tokenizer

    fast = load_tokenizer(tokenizer)
    datasets.disable_progress_bars()
    began = time.perf_counter()
    lines = datasets.Dataset.from_json(str(text), cache_dir=str(out / "cache"))
    tokenized = lines.map(_Tokenize(fast), batched=True, remove_columns=["text"], num_proc=processes)
    tokenized.save_to_disk(str(out / "tokens"))
    seconds = time.perf_counter() - began
    tokens = sum(len(ids) for batch in tokenized.iter(1000) for ids in batch["input_ids"])
    return {"seconds": seconds, "tokens": tokens, "bytes_on_disk": _bytes_below(out / "tokens")}


class _Tokenize:
    """Ids alone, as people write it; a class, because processes get it pickled."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = self.tokenizer(
            batch["text"], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )
        return {"input_ids": encoded["input_ids"]}


def _plan(pieces: int) -> dict[str, Any]:
    """An epoch of documents of one piece each, of lognormal lengths."""
    import numpy as np

    from encoderkit.pretrain.order import NUM_SPECIAL_TOKENS, Order

    drawn = np.random.default_rng(0).lognormal(np.log(LENGTH_MEDIAN), LENGTH_SIGMA, pieces)
    lengths = np.clip(drawn, 1, PIECE_TOKENS - NUM_SPECIAL_TOKENS).astype(np.int64)
    began = time.perf_counter()
    order = Order(lengths, seed=0, max_tokens=PIECE_TOKENS, row_tokens=ROW_TOKENS)
    rows = len(order.epoch(0))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "rows": rows, "filled": float(order.sizes.sum(dtype=np.int64)) / (rows * ROW_TOKENS)}


def grow(text: Path, out: Path, size: int) -> int:
    """Write the documents again and again, each time with other words in places, up to size bytes; returns the words.

    From the second round on every tenth word ends in the number of the round.
    """
    words = written = number = 0
    with open(out, "w", encoding="utf-8") as file:
        while written < size:
            with open(text, encoding="utf-8") as lines:
                for line in lines:
                    parts = json.loads(line)["text"].split(" ")
                    if number:
                        parts[number % 10 :: 10] = [f"{word}{number}" for word in parts[number % 10 :: 10]]
                    document = " ".join(parts)
                    words += len(document.split())
                    written += file.write(json.dumps({"text": document}) + "\n")
                    if written >= size:
                        break
            number += 1
    return words


def _write_text(settings: BenchSettings, out: Path) -> int:
    """The documents of the sources as one file that all candidates read; returns its words."""
    from encoderkit.pretrain.corpora import Corpora

    words = 0
    with open(out, "w", encoding="utf-8") as file:
        for document in Corpora(settings.sources, max_documents=settings.max_documents):
            words += len(document.text.split())
            file.write(json.dumps({"text": document.text}) + "\n")
    return words


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
