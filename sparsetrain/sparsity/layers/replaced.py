"""Detects an optimizer that was built before layers were replaced: its steps do not train the new layers."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from sparsetrain import wrappers
from sparsetrain.errors import UserError


class StaleOptimizerWarning(UserError, UserWarning):
    """An optimizer holds parameters that `sparsify` or `densify` replaced, and not their successors.

    It is a warning. If warnings are turned into errors, it is caught like the other errors of the library.
    """


# old parameter -> its name, and its successors. No parameter is kept alive.
_successors = WeakTensorKeyDictionary()
# optimizer -> the number of replacements at its last check that found nothing, or that warned.
_judged: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
_replacements = 0


def note_replacement(name: str, old: nn.Module, new: nn.Module) -> None:
    """Record that ``new`` replaced ``old``; from now on optimizers are checked for which of the two they hold."""
    former = list(old.parameters())
    for key, parameter in old._parameters.items():
        successor = new._parameters.get(key)
        if successor is None and key in ("weight", "values"):
            successor = new._parameters.get("values" if key == "weight" else "weight")
        # Otherwise the old matrix was cut into several layers.
        successors = [successor] if successor is not None else list(new.parameters())
        if parameter is not None and all(parameter is not one for one in successors):
            note_successors(
                f"{name}.{key}", parameter, [one for one in successors if all(one is not p for p in former)]
            )


def note_successors(name: str, parameter: nn.Parameter, successors: Iterable[nn.Parameter]) -> None:
    """Record the parameters that replaced the parameter called ``name``."""
    global _replacements
    if _replacements == 0:
        register_optimizer_step_pre_hook(_judge)
    _replacements += 1
    _successors[parameter] = name, tuple(weakref.ref(one) for one in successors)
    parameter.grad = None  # a gradient from now on shows that the old parameter is still trained


def _judge(optimizer: Optimizer, _args: object, _kwargs: object) -> None:
    if torch.compiler.is_compiling() or _judged.get(optimizer) == _replacements:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = {id(parameter) for parameter in parameters}
    lost, open_ = [], False
    for parameter in parameters:
        name, references = _successors.get(parameter, (None, ()))
        successors = [one for reference in references if (one := reference()) is not None]
        if not successors or any(id(one) in held for one in successors):
            continue
        # The case is certain only if the successor is trained and the old one is not: a user may train both models.
        if parameter.grad is None and any(one.grad is not None for one in successors):
            lost.append(name)
        else:
            open_ = True
    if lost:
        _judged[optimizer] = _replacements
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        warnings.warn(
            StaleOptimizerWarning(
                f"the optimizer {type(optimizer).__name__} was built before layers were replaced (sparsify, densify, "
                f"MaskManager): it holds the old {', '.join(lost[:3])}{more}, and does not train the new ones; build "
                "the optimizer afterwards"
            ),
            stacklevel=3,
        )
    elif not open_:
        _judged[optimizer] = _replacements


wrappers.on_replacement.append(note_replacement)
