"""The quickstart's task and folder; the whole story is `make quickstart`."""

import json

import pytest

from encoderkit.finetune import docstring_task, quickstart
from encoderkit.kernels.errors import InputError

COUNTS = {"numpy": (90, 30), "pandas": (90, 30), "torch": (90, 5), "scipy": (20, 30), "rich": (90, 30)}


@pytest.fixture
def few_docstrings(monkeypatch):
    """COUNTS examples of each package in train and test modules, ten of a module."""

    def examples(*, split, packages):
        counts = {package: pair[split == "test"] for package, pair in COUNTS.items() if package in packages}
        return [(f"{p} {split} {i}", p, f"{p}/{split}{i // 10}.py") for p, n in counts.items() for i in range(n)]

    monkeypatch.setattr(docstring_task, "docstring_examples", examples)


def test_task_is_balanced_and_its_splits_share_no_module(few_docstrings, tmp_path):
    counts = docstring_task.write_task(tmp_path, num_packages=3)
    assert counts == {"train": 96, "validation": 48, "test": 90}  # torch has no test, scipy no train examples enough
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in counts
    }
    for split in rows.values():
        labels = [row["label"] for row in split]
        assert set(labels) == {"numpy", "pandas", "rich"}
        assert len({labels.count(label) for label in labels}) == 1
    modules = [{row["module"] for row in split} for split in rows.values()]
    assert sum(map(len, modules)) == len(set.union(*modules))


def test_too_few_packages_is_an_input_error(few_docstrings, tmp_path):
    with pytest.raises(InputError, match="0 packages with enough documentation"):
        docstring_task.write_task(tmp_path / "task", min_test=31)
    assert not (tmp_path / "task").exists()


def test_a_second_run_says_what_to_do_and_overwrite_removes_only_its_own(tmp_path, capsys):
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("years of work")
    assert quickstart.main(["--out", str(used), "--overwrite"]) == 2
    assert "not a quickstart folder" in capsys.readouterr().err
    assert (used / "thesis.txt").exists()
    (used / quickstart.MARKER).write_text("{}")
    assert quickstart.main(["--out", str(used)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (used / "thesis.txt").exists()
    quickstart._fresh_folder(quickstart.QuickstartSettings(out=str(used), overwrite=True))
    assert not (used / "thesis.txt").exists()


def test_report_shows_mean_and_spread(tmp_path):
    scores = {"pretrained": [0.5, 0.7], "untrained": [0.2, 0.2], "TF-IDF + logistic regression": [0.4]}
    quickstart._report(tmp_path, quickstart.QuickstartSettings(seeds=2), scores, "2 train", 0.125, 3.0)
    report = (tmp_path / "report.md").read_text()
    assert "| pretrained | 0.600 ± 0.141 |" in report
    assert "| TF-IDF + logistic regression | 0.400 |" in report
    assert (tmp_path / "scores.png").stat().st_size > 1000
