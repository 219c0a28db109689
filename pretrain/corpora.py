"""Documents from files, folders, globs, URLs, hub data sets and the embedded python-docs corpus, one at a time.

A source may end in @PASSES, how often its documents are read: wiki.parquet@2 twice, web.jsonl.gz@0.5 half of them, each
chosen by its id. Or all sources end in @WEIGHT%, their shares of the mixture's characters: these are counted in a first
reading, and passes chosen so that the mixture holds as many as the sources do. What cannot be read is an InputError
with its place; blank documents are dropped and counted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoderkit.kernels.errors import InputError, first_line
from encoderkit.pretrain.corpus_files import (
    Documents,
    Interrupted,
    InvalidUtf8,
    Row,
    find_files,
    read_rows,
)
from encoderkit.pretrain.redaction import without_secrets

NOT_SAMPLED = "left out by @passes"
MOST_PASSES = 1000
HUB_SECONDS = 10.0  # that the hub has to say at which commit a data set stands


@dataclass(frozen=True)
class Document:
    """One document. id: source and place, the same on every machine. package: of python-docs only.

    group: what stands in the group column, None where nothing does. copies: how often it is trained on.
    """

    id: str
    text: str
    package: str | None = None
    group: str | None = None
    copies: int = 1


@dataclass(frozen=True, kw_only=True)
class CorpusSpec:
    """Where documents come from: file, folder, glob, URL, hub name NAME[:CONFIG[:SPLIT]], python-docs[:train|:test]."""

    source: str
    passes: float = 1.0  # how often each document is read; a fraction reads that share of them
    weight: float | None = None  # share of the mixture's characters, from which Corpora computes the passes
    text_column: str = "text"  # of tables and hub data sets
    group_column: str | None = None  # of tables and hub data sets: documents that must stay together
    documents: Documents = "blank-line"  # what makes one document in plain text
    max_documents: int | None = None  # after so many the rest is not read
    invalid_utf8: InvalidUtf8 = "refuse"  # bytes of text files that are not UTF-8; replace: by U+FFFD, counted
    folder: str = ""  # goes before the ids of its documents, where another source has the same name

    @classmethod
    def of(cls, source: str, **options: Any) -> CorpusSpec:
        """From SOURCE, SOURCE@PASSES or SOURCE@WEIGHT%."""
        found = re.fullmatch(r"(.+)@(\d+(?:\.\d*)?|\.\d+)(%?)", source)
        if not found or Path(source).exists():
            return cls(source=source, **options)
        if found[3]:
            return cls(source=found[1], weight=float(found[2]) / 100, **options)
        passes = float(found[2])
        if not 0 < passes <= MOST_PASSES:
            raise InputError(f"{source}: {passes:g} passes; expected more than 0 and at most {MOST_PASSES}")
        return cls(source=found[1], passes=passes, **options)


@dataclass
class Reading:
    """What a reading has seen so far. dropped, dropped_characters: by reason. bytes: of the files, packed.

    replaced: runs of bytes that were not UTF-8.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    dropped_characters: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    replaced: int = 0

    def drop(self, reason: str, text: str = "") -> None:
        """Count one document."""
        self.dropped[reason] += 1
        self.dropped_characters[reason] += len(text)

    def replace(self, count: int) -> None:
        """Count runs of bytes that became U+FFFD."""
        self.replaced += count


class Corpora:
    """Several sources read one after the other, any number of times; counts what the last reading saw.

    Sources with weights are read once here, to find their passes. Raises InputError at once when a path does not exist.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        text_column: str = "text",
        documents: Documents = "blank-line",
        group_column: str | None = None,
        max_documents: int | None = None,
        invalid_utf8: InvalidUtf8 = "refuse",
    ) -> None:
        self.specs = [
            CorpusSpec.of(
                source,
                text_column=text_column,
                documents=documents,
                group_column=group_column,
                max_documents=max_documents,
                invalid_utf8=invalid_utf8,
            )
            for source in sources
        ]
        for spec in self.specs:
            _check_exists(spec.source)
        self.specs = _with_passes(_told_apart(self.specs))
        self.reading = Reading()
        self.num_documents = 0
        self.num_characters = 0

    def __iter__(self) -> Iterator[Document]:
        self.reading = Reading()
        self.num_documents = self.num_characters = 0
        for spec in self.specs:
            for document in open_corpus(spec, self.reading):
                self.num_documents += 1
                self.num_characters += len(document.text)
                yield document
        if not self.num_documents:
            raise InputError(f"{', '.join(self.names)}: 0 usable documents{tell_dropped(self.reading.dropped)}")

    @functools.cached_property
    def sizes(self) -> list[int | None]:
        """Bytes of each source, packed; None for those that do not say."""
        return [_size(spec) for spec in self.specs]

    @property
    def size(self) -> int | None:
        """Bytes of all sources, packed; None when one does not say."""
        known = [size for size in self.sizes if size is not None]
        return sum(known) if len(known) == len(self.sizes) else None

    @property
    def names(self) -> list[str]:
        """The sources as they may be shown."""
        return [without_secrets(spec.source) for spec in self.specs]

    def texts(self) -> Iterable[str]:
        """The texts alone, re-iterable."""
        return _Texts(self)

    def inputs(self) -> list[dict[str, Any]]:
        """What identifies the sources: files with size and sha256, or the hash of python-docs, or a hub name."""
        return [
            {"source": without_secrets(spec.source), "passes": spec.passes}
            | ({} if spec.weight is None else {"weight": spec.weight})
            | _identity(spec)
            for spec in self.specs
        ]


def open_corpus(spec: CorpusSpec, reading: Reading | None = None) -> Iterator[Document]:
    """The usable documents of one source, in a fixed order; reading counts the others by reason.

    Raises InputError naming the file and the byte offset, line or row of what cannot be read.
    """
    return itertools.islice(_documents(spec, reading or Reading()), spec.max_documents)


def open_rows(
    spec: CorpusSpec, columns: list[str] | None = None, reading: Reading | None = None
) -> Iterator[tuple[str, str, Row]]:
    """Where each row is for a reader of messages, the id of its document, and the row; columns: None for all."""
    reading = reading or Reading()
    files = find_files(spec.source)
    if files is None:
        for number, row in enumerate(_hub_rows(spec)):
            yield f"{spec.source}: row {number}", f"{spec.source}#{number}", row
        return
    for file in files:
        before = reading.bytes

        def tell(position: int, before: int = before) -> None:
            reading.bytes = before + position

        replaced = reading.replace if spec.invalid_utf8 == "replace" else None
        for place, row in read_rows(file, columns, spec.documents, tell, replaced):
            yield f"{file}: {place}", f"{spec.folder}{file.name}#{place.split()[1]}", row


def check_read_once(corpora: Corpora, held_out: Corpora | None) -> None:
    """Raise InputError where a file is read twice, by two sources or one: it could be trained on and held out."""
    seen: dict[Hashable, str] = {}
    for part in filter(None, (corpora, held_out)):
        twice = "leave it out of one of them (FILE@2 reads a file twice)"
        advice = "give another source as held_out, or a share" if part is held_out else twice
        for spec, source in zip(part.specs, part.names):
            for place, shown in _places(spec.source):
                if place in seen:
                    raise InputError(
                        f"{shown} is read by {seen[place]} and by {source}, and could be trained on and held out; "
                        f"{advice}"
                    )
                seen[place] = source


def _places(source: str) -> list[tuple[Hashable, str]]:
    """What a source reads: a key for each file, or split of the embedded corpus, or hub name; and how it is shown."""
    if _is_python_docs(source):
        split = _python_docs_split(source)
        return [(f"python-docs:{part}", "python-docs") for part in ([split] if split else ["train", "test"])]
    files = find_files(source)
    return [(source, source)] if files is None else [(file.place, str(file)) for file in files]


def tell_dropped(dropped: Counter[str]) -> str:
    """` (dropped: 3 blank)`, or nothing."""
    return f" (dropped: {', '.join(f'{n:,} {why}' for why, n in sorted(dropped.items()))})" if dropped else ""


class _Texts:
    def __init__(self, corpora: Corpora) -> None:
        self.corpora = corpora

    def __iter__(self) -> Iterator[str]:
        return (document.text for document in self.corpora)


def _documents(spec: CorpusSpec, reading: Reading) -> Iterator[Document]:
    if _is_python_docs(spec.source):
        from encoderkit.pretrain.python_docs import python_documents

        for document in python_documents(split=_python_docs_split(spec.source)):
            yield from _sampled(document, spec.passes, reading)
        return
    columns = [spec.text_column] + ([spec.group_column] if spec.group_column else [])
    for where, identity, row in open_rows(spec, columns, reading):
        text = _text_of(row, spec.text_column, where) if row else ""
        if text is None or not text.strip():
            reading.drop("blank" if text is not None else "null", text or "")
            continue
        group = None if spec.group_column is None else _group_of(row, spec.group_column, where)
        yield from _sampled(Document(identity, text, group=group), spec.passes, reading)


def _sampled(document: Document, passes: float, reading: Reading) -> Iterator[Document]:
    """The document with its copies; whether it has one more than the whole passes is decided by its id alone."""
    if passes == 1:
        yield document
        return
    point = int.from_bytes(hashlib.sha256(b"passes " + document.id.encode()).digest()[:8], "big") / 2**64
    copies = int(passes) + (point < passes % 1)
    if copies:
        yield dataclasses.replace(document, copies=copies)
    else:
        reading.drop(NOT_SAMPLED, document.text)


def _hub_rows(spec: CorpusSpec) -> Iterator[Row]:
    import datasets

    name, config, split = [*spec.source.split(":"), "", ""][:3]
    revision = hub_revision(name)
    pinned = {} if revision is None else {"revision": revision}  # what is read is what the manifest names
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True, **pinned)
    except Exception as error:  # the library raises many kinds: unknown name, no network, unknown config or split
        raise InputError(
            f"{spec.source} is neither a file or folder nor a data set that can be reached: {first_line(error)}\n"
            "expected a path, or a hub name as NAME[:CONFIG[:SPLIT]]"
        ) from error
    number = 0
    try:
        for row in rows:
            yield row
            number += 1
    except Exception as error:  # of the network, as many kinds
        raise Interrupted(
            f"{spec.source} stopped after row {number}: {first_line(error)}; run the same command again"
        ) from error


@functools.cache
def hub_revision(name: str) -> str | None:
    """The commit that a data set stands at now, asked once in a process; None where the hub does not say."""
    import huggingface_hub

    try:
        return huggingface_hub.dataset_info(name, timeout=HUB_SECONDS).sha
    except Exception:  # offline, unknown, not allowed: told when its rows are asked for
        return None


def _text_of(record: dict[str, Any], column: str, where: str) -> str | None:
    if column not in record:
        raise InputError(f"{where}: {_no_column(column, record, 'text_column')}")
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where}: column {column} holds {type(text).__name__}; expected text")
    return None if text is None else check_text(text, where)


def _group_of(record: Row, column: str, where: str) -> str | None:
    """What stands in the column; None where that is null or empty: the document is a group of its own."""
    if column not in record:
        raise InputError(f"{where}: {_no_column(column, record, 'held_out_by')}")
    return None if record[column] in (None, "") else check_text(str(record[column]), where)


def check_text(text: str, where: str) -> str:
    """The text. Raises InputError where it holds a NUL character or half of a surrogate pair."""
    if "\0" in text:
        raise InputError(f"{where} holds a NUL character at position {text.index(chr(0))}; expected text, remove it")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where} holds half of a surrogate pair at position {error.start}; expected text"
            ) from None
    return text


def _no_column(wanted: str, present: Iterable[str], setting: str) -> str:
    return f"no column {wanted}; present: {', '.join(list(present)[:20]) or 'none'}; set {setting}"


def _told_apart(specs: list[CorpusSpec]) -> list[CorpusSpec]:
    """The same sources; local ones of one name in several folders with these, from below the folder of them all."""
    places: dict[str, set[Path]] = {}
    for spec in specs:
        if Path(spec.source).expanduser().exists():
            path = Path(spec.source).expanduser().absolute()
            places.setdefault(path.name, set()).add(path.parent)
    told = []
    for spec in specs:
        path = Path(spec.source).expanduser().absolute()
        folders = places.get(path.name, set())
        if len(folders) > 1 and path.parent in folders:
            below = path.parent.relative_to(os.path.commonpath(folders)).as_posix()
            spec = dataclasses.replace(spec, folder="" if below == "." else f"{below}/")
        told.append(spec)
    return told


def _with_passes(specs: list[CorpusSpec]) -> list[CorpusSpec]:
    """The same sources; those with weights with the passes that give each its share of all their characters."""
    weights = [spec.weight for spec in specs if spec.weight is not None]
    if not weights:
        return specs
    if len(weights) < len(specs) or abs(sum(weights) - 1) > 1e-6:
        told = ", ".join(f"{weight:.6g}" for weight in (100 * weight for weight in weights))
        raise InputError(
            f"{len(specs)} sources have the weights {told}%; expected one for each source, together 100%, such as "
            "a.txt@40% b.txt@60%"
        )
    characters = [sum(len(document.text) for document in open_corpus(spec)) for spec in specs]
    weighted = []
    for spec, weight, held in zip(specs, weights, characters):
        passes = weight * sum(characters) / held if held else 0.0
        if not 0 < passes <= MOST_PASSES:
            raise InputError(
                f"{without_secrets(spec.source)} holds {held:,} characters; its weight asks for {passes:,.6g} passes, "
                f"expected more than 0 and at most {MOST_PASSES}"
            )
        weighted.append(dataclasses.replace(spec, passes=passes))
    return weighted


def _is_python_docs(source: str) -> bool:
    return source.split(":")[0] == "python-docs" and not Path(source).exists()


def _python_docs_split(source: str) -> str | None:
    split = source.partition(":")[2]
    if split not in ("", "train", "test"):
        raise InputError(
            f"{source}: unknown split {split}; expected python-docs, python-docs:train or python-docs:test"
        )
    return split or None


def _check_exists(source: str) -> None:
    if _is_python_docs(source):
        _python_docs_split(source)
    else:
        find_files(source)


def _size(spec: CorpusSpec) -> int | None:
    files = None if _is_python_docs(spec.source) else find_files(spec.source)
    sizes = [None] if files is None else [file.size for file in files]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _identity(spec: CorpusSpec) -> dict[str, Any]:
    if _is_python_docs(spec.source):
        from encoderkit.pretrain.python_docs import corpus_hash

        return {"sha256": corpus_hash(split=_python_docs_split(spec.source))}
    files = find_files(spec.source)
    if files is None:
        revision = hub_revision(spec.source.split(":")[0])
        return {"hub": True} | ({} if revision is None else {"revision": revision})
    return {"files": [file.identity() for file in files]}
