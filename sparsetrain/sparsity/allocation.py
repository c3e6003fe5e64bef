"""How sparse each layer is: one number for all, or by name, first match wins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from sparsetrain.errors import UserError, check_choice
from sparsetrain.sparsity.init import PATTERNS, check_sparsity


@dataclass
class SparsityGroup:
    """The layers whose qualified name matches the glob ``match``, and their sparsity (0 keeps them dense)."""

    match: str
    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, f"sparsity of group '{self.match}'")


@dataclass
class SparsityConfig:
    """Which linear layers are sparse, how sparse, in what pattern.

    A layer takes part when its qualified name matches a glob of ``include`` and none of ``exclude``; its sparsity is
    that of the first matching entry of ``groups``, else ``sparsity``. Embeddings, norms and biases are no linear
    layers and stay dense; the head is left out by the default of ``exclude``.
    """

    sparsity: float = 0.0
    pattern: str = "random"
    groups: list[SparsityGroup] = field(default_factory=list)
    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=lambda: ["*head*", "*embed*"])
    backend: str = "auto"
    seed: int | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise UserError(f"{name}={getattr(self, name)!r} must be a list of globs, such as ['*attn*']")
        check_choice("sparsity.pattern", self.pattern, PATTERNS)


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether ``name`` matches any of the shell-style ``globs`` (``*`` also crosses dots)."""
    return any(fnmatchcase(name, glob) for glob in globs)


def allocate(names: Iterable[str], config: SparsityConfig) -> dict[str, float]:
    """Return the sparsity of each layer that takes part, by name; layers that stay dense are left out.

    Raises:
        UserError: an ``include`` glob that matches no layer; a group that no layer takes its sparsity from, which is
            a misspelt glob or one shadowed by an earlier group; or nothing to make sparse although ``sparsity`` is
            above 0.
    """
    names = list(names)
    if config.sparsity > 0.0 or config.groups:
        for glob in config.include:
            if not any(fnmatchcase(name, glob) for name in names):
                raise UserError(f"sparsity include '{glob}' matches no linear layer; layers: {_some(names)}")
    candidates = [name for name in names if matches(name, config.include) and not matches(name, config.exclude)]
    used: set[int] = set()
    result: dict[str, float] = {}
    for name in candidates:
        sparsity = config.sparsity
        for index, group in enumerate(config.groups):
            if fnmatchcase(name, group.match):
                sparsity = group.sparsity
                used.add(index)
                break
        if sparsity > 0.0:
            result[name] = sparsity
    for index, group in enumerate(config.groups):
        if index not in used:
            shadowed = any(fnmatchcase(name, group.match) for name in candidates)
            why = " (earlier groups take all that it matches)" if shadowed else ""
            raise UserError(f"sparsity group '{group.match}' applies to no layer{why}; layers: {_some(candidates)}")
    if config.sparsity > 0.0 and not candidates:
        raise UserError(
            f"sparsity={config.sparsity}: no linear layer matches include={config.include} and not "
            f"exclude={config.exclude}"
        )
    return result


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "none"
