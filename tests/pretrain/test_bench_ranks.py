"""One process beside two, in turns; what ends early is told."""

import json

import pytest
from tiny_run import make_settings

from encoderkit.pretrain import bench_ranks
from encoderkit.pretrain.bench_ranks import KINDS, Kind, main
from encoderkit.pretrain.command_line import dump_yaml


@pytest.fixture
def recipe(small_store, tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_yaml(make_settings(small_store, tmp_path / "run")))
    return tmp_path / "recipe.yaml"


def test_one_process_and_two_take_turns(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_ranks, "KINDS", (KINDS[0], Kind("two, FSDP2", 2, 2, sharded=True)))
    file = tmp_path / "new" / "figures.json"
    assert main(["--config", str(recipe), "--rounds", "2", "--steps", "1", "--json", str(file)]) == 0
    one, two = json.loads(file.read_text())["rows"]
    assert [row["batch_tokens"] for row in (one, two)] == [512, 1024]
    assert one["share"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    assert two["rounds"] == 2
    assert two["tokens_per_second"]["least"] > 0
    assert 0 < two["share"]["median"] < 2
    assert "two, FSDP2" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_process_that_ends_is_told(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_ranks, "KINDS", KINDS[:1])
    monkeypatch.setattr(bench_ranks, "_WORKER", "import sys; sys.exit('no room')")
    assert main(["--config", str(recipe), "--json", str(tmp_path / "figures.json")]) != 0
    assert "a process of 1 ended: no room" in capsys.readouterr().err


def test_a_store_that_is_not_there_is_refused(capsys):
    assert main(["--data.store", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
