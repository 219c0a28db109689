"""A run that is measured on pairs and tasks tells so in its report."""

import json
import shutil
from dataclasses import replace

import pytest
import yaml
from tiny_run import make_settings, make_store

from encoderkit.finetune.__main__ import main
from encoderkit.finetune.run_folder import held
from encoderkit.pretrain.command_line import read_settings
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.settings import Budget, PretrainSettings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    pretrain(make_settings(make_store(folder), folder / "run", budget=Budget(steps=4), price_per_hour=3600.0))
    return folder / "run"


def write_rows(file, count):
    rows = [{"text": f"the {('cat', 'dog')[i % 2]} sees a bird", "label": ("a", "b")[i % 2]} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_report_holds_minimal_pairs_and_tasks(run, tmp_path, real_plots, no_plots):
    run = shutil.copytree(run, tmp_path / "run")
    pairs = tmp_path / "order.jsonl"
    pairs.write_text(json.dumps({"good": "the cat sees a dog", "bad": "cat the a sees dog"}) + "\n")
    for split, count in (("train", 16), ("dev", 8)):
        write_rows(tmp_path / f"{split}.jsonl", count)
    task = {"kind": "classification", "columns": {"text": "text", "label": "label"}}
    files = {"train": ["train.jsonl"], "validation": ["dev.jsonl"]}
    suite = {"tasks": {"animals": {**task, "data": files, "epochs": 1, "max_tokens": 32, "lrs": [1e-3]}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    before = (run / "report.md").read_text()
    assert "## Minimal pairs" not in before
    assert main(["evaluate", str(run), "--minimal_pairs", str(pairs)]) == 0
    report = (run / "report.md").read_text()
    assert "## Minimal pairs" in report
    assert "| **all** | 1 | 1 |" in report
    assert "## Tasks" not in report
    assert (run / "loss.png").stat().st_size > 5000
    arguments = ["--suite", str(tmp_path / "suite.yaml"), "--seeds", "2"]
    assert main(["evaluate", str(run), *arguments]) == 0
    report = (run / "report.md").read_text()
    assert "## Minimal pairs" in report
    assert "| animals | accuracy | validation |" in report
    assert "## Where the time went" in report
    pairs.write_text(2 * pairs.read_text())
    assert main(["evaluate", str(run), "--minimal_pairs", str(pairs)]) == 0  # the same name, but other pairs
    assert "| **all** | 1 | 2 |" in (run / "report.md").read_text()


def test_tasks_and_rates_are_chosen(run, tmp_path, no_plots, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    for split, count in (("train", 16), ("dev", 8)):
        write_rows(tmp_path / f"{split}.jsonl", count)
    (tmp_path / "suite.yaml").write_text(
        "lrs: [1.0e-3]\n"
        "defaults: {epochs: 1, max_tokens: 32, data: {train: [train.jsonl], validation: [dev.jsonl]}}\n"
        "tasks: {animals: {kind: classification}, beasts: {kind: classification}}\n"
    )
    measure = ["evaluate", str(run), "--suite", str(tmp_path / "suite.yaml"), "--seeds", "1"]
    assert main([*measure, "--tasks", "beast"]) == 2
    assert "did you mean beasts?" in capsys.readouterr().err
    assert main([*measure, "--tasks", "beasts", "--lrs", "2e-3", "4e-3"]) == 0
    cells = [json.loads(line) for line in (run / "evaluations/tasks/results.jsonl").read_text().splitlines()]
    assert [(cell["task"], cell["lr"]) for cell in cells] == [("beasts", 2e-3), ("beasts", 4e-3)]
    report = (run / "report.md").read_text()
    assert "| beasts | accuracy |" in report
    assert "animals" not in report


def test_a_run_that_went_on_is_measured_again(run, tmp_path, capsys):
    run, pairs = shutil.copytree(run, tmp_path / "run"), tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"good": "the cat sees a dog", "bad": "cat the a sees dog"}) + "\n")
    measure = ["evaluate", str(run), "--minimal_pairs", str(pairs)]
    assert main(measure) == 0
    first = json.loads((run / "evaluations/scores.json").read_text())
    settings = read_settings(PretrainSettings, run / "config.yaml")
    more = replace(settings, out=str(run), budget=Budget(steps=8))
    pretrain(more, resume=True, allow_change=["budget.steps"])
    assert "## Minimal pairs" not in (run / "report.md").read_text()  # those are the earlier model's
    capsys.readouterr()
    assert main(measure) == 0
    assert "everything is measured again" in capsys.readouterr().out
    second = json.loads((run / "evaluations/scores.json").read_text())
    assert second["weights"] != first["weights"]
    assert "## Minimal pairs" in (run / "report.md").read_text()
    pretrain(more, resume=True)  # there is nothing left to do, so the scores stay
    assert "## Minimal pairs" in (run / "report.md").read_text()


def test_what_cannot_be_read_is_told_before_anything_is_measured(run, tmp_path, capsys):
    run, pairs = shutil.copytree(run, tmp_path / "run"), tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"good": "the cat sees a dog", "bad": "cat the a sees dog"}) + "\n")
    assert main(["evaluate", str(run), "--minimal_pairs", str(pairs), "--suite", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    assert not (run / "evaluations").exists()
    with held(run / "evaluations"):
        assert main(["evaluate", str(run), "--minimal_pairs", str(pairs)]) == 2
    assert "evaluations" in capsys.readouterr().err


def test_cost_is_told(run):
    assert " at 3600 an hour" in (run / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/no/run", "--suite", "glue"], "/no/run holds no final/"),
        (["/no/run"], "minimal_pairs and suite are both empty"),
    ],
)
def test_bad_input_is_told(words, message, capsys):
    assert main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err
