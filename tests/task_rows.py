"""Labelled rows as files, written and read as a task."""

import json

from encoderkit.finetune.data import load_data
from encoderkit.finetune.tasks import Columns, Task, TaskData


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tmp_path, rows, kind="classification", columns=None, **data):
    data = TaskData(train=write_jsonl(tmp_path / "train.jsonl", rows), **data)
    return load_data(Task(kind=kind, data=data, columns=columns or Columns()))


def labels(split):
    return [example.label for example in split.examples]
