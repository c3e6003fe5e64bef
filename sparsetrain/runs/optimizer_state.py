"""Conversion of a torch optimizer's state to named tensors and JSON and back, bit for bit.

torch numbers parameters by their position in the groups, so its state dicts break when a parameter is added or the
groups are split differently. Here each entry is keyed by the parameter's name in the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.errors import UserError

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None

# Options that choose an implementation and do not change the mathematics: the current optimizer's values are kept.
_EXECUTION = frozenset({"foreach", "fused", "capturable", "differentiable"})
_NOT_OPTIONS = frozenset({"params", "param_names"}) | _EXECUTION


class OptimizerTensors(NamedTuple):
    """The state of an optimizer, as `optimizer_tensors` returns it and `restore_optimizer` takes it.

    Attributes:
        tensors: ``"NAME.KEY"`` -> tensor, e.g. ``"blocks.0.attn.qkv.values.exp_avg"``; the optimizer's own tensors,
            not copies.
        groups: one JSON object per parameter group: ``options`` (lr, betas, ...) and ``parameters``, a list of
            ``{"name", "shape", "tensors": {KEY: shape}, "numbers": {KEY: number or null}}``.
    """

    tensors: dict[str, Tensor]
    groups: list[JSON]


def _option_to_json(value: Any, where: str) -> JSON:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, tuple | list):
        return [_option_to_json(item, where) for item in value]
    raise UserError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold")


def _option_from_json(current: Any, stored: Any) -> Any:
    """Return ``stored`` in the type that the optimizer uses now: a tuple, a tensor or a number."""
    if isinstance(current, Tensor):
        return torch.full_like(current, stored)
    if isinstance(current, tuple) and isinstance(stored, list) and len(current) == len(stored):
        return tuple(_option_from_json(old, new) for old, new in zip(current, stored, strict=True))
    return stored


def _names(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]] | Mapping[nn.Parameter, str]
) -> list[list[tuple[str, nn.Parameter]]]:
    """Return the (name, parameter) pairs of each group, in the optimizer's order.

    Raises:
        UserError: a parameter has no name.
    """
    if isinstance(named_parameters, Mapping):
        name_of = {id(parameter): name for parameter, name in named_parameters.items()}
    else:
        name_of = {}
        for name, parameter in named_parameters:
            name_of.setdefault(id(parameter), name)
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in name_of:
                shape = tuple(parameter.shape)
                raise UserError(f"optimizer group {index} holds a parameter of shape {shape} without a name")
        groups.append([(name_of[id(parameter)], parameter) for parameter in group["params"]])
    return groups


def optimizer_tensors(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]] | Mapping[nn.Parameter, str]
) -> OptimizerTensors:
    """Return the optimizer's state by parameter name: tensors as they are, everything else as JSON.

    This works for torch optimizers whose state consists of tensors and numbers per parameter (AdamW, SGD, ...).

    Args:
        optimizer: any torch optimizer.
        named_parameters: ``model.named_parameters()``, or a mapping from parameter to name. It may contain parameters
            that the optimizer does not have. If a parameter has several names, the first one is used.

    Raises:
        UserError: a parameter has no name, or an entry is neither a tensor nor a number (LBFGS).
    """
    tensors: dict[str, Tensor] = {}
    groups: list[JSON] = []
    for group, members in zip(optimizer.param_groups, _names(optimizer, named_parameters), strict=True):
        parameters: list[JSON] = []
        for name, parameter in members:
            shapes: dict[str, JSON] = {}
            numbers: dict[str, JSON] = {}
            # `get`, because reading a missing entry of the optimizer's defaultdict would create it.
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}.{key}"] = value.detach()
                    shapes[key] = list(value.shape)
                elif value is None or isinstance(value, bool | int | float):
                    numbers[key] = value
                else:
                    kind = type(value).__name__
                    raise UserError(f"optimizer state {name}.{key} is a {kind}, which a checkpoint cannot hold")
            parameters.append({"name": name, "shape": list(parameter.shape), "tensors": shapes, "numbers": numbers})
        options: dict[str, JSON] = {
            key: _option_to_json(value, f"optimizer option {key}")
            for key, value in group.items()
            if key not in _NOT_OPTIONS
        }
        groups.append({"options": options, "parameters": parameters})
    return OptimizerTensors(tensors, groups)


def _placed(tensor: Tensor, key: str, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
    """Return a copy of ``tensor`` on the device where the optimizer expects it.

    torch keeps the step counter of Adam-like optimizers on the CPU, so that reading it does not wait for the GPU; the
    fused and capturable implementations keep it on the GPU.
    """
    if key != "step":
        return tensor.to(parameter.device, copy=True)
    if group.get("fused"):
        return tensor.to(parameter.device, torch.float32, copy=True)
    return tensor.to(parameter.device if group.get("capturable") else "cpu", copy=True)


def _restored_state(
    entry: dict[str, Any],
    tensors: Mapping[str, Tensor],
    name: str,
    parameter: nn.Parameter,
    group: Mapping[str, Any],
) -> dict[str, Any]:
    shape, stored_shape = tuple(parameter.shape), tuple(entry["shape"])
    if shape != stored_shape:
        raise UserError(f"parameter {name} has shape {shape}, but {stored_shape} in the checkpoint's optimizer state")
    state: dict[str, Any] = dict(entry["numbers"])
    for key, expected in entry["tensors"].items():
        tensor = tensors.get(f"{name}.{key}")
        if tensor is None:
            raise UserError(f"the checkpoint's optimizer state has no tensor {name}.{key}")
        if list(tensor.shape) != expected:
            raise UserError(f"optimizer state {name}.{key} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")
        state[key] = _placed(tensor, key, parameter, group)
    return state


def restore_optimizer(
    optimizer: Optimizer,
    saved: OptimizerTensors,
    named_parameters: Iterable[tuple[str, nn.Parameter]] | Mapping[nn.Parameter, str],
) -> None:
    """Load the state from `optimizer_tensors` into an optimizer over parameters of the same names.

    Groups are matched by the names in them, so their order and the order within a group may differ. Options (lr,
    betas, weight decay, ...) are restored, except the choice of an implementation (fused, foreach, capturable,
    differentiable). Tensors are copied to the parameter's device in their saved dtype. If an error is raised, the
    optimizer is unchanged.

    Raises:
        UserError: a parameter is missing on either side, is in another group, or has another shape.
    """
    groups = _names(optimizer, named_parameters)
    stored: list[dict[str, Any]] = [group for group in saved.groups if isinstance(group, dict)]
    group_of = {entry["name"]: group for group in stored for entry in group["parameters"]}
    present = [name for members in groups for name, _ in members]
    for name in present:
        if name not in group_of:
            raise UserError(f"the checkpoint's optimizer state has no parameter {name}")
    for name in sorted(group_of.keys() - set(present)):
        raise UserError(f"the checkpoint's optimizer state has parameter {name}, which the optimizer does not have")

    states: dict[nn.Parameter, dict[str, Any]] = {}
    options: list[dict[str, Any]] = []
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        for name, parameter in members:
            entries = {entry["name"]: entry for entry in group_of[name]["parameters"]}
            if entries.keys() != {member for member, _ in members}:
                raise UserError(f"parameter {name} is in another optimizer group than in the checkpoint")
            states[parameter] = _restored_state(entries[name], saved.tensors, name, parameter, group)
        restored = group_of[members[0][0]]["options"] if members else {}
        options.append({key: _option_from_json(group.get(key), value) for key, value in restored.items()})

    for group, restored in zip(optimizer.param_groups, options, strict=True):
        group.update(restored)
    for parameter, state in states.items():
        optimizer.state.pop(parameter, None)
        if state:
            optimizer.state[parameter] = state
