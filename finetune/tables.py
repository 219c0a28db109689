"""Rows of a JSON, CSV or Parquet file or of a hub data set, columns checked, nothing cached.

Files are read here and not through a data set builder: errors can then name the file and the line, memory stays
bounded, and no second copy of the data is written to a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoderkit.kernels.errors import InputError, first_line
from encoderkit.pretrain.corpus_files import NAMED, TEXT_KINDS, CorpusFile, check_unpacked, read_rows

MAX_FILE_BYTES = 4 * 2**30  # one file, uncompressed
KINDS = ".jsonl, .ndjson, .json, .csv or .tsv, or these packed as .gz or .zst, or .parquet"  # for messages


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


def read_file(path: str | Path, wanted: list[str]) -> Table:
    """Read the wanted columns of a file.

    Raises InputError naming the file and the line: no such file, unknown ending, a column that is missing (wanted and
    present ones), bad JSON, invalid UTF-8, a NUL character, a row or a file that is too large.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected one ending in {KINDS}")
    file, packed, held = CorpusFile(str(path), path.name), path.stat().st_size, 0
    if not path.name.lower().endswith(NAMED) or file.kind in TEXT_KINDS:
        raise InputError(f"{path}: unknown ending; expected {KINDS}")
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    rows: list[int] = []
    for place, row in read_rows(file, wanted, "line", lambda _: None):
        if not row:
            continue
        kind, count = place.split()
        number = int(count) + (kind == "row")  # those are counted from 0
        if missing := [name for name in wanted if name not in row]:
            where = f"{path}" if file.kind == ".parquet" else f"{path}: {kind} {number}"
            raise _missing(where, missing, list(row))
        held += sum(len(value if isinstance(value, (str, bytes)) else repr(value)) for value in row.values())
        check_unpacked(path, packed, held)  # a dictionary of Parquet may say one long text for a thousand rows
        if held > MAX_FILE_BYTES:
            raise InputError(f"{path}: more than {MAX_FILE_BYTES:,} bytes uncompressed; split it")
        for name in wanted:
            columns[name].append(row[name])
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
        raise InputError(
            f"hub data set {name}, split {split}: {first_line(error)}\n"
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
