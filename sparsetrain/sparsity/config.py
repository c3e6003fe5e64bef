"""What a configuration says about sparsity: which layers, how sparse, in what pattern, and how the mask changes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

from sparsetrain.errors import UserError, check_choice
from sparsetrain.sparsity.patterns.spec import PatternSpec, check_sparsity

ALLOCATIONS = ("uniform", "erk")
RULES = ("static", "set", "rigl", "gmp", "vspdf")
DROP_SCHEDULES = ("constant", "linear", "cosine")
CURVES = ("cubic", "linear", "cosine", "step")
GROWTH = ("random", "gradient")
ACCUMULATION = ("last", "staggered")
DEFAULT_EXCLUDE = ("*head*", "*embed*")  # stands for heads, routers and embeddings; see `SparsityConfig`
MOMENTS = ("zero", "mean")
EVOLVING = ("random", "magnitude", "block")  # patterns that a rule other than static keeps


@dataclass
class SparsityGroup:
    """The layers whose qualified name matches the glob ``match``, and their sparsity (0 keeps them dense).

    Args:
        pattern: another pattern than the plan's; null takes that of the plan.
    """

    match: str
    sparsity: float
    pattern: str | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, f"sparsity of group '{self.match}'")


@dataclass
class Phase:
    """From the fraction ``at`` of training on, the sparsity is ``sparsity``; training begins with one at 0."""

    at: float
    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, "sparsity.evolution.phases: sparsity")
        if isinstance(self.at, bool) or not 0.0 <= self.at < 1.0:
            raise UserError(f"sparsity.evolution.phases: at={self.at} must lie in [0, 1)")


@dataclass
class EvolutionConfig:
    """How masks change during pre-training; fine-tuning and prompts keep the masks that they start from.

    Args:
        rule: ``static`` (never), ``set`` and ``rigl`` (the same density, other positions), ``gmp`` (sparser, gradually)
            or ``vspdf`` (by ``phases``, which usually get denser).
        every: steps between two updates.
        start, stop: fractions of training between which updates happen.
        drop_fraction: of ``set`` and ``rigl``: the part of a layer's weights that an update replaces.
        drop_schedule: how that part falls until ``stop``: ``constant``, ``linear`` or ``cosine``.
        initial_sparsity: of ``gmp``: where it begins; ``sparsity`` is where it ends, at ``stop``.
        curve: of ``gmp``, between the two: ``cubic``, ``linear``, ``cosine`` or ``step`` (four equal stairs).
        phases: of ``vspdf``: the sparsities that follow ``sparsity``, each from a fraction of training on.
        grow: of ``vspdf``: where new weights go, ``random`` or ``gradient``.
        accumulation: of ``rigl`` with several micro-batches a step: ``last`` ranks the gradient of the last one,
            ``staggered`` that of all, with the layers' updates spread over the steps of a period.
        grown_scale: 0 starts grown weights at zero; c starts them against their gradient with c times the root mean
            square of the layer's other weights.
        grown_moments: of ``set``, ``rigl`` and ``vspdf``: what the optimizer's state of a grown weight starts with,
            ``zero`` or ``mean``, the mean of the layer's survivors; see
            `sparsetrain.sparsity.evolution.topology.apply_update`.
        protect_rows: never drop the largest weight of an output, so that no output loses its last one.
    """

    rule: str = "static"
    every: int = 100
    start: float = 0.0
    stop: float = 0.75
    drop_fraction: float = 0.3
    drop_schedule: str = "cosine"
    initial_sparsity: float = 0.0
    curve: str = "cubic"
    phases: list[Phase] = field(default_factory=list)
    grow: str = "random"
    accumulation: str = "last"
    grown_scale: float = 0.0
    protect_rows: bool = False
    grown_moments: str = "zero"

    def __post_init__(self) -> None:
        prefix = "sparsity.evolution"
        check_choice(f"{prefix}.rule", self.rule, RULES)
        check_choice(f"{prefix}.drop_schedule", self.drop_schedule, DROP_SCHEDULES)
        check_choice(f"{prefix}.curve", self.curve, CURVES)
        check_choice(f"{prefix}.grow", self.grow, GROWTH)
        check_choice(f"{prefix}.accumulation", self.accumulation, ACCUMULATION)
        check_choice(f"{prefix}.grown_moments", self.grown_moments, MOMENTS)
        if self.every < 1:
            raise UserError(f"{prefix}.every={self.every} must be at least 1")
        _check_fraction("start", self.start, low=0.0, high=1.0)
        _check_fraction("stop", self.stop, low=0.0, high=1.0)
        if self.start >= self.stop:
            raise UserError(f"{prefix}.start={self.start} must be below stop={self.stop}")
        _check_fraction("drop_fraction", self.drop_fraction, low=0.0, high=1.0, open_ends=True)
        check_sparsity(self.initial_sparsity, f"{prefix}.initial_sparsity")
        if not 0.0 <= self.grown_scale < math.inf:
            raise UserError(f"{prefix}.grown_scale={self.grown_scale} must be at least 0 and finite")
        if (self.rule == "vspdf") != bool(self.phases):
            needs = "needs at least one phase" if self.rule == "vspdf" else "has no phases"
            raise UserError(f"{prefix}.phases={[vars(phase) for phase in self.phases]}: rule={self.rule} {needs}")
        for one, other in pairwise(self.phases):
            if one.at >= other.at:
                raise UserError(f"{prefix}.phases: at={other.at} follows at={one.at}; fractions must increase")


@dataclass
class SparsityConfig:
    """Which linear layers are sparse, how sparse, in what pattern, and how the masks change.

    A layer takes part when its qualified name matches a glob of ``include`` and none of ``exclude``; its sparsity is
    that of the first matching entry of ``groups``, else what ``allocation`` makes of ``sparsity``. Embeddings, norms
    and biases are no linear layers and stay dense.

    The default of ``exclude`` means output heads, routers of experts and embeddings, whose names stand in
    `sparsetrain.sparsity.layers.names`. There, whole parts at the end of a name count: ``score``, ``classifier`` and
    ``lm_head`` are heads, and the layer ``heads.0.key`` of an attention head is none. A layer whose weight is that of
    an embedding counts as a head. Any other list of ``exclude`` is taken as globs alone.

    Args:
        sparsity: fraction of zeros over the layers that no group takes, in [0, 1).
        nnz: in place of ``sparsity``: the number of weights of all layers that take part, those of groups included.
        pattern: ``random``, ``balanced``, ``magnitude``, ``block``, ``nm``, ``banded`` or ``checkerboard``.
        block, m, fan_out, bands: options of patterns; see `sparsetrain.sparsity.patterns.spec.PatternSpec`.
        allocation: ``uniform`` gives every layer the same sparsity; ``erk`` gives a layer of R outputs and C inputs a
            density in proportion to (R + C) / (R C), as in RigL (arXiv 1911.11134).
        groups: layers with a sparsity of their own; the first match wins.
        include, exclude: globs over qualified names.
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
        if self.evolution.rule != "static" and not patterns.issubset(EVOLVING):
            lost = sorted(patterns.difference(EVOLVING))[0]
            raise UserError(
                f"sparsity.pattern={lost!r} would not outlast the first update of rule={self.evolution.rule}; "
                f"masks that evolve start as one of {', '.join(EVOLVING)}"
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
        """Return the pattern of the plan, or of a group that names another, with the options that it has."""
        name = self.pattern if pattern is None else pattern
        try:
            if pattern is not None and pattern != self.pattern:
                # The options are the plan's; a group's own pattern takes those that it knows.
                block = tuple(self.block) if name in ("block", "magnitude") else (1, 1)
                bands = tuple(self.bands) if name in ("random", "block", "magnitude") else (1, 1)
            else:
                block, bands = tuple(self.block), tuple(self.bands)
            return PatternSpec(name, block, self.m, self.fan_out, bands)  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"sparsity.{error}") from None


def _check_fraction(name: str, value: float, low: float, high: float, open_ends: bool = False) -> None:
    inside = low < value < high if open_ends else low <= value <= high
    if isinstance(value, bool) or not inside:
        ends = f"({low:g}, {high:g})" if open_ends else f"[{low:g}, {high:g}]"
        raise UserError(f"sparsity.evolution.{name}={value} must lie in {ends}")
