"""A step whose loss or gradient jumps is left out and logged; others never are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_run import differences, make_settings, read_log

import encoderkit.pretrain.loop as loop
from encoderkit.kernels.loss import LossSum
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.settings import Budget, Checkpoints, Log, Optimizer
from encoderkit.pretrain.spikes import FEWEST, WINDOW, SpikeGuard

CPU = torch.device("cpu")
SPIKE = 70  # the step, counted from 1, whose loss is a hundred times as large


def test_a_hundredfold_is_a_spike_and_noise_is_not():
    draw = torch.Generator().manual_seed(0)
    guard = SpikeGuard(6.0, CPU)
    for step in range(1000):
        noise = torch.randn(2, generator=draw) * torch.tensor([0.05, 0.3])
        level = 10 * 0.998**step
        assert guard.add(level * noise[0].exp(), noise[1].exp()) == 0, step
    assert guard.spikes(1000) == []
    assert guard.add(torch.tensor(100 * level), torch.tensor(1.0)) == 1
    assert guard.add(torch.tensor(level), torch.tensor(100.0)) == 1  # the first does not hide the second
    assert guard.add(torch.tensor(level), torch.tensor(1.0)) == 0
    first, second = guard.spikes(1003)
    assert (first.step, second.step) == (1001, 1002)
    assert first.loss == pytest.approx(100 * level, rel=1e-5)
    assert first.limits[0] < 2 * level
    assert guard.spikes(1003) == []


def test_a_level_that_changes_for_good_is_taken_up():
    guard = SpikeGuard(6.0, CPU)
    draw = torch.Generator().manual_seed(0)
    flags = [
        float(guard.add(level * (0.1 * torch.randn((), generator=draw)).exp(), torch.tensor(1.0)))
        for level in [1.0] * WINDOW + [20.0] * WINDOW
    ]
    assert flags[WINDOW] == 1
    assert sum(flags) < 10
    assert flags[WINDOW + 10 :] == [0.0] * (WINDOW - 10)


def test_nothing_is_a_spike_at_first_or_when_the_guard_is_off():
    for sigmas, steps in ((6.0, FEWEST), (0.0, 3 * WINDOW)):
        guard = SpikeGuard(sigmas, CPU)
        for step in range(steps):
            assert guard.add(torch.tensor(100.0 ** (step % 7)), torch.tensor(1.0)) == 0


def spiking(monkeypatch, factor: float = 100.0, stop_at: int | None = None):
    """Multiply the loss of one step; gives the weights before and after it."""
    real, held = loop.train_step, {}

    class Louder(torch.nn.Module):
        def __init__(self, wrapped):
            super().__init__()
            self.wrapped = wrapped

        def forward(self, batch):
            tokens, pairs = self.wrapped(batch)
            return LossSum(tokens.loss * factor, *tokens[1:]), pairs

    def weights(job):
        return [parameter.detach().clone() for parameter in job.model.parameters()]

    def train_step(job, batches):
        if job.state.step == stop_at:
            raise KeyboardInterrupt
        if job.state.step != SPIKE - 1:
            return real(job, batches)
        held["before"], quiet = weights(job), job.wrapped
        job.wrapped = Louder(quiet)
        real(job, batches)
        job.wrapped, held["after"] = quiet, weights(job)

    monkeypatch.setattr(loop, "train_step", train_step)
    return held


def run_settings(store, out, **changes):
    defaults = {"checkpoints": Checkpoints(every_steps=60, every_minutes=None), "log": Log(every_steps=10)}
    return make_settings(store, out, budget=Budget(steps=76), batch_tokens=128, **{**defaults, **changes})


def moved(held) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(held["before"], held["after"], strict=True))


def test_a_loss_spike_is_skipped_logged_and_resumed_over_to_the_same_bits(store, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        held = spiking(patch)
        pretrain(run_settings(store, tmp_path / "whole"))
    assert not moved(held)
    (spike,) = [record for record in read_log(tmp_path / "whole") if record["kind"] == "spike"]
    assert (spike["step"], spike["rows"]) == (SPIKE, [2 * (SPIKE - 1), 2 * SPIKE - 1])
    assert spike["loss"] > 10 * spike["loss_limit"]
    assert spike["grad_norm"] > spike["grad_norm_limit"]
    # Goes on after step 60: without the statistics of the steps before, the spike would be applied.
    with monkeypatch.context() as patch:
        spiking(patch, stop_at=66)
        with pytest.raises(KeyboardInterrupt):
            pretrain(run_settings(store, tmp_path / "cut"))
    with monkeypatch.context() as patch:
        spiking(patch)
        pretrain(run_settings(store, tmp_path / "cut"), resume=True)
    assert differences(tmp_path / "whole", tmp_path / "cut") == []


def test_a_spike_is_told_however_far_apart_the_lines_of_the_log_are(store, tmp_path, monkeypatch):
    spiking(monkeypatch)
    log, steps = Log(every_steps=1000, validate_every_steps=1000), Budget(steps=SPIKE + WINDOW + 2)
    pretrain(replace(run_settings(store, tmp_path / "run", log=log), budget=steps))
    assert [record["step"] for record in read_log(tmp_path / "run") if record["kind"] == "spike"] == [SPIKE]


def test_without_the_guard_the_spike_moves_the_weights(store, tmp_path, monkeypatch):
    """Proof that it is the guard that skips."""
    held = spiking(monkeypatch)
    pretrain(run_settings(store, tmp_path / "run", optimizer=Optimizer(skip_sigmas=0.0)))
    assert moved(held)
    assert "spike" not in {record["kind"] for record in read_log(tmp_path / "run")}


def test_a_device_that_is_not_waited_for_skips_the_same_step(store, tmp_path, monkeypatch):
    build = loop.build_job
    monkeypatch.setattr(loop, "build_job", lambda *a, **k: replace(build(*a, **k), async_device=True))
    held = spiking(monkeypatch)
    pretrain(run_settings(store, tmp_path / "run"))
    assert not moved(held)
    assert [record["step"] for record in read_log(tmp_path / "run") if record["kind"] == "spike"] == [SPIKE]
