"""Resolvers: settings computed from others in the files of experiments, such as ``${heads:32}``.

=========================  ============================================================================================
``${heads:WIDTH}``         number of heads of this width at the configured ``model.d_model``
``${base_width:WIDTH}``    the smaller of WIDTH, at which hyperparameters were tuned, and ``model.d_model``: a narrower
                           model is its own base
``${aspect:RATIO}``        width of a model with RATIO times as many features as layers
``${iso_sparsity:D}``      sparsity at which hidden matrices have as many weights as dense ones of width D:
                           1 - (D / d_model)^2
``${longer:FACTOR}``        FACTOR times ``data.context``, for the context of a phase
``${fewer:FACTOR}``         the batch size whose steps have as many tokens as the run's at FACTOR times the context:
                           ``budget.batch_size`` / FACTOR
``${draw:NAME,LOW,HIGH}``  value of NAME at point ``draw`` of a random search: log-uniform in [LOW, HIGH], to three
                           digits. It depends on ``draw`` and NAME alone: every process computes the same list of
                           points, which can be split between processes and extended without changing
=========================  ============================================================================================
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparsetrain.errors import UserError
from sparsetrain.seeds import derive_seed


def heads(width: int, *, _root_: DictConfig) -> int:
    """Return ``model.d_model / width``."""
    d_model = _root_.model.d_model
    if width < 1 or d_model % width:
        raise UserError(f"model.d_model={d_model} is not a multiple of the head width {width}")
    return int(d_model // width)


def base_width(width: int, *, _root_: DictConfig) -> int:
    """Return the smaller of ``width`` and ``model.d_model``."""
    d_model = OmegaConf.select(_root_, "model.d_model")
    return width if d_model is None else min(width, int(d_model))


def aspect(ratio: int, *, _root_: DictConfig) -> int:
    """Return ``ratio * model.n_layers``."""
    return int(ratio * _root_.model.n_layers)


def iso_sparsity(base_width: int, *, _root_: DictConfig) -> float:
    """Return the sparsity for which ``d_model^2 (1 - sparsity) = base_width^2``."""
    d_model = _root_.model.d_model
    if not 0 < base_width <= d_model:
        raise UserError(f"iso_sparsity:{base_width}: the dense width must be from 1 to model.d_model={d_model}")
    return 1.0 - (base_width / d_model) ** 2


def longer(factor: int, *, _root_: DictConfig) -> int:
    """Return ``factor * data.context``."""
    if factor < 1:
        raise UserError(f"longer:{factor}: the factor must be at least 1")
    return int(factor * _root_.data.context)


def fewer(factor: int, *, _root_: DictConfig) -> int:
    """Return ``budget.batch_size / factor``."""
    size = _root_.budget.batch_size
    if not isinstance(size, int) or factor < 1 or size % factor:
        raise UserError(
            f"budget.batch_size={size} must be a number that {factor} divides: a phase has {factor} times fewer"
        )
    return size // factor


def draw(name: str, low: float, high: float, *, _root_: DictConfig) -> float:
    """Return the value of the setting ``name`` at point ``draw`` of a random search."""
    number = _root_.draw
    if number is None or number < 0:
        raise UserError(f"draw={number}: give the number of the point of the random search, 0 or more")
    if not 0 < low < high:
        raise UserError(f"draw:{name},{low},{high}: it needs 0 < LOW < HIGH")
    share = derive_seed(number, "search", name) / 2**63
    return float(f"{low * (high / low) ** share:.3g}")


def _checked(resolver: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a resolver so that wrong arguments raise `UserError`."""

    @functools.wraps(resolver)
    def call(*arguments: Any, _root_: DictConfig) -> Any:
        said = f"${{{resolver.__name__}:{','.join(map(str, arguments))}}}"
        try:
            return resolver(*arguments, _root_=_root_)
        except UserError:
            raise
        except (TypeError, ValueError, ArithmeticError) as error:
            names = ",".join(name for name in inspect.signature(resolver).parameters if name != "_root_")
            raise UserError(f"{said}: write ${{{resolver.__name__}:{names.upper()}}} with numbers ({error})") from None

    return call


@functools.cache
def register_resolvers() -> None:
    """Register the resolvers with OmegaConf."""
    for resolver in (heads, base_width, aspect, iso_sparsity, longer, fewer, draw):
        OmegaConf.register_new_resolver(resolver.__name__, _checked(resolver), replace=True)
