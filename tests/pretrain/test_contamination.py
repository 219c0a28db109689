"""Contamination: what was planted is found and named, and nothing else."""

import json
import random

import pytest

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.contamination import contamination, run_contamination
from encoderkit.pretrain.corpora import Document
from encoderkit.pretrain.data_settings import ContaminationSettings


def words(seed, count):
    generator = random.Random(seed)
    return " ".join(f"w{generator.randrange(5000)}" for _ in range(count))


@pytest.fixture
def evaluation(tmp_path):
    rows = [{"question": words(i, 30), "answer": "short one", "label": 1} for i in range(20)]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "dev.jsonl"), [row["question"] for row in rows]


def test_planted_texts_are_found_and_named(evaluation):
    path, questions = evaluation
    part = " ".join(questions[3].split()[5:20])
    corpus = [Document(f"d{i}", words(100 + i, 200)) for i in range(50)]
    corpus += [Document("whole", f"Before. {questions[7].upper()}! after"), Document("part", f"x {part} y")]
    corpus += [Document("again", questions[7]), Document("too little", " ".join(questions[5].split()[:12]))]
    report = contamination(corpus, [path], ngram=13)
    (source,) = report["sources"]
    assert source["texts"] == source["too_short"] == 20
    assert report["documents"] == 54
    assert report["documents_holding"] == 3
    found = {entry["id"]: entry for entry in source["contaminated"]}
    assert found.keys() == {"dev.jsonl#4 question", "dev.jsonl#8 question"}
    assert found["dev.jsonl#8 question"]["documents"] == ["whole", "again"]
    assert found["dev.jsonl#8 question"]["share"] == 1
    assert found["dev.jsonl#4 question"]["share"] == pytest.approx(3 / 18)


def test_the_command_writes_the_report(tmp_path, evaluation, capsys):
    path, questions = evaluation
    (tmp_path / "a.txt").write_text(f"{questions[0]}\n\nother text")
    out = tmp_path / "reports" / "found.json"
    run_contamination(ContaminationSettings(sources=[str(tmp_path / "a.txt")], against=[path], out=str(out)))
    assert "1 of 20 texts share 13 words in a row" in capsys.readouterr().out
    assert json.loads(out.read_text())["sources"][0]["contaminated"][0]["documents"] == ["a.txt#0"]


def test_a_report_that_cannot_be_written_is_told_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    for out, reason in ((tmp_path, "is a folder"), (tmp_path / "file" / "found.json", "cannot be written")):
        with pytest.raises(InputError, match=reason):
            run_contamination(ContaminationSettings(sources=["nothing.txt"], against=["no.jsonl"], out=str(out)))


def test_texts_that_are_all_too_short_are_refused(evaluation):
    with pytest.raises(InputError, match="0 texts of 40 words or more"):
        contamination([], [evaluation[0]], ngram=40)
