"""Settings that follow from others, for configurations of experiments: ``${heads:32}``, ``${draw:lr,1e-4,1e-1}``, ...

=========================  ============================================================================================
``${heads:WIDTH}``         number of heads of this width at the configured ``model.d_model``
``${base_width:WIDTH}``    WIDTH, at which hyperparameters were tuned, or ``model.d_model`` where the model is narrower:
                           it is then its own base
``${aspect:RATIO}``        width of a model with RATIO times as many features as layers
``${iso_sparsity:D}``      sparsity at which hidden matrices have as many weights as the dense ones of width D:
                           1 - (D / d_model)^2
``${draw:NAME,LOW,HIGH}``  point number ``draw`` of a random search: log-uniform in [LOW, HIGH], to three digits. A
                           function of ``draw`` and NAME alone, so that the list of points is the same in every
                           process, can be cut into parts, and grows without changing
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
        raise UserError(f"model.d_model={d_model} is no multiple of the width of a head, {width}")
    return int(d_model // width)


def base_width(width: int, *, _root_: DictConfig) -> int:
    """Return the smaller of ``width`` and ``model.d_model``."""
    d_model = OmegaConf.select(_root_, "model.d_model")
    return width if d_model is None else min(width, int(d_model))


def aspect(ratio: int, *, _root_: DictConfig) -> int:
    """Return ``ratio * model.n_layers``."""
    return int(ratio * _root_.model.n_layers)


def iso_sparsity(base_width: int, *, _root_: DictConfig) -> float:
    """Return the sparsity at which ``d_model^2 (1 - sparsity) = base_width^2``."""
    d_model = _root_.model.d_model
    if not 0 < base_width <= d_model:
        raise UserError(f"model.d_model={d_model} is narrower than the {base_width} that it is to have the weights of")
    return 1.0 - (base_width / d_model) ** 2


def draw(name: str, low: float, high: float, *, _root_: DictConfig) -> float:
    """Return the setting ``name`` of point ``draw``."""
    number = _root_.draw
    if number is None or number < 0:
        raise UserError(f"draw={number}: a point of a random search has a number, draw=0 or above")
    if not 0 < low < high:
        raise UserError(f"draw:{name},{low},{high} needs two ends above 0, the smaller first")
    share = derive_seed(number, "search", name) / 2**63
    return float(f"{low * (high / low) ** share:.3g}")


def _checked(resolver: Callable[..., Any]) -> Callable[..., Any]:
    """Have wrong arguments of a resolver refused in words."""

    @functools.wraps(resolver)
    def call(*arguments: Any, _root_: DictConfig) -> Any:
        said = f"${{{resolver.__name__}:{','.join(map(str, arguments))}}}"
        try:
            return resolver(*arguments, _root_=_root_)
        except UserError:
            raise
        except (TypeError, ValueError, ArithmeticError) as error:
            names = ",".join(name for name in inspect.signature(resolver).parameters if name != "_root_")
            raise UserError(
                f"{said}: it must be ${{{resolver.__name__}:{names.upper()}}} of numbers ({error})"
            ) from None

    return call


@functools.cache
def register_resolvers() -> None:
    """Make the resolvers known to OmegaConf."""
    for resolver in (heads, base_width, aspect, iso_sparsity, draw):
        OmegaConf.register_new_resolver(resolver.__name__, _checked(resolver), replace=True)
