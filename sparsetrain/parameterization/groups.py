"""Give every parameter of a model its place in the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsetrain import wrappers
from sparsetrain.errors import UserError
from sparsetrain.parameterization.rules import Parameterization, TensorSpec
from sparsetrain.sparsity import SparseLinear


@dataclass(frozen=True)
class Assignment:
    """Which rules hold for a model of ``depth`` blocks, and the spec of each parameter by name."""

    specs: Mapping[str, TensorSpec]
    rules: Parameterization
    depth: int


def assign(model: nn.Module, specs: Mapping[str, TensorSpec], rules: Parameterization, n_layers: int) -> None:
    """Record which rules and specs hold for the parameters of ``model``, without touching their values.

    The record lies on the model inside all wrappers around it, and its names are those of the bare model.
    """
    names = [name for name, _ in wrappers.named_parameters(model)]
    missing = [name for name in names if name not in specs]
    if missing:
        raise UserError(f"parameter '{missing[0]}' has no role ({len(missing)} without one)")
    # One attribute under a name that no user's model has; it travels with copies and pickles of the model.
    wrappers.unwrap(model)._sparsetrain_assignment = Assignment(  # type: ignore[assignment]
        {name: specs[name] for name in names}, rules, n_layers
    )


def assignment(model: nn.Module) -> Assignment:
    """Return what `assign` recorded.

    Raises:
        UserError: the model has not been parameterized.
    """
    recorded = getattr(wrappers.unwrap(model), "_sparsetrain_assignment", None)
    if not isinstance(recorded, Assignment):
        raise UserError("the model's tensors have no roles yet: call parameterize(model, rules, base) first")
    return recorded


def param_groups(
    model: nn.Module,
    rules: Parameterization,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    optimizer: type[torch.optim.Optimizer] | None = None,
) -> list[dict[str, Any]]:
    """Return optimizer groups with the learning rate, weight decay and eps that the rules give each tensor.

    Parameters with the same role and the same settings share a group. Frozen parameters are left out. Masks that change
    their density later (`sparsetrain.sparsity.GMP`, variable sparsity) do not change the groups: learning rates and
    weight decays keep the multipliers of the density at this moment, and SμPar makes no claim about what follows.

    Args:
        model: a `Transformer`, or a model that `parameterize` has seen; either may be wrapped since.
        rules: those for which the model was initialised.
        lr: base peak learning rate eta. weight_decay: base lambda. eps: base eps of Adam.
        optimizer: the class that the groups are for, to be told when the rules are those of the other family.

    Returns:
        Dicts with ``params``, ``name``, ``lr``, ``weight_decay`` and, under rules for Adam, ``eps``.

    Raises:
        UserError: a model without roles, other rules than those it was initialised for, a parameter without a role,
            a layer whose density is not the one it was initialised for, or SGD with rules for Adam or the reverse.
    """
    if optimizer is not None:
        sgd = issubclass(optimizer, (torch.optim.SGD, torch.optim.ASGD))
        rules.check_optimizer("sgd" if sgd else optimizer.__name__)
    recorded = assignment(model)
    specs, depth = recorded.specs, recorded.depth
    if recorded.rules != rules:
        raise UserError(f"the model was initialised for {recorded.rules}, not for {rules}")
    _check_densities(model, specs)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in wrappers.named_parameters(model):
        if name not in specs:
            raise UserError(f"parameter '{name}' has no role: parameterize after sparsify, densify or adding layers")
        if not parameter.requires_grad:
            continue
        spec = specs[name]
        settings = {
            "lr": rules.learning_rate(spec, lr, depth),
            "weight_decay": rules.weight_decay(spec, weight_decay),
        }
        if rules.optimizer == "adam":
            settings["eps"] = rules.epsilon(spec, eps, depth)
        key = (spec.role, *settings.values())
        group = groups.setdefault(key, {"params": [], "name": str(spec.role), **settings})
        group["params"].append(parameter)
    return list(groups.values())


def _check_densities(model: nn.Module, specs: Mapping[str, TensorSpec]) -> None:
    for name, module in wrappers.named_modules(model):
        if isinstance(module, SparseLinear):
            spec = specs.get(f"{name}.values")
            if spec is not None and abs(spec.density - module.pattern.density) > 1e-9:
                raise UserError(
                    f"layer '{name}' has density {module.pattern.density:.6g} but was initialised for "
                    f"{spec.density:.6g}: call parameterize again"
                )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two optimizer groups by the usual rule: parameters of two or more dimensions decay, the others do not.

    The values of a sparse layer are the entries of a matrix, so they decay, although they have one dimension. As in the
    usual recipes of GPT-2 the embeddings decay, and biases and the gains of norms do not. Each parameter that trains is
    in one group; frozen ones are left out. `param_groups` is the like for a parameterization.

    Args:
        model: any model; a wrapper around it or a part of it changes nothing.
        weight_decay: of the group that decays, at least 0.

    Returns:
        Dicts with ``params``, ``name`` (``decay`` or ``no_decay``) and ``weight_decay``, for any optimizer of torch; a
        group without parameters is left out.

    Raises:
        UserError: ``weight_decay`` is negative or not finite.
    """
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, int | float):
        raise UserError(f"weight_decay={weight_decay!r} is not a number")
    if not 0.0 <= weight_decay < math.inf:
        raise UserError(f"weight_decay={weight_decay} must be at least 0 and finite")
    values = {id(module.values) for module in model.modules() if isinstance(module, SparseLinear)}
    groups: dict[str, dict[str, Any]] = {
        "decay": {"params": [], "name": "decay", "weight_decay": weight_decay},
        "no_decay": {"params": [], "name": "no_decay", "weight_decay": 0.0},
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 or id(parameter) in values
            groups["decay" if decays else "no_decay"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
