"""`parameterize`: find roles, widths and depth of any model, draw initial values, and attach forward multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from torch import nn

from sparsetrain import seeds, wrappers
from sparsetrain.errors import UserError
from sparsetrain.parameterization import scales
from sparsetrain.parameterization.anatomy import Anatomy, examine
from sparsetrain.parameterization.depth import count_layers
from sparsetrain.parameterization.groups import assign
from sparsetrain.parameterization.heads import warn_of_head_widths
from sparsetrain.parameterization.initial import initialise
from sparsetrain.parameterization.probe import check_pre_norm
from sparsetrain.parameterization.roles import EMBEDDING_TYPES, MATRIX_TYPES, Place
from sparsetrain.parameterization.rules import MATRICES, Parameterization, Role
from sparsetrain.parameterization.widths import Base
from sparsetrain.sparsity import SparseLinear
from sparsetrain.sparsity.layers.surgery import is_conv1d

DEFAULT_SIGMA = 0.02
Model = TypeVar("Model", bound=nn.Module)


@runtime_checkable
class AppliesRules(Protocol):
    """A model, such as `sparsetrain.Transformer`, that knows its roles and applies the multipliers itself."""

    def parameterize(
        self, rules: Parameterization, sigma: float | None, seed: int | None, reinitialise: bool
    ) -> nn.Module: ...


@dataclass(frozen=True)
class Multiplier:
    """A factor for the output of a module, or for its first input."""

    module: nn.Module
    factor: float
    on_input: bool = False


def parameterize(
    model: Model,
    rules: Parameterization,
    base: nn.Module | None = None,
    *,
    roles: Mapping[str, Role | str] | None = None,
    sigma: float | None = None,
    n_layers: int | None = None,
    seed: int | None = None,
    reinitialise: bool = True,
    fan_in: Mapping[str, int] | None = None,
) -> Model:
    """Apply a parameterization to any ``nn.Module``: initial values, forward multipliers, optimizer roles.

    Call it after `sparsify`. Roles follow from module types and from the names of common architectures; ``roles`` adds
    to them. The multipliers alpha_in, alpha_out / m_d and m_L^(-alpha) become forward hooks on the embeddings, the head
    and the ends of the residual branches. If a model's own code multiplies its embeddings or logits by a power of its
    width (Gemma, T5), the hooks reduce that to the factor of the base. The attention scale stays the model's own: it is
    a constant if d_head is the same at every width, and a warning is given if d_head differs from the base's.

    Args:
        model: changed in place. Wrappers (``torch.compile``, DDP) around it or its modules do not matter.
        base: the same architecture at the base width (and any density), to compute m_d; required by all rules except
            SP. It may have fewer blocks: each block of the model is compared with one of the same structure.
        roles: glob over names of modules and parameters -> role; checked before the built-in names, first match wins.
            A glob that matches a module gives the module's biases a bias role; one that matches a parameter gives it
            exactly that role. ``keep`` leaves the values unchanged, as in ``{"*.A_log": "keep"}``.
        sigma: base standard deviation; None means 0.02.
        n_layers: number of residual blocks that a token passes. By default they are counted, and compared with the
            model's own configuration if it has one.
        seed: seed of the initial values; None draws it from torch's global generator.
        reinitialise: False keeps the weights, for example to fine-tune.
        fan_in: glob over parameter names -> the dimension that counts inputs, for stacks of matrices whose layout is
            unknown.

    Returns:
        ``model``.

    Raises:
        UserError: a parameter has no role; the base lacks a module, is wider than the model or does not have the rules'
            base width; a role names no module; the number of blocks is unclear; or a multiplier cannot be applied. The
            model is then unchanged.
    """
    bare = wrappers.unwrap(model)
    if isinstance(bare, AppliesRules):
        bare.parameterize(rules, sigma, seed, reinitialise)
        return model
    if rules.uses_width and base is None:
        raise UserError(f"parameterize: {rules.scheme} needs base=, the same model at the base width")
    if n_layers is not None and (isinstance(n_layers, bool) or not isinstance(n_layers, int) or n_layers < 1):
        raise UserError(f"parameterize: n_layers={n_layers!r} is not a positive integer")
    if sigma is not None and not sigma > 0:
        raise UserError(f"parameterize: sigma={sigma} must be above 0")
    own = examine(bare, roles or {})
    widths = Base(base, own, rules, roles or {}, fan_in or {})
    traits_of = {name: widths.traits(tied) for name, tied in own.tied.items()}
    depth = _depth(bare, own, rules, n_layers, reinitialise)
    multipliers = _multipliers(bare, base, own, widths, rules, depth)
    if reinitialise:
        initialise(bare, traits_of, rules, DEFAULT_SIGMA if sigma is None else sigma, depth, seeds.resolve_seed(seed))
    else:
        assign(bare, traits_of, rules, depth)
    if base is not None and rules.uses_width:
        warn_of_head_widths(bare, base, rules)
    scales.remove_scales(bare)
    for multiplier in multipliers:
        scale = scales.scale_input if multiplier.on_input else scales.scale_output
        scale(multiplier.module, multiplier.factor)
    return model


def _depth(model: nn.Module, own: Anatomy, rules: Parameterization, said: int | None, reinitialise: bool) -> int:
    """Return the number of residual blocks.

    Raises:
        UserError: the number is unclear, and the rules or the initial values depend on it.
    """
    if said is not None:
        return said
    stack = {_numbered(place.module_name) for place in own.with_role(*MATRICES)} - {None}
    depth, doubt = count_layers(model, own.blocks, len(stack))
    ends = bool(own.with_role(Role.OUTPUT))
    if doubt and (rules.uses_depth or (reinitialise and ends and rules.output_rule == "shrunk" and own.blocks.lists)):
        raise UserError(
            f"parameterize: the number of residual blocks of {type(model).__name__} is unclear: {doubt}; pass n_layers="
        )
    return depth


def _numbered(name: str) -> str | None:
    """Return a module's name up to its first number, which identifies a layer in a stack without blocks."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return None if first is None else ".".join(parts[: first + 1])


def _multipliers(
    model: nn.Module, base: nn.Module | None, own: Anatomy, widths: Base, rules: Parameterization, depth: int
) -> list[Multiplier]:
    """Return all forward multipliers with their modules.

    Raises:
        UserError: no hook can apply one of them.
    """
    found = [*_of_embeddings(model, base, own, widths, rules), *_of_heads(model, base, own, widths, rules)]
    factor = rules.residual_multiplier(depth)
    if factor != 1.0:
        ends = scales.branch_ends(model, own.with_role(Role.OUTPUT), own.blocks)
        check_pre_norm(model, own.blocks, ends)
        found += [Multiplier(module, factor) for module in ends.values()]
    return found


def _of_embeddings(
    model: nn.Module, base: nn.Module | None, own: Anatomy, widths: Base, rules: Parameterization
) -> list[Multiplier]:
    modules = dict(wrappers.named_modules(model))
    theirs = dict(wrappers.named_modules(base)) if base is not None else {}
    alpha_in = rules.embedding_multiplier()
    factors: dict[str, float] = {}
    for place in own.with_role(Role.EMBEDDING, Role.POSITION):
        name = place.module_name
        if not _is_layer(place):
            scales.check_reachable(place, alpha_in, "alpha_in")
            continue
        other = widths.counterpart(place)
        grown = 1.0
        if rules.uses_width and other is not None:
            # Under muP the output of an embedding must not grow with the width.
            grown = scales.embedding_factor(name, modules) / scales.embedding_factor(other.module_name, theirs)
            if widths.m_d(place) != 1.0:
                scales.check_no_root_of_width(name, modules, rules.scheme)
        norm = scales.embedding_norm(name, modules)
        factors[name] = (alpha_in if norm is None else 1.0) / grown
        if factors[name] != 1.0:
            parent, _, child = name.rpartition(".")
            scales.check_called(name, modules.get(parent), child, "alpha_in")
        if norm is not None:
            factors[norm] = alpha_in
    return [Multiplier(modules[name], factor) for name, factor in factors.items() if factor != 1.0]


def _of_heads(
    model: nn.Module, base: nn.Module | None, own: Anatomy, widths: Base, rules: Parameterization
) -> list[Multiplier]:
    found, modules = [], dict(wrappers.named_modules(model))
    heads = [place for place in own.with_role(Role.HEAD) if not place.is_bias]
    for place in heads:
        factor = rules.logit_multiplier(widths.m_d(place))
        if rules.uses_width and base is not None:
            factor *= scales.logit_factor(base) / scales.logit_factor(model)
        if not _is_layer(place):
            scales.check_reachable(place, factor, "alpha_out / m_d")
        elif factor != 1.0:
            parent, _, child = place.module_name.rpartition(".")
            scales.check_called(place.module_name, modules.get(parent), child, "alpha_out / m_d")
            found.append(Multiplier(place.module, factor, on_input=True))
    if not heads:
        _check_no_hidden_head(own, widths, rules, modules)
    return found


def _check_no_hidden_head(
    own: Anatomy, widths: Base, rules: Parameterization, modules: Mapping[str, nn.Module]
) -> None:
    """Raise `UserError` if a model without a head multiplies by the weight of its embedding in its own code."""
    for place in own.with_role(Role.EMBEDDING):
        parent, _, child = place.module_name.rpartition(".")
        if scales.reads_weight(modules.get(parent), child) and rules.logit_multiplier(widths.m_d(place)) != 1.0:
            raise UserError(
                f"parameterize: alpha_out / m_d cannot reach the logits: {type(modules[parent]).__name__} multiplies "
                f"by the weight of '{place.module_name}' itself; make the head a layer (nn.Linear) that shares it"
            )


def _is_layer(place: Place) -> bool:
    """Whether a module computes its output from a single matrix."""
    return isinstance(place.module, (*MATRIX_TYPES, *EMBEDDING_TYPES, SparseLinear)) or is_conv1d(place.module)
