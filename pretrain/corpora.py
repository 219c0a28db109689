"""Documents from files, folders, globs, hub data sets and the embedded python-docs corpus, one at a time.

Nothing is held but one document or one Parquet batch, so a corpus may be larger than memory. What cannot be read is an
InputError with its place; blank documents are dropped and counted.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from encoderkit.kernels.errors import InputError

TEXT_ENDINGS = (".txt", ".txt.gz", ".md", ".rst")
JSON_ENDINGS = (".jsonl", ".jsonl.gz", ".ndjson", ".json.gz")
PARQUET_ENDINGS = (".parquet",)
ENDINGS = TEXT_ENDINGS + JSON_ENDINGS + PARQUET_ENDINGS
MAX_DOCUMENT_BYTES = 32 << 20  # of one line or text document: what keeps memory bounded
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Documents = Literal["file", "line", "blank-line"]


@dataclass(frozen=True)
class Document:
    """One document. id: source and place, the same on every machine. package: of python-docs only."""

    id: str
    text: str
    package: str | None = None


@dataclass(frozen=True, kw_only=True)
class CorpusSpec:
    """Where documents come from: a file, folder, glob, hub name NAME[:CONFIG[:SPLIT]], or python-docs[:train|:test]."""

    source: str
    text_column: str = "text"  # of .jsonl, .parquet and hub data sets
    documents: Documents = "blank-line"  # what makes one document in plain text


class Corpora:
    """Several sources read one after the other, any number of times; counts what the last reading saw.

    Raises InputError at once when a path does not exist.
    """

    def __init__(
        self, sources: Sequence[str], *, text_column: str = "text", documents: Documents = "blank-line"
    ) -> None:
        self.specs = [CorpusSpec(source=s, text_column=text_column, documents=documents) for s in sources]
        for spec in self.specs:
            _check_exists(spec.source)
        self.dropped: Counter[str] = Counter()  # reason -> documents
        self.num_documents = 0
        self.num_characters = 0

    def __iter__(self) -> Iterator[Document]:
        self.dropped.clear()
        self.num_documents = self.num_characters = 0
        for spec in self.specs:
            for document in open_corpus(spec, self.dropped):
                self.num_documents += 1
                self.num_characters += len(document.text)
                yield document
        if not self.num_documents:
            raise InputError(
                f"{', '.join(s.source for s in self.specs)}: 0 usable documents{tell_dropped(self.dropped)}"
            )

    def texts(self) -> Iterable[str]:
        """The texts alone, re-iterable."""
        return _Texts(self)

    def inputs(self) -> list[dict[str, Any]]:
        """What identifies the sources: files with size and sha256, or the hash of python-docs, or a hub name."""
        return [{"source": spec.source, **_identity(spec)} for spec in self.specs]


def open_corpus(spec: CorpusSpec, dropped: Counter[str] | None = None) -> Iterator[Document]:
    """The usable documents of one source, in a fixed order; dropped counts the others by reason.

    Raises InputError naming the file and the byte offset, line or row of what cannot be read.
    """
    dropped = Counter() if dropped is None else dropped
    if _is_python_docs(spec.source):
        from encoderkit.pretrain.python_docs import python_documents

        yield from python_documents(split=_python_docs_split(spec.source))
        return
    files = source_files(spec.source)
    records = _hub_records(spec) if files is None else (r for file in files for r in _file_records(spec, *file))
    for identity, text in records:
        if text is None or not text.strip():
            dropped["blank" if text is not None else "null"] += 1
        else:
            yield Document(identity, text)


def source_files(source: str) -> list[tuple[Path, str]] | None:
    """The files of a source with the names that their documents carry; None when it is not a path but a hub name."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name.lower().endswith(ENDINGS)]
        if not found:
            raise InputError(f"{source}: the folder holds no text; expected files ending in {', '.join(ENDINGS)}")
        return [(p, f"{path.name}/{p.relative_to(path).as_posix()}") for p in found]
    if path.is_file():
        if not path.name.lower().endswith(ENDINGS):
            raise InputError(f"{source}: unknown kind of file; expected one ending in {', '.join(ENDINGS)}")
        return [(path, path.name)]
    if glob.has_magic(source):
        names = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not names:
            raise InputError(f"{source}: no file matches")
        return [file for name in names for file in source_files(name) or []]
    is_hub_name = source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not source.endswith("/")
    if source.lower().endswith(ENDINGS) or not is_hub_name:
        raise InputError(f"{source}: no such file or folder")
    return None


def tell_dropped(dropped: Counter[str]) -> str:
    """` (dropped: 3 blank)`, or nothing."""
    return f" (dropped: {', '.join(f'{n:,} {why}' for why, n in sorted(dropped.items()))})" if dropped else ""


class _Texts:
    def __init__(self, corpora: Corpora) -> None:
        self.corpora = corpora

    def __iter__(self) -> Iterator[str]:
        return (document.text for document in self.corpora)


def _file_records(spec: CorpusSpec, path: Path, name: str) -> Iterator[tuple[str, str | None]]:
    lowered = path.name.lower()
    if lowered.endswith(PARQUET_ENDINGS):
        return _parquet_records(spec, path, name)
    return (_text_records if lowered.endswith(TEXT_ENDINGS) else _json_records)(spec, path, name)


def _text_records(spec: CorpusSpec, path: Path, name: str) -> Iterator[tuple[str, str | None]]:
    """Plain text: lines are gathered until a document ends; runs of blank lines end one document, not several."""
    held: list[bytes] = []
    begin, size, number = 0, 0, 0
    for offset, line in _lines(path):
        is_blank = not line.strip()
        if held and (spec.documents == "line" or (spec.documents == "blank-line" and is_blank)):
            yield f"{name}#{number}", _decode(b"".join(held), path, begin)
            held, size, number = [], 0, number + 1
        if is_blank and (spec.documents == "blank-line" or (spec.documents == "line" and not held)):
            if spec.documents == "line":
                yield f"{name}#{number}", ""
                number += 1
            continue
        if not held:
            begin = offset
        held.append(line)
        size += len(line)
        if size > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{path}: the document at byte {begin} is over {MAX_DOCUMENT_BYTES >> 20} MiB; "
                "split it, or set documents to line or blank-line"
            )
    if held:
        yield f"{name}#{number}", _decode(b"".join(held), path, begin)


def _json_records(spec: CorpusSpec, path: Path, name: str) -> Iterator[tuple[str, str | None]]:
    for number, (offset, line) in enumerate(_lines(path), start=1):
        where = f"{path}: line {number}"
        if not line.strip():
            yield f"{name}#{number}", ""
            continue
        try:
            record = json.loads(_decode(line, path, offset))
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where} is not JSON ({error.msg}, column {error.colno}); expected one object a line"
            ) from None
        except RecursionError:
            raise InputError(f"{where} is nested too deeply; expected one flat object a line") from None
        if not isinstance(record, dict):
            raise InputError(
                f"{where} holds {type(record).__name__}; expected an object with the column {spec.text_column}"
            )
        yield f"{name}#{number}", _text_of(record, spec.text_column, where)


def _parquet_records(spec: CorpusSpec, path: Path, name: str) -> Iterator[tuple[str, str | None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as table:
            columns = table.schema_arrow.names
            if spec.text_column not in columns:
                raise InputError(f"{path}: {_no_column(spec.text_column, columns)}")
            kind = table.schema_arrow.field(spec.text_column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
                raise InputError(f"{path}: column {spec.text_column} holds {kind}; expected text")
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[spec.text_column]):
                for text in batch.column(0).to_pylist():
                    yield f"{name}#{number}", None if text is None else _checked(text, f"{path}: row {number}")
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a whole Parquet file: {str(error).splitlines()[0][:200]}") from error


def _hub_records(spec: CorpusSpec) -> Iterator[tuple[str, str | None]]:
    import datasets

    name, config, split = [*spec.source.split(":"), "", ""][:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the library raises many kinds: unknown name, no network, unknown config or split
        reason = (str(error).strip().split("\n") or [""])[0][:200]
        raise InputError(
            f"{spec.source} is neither a file or folder nor a data set that can be reached: {reason}\n"
            "expected a path, or a hub name as NAME[:CONFIG[:SPLIT]]"
        ) from error
    for number, row in enumerate(rows):
        yield f"{spec.source}#{number}", _text_of(row, spec.text_column, f"{spec.source}: row {number}")


def _text_of(record: dict[str, Any], column: str, where: str) -> str | None:
    if column not in record:
        raise InputError(f"{where}: {_no_column(column, record)}")
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where}: column {column} holds {type(text).__name__}; expected text")
    return None if text is None else _checked(text, where)


def _checked(text: str, where: str) -> str:
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


def _no_column(wanted: str, present: Iterable[str]) -> str:
    return f"no column {wanted}; present: {', '.join(list(present)[:20]) or 'none'}; set text_column"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their byte offsets in the (unpacked) file; the byte order mark is left out."""
    offset = 0
    opened: BinaryIO = gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")  # type: ignore[assignment]  # noqa: SIM115
    with opened as file:
        while True:
            try:
                line = file.readline(MAX_DOCUMENT_BYTES + 1)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise InputError(f"{path} is not a whole gzip file: {error}") from None
            if not line:
                return
            if len(line) > MAX_DOCUMENT_BYTES:
                raise InputError(
                    f"{path}: the line at byte {offset} is over {MAX_DOCUMENT_BYTES >> 20} MiB; split it into lines"
                )
            skipped = len(BYTE_ORDER_MARK) if not offset and line.startswith(BYTE_ORDER_MARK) else 0
            yield offset + skipped, line[skipped:]
            offset += len(line)


def _decode(raw: bytes, path: Path, begin: int) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        found = raw[error.start]
        raise InputError(
            f"{path}: byte {begin + error.start} (0x{found:02x}) is not UTF-8; expected UTF-8 text, convert the file"
        ) from None
    if b"\0" in raw:
        raise InputError(f"{path}: byte {begin + raw.index(0)} is NUL; expected text, remove it")
    return text


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
        source_files(source)


def _identity(spec: CorpusSpec) -> dict[str, Any]:
    if _is_python_docs(spec.source):
        from encoderkit.pretrain.python_docs import corpus_hash

        return {"sha256": corpus_hash(split=_python_docs_split(spec.source))}
    files = source_files(spec.source)
    if files is None:
        return {"hub": True}
    return {"files": [{"name": name, "size": p.stat().st_size, "sha256": file_hash(p)} for p, name in files]}


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
