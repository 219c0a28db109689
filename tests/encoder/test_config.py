"""Configurations: which are refused, and that what is built from one has the published sizes, positions and weights."""

import math

import pytest
import torch

from encoderkit.encoder.config import RopeScaling, preset
from encoderkit.encoder.model import MaskedLM
from encoderkit.encoder.positions import POSITIONS
from encoderkit.kernels.errors import InputError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_layers": -1}, "model.num_layers is -1"),
        ({"hidden_dropout": 1.5}, "model.hidden_dropout is 1.5; expected 0 <= p < 1"),
        ({"hidden_size": 100, "num_heads": 3}, "hidden_size 100 over model.num_heads 3"),
        ({"depth": 3}, "unknown model field depth"),
        ({"window_tokens": 0}, "model.window_tokens is 0; expected at least 1"),
        ({"norm": "rmsnorm"}, "rmsnorm has no bias; leave norm out of model.biases"),
        ({"biases": ("norms",)}, "model.biases is .'norms'.; expected some of norm, attention"),
        ({"rope_scaling": RopeScaling(kind="ntk", factor=2.0)}, "model.positions is learned; expected rope"),
        ({"rope_scaling": RopeScaling(factor=0.5), "positions": "rope"}, "rope_scaling.factor is 0.5; expected at"),
        ({"positions": "relative"}, "model.positions is 'relative'; expected one of learned, sinusoidal"),
        ({"init_std": 0.0}, "model.init_std is 0.0; expected a positive number"),
        ({"token_types": -1}, "model.token_types is -1; expected at least 0"),
        ({"rope_base": 5000.0}, "model.rope_base is set, but model.positions is learned"),
        ({"positions": "rope", "local_rope_base": 5.0}, "model.local_rope_base is set, but no layer has a window"),
        ({"window_tokens": 8, "global_every": 1}, "model.window_tokens is 8, but each of the 2 layers sees the whole"),
        ({"window_tokens": 8, "num_layers": 1}, "model.window_tokens is 8, but each of the 1 layers sees the whole"),
        (
            {"positions": "rope", "global_every": 0, "rope_scaling": RopeScaling(factor=2.0)},
            "model.rope_scaling is set, but every layer has a window",
        ),
        ({"positions": "rope", "global_every": 0, "rope_base": 5.0}, "model.rope_base is set, but every layer has a"),
        ({"positions": "rope", "rope_base": math.nan}, "model.rope_base is nan; expected a positive number"),
    ],
)
def test_impossible_configurations_are_refused_by_name(overrides, message):
    with pytest.raises(InputError, match=message):
        preset("bert", "tiny", vocab_size=100, **overrides)


def test_local_attention_of_a_preset_can_be_changed():
    config = preset("modern", "tiny", vocab_size=100, num_layers=4, window_tokens=8, global_every=2)
    assert (config.local_attention.window_tokens, config.local_attention.rope_base) == (8, 10_000.0)
    assert [config.is_global(layer) for layer in range(4)] == [True, False, True, False]
    assert preset("modern", "tiny", vocab_size=100, global_every=1).local_attention is None


@pytest.mark.parametrize(
    ("architecture", "size", "vocab_size", "millions"),
    [
        # README's numbers. BERT with pooler and both heads, as in the release of Turc et al. 2019.
        ("bert", "tiny", 30522, 4.4),
        ("bert", "mini", 30522, 11.3),
        ("bert", "small", 30522, 29.1),
        ("bert", "medium", 30522, 41.7),
        ("bert", "base", 30522, 110.1),
        ("bert", "large", 30522, 336.2),  # Devlin et al. 2019 round to 340
        ("roberta", "tiny", 50265, 7.0),
        ("roberta", "mini", 50265, 16.3),
        ("roberta", "small", 50265, 38.9),
        ("roberta", "medium", 50265, 51.5),
        ("roberta", "base", 50265, 124.7),  # Liu et al. 2019: 125
        ("roberta", "large", 50265, 355.4),  # 355
        ("modern", "tiny", 50368, 16.9),  # Weller et al. 2025: 17
        ("modern", "mini", 50368, 32.1),  # 32
        ("modern", "small", 50368, 68.5),  # 68
        ("modern", "medium", 50368, 102.4),
        ("modern", "base", 50368, 149.7),  # Warner et al. 2024: 149
        ("modern", "large", 50368, 395.9),  # 395
    ],
)
def test_parameter_counts_are_the_published_ones(architecture, size, vocab_size, millions):
    config = preset(architecture, size, vocab_size=vocab_size, sentence_pairs=architecture == "bert")
    with torch.device("meta"):
        model = MaskedLM(config)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.06)


def test_sinusoidal_positions_are_those_of_the_paper():
    config = preset("bert", "tiny", vocab_size=100, positions="sinusoidal")
    table = POSITIONS["sinusoidal"](config).table
    assert table.shape == (512, 128)
    for position, i in ((0, 0), (3, 5), (511, 63)):
        angle = position / 10_000 ** (2 * i / 128)
        assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-4)
        assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-4)


def test_rope_scaling_stretches_the_global_layers_only():
    def turned(**fields):
        config = preset("modern", "tiny", vocab_size=100, max_positions=256, **fields)
        rope = POSITIONS["rope"](config)
        return (rope.rotation(span, torch.tensor([200])) for span in ("global", "local"))

    plain, local = turned()
    linear, same_local = turned(rope_scaling=RopeScaling(kind="linear", factor=4.0))
    ntk, _ = turned(rope_scaling=RopeScaling(kind="ntk", factor=4.0))
    at_50 = POSITIONS["rope"](preset("modern", "tiny", vocab_size=100)).rotation("global", torch.tensor([50]))
    assert torch.allclose(linear, at_50, atol=1e-5)
    assert torch.equal(local, same_local)
    assert torch.allclose(ntk[0, 0], plain[0, 0], atol=1e-5)  # the fastest pair is left alone
    assert torch.allclose(ntk[0, -1], linear[0, -1], atol=1e-5)  # the slowest is stretched by the whole factor


@pytest.mark.parametrize("init", ["normal", "truncated", "depth_scaled"])
def test_initial_weights_follow_their_scheme(init):
    torch.manual_seed(0)
    model = MaskedLM(preset("bert", "mini", vocab_size=2000, init=init, init_std=0.03))
    block = model.encoder.blocks[0]
    table, out = model.encoder.embeddings.tokens.weight, block.attention.out.weight
    std = 0.03 if init == "normal" else 0.03 * 0.8796  # of a normal cut at two standard deviations
    assert table.std().item() == pytest.approx(std, rel=0.01)
    assert (table.abs().max().item() <= 0.06) == (init != "normal")
    assert out.std().item() == pytest.approx(std / (8**0.5 if init == "depth_scaled" else 1), rel=0.02)
    assert block.feed_forward.up.weight.std().item() == pytest.approx(std, rel=0.02)
    assert not block.attention.qkv.bias.any()
