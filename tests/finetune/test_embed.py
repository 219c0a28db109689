"""Vectors against transformers, search and its scores against scikit-learn."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import sklearn.metrics
import torch
import transformers

from encoderkit.finetune.__main__ import main
from encoderkit.finetune.embed import own_pooling
from encoderkit.finetune.retrieval import read_judgements, retrieval_scores, search
from encoderkit.kernels.errors import InputError

VECTOR_FP32 = 2e-6
TEXTS = ["the red cat", "a dog sees the bird and eats", "tree", "not very blue or green"]


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(tmp_path / "texts.jsonl")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('{"pooling_mode": "cls"}', "cls"),
        ('{"pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}', "mean"),
        ('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}', "cls"),
        ('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}', None),
        ('{"pooling_mode": "max"}', None),
        ("{", None),
        ("[]", None),
    ],
)
def test_vectors_are_pooled_as_the_folder_says(tmp_path, written, expected):
    assert own_pooling(str(tmp_path)) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(written)
    if expected is not None:
        assert own_pooling(str(tmp_path)) == expected
        return
    with pytest.raises(InputError, match="give --pooling mean or cls"):
        own_pooling(str(tmp_path))


def test_the_pooling_of_a_hub_name_is_looked_for_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--team--encoder" / "snapshots" / ("0" * 40)
    (snapshot / "1_Pooling").mkdir(parents=True)
    (snapshot / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    assert own_pooling("team/encoder") == "cls"


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalized", ["true", "false"])
def test_vectors_equal_transformers(pooling, normalized, model_folder, tokenizer, texts, tmp_path):
    for name in ("v.npy", "v.parquet"):
        argv = ["embed", model_folder, "--file", texts, "--pooling", pooling, "--normalized", normalized]
        assert main([*argv, "--out", str(tmp_path / name), "--batch_tokens", "12"]) == 0
    found = np.load(tmp_path / "v.npy")
    table = pq.read_table(tmp_path / "v.parquet").to_pydict()
    assert table["row"] == [1, 2, 3, 4]
    assert np.array_equal(np.array(table["vector"], dtype=np.float32), found)
    theirs = transformers.AutoModel.from_pretrained(model_folder).eval()
    for text, vector in zip(TEXTS, found):
        with torch.no_grad():
            hidden = theirs(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        expected = hidden.mean(0) if pooling == "mean" else hidden[0]
        expected = expected / expected.norm() if normalized == "true" else expected
        assert np.abs(vector - expected.numpy()).max() < VECTOR_FP32


def test_another_column_is_read_and_cut(modern_folder, tokenizer, tmp_path, capsys):
    rows = [{"text": "tree", "body": text} for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["embed", modern_folder, "--file", str(tmp_path / "rows.jsonl"), "--text", "body", "--max_tokens", "8"]
    assert main([*argv, "--normalized", "false", "--out", str(tmp_path / "v.npy")]) == 0
    assert "1 of 4 texts cut to 8 tokens" in capsys.readouterr().out
    theirs = transformers.AutoModel.from_pretrained(modern_folder).eval()
    for text, vector in zip(TEXTS, np.load(tmp_path / "v.npy"), strict=True):
        *ids, sep = tokenizer(text)["input_ids"]
        with torch.no_grad():
            hidden = theirs(input_ids=torch.tensor([[*ids[:7], sep]])).last_hidden_state[0]
        assert np.abs(vector - hidden.mean(0).numpy()).max() < VECTOR_FP32


def test_search_and_scores_equal_scikit_learn():
    generator = np.random.default_rng(0)
    corpus, queries = generator.normal(size=(400, 16)), generator.normal(size=(9, 16))
    gains = [{int(d): float(generator.integers(1, 4)) for d in generator.choice(400, 7, False)} for _ in queries]
    ranked = search(queries, corpus)
    scores = queries @ corpus.T
    assert all(np.array_equal(np.sort(row)[::-1], row) for row in np.take_along_axis(scores, ranked, 1))
    found = retrieval_scores(ranked, gains)
    truth = np.zeros((len(queries), 400))
    for row, gain in zip(truth, gains):
        row[list(gain)] = list(gain.values())
    assert found["ndcg@10"] == pytest.approx(sklearn.metrics.ndcg_score(truth, scores, k=10))
    precisions = [sklearn.metrics.average_precision_score(t > 0, s) for t, s in zip(truth, scores)]
    assert found["map"] == pytest.approx(np.mean(precisions))
    recalls = [len(set(row[:100]) & set(gain)) / 7 for row, gain in zip(ranked.tolist(), gains)]
    assert found["recall@100"] == pytest.approx(np.mean(recalls))


def write_search(folder, qrels):
    files = {
        "corpus": [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)],
        "queries": [{"_id": "a", "text": TEXTS[1]}, {"_id": "b", "text": TEXTS[2]}, {"_id": "c", "text": "x"}],
        "qrels": qrels,
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [word for name in files for word in (f"--{name}", str(folder / f"{name}.jsonl"))]


def test_a_title_goes_before_its_text(tmp_path):
    argv = write_search(tmp_path, [{"query": "a", "doc": "0", "grade": 1}])
    corpus = [{"_id": "0", "title": "A title", "text": "a text"}, {"_id": "1", "title": "", "text": "b"}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    files = dict(zip(argv[::2], argv[1::2]))
    found = read_judgements(files["--corpus"], files["--queries"], files["--qrels"], None)
    assert found.documents == ["A title a text", "b"]


def test_a_text_finds_itself(modern_folder, tmp_path, capsys):
    graded = [("a", "1", 4), ("a", "0", -1), ("b", "2", 1), ("c", "3", 0)]
    argv = write_search(tmp_path, [{"query-id": q, "corpus-id": d, "score": g} for q, d, g in graded])
    assert main(["embed", modern_folder, *argv, "--out", str(tmp_path / "scores.json")]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    assert (found["ndcg@10"], found["map"], found["recall@100"], found["queries"]) == (1.0, 1.0, 1.0, 2)
    assert main(["embed", modern_folder, *argv, "--gains", "{4: 0, 1: 0, -1: 2}"]) == 0
    assert "1 queries" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("qrels", "words"),
    [
        ([{"query": "z", "doc": "1", "grade": 1}], "qrels.jsonl: line 1: query 'z' is in no row of"),
        ([{"query": "a", "doc": "9", "grade": 1}], "document '9' is in no row of"),
        ([{"query": "a", "grade": 1}], "no doc or corpus-id; present: query, grade"),
        ([{"query": "a", "doc": "1", "grade": "good"}], "grade 'good' is no number; set gains"),
        ([{"query": "a", "doc": "1", "grade": 0}], "no query has a relevant document"),
    ],
)
def test_bad_judgements_are_named(qrels, words, modern_folder, tmp_path, capsys):
    assert main(["embed", modern_folder, *write_search(tmp_path, qrels)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "expected either file, or corpus, queries and qrels"),
        (["--corpus", "texts.jsonl"], "expected either file, or corpus, queries and qrels"),
        (["--file", "texts.jsonl"], "out is empty; expected a name ending in .parquet or .npy"),
        (["--file", "texts.jsonl", "--out", "a.txt"], "out is a.txt; expected a name ending in .parquet or .npy"),
    ],
)
def test_settings_that_do_not_fit_are_refused(argv, words, modern_folder, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["embed", modern_folder, *argv]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]
