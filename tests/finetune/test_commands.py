"""The commands: help without torch, exit statuses, fill against transformers, the baseline."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

from encoderkit.finetune.__main__ import COMMANDS, main
from encoderkit.finetune.baseline import tfidf_baseline
from encoderkit.finetune.fill import fill
from encoderkit.finetune.settings import BaselineSettings, FillSettings
from encoderkit.finetune.tasks import Columns, TaskData
from encoderkit.kernels.errors import InputError

PROBABILITY_FP32 = 2e-6


def test_help_of_every_command_imports_no_torch():
    code = (
        "import sys, contextlib\n"
        "from encoderkit.finetune.__main__ import COMMANDS, main\n"
        "main(['--help'])\n"
        "for name in COMMANDS:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([name, '--help'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'evaluate', 'sklearn', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--columns.text_b" in done.stdout
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "m", "--task", "sst22"], "did you mean sst2?"),
        (["run", "m", "--data.train", "nowhere.jsonl", "--out", "o"], "nowhere.jsonl: no such file"),
        (["run", "m", "--task", "rte", "--epoch", "3"], "did you mean epochs?"),
        (["run", "m", "--task", "rte", "--dropout", "1.5"], "dropout is 1.5; expected from 0 to 0.9"),
        (["run", "m", "--task", "rte", "--optimizer.skip_sigmas", "3"], "unknown key optimizer.skip_sigmas"),
        (["run", "--task", "rte"], "model is missing"),
        (["predict", "m"], "exactly one"),
        (["fill", "m"], "text is missing"),
        (["baselin"], "did you mean baseline?"),
    ],
)
def test_bad_input_is_exit_status_2_and_at_most_two_lines(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") <= 2
    assert not os.listdir(tmp_path)


CHOICE = {"context": "a", "question": "b", "choices": ["x", "y"]}
SQUAD = {"question": "who?", "context": "the cat", "answers": {"text": ["cat"], "answer_start": [4]}}


@pytest.mark.parametrize(
    ("options", "rows", "words"),
    [
        (["--kind", "tagging"], [{"tokens": ["a", "b"], "tags": ["O", "I-x"]}], ["row 1, word 2", "not IOB2"]),
        (
            ["--task", "wnut17", "--columns.label", "tag"],
            [{"tokens": ["a"], "tags": ["O"]}],
            ["no column tag", "tokens, tags"],
        ),
        (["--task", "squad"], [{"id": "q7", **SQUAD}, {"id": "q7", **SQUAD}], ["id q7 more than once"]),
        (["--task", "squad"], [{"id": "q8", **SQUAD, "answers": {"text": []}}], ["id q8", "--data.unanswerable true"]),
        (["--task", "squad2"], [{"id": "q9", **SQUAD, "context": "a cat"}] * 1, ["id q9 does not stand"]),
        (["--task", "stsb"], [{"sentence1": "a", "sentence2": "b", "label": None}], ["no finite number in row 1"]),
        (
            ["--task", "swag", "--columns.choices", "c"],
            [{"sent1": "a", "sent2": "b", "c": ["x", "y"], "label": 2}],
            ["row 1"],
        ),
        (
            ["--task", "cola"],
            [{"sentence": "a", "label": 2}],
            ["label '2' in row 1", "0, 1 (unacceptable, acceptable)"],
        ),
        (["--kind", "multi_label"], [{"text": "a", "labels": [float("nan")]}], ["row 1", "empty or NaN"]),
        (["--task", "mine.yaml"], [{"text": "a"}], ["mine.yaml cannot be read"]),
        (["--metric", "seqeval_f1"], [{"text": "a"}], ["metric is 'seqeval_f1'; expected one of accuracy"]),
        (["--kind", "regression", "--class_weights", "balanced"], [{}], ["class_weights is balanced"]),
        (["--kind", "tagging", "--pooling", "mean"], [{}], ["pooling is mean", "leave it out for tagging"]),
        (["--qa.stride", "4"], [{}], ["qa.stride is 4, which is for questions; leave it out for classification"]),
        (["--data.iob1", "true"], [{}], ["data.iob1 is True, which is for tags"]),
        (["--data.validation_share", "0.2"], [{}], ["validation_share is set, and there is validation data"]),
    ],
)
def test_bad_rows_of_tasks_end_with_status_2_and_nothing_written(options, rows, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--data.train", "train.jsonl", "--data.validation", "dev.jsonl"]
    assert main(["run", "m", *files, *options, "--out", "run"]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
    assert told.count("\n") <= 2
    assert sorted(os.listdir(tmp_path)) == ["dev.jsonl", "train.jsonl"]


def test_run_and_predict_as_commands(modern_folder, task_files, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [
        "run",
        modern_folder,
        "--data.train",
        str(task_files / "train.jsonl"),
        "--epochs",
        "1",
        "--max_tokens",
        "32",
    ]
    assert main([*argv, "--out", str(out), "--optimizer.lr", "4e-3"]) == 0
    assert "validation held out of train" in capsys.readouterr().out.replace("\n", " ")
    assert main([*argv, "--out", str(out)]) == 2
    assert main(["predict", str(out / "final"), "--texts", "the red cat", "a [red] :dog:"]) == 0
    table = capsys.readouterr().out
    assert "the red cat" in table
    assert "a [red] :dog:" in table


def test_fill_agrees_with_transformers(model_folder):
    text = "the [MASK] cat sees the [MASK] dog"
    ours = fill(FillSettings(model=model_folder, text=text, top=4))
    theirs = transformers.pipeline("fill-mask", model=model_folder, top_k=4, device="cpu")(text)
    for candidates, expected in zip(ours, theirs, strict=True):
        assert [c.token_id for c in candidates] == [e["token"] for e in expected]
        assert [c.token for c in candidates] == [e["token_str"] for e in expected]
        assert [c.probability for c in candidates] == pytest.approx(
            [e["score"] for e in expected], abs=PROBABILITY_FP32
        )


def test_fill_probabilities_are_over_the_whole_vocabulary(modern_folder, tokenizer):
    (candidates,) = fill(FillSettings(model=modern_folder, text="a [MASK]", top=1000))
    assert len(candidates) == len(tokenizer)
    assert torch.tensor([c.probability for c in candidates]).sum() == pytest.approx(1, abs=1e-5)


def test_fill_without_a_mask_says_so(modern_folder):
    with pytest.raises(InputError, match=r"text holds no \[MASK\]"):
        fill(FillSettings(model=modern_folder, text="the red cat"))


@pytest.mark.parametrize("pairs", [False, True])
def test_baseline_learns_what_words_give_away(task_files, tmp_path, pairs):
    data = TaskData(**{split: str(task_files / f"{split}.jsonl") for split in ("train", "test")})
    columns = Columns(text="other", text_b="text") if pairs else Columns()
    result = tfidf_baseline(BaselineSettings(data=data, columns=columns, out=str(tmp_path / "scores.json")))
    assert result["test"]["accuracy"] > 0.9
    assert json.loads((tmp_path / "scores.json").read_text()) == result
