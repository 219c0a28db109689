"""The benchmark gives everyone the same work, and writes what it measured."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from encoderkit.encoder import precision
from encoderkit.encoder.native import from_native
from encoderkit.encoder.precision import has_bf16
from encoderkit.finetune import bench, bench_candidates
from encoderkit.finetune.bench_candidates import Size

SEQUENCES = [[2, 7, 8, 9, 3], [2, 5, 6, 3], [2, 11, 12, 13, 14, 15, 3]]


@pytest.fixture
def small(monkeypatch, tmp_path, no_plots):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the command sets it, and taken back afterwards
    monkeypatch.setattr(bench, "VOCAB_SIZE", 100)
    monkeypatch.setattr(bench, "MATRIX", 64)
    monkeypatch.setattr(bench, "ROUNDS", (2, 2))
    monkeypatch.setattr(bench, "LINES", 8)
    monkeypatch.setattr(bench, "LEARNED_LINES", 64)
    monkeypatch.setattr(bench, "ANSWERED_LINES", 64)
    monkeypatch.setattr(bench_candidates, "SIZES", (Size(2, 64, 512), Size(2, 128, 512)))
    words = [f"{a}{b}" for a in "abcdefgh" for b in "mnopqrst"]
    lines = [" ".join(words[i % 64] for i in range(k, k + 2 + k % 40)) for k in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return tmp_path


def test_every_case_is_timed_beside_transformers(small, capsys):
    arguments = ["--sources", str(small / "text.txt"), "--json", str(small / "new" / "figures.json")]
    assert bench.main(arguments) == 0
    written = json.loads((small / "new" / "figures.json").read_text())
    assert written["left_out"] == []
    cases = {(row["case"], row["precision"]) for row in written["rows"]}
    precisions = ["fp32", "bf16"] if has_bf16(torch.device("cpu")) else ["fp32"]
    assert {row["precision"] for row in written["rows"] if row["part"] != "batches"} == set(precisions)
    assert ("2x64, rows of 128", "fp32") in cases
    kinds = ("rows of", "lines up to")
    for size, kind, length, name in itertools.product(("2x64", "2x128"), kinds, (128, 512), precisions):
        assert (f"{size}, {kind} {length}", name) in cases
    assert ("2x128, inference", "fp32") in cases
    jobs = {(row["case"], row["precision"]) for row in written["rows"] if row["part"] == "jobs"}
    assert {("2x64, answers", "fp32"), ("2x64, fine-tuning", "fp32")} <= jobs
    for row in written["rows"]:
        assert row["rounds"] == 1
        assert all(speed > 0 for speed in row["tokens_per_second"].values())
        if "rows" in row["case"]:
            assert min(row["matrix_share"].values()) > 0
            assert set(row["tokens_per_second"]) == {
                f"{who} {kind}" for who in ("encoderkit", "transformers") for kind in ("bert", "modern")
            }
        if row["part"] in ("lines", "finetune"):
            assert {"transformers bert", "transformers modern"} < set(row["tokens_per_second"])
            assert {name for name in row["tokens_per_second"] if "sorted" in name} == {
                "transformers bert, sorted",
                "transformers modern, sorted",
            }
    shown = capsys.readouterr().out
    assert "figures: " in shown
    assert "left out" not in shown


def test_the_profile_tells_where_the_time_goes(small, monkeypatch, capsys):
    monkeypatch.setattr(bench_candidates, "SIZES", (Size(1, 256, 512),))
    monkeypatch.setattr(bench, "PROFILED", 1)  # what a profile holds takes a second to read
    arguments = ["--sources", str(small / "text.txt"), "--json", str(small / "figures.json"), "--precisions", "[fp32]"]
    assert bench.main([*arguments, "--cases", "[finetune]", "--profile", "true"]) == 0
    rows = json.loads((small / "figures.json").read_text())["rows"]
    assert len(rows) == 2
    for row in rows:
        assert row["microseconds_per_token"].keys() == row["tokens_per_second"].keys()
        for name, times in row["microseconds_per_token"].items():
            assert min(times["linear maps"], times["attention"], times["the rest"]) > 0, (name, times)
            assert (times["optimizer"] > 0) == ("fine-tuning" in row["case"])
    assert "microseconds a token" in capsys.readouterr().out


def fake_race(name: str, operations: float, clock: list[float], speed: float) -> bench._Race:
    """One candidate, whose work moves the clock on by operations / speed."""

    def work() -> None:
        clock[0] += operations / speed

    race = bench._Race("rows", name, "fp32")
    race.operations = operations
    race.enter("encoderkit bert", lambda: (work, 10))
    return race


@pytest.mark.parametrize(("speed", "left"), [(1e9, []), (0.1e9, [40]), (0.02e9, [4, 10, 40])])
def test_the_bench_ends_in_time_and_names_what_it_left_out(speed, left, monkeypatch, tmp_path, capsys):
    """A clock of our own, and a first guess of the pace that is five times too fast or too slow."""
    clock, sizes = [0.0], [1, 2, 4, 10, 40]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(precision, "fastest_route", lambda: None)  # is measured, by the clock that stands still here
    monkeypatch.setattr(bench, "_matrix_rate", lambda _: 0.1e9 / bench.FIRST_PACE)
    monkeypatch.setattr(bench._Text, "read", lambda sources, folder: SimpleNamespace(about=""))
    monkeypatch.setitem(
        bench.PARTS, "rows", lambda text, settings: [fake_race(str(n), n * 1e8, clock, speed) for n in sizes]
    )
    rows = bench.bench(bench.BenchSettings(minutes=1.5, cases=["rows"], json=str(tmp_path / "figures.json")))
    assert clock[0] <= 90
    assert json.loads((tmp_path / "figures.json").read_text())["left_out"] == [f"rows: {n}, fp32" for n in left]
    assert ("left out" in capsys.readouterr().out) == bool(left)
    assert all(row["rounds"] >= 2 for row in rows)


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_the_timed_batches_are_like_all(count, by_length):
    """Heavy-tailed lengths: within a quarter of the mean batch, in tokens and in padded tokens."""
    lengths = np.random.default_rng(0).lognormal(2.5, 1, 3000).astype(int) + 3
    lines = [[2, *[7] * (n - 2), 3] for n in lengths]
    text = bench._Text(lines, store=None, tokens=SimpleNamespace(sep=3), folder=None, texts=[])
    mean = np.minimum(lengths, 512).mean() * bench.LINES
    timed = text.batches(512, timed=count, by_length=by_length)
    assert len(timed) == count
    assert np.mean([sum(map(len, batch)) for batch in timed]) == pytest.approx(mean, rel=0.25)


@pytest.mark.parametrize("architecture", ["bert", "modern"])
def test_everyone_computes_the_same_loss(architecture):
    """Their weights in our model: the same sequences, packed and padded, give the same loss."""
    config = bench_candidates.config_of(architecture, Size(2, 64, 256), 200)
    torch.manual_seed(0)
    theirs = bench_candidates.their_masked_lm(config, "fp32")
    ours = bench_candidates.our_masked_lm(config, "fp32")
    weights = from_native(theirs.model.state_dict(), ours.model.state_dict(), config, head="masked_lm")
    ours.model.load_state_dict(weights, strict=True)
    targets = bench_candidates.targets_of(SEQUENCES)
    mine = ours.loss(ours.model, bench_candidates.packed(SEQUENCES, targets, config))
    given = bench_candidates.padded(SEQUENCES, targets)
    yours = theirs.loss(theirs.model, given)
    if architecture == "modern":
        assert len(theirs.model(**given).logits) == sum(map(len, targets))
    assert float(mine) == pytest.approx(float(yours), abs=2e-6)


def test_lines_end_in_one_sep_and_sorted_ones_need_little_padding(small):
    text = bench._Text.read([str(small / "text.txt")], small)
    for by_length in (False, True):
        for batch in text.batches(32, by_length=by_length):
            assert all(ids[0] == text.tokens.cls and ids.index(text.tokens.sep) == len(ids) - 1 for ids in batch)
            assert all(len(ids) <= 32 for ids in batch)
    for batch in text.batches(512, by_length=True):
        assert max(map(len, batch)) - min(map(len, batch)) <= 3
    for ids, targets in zip(batch, bench_candidates.targets_of(batch)):
        assert targets
        assert all(0 < position < len(ids) - 1 and ids[position] == target for position, target in targets.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "[row]"], "cases has 'row'; expected some of rows, lines, finetune, jobs, batches"),
        (["--precisions", "[fp16]"], "precisions has 'fp16'"),
        (["--precisions", "[bf16]"], "precisions has bf16, but this CPU has no bf16 instructions; leave it out"),
        (["--minute", "3"], "minutes"),
        (["--sources", "setup.cfg.txt"], "expected at least 1536; give more text"),
    ],
)
def test_bad_input_is_told(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.cfg.txt").write_text("a line\nanother\n")
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err
