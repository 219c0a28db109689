"""Accumulation, workers and ranks change nothing; bad steps; a run folder holds what it promises."""

import dataclasses
import json
import os
import subprocess
import traceback
from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from tiny_run import MODEL, read_log, torchrun, write_recipe
from torch.utils._python_dispatch import TorchDispatchMode

from encoderkit.kernels import segments
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain import loop
from encoderkit.pretrain.batches import StepBatches
from encoderkit.pretrain.checkpoint import latest_checkpoint
from encoderkit.pretrain.job import build_job
from encoderkit.pretrain.loop import check_finite, pretrain, train_step
from encoderkit.pretrain.optimizer import keep_gradients
from encoderkit.pretrain.settings import (
    Budget,
    Data,
    Log,
    Masking,
    Optimizer,
    PretrainSettings,
    Validation,
)

LOSSES_20_STEPS = 1e-4  # other orders of summation, 20 steps
GRADIENTS_FP32, GRADIENTS_FP64 = 1e-6, 1e-12  # relative L2, one step
LOSSES_GOLDEN = 1e-4  # relative: on other CPUs, products are summed in another order
GOLDEN = Path(__file__).with_name("golden_losses.json")
EVERY_STEP = Log(every_steps=1)


def make_settings(store: Path, out: Path, **changes) -> PretrainSettings:
    """The batch of a step in one piece."""
    return tiny_run.make_settings(store, out, **{"micro_batch_tokens": 512, **changes})


def train_losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_log(out) if record["kind"] == "train"]


def equal_weights(a: Path, b: Path) -> bool:
    first, second = (load_file(out / "final" / "model.safetensors") for out in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole_run(small_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(make_settings(small_store, out, log=EVERY_STEP))
    return out


@pytest.mark.parametrize("micro_batch_tokens", [64, 128])
def test_micro_batches_change_only_the_order_of_summation(micro_batch_tokens, whole_run, small_store, tmp_path):
    settings = make_settings(small_store, tmp_path / "run", log=EVERY_STEP, micro_batch_tokens=micro_batch_tokens)
    pretrain(settings)
    for a, b in zip(train_losses(whole_run), train_losses(tmp_path / "run"), strict=True):
        assert abs(a - b) < LOSSES_20_STEPS


def test_workers_change_nothing(whole_run, small_store, tmp_path):
    data = Data(store=str(small_store), max_tokens=32, row_tokens=64, workers=2)
    pretrain(make_settings(small_store, tmp_path / "run", data=data))
    assert equal_weights(whole_run, tmp_path / "run")


def test_losses_are_the_golden_ones(whole_run):
    """A change that moves them says why, and writes them anew: UPDATE_GOLDEN=1 pytest tests/pretrain/test_loop.py."""
    losses = train_losses(whole_run)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(losses, indent=0) + "\n")
    assert len(losses) == 20
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=LOSSES_GOLDEN)


def test_two_processes_learn_what_one_learns(whole_run, small_store, tmp_path):
    settings = make_settings(small_store, tmp_path / "run", log=EVERY_STEP)
    recipe = write_recipe(settings, tmp_path / "recipe.yaml")
    command = torchrun("-m", "encoderkit.pretrain", "run", "--config", recipe)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["bits"]["world_size"] == 2
    for a, b in zip(train_losses(whole_run), train_losses(tmp_path / "run"), strict=True):
        assert abs(a - b) < LOSSES_20_STEPS
    tokens = [record["tokens"] for record in read_log(whole_run)]
    assert [record["tokens"] for record in read_log(tmp_path / "run")] == tokens


def step_gradients(settings: PretrainSettings, dtype: torch.dtype) -> torch.Tensor:
    """The gradients of the first step, all parameters end to end, in this process."""
    job = build_job(settings, resume=False)
    job.model.to(dtype)
    job.prepared = []  # no update: the gradients stay
    train_step(job, next(job.loader))
    job.run.close()
    return torch.cat([p.grad.flatten() for p in job.model.parameters()])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, GRADIENTS_FP32), (torch.float64, GRADIENTS_FP64)])
def test_one_step_of_uneven_micro_batches_has_the_gradients_of_one_batch(dtype, tolerance, small_store, tmp_path):
    """1x8 = 4x2 = 8x1."""
    changes = {"optimizer": Optimizer(clip=0.0)}
    expected, *others = (
        step_gradients(make_settings(small_store, tmp_path / str(micro), micro_batch_tokens=micro, **changes), dtype)
        for micro in (512, 128, 64)
    )
    for gradient in others:
        assert (gradient - expected).norm() < tolerance * expected.norm()


def test_not_finite_gradient_stops_before_any_update(small_store, tmp_path, monkeypatch):
    import encoderkit.pretrain.loop as loop

    settings = make_settings(small_store, tmp_path / "run")
    real = loop.train_step
    weights = {}

    def poisoned(job, batches):
        if job.state.step == 8:
            with torch.no_grad():
                job.model.head.dense.weight[0, 0] = float("nan")
            weights["before"] = job.model.encoder.embeddings.tokens.weight.clone()
            weights["model"] = job.model
        return real(job, batches)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match="step 9, rows 64 to 71"):
        pretrain(settings)
    assert torch.equal(weights["before"], weights["model"].encoder.embeddings.tokens.weight)
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").step == 6


def test_a_device_that_is_not_waited_for_skips_a_bad_step_and_tells_it_at_the_next_line(
    small_store, tmp_path, monkeypatch
):
    import encoderkit.pretrain.loop as loop

    real_build, real_step, held = loop.build_job, loop.train_step, {}

    def build(*arguments, **options):
        return dataclasses.replace(real_build(*arguments, **options), async_device=True)

    def state_of(job):
        state = [value for o in job.optimizers for values in o.state.values() for value in values.values()]
        return [tensor.clone() for tensor in (*job.model.parameters(), *state)]

    def poisoned(job, batches):
        hook = None
        if job.state.step == 5:
            held["before"] = state_of(job)
            hook = job.model.head.dense.weight.register_hook(lambda grad: grad * float("nan"))
        real_step(job, batches)
        if hook is not None:
            hook.remove()
            held["after"] = state_of(job)

    monkeypatch.setattr(loop, "build_job", build)
    monkeypatch.setattr(loop, "train_step", poisoned)
    log, ramp = Log(every_steps=8, validate_every_steps=8), [(0.3, 64)]
    with pytest.raises(FloatingPointError, match="step 6, rows 5 to 5"):  # told before the rows of a step change
        pretrain(make_settings(small_store, tmp_path / "run", log=log, batch_ramp=ramp))
    assert all(torch.equal(a, b) for a, b in zip(held["before"], held["after"], strict=True))
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is None  # step 6 was due and was not written


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, copies to it from memory that is not pinned included.

    Left out is what reads the lengths of sequences, which stay on the CPU, and what a GPU computes in another way.
    """

    DISPATCHED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "aten::equal")
    METHODS = ("tolist", "cpu", "numpy")  # these are not dispatched where the tensor is on the CPU already
    ON_CPU = ("from_lengths", "to_batch", "plan", "_table", "rounded", "forward_flops", "_hits")  # functions
    ON_DEVICE = (
        "_get_total_norm",
        "_clip_grads_with_norm_",
        "_fused_adam",
    )  # of torch: what is there already

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = []
        for name in self.METHODS:
            real = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda t, *a, n=name, r=real, **k: self.note(n) or r(t, *a, **k))
        self.to, self.pinned = torch.Tensor.to, []
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *a, **k: self.copy(tensor, *a, **k))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pinned.append(tensor) or tensor)
        monkeypatch.setattr(segments, "copies_behind", lambda device: True)
        real_batches = StepBatches.to_batches
        monkeypatch.setattr(StepBatches, "to_batches", lambda *a: [b.pin_memory() for b in real_batches(*a)])

    def copy(self, tensor, *arguments, **options):
        """Tensor.to."""
        goes = isinstance(arguments[0] if arguments else options.get("device"), (str, torch.device))
        waits = not options.get("non_blocking") or not any(tensor is other for other in self.pinned)
        if goes and waits:
            self.note("to")
        return self.to(tensor, *arguments, **options)

    def note(self, name):
        if not {frame.name for frame in traceback.extract_stack()}.intersection(self.ON_CPU + self.ON_DEVICE):
            self.found.append(name)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in func.name() for name in self.DISPATCHED):
            self.note(func.name())
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_the_device_at_log_lines_only(small_store, tmp_path, monkeypatch):
    settings = make_settings(small_store, tmp_path / "run", micro_batch_tokens=256)
    job = dataclasses.replace(build_job(settings, resume=False), async_device=True)
    with Waits(monkeypatch) as waits:
        for _ in range(3):
            given = next(job.loader)
            train_step(job, given)
            job.log.add_step(given, job.dataset.counts(job.state.step))
            job.state.step += 1
        assert waits.found == []
        check_finite(job)
        assert waits.found == ["tolist"]
        job.log.take()
        assert waits.found == ["tolist", "tolist"]
        monkeypatch.setattr(segments, "copies_behind", lambda device: False)
        train_step(job, next(job.loader))
        assert set(waits.found[2:]) == {"to"}
    job.run.close()


def test_gradients_that_stay_in_place_change_no_bit(small_store, tmp_path):
    """As CUDA graphs need them: every micro-batch of every step adds to the same tensors."""
    weights = []
    for cuda_graphs in (False, True):
        settings = make_settings(small_store, tmp_path / str(cuda_graphs), micro_batch_tokens=128)
        job = build_job(settings, resume=False, in_memory=True)
        job.settings = dataclasses.replace(settings, compile=True, cuda_graphs=cuda_graphs)  # refused on a CPU
        if cuda_graphs:
            keep_gradients(job.model)
            places = [parameter.grad.data_ptr() for parameter in job.model.parameters()]
        for _ in range(3):
            train_step(job, next(job.loader))
            job.state.step += 1
        weights.append(torch.cat([parameter.detach().flatten() for parameter in job.model.parameters()]))
    assert [parameter.grad.data_ptr() for parameter in job.model.parameters()] == places
    assert torch.equal(*weights)


def test_run_folder_holds_what_it_promises(whole_run):
    assert {"config.yaml", "run.json", "log.jsonl", "checkpoints", "final", "report.md"} <= {
        p.name for p in whole_run.iterdir()
    }
    kinds = [record["kind"] for record in read_log(whole_run)]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert kinds.count("validation") == 10
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from encoderkit.encoder import TokenBatch, load

    tokenizer = AutoTokenizer.from_pretrained(whole_run / "final")
    native = AutoModelForMaskedLM.from_pretrained(whole_run / "final").eval()
    ids = tokenizer("hello [MASK] world")["input_ids"]
    with torch.no_grad():
        ours = load(whole_run / "final").logits(TokenBatch.from_sequences([ids], targets=[dict(enumerate(ids))]))
        assert (native(torch.tensor([ids])).logits[0] - ours).abs().max() < 2e-6


def test_training_lowers_the_loss(small_store, tmp_path):
    settings = make_settings(small_store, tmp_path / "run", budget=Budget(steps=100), masking=Masking(rate=0.2))
    pretrain(settings)
    losses = train_losses(tmp_path / "run")
    assert losses[-1] < losses[0] - 0.4


def test_budget_in_minutes_is_spent(small_store, tmp_path):
    pretrain(make_settings(small_store, tmp_path / "run", budget=Budget(minutes=0.02)))
    end = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert end["kind"] == "end"
    assert end["time"]["elapsed"] >= 1.2
    assert end["step"] > 1


def test_tensorboard_gets_the_numbers(small_store, tmp_path):
    log = Log(every_steps=4, trackers=["tensorboard"])
    pretrain(make_settings(small_store, tmp_path / "run", budget=Budget(steps=4), log=log))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = next((tmp_path / "run").rglob("events.out.tfevents.*"))
    accumulator = EventAccumulator(str(events.parent)).Reload()
    assert accumulator.Scalars("train/loss")[0].value == pytest.approx(train_losses(tmp_path / "run")[0], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": Budget()}, "budget is empty"),
        ({"attention": "xformers"}, "xformers"),
        ({"compile": True, "cuda_graphs": True}, "cuda_graphs is true, but there is no GPU here; leave it out"),
        ({"cuda_graphs": True}, "cuda_graphs is true, which records compiled blocks; set compile true too"),
        ({"model": dataclasses.replace(MODEL, max_positions=16)}, "data.max_tokens has sequences of 32 tokens"),
        ({"model": dataclasses.replace(MODEL, max_positions=64)}, "the fixed probe has sequences of 128 tokens"),
        ({"log": Log(trackers=["tensorbord"])}, "log.trackers has 'tensorbord'"),
        ({"data": Data(store="nowhere", max_tokens=32, row_tokens=64)}, "nowhere"),
    ],
)
def test_what_cannot_be_served_is_told_before_anything_is_written(changes, message, small_store, tmp_path):
    with pytest.raises(InputError, match=message):
        pretrain(make_settings(small_store, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_minimal_pairs_are_scored_whenever_the_probe_is(small_store, tmp_path):
    pairs = [{"good": f"the {word} cat sees", "bad": f"the {word} cat see"} for word in ("red", "blue", "old", "young")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    validation = Validation(minimal_pairs=str(tmp_path / "pairs.jsonl"), num_pairs=3)
    log = Log(every_steps=4, validate_every_steps=2)
    changes = {"validation": validation, "log": log, "budget": Budget(steps=4)}
    pretrain(make_settings(small_store, tmp_path / "run", **changes))
    pretrain(make_settings(small_store, tmp_path / "without", log=log, budget=Budget(steps=4)))
    assert equal_weights(tmp_path / "run", tmp_path / "without")
    found = [record for record in read_log(tmp_path / "run") if record["kind"] == "validation"]
    assert [record["step"] for record in found] == [2, 4]
    assert {record["minimal_pairs_original"] * 3 % 1 for record in found} == {0.0}  # of the sample
    assert "minimal pairs within word, a sample, step 4" in (tmp_path / "run" / "report.md").read_text()
    (tmp_path / "pairs.jsonl").write_text('{"good": "a"}\n')
    with pytest.raises(InputError, match=r"pairs.jsonl: line 1: no columns good and bad"):
        pretrain(make_settings(small_store, tmp_path / "new", **changes))
    assert not (tmp_path / "new").exists()


def test_minimal_pairs_are_scored_in_the_precision_of_the_run(small_store, tmp_path, monkeypatch):
    from encoderkit.encoder import layers

    (tmp_path / "pairs.jsonl").write_text('{"good": "the red cat sees", "bad": "the red cat see"}')
    validation, kinds, attend = Validation(minimal_pairs=str(tmp_path / "pairs.jsonl")), set(), layers.attend

    def watched(q, *arguments, **options):
        kinds.add(q.dtype)
        return attend(q, *arguments, **options)

    monkeypatch.setattr("encoderkit.encoder.precision.has_bf16", lambda device: True)
    monkeypatch.setattr("encoderkit.pretrain.step_log.peak_flops", lambda *_: None)  # slow in bf16
    job = build_job(make_settings(small_store, tmp_path / "run", precision="bf16", validation=validation), resume=False)
    monkeypatch.setattr(layers, "attend", watched)
    loop._minimal_pairs(job)
    job.close()
    assert kinds == {torch.bfloat16}
