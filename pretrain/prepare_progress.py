"""What prepare says while it works: the size of the store before it starts, then how far it is and the time left."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from encoderkit.pretrain.corpora import Corpora, CorpusSpec, Reading, open_corpus
from encoderkit.pretrain.encode import Encoder
from encoderkit.pretrain.progress import duration
from encoderkit.pretrain.shards import ShardWriter
from encoderkit.pretrain.terminal import plain_console

READ_CHARACTERS = 4_000_000  # of each source, from its beginning: how much its bytes hold
ENCODED_CHARACTERS = 1_000_000  # of these: how many tokens they are, and how long they take
SECONDS_BETWEEN_LINES = 30.0  # where there is no terminal


class PrepareProgress:
    """Progress by the bytes of the sources that were read; where a source has no size, by tokens without an end."""

    def __init__(self, corpora: Corpora) -> None:
        self.corpora, self.size = corpora, corpora.size
        self.console = plain_console(stderr=True)
        self.last = time.monotonic()
        self.first: tuple[float, int] | None = None  # time and bytes of the first update
        self.bar = Progress(
            TextColumn("tokenizing"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=self.size, tokens=0)

    def __enter__(self) -> PrepareProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def tell_size(self, encoder: Encoder, workers: int, shards: int, folder: Path, writer: ShardWriter) -> None:
        """Say how much will come, by the first documents of each source; and what is there from a start before."""
        if writer.batches:
            self._say(f"going on after {writer.tokens:,} tokens, already in {folder}")
        for name, spec in zip(self.corpora.names, self.corpora.specs):
            if spec.weight is not None:
                self._say(f"{name}: {100 * spec.weight:g}% of the characters, {spec.passes:.4g} passes")
        if self.size is None:
            self._say("the sources do not say how much they hold")
            return
        tokens = stored = seconds = 0.0
        for spec, size in zip(self.corpora.specs, self.corpora.sizes):
            texts, characters = _sample(spec, size or 0)
            half = len(texts) // 2
            encoder(texts[:half])  # takes longer: the words are new
            started = time.perf_counter()
            batch, _ = encoder(texts[half:])
            times = spec.passes * characters / shards / max(1, sum(map(len, texts[half:])))
            seconds += (time.perf_counter() - started) * times / workers
            tokens += len(batch.column(0).values) * times
            stored += batch.nbytes * times
        self._say(
            f"{len(self.corpora.specs)} sources of {_megabytes(self.size)}: about {_millions(tokens)} tokens, "
            f"{_megabytes(stored)} of store, {duration(seconds)} with {workers} workers".replace(
                "1 sources", "1 source"
            )
        )
        free = shutil.disk_usage(folder).free + writer.bytes
        if stored > free:
            self._say(f"warning: {folder.parent} has {_megabytes(free)} free")

    def update(self, writer: ShardWriter) -> None:
        """Show how far the reading is; a plain line now and then where there is no terminal."""
        done, now = self.corpora.reading.bytes, time.monotonic()
        self.bar.update(self.task, completed=done, tokens=writer.tokens)
        if self.first is None:  # what a start before has tokenized was read by now, quickly
            self.first = now, done
        if self.console.is_terminal or now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        started, before = self.first
        left = ""
        if self.size and done > before:
            left = f", {done / self.size:.0%}, {duration((now - started) * (self.size - done) / (done - before))} left"
        self._say(f"{writer.tokens:,} tokens{left}")

    def _say(self, line: str) -> None:
        self.console.print(line)


def _sample(spec: CorpusSpec, size: int) -> tuple[list[str], float]:
    """The first texts of a source, and about how many characters it holds."""
    reading, texts, kept, characters = Reading(), [], 0, 0
    for document in open_corpus(spec, reading):
        characters += len(document.text)
        if kept < ENCODED_CHARACTERS:
            texts.append(document.text)
            kept += len(document.text)
        if characters >= READ_CHARACTERS:
            return texts, characters * max(1.0, size / max(1, reading.bytes))
    return texts, characters


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f} million" if count >= 1e5 else f"{count:,.0f}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} KB"
