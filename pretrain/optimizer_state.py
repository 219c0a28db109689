"""An optimizer's state as tensors and JSON, for a checkpoint in which nothing is pickled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def flatten_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors and JSON; unflatten_optimizer gives back the same, bit for bit."""
    tensors: dict[str, Tensor] = {}
    params = [
        [param, _pack(state, f"state.{i}", tensors)] for i, (param, state) in enumerate(state_dict["state"].items())
    ]
    groups = [_pack(group, f"group.{i}", tensors) for i, group in enumerate(state_dict["param_groups"])]
    return tensors, {"state": params, "param_groups": groups}


def unflatten_optimizer(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict that flatten_optimizer took apart."""
    return {
        "state": {param: _unpack(state, tensors) for param, state in described["state"]},
        "param_groups": [_unpack(group, tensors) for group in described["param_groups"]],
    }


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """value as JSON; tensors move out under name, and tuples are marked so that they come back as tuples."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": {key: _pack(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"optimizer state {name} is a {type(value).__name__}; expected tensors and plain values")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content.items()}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
