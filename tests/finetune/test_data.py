"""Reading labelled rows: every kind of file, labels of every spelling, and each bad input with its row."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from encoderkit.finetune.data import load_data
from encoderkit.finetune.settings import BaselineSettings, TaskData
from encoderkit.finetune.tables import read_file
from encoderkit.finetune.tasks import TASKS, find_task
from encoderkit.kernels.errors import InputError

ROWS = [{"text": f"text {i}", "label": "good" if i % 2 else "bad"} for i in range(10)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tmp_path, rows, **data):
    return load_data(TaskData(train=write_jsonl(tmp_path / "train.jsonl", rows), **data), None)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind == "jsonl":
        path.write_text("\ufeff" + lines + "\n\n", encoding="utf-8")  # a byte order mark and blank lines
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        cell = "," if kind == "csv" else "\t"
        path.write_text("\n".join([f"text{cell}label", *(f'"{r["text"]}"{cell}{r["label"]}' for r in ROWS)]))
    table = read_file(path, ["text", "label"])
    assert table.columns["text"] == [row["text"] for row in ROWS]
    assert table.columns["label"] == [row["label"] for row in ROWS]
    assert table.rows[0] == (2 if kind in ("csv", "tsv") else 1)


def test_validation_is_held_out_and_disjoint(tmp_path):
    data = load(tmp_path, ROWS, validation_share=0.3)
    assert data.validation_held_out
    assert (len(data.train.texts), len(data.validation.texts)) == (7, 3)
    assert sorted(data.train.rows + data.validation.rows) == list(range(1, 11))
    assert data.label_names == ["bad", "good"]
    assert data.train.labels.tolist() == [int(text[-1]) % 2 for text in data.train.texts]


@pytest.mark.parametrize("labels", [[1, 2, 10], [1.0, 2.0, 10.0], ["1", "2", "10"]])
def test_integer_labels_sort_by_value(tmp_path, labels):
    rows = [{"text": "x", "label": labels[i % 3]} for i in range(12)]
    data = load_data(
        TaskData(
            train=write_jsonl(tmp_path / "train.jsonl", rows), validation=write_jsonl(tmp_path / "val.jsonl", rows)
        ),
        None,
    )
    assert data.label_names == ["1", "2", "10"]
    assert data.train.labels.tolist() == [0, 1, 2] * 4


def test_integer_labels_index_given_names(tmp_path):
    rows = [{"text": "x", "label": i % 2} for i in range(8)]
    data = load(tmp_path, rows, labels=["no", "yes"])
    assert data.label_names == ["no", "yes"]
    assert set(data.train.labels.tolist()) == {0, 1}


def test_pairs_are_read_by_column_names(tmp_path):
    rows = [{"a": f"a{i}", "b": f"b{i}", "gold": i % 2} for i in range(6)]
    data = load(tmp_path, rows, text="a", text_b="b", label="gold")
    assert [t.replace("a", "b") for t in data.train.texts] == data.train.texts_b


@pytest.mark.parametrize(
    ("bad", "row", "words"),
    [
        ([3], {"text": "x", "label": None}, ["row 4", "empty or NaN"]),
        ([3, 5], {"text": "x", "label": float("nan")}, ["rows 4, 6", "NaN"]),
        ([3], {"text": "x", "label": ""}, ["row 4"]),
        ([3], {"text": "x", "label": 0.5}, ["row 4", "neither a name nor an integer"]),
        ([3], {"text": None, "label": "good"}, ["row 4", "column text"]),
        ([3], {"text": 7, "label": "good"}, ["row 4", "column text"]),
        ([3], {"text": "a\0b", "label": "good"}, ["row 4", "column text"]),
        ([3], {"text": "\ud800", "label": "good"}, ["row 4", "column text"]),
        ([3], {"body": "x", "label": "good"}, [":4", "no column text", "body, label"]),
        (range(10), {"text": "x", "label": "good"}, ["'good' is the only label"]),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, row, words):
    rows = [row if i in bad else good for i, good in enumerate(ROWS)]
    with pytest.raises(InputError) as caught:
        load(tmp_path, rows)
    assert all(word in str(caught.value) for word in words), caught.value
    assert str(caught.value).count("\n") <= 1


def test_label_out_of_range_names_rows_and_range(tmp_path):
    rows = [{"text": "x", "label": i % 2} for i in range(8)] + [{"text": "x", "label": -1}]
    with pytest.raises(InputError, match=r"'-1' in row 9; expected 0, 1 \(no, yes\)"):
        load(tmp_path, rows, labels=["no", "yes"])


def test_label_that_train_has_not_is_refused_in_validation(tmp_path):
    validation = write_jsonl(tmp_path / "validation.jsonl", [{"text": "x", "label": "ugly"}])
    with pytest.raises(InputError, match=r"validation.jsonl: label 'ugly' in row 1; expected bad, good"):
        load(tmp_path, ROWS, validation=validation)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "x", "label": 1}\n{"text": \n', [":2", "not JSON"]),
        (b'{"text": "x", "label": 1}\n[1]\n', [":2", "expected an object"]),
        (b'{"text": "ok", "label": 1}\n{"text": "\xff", "label": 1}\n', [":2", "invalid UTF-8 at byte 37"]),
        (b'{"text": "x\0"}\n', [":1", "NUL"]),
        (b"\n\n", ["0 rows"]),
        (b'{"text": "' + b"x" * 2000 + b'"}\n', [":1", "more than 1,000 bytes"]),
    ],
)
def test_bad_files_are_refused_with_line(tmp_path, content, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_file(path, ["text", "label"], max_line_bytes=1000)
    assert all(word in str(caught.value) for word in words), caught.value


def test_gzip_bomb_of_one_line_is_refused(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 30_000_000))
    with pytest.raises(InputError, match="a line of more than"):
        read_file(path, ["text"])


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.parquet", "x.csv", "x.xlsx", "missing.jsonl"])
def test_unreadable_files_are_input_errors(tmp_path, name):
    if not name.startswith("missing"):
        (tmp_path / name).write_bytes(b'text,label\n"unclosed,1\n')
    with pytest.raises(InputError, match=name):
        read_file(tmp_path / name, ["text", "label"])


def test_csv_row_with_a_cell_too_many(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\na,1\nb,c,1\n")
    with pytest.raises(InputError, match=r"x.csv:3: 3 cells; the header has 2"):
        read_file(tmp_path / "x.csv", ["text", "label"])


def test_tasks_are_whole_and_the_nearest_is_named():
    for name, task in TASKS.items():
        assert task.name == name
        assert len(set(task.labels)) == len(task.labels) >= 2
        assert "f1" not in task.metrics or len(task.labels) == 2
    with pytest.raises(InputError, match="did you mean sst2"):
        find_task("sst-2")


def test_settings_refuse_what_does_not_fit_together():
    with pytest.raises(InputError, match="no data"):
        BaselineSettings()
    with pytest.raises(InputError, match="metric is 'acuracy'"):
        BaselineSettings(task="rte", metric="acuracy")
    with pytest.raises(InputError, match=r"without data\.train"):
        TaskData(validation="x.csv")
    assert TaskData(text="body").columns(find_task("rte")).text_b == "sentence2"


def test_held_out_rows_do_not_depend_on_anything_but_their_number(tmp_path):
    first, second = load(tmp_path, ROWS), load(tmp_path, ROWS[::-1])
    assert first.validation.rows == second.validation.rows
    assert isinstance(first.train.labels, np.ndarray)
