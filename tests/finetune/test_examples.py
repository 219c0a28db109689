"""Rows of each kind of task: labels of every spelling, files and hub data sets, and each bad row with its place."""

import gzip
import json

import pytest
from task_rows import labels, load, write_jsonl

from encoderkit.finetune.data import load_data
from encoderkit.finetune.tasks import Columns, Task, TaskData, find_task
from encoderkit.kernels.errors import InputError

QUESTION = {
    "id": "q1",
    "question": "who?",
    "context": "the red cat",
    "answers": {"text": ["red cat"], "answer_start": [4]},
}
CHOICES = {"context": "the cat", "question": "is", "choices": ["red", "blue", "green"], "label": 1}
TAGS = {"tokens": ["a", "cat", "sees"], "tags": ["O", "B-x", "I-x"]}


def test_several_labels_are_lists_of_names_or_indices(tmp_path):
    rows = [
        {"text": f"x{i}", "labels": found} for i, found in enumerate(([], ["b"], ["a", "c"], '["c", "c"]', ["b", "a"]))
    ]
    data = load(tmp_path, rows * 3, "multi_label", validation_share=0.1)
    assert data.label_names == ["a", "b", "c"]
    assert data.majority_share() is None  # a row has several
    assert {(), (1,), (0, 2), (2,), (0, 1)} >= set(labels(data.train))
    assert set(
        labels(load(tmp_path, [{"text": f"x{i}", "labels": [i % 2]} for i in range(9)], "multi_label").train)
    ) == {
        (0,),
        (1,),
    }


@pytest.mark.parametrize(
    ("kind", "good", "bad", "words"),
    [
        ("multi_label", {"text": "x", "labels": ["a", "b"]}, {"labels": "a"}, ["row 3", "labels holds no list"]),
        ("multi_label", {"text": "x", "labels": ["a", "b"]}, {"labels": ["a", None]}, ["row 3", "empty or NaN"]),
        ("regression", {"text": "x", "score": 1.5}, {"score": None}, ["row 3", "score is no finite number"]),
        ("regression", {"text": "x", "score": 1.5}, {"score": float("inf")}, ["row 3", "no finite number"]),
        ("regression", {"text": "x", "score": 1.5}, {"score": "high"}, ["row 3", "no finite number"]),
        ("regression", {"text": "x", "score": 1.5}, {}, ["1.5 is the only label"]),
        ("tagging", TAGS, {"tags": ["O", "I-x", "I-x"]}, ["row 3, word 2", "I-x after O is not IOB2", "data.iob1"]),
        ("tagging", TAGS, {"tags": ["B-y", "I-x", "O"]}, ["row 3, word 2", "I-x after B-y is not IOB2"]),
        ("tagging", TAGS, {"tags": ["O", "B-x", "E-x"]}, ["row 3, word 3", "E-x after B-x is not IOB2"]),
        ("tagging", TAGS, {"tags": ["O", "O"]}, ["not one tag for each word in row 3"]),
        ("tagging", TAGS, {"tokens": [], "tags": []}, ["no words in row 3"]),
        ("tagging", {"tokens": ["a"], "tags": ["O"]}, {}, ["'O' is the only label"]),
        ("multiple_choice", CHOICES, {"label": 3}, ["no index of a choice in row 3"]),
        ("multiple_choice", CHOICES, {"label": -1}, ["no index of a choice in row 3"]),
        ("multiple_choice", CHOICES, {"label": "red"}, ["label is no integer in row 3"]),
        ("multiple_choice", CHOICES, {"label": None}, ["empty or NaN in row 3"]),
        ("multiple_choice", CHOICES, {"choices": ["red"]}, ["fewer than two choices in row 3"]),
        ("multiple_choice", CHOICES, {"choices": ["red", None]}, ["choices has no valid text in row 3"]),
        ("question_answering", QUESTION, {"answers": {"text": []}}, ["no answer to id q3", "--data.unanswerable true"]),
        ("question_answering", QUESTION, {"id": "q2"}, ["id q2 more than once"]),
        ("question_answering", QUESTION, {"answers": 7}, ["row 3", "lists text and answer_start"]),
        (
            "question_answering",
            QUESTION,
            {"answers": {"text": ["red cat"], "answer_start": [5]}},
            ["id q3 does not stand at its answer_start"],
        ),
    ],
)
def test_bad_rows_of_every_kind_are_named(tmp_path, kind, good, bad, words):
    rows = [{**good, **({"id": f"q{i}"} if "id" in good else {}), **(bad if i == 3 else {})} for i in range(1, 6)]
    with pytest.raises(InputError) as caught:
        load(tmp_path, rows, kind, validation=write_jsonl(tmp_path / "validation.jsonl", [good]))
    assert all(word in str(caught.value) for word in words), caught.value
    assert str(caught.value).count("\n") <= 1


def test_iob1_is_converted_where_that_is_asked_for(tmp_path):
    tags = ["I-x", "I-x", "B-x", "O", "I-y", "I-x"]
    rows = [{"tokens": [*"abcde", str(i)], "tags": tags} for i in range(4)]
    data = load(tmp_path, rows, "tagging", iob1=True)
    named = [data.label_names[tag] for tag in data.train.examples[0].tags]
    assert named == ["B-x", "I-x", "B-x", "O", "B-y", "B-x"]
    with pytest.raises(InputError, match="is not IOB2"):
        load(tmp_path, rows, "tagging")
    with pytest.raises(InputError, match=r"data\.labels has I-y and no B-y, .*; add B-y"):
        load(tmp_path, rows, "tagging", iob1=True, labels=["O", "B-x", "I-x", "I-y"])
    rows.append({"tokens": ["a", "b"], "tags": ["B-x", "E-x"]})
    with pytest.raises(InputError, match=r"row 5, word 2: tag E-x after B-x is not IOB2"):
        load(tmp_path, rows, "tagging", iob1=True)


def test_choices_may_be_columns(tmp_path):
    rows = [{"premise": f"p{i}", "asks": "effect", "c1": "one", "c2": "two", "label": i % 2} for i in range(6)]
    columns = Columns(text="premise", text_b="asks", choices=["c1", "c2"])
    data = load(tmp_path, rows, "multiple_choice", columns)
    assert data.train.examples[0].choices == ["effect one", "effect two"]
    without = load(tmp_path, rows, "multiple_choice", Columns(text="premise", text_b="", choices=["c1", "c2"]))
    assert without.train.examples[0].choices == ["one", "two"]


@pytest.mark.parametrize("ending", ["json", "json.gz"])
def test_official_squad_files_and_hub_columns_give_the_same_questions(tmp_path, ending):
    answers = [{"text": "red cat", "answer_start": 4}, {"text": "cat", "answer_start": 8}]
    questions = [{"id": f"q{i}", "question": "who?", "answers": answers} for i in range(3)]
    questions.append({"id": "none", "question": "why?", "answers": [], "is_impossible": True})
    paragraph = {"context": "the red cat", "qas": questions}
    official = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [paragraph]}]}
    text = json.dumps(official).encode()
    path = tmp_path / f"squad.{ending}"
    path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    columns = {"text": ["red cat", "cat"], "answer_start": [4, 8]}
    hub = [{"id": f"q{i}", "question": "who?", "context": "the red cat", "answers": columns} for i in range(3)]
    hub.append(
        {"id": "none", "question": "why?", "context": "the red cat", "answers": {"text": [], "answer_start": []}}
    )
    rows = write_jsonl(tmp_path / "rows.jsonl", hub)
    data = [
        load_data(
            Task(kind="question_answering", data=TaskData(train=[train], validation=[rows], unanswerable=True))
        ).train.examples
        for train in (str(path), rows)
    ]
    assert data[0] == data[1]
    assert data[0][3].answers == []
    with pytest.raises(InputError, match=r"no column q; an official SQuAD file has question, context, answers, id"):
        load_data(Task(kind="question_answering", data=TaskData(train=[str(path)]), columns=Columns(text="q")))
    with pytest.raises(InputError, match=r"no answer to id none; .* --data.unanswerable true"):
        load_data(Task(kind="question_answering", data=TaskData(train=[str(path)], validation=[rows])))


def test_ids_are_one_question_s_over_all_files_of_a_split(tmp_path):
    files = {split: write_jsonl(tmp_path / f"{split}.jsonl", [QUESTION | {"id": split}]) for split in "abc"}
    load_data(Task(kind="question_answering", data=TaskData(train=[files["a"], files["b"]], validation=[files["a"]])))
    with pytest.raises(InputError, match=r"a.jsonl, .*c.jsonl, .*a.jsonl: id a more than once"):
        load_data(Task(kind="question_answering", data=TaskData(train=[files[name] for name in "aca"])))


def test_a_damaged_squad_file_is_told(tmp_path):
    (tmp_path / "x.json").write_text('{"data": [{"paragraphs": [{"context": "x", "qas": [{"id": "a"}]}]}]}')
    with pytest.raises(InputError, match=r"x.json: question 1 is not as in SQuAD's JSON"):
        load_data(Task(kind="question_answering", data=TaskData(train=[str(tmp_path / "x.json")])))


@pytest.mark.parametrize("names", [["1", "2"], ["1", "0"]])
def test_hub_labels_are_the_declared_names_even_where_these_are_numbers(monkeypatch, names):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = {"text": [f"text {i}" for i in range(8)], "label": [i % 2 for i in range(8)]}
    found = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: found)
    data = load_data(Task(data=TaskData(hub="polarity", validation_split="test")))
    assert data.label_names == names
    assert labels(data.train) == rows["label"]
    data = load_data(Task(data=TaskData(hub="polarity", validation_split="test", labels=["bad", "good"])))
    assert (data.label_names, labels(data.train)) == (["bad", "good"], rows["label"])


def test_choices_of_the_hub_are_indices_whatever_it_calls_them(monkeypatch):
    import datasets

    text = datasets.Value("string")
    label = datasets.ClassLabel(names=["choice1", "choice2"])
    features = datasets.Features(dict.fromkeys(["premise", "question", "choice1", "choice2"], text) | {"label": label})
    rows = {name: [f"{name} {i}" for i in range(4)] for name in features if name != "label"} | {"label": [0, 1, 1, 0]}
    found = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: found)
    assert labels(load_data(find_task("copa")).train) == [0, 1, 1, 0]


def test_hub_columns_bring_their_label_names(monkeypatch):
    import datasets

    names = ["O", "B-x", "I-x"]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.ClassLabel(names=names))}
    )
    rows = {"tokens": [["a", "b"]] * 4, "ner_tags": [[1, 2]] * 4}
    asked = []

    def load_dataset(name, configuration, *, split, revision):
        asked.append((name, configuration, split, revision))
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = load_data(find_task("wnut17"))
    assert data.label_names == names
    assert data.train.examples[0].tags == [1, 2]
    assert asked[0] == ("leondz/wnut_17", "wnut_17", "train", "refs/convert/parquet")
