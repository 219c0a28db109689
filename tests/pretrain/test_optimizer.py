from typing import get_args

import pytest
import torch

from encoderkit.encoder.config import preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.pretrain.muon import polar_factor
from encoderkit.pretrain.optimizer import FAMILY, build_optimizers, set_learning_rates
from encoderkit.pretrain.settings import Optimizer, OptimizerName


def make_model() -> MaskedLM:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}
    return MaskedLM(preset("bert", "tiny", vocab_size=64, **sizes))


def test_every_parameter_is_trained_once():
    model = make_model()
    for name in FAMILY:
        optimizers = build_optimizers(model, Optimizer(name=name))
        trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        assert sorted(map(id, trained)) == sorted(map(id, model.parameters()))


def test_muon_gets_the_matrices_of_the_blocks_only():
    model = make_model()
    _, muon = build_optimizers(model, Optimizer(name="muon"))
    blocks = [p for p in model.encoder.blocks.parameters() if p.ndim == 2]
    assert sorted(id(p) for group in muon.param_groups for p in group["params"]) == sorted(id(p) for p in blocks)


def test_muon_takes_queries_keys_and_values_head_by_head():
    model = make_model()  # 4 heads of 8 in a width of 32
    _, muon = build_optimizers(model, Optimizer(name="muon"))
    block_of = {id(p): group["block"] for group in muon.param_groups for p in group["params"]}
    for block in model.encoder.blocks:
        assert block_of[id(block.attention.qkv.weight)] == (8, 32)
        others = block.attention.out, block.feed_forward.up, block.feed_forward.down
        assert all(block_of[id(module.weight)] is None for module in others)


def test_every_optimizer_has_a_constructor():
    assert set(FAMILY) == set(get_args(OptimizerName))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_multiplies_in_the_given_dtype(dtype):
    model = make_model()
    _, muon = build_optimizers(model, Optimizer(name="muon", muon_lr=1.0, weight_decay=0.0), dtype=dtype)
    weight = model.encoder.blocks[0].feed_forward.up.weight  # 48 x 32
    before, weight.grad = weight.detach().clone(), torch.randn(48, 32)
    # Rounded as in step(): one element that bf16 rounds the other way moves the factor by more than the tolerance.
    momentum = torch.zeros(48, 32).lerp(weight.grad, 1 - 0.95)
    direction = weight.grad.lerp(momentum, 0.95)
    muon.step()
    update = 0.2 * 48**0.5 * polar_factor(direction[None], dtype=dtype)[0].float()
    assert torch.allclose(weight, before - update, atol=1e-3)  # the other dtype is off by 0.03


@pytest.mark.parametrize("name", ["adamw", "stable_adamw", "lamb"])
def test_norms_and_biases_are_not_decayed(name):
    model = make_model()
    (optimizer,) = build_optimizers(model, Optimizer(name=name, weight_decay=0.1))
    for group in optimizer.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}


def test_learning_rates_are_shares_of_the_peak():
    optimizers = build_optimizers(make_model(), Optimizer(name="muon", lr=1e-3, muon_lr=4e-3))
    set_learning_rates(optimizers, 0.5)
    set_learning_rates(optimizers, 0.25)
    assert [o.param_groups[0]["lr"] for o in optimizers] == [0.25e-3, 1e-3]
