"""Which torch optimizer holds a weight and its state, and whether it has taken a step.

What a training loop calls its optimizer may be a wrapper: Accelerate's and Lightning's share the groups and the state
of the optimizer inside, and their ``step`` does nothing while gradients are accumulated. Here the optimizer inside
counts.
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

# Their state is one number a weight, and numbers a tensor: moving the entries of the state with those of the
# parameter gives the optimizer of the new weights. (Adafactor factors matrices only; values are a vector.)
_ELEMENTWISE: set[type[Optimizer]] = {
    getattr(torch.optim, name)
    for name in (
        *("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam"),
        *("Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "Adafactor"),
    )
    if hasattr(torch.optim, name)
}
# By name, since importing it imports torch.distributed. Each rank has the state of some weights only.
_SHARDED = "ZeroRedundancyOptimizer"


def register_elementwise_optimizer(kind: type[Optimizer]) -> None:
    """Declare that the state of an optimizer class is one number per weight (or one per parameter), as Adam's is.

    A `MaskManager` refuses optimizers that it does not know: it could not move their state when a mask changes. Do
    not register

    - an optimizer whose state is factored, rotated or quantised in blocks (Shampoo, SOAP, GaLore, 8-bit Adam): an
      entry of that state belongs to several weights;
    - an optimizer whose state is not in ``optimizer.state[parameter]`` of this process: one that shards it over ranks
      (``ZeroRedundancyOptimizer``, which is refused even if it is registered) or keeps master copies of the weights;
    - a wrapper around another optimizer: the optimizer inside is found without it.
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
    """Return the optimizer that updates the weights: ``optimizer``, or what it is a wrapper around.

    Raises:
        UserError: no optimizer, one that is sharded over ranks, or a wrapper around several.
    """
    outer = optimizer
    while True:
        if not isinstance(optimizer, Optimizer):
            raise UserError(f"{type(optimizer).__name__} is no torch.optim.Optimizer; give the optimizer itself")
        if any(kind.__name__ == _SHARDED for kind in type(optimizer).__mro__):
            raise UserError(
                f"{_SHARDED} keeps the state of each weight on one rank only, where a mask that changes cannot reach "
                "it; give every rank a plain optimizer (AdamW, …)"
            )
        inside = _inside(optimizer)
        if not inside:
            return optimizer
        if len(inside) > 1:
            names = ", ".join(f"optimizer.{name.lstrip('_')}" for name in inside)
            raise UserError(
                f"optimizer {type(outer).__name__} wraps several optimizers; give them instead of it, for example "
                f"step({names})"
            )
        optimizer = next(iter(inside.values()))


def _check_wrappers(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Raise `UserError` if a wrapper has a state of its own for ``parameter`` that no update would move."""
    while inside := _inside(optimizer):
        name, inner = next(iter(inside.items()))
        own = optimizer.state.get(parameter)
        if own and own is not inner.state.get(parameter):
            raise UserError(
                f"optimizer {type(optimizer).__name__} wraps {type(inner).__name__} and keeps a state of its own "
                f"({', '.join(map(str, own))}), which cannot follow a mask; give the inner one (optimizer."
                f"{name.lstrip('_')}) if that state may be lost, or another optimizer"
            )
        optimizer = inner


def holder(optimizers: Iterable[Optimizer], parameter: nn.Parameter) -> Optimizer | None:
    """Return the optimizer, one without wrappers, that holds ``parameter``; None if none does.

    Raises:
        UserError: as `innermost`; or a wrapper that keeps a state of its own for it.
    """
    for optimizer in optimizers:
        inner = innermost(optimizer)
        if any(parameter is held for group in inner.param_groups for held in group["params"]):
            _check_wrappers(optimizer, parameter)
            return inner
    return None


def check_optimizer(optimizer: Optimizer | Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise `UserError` if the state of an optimizer, or of several, could not follow a change of ``parameters``.

    That is so for an optimizer of unknown kind, and where none holds a parameter, because it was built before the
    layers were made sparse, or because another optimizer holds it.
    """
    several = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    kinds = tuple(_ELEMENTWISE)
    for inner in map(innermost, several):
        if not isinstance(inner, kinds) and (len(several) == 1 or _holds_any(inner, parameters.values())):
            known = ", ".join(sorted(kind.__name__ for kind in _ELEMENTWISE))
            raise UserError(
                f"optimizer {type(inner).__name__} is not known to keep one number per weight; known are {known}; "
                "register_elementwise_optimizer(kind) adds one, and of a wrapper give the optimizer inside"
            )
    for name, parameter in parameters.items():
        if holder(several, parameter) is None:
            raise UserError(_not_held(name, len(several)))


def _not_held(name: str, count: int) -> str:
    who = "the optimizer does not hold" if count == 1 else f"none of the {count} optimizers holds"
    return (
        f"{who} {name}: build MaskManager(model, rule) first, and the optimizer from the parameters that the model "
        "then has; where several optimizers hold the layers, give all of them: step(one, another); a layer that is "
        "not trained is frozen by requires_grad_(False)"
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
# When each optimizer took its last step, by that clock, and what a gradient scaler had found then.
_last_step: weakref.WeakKeyDictionary[Optimizer, tuple[int, Tensor | None]] = weakref.WeakKeyDictionary()
_noting = False


def _note_step(optimizer: Optimizer, _args: object, _kwargs: object) -> None:
    if not torch.compiler.is_compiling():
        _last_step[optimizer] = next(_clock), getattr(optimizer, "found_inf", None)


def note_steps() -> int:
    """Note the steps of all optimizers from now on, and return the time."""
    global _noting
    if not _noting:
        register_optimizer_step_post_hook(_note_step)
        _noting = True
    return next(_clock)


class StepWatch:
    """Says whether optimizers have taken a step since it was asked last.

    A hook that torch calls after each ``step`` tells it. It does not fire inside ``torch.compile``: then the versions
    of what the step writes tell it, those of the state, or of the weights where an optimizer has no state. A fused
    optimizer under a gradient scaler runs its step although it changes nothing: what the scaler found decides.

    Args:
        optimizers: without wrappers. parameters: theirs that are watched.
        since: steps that were taken after this time (`note_steps`) count at the first call of `took`.
        before: whether this is built before the steps that it is asked about, and not between a step and the question.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], parameters: Iterable[nn.Parameter], since: int, before: bool
    ) -> None:
        watched = list(parameters)
        pairs = [(optimizer, [p for p in watched if _holds_any(optimizer, [p])]) for optimizer in optimizers]
        # An optimizer of other weights says nothing about these.
        pairs = [pair for pair in pairs if pair[1]] or pairs
        self._watched = [(weakref.ref(optimizer), parameters) for optimizer, parameters in pairs]
        self._since = since
        self._versions = [_versions(*pair) if before else None for pair in pairs]

    def took(self) -> bool:
        """Whether all of the optimizers have taken a step since the last call.

        All, since the weights of one that a scaler holds back while others step must not be ranked.
        """
        since, self._since = self._since, next(_clock)
        answers = []
        for index, (reference, parameters) in enumerate(self._watched):
            optimizer = reference()
            if optimizer is None:  # it stepped, if ever, before it was replaced by another one
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
        """Take the tensors as they are now for unchanged, after an update has replaced them."""
        for index, (reference, parameters) in enumerate(self._watched):
            optimizer = reference()
            if optimizer is not None and self._versions[index] is not None:
                self._versions[index] = _versions(optimizer, parameters)


_Versions: TypeAlias = dict[tuple[int, str], tuple[int, int]]


def _versions(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> _Versions:
    """Return identity and version of the state's tensors, and of each parameter that has none."""
    found = {}
    for parameter in parameters:
        state = {key: value for key, value in optimizer.state.get(parameter, {}).items() if isinstance(value, Tensor)}
        for key, tensor in (state or {"": parameter}).items():
            found[id(parameter), str(key)] = id(tensor), tensor._version
    return found


def _stepped(before: _Versions | None, after: _Versions, hooked: bool) -> bool:
    """Whether a step that no hook saw explains ``after``; ``hooked``: whether one of the optimizer's was ever seen."""
    if before is None:
        # The first question. Only a compiled step leaves a state without having been seen.
        return not hooked and any(key for _, key in after)
    for place, (identity, version) in after.items():
        if place not in before:
            if not hooked:
                return True
        # Others write into weights too; into an optimizer's state nobody else does. (Loading replaces its tensors.)
        elif before[place][0] == identity and before[place][1] != version and (place[1] or not hooked):
            return True
    return False
