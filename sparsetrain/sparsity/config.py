"""The section ``sparsity`` of a configuration: which layers are sparse, how sparse, in what pattern, by what rule."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any

from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.sparsity.evolution.base import RULES, Rule, in_steps, settings_of
from sparsetrain.sparsity.evolution.rules import VariableSparsity
from sparsetrain.sparsity.patterns.spec import PATTERNS, PatternSpec, check_sparsity, evolving_patterns

ALLOCATIONS = ("uniform", "erk")
DEFAULT_EXCLUDE = ("*head*", "*embed*")  # means heads, routers and embeddings; see `SparsityConfig`
STATIC = "static"
# Under static masks the section has these settings of `VariableSparsity`, which is what densities in the phases of the
# budget make of it.
_IN_PHASES = ("grow", "protect_rows", "grown_moments")
_PATH = "sparsity.evolution"


@dataclass
class SparsityGroup:
    """The layers whose qualified name matches the glob ``match``, and their sparsity (0 keeps them dense).

    Args:
        match: a glob over qualified names; its layers belong to the group.
        sparsity: fraction of zeros in each of these layers, in [0, 1).
        pattern: another pattern than that of the section; null takes the section's.
    """

    match: str
    sparsity: float
    pattern: str | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, f"sparsity of group '{self.match}'")


@dataclass(init=False)
class EvolutionConfig:
    """How masks change during pre-training; fine-tuning and prompts keep the masks that they start from.

    The section has the settings of its rule and no others, as ``EvolutionConfig("rigl", every=50)`` has those of
    `RigL`. Each registered rule, see `register_rule`, has a class of sections, which is derived from this one. Steps at
    which updates begin and end are given as fractions of the training. Under ``static`` masks the settings of other
    rules are left out, so that one setting serves a sweep over rules; ``grow``, ``protect_rows`` and
    ``grown_moments`` stay, for masks that follow densities in ``budget.phases``.

    Args:
        rule: the name of a rule: ``static`` (masks stay), ``set`` and ``rigl`` (the density stays, positions change),
            ``gmp`` (gradually sparser), ``vspdf`` (by ``phases``, which usually get denser), or a registered one.
        settings: by name, those of the rule; null takes the default.

    Raises:
        UserError: an unknown rule, a setting that the rule does not have, or a value that it refuses.
    """

    rule: str = STATIC

    def __new__(cls, rule: str = STATIC, **settings: Any) -> EvolutionConfig:
        return super().__new__(section_of(rule) if cls is EvolutionConfig else cls)

    def __init__(self, rule: str = STATIC, **settings: Any) -> None:
        kind, given = self.settle({"rule": rule, **settings})
        if kind is not type(self):
            raise UserError(f"{_PATH}: a section of rule={self.rule} cannot be one of rule={rule}")
        known = [entry.name for entry in fields(self)]
        for key in given:
            if key not in known:
                has = f"it has {', '.join(known[1:])}" if known[1:] else "it has none"
                raise UserError(f"{_PATH}.{key} is no setting of rule={rule}{nearest(key, known)}; {has}")
        for entry in fields(self):
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            setattr(self, entry.name, given.get(entry.name, default))
        self._check()

    @classmethod
    def settle(cls, values: Mapping[str, Any]) -> tuple[type[EvolutionConfig], dict[str, Any]]:
        """Return the class of the section that plain ``values`` describe, and the values that say something.

        A null says nothing, and neither does a setting of another rule under static masks. For an unknown rule the
        class is this one.
        """
        rule = values.get("rule", cls.rule)
        kind = section_of(rule) if isinstance(rule, str) and rule in RULES else EvolutionConfig
        given = {key: value for key, value in values.items() if value is not None}
        if rule == STATIC:
            # Phases say when masks change: beside masks that stay they are a mistake, and refused as no setting.
            given = {**of_rule(given), **({"phases": given["phases"]} if given.get("phases") else {})}
        return kind, given

    @classmethod
    def alternatives(cls) -> dict[str, type[EvolutionConfig]]:
        """Return the class of sections of each registered rule by its name."""
        return {name: section_of(name) for name in RULES}

    def build(self, total_steps: int | None, sparsity: float) -> Rule:
        """Return the rule for a training of ``total_steps``.

        Args:
            total_steps: None leaves fractions of the training in the place of steps.
            sparsity: that layers are allocated by; only some rules must know it.

        Raises:
            UserError: a value that the rule refuses.
        """
        kind = RULES[self.rule]
        values = {
            name: setting.convert(getattr(self, name), total_steps) for name, setting in settings_of(kind).items()
        }
        return kind(**values, **({"sparsity": sparsity} if kind.needs_sparsity else {}))

    def _check(self) -> None:
        kind = RULES[self.rule]
        for name, setting in settings_of(kind).items():
            value = getattr(self, name)
            if setting.convert is in_steps and (isinstance(value, bool) or not 0.0 <= value <= 1.0):
                raise UserError(f"{_PATH}.{name}={value} must lie in [0, 1]")
        try:
            self.build(None, sparsity=0.5)
        except UserError as error:
            text = str(error).removeprefix(f"{kind.__name__}: ")
            field_first = re.match(r"\w+", text)
            named = field_first is not None and field_first[0] in settings_of(kind)
            raise UserError(f"{_PATH}.{text}" if named else f"{_PATH}: {error}") from None


def section_of(rule: str) -> type[EvolutionConfig]:
    """Return the class of sections of a registered rule.

    Raises:
        UserError: an unknown rule.
    """
    kind: Any = RULES[rule]
    return _section(rule, kind)


@functools.cache
def _section(rule: str, kind: Any) -> type[EvolutionConfig]:
    settings = settings_of(kind)
    if rule == STATIC:
        phased = settings_of(VariableSparsity)
        settings |= {name: phased[name] for name in _IN_PHASES}
    members: list[Any] = [("rule", str, field(default=rule))]
    for name, setting in settings.items():
        default = setting.default
        if isinstance(default, list | tuple | dict):
            plain = list(default) if isinstance(default, tuple) else default
            members.append((name, setting.type, field(default_factory=functools.partial(copy.deepcopy, plain))))
        else:
            members.append((name, setting.type, field(default=default)))
    return make_dataclass(
        f"{kind.__name__}Section", members, bases=(EvolutionConfig,), init=False, namespace={"__doc__": kind.__doc__}
    )


def of_rule(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of a section of evolution without settings that only other rules have."""
    rule = values.get("rule", STATIC)
    if not isinstance(rule, str) or rule not in RULES:
        return dict(values)
    own = {entry.name for entry in fields(section_of(rule))}
    others = {name for other in RULES for name in settings_of(RULES[other])} - own
    return {key: value for key, value in values.items() if key not in others}


@dataclass
class SparsityConfig:
    """Which linear layers are sparse, how sparse, in what pattern, and how the masks change.

    A layer takes part if its qualified name matches a glob of ``include`` and no glob of ``exclude``. The first
    matching entry of ``groups`` gives its sparsity; without one, ``allocation`` and ``sparsity`` do. Embeddings, norms
    and biases are not linear layers and stay dense.

    The default of ``exclude`` means output heads, routers of experts and embeddings, whose names are in
    `sparsetrain.sparsity.layers.names`. It compares whole components at the end of a name: ``score``, ``classifier``
    and ``lm_head`` are heads, but the layer ``heads.0.key`` of an attention head is not. A layer that shares the weight
    of an embedding counts as a head. Any other list is a list of globs.

    Args:
        sparsity: fraction of zeros over the layers that no group takes, in [0, 1).
        nnz: in place of ``sparsity``: the number of weights of all layers that take part, layers of groups included.
        pattern: ``random``, ``balanced``, ``magnitude``, ``block``, ``nm``, ``banded``, ``checkerboard``, or one that
            `register_pattern` has added.
        block: rows and columns of a block, for ``block`` and ``magnitude``; see
            `sparsetrain.sparsity.patterns.spec.PatternSpec`.
        m: for ``nm``, the length of the groups of consecutive inputs.
        fan_out: for ``balanced``, whether each input gets the same number of outputs too.
        bands: rows and columns of equal bands, each of which gets the same share of the weights; for ``random``,
            ``block`` and ``magnitude``.
        options: further options of a registered pattern, by name.
        allocation: ``uniform`` gives every layer the same sparsity; ``erk`` gives a layer of R outputs and C inputs a
            density in proportion to (R + C) / (R C), as in RigL (arXiv 1911.11134).
        groups: layers with a sparsity of their own; the first match wins.
        include: globs over qualified names; a layer takes part if one matches.
        exclude: globs over qualified names; a layer stays dense if one matches.
        backend: ``auto`` or a registered backend.
        seed: of the masks; null takes the seed of the run.
        evolution: how masks change while the model is pre-trained.
    """

    sparsity: float = 0.0
    pattern: str = "random"
    groups: list[SparsityGroup] = field(default_factory=list)
    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=lambda: list(DEFAULT_EXCLUDE))
    backend: str = "auto"
    seed: int | None = None
    allocation: str = "uniform"
    nnz: int | None = None
    block: list[int] = field(default_factory=lambda: [1, 1])
    m: int = 4
    fan_out: bool = False
    bands: list[int] = field(default_factory=lambda: [1, 1])
    options: dict[str, Any] = field(default_factory=dict)
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise UserError(f"{name}={getattr(self, name)!r} must be a list of globs, such as ['*attn*']")
        check_choice("sparsity.allocation", self.allocation, ALLOCATIONS)
        if self.nnz is not None and (isinstance(self.nnz, bool) or self.nnz < 1):
            raise UserError(f"sparsity.nnz={self.nnz} must be at least 1")
        if self.nnz is not None and self.sparsity > 0.0:
            raise UserError(f"sparsity.nnz={self.nnz} and sparsity.sparsity={self.sparsity}: give one of them")
        self.spec()
        for group in self.groups:
            self.spec(group.pattern)
        patterns = {self.pattern, *(group.pattern or self.pattern for group in self.groups)}
        if self.evolution.rule != STATIC and not patterns.issubset(evolving_patterns()):
            lost = sorted(patterns.difference(evolving_patterns()))[0]
            raise UserError(
                f"sparsity.pattern={lost!r} would not outlast the first update of rule={self.evolution.rule}; "
                f"masks that evolve begin as one of {', '.join(evolving_patterns())}"
            )

    @property
    def is_sparse(self) -> bool:
        """Whether any layer could become sparse."""
        return self.sparsity > 0.0 or self.nnz is not None or bool(self.groups)

    @property
    def excludes_by_default(self) -> bool:
        """Whether ``exclude`` is the default, which stands for heads, routers and embeddings."""
        return tuple(self.exclude) == DEFAULT_EXCLUDE

    def spec(self, pattern: str | None = None) -> PatternSpec:
        """Return the pattern of this section, or of a group that names another, with the options that it has."""
        name = self.pattern if pattern is None else pattern
        block, bands, options = tuple(self.block), tuple(self.bands), dict(self.options)
        if pattern is not None and pattern != self.pattern and pattern in PATTERNS:
            # Options are given once for all patterns; a group's own pattern takes the options that it has.
            kind = PATTERNS[pattern]
            block = block if kind.in_blocks else (1, 1)
            bands = bands if kind.in_bands else (1, 1)
            options = {key: value for key, value in options.items() if key in kind.options}
        try:
            return PatternSpec(name, block, self.m, self.fan_out, bands, options)  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"sparsity.{error}") from None


def make_rule(plan: SparsityConfig, total_steps: int) -> Rule:
    """Return the rule that ``plan.evolution`` describes for a training of ``total_steps``.

    Fractions of the training become steps, rounded to the nearest.

    Raises:
        UserError: no update would ever happen, or one after the end; the message names the field.
    """
    if plan.evolution.rule != STATIC and not plan.is_sparse:
        raise UserError(f"{_PATH}.rule={plan.evolution.rule}: sparsity.sparsity=0 leaves no mask that could change")
    try:
        rule = plan.evolution.build(total_steps, plan.sparsity)
        rule.check(total_steps)
    except UserError as error:
        raise UserError(f"{_PATH}: {error}") from None
    return rule
