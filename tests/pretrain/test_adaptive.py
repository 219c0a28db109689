"""StableAdamW and LAMB follow their papers, and obey found_inf as torch's fused optimizers do."""

import copy

import pytest
import torch
from tiny_run import differences, make_settings, stop_before

from encoderkit.pretrain.adaptive import Lamb, StableAdamW
from encoderkit.pretrain.loop import pretrain
from encoderkit.pretrain.optimizer_state import flatten_optimizer, unflatten_optimizer
from encoderkit.pretrain.settings import Optimizer

ROUNDING = {"atol": 2e-6, "rtol": 1e-5}  # fp32 against float64
LR, BETAS, EPS, DECAY = 0.1, (0.9, 0.98), 1e-6, 0.5
KINDS = pytest.mark.parametrize("kind", [StableAdamW, Lamb])


def gradients(count: int) -> list[torch.Tensor]:
    """The last is a hundred times as large."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 4, generator=generator) * (100 if i == count - 1 else 1) for i in range(count)]


def begin(shape=(6, 4)) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def make(kind, parameters):
    return kind(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


def train(optimizer, parameter, given) -> None:
    for gradient in given:
        parameter.grad = gradient.clone()
        optimizer.step()


def written_out(kind, w, given):
    """The papers' algorithms 2, a matrix at a time in float64."""
    w, mean, square = w.double(), torch.zeros(w.shape).double(), torch.zeros(w.shape).double()
    for t, gradient in enumerate(given, 1):
        g = gradient.double()
        mean, square = BETAS[0] * mean + (1 - BETAS[0]) * g, BETAS[1] * square + (1 - BETAS[1]) * g**2
        m, v = mean / (1 - BETAS[0] ** t), square / (1 - BETAS[1] ** t)
        u = m / (v.sqrt() + EPS)
        if kind is StableAdamW:
            rms = (g**2 / v.clamp(min=EPS**2)).mean().sqrt()
            w = w - LR / max(1.0, float(rms)) * (u + DECAY * w)
        else:
            u = u + DECAY * w
            w = w - LR * w.norm() / u.norm() * u
    return w


@KINDS
def test_updates_are_those_of_the_paper(kind):
    parameter, given = begin(), gradients(4)
    expected = written_out(kind, parameter.detach(), given)
    train(make(kind, [parameter]), parameter, given)
    assert torch.allclose(parameter.detach().double(), expected, **ROUNDING)


def test_stable_adamw_is_adamw_where_gradients_are_as_expected():
    ours, theirs = begin(), begin()
    given = [torch.ones(6, 4)] * 3
    train(make(StableAdamW, [ours]), ours, given)
    train(torch.optim.AdamW([theirs], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY), theirs, given)
    assert torch.allclose(ours, theirs, **ROUNDING)


def test_stable_adamw_is_slower_at_a_surprise():
    moved, given = [], gradients(20)
    for kind in (StableAdamW, torch.optim.AdamW):
        parameter = begin()
        optimizer = make(kind, [parameter])
        train(optimizer, parameter, given[:-1])
        before = parameter.detach().clone()
        train(optimizer, parameter, given[-1:])
        moved.append(float((parameter.detach() - before).norm()))
    assert moved[0] < moved[1] / 2


def test_lamb_moves_a_matrix_by_a_share_of_its_length_and_a_bias_as_adam():
    matrix, bias, zero = begin(), begin((4,)), torch.nn.Parameter(torch.zeros(6, 4))
    before = matrix.detach().clone(), bias.detach().clone()
    for parameter in (matrix, bias, zero):
        parameter.grad = torch.ones_like(parameter)
    Lamb([matrix, bias, zero], lr=LR).step()
    assert float((matrix.detach() - before[0]).norm()) == pytest.approx(LR * float(before[0].norm()), rel=1e-4)
    assert torch.allclose(bias, before[1] - LR, atol=1e-4)
    assert torch.allclose(zero, torch.full_like(zero, -LR), atol=1e-4)


@KINDS
@pytest.mark.parametrize("bad_at", [0, 2])
def test_a_step_that_is_left_out_changes_nothing_and_is_not_counted(kind, bad_at):
    parameter, alone, given = begin(), begin(), gradients(4)
    optimizer = make(kind, [parameter])
    for i, gradient in enumerate(given):
        if i == bad_at:
            before = parameter.detach().clone()
            optimizer.found_inf = torch.ones(())
            train(optimizer, parameter, [torch.full((6, 4), float("nan"))])
            assert torch.equal(parameter, before)
        optimizer.found_inf = torch.zeros(())
        train(optimizer, parameter, [gradient])
    train(make(kind, [alone]), alone, given)
    assert torch.equal(parameter, alone)


@KINDS
def test_a_parameter_without_gradient_stays(kind):
    parameter = begin()
    before = parameter.detach().clone()
    make(kind, [parameter]).step()
    assert torch.equal(parameter, before)


@KINDS
def test_state_comes_back_bit_for_bit(kind):
    parameter, given = begin(), gradients(4)
    optimizer = make(kind, [parameter])
    train(optimizer, parameter, given[:2])
    other = torch.nn.Parameter(parameter.detach().clone())
    again = make(kind, [other])
    again.load_state_dict(unflatten_optimizer(*flatten_optimizer(copy.deepcopy(optimizer.state_dict()))))
    for one, its in ((optimizer, parameter), (again, other)):
        train(one, its, given[2:])
    assert torch.equal(parameter, other)


@pytest.mark.parametrize("name", ["stable_adamw", "lamb"])
def test_a_resumed_run_equals_the_uninterrupted_one(name, small_store, tmp_path):
    settings = {out: make_settings(small_store, tmp_path / out, optimizer=Optimizer(name=name)) for out in "ab"}
    pretrain(settings["a"])
    with stop_before(14):
        pretrain(settings["b"])
    pretrain(settings["b"], resume=True)
    assert differences(tmp_path / "a", tmp_path / "b") == []
