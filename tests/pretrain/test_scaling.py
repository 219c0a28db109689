"""What many GPUs cost: the arithmetic by hand, its limits, and the page that is made of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.__main__ import main
from encoderkit.pretrain.scaling import Call, Parts, cost, page
from encoderkit.pretrain.scaling_settings import Network, ScalingSettings
from encoderkit.pretrain.settings import Model

PARTS = Parts(
    parameters=100_000_000,
    block_parameters=80_000_000,
    matrix_parameters=75_000_000,
    num_blocks=10,
    flops_per_token=6e8,
    tokens_per_second=100_000.0,
    origin="given",
)
SETTINGS = ScalingSettings(
    batch_tokens=1_024_000, micro_batch_tokens=32_000, network=Network(inside=100.0, between=50.0, latency=0.0)
)


def test_a_replicated_step_is_an_all_reduce_of_the_gradients():
    of_step = cost(SETTINGS, PARTS, 8)
    assert of_step.compute == pytest.approx(1_024_000 / 8 / 100_000)
    assert of_step.communication == pytest.approx(2 * 7 / 8 * 4e8 / 100e9)  # one server
    assert cost(SETTINGS, PARTS, 16).communication == pytest.approx(2 * 15 / 16 * 4e8 / 50e9)
    assert of_step.bytes == 2 * 4e8
    assert of_step.state_bytes == 16e8
    assert of_step.step == (of_step.compute, of_step.compute + of_step.communication)
    halved = replace(SETTINGS, gradient_reduction="bf16")
    assert cost(halved, PARTS, 8).communication == pytest.approx(of_step.communication / 2)


def test_a_sharded_step_gathers_in_every_micro_batch():
    of_step = cost(replace(SETTINGS, parallel="fsdp2"), PARTS, 8)  # four micro-batches of each rank
    assert of_step.communication == pytest.approx(4 * 7 / 8 * 4 * (100e6 + 80e6 + 100e6) / 100e9)
    assert of_step.state_bytes == 2e8


def test_muon_keeps_one_moment_and_sends_its_updates():
    of_step = cost(replace(SETTINGS, optimizer="muon"), PARTS, 8)
    assert of_step.state_bytes == 16e8 - 4 * 75e6
    more = of_step.communication - cost(SETTINGS, PARTS, 8).communication
    assert more == pytest.approx(7 / 8 * 2 * 75e6 / 100e9)


def test_no_more_is_hidden_than_the_last_backward_pass_lasts():
    slow = replace(SETTINGS, network=Network(inside=0.1, between=0.1))
    of_step = cost(slow, PARTS, 8)
    assert of_step.hidden == pytest.approx(2 / 3 * of_step.compute / 4)
    worst, best = of_step.efficiency
    assert worst < best < 1


def test_one_gpu_communicates_nothing():
    assert cost(SETTINGS, PARTS, 1).communication == 0
    assert Call(1e9, passes=2).seconds(1, Network()) == 0


def test_a_model_is_counted_and_its_speed_given_or_assumed():
    settings = ScalingSettings(model=Model(preset="bert", size="base"), vocab_size=30_522)
    parts = Parts.of(settings)
    assert parts.parameters == pytest.approx(110e6, rel=0.02)
    assert parts.flops_per_token == pytest.approx(6 * parts.block_parameters, rel=0.25)  # Kaplan et al. 2020
    assert parts.tokens_per_second == pytest.approx(0.22 * 989e12 / parts.flops_per_token)
    assert parts.origin.startswith("assumed")
    assert Parts.of(replace(settings, tokens_per_second=5.0)).origin == "given"


def test_flops_of_a_token_do_not_depend_on_how_many_sequences_fit():
    model = Model(preset="modern", size="base", max_positions=20_000)
    settings = ScalingSettings(model=model, max_tokens=20_000, micro_batch_tokens=20_000)
    for micro in (32_768, 40_000):
        found = Parts.of(replace(settings, micro_batch_tokens=micro))
        assert found.flops_per_token == pytest.approx(Parts.of(settings).flops_per_token)


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="expected at least a sequence"):
        cost(SETTINGS, PARTS, 4096)
    with pytest.raises(InputError, match=r"gpu is 'abacus'; expected NVIDIA H200, .* or tokens_per_second"):
        Parts.of(ScalingSettings(gpu="abacus"))
    with pytest.raises(InputError, match=r"max_tokens is 1024, but model.max_positions is 512"):
        Parts.of(ScalingSettings(model=Model(preset="bert"), max_tokens=1024))
    with pytest.raises(InputError, match="name the preset"):
        ScalingSettings(model=Model(init_from="bert-base-uncased"))


def test_command_says_where_each_input_comes_from(capsys):
    assert main(["scaling", "--model.size", "tiny", "--gpus", "8", "16", "--network.between", "10"]) == 0
    shown = capsys.readouterr().out
    assert [word for word in ("counted", "assumed", "given", "GPU-hours") if word not in shown] == []


def test_page_is_what_its_command_prints():
    """python -m encoderkit.pretrain.scaling > pretrain/recipes/scaling.md"""
    path = Path(__file__).resolve().parents[2] / "pretrain" / "recipes" / "scaling.md"
    assert path.read_text() == page()


def test_tokens_per_second_come_from_the_figures_of_the_gpu_benchmark(tmp_path):
    file = tmp_path / "bench_gpu.json"
    rows = [{"model": "modern base", "length": 512, "tokens_per_second": speed} for speed in (300_000, 400_000)]
    file.write_text(json.dumps({"gpu": "NVIDIA H200", "date": "2026-11-29", "training": {"rows": rows}}))
    parts = Parts.of(ScalingSettings(measured=str(file)))
    assert (parts.tokens_per_second, parts.origin) == (400_000.0, "measured on NVIDIA H200, 2026-11-29")
    with pytest.raises(InputError, match="has no modern base at 1024 tokens; it has modern base at 512"):
        Parts.of(ScalingSettings(measured=str(file), max_tokens=1024))
    file.write_text('{"training": {"failed": "no room"}}')
    with pytest.raises(InputError, match="expected what make bench-gpu writes"):
        Parts.of(ScalingSettings(measured=str(file)))
    with pytest.raises(InputError, match="both set"):
        ScalingSettings(measured=str(file), tokens_per_second=1e5)
    with pytest.raises(InputError, match=r"leave out model.num_layers"):
        Parts.of(ScalingSettings(measured=str(file), model=Model(num_layers=3)))
