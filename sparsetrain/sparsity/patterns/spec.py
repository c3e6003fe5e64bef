"""The kinds of patterns, their options, and how many nonzeros each has.

The number of nonzeros is a function of the spec, the shape and the density alone (`pattern_nnz`), and not of the draw:
SμPar (arXiv 2405.15743) divides by the density, and comparisons at equal FLOPs count nonzeros.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.registry import Registry
from sparsetrain.sparsity.patterns.select import bands, largest_remainder, split_evenly

Maker = TypeVar("Maker", bound=Callable[..., Any])


@dataclass(frozen=True)
class PatternKind:
    """What is registered under the name of a pattern; see `register_pattern`.

    Args:
        make: draws a pattern. count: the number of its nonzeros for a spec, a shape and a density.
        evolves: whether masks of this kind may evolve.
        in_blocks: whether it has the options ``block`` and ``bands`` of `PatternSpec`; in_bands: whether ``bands``.
    """

    make: Callable[..., Any]
    count: Callable[[PatternSpec, tuple[int, int], float], int]
    evolves: bool = False
    in_blocks: bool = False
    in_bands: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The keyword-only arguments of ``make`` with their defaults, `inspect.Parameter.empty` where there is none."""
        arguments = inspect.signature(self.make).parameters.values()
        return {entry.name: entry.default for entry in arguments if entry.kind is entry.KEYWORD_ONLY}


PATTERNS: Registry[PatternKind] = Registry(
    "pattern",
    "sparsity.pattern",
    {
        "make": ("spec", "shape", "density", "generator", "weight", "**options"),
        "count": ("spec", "shape", "density"),
    },
)
"""The kinds of patterns that a configuration can name."""


@overload
def register_pattern(
    name: str,
    *,
    evolves: bool = False,
    count: Callable[[PatternSpec, tuple[int, int], float], int] | None = None,
    replace: bool = False,
) -> Callable[[Maker], Maker]: ...


@overload
def register_pattern(
    name: str,
    maker: Maker,
    *,
    evolves: bool = False,
    count: Callable[[PatternSpec, tuple[int, int], float], int] | None = None,
    replace: bool = False,
) -> Maker: ...


def register_pattern(
    name: str,
    maker: Maker | None = None,
    *,
    evolves: bool = False,
    count: Callable[[PatternSpec, tuple[int, int], float], int] | None = None,
    replace: bool = False,
) -> Maker | Callable[[Maker], Maker]:
    """Make a kind of pattern available by name; without ``maker``, return a decorator that does so.

    ``sparsity.pattern=first_inputs`` then chooses it, and the keyword-only arguments of the maker are its options,
    ``sparsity.options.offset=3``:

    ```python
    @sparsetrain.register_pattern("first_inputs")
    def first_inputs(spec, shape, density, generator, weight, *, offset=0):
        mask = torch.zeros(shape[1], shape[0], dtype=torch.bool)
        mask.view(-1)[: round(density * mask.numel())] = True
        return mask.roll(offset, 0).t()
    ```

    Args:
        name: the name, see `sparsetrain.registry.Registry.register`.
        maker: called as ``maker(spec, shape, density, generator, weight, **options)``, with the `PatternSpec`,
            ``(out_features, in_features)``, the density in (0, 1], a `torch.Generator` on the CPU for all that is
            random, and the layer's weight ``[out_features, in_features]``, which it must not change, or None where
            there is no weight. It returns a bool mask ``[out_features, in_features]`` or a
            `sparsetrain.SparsityPattern`.
        evolves: whether masks of this kind may evolve; the first update of a rule moves weights out of the pattern.
        count: maps spec, shape and density to the number of nonzeros; None for ``round(density * R * C)``. A pattern
            with another number is refused when it is drawn.
        replace: take the place of another pattern of that name.

    Returns:
        ``maker``, or the decorator, which returns what it decorates.

    Raises:
        UserError: the name is malformed or taken, or ``maker`` or ``count`` cannot be called in this way.
    """
    if maker is None:
        return lambda decorated: register_pattern(name, decorated, evolves=evolves, count=count, replace=replace)
    counted = count or (lambda _spec, shape, density: exact_count(shape, density))
    PATTERNS.register(name, PatternKind(maker, counted, evolves), replace=replace)
    return maker


def evolving_patterns() -> list[str]:
    """Return the names of the patterns whose masks may evolve."""
    return [name for name in PATTERNS if PATTERNS[name].evolves]


def check_sparsity(sparsity: float, field: str = "sparsity") -> None:
    """Raise `UserError` unless ``sparsity`` lies in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0.0 <= sparsity < 1.0:
        raise UserError(f"{field}={sparsity!r} must be a number in [0, 1)")


@dataclass(frozen=True)
class PatternSpec:
    """A kind of pattern and its options.

    Args:
        name: a registered pattern: ``random``, ``balanced``, ``magnitude``, ``block``, ``nm``, ``banded``,
            ``checkerboard``, or one of `register_pattern`.
        block: rows and columns of a block, for ``block`` and ``magnitude``. ``block`` may leave a remainder at the
            right and lower edge; ``magnitude`` needs a block that divides the matrix.
        m: for ``nm``: the length of the groups of consecutive inputs; each group keeps ``density * m`` weights.
        fan_out: for ``balanced``: also give each input the same number of outputs.
        bands: rows and columns of equal bands, each of which gets the same share of the weights: ``(n_heads, 1)``
            ranks or draws inside each head of a projection into heads. For ``random``, ``block`` and ``magnitude``.
        options: further options of a registered pattern, by name.

    Raises:
        UserError: an unknown name, or an option that the pattern does not have.
    """

    name: str = "random"
    block: tuple[int, int] = (1, 1)
    m: int = 4
    fan_out: bool = False
    bands: tuple[int, int] = (1, 1)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.name not in PATTERNS:
            check_choice("pattern", self.name, PATTERNS)
        kind = PATTERNS[self.name]
        for option in ("block", "bands"):
            value = getattr(self, option)
            if len(value) != 2 or not all(isinstance(side, int) and side >= 1 for side in value):
                raise UserError(f"{option}={list(value)} must be two whole numbers of at least 1: rows, columns")
            object.__setattr__(self, option, (int(value[0]), int(value[1])))
        if self.block != (1, 1) and not kind.in_blocks:
            raise UserError(f"block={list(self.block)} is an option of block and magnitude, not of {self.name}")
        if self.block == (1, 1) and self.name == "block":
            raise UserError("block=[1, 1]: the pattern 'block' needs a larger block, for example [16, 16]")
        if self.bands != (1, 1) and not kind.in_bands:
            raise UserError(f"bands={list(self.bands)} are an option of random, block, magnitude, not of {self.name}")
        if self.m < 1:
            raise UserError(f"m={self.m} must be at least 1")
        for option in self.options:
            if option not in kind.options:
                has = f"it has {', '.join(kind.options)}" if kind.options else "it has none"
                hint = nearest(str(option), kind.options)
                raise UserError(f"options.{option} is no option of the pattern {self.name}{hint}; {has}")
        for option, default in kind.options.items():
            if default is inspect.Parameter.empty and option not in self.options:
                raise UserError(f"options.{option} is missing: the pattern {self.name} needs it")


def _check_density(density: float) -> None:
    if not 0.0 < density <= 1.0:
        raise UserError(f"density={density} must lie in (0, 1]")


def exact_count(shape: tuple[int, int], density: float) -> int:
    """Return ``round(density * R * C)``, the number of nonzeros where nothing else restricts it."""
    _check_density(density)
    rows, columns = shape
    nnz = round(density * rows * columns)
    if nnz < 1:
        raise UserError(f"density={density} leaves no weight at all in a {rows}x{columns} matrix")
    return nnz


def block_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks a matrix has, downwards and across, those of the remainder included."""
    if block[0] > shape[0] or block[1] > shape[1]:
        raise UserError(f"block {block[0]}x{block[1]} is larger than the matrix {shape[0]}x{shape[1]}")
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


@dataclass(frozen=True)
class Region:
    """Blocks of one size: whole blocks, or blocks that an edge of the matrix cuts off."""

    place: tuple[slice, slice]
    size: int
    kept: int


def kept_regions(spec: PatternSpec, shape: tuple[int, int], density: float) -> list[Region]:
    """Return the regions of a block pattern and how many blocks each keeps.

    Each size of block has its own share, so that the number of nonzeros does not depend on the draw.
    """
    _check_density(density)
    if spec.block == (1, 1):
        exact_count(shape, density)
    (rows, columns), (bh, bw) = shape, spec.block
    grid = block_grid(shape, spec.block)
    inner = rows // bh, columns // bw
    if spec.bands != (1, 1) and inner != grid:
        raise UserError(f"bands={list(spec.bands)} need a block that divides the matrix {rows}x{columns}")
    if inner == grid:
        kept = _blocks_kept(spec, shape, density, grid)
        parts = bands(grid, spec.bands)
        return [Region(part, bh * bw, n) for part, n in zip(parts, split_evenly(kept, len(parts)), strict=True)]
    sides = [
        [(slice(0, whole), length) for whole, length in ((inner[axis], spec.block[axis]),) if whole]
        + [(slice(inner[axis], grid[axis]), shape[axis] % spec.block[axis])] * (grid[axis] > inner[axis])
        for axis in (0, 1)
    ]
    places = [((row, column), height * width) for row, height in sides[0] for column, width in sides[1]]
    counts = [(row.stop - row.start) * (column.stop - column.start) for (row, column), _ in places]
    kept = _blocks_kept(spec, shape, density, grid)
    shares = largest_remainder([density * count for count in counts], kept, counts)
    return [Region(place, size, n) for (place, size), n in zip(places, shares, strict=True)]


def _blocks_kept(spec: PatternSpec, shape: tuple[int, int], density: float, grid: tuple[int, int]) -> int:
    if spec.block == (1, 1):
        return exact_count(shape, density)
    kept = round(density * grid[0] * grid[1])
    if kept < 1:
        size, matrix = f"{spec.block[0]}x{spec.block[1]}", f"{shape[0]}x{shape[1]}"
        raise UserError(f"density={density} leaves no block of {size} at all in a {matrix} matrix")
    return kept


def units_count(spec: PatternSpec, shape: tuple[int, int], density: float) -> int:
    """Return the number of nonzeros of a pattern that comes in blocks or bands."""
    if spec.block == (1, 1) and spec.bands == (1, 1):
        return exact_count(shape, density)
    return sum(region.kept * region.size for region in kept_regions(spec, shape, density))


def nm_count(spec: PatternSpec, shape: tuple[int, int], density: float) -> int:
    """Return the number of nonzeros of an n:m pattern."""
    return kept_of_m(spec, shape, density) * shape[0] * (shape[1] // spec.m)


def kept_of_m(spec: PatternSpec, shape: tuple[int, int], density: float) -> int:
    """Return n of an n:m pattern."""
    _check_density(density)
    if shape[1] % spec.m:
        raise UserError(f"m={spec.m} does not divide the {shape[1]} inputs of a {shape[0]}x{shape[1]} matrix")
    n = round(density * spec.m)
    if n < 1 or abs(n - density * spec.m) > 1e-6:
        near = min(max(n, 1), spec.m)
        raise UserError(
            f"density={density:g} is not a multiple of 1/{spec.m}: the pattern nm with m={spec.m} needs a multiple of "
            f"{1 / spec.m:g}, such as sparsity={1 - near / spec.m:g}"
        )
    return n


def pattern_nnz(spec: PatternSpec, shape: tuple[int, int], density: float) -> int:
    """Return the exact number of nonzeros that `make_pattern` gives, without drawing anything.

    It is ``round(density * R * C)`` unless the pattern comes in blocks or groups; then it is the nearest number of
    whole blocks (with a remainder: for each size of block). A registered pattern may have its own count.

    Raises:
        UserError: as `make_pattern`.
    """
    return PATTERNS[spec.name].count(spec, shape, density)
