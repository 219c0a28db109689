"""Files of a corpus, here or behind any URL that fsspec knows, and their rows, whatever the format and compression.

Nothing is held but one document or one Parquet batch. What cannot be read is an InputError with its place.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from encoderkit.kernels.errors import InputError, first_line
from encoderkit.pretrain.redaction import without_secrets

TEXT_KINDS = (".txt", ".md", ".rst")
KINDS = (*TEXT_KINDS, ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst")
ENDINGS = (*KINDS, *(kind + packed for kind in KINDS if kind != ".parquet" for packed in COMPRESSIONS), ".json.gz")
NAMED = (*ENDINGS, ".json", ".json.zst")  # read where a file is named: in folders, .json files are about other things
MAX_DOCUMENT_BYTES = 32 << 20  # of one line, row or text document: what keeps memory bounded
MAX_JSON_BYTES = 1 << 30  # of a .json file that is one value, which is held whole
LARGEST_RATIO = 200  # of unpacked to packed bytes, past FREE_BYTES: text packs 3 to 30 times, bombs 1,000 times
FREE_BYTES = 64 << 20
PARQUET_BATCH_BYTES = 128 << 20  # of rows that are held at once
PARQUET_BUFFER = 1 << 20  # bytes of a Parquet column that are read at once, however large its row groups are
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Documents = Literal["file", "line", "blank-line"]
InvalidUtf8 = Literal["refuse", "replace"]
Row = dict[str, Any]
Decode = Callable[[bytes, int], str]  # of bytes that begin at an offset of their file


class Interrupted(InputError):
    """Nothing is wrong with what was given: the same command, run again, goes on."""


@dataclass(frozen=True, eq=False)
class CorpusFile:
    """One file. path: here, or in filesystem. name: what its documents are called, the same on every machine."""

    path: str
    name: str
    filesystem: Any = None  # of fsspec, for a URL

    def __str__(self) -> str:
        return self.path if self.filesystem is None else self.name

    @property
    def kind(self) -> str:
        """The ending without a compression, such as .jsonl, which .ndjson is too."""
        ending = Path(self.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix
        return ".jsonl" if ending == ".ndjson" else ending

    @property
    def place(self) -> Hashable:
        """Where it lies, the same by whatever path it is named."""
        is_here = self.filesystem is None or "local" in self.filesystem.protocol
        return Path(self.path).resolve() if is_here else (self.filesystem, self.path)

    @property
    def size(self) -> int | None:
        """Bytes, packed; None where a server does not say."""
        return Path(self.path).stat().st_size if self.filesystem is None else self.filesystem.size(self.path)

    def identity(self) -> dict[str, Any]:
        """What changes when the file does: the sha256 of a file here, what the server says of another."""
        if self.filesystem is None:
            return {"name": self.name, "size": self.size, "sha256": _digest(self.open())}
        return {"name": self.name, "size": self.size, "version": str(self.filesystem.ukey(self.path))}

    def open(self) -> BinaryIO:
        """The file as it lies there, packed. Raises InputError when it cannot be opened."""
        try:
            return open(self.path, "rb") if self.filesystem is None else self.filesystem.open(self.path, "rb")
        except OSError as error:
            kind = InputError if self.filesystem is None else Interrupted
            raise kind(f"{self} cannot be opened: {error.strerror or first_line(error)}") from error


def find_files(source: str) -> list[CorpusFile] | None:
    """The files of a path, folder, glob or URL; None when it is a hub name. Raises InputError when there is none."""
    if "://" in source:
        return _remote_files(source)
    path = Path(source).expanduser()
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name.lower().endswith(ENDINGS)]
        for p in found:
            _check_name(str(p))
            if not p.resolve().is_relative_to(path.resolve()):
                raise InputError(f"{p} links to {p.resolve()}, outside {source}; give that file as a source of its own")
        if not found:
            raise InputError(f"{source}: the folder holds no text; expected files ending in {', '.join(KINDS)}")
        return [CorpusFile(str(p), f"{path.name}/{p.relative_to(path).as_posix()}") for p in found]
    if path.is_file():
        _check_kind(source, path.name)
        return [CorpusFile(str(path), path.name)]
    if glob.has_magic(source):
        names = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not names:
            raise InputError(f"{source}: no file matches, looked for from {Path.cwd()}")
        for name in names:
            _check_kind(name, name)
            _check_name(name)
        return [CorpusFile(str(Path(n)), below) for n, below in zip(names, _below_common_folder(names))]
    is_hub_name = source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not source.endswith("/")
    if source.lower().endswith(NAMED) or not is_hub_name:
        raise InputError(f"{source}: no such file or folder, looked for from {Path.cwd()}")
    return None


def _check_name(path: str) -> None:
    if not path.isascii() and (shown := path.encode(errors="replace").decode()) != path:
        raise InputError(f"{shown}: the file's name is no UTF-8; rename it")


def read_rows(
    file: CorpusFile,
    columns: list[str] | None,
    documents: Documents,
    tell: Callable[[int], None],
    replaced: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, Row]]:
    """The rows of a file with their places, such as `line 3`; plain text has one column, the first one named.

    columns: those that are needed, None for all. tell: called with the bytes read so far, packed. replaced: None
    refuses bytes that are not UTF-8; else they become U+FFFD, and it is called with how many.
    """
    if file.kind == ".parquet":
        return _parquet_rows(file, columns, tell)
    decode = partial(_decode, file, replaced)
    if file.kind in TEXT_KINDS:
        return _text_rows(file, (columns or ["text"])[0], documents, tell, decode)
    return (_json_rows if file.kind in (".jsonl", ".json") else _csv_rows)(file, tell, decode)


def read_whole(
    file: CorpusFile, opening: str, tell: Callable[[int], None] = lambda _: None, decode: Decode | None = None
) -> str | None:
    """The text of a file that begins with this sign, blanks aside; None where it begins with another.

    Raises InputError where it cannot be read or is more than can be held.
    """
    held, begin = bytearray(), 0
    for offset, piece in _pieces(file, tell, lambda content: content.read(1 << 20)):
        if not offset:
            begin = len(BYTE_ORDER_MARK) if piece.startswith(BYTE_ORDER_MARK) else 0
            piece = piece[begin:]
            if not piece.lstrip().startswith(opening.encode()):
                return None
        held += piece
        if len(held) > MAX_JSON_BYTES:
            raise InputError(
                f"{file}: more than {MAX_JSON_BYTES >> 20} MiB in a .json; write an object a line, and call it .jsonl"
            )
    return (decode or partial(_decode, file, None))(bytes(held), begin) if held else None


def check_unpacked(name: object, packed: int, unpacked: int) -> None:
    """Raise InputError where a file unpacks to far more than any text does: it would fill memory or disk."""
    if unpacked > max(FREE_BYTES, LARGEST_RATIO * packed):
        raise InputError(
            f"{name}: {packed:,} bytes unpack to {unpacked:,} or more; expected at most {LARGEST_RATIO} times as many, "
            "unpack it yourself if that is right"
        )


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    return _digest(open(path, "rb"))


def _digest(file: BinaryIO) -> str:
    with file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _remote_files(source: str) -> list[CorpusFile]:
    import fsspec

    shown = without_secrets(source)
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        name = shown.rstrip("/").rsplit("/", 1)[-1]
        if glob.has_magic(path):
            paths = sorted(filesystem.glob(path))
        elif name.lower().endswith(NAMED):
            paths = [path] if filesystem.exists(path) else []
        else:
            paths = sorted(p for p in filesystem.find(path) if p.lower().endswith(ENDINGS))
    except Exception as error:  # every kind of file system raises its own
        raise InputError(f"{shown} cannot be reached: {first_line(error)}") from error
    if not paths:
        raise InputError(f"{shown}: no such file, or no file ending in {', '.join(KINDS)}")
    for p in paths:
        _check_kind(shown, p.split("?")[0])
    return [
        CorpusFile(p, below, filesystem)
        for p, below in zip(paths, _below_common_folder([p.split("?")[0] for p in paths]))
    ]


def _below_common_folder(paths: list[str]) -> list[str]:
    """The paths from below the folder that holds them all."""
    parts = [path.replace(os.sep, "/").split("/") for path in paths]
    folders = zip(*(part[:-1] for part in parts))  # level by level
    common = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, folders)))
    return ["/".join(part[common:]) for part in parts]


def _check_kind(source: str, name: str) -> None:
    if not name.lower().endswith(NAMED):
        raise InputError(
            f"{source}: unknown kind of file; expected one ending in {', '.join(KINDS)}, or these packed as .gz or .zst"
        )


def _text_rows(
    file: CorpusFile, column: str, documents: Documents, tell: Callable[[int], None], decode: Decode
) -> Iterator[tuple[str, Row]]:
    """Plain text: lines are gathered until a document ends; runs of blank lines end one document, not several."""
    held: list[bytes] = []
    begin, size, number = 0, 0, 0
    for offset, line in _lines(file, tell):
        is_blank = not line.strip()
        if held and (documents == "line" or (documents == "blank-line" and is_blank)):
            yield f"document {number}", {column: decode(b"".join(held), begin)}
            held, size, number = [], 0, number + 1
        if is_blank and (documents == "blank-line" or (documents == "line" and not held)):
            if documents == "line":
                yield f"document {number}", {column: ""}
                number += 1
            continue
        if not held:
            begin = offset
        held.append(line)
        size += len(line)
        if size > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{file}: the document at byte {begin} is over {MAX_DOCUMENT_BYTES >> 20} MiB; "
                "split it, or set documents to line or blank-line"
            )
    if held:
        yield f"document {number}", {column: decode(b"".join(held), begin)}


def _json_rows(file: CorpusFile, tell: Callable[[int], None], decode: Decode) -> Iterator[tuple[str, Row]]:
    """An object a line; or, in a .json file, one list of objects."""
    if file.kind == ".json" and (text := read_whole(file, "[", tell, decode)) is not None:
        for number, row in enumerate(_parsed(file, text, 1)):
            yield f"row {number}", _bounded(file, number, _object(file, f"row {number}", row))
        return
    for number, (offset, line) in enumerate(_lines(file, tell), start=1):
        place, text = f"line {number}", decode(line, offset).rstrip()
        yield place, _object(file, place, _parsed(file, text, number)) if text else {}


def _parsed(file: CorpusFile, text: str, line: int) -> Any:
    """JSON that begins at a line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"line {line + error.lineno - 1} is not JSON ({error.msg}, column {error.colno})"
        raise InputError(f"{file}: {what}; expected one object a line") from None
    except RecursionError:
        raise InputError(f"{file}: line {line} is nested too deeply; expected one flat object a line") from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{file}: line {line} is not JSON that can be read ({first_line(error)})") from None


def _object(file: CorpusFile, place: str, row: Any) -> Row:
    if not isinstance(row, dict) or not row:
        raise InputError(f"{file}: {place} holds {type(row).__name__}; expected an object with columns")
    return row


def _bounded(file: CorpusFile, number: int, row: Row) -> Row:
    """The row, unless one of its texts is longer than can be held."""
    for name, value in row.items():
        if isinstance(value, str) and len(value) > MAX_DOCUMENT_BYTES:
            raise InputError(f"{file}: row {number}: column {name} is over {MAX_DOCUMENT_BYTES >> 20} MiB; split it")
    return row


def _csv_rows(file: CorpusFile, tell: Callable[[int], None], decode: Decode) -> Iterator[tuple[str, Row]]:
    """Comma- or tab-separated rows below a line of column names, quoted as RFC 4180 says."""
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    lines = (decode(line, offset) for offset, line in _lines(file, tell))
    reader = csv.reader(lines, delimiter="\t" if file.kind == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            how = "expected quoted cells; where quotes are part of the text, as in GLUE's .tsv, write it as .jsonl"
            raise InputError(f"{file}: the row at line {first} is not CSV ({error}); {how}") from None
        if cells is None:
            return
        if header is None:
            header = cells
        elif not cells:
            yield f"line {first}", {}
        elif len(cells) != len(header):
            raise InputError(f"{file}: line {first} has {len(cells)} cells; expected {len(header)}, as the first line")
        else:
            yield f"line {first}", dict(zip(header, cells))


def _parquet_rows(
    file: CorpusFile, columns: list[str] | None, tell: Callable[[int], None]
) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        source = file.path if file.filesystem is None else file.open()
        # Buffered ahead, as is the default, all that was read stays in memory until the file is closed.
        with pq.ParquetFile(source, pre_buffer=False, buffer_size=PARQUET_BUFFER) as table:
            present = table.schema_arrow.names
            missing = [name for name in columns or [] if name not in present]
            if missing:
                yield "row 0", dict.fromkeys(present)  # the reader of rows names what is missing
            number, size, total = 0, file.size or 0, table.metadata.num_rows
            for batch in _parquet_batches(file, table, columns):
                names, held = batch.schema.names, batch.columns
                for at in range(batch.num_rows):
                    row = _bounded(file, number, {name: values[at].as_py() for name, values in zip(names, held)})
                    tell(size * (number + 1) // total)
                    yield f"row {number}", row
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not a whole Parquet file: {first_line(error)}") from error


def _parquet_batches(file: CorpusFile, table: Any, columns: list[str] | None) -> Iterator[Any]:
    """Record batches of at most 256 rows, and of fewer where rows are long or may be.

    A dictionary says one value for any number of rows: kilobytes may hold the same megabytes a thousand times.
    """
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        chunks = [about.column(i) for i in range(about.num_columns)]
        chunks = [chunk for chunk in chunks if columns is None or chunk.path_in_schema.split(".")[0] in columns]
        unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
        check_unpacked(file, sum(chunk.total_compressed_size for chunk in chunks), unpacked)
        longest = unpacked if any(chunk.has_dictionary_page for chunk in chunks) else unpacked // max(1, about.num_rows)
        rows = max(1, min(256, PARQUET_BATCH_BYTES // max(1, longest)))
        yield from table.iter_batches(batch_size=rows, row_groups=[group], columns=columns)


def _lines(file: CorpusFile, tell: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    """Lines with their byte offsets in the unpacked file; the byte order mark is left out."""
    for offset, line in _pieces(file, tell, lambda content: content.readline(MAX_DOCUMENT_BYTES + 1)):
        if len(line) > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{file}: the line at byte {offset} is over {MAX_DOCUMENT_BYTES >> 20} MiB; split it into lines"
            )
        skipped = len(BYTE_ORDER_MARK) if not offset and line.startswith(BYTE_ORDER_MARK) else 0
        yield offset + skipped, line[skipped:]


def _pieces(
    file: CorpusFile, tell: Callable[[int], None], read: Callable[[BinaryIO], bytes]
) -> Iterator[tuple[int, bytes]]:
    """What an unpacked file holds, piece by piece as read takes them from it, with their byte offsets."""
    offset = 0
    with file.open() as raw:
        content = _unpacked(file, raw)
        while True:
            try:
                piece = read(content)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise InputError(f"{file} is not a whole gzip file: {error}") from None
            except OSError as error:
                if file.name.lower().endswith(".zst"):
                    raise InputError(f"{file} is not a whole zstd file: {first_line(error)}") from None
                raise Interrupted(f"{file} cannot be read: {first_line(error)}; run the same command again") from error
            tell(raw.tell())
            if not piece:
                return
            check_unpacked(file, raw.tell(), offset + len(piece))
            yield offset, piece
            offset += len(piece)


def _unpacked(file: CorpusFile, raw: BinaryIO) -> BinaryIO:
    """What the opened file holds, unpacked by its ending."""
    if file.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if file.name.lower().endswith(".zst"):
        import pyarrow as pa

        return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(raw, "zstd")))
    return raw


def _decode(file: CorpusFile, replaced: Callable[[int], None] | None, raw: bytes, begin: int) -> str:
    try:
        text = raw.decode(errors="strict" if replaced is None else "replace")
    except UnicodeDecodeError as error:
        found = raw[error.start]
        raise InputError(
            f"{file}: byte {begin + error.start} (0x{found:02x}) is not UTF-8; expected UTF-8 text, convert the file "
            "(prepare takes --invalid_utf8 replace)"
        ) from None
    if b"\0" in raw:
        raise InputError(f"{file}: byte {begin + raw.index(0)} is NUL; expected text, remove it")
    if replaced is not None:
        replaced(text.count("\ufffd") - raw.count("\ufffd".encode()))
    return text
