"""What launchers ask of a run: FSDP, devices, Accelerate's configurations, the Slurm scripts, ranks that come late."""

import multiprocessing
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tiny_run import make_settings, torchrun

import encoderkit.pretrain.machine as machine_module
from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.job import build_job
from encoderkit.pretrain.loop import train_step
from encoderkit.pretrain.parallel import sharding_plugin

RECIPES = Path(__file__).resolve().parents[2] / "pretrain" / "recipes"
CONFIGS = sorted((RECIPES / "accelerate").glob("*.yaml"))
SCRIPTS = sorted((RECIPES / "slurm").glob("*.sh"))


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
