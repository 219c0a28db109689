"""One model on many ranks: replicated by DistributedDataParallel, or sharded by fully_shard (FSDP2), block by block.

`accelerate launch` says which (pretrain/recipes/accelerate). Accelerate itself shards on GPUs only, and casts the loss
to the compute dtype with it; fully_shard is called here, so that two processes on a CPU prove what eight GPUs run.
Parameters stay fp32 and are gathered in fp32, and autocast is the same either way: so are the numbers.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from encoderkit.encoder.precision import Precision
from encoderkit.kernels.errors import InputError
from encoderkit.kernels.matrix_route import use_route
from encoderkit.pretrain.objective import Objective


def group_options(timeout_seconds: float) -> dict[str, Any]:
    """How the group of processes of this launch begins; nothing for a process alone.

    torchrun keeps its store over restarts (torch 2.13), and with it the addresses of processes that are gone, which a
    rank that is early would try. On one node each start has keys of its own; several may count starts differently.
    """
    if "WORLD_SIZE" not in os.environ:
        return {}
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ["GROUP_WORLD_SIZE"] != "1":
        return {"timeout": timeout}
    at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*at, is_master=False, timeout=timeout)
    return {
        "timeout": timeout,
        "store": dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store),
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }


def agreed(precision: Precision) -> Precision:
    """The first rank's choice, on every rank: a measured one could differ from rank to rank."""
    precision = broadcast_object_list([precision])[0]
    if precision.route is not None:
        use_route(precision.route.name)
    return precision


def sharding_plugin() -> FullyShardedDataParallelPlugin | None:
    """What `accelerate launch` was told about FSDP; None where it was told nothing.

    Raises InputError where it was told what is not served here.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":  # as Accelerate asks
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise InputError(f"fsdp_version is {plugin.fsdp_version}; expected 2, see pretrain/recipes/accelerate")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise InputError("fsdp_offload_params is true; expected false: shards of an encoder fit on the GPU")
    if plugin.activation_checkpointing:
        raise InputError("fsdp_activation_checkpointing is true; expected false: set gradient_checkpointing instead")
    return plugin


def spread(
    accelerator: Accelerator, objective: Objective, plugin: FullyShardedDataParallelPlugin | None, *, bf16: bool
) -> nn.Module:
    """The objective on the accelerator's device, as many ranks train it; all begin with the weights of the first.

    Optimizers are made over its parameters afterwards. bf16: gradients are averaged over ranks in bf16.
    """
    if accelerator.num_processes == 1:  # whatever the launcher asked for, there is nothing to reduce or to shard
        return accelerator.prepare_model(objective.to(accelerator.device), evaluation_mode=True)  # autocast only
    if plugin is None:
        wrapped = accelerator.prepare_model(objective)
        if bf16:
            wrapped.register_comm_hook(None, _average_in_bf16)
        return wrapped
    objective.to(accelerator.device)
    for parameter in objective.parameters():
        dist.broadcast(parameter.data, src=0)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if bf16 else None)
    blocks = objective.model.encoder.blocks
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=bool(plugin.reshard_after_forward))
    register_fsdp_forward_method(blocks[-1], "forward_read")
    fully_shard(objective, mesh=mesh, mp_policy=policy)  # the rest, token table included, in one piece
    return accelerator.prepare_model(objective, evaluation_mode=True)  # autocast only


def without_reduction(wrapped: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Gradients of a micro-batch stay on their rank, for a later one to reduce with its own.

    Sharded ones are reduced all the same: kept, they would be as large as the whole model.
    """
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext()


def clip_gradients(model: nn.Module, most: float) -> Tensor:
    """Scale all gradients down to this norm, 0 for any; returns their norm before, () on the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gather_whole(state: Any, *, keep: bool) -> Any:
    """Nested state with its sharded tensors whole, on the CPU; every rank calls this, those that keep get them.

    One tensor is whole on the device at a time. Tensors that are not sharded stay as they are.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, Mapping):
        return {name: gather_whole(part, keep=keep) for name, part in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gather_whole(part, keep=keep) for part in state)
    return state


def own_rows(group: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Of sharded tensors this rank's rows, and their names; the others are whole, and on the first rank only.

    Every rank calls this. The rows of all ranks, one after the other, are the tensor.
    """
    own, rows = {}, []
    for name, tensor in group.items():
        if isinstance(tensor, DTensor) and tensor.placements == (Shard(0),):
            own[name] = tensor.to_local()
            rows.append(name)
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            own[name] = whole
    return own, rows


def load_optimizer(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a state_dict of whole tensors; of a sharded parameter's state each rank takes its own part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in state_dict["state"].items():
        state_dict["state"][index] = {name: _cut_like(parameters[index], value) for name, value in state.items()}
    optimizer.load_state_dict(state_dict)


def _cut_like(parameter: Tensor, value: Any) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)  # its own copy


def _average_in_bf16(state, bucket):  # annotated, it would be refused: DDP compares annotations, and these are text
    """torch's own hook, under a name that DistributedDataParallel does not refuse without NCCL."""
    return bf16_compress_hook(state, bucket)
