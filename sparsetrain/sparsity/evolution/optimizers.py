"""Which torch optimizer holds a weight and its state, and whether it has taken a step.

The optimizer of a training loop may be a wrapper: those of Accelerate and Lightning share the groups and the state of
the optimizer inside, and their ``step`` does nothing while gradients are accumulated. This module looks at the
optimizer inside.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsetrain.errors import UserError

# Optimizers whose state has one number per weight, or one per parameter: moved with the entries of the parameter, it is
# the state of the new weights. (Adafactor factors matrices only, and values are a vector.)
_ELEMENTWISE: set[type[Optimizer]] = {
    getattr(torch.optim, name)
    for name in (
        *("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam"),
        *("Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "Adafactor"),
    )
    if hasattr(torch.optim, name)
}
# Each rank has the state of some weights only. The class is known by its name, because importing it imports
# torch.distributed.
_SHARDED = "ZeroRedundancyOptimizer"


def register_elementwise_optimizer(kind: type[Optimizer]) -> None:
    """Declare that the state of an optimizer class is one number per weight (or one per parameter), as Adam's is.

    A `MaskManager` refuses other optimizers, because it could not move their state when a mask changes. Do not register

    - an optimizer whose state is factored, rotated or quantised in blocks (Shampoo, SOAP, GaLore, 8-bit Adam): an
      entry of that state belongs to several weights;
    - an optimizer whose state is not in ``optimizer.state[parameter]`` of this process, because it shards the state
      over ranks (``ZeroRedundancyOptimizer`` is refused even if registered) or keeps master copies of the weights;
    - a wrapper around another optimizer, since the optimizer inside is found.
    """
    _ELEMENTWISE.add(kind)


# --------------------------------------------------------------------------------------------------------- wrappers


def _inside(optimizer: Optimizer) -> dict[str, Optimizer]:
    """Return the optimizers that ``optimizer`` has as attributes, each once, by name."""
    found: dict[str, Optimizer] = {}
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer) and all(value is not other for other in found.values()):
            found[name] = value
    return found


def innermost(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that updates the weights: ``optimizer``, or the one inside the wrapper ``optimizer``.

    Raises:
        UserError: not an optimizer, one that is sharded over ranks, or a wrapper around several.
    """
    outer = optimizer
    while True:
        if not isinstance(optimizer, Optimizer):
            raise UserError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer; give the optimizer itself")
        if any(kind.__name__ == _SHARDED for kind in type(optimizer).__mro__):
            raise UserError(
                f"{_SHARDED} keeps the state of each weight on one rank only, so the state cannot follow a mask that "
                "changes; give every rank a plain optimizer (AdamW, …)"
            )
        inside = _inside(optimizer)
        if not inside:
            return optimizer
        if len(inside) > 1:
            names = ", ".join(f"optimizer.{name.lstrip('_')}" for name in inside)
            raise UserError(
                f"optimizer {type(outer).__name__} wraps several optimizers; give these instead, for example "
                f"step({names})"
            )
        optimizer = next(iter(inside.values()))


def _check_wrappers(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Raise `UserError` if a wrapper has its own state for ``parameter``, which no update would move."""
    while inside := _inside(optimizer):
        name, inner = next(iter(inside.items()))
        own = optimizer.state.get(parameter)
        if own and own is not inner.state.get(parameter):
            raise UserError(
                f"optimizer {type(optimizer).__name__} wraps {type(inner).__name__} and keeps a state of its own "
                f"({', '.join(map(str, own))}), which cannot follow a mask; give the inner optimizer (optimizer."
                f"{name.lstrip('_')}) if that state may be lost, or another optimizer"
            )
        optimizer = inner


def holder(optimizers: Iterable[Optimizer], parameter: nn.Parameter) -> Optimizer | None:
    """Return the optimizer without wrappers that holds ``parameter``, or None.

    Raises:
        UserError: as `innermost`; or a wrapper that keeps its own state for the parameter.
    """
    for optimizer in optimizers:
        inner = innermost(optimizer)
        if any(parameter is held for group in inner.param_groups for held in group["params"]):
            _check_wrappers(optimizer, parameter)
            return inner
    return None


def check_optimizer(optimizer: Optimizer | Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise `UserError` if the state of an optimizer, or of several, could not follow a change of ``parameters``.

    The reason is an optimizer of unknown kind, or a parameter that no optimizer holds: the optimizer was built before
    the layers were made sparse, or another optimizer holds it.
    """
    several = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    kinds = tuple(_ELEMENTWISE)
    for inner in map(innermost, several):
        if not isinstance(inner, kinds) and (len(several) == 1 or _holds_any(inner, parameters.values())):
            known = ", ".join(sorted(kind.__name__ for kind in _ELEMENTWISE))
            raise UserError(
                f"optimizer {type(inner).__name__} is not known to keep one number per weight; known are {known}; "
                "register_elementwise_optimizer(kind) adds one; instead of a wrapper give the optimizer inside"
            )
    for name, parameter in parameters.items():
        if holder(several, parameter) is None:
            raise UserError(_not_held(name, len(several)))


def _not_held(name: str, count: int) -> str:
    who = "the optimizer does not hold" if count == 1 else f"none of the {count} optimizers holds"
    return (
        f"{who} {name}: build MaskManager(model, rule) first, and then the optimizer from the model's parameters; if "
        "several optimizers hold the layers, give all of them, step(one, another); freeze a layer that is not trained "
        "by requires_grad_(False)"
    )


def check_any_held(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise `UserError` if there are parameters and the optimizers hold none of them."""
    inner = [innermost(optimizer) for optimizer in optimizers]
    if parameters and not any(_holds_any(optimizer, parameters.values()) for optimizer in inner):
        raise UserError(_not_held(next(iter(parameters)), len(inner)))


def _holds_any(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> bool:
    wanted = {id(parameter) for parameter in parameters}
    return any(id(held) in wanted for group in optimizer.param_groups for held in group["params"])


# ------------------------------------------------------------------------------------------------------------ steps

_clock = itertools.count(1)
# The time of each optimizer's last step by that clock, and whether a gradient scaler had found infinities.
_last_step: weakref.WeakKeyDictionary[Optimizer, tuple[int, Tensor | None]] = weakref.WeakKeyDictionary()
_noting = False


def _note_step(optimizer: Optimizer, _args: object, _kwargs: object) -> None:
    if not torch.compiler.is_compiling():
        _last_step[optimizer] = next(_clock), getattr(optimizer, "found_inf", None)


def note_steps() -> int:
    """Record the steps of all optimizers from now on, and return the time."""
    global _noting
    if not _noting:
        register_optimizer_step_post_hook(_note_step)
        _noting = True
    return next(_clock)


class StepWatch:
    """Detects whether optimizers have taken a step since the last call of `took`.

    Torch calls a hook after each ``step``. The hook does not run inside ``torch.compile``; there the versions of the
    tensors that a step writes are compared: the state, or the weights of an optimizer without a state. A fused
    optimizer under a gradient scaler runs its step even if the gradients are infinite and nothing changes; the scaler's
    finding then decides.

    Args:
        optimizers: without wrappers. parameters: the watched ones among their parameters.
        since: steps after this time (`note_steps`) count at the first call of `took`.
        before: whether the watch is built before the first step to detect, and not between a step and `took`.
        loaded: whether a state of the optimizers may come from a checkpoint, and not from a step.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        parameters: Iterable[nn.Parameter],
        since: int,
        before: bool,
        loaded: bool = False,
    ) -> None:
        watched = list(parameters)
        pairs = [(optimizer, [p for p in watched if _holds_any(optimizer, [p])]) for optimizer in optimizers]
        # An optimizer of other weights tells nothing about the watched ones.
        pairs = [pair for pair in pairs if pair[1]] or pairs
        self._watched = [(weakref.ref(optimizer), parameters) for optimizer, parameters in pairs]
        self._since = since
        self._versions = [_versions(*pair) if before or loaded else None for pair in pairs]

    def took(self) -> bool:
        """Whether all optimizers have taken a step since the last call.

        If a scaler skips the step of one optimizer, its weights must not be ranked.
        """
        since, self._since = self._since, next(_clock)
        answers = []
        for index, (reference, parameters) in enumerate(self._watched):
            optimizer = reference()
            if optimizer is None:  # the optimizer was replaced, and any step of it was earlier
                answers.append(False)
                continue
            tick, found_inf = _last_step.get(optimizer, (0, None))
            if tick > since:
                self._versions[index] = None
                answers.append(found_inf is None or not bool(found_inf))
                continue
            before, after = self._versions[index], _versions(optimizer, parameters)
            self._versions[index] = after
            answers.append(_stepped(before, after, hooked=optimizer in _last_step))
        return all(answers)

    def renew(self) -> None:
        """Take the present tensors as unchanged, after an update has replaced them."""
        for index, (reference, parameters) in enumerate(self._watched):
            optimizer = reference()
            if optimizer is not None and self._versions[index] is not None:
                self._versions[index] = _versions(optimizer, parameters)


_Versions: TypeAlias = dict[tuple[int, str], tuple[int, int]]


def _versions(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> _Versions:
    """Return identity and version of the state's tensors, and of each parameter without a state."""
    found = {}
    for parameter in parameters:
        state = {key: value for key, value in optimizer.state.get(parameter, {}).items() if isinstance(value, Tensor)}
        for key, tensor in (state or {"": parameter}).items():
            found[id(parameter), str(key)] = id(tensor), tensor._version
    return found


def _stepped(before: _Versions | None, after: _Versions, hooked: bool) -> bool:
    """Whether ``after`` shows a step that the hook missed; ``hooked``: whether the hook has seen any step."""
    if before is None:
        # At the first call, only a compiled step leaves a state although the hook saw none.
        return not hooked and any(key for _, key in after)
    for place, (identity, version) in after.items():
        if place not in before:
            if not hooked:
                return True
        # Other code writes into weights too, but only a step writes into the state. (Loading replaces its tensors.)
        elif before[place][0] == identity and before[place][1] != version and (place[1] or not hooked):
            return True
    return False
