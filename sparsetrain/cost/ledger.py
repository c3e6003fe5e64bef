"""The ledger of a step: FLOPs of forward and backward pass by module and by kind, and the bytes that they move.

``total`` is the sum of the matrix products, in the convention that MediSwift (arXiv 2403.00952) and SPDF (arXiv
2303.10464) publish: 6 FLOPs for each stored weight and token, the head's included and the embedding's not, and
12 T^2 D for each layer and sequence, since every query meets every key. Everything else that a step computes is listed
by kind, and is not part of the total.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from sparsetrain.cost.operations import ATTENTION, HEAD, LINEAR, PRODUCTS, Operation
from sparsetrain.errors import UserError, check_choice

ATTENTIONS, SPARSITIES = ("full", "causal"), ("skipped", "counted")
PHASES = ("training", "prefill", "decoding")


@dataclass(frozen=True)
class Ledger:
    """The work of one step, or of several after `times` or a sum of ledgers.

    Args:
        total: FLOPs of the matrix products of forward and backward pass.
        by_module: the total by qualified name of the module: ``blocks.0.attn.qkv``; ``blocks.0.attn`` holds the
            products of queries, keys and values.
        by_kind: FLOPs by kind; ``linear``, ``head`` and ``attention`` add up to the total, the others are beside it.
        by_phase: the total by ``forward`` and ``backward``.
        totals: the total under each convention, such as ``"attention full, zeros skipped"``.
        bytes: bytes that the operations move if each reads its operands and writes its results once.
        bytes_by_kind: the same by kind; ``index`` has the positions of nonzeros.
        weight_bytes: bytes of weights and of the positions of nonzeros, as they are stored.
        cache_bytes: bytes of cached keys and values at the end of the step; 0 in training.
        tokens: tokens that pass through the model.
        attention, sparsity, phase: the conventions of ``total`` and the pass that is counted.
    """

    total: int
    by_module: dict[str, int]
    by_kind: dict[str, int]
    by_phase: dict[str, int]
    totals: dict[str, int]
    bytes: int
    bytes_by_kind: dict[str, int]
    weight_bytes: int = 0
    cache_bytes: int = 0
    tokens: int = 0
    attention: str = "full"
    sparsity: str = "skipped"
    phase: str = "training"

    def times(self, steps: int) -> Ledger:
        """Return the ledger of ``steps`` such steps; stored bytes stay as they are.

        Raises:
            UserError: ``steps`` is not a whole number of at least 0.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise UserError(f"steps={steps!r} is not a whole number of at least 0")
        return self._changed(lambda value, _: value * steps, Ledger(0, {}, {}, {}, {}, 0, {}))

    def __add__(self, other: Ledger) -> Ledger:
        """Return the ledger of both: of the phases of a run, for instance; of stored bytes the larger ones.

        Raises:
            UserError: the two follow different conventions.
        """
        for name in ("attention", "sparsity"):
            if getattr(self, name) != getattr(other, name):
                mine, theirs = getattr(self, name), getattr(other, name)
                raise UserError(f"{name}={mine} and {name}={theirs}: add ledgers of one convention")
        return self._changed(lambda mine, theirs: mine + theirs, other)

    def _changed(self, both: Callable[[int, int], int], other: Ledger) -> Ledger:
        def merged(name: str) -> dict[str, int]:
            mine, theirs = getattr(self, name), getattr(other, name)
            return {key: both(mine.get(key, 0), theirs.get(key, 0)) for key in (*mine, *(set(theirs) - set(mine)))}

        return Ledger(
            both(self.total, other.total),
            *(merged(name) for name in ("by_module", "by_kind", "by_phase", "totals")),
            both(self.bytes, other.bytes),
            merged("bytes_by_kind"),
            max(self.weight_bytes, other.weight_bytes),
            max(self.cache_bytes, other.cache_bytes),
            both(self.tokens, other.tokens),
            self.attention,
            self.sparsity,
            self.phase if other.phase == self.phase or not other.total else f"{self.phase} and {other.phase}",
        )

    def as_dict(self) -> dict[str, object]:
        """Return every field, as a report stores them."""
        return asdict(self)


@dataclass(frozen=True)
class Entry:
    """FLOPs of one kind in one module and phase.

    Args:
        kind, phase, module: as `sparsetrain.cost.operations.Operation` has them, with the module's full name.
        flops: on nonzeros, with attention in full.
        dense_flops: if no zero is skipped.
        bytes, index_bytes: moved.
    """

    kind: str
    phase: str
    module: str
    flops: int
    dense_flops: int
    bytes: int = 0
    index_bytes: int = 0


@dataclass(frozen=True)
class Convention:
    """How a total counts attention and zeros.

    Args:
        attention: ``full`` counts every query with every key, ``causal`` with the keys up to its own position.
        sparsity: ``skipped`` counts nonzeros, ``counted`` counts zeros too.

    Raises:
        UserError: another value.
    """

    attention: str = "full"
    sparsity: str = "skipped"

    def __post_init__(self) -> None:
        check_choice("attention", self.attention, ATTENTIONS)
        check_choice("sparsity", self.sparsity, SPARSITIES)

    def __str__(self) -> str:
        return f"attention {self.attention}, zeros {self.sparsity}"


@dataclass(frozen=True)
class Pass:
    """What passes through the model.

    Args:
        context: tokens of a sequence, with a soft prompt. batch: sequences.
        cached: tokens of each sequence that are in a cache already.
        phase: ``training``, ``prefill`` or ``decoding``.
    """

    context: int
    batch: int
    cached: int = 0
    phase: str = "training"

    def seen(self, flops: int) -> int:
        """Return the part of an attention's FLOPs that is spent on keys which the query may see."""
        twice = 2 * self.cached + self.context + 1  # keys of an average query
        return flops * twice // (2 * (self.cached + self.context))


def entries_of(operations: Iterable[Operation]) -> list[Entry]:
    """Return the entries of operations whose numbers are single values; ``blocks.*`` becomes each block's name."""
    found, first = [], 0
    places: dict[tuple[int, ...] | None, Sequence[int]] = {}
    for operation in operations:
        whole = [
            _whole(value) for value in (operation.flops, operation.dense_flops, operation.bytes, operation.index_bytes)
        ]
        if "*" not in operation.module:
            found.append(Entry(operation.kind, operation.phase, operation.module, *whole))
            continue
        if operation.layers not in places:
            count = _whole(operation.count)
            places[operation.layers] = operation.layers or range(first, first + count)
            first += count
        found += [
            Entry(operation.kind, operation.phase, operation.module.replace("*", str(place)), *whole)
            for place in places[operation.layers]
        ]
    return found


def _whole(value: object) -> int:
    number = np.asarray(value)
    if number.ndim:
        raise UserError("a ledger is for one configuration; sparsetrain.cost.operations takes arrays")
    return round(float(number))


@dataclass
class _Sums:
    total: int = 0
    by_module: dict[str, int] = field(default_factory=dict)
    by_kind: dict[str, int] = field(default_factory=dict)
    by_phase: dict[str, int] = field(default_factory=dict)


def ledger_of(
    entries: Sequence[Entry],
    asked: Pass,
    convention: Convention,
    weight_bytes: int = 0,
    cache_bytes: int = 0,
    tokens: int | None = None,
) -> Ledger:
    """Return the ledger of entries under a convention."""
    sums = _summed(entries, asked, convention)
    totals = {
        str(other): _summed(entries, asked, other).total
        for other in (Convention(a, s) for a in ATTENTIONS for s in SPARSITIES)
    }
    moved: dict[str, int] = {}
    for entry in entries:
        moved[entry.kind] = moved.get(entry.kind, 0) + entry.bytes
        if entry.index_bytes:
            moved["index"] = moved.get("index", 0) + entry.index_bytes
    return Ledger(
        sums.total,
        sums.by_module,
        sums.by_kind,
        sums.by_phase,
        totals,
        sum(moved.values()),
        moved,
        weight_bytes,
        cache_bytes,
        asked.context * asked.batch if tokens is None else tokens,
        convention.attention,
        convention.sparsity,
        asked.phase,
    )


def _summed(entries: Iterable[Entry], asked: Pass, convention: Convention) -> _Sums:
    sums = _Sums(by_kind=dict.fromkeys((LINEAR, HEAD, ATTENTION), 0))
    for entry in entries:
        flops = entry.dense_flops if convention.sparsity == "counted" else entry.flops
        if entry.kind == ATTENTION and convention.attention == "causal":
            flops = asked.seen(flops)
        _add(sums.by_kind, entry.kind, flops)
        if entry.kind in PRODUCTS:
            sums.total += flops
            _add(sums.by_module, entry.module, flops)
            _add(sums.by_phase, entry.phase, flops)
    return sums


def _add(sums: dict[str, int], key: str, value: int) -> None:
    sums[key] = sums.get(key, 0) + value
