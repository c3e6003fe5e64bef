"""Optimizer groups: the record of a model's roles, and groups with the settings that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsetrain import wrappers
from sparsetrain.errors import UserError
from sparsetrain.parameterization.rules import Parameterization, TensorTraits
from sparsetrain.sparsity import SparseLinear


@dataclass(frozen=True)
class Assignment:
    """The rules applied to a model of ``depth`` blocks, and the traits of each parameter by name."""

    traits_of: Mapping[str, TensorTraits]
    rules: Parameterization
    depth: int


def assign(model: nn.Module, traits_of: Mapping[str, TensorTraits], rules: Parameterization, n_layers: int) -> None:
    """Record the rules and the traits of the parameters of ``model``, without changing values.

    The record is an attribute of the model inside all wrappers, with the names of the bare model.
    """
    names = [name for name, _ in wrappers.named_parameters(model)]
    missing = [name for name in names if name not in traits_of]
    if missing:
        raise UserError(f"parameter '{missing[0]}' has no role; {len(missing)} of {len(names)} parameters have none")
    # A single attribute with a name unlikely to be taken; copies and pickles of the model keep it.
    wrappers.unwrap(model)._sparsetrain_assignment = Assignment(  # type: ignore[assignment]
        {name: traits_of[name] for name in names}, rules, n_layers
    )


def assignment(model: nn.Module) -> Assignment:
    """Return the record of `assign`.

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

    Parameters with the same role and the same settings share a group. Frozen parameters are left out. Masks whose
    density changes later (`sparsetrain.sparsity.GMP`, variable sparsity) do not change the groups: learning rates and
    weight decays keep the multipliers of the current density, and SμPar makes no claim about later densities. Under
    rules with ``follow="density"``, each sparse matrix has a group of its own, which `follow_density` changes.

    Args:
        model: a `Transformer`, or a model that `parameterize` was applied to; either may be wrapped since.
        rules: the rules that the model was initialised for.
        lr: base peak learning rate eta.
        weight_decay: base weight decay lambda.
        eps: base eps of Adam.
        optimizer: class of the optimizer, to check that the rules are derived for it.

    Returns:
        Dicts with ``params``, ``name``, ``lr``, ``weight_decay`` and, under rules for Adam, ``eps``. Those of matrices
        whose density is followed have ``density``, ``base_lr`` and ``base_weight_decay`` too.

    Raises:
        UserError: the model has no roles or was initialised for other rules; a parameter has no role; a layer's density
            is not the one it was initialised for; or the optimizer is SGD under rules for Adam, or the reverse.
    """
    if optimizer is not None:
        sgd = issubclass(optimizer, (torch.optim.SGD, torch.optim.ASGD))
        rules.check_optimizer("sgd" if sgd else optimizer.__name__)
    recorded = assignment(model)
    traits_of, depth = recorded.traits_of, recorded.depth
    if recorded.rules != rules:
        raise UserError(f"the model was initialised for {recorded.rules}, not for {rules}")
    _check_densities(model, traits_of)
    modules = wrappers.named_modules(model)
    sparse = {f"{name}.values" for name, module in modules if isinstance(module, SparseLinear)}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in wrappers.named_parameters(model):
        if name not in traits_of:
            raise UserError(f"parameter '{name}' has no role: parameterize after sparsify, densify or adding layers")
        if not parameter.requires_grad:
            continue
        traits = traits_of[name]
        settings = {
            "lr": rules.learning_rate(traits, lr, depth),
            "weight_decay": rules.weight_decay(traits, weight_decay),
        }
        if rules.optimizer == "adam":
            settings["eps"] = rules.epsilon(traits, eps, depth)
        key: tuple[Any, ...] = (traits.role, *settings.values())
        if rules.follow == "density" and name in sparse:
            key = (*key, name)
            settings |= {"density": traits.density, "base_lr": lr, "base_weight_decay": weight_decay}
        group = groups.setdefault(key, {"params": [], "name": str(traits.role), **settings})
        group["params"].append(parameter)
    return list(groups.values())


def _check_densities(model: nn.Module, traits_of: Mapping[str, TensorTraits]) -> None:
    for name, module in wrappers.named_modules(model):
        if isinstance(module, SparseLinear):
            traits = traits_of.get(f"{name}.values")
            if traits is not None and abs(traits.density - module.pattern.density) > 1e-9:
                raise UserError(
                    f"layer '{name}' has density {module.pattern.density:.6g} but was initialised for "
                    f"{traits.density:.6g}: call parameterize again"
                )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two optimizer groups by the usual rule: parameters with two or more dimensions decay, the others do not.

    The values of a sparse layer are entries of a matrix, so they decay, although they have one dimension. As in
    GPT-2's recipe, embeddings decay, and biases and the gains of norms do not. Each trainable parameter is in one
    group; frozen ones are left out. For a model with a parameterization use `param_groups`.

    Args:
        model: any model; wrappers around it or its modules do not matter.
        weight_decay: weight decay of the first group, at least 0.

    Returns:
        Dicts with ``params``, ``name`` (``decay`` or ``no_decay``) and ``weight_decay``, for any torch optimizer; a
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
