"""Rows of a .jsonl[.gz], .json, .csv, .tsv or .parquet file or of a hub data set, columns checked, nothing cached.

Files are read here and not through a data set builder: errors can then name the file and the line, memory stays
bounded, and no second copy of the data is written to a cache.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.corpus_files import CorpusFile, check_unpacked, read_rows

MAX_LINE_BYTES = 16 * 2**20  # one row
MAX_FILE_BYTES = 4 * 2**30  # one file, uncompressed
_READERS = {".jsonl": "lines", ".json": "lines", ".csv": ",", ".tsv": "\t", ".parquet": "parquet"}


@dataclass(frozen=True)
class Table:
    """Some columns of a file or a split.

    source: where the rows come from, for messages. columns: name -> values, all of one length. rows: the number of each
    row as a user finds it: the line in a text file, else counted from 1. label_names: those that a hub data set
    declares for its label column.
    """

    source: str
    columns: dict[str, list[Any]]
    rows: list[int]
    label_names: list[str] | None = None


def read_file(path: str | Path, wanted: list[str], *, max_line_bytes: int = MAX_LINE_BYTES) -> Table:
    """Read the wanted columns of a file.

    Raises InputError naming the file and the line: no such file, unknown ending, a column that is missing (wanted and
    present ones), bad JSON, invalid UTF-8, a NUL character, a row or a file that is too large.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a .jsonl, .jsonl.gz, .json, .csv, .tsv or .parquet file")
    suffix = Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()
    reader = _READERS.get(suffix)
    if reader is None or (reader == "parquet" and path.suffix == ".gz"):
        raise InputError(
            f"{path}: unknown ending {suffix or '(none)'!r}; expected .jsonl[.gz], .json, .csv, .tsv or .parquet"
        )
    if reader == "parquet":
        return _read_parquet(path, wanted)
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    rows: list[int] = []
    lines = _text_lines(path, max_line_bytes)
    for number, record in _json_rows(path, lines) if reader == "lines" else _csv_rows(path, lines, reader):
        missing = [name for name in wanted if name not in record]
        if missing:
            raise _missing(f"{path}:{number}", missing, list(record))
        for name in wanted:
            columns[name].append(record[name])
        rows.append(number)
    if not rows:
        raise InputError(f"{path}: 0 rows; expected at least one")
    return Table(str(path), columns, rows)


def read_hub(name: str, split: str, wanted: list[str], label: str | None = None) -> Table:
    """Read the wanted columns of a split of a hub data set, NAME[:CONFIGURATION][@REVISION].

    label: the column whose values become the names that the data set declares for them.
    """
    import datasets

    path, _, revision = name.partition("@")
    repository, _, configuration = path.partition(":")
    try:
        data = datasets.load_dataset(repository, configuration or None, split=split, revision=revision or None)
    except Exception as error:  # the library raises a dozen kinds here: network, name, configuration, split
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"hub data set {name}, split {split}: {reason[:200]}\n"
            "check the name, the split and the network, or name local files by data.train, data.validation, data.test"
        ) from error
    missing = [column for column in wanted if column not in data.column_names]
    if missing:
        raise _missing(f"{name}, split {split}", missing, data.column_names)
    feature = data.features.get(label)
    declared = getattr(getattr(feature, "feature", feature), "names", None)  # of a list: of what it holds
    columns = {column: data[column][:] for column in wanted}
    if declared and label in columns:  # stored as indices; names may be numbers themselves
        columns[label] = [_named(value, declared) for value in columns[label]]
    return Table(f"{name}:{split}", columns, list(range(1, len(data) + 1)), declared)


def _named(value: Any, names: list[str]) -> Any:
    """A declared label by its name, in a list too; anything else as it is."""
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _missing(where: str, missing: list[str], present: list[str]) -> InputError:
    return InputError(
        f"{where}: no column {', '.join(missing)}; present: {', '.join(map(str, present)) or 'none'}. "
        "Name the columns by columns.text, columns.text_b, columns.label, ..."
    )


def _read_parquet(path: Path, wanted: list[str]) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            present = file.schema_arrow.names
            missing = [name for name in wanted if name not in present]
            if missing:
                raise _missing(str(path), missing, present)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a parquet file that can be read ({str(error).splitlines()[0][:150]})") from error
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    packed, held = path.stat().st_size, 0
    for _, row in read_rows(CorpusFile(str(path), path.name), wanted, "line", lambda _: None):
        held += sum(len(value) for value in row.values() if isinstance(value, (str, bytes)))
        check_unpacked(path, packed, held)  # a dictionary may say one long text for a thousand rows
        if held > MAX_FILE_BYTES:
            raise InputError(f"{path}: more than {MAX_FILE_BYTES:,} bytes uncompressed; split it")
        for name in wanted:
            columns[name].append(row[name])
    rows = len(columns[wanted[0]])
    if not rows:
        raise InputError(f"{path}: 0 rows; expected at least one")
    return Table(str(path), columns, list(range(1, rows + 1)))


def _text_lines(path: Path, max_line_bytes: int) -> Iterator[str]:
    """Lines of a text file with their ends, bounded in memory; a byte order mark is dropped."""
    offset, packed = 0, path.stat().st_size
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        number = 0
        while True:
            number += 1
            try:
                line = file.readline(max_line_bytes + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{path}: not a gzip file that can be read ({error})") from error
            if not line:
                return
            if len(line) > max_line_bytes:
                raise InputError(f"{path}:{number}: a line of more than {max_line_bytes:,} bytes; split it into rows")
            if offset + len(line) > MAX_FILE_BYTES:
                raise InputError(f"{path}: more than {MAX_FILE_BYTES:,} bytes uncompressed; split it")
            check_unpacked(path, packed, offset + len(line))
            if b"\0" in line:
                at = offset + line.index(b"\0")
                raise InputError(f"{path}:{number}: a NUL character at byte {at}; expected UTF-8 text")
            try:
                yield line.decode("utf-8-sig" if offset == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: invalid UTF-8 at byte {offset + error.start}; convert the file to UTF-8"
                ) from error
            offset += len(line)


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """One object a line; blank lines are passed over. A .json[.gz] file may be one list of objects."""
    may_be_list = path.name.removesuffix(".gz").endswith(".json")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line if not may_be_list or not line.lstrip().startswith("[") else line + "".join(lines))
        except InputError:  # of the lines of a list
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON ({error}); expected one object a line") from error
        for index, item in enumerate(record, 1) if isinstance(record, list) and may_be_list else [(number, record)]:
            if not isinstance(item, dict):
                raise InputError(f"{path}:{index}: a JSON {type(item).__name__}; expected an object of columns")
            yield index, item


def _csv_rows(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows under the header line; a row with more or fewer cells than the header is an error."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    csv.field_size_limit(MAX_LINE_BYTES)
    try:
        header = next(reader, [])
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise InputError(f"{path}:{reader.line_num}: {len(cells)} cells; the header has {len(header)}")
            yield reader.line_num, dict(zip(header, cells))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not CSV ({error}); quote cells that hold the delimiter") from error
