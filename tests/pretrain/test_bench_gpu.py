"""The GPU benchmark's training part, as far as a CPU can run it: the loop's own step on a made-up store."""

import time

import pytest

from encoderkit.pretrain import bench_gpu
from encoderkit.pretrain.bench_gpu import CASES, Case, made_up_store, training_step
from encoderkit.pretrain.store import Store


@pytest.fixture
def store(tmp_path, monkeypatch):
    for name, value in {"VOCAB_SIZE": 200, "STEP_TOKENS": 128, "ROW_TOKENS": 64, "DOCUMENT_TOKENS": 300}.items():
        monkeypatch.setattr(bench_gpu, name, value)
    return made_up_store(tmp_path, documents=50)


def test_a_case_goes_through_the_loop(store):
    assert Store.open(store).vocab_size == 200
    assert Store.open(store).num_tokens == 49 * 300  # every word one token
    found = training_step(Case("modern", "tiny", 32, compiled=False, precision="fp32"), store, seconds=0)
    assert found["tokens_per_second"] > 0
    assert found["steps"] == bench_gpu.LOG_STEPS
    assert 0 < found["utilisation"] < 1
    assert found["graphs_after_warm_up"] == found["host_waits"] == 0


def test_cases_that_fail_or_come_too_late_are_named(monkeypatch, capsys):
    done = []

    def training_step(case, store):
        done.append(case)
        if len(done) == 2:
            raise RuntimeError("no room")
        monkeypatch.setattr(bench_gpu, "CASE_SECONDS", 1000)  # no time is left
        return {"model": str(case)}

    monkeypatch.setattr(bench_gpu, "training_step", training_step)
    monkeypatch.setattr(bench_gpu, "made_up_store", lambda folder: folder)
    monkeypatch.setattr(bench_gpu, "CASE_SECONDS", 0)
    monkeypatch.setattr(bench_gpu, "CASES", CASES[:3])
    found = bench_gpu._training(time.perf_counter() + 100)
    assert [row["model"] for row in found["rows"]] == [str(CASES[0])]
    assert set(found["others"].values()) == {"left out, no time"}
    assert "left out" in capsys.readouterr().out
    monkeypatch.setattr(bench_gpu, "CASE_SECONDS", 0)
    assert "no room" in bench_gpu._training(time.perf_counter() + 100)["others"][str(CASES[0])]
