"""Two ranks on a CPU, replicated and sharded, learn what one process learns; checkpoints go from any to any."""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tiny_run import MODEL, same_bits, stop_before, torchrun

import encoderkit.pretrain.machine as machine_module
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.checkpoint import Checkpoint, latest_checkpoint
from encoderkit.pretrain.command_line import dump_yaml
from encoderkit.pretrain.job import build_job
from encoderkit.pretrain.loop import pretrain, train_step
from encoderkit.pretrain.parallel import sharding_plugin
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
CONFIGS = sorted((RECIPES / "accelerate").glob("*.yaml"))
SCRIPTS = sorted((RECIPES / "slurm").glob("*.sh"))


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


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version is 1; expected 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is true"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set gradient_checkpointing"),
    ],
)
def test_what_fsdp_cannot_do_here_is_refused(environment, message, monkeypatch):
    assert sharding_plugin() is None
    for name, value in {"ACCELERATE_USE_FSDP": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        sharding_plugin()


class OneOfFsdp(Accelerator):
    """Accelerate as it is on one GPU that a file for FSDP2 was launched on."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        self.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def step_alone(settings):
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    AcceleratorState._reset_state(True)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)  # threads do not survive the fork
    machine_module.Accelerator = OneOfFsdp
    job = build_job(settings, resume=False, in_memory=True)
    assert job.accelerator.is_fsdp2
    train_step(job, next(job.loader))


def test_one_process_trains_whatever_the_launcher_wanted_sharded(small_store, tmp_path):
    settings = make_settings(small_store, tmp_path)
    child = multiprocessing.get_context("fork").Process(target=step_alone, args=(settings,), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_the_device_is_the_one_that_the_launcher_means(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine_module._own_device().type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert machine_module._own_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "0")  # every one, so that the first tells
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match="3 processes were started on this node, and 2 GPUs are visible; start 2"):
        machine_module._own_device()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert machine_module._own_device().type == "cpu"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    assert config.num_processes > 1
    assert config.mixed_precision is None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_bash_reads_the_slurm_scripts(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


STUBS = {
    "scontrol": "echo first; echo second",
    "srun": '[[ $1 == --* ]] && shift; for ((i = 0; i < SLURM_NNODES; i++)); do SLURM_NODEID=$i "$@"; done',
    "accelerate": 'echo "$*"',
}


@pytest.mark.parametrize(("script", "nodes"), [("one-node", 1), ("nodes", 2)])
def test_slurm_scripts_start_a_run_and_then_resume_it(script, nodes, tmp_path):
    for name, line in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": str(nodes), "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "two"}
    job = {"CONFIG": "a recipe.yaml", "STORE": "store", "OUT": str(tmp_path), "PARALLEL": "fsdp2"}
    environment = {**os.environ, **slurm, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def launched() -> list[str]:
        command = ["bash", str(RECIPES / "slurm" / f"{script}.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    lines = launched()
    assert len(lines) == nodes
    for node, line in enumerate(lines):
        assert line.startswith("launch --config_file pretrain/recipes/accelerate/fsdp2.yaml ")
        assert f"--num_processes {8 * nodes} " in line
        assert nodes == 1 or f"--num_machines 2 --machine_rank {node} " in line
        assert nodes == 1 or "--main_process_ip first --main_process_port 29007 " in line
        assert line.endswith(f"run --config a recipe.yaml --data.store store --out {tmp_path}")
    (tmp_path / "config.yaml").write_text("")
    assert [line.partition(" run ")[2] for line in launched()] == [f"--resume {tmp_path}"] * nodes


# The step may end before or after the script looks whether it is still there.
LATE = {"BASH_FUNC_kill%%": '() { builtin kill "$@"; local status=$?; sleep 0.5; return "$status"; }'}


@pytest.mark.parametrize("delays", [{}, LATE], ids=["at-once", "late"])
@pytest.mark.parametrize("script", ["one-node", "nodes"])
def test_slurm_scripts_stop_the_run_before_the_time_limit_and_queue_it_again(script, delays, tmp_path):
    step = "trap 'echo stopped; builtin kill $!; exit 143' TERM; echo started; sleep 60 > /dev/null 2>&1 & wait"
    for name, line in {
        "srun": step,
        "scontrol": 'echo "$*" >&2; [ "$1" != show ] || echo first',
        "accelerate": "",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "one"}
    job = {"CONFIG": "recipe.yaml", "STORE": "store", "OUT": str(tmp_path)}
    process = subprocess.Popen(
        ["bash", str(RECIPES / "slurm" / f"{script}.sh")],
        env={**os.environ, **slurm, **job, **delays, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGUSR1)
    shown, told = process.communicate(timeout=30)
    assert (process.returncode, shown) == (143, "stopped\n")
    assert told.splitlines()[-1] == "requeue 7"


def test_configurations_and_scripts_are_there():
    assert [path.stem for path in CONFIGS] == ["ddp", "fsdp2"]
    assert [path.stem for path in SCRIPTS] == ["nodes", "one-node"]


LATE_RANK = """
import os, time
import torch.distributed as dist
from encoderkit.pretrain.parallel import group_options

is_first_start, is_last = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", os.environ["RANK"] == "1"
if is_last and not is_first_start:
    time.sleep(4)
dist.init_process_group("gloo", **group_options(60))
if is_last and is_first_start:
    os.kill(os.getpid(), 9)
dist.barrier()
"""


def test_a_restarted_rank_that_is_late_is_waited_for(tmp_path):
    """Without keys of its own start the early rank is refused at once, or finds nobody until the timeout."""
    (tmp_path / "late_rank.py").write_text(LATE_RANK)
    command = torchrun(tmp_path / "late_rank.py", restarts=1)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
