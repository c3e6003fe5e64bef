"""The initial gain of a norm, for any class of norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsetrain.errors import UserError
from sparsetrain.parameterization.roles import TORCH_NORMS, is_constant


def starting_gain(name: str, module: nn.Module, parameter: nn.Parameter) -> float | None:
    """Return the value to initialise a norm's gain with, or None if the gain still has its initial value.

    A gain whose elements are all equal is untrained: 1, or 0 in a norm that multiplies by 1 + weight, or any other
    value of its author. A trained gain is reset to the value at which the norm multiplies by 1. For a class that is not
    torch's, calling the module shows which value that is.

    Raises:
        UserError: the gain was trained, and calling the module does not show how the gain acts.
    """
    if is_constant(parameter):
        return None
    if is_norm_of_torch(module):
        return 1.0
    if parameter.ndim == 1:
        outputs = [_with_gain(module, parameter, value) for value in (0.0, 1.0)]
        zero, one = (float("nan") if output is None else output for output in outputs)
        if zero <= 0.01 * one:
            return 1.0
        if abs(one - 2.0 * zero) <= 0.01 * one:  # gains 1 and 2
            return 0.0
    raise UserError(
        f"parameter '{name}' ({type(module).__name__}) was trained already, and its initial gain is unknown; "
        f"pass roles={{'{name}': 'keep'}} to keep its values"
    )


def is_norm_of_torch(module: nn.Module) -> bool:
    """Whether a module is one of torch's norms, or of ours, and not a subclass that computes something else."""
    # Those of `sparsetrain.models.norm` compute what torch's do; this room lies below that one.
    computes = type(module).forward.__module__
    return isinstance(module, TORCH_NORMS) and computes.startswith(("torch.nn.", "sparsetrain.models.norm"))


def _with_gain(module: nn.Module, parameter: nn.Parameter, value: float) -> float | None:
    """Return the RMS of a module's output without its bias for a constant gain, or None if it cannot be called.

    Inputs are normal; a second input, the gate of a gated norm, is constant.
    """
    draws = torch.Generator().manual_seed(0)
    x = torch.empty(4, parameter.shape[0]).normal_(generator=draws).to(parameter)
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(value)
        try:
            output, bias = _call(module, x), _call(module, torch.zeros_like(x))
        finally:
            parameter.copy_(before)
    if output is None or bias is None:
        return None
    return (output - bias).double().square().mean().sqrt().item()


def _call(module: nn.Module, x: Tensor) -> Tensor | None:
    for inputs in ((x,), (x, torch.ones_like(x))):
        try:
            output = module.forward(*inputs)
        except (TypeError, AttributeError, RuntimeError, ValueError):
            continue  # it needs other inputs
        if isinstance(output, Tensor):
            return output
    return None
