"""How many weights each layer gets: one density for all, by shape (ERK), by name, or from a budget."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sparsetrain.errors import UserError
from sparsetrain.sparsity.config import SparsityConfig, SparsityGroup
from sparsetrain.sparsity.evolution.base import Rule
from sparsetrain.sparsity.layers.names import default_reason
from sparsetrain.sparsity.patterns.select import largest_remainder
from sparsetrain.sparsity.patterns.spec import PatternSpec

__all__ = ["SparsityConfig", "SparsityGroup", "allocate", "allocate_densities", "matches"]

Shape = tuple[int, int]
Groups = Mapping[str, SparsityGroup | None]
"""The layers that take part by name, each with the group that gives its sparsity, or None."""


@dataclass(frozen=True)
class LayerAllocation:
    """How dense a layer is and in what pattern.

    Args:
        density: the allocated density, in (0, 1).
        start: the density at step 0, in (0, 1]; masks that evolve may begin denser than what is allocated.
        spec: the kind of pattern.
    """

    density: float
    start: float
    spec: PatternSpec


def allocate_layers(
    shapes: Mapping[str, Shape],
    config: SparsityConfig,
    rule: Rule | None = None,
    *,
    groups: Groups | None = None,
) -> dict[str, LayerAllocation]:
    """Return the allocation of each layer that is sparse at some time; layers that are always dense are left out.

    Args:
        shapes: qualified name -> (out_features, in_features) of every linear layer of the model.
        rule: how masks evolve; None takes the rule of ``config.evolution``.
        groups: as `match_groups` returns them; None decides by the names alone.

    Raises:
        UserError: as `allocate_densities`.
    """
    groups = match_groups(shapes, config) if groups is None else groups
    densities = {
        name: density for name, density in _densities(shapes, config, groups, None, None).items() if density < 1.0
    }
    if rule is None and densities:
        rule = config.evolution.build(None, config.sparsity)  # with fractions of the training, which begins at 0
    found = {}
    for name, density in densities.items():
        group = groups[name]
        start = density if rule is None else rule.layer_density(density, 0)
        found[name] = LayerAllocation(density, start, config.spec(None if group is None else group.pattern))
    return found


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether ``name`` matches any of the shell-style ``globs`` (``*`` also crosses dots)."""
    return any(fnmatchcase(name, glob) for glob in globs)


def allocate(names: Iterable[str], config: SparsityConfig) -> dict[str, float]:
    """Return the sparsity that names and groups give each layer; layers that stay dense are left out.

    Raises:
        UserError: an ``include`` glob that matches no layer; a group without layers, whose glob is misspelt or shadowed
            by an earlier group; or nothing to make sparse although ``sparsity`` is above 0.
    """
    groups = match_groups(names, config)
    sparsities = {name: config.sparsity if group is None else group.sparsity for name, group in groups.items()}
    return {name: sparsity for name, sparsity in sparsities.items() if sparsity > 0.0}


def match_groups(
    names: Iterable[str], config: SparsityConfig, kept: Collection[str] | None = None
) -> dict[str, SparsityGroup | None]:
    """Return the layers that take part and the group of each, None for a layer without a group.

    Args:
        kept: the layers that the default of ``exclude`` keeps dense; None decides by the names alone.

    Raises:
        UserError: as `allocate`.
    """
    names = list(names)
    if config.is_sparse:
        for glob in config.include:
            if not any(fnmatchcase(name, glob) for name in names):
                raise UserError(f"sparsity include '{glob}' matches no linear layer; layers: {_some(names)}")
    if not config.excludes_by_default:
        kept = [name for name in names if matches(name, config.exclude)]
    elif kept is None:
        kept = [name for name in names if default_reason(name, names) is not None]
    left_out = set(kept)
    candidates = [name for name in names if matches(name, config.include) and name not in left_out]
    used: set[int] = set()
    result: dict[str, SparsityGroup | None] = {}
    for name in candidates:
        result[name] = None
        for index, group in enumerate(config.groups):
            if fnmatchcase(name, group.match):
                result[name] = group
                used.add(index)
                break
    for index, group in enumerate(config.groups):
        if index not in used:
            shadowed = any(fnmatchcase(name, group.match) for name in candidates)
            why = " (earlier groups take all layers that it matches)" if shadowed else ""
            raise UserError(f"sparsity group '{group.match}' applies to no layer{why}; layers: {_some(candidates)}")
    if (config.sparsity > 0.0 or config.nnz is not None) and not candidates:
        said = f"sparsity={config.sparsity}" if config.nnz is None else f"nnz={config.nnz}"
        line = f"{said}: no linear layer matches include={config.include} and not exclude={config.exclude}"
        heads = [name for name in names if matches(name, config.include)] if config.excludes_by_default else []
        # The default of exclude means more names than its globs show.
        raise UserError(f"{line}; exclude=[] takes {_some(heads)}, which stay dense by default" if heads else line)
    return result


def allocate_densities(
    shapes: Mapping[str, Shape],
    config: SparsityConfig,
    *,
    budget: float | None = None,
    weights: Mapping[str, float] | None = None,
    kept: Collection[str] | None = None,
) -> dict[str, float]:
    """Return the density of each layer that takes part; 1 for a layer that stays dense.

    ``round(density * R * C)`` is the exact number of weights of a layer. Under ``uniform`` with a sparsity, each layer
    is rounded on its own. Otherwise the total of the layers without a group is exact: ``round((1 - sparsity) *
    elements)``, or the rest of a budget, also where ERK clips layers at density 1.

    Args:
        shapes: qualified name -> (out_features, in_features) of every linear layer of the model.
        config: which layers take part, and how sparse they are.
        budget: in place of the sparsity or nnz of ``config``, the total cost of all layers that take part, in units of
            ``weights``; met from below, to within the cost of one weight.
        weights: the cost of one nonzero of each layer, for example its training FLOPs per token (6 for a layer that is
            used once per token); 1 by default.
        kept: as `match_groups` takes it.

    Raises:
        UserError: as `allocate`; a budget below one weight per layer, or above the cost of dense layers.
    """
    return _densities(shapes, config, match_groups(shapes, config, kept), budget, weights)


def _densities(
    shapes: Mapping[str, Shape],
    config: SparsityConfig,
    groups: Groups,
    budget: float | None,
    weights: Mapping[str, float] | None,
) -> dict[str, float]:
    numel = {name: shapes[name][0] * shapes[name][1] for name in groups}
    fixed = {name: 1.0 - group.sparsity for name, group in groups.items() if group is not None}
    free = [name for name in groups if name not in fixed]
    price = {name: 1.0 if weights is None else float(weights[name]) for name in groups}
    total = budget if budget is not None else config.nnz
    if total is None:
        if config.allocation == "uniform" or config.sparsity == 0.0 or not free:
            return {name: fixed.get(name, 1.0 - config.sparsity) for name in groups}
        total = round((1.0 - config.sparsity) * sum(numel[name] for name in free))
        price = dict.fromkeys(groups, 1.0)
    else:
        total -= sum(round(density * numel[name]) * price[name] for name, density in fixed.items())
    counts = _fill({name: shapes[name] for name in free}, config.allocation, total, price)
    return {name: fixed[name] if name in fixed else counts[name] / numel[name] for name in groups}


def _fill(shapes: Mapping[str, Shape], allocation: str, total: float, price: Mapping[str, float]) -> dict[str, int]:
    """Return the number of weights of each layer, whose cost adds up to ``total``."""
    names = list(shapes)
    numel = {name: shapes[name][0] * shapes[name][1] for name in names}
    least, most = sum(price[name] for name in names), sum(numel[name] * price[name] for name in names)
    if not least <= total <= most:
        raise UserError(
            f"sparsity: a budget of {total:g} for {len(names)} layers is out of reach; it must lie between {least:g} "
            f"(one weight a layer) and {most:g} (all dense)"
        )
    raw = {name: sum(shapes[name]) / numel[name] if allocation == "erk" else 1.0 for name in names}
    # Layers whose share would exceed the layer are dense, and the others share the rest (RigL, appendix B).
    full: set[str] = set()
    while True:
        left = total - sum(numel[name] * price[name] for name in full)
        rest = [name for name in names if name not in full]
        scale = left / sum(raw[name] * numel[name] * price[name] for name in rest) if rest else 0.0
        over = {name for name in rest if scale * raw[name] > 1.0}
        if not over:
            break
        full |= over
    # Each layer gets at least one weight.
    shares = [float(numel[n]) if n in full else max(1.0, scale * raw[n] * numel[n]) for n in names]
    limits = [numel[name] for name in names]
    if len(set(price.values())) <= 1:
        count = int(total / next(iter(price.values()), 1.0) + 1e-9)
        return dict(zip(names, _exact(shares, count, limits), strict=True))
    counts = {name: min(int(share), limit) for name, share, limit in zip(names, shares, limits, strict=True)}
    spent = sum(counts[name] * price[name] for name in names)
    # The remainder of rounding down buys single weights, in the most expensive layers first.
    for name in sorted(names, key=lambda name: (-price[name], name)):
        while spent + price[name] <= total + 1e-9 * total and counts[name] < numel[name]:
            counts[name] += 1
            spent += price[name]
    return counts


def _exact(shares: list[float], total: int, limits: list[int]) -> list[int]:
    """Return `largest_remainder`, after the largest layers have paid for the minimum of one weight per layer."""
    while sum(min(int(share), limit) for share, limit in zip(shares, limits, strict=True)) > total:
        largest = max(range(len(shares)), key=lambda index: shares[index])
        shares[largest] -= 1.0
    return largest_remainder(shares, total, limits)


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "none"
