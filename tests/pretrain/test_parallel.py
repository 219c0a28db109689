"""Two ranks on a CPU, replicated and sharded, learn what one process learns; checkpoints go from any to any."""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
import torch
from tiny_run import MODEL, same_bits, stop_before

from encoderkit.pretrain.checkpoint import Checkpoint, latest_checkpoint
from encoderkit.pretrain.command_line import dump_yaml
from encoderkit.pretrain.job import build_job
from encoderkit.pretrain.loop import pretrain, train_step
from encoderkit.pretrain.run_folder import read_log
from encoderkit.pretrain.settings import (
    Checkpoints,
    Optimizer,
    PretrainSettings,
)

LOSSES_20_STEPS = 1e-4  # other orders of summation, 20 steps
GRADIENTS_FP32, GRADIENTS_FP64 = 1e-6, 1e-12  # relative L2, one step
GRADIENTS_BF16 = 5e-3  # relative L2: a sum of two roundings to 8 bits; 2e-3 here
WEIGHTS_FP32 = 1e-6  # one update of Muon, other matrices in one product

RECIPES = Path(__file__).resolve().parents[2] / "pretrain" / "recipes"


def make_settings(store: Path, out: Path, **changes) -> PretrainSettings:
    defaults = {
        "model": dataclasses.replace(
            MODEL,
            global_every=1,  # so that the last block is computed at the read positions only
            token_vectors="cooccurrence",  # made by one rank for both
        ),
        "micro_batch_tokens": 128,  # two micro-batches of each of two ranks
        "checkpoints": Checkpoints(every_steps=6, every_minutes=None, keep=9),
    }
    return tiny_run.make_settings(store, out, **{**defaults, **changes})


def launch(kind: str, arguments: list[str], **environment: str) -> None:
    """Two processes by accelerate launch with recipes/accelerate/KIND.yaml."""
    config = str(RECIPES / "accelerate" / f"{kind}.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


STEPS = """
import os, sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._pytree import tree_leaves

import encoderkit.pretrain.job as job_module
import encoderkit.pretrain.machine as machine_module
from encoderkit.encoder.model import Encoder
from encoderkit.pretrain.adaptive import Lamb, StableAdamW
from encoderkit.pretrain.command_line import read_settings
from encoderkit.pretrain.loop import train_step
from encoderkit.pretrain.muon import Muon
from encoderkit.pretrain.parallel import gather_whole
from encoderkit.pretrain.settings import PretrainSettings


class OnGpus(Accelerator):  # Accelerate as it is on GPUs, where it takes note of FSDP
    def __init__(self, **arguments):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
        super().__init__(**arguments)
        if os.environ["ACCELERATE_USE_FSDP"] == "true":
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
            self.state.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            assert self.is_fsdp2


def gradients(file, sharded):
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()
    dtype = torch.float64 if file.stem == "fp64" else torch.float32
    job_module.spread = lambda accelerator, objective, plugin, **how: spread(
        accelerator, objective.to(dtype), plugin, **how
    )
    job = job_module.build_job(read_settings(PretrainSettings, file), resume=False, in_memory=True)
    job.prepared = []  # no update: the gradients stay
    train_step(job, next(job.loader))
    return torch.cat([gather_whole(p.grad, keep=True).flatten() for p in job.model.parameters()])


def changed_by_a_bad_step(file):
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    job = job_module.build_job(read_settings(PretrainSettings, file), resume=False, in_memory=True)
    job.async_device = True  # as on GPUs: the device decides
    backward, changes = job.accelerator.backward, []
    for factor in (1.0, float("nan") if dist.get_rank() else 1.0):  # the second step is bad on one rank
        before = everything(job)
        job.accelerator.backward = lambda loss: backward(loss * factor)
        train_step(job, next(job.loader))
        after = everything(job)  # the first step makes the optimizers' state
        changes.append(len(before) != len(after) or not all(map(torch.equal, before, after)))
    return torch.tensor(changes)


def everything(job):
    parts = [job.model.state_dict(), *(optimizer.state_dict()["state"] for optimizer in job.optimizers)]
    return [leaf.clone() for leaf in tree_leaves(gather_whole(parts, keep=True)) if isinstance(leaf, torch.Tensor)]


def updated(make, shape, count, sharded):
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for _ in range(count):
        pair = torch.randn(2, *shape, generator=generator)
        if sharded:
            pair = [distribute_tensor(part, mesh, [Shard(0)]) for part in pair]
        parameters.append(torch.nn.Parameter(pair[0]))
        parameters[-1].grad = pair[1]
    optimizer = make(parameters, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.step()
    return torch.stack(gather_whole([p.data for p in parameters], keep=True))


machine_module.Accelerator, spread = OnGpus, job_module.spread
compile_blocks = Encoder.compile_blocks
Encoder.compile_blocks = lambda encoder, **options: compile_blocks(encoder, backend="eager", **options)
folder, found = Path(sys.argv[1]), {}
for file in sorted(folder.glob("*.yaml")):
    for name, sharded in (("replicated", False), ("sharded", True)):
        found[f"{file.stem} {name}"] = gradients(file, sharded)
found["bad step"] = changed_by_a_bad_step(folder / "fp32.yaml")
mesh = init_device_mesh("cpu", (2,))
for shape, count, block in (((16, 8), 2, None), ((7, 8), 3, None), ((1, 8), 1, None), ((24, 16), 1, (8, 16))):
    makers = {"muon": partial(Muon, block=block), "stable_adamw": StableAdamW, "lamb": Lamb}
    for name, make in makers.items():
        whole, rows = (updated(make, shape, count, sharded) for sharded in (False, True))
        found[f"{name} {shape} {count}"] = rows - whole
if PartialState().is_main_process:
    torch.save(found, folder / "found.pt")
PartialState().wait_for_everyone()
sys.stdout.flush()
os._exit(0)
"""

CASES = {
    "fp32": {},
    "fp64": {},
    "checkpointing": {"gradient_checkpointing": True},
    "compiled": {"compile": True},
    "bf16": {"gradient_reduction": "bf16"},
}


@pytest.fixture(scope="module")
def first_step(small_store, tmp_path_factory):
    """What two ranks found, and the gradients of one process by dtype."""
    folder = tmp_path_factory.mktemp("first")
    settings = make_settings(small_store, folder / "one", optimizer=Optimizer(clip=0.0))
    for name, changes in CASES.items():
        (folder / f"{name}.yaml").write_text(dump_yaml(dataclasses.replace(settings, **changes)))
    (folder / "steps.py").write_text(STEPS)
    launch("ddp", [str(folder / "steps.py"), str(folder)], FSDP_VERSION="2")
    one = {}
    for dtype in (torch.float32, torch.float64):
        job = build_job(settings, resume=False, in_memory=True)
        job.model.to(dtype)
        job.prepared = []
        train_step(job, next(job.loader))
        one[dtype] = torch.cat([parameter.grad.flatten() for parameter in job.model.parameters()])
    return torch.load(folder / "found.pt", weights_only=True), one


@pytest.mark.parametrize("weights", ["replicated", "sharded"])
@pytest.mark.parametrize("case", ["fp32", "fp64", "checkpointing", "compiled"])
def test_one_step_of_two_ranks_has_the_gradients_of_one(case, weights, first_step):
    two, one = first_step[0][f"{case} {weights}"], first_step[1]
    tolerance = GRADIENTS_FP64 if two.dtype == torch.float64 else GRADIENTS_FP32
    assert (case == "fp64") == (two.dtype == torch.float64)
    assert (two - one[two.dtype]).norm() < tolerance * one[two.dtype].norm()


@pytest.mark.parametrize("weights", ["replicated", "sharded"])
def test_reduction_in_bf16_rounds_gradients(weights, first_step):
    found, one = first_step[0], first_step[1][torch.float32]
    error = (found[f"bf16 {weights}"] - one).norm() / one.norm()
    assert 100 * GRADIENTS_FP32 < error < GRADIENTS_BF16


def test_a_step_that_is_not_finite_is_skipped_where_weights_are_sharded(first_step):
    assert first_step[0]["bad step"].tolist() == [True, False]  # a good step, and a bad one


@pytest.mark.parametrize("optimizer", ["muon", "stable_adamw", "lamb"])
def test_sharded_matrices_get_the_same_updates(optimizer, first_step):
    """Rows that do not divide, more ranks than matrices or rows, and blocks."""
    found, _ = first_step
    differences = {name: float(part.abs().max()) for name, part in found.items() if name.startswith(f"{optimizer} ")}
    assert len(differences) == 4
    assert max(differences.values()) < WEIGHTS_FP32


RUN = """
import os, sys
from pathlib import Path

import encoderkit.pretrain.loop as loop
from encoderkit.pretrain.command_line import read_settings
from encoderkit.pretrain.settings import PretrainSettings

settings = read_settings(PretrainSettings, Path(sys.argv[1]))
resume, stop = sys.argv[2] == "resume", int(sys.argv[3])
train_step = loop.train_step


def stopping(job, batches):
    if job.state.step == stop:
        sys.stdout.flush()
        os._exit(0)
    return train_step(job, batches)


if resume:
    job = loop.build_job(settings, True)
    job.save()  # what was loaded, once more
    job.finish_saving()
    if job.run is not None:
        job.run.close()
loop.train_step = stopping
loop.pretrain(settings, resume)
"""


def test_a_run_goes_from_two_ranks_to_one_to_two(small_store, tmp_path):
    """Sharded on two ranks to step 8, one process to step 14, sharded again to the end; checkpoints at 6, 12 and 18.

    The last part saves asynchronously.
    """
    pretrain(make_settings(small_store, tmp_path / "whole"))
    settings = make_settings(small_store, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "run.yaml").write_text(dump_yaml(settings))
    run = [str(tmp_path / "run.py"), str(tmp_path / "run.yaml")]

    def saved_again(step: int, resume: Callable[[], object]) -> bool:
        """Whether a checkpoint that resume loads and saves, on another number of ranks, has the same bits."""
        shutil.copytree(checkpoints / f"step-{step}", tmp_path / f"step-{step}")
        resume()
        before, after = (Checkpoint(step, folder / f"step-{step}") for folder in (tmp_path, checkpoints))
        assert {len(list(part.path.glob("*.safetensors"))) for part in (before, after)} == {3, 2 * 3}
        sizes = [file.stat().st_size for part in (before, after) for file in part.path.glob("model*")]
        assert sorted(sizes)[1] < 0.6 * max(sizes)  # each rank's half, and the whole
        assert before.state["optimizers"] == after.state["optimizers"]
        for stem in ("model", "optimizer-0", "optimizer-1"):
            first, second = before.tensors(stem), after.tensors(stem)
            if list(first) != list(second) or not all(map(same_bits, first.values(), second.values())):
                return False
        return True

    def in_one_process() -> None:
        job = build_job(settings, resume=True)
        job.save()
        job.run.close()

    launch("fsdp2", [*run, "start", "8"])
    assert latest_checkpoint(checkpoints).state["facts"]["weights"] == "sharded"
    assert saved_again(6, in_one_process)
    with stop_before(14):
        pretrain(settings, resume=True)
    saving = dataclasses.replace(settings.checkpoints, asynchronous=True)
    (tmp_path / "run.yaml").write_text(dump_yaml(dataclasses.replace(settings, checkpoints=saving)))
    assert saved_again(12, lambda: launch("fsdp2", [*run, "resume", "-1"]))
    records = zip(read_log(tmp_path / "whole" / "log.jsonl"), read_log(tmp_path / "run" / "log.jsonl"), strict=True)
    for one, many in records:
        assert (one["kind"], one["step"], one["tokens"]) == (many["kind"], many["step"], many["tokens"])
        assert abs(one.get("loss", 0) - many.get("loss", 0)) < LOSSES_20_STEPS
