"""`follow_density`: multipliers of layers whose density has changed, under rules with ``follow="density"``.

SμPar gives a matrix of density rho the initial deviation sigma / sqrt(m_d m_rho), the learning rate eta / (m_d m_rho)
and a weight decay by ``wd_rule``, each for the density at the start. If a rule of evolution changes the density from
rho to rho', the layer gets the settings of rho' here, and its weights are multiplied by c = sqrt(rho / rho'), so that
they keep the deviation of the table.

*The output.* An output is a sum over rho fan_in products. If the dropped weights are random ones, rho' / rho of the
variance is left, and c restores it: the mean square of the output is continuous. Rules that drop the smallest
magnitudes leave more of it, so the output jumps up, at most by the factor c, and less the larger the part of the sum
that goes. If the density rises, the new weights are zero, and the output falls by the factor c, which is below 1 then,
until they have grown.

*Moments.* The gradient of a weight is the gradient of the layer's output times an input. Both keep their scale where
the mean square of the output does, whatever c is: the weight is not a weight of the old layer in other units, for which
gradients would be divided by c, since no multiplier of the forward pass divides by c. So the moments of AdamW and the
momentum of SGD still are averages of gradients of the present scale, and stay as they are. For the same reason no
``eps_rule`` depends on m_rho, and eps stays too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparsetrain import wrappers
from sparsetrain.errors import UserError
from sparsetrain.parameterization.groups import assign, assignment
from sparsetrain.sparsity import SparseLinear


def follow_density(model: nn.Module, optimizer: Optimizer, *others: Optimizer) -> list[str]:
    """Give each sparse layer whose density has changed the multipliers of its present density, and rescale its weights.

    Call it after each `MaskManager.step`. Where no density has changed it does nothing, so it may be called at every
    step, and masks that are static or exchange weights at one density need it not at all. The density that the settings
    are for is in the optimizer's groups, and so in its ``state_dict``: a resumed training goes on where it stopped.

    ::

        optimizer = torch.optim.AdamW(param_groups(model, rules, lr=8e-3))   # rules with follow="density"
        loss.backward(); optimizer.step(); manager.step(optimizer); follow_density(model, optimizer)

    A group's ``lr`` and ``weight_decay`` are multiplied by what changes, and ``initial_lr``, if a scheduler has set it,
    is computed anew. A scheduler of torch that keeps its own list of rates (``base_lrs``, as LambdaLR does) undoes
    this; let it read ``initial_lr``, or multiply.

    Args:
        model: whose layers a `MaskManager` changes; it may be wrapped.
        optimizer, others: over groups of `param_groups`; together they hold all layers that train.

    Returns:
        The names of the layers whose density has changed.

    Raises:
        UserError: the model was parameterized by rules without ``follow="density"``, or no optimizer has a group for
            one of the layers. Nothing is then changed.
    """
    recorded = assignment(model)
    rules, traits_of = recorded.rules, dict(recorded.traits_of)
    if rules.follow != "density":
        raise UserError(f"follow_density: the model was parameterized with follow={rules.follow}; set follow='density'")
    groups: dict[int, dict[str, Any]] = {
        id(group["params"][0]): group
        for one in (optimizer, *others)
        for group in one.param_groups
        if "density" in group
    }
    changed: list[tuple[str, SparseLinear, dict[str, Any]]] = []
    for name, module in wrappers.named_modules(model):
        if not isinstance(module, SparseLinear) or not module.values.requires_grad:
            continue
        group = groups.get(id(module.values))
        if group is None:
            raise UserError(
                f"follow_density: no group of the optimizer is for the layer '{name}' alone; build it from "
                "param_groups(model, rules, ...) with follow='density'"
            )
        if group["density"] != module.pattern.density:
            changed.append((name, module, group))
    for name, layer, group in changed:
        now = layer.pattern.density
        old = replace(traits_of[f"{name}.values"], density=group["density"])
        new = replace(old, density=now)
        traits_of[f"{name}.values"] = new
        lr, decay = group["base_lr"], group["base_weight_decay"]
        _set(group, "lr", *(rules.learning_rate(traits, lr, recorded.depth) for traits in (old, new)))
        _set(group, "weight_decay", *(rules.weight_decay(traits, decay) for traits in (old, new)))
        group["density"] = now
        with torch.no_grad():
            layer.values.mul_(math.sqrt(old.density / new.density))
    if changed:
        assign(model, traits_of, rules, recorded.depth)
    return [name for name, _, _ in changed]


def _set(group: dict[str, Any], name: str, old: float, new: float) -> None:
    if old > 0.0:
        group[name] *= new / old
    if f"initial_{name}" in group:
        group[f"initial_{name}"] = new
