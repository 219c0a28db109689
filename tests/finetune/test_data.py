"""Reading labelled rows: every kind of file, labels of every spelling, and each bad input with its row."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from task_rows import labels, load, write_jsonl

from encoderkit.finetune.data import load_data
from encoderkit.finetune.examples import READERS
from encoderkit.finetune.registry import SUITES, TASKS
from encoderkit.finetune.settings import BaselineSettings
from encoderkit.finetune.tables import read_file
from encoderkit.finetune.tasks import METRICS, Columns, Task, TaskData, find_task
from encoderkit.kernels.errors import InputError

ROWS = [{"text": f"text {i}", "label": "good" if i % 2 else "bad"} for i in range(10)]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind == "jsonl":
        path.write_text("\ufeff" + lines + "\n\n", encoding="utf-8")  # a byte order mark and blank lines
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "jsonl.zst":
        path.write_bytes(pyarrow.compress(lines.encode(), "zstd", asbytes=True))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "json.gz":
        path.write_bytes(gzip.compress(json.dumps(ROWS, indent=1).encode()))
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
    assert (len(data.train), len(data.validation)) == (7, 3)
    assert sorted(e.row for e in data.train.examples + data.validation.examples) == list(range(1, 11))
    assert data.label_names == ["bad", "good"]
    assert labels(data.train) == [int(example.text[-1]) % 2 for example in data.train.examples]


@pytest.mark.parametrize("values", [[1, 2, 10], [1.0, 2.0, 10.0], ["1", "2", "10"]])
def test_integer_labels_sort_by_value(tmp_path, values):
    rows = [{"text": f"x{i}", "label": values[i % 3]} for i in range(12)]
    data = load(tmp_path, rows, validation=write_jsonl(tmp_path / "val.jsonl", rows))
    assert data.label_names == ["1", "2", "10"]
    assert labels(data.train) == [0, 1, 2] * 4


def test_integer_labels_index_given_names(tmp_path):
    rows = [{"text": f"x{i}", "label": i % 2} for i in range(8)]
    data = load(tmp_path, rows, labels=["no", "yes"])
    assert data.label_names == ["no", "yes"]
    assert set(labels(data.train)) == {0, 1}


def test_pairs_are_read_by_column_names(tmp_path):
    rows = [{"a": f"a{i}", "b": f"b{i}", "gold": i % 2} for i in range(6)]
    data = load(tmp_path, rows, columns=Columns(text="a", text_b="b", label="gold"))
    assert all(example.text.replace("a", "b") == example.text_b for example in data.train.examples)


def test_columns_are_joined_by_a_template(tmp_path):
    rows = [{"word": "{b}", "b": f"b{i}", "label": i % 2} for i in range(6)]
    data = load(tmp_path, rows, columns=Columns(text="{word}: {b}!"))
    assert {example.text for example in data.train.examples} < {f"{{b}}: b{i}!" for i in range(6)}


def test_several_files_are_read_as_one(tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", ROWS[i::2] + ROWS[:3]) for i, name in enumerate(("a", "b"))]
    data = load_data(Task(data=TaskData(train=files, validation=files[0])))
    assert (len(data.train), len(data.validation)) == (16, 8)


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
        ([3], {"body": "x", "label": "good"}, ["line 4: no column text", "body, label"]),
        (range(0, 10, 2), {"text": "x", "label": "good"}, ["'good' is the only label"]),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, row, words):
    rows = [row if i in bad else good for i, good in enumerate(ROWS)]
    with pytest.raises(InputError) as caught:
        load(tmp_path, rows)
    assert all(word in str(caught.value) for word in words), caught.value
    assert str(caught.value).count("\n") <= 1


def test_label_out_of_range_names_rows_and_range(tmp_path):
    rows = [{"text": f"x{i}", "label": i % 2} for i in range(8)] + [{"text": "x", "label": -1}]
    with pytest.raises(InputError, match=r"'-1' in row 9; expected 0, 1 \(no, yes\)"):
        load(tmp_path, rows, labels=["no", "yes"])


def test_label_that_train_has_not_is_refused_in_validation(tmp_path):
    validation = write_jsonl(tmp_path / "validation.jsonl", [{"text": "x", "label": "ugly"}])
    with pytest.raises(InputError, match=r"validation.jsonl: label 'ugly' in row 1; expected bad, good"):
        load(tmp_path, ROWS, validation=validation)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "x", "label": 1}\n{"text": \n', ["line 2", "not JSON"]),
        (b'{"text": "x", "label": 1}\n[1]\n', ["line 2 holds list", "expected an object"]),
        (b'{"text": "ok", "label": 1}\n{"text": "\xff", "label": 1}\n', ["byte 37 (0xff) is not UTF-8"]),
        (b'{"text": "x\0"}\n', ["byte 11 is NUL"]),
        (b"\n\n", ["0 rows"]),
        (b'{"text": "x", "label": 1}\n{"label": 1}\n', ["line 2: no column text"]),
    ],
)
def test_bad_files_are_refused_with_line(tmp_path, content, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_file(path, ["text", "label"])
    assert all(word in str(caught.value) for word in words), caught.value


def test_gzip_bomb_of_one_line_is_refused(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 40_000_000))
    with pytest.raises(InputError, match="the line at byte 0 is over 32 MiB"):
        read_file(path, ["text"])


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.parquet", "x.csv", "x.xlsx", "missing.jsonl"])
def test_unreadable_files_are_input_errors(tmp_path, name):
    if not name.startswith("missing"):
        (tmp_path / name).write_bytes(b'text,label\n"unclosed,1\n')
    with pytest.raises(InputError, match=name):
        read_file(tmp_path / name, ["text", "label"])


def test_csv_row_with_a_cell_too_many(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\na,1\nb,c,1\n")
    with pytest.raises(InputError, match=r"x.csv: line 3 has 3 cells; expected 2"):
        read_file(tmp_path / "x.csv", ["text", "label"])


def test_tasks_are_whole_and_the_nearest_is_named():
    for name, task in TASKS.items():
        assert task.name == name
        assert task.data.hub
        assert task.protocol
        assert set(task.metrics) <= set(METRICS[task.kind])
        assert (task.kind == "classification") == (task.data.labels is not None)
        assert "f1" not in task.metrics or len(task.data.labels) == 2
    assert len(SUITES["glue"]) == 9
    assert all(name in TASKS for names in SUITES.values() for name in names)
    with pytest.raises(InputError, match="did you mean sst2"):
        find_task("sst-2")


def test_settings_refuse_what_does_not_fit_together():
    with pytest.raises(InputError, match="no data"):
        BaselineSettings()
    with pytest.raises(InputError, match="metric is 'acuracy'"):
        BaselineSettings(task="rte", metric="acuracy")
    with pytest.raises(InputError, match=r"without data\.train"):
        TaskData(validation="x.csv")
    with pytest.raises(InputError, match=r"columns\.label is empty, but classification reads it"):
        BaselineSettings(task="rte", columns=Columns(label=""))
    with pytest.raises(InputError, match=r"columns\.label is \{a\}:\{b\}; classification reads one column there"):
        BaselineSettings(task="rte", columns=Columns(label="{a}:{b}"))
    with pytest.raises(InputError, match=r"columns\.id is empty, but question_answering reads it"):
        BaselineSettings(task="squad", columns=Columns(id=""))
    settings = BaselineSettings(task="rte", columns=Columns(text="body"), data=TaskData(train="x.csv"))
    task = settings.resolve()
    assert (task.columns.text, task.columns.text_b) == ("body", "sentence2")
    assert (task.data.train, task.data.hub, task.data.labels) == (["x.csv"], None, ["entailment", "not_entailment"])


def test_held_out_rows_do_not_depend_on_anything_but_their_number(tmp_path):
    first, second = load(tmp_path, ROWS), load(tmp_path, ROWS[::-1])
    assert [e.row for e in first.validation.examples] == [e.row for e in second.validation.examples]


def test_a_task_of_ones_own_is_a_yaml_file(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"body": f"b{i}", "stars": i % 2} for i in range(10)])
    (tmp_path / "stars.yaml").write_text(
        "kind: classification\n"
        "data:\n  train: [rows.jsonl]\n  labels: [bad, good]\n"
        "columns:\n  text: body\n  label: stars\n"
        "metrics: [matthews, accuracy]\nprotocol: mine\n"
    )
    task = find_task(str(tmp_path / "stars.yaml"))
    assert (task.name, task.metrics) == ("stars", ["matthews", "accuracy"])
    assert load_data(task).label_names == ["bad", "good"]
    (tmp_path / "wrong.yaml").write_text("kind: classification\ncolums:\n  text: body\n")
    with pytest.raises(InputError, match=r"wrong.yaml line 3: unknown key colums.text; did you mean columns.text"):
        find_task(str(tmp_path / "wrong.yaml"))
    (tmp_path / "metric.yaml").write_text("metrics: [seqeval_f1]\n")
    with pytest.raises(InputError, match=r"'seqeval_f1'; expected one of accuracy, f1"):
        find_task(str(tmp_path / "metric.yaml"))


# Other kinds: what is read, and what is told of bad rows.


def test_what_a_task_sets_can_be_unset():
    squad = BaselineSettings(task="squad2", data=TaskData(unanswerable=False)).resolve().data
    assert (squad.unanswerable, squad.hub) == (False, "rajpurkar/squad_v2")
    assert BaselineSettings(task="squad2").resolve().data.unanswerable
    rte = BaselineSettings(task="rte", data=TaskData(validation_split="")).resolve().data
    assert (rte.validation_split, rte.hub) == ("", "nyu-mll/glue:rte")


def test_held_out_rows_share_no_context_with_train(tmp_path):
    rows = [{"a": f"premise {i // 3}", "b": f"b{i}", "label": i % 3} for i in range(60)]
    columns = Columns(text="a", text_b="b")
    data = load(tmp_path, rows, columns=columns, validation_share=0.2, test_share=0.2)
    splits = {"train": data.train, **data.splits()}
    assert {name: len(split) for name, split in splits.items()} == {"train": 36, "validation": 12, "test": 12}
    premises = [{example.text for example in split.examples} for split in splits.values()]
    assert sum(map(len, premises)) == len(set.union(*premises)) == 20


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_equal_texts_are_held_out_together(tmp_path, kind):
    if kind == "classification":
        rows = [{"text": f"text {i // 2}", "label": i % 2} for i in range(60)]
    else:
        rows = [{"tokens": ["word", str(i // 2)], "tags": ["O", "B-x"]} for i in range(60)]
    data = load(tmp_path, rows, kind=kind, columns=Columns(), validation_share=0.2, test_share=0.2)
    texts = [{READERS[kind].group(e) for e in split.examples} for split in (data.train, *data.splits().values())]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 30


def test_fewer_rows_are_the_same_ones_each_time(tmp_path):
    first, second = (load(tmp_path, ROWS * 5, max_train_rows=20, max_eval_rows=3) for _ in range(2))
    assert (len(first.train), len(first.validation)) == (20, 3)
    assert first.train.examples == second.train.examples


def test_rows_of_several_files_know_theirs(tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", ROWS[:count]) for name, count in (("a", 4), ("b", 6))]
    data = load_data(Task(data=TaskData(train=files[0], validation=files, max_eval_rows=9)))
    rows = [example.row for example in data.validation.examples]
    assert len(rows) == 9
    assert [(file, row) for file, row in zip(data.validation.files, rows)] == sorted(zip(data.validation.files, rows))
    assert set(data.validation.files) == set(files)
    assert data.train.files == []
