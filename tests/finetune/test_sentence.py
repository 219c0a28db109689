"""Vectors of sentences: they get better, and the folder gives the same ones to sentence-transformers and to embed."""

import json
import os
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file

from encoderkit.finetune.__main__ import main
from encoderkit.finetune.run_folder import held

pytest.importorskip("sentence_transformers")
VECTOR_FP32 = 2e-6
FAST = ["--max_tokens", "32", "--batch_size", "16", "--precision", "fp32"]
SCORED = ["--columns.text", "text", "--columns.text_b", "other", "--columns.label", "same"]
OTHERS = {"cat": "one", "dog": "two", "bird": "three", "red": "or", "blue": "to", "green": "in"}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(folder):
    return [f"--data.{split}={folder / split}.jsonl" for split in ("train", "validation", "test")]


@pytest.mark.parametrize(("loss", "pooling"), [("cosent", "mean"), ("cosine", "cls")])
def test_pairs_with_scores(loss, pooling, model_folder, task_files, tmp_path):
    from sentence_transformers import SentenceTransformer

    how = [*SCORED, "--loss", loss, "--pooling", pooling]
    argv = ["sentence", model_folder, *files(task_files), *how, *FAST, "--epochs", "6", "--lr", "4e-3"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["pairs"] == {"train": 96, "validation": 40, "test": 40}
    assert found["validation"]["metric"] == "spearman_cosine"
    assert found["validation"]["after"] > found["validation"]["before"] + 0.1
    assert not (tmp_path / "run/trainer").exists()

    final, rows = tmp_path / "run/final", read(task_files / "test.jsonl")
    assert "auto_map" not in json.loads((final / "config.json").read_text())  # no code of ours is needed
    opened = SentenceTransformer(str(final), device="cpu")
    assert opened.max_seq_length == 32
    one, other = (opened.encode([row[name] for row in rows], normalize_embeddings=True) for name in ("text", "other"))
    cosines, scores = (one * other).sum(1), [row["same"] for row in rows]
    assert scipy.stats.spearmanr(cosines, scores)[0] == pytest.approx(found["test"]["after"], abs=1e-6)
    assert main(["embed", str(final), f"--file={task_files}/test.jsonl", "--out", str(tmp_path / "ours.npy")]) == 0
    assert np.abs(np.load(tmp_path / "ours.npy") - one).max() < VECTOR_FP32


def test_pairs_without_scores(modern_folder, task_files, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    texts = dict.fromkeys(row["text"] for row in read(task_files / "train.jsonl"))
    rows = [{"text": text, "other": " ".join(OTHERS.get(word, word) for word in text.split())} for text in texts]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["--columns.text", "text", "--columns.text_b", "other"]
    argv = ["sentence", modern_folder, f"--data.train={pairs}", *columns, *FAST, "--epochs", "3", "--lr", "2e-3"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run/metrics.json").read_text())["validation"]
    assert found["metric"] == "mean_accuracy"
    assert found["after"] > found["before"] > 0
    assert main([*argv, "--out", str(tmp_path / "run")]) == 2  # the folder is in use


def test_bf16_trains_and_keeps_fp32_weights(modern_folder, task_files, tmp_path, monkeypatch):
    monkeypatch.setattr("encoderkit.encoder.precision.has_bf16", lambda device: True)  # slow without, and the same
    argv = ["sentence", modern_folder, *files(task_files), *SCORED, *FAST]
    kept = {}
    for precision in ("fp32", "bf16"):
        assert main([*argv, "--precision", precision, "--out", str(tmp_path / precision)]) == 0
        kept[precision] = load_file(tmp_path / precision / "final/model.safetensors")
    assert {weight.dtype for weight in kept["bf16"].values()} == {torch.float32}
    assert any((weight != weight.bfloat16()).any() for weight in kept["bf16"].values())  # finer updates are kept
    assert any((weight != kept["fp32"][name]).any() for name, weight in kept["bf16"].items())


def test_a_run_folder_in_use_names_its_holder(modern_folder, task_files, tmp_path, capsys):
    argv = ["sentence", modern_folder, *files(task_files), *SCORED, *FAST, "--out", str(tmp_path / "run")]
    with held(tmp_path / "run"):
        assert main(argv) == 2
    assert f"in use by process {os.getpid()} on " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--columns.text", "text"], "columns.text and columns.text_b name the two texts"),
        (["--columns.text", "text", "--columns.text_b", "other", "--loss", "cosent"], "loss is cosent and columns"),
        (["--columns.text", "text", "--columns.text_b", "others"], "no column others"),
        (["--columns.text", "text", "--columns.text_b", "other", "--max_tokens", "65"], "at most 64 tokens"),
    ],
)
def test_bad_input_is_one_line(argv, words, modern_folder, task_files, tmp_path, capsys):
    assert main(["sentence", modern_folder, *files(task_files), *argv, "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") <= 2
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_one_line(modern_folder, task_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    columns = ["--columns.text", "text", "--columns.text_b", "other"]
    assert main(["sentence", modern_folder, *files(task_files), *columns, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.endswith("pip install 'encoderkit[sentence]'\n")
