import math

import pytest
import torch

from encoderkit.pretrain import muon
from encoderkit.pretrain.muon import Muon, polar_factor

SHAPES = [(64, 64), (96, 32), (32, 96)]


def matrix_of_singular_values(shape: tuple[int, int], values: torch.Tensor, seed: int):
    generator = torch.Generator().manual_seed(seed)
    rank = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))[0] for n in shape)
    return u, v, (u * values) @ v.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_polar_factor_keeps_directions_and_levels_singular_values(shape, dtype):
    values = torch.logspace(0, -3, min(shape), dtype=torch.float64)
    values = values / values.norm()
    known = values >= 1e-3
    u, v, matrix = matrix_of_singular_values(shape, values, seed=1)
    factor = polar_factor(1e4 * matrix.float()[None], dtype=dtype)[0].double()
    levelled = u.T @ factor @ v
    assert ((levelled.diagonal()[known] - 1).abs() < 0.2).all()
    off_diagonal = (levelled - levelled.diagonal().diag()).abs().max()
    assert off_diagonal < (0.1 if dtype == torch.bfloat16 else 1e-4)


def test_polar_factor_of_zero_is_zero():
    assert polar_factor(torch.zeros(2, 8, 16), dtype=torch.float32).abs().sum() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_first_update_is_the_orthogonal_factor_at_adamw_size(shape):
    """Liu et al. 2025, section 2.2: W <- W - lr (0.2 sqrt(max(A, B)) U V' + weight_decay W)."""
    values = torch.linspace(1, 0.3, min(shape), dtype=torch.float64)
    u, v, gradient = matrix_of_singular_values(shape, values, seed=2)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient.float()
    Muon([parameter], lr=0.01, weight_decay=0.5).step()
    update = (weight * (1 - 0.01 * 0.5) - parameter.detach()).double() / 0.01
    exact = 0.2 * math.sqrt(max(shape)) * u @ v.T
    assert (update - exact).norm() / exact.norm() < 0.2
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.15)


def test_momentum_is_nesterov():
    parameter, alone = (torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(2))
    gradients = [torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    optimizer = Muon([parameter], lr=1.0, momentum=0.9)
    for gradient in gradients:
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
    momentum = 0.9 * 0.1 * gradients[0] + 0.1 * gradients[1]
    alone.grad = 0.1 * gradients[1] + 0.9 * momentum
    Muon([alone], lr=1.0, momentum=0.0).step()
    assert torch.allclose(parameter.detach() - before, alone.detach(), atol=0.02)


def test_matrices_together_move_as_each_alone():
    shapes = [(16, 8), (8, 16), (16, 8), (16, 16)]
    together = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for i, parameter in enumerate(together):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    alone = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for one, of_many in zip(alone, together):
        one.grad = of_many.grad.clone()
        Muon([one], lr=0.1).step()
    Muon(together, lr=0.1).step()
    assert all(torch.allclose(a, b, atol=2e-3) and a.abs().sum() > 0 for a, b in zip(alone, together))


@pytest.mark.parametrize("block", [(8, 16), (24, 4), (4, 8)])
def test_blocks_of_a_matrix_move_as_matrices_of_their_own(block):
    whole = torch.nn.Parameter(torch.zeros(24, 16))
    whole.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    Muon([{"params": [whole], "block": block}], lr=0.1).step()
    for rows in torch.arange(24).split(block[0]):
        for columns in torch.arange(16).split(block[1]):
            part = torch.nn.Parameter(torch.zeros(block))
            part.grad = whole.grad[rows][:, columns].clone()
            Muon([part], lr=0.1).step()
            assert part.abs().sum() > 0
            assert torch.allclose(part, whole[rows][:, columns], atol=1e-5)


def test_a_matrix_without_gradient_stays():
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    Muon([parameter], lr=1.0, weight_decay=0.5).step()
    assert (parameter == 1).all()


def test_only_matrices_are_taken():
    with pytest.raises(ValueError, match=r"matrices; got a parameter of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.ones(3))], lr=1.0)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_ranks_share_the_matrices_out(count, monkeypatch):
    """Three ranks: what they gather is what one computes, also where the matrices do not divide."""
    matrices = torch.randn(count, 8, 8, generator=torch.Generator().manual_seed(0))
    parts = []
    for rank in range(3):
        world = {"is_available": True, "is_initialized": True, "get_world_size": 3, "get_rank": rank}
        for name, value in world.items():
            monkeypatch.setattr(muon.dist, name, lambda value=value: value)
        monkeypatch.setattr(muon.dist, "all_gather_into_tensor", lambda whole, part: parts.append(part))
        assert muon._share_out(torch.neg, matrices).shape == matrices.shape
    assert len({len(part) for part in parts}) == 1
    assert torch.equal(torch.cat(parts)[:count], -matrices)
