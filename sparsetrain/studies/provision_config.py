"""The settings of ``sparsetrain provision``: a budget, machines, and a grid of candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsetrain.cost.hardware import Machine
from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.files import typed_path
from sparsetrain.scaling.law import Law, LossLaw
from sparsetrain.scaling.published import chinchilla
from sparsetrain.stages.config import model_config
from sparsetrain.studies.fit_rows import PER
from sparsetrain.studies.suggest import FORMATS, SuggestConfig, laws_of

BUDGETS: Mapping[str, str] = {"hours": "h", "money": "USD", "flops": "FLOPs"}
PUBLISHED: Mapping[str, LossLaw] = {"chinchilla": chinchilla}
SPARSITIES = (0.0, 0.5, 0.75, 0.9)
_WIDTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 8192, 12288, 16384)
_DEPTHS = (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)
_BATCHES = tuple(2**power for power in range(13))
_MOST_CANDIDATES = 1_000_000


@dataclass
class ProvisionConfig(SuggestConfig):
    """Plan a pre-training: which width, depth, sparsity, tokens, batch and machines a budget pays for.

    The settings of a pre-training say of which family the models are; their width, depth, sparsity, tokens and batch
    are those of the grid. Give exactly one of ``hours``, ``money`` and ``flops``.

    Args:
        hours: wall time of the run.
        money: USD, at the prices in the machines' files.
        flops: training FLOPs: matrix products on nonzeros.
        machine: a machine or a list of them: names, ``this`` (after `sparsetrain calibrate`), or files.
        devices: numbers of each machine, in data parallelism.
        width: values of d_model; null takes a ladder of multiples of ``d_head``.
        depth: numbers of blocks; null takes a ladder.
        aspect: smallest and largest width over depth, since laws of loss do not know the shape; null is 16 to 128, or
            no bound if width and depth are both given.
        d_head: width of an attention head; null takes that of ``model``.
        sparsities: of the hidden matrices, in [0, 1); null is 0, 0.5, 0.75 and 0.9, or 0 with a published law.
        batch: sequences per step; null takes powers of 2. A batch more than 1.5 times the best one by the law of
            batches (published, or one among ``laws``) is left out: the laws of loss hold up to the best batch.
        tokens_per_parameter: candidates with fewer tokens for each stored weight of the hidden matrices are left out.
        spend: shares of the budget that a candidate may spend.
        laws: files of `sparsetrain fit`, among them one of the kind loss; ``chinchilla`` is a published one of dense
            models.
        dtype: of weights and activations in products; null is bfloat16 on accelerators and float32 on CPUs.
        rows: rows to show, at most; the Pareto set is thinned evenly.
        format: ``text`` or ``json``.
        out: directory for results.csv, provision.json and a figure.
    """

    hours: float | None = None
    money: float | None = None
    machine: Any = field(default="this", metadata={"type": "text or list of texts"})
    devices: Any = field(default=1, metadata={"type": "integer or list of integers"})
    width: Any = field(default=None, metadata={"type": "integer, list of integers or null"})
    depth: Any = field(default=None, metadata={"type": "integer, list of integers or null"})
    aspect: Any = field(default=None, metadata={"type": "list of two numbers, or null"})
    d_head: int | None = None
    sparsities: Any = field(default=None, metadata={"type": "number, list of numbers or null"})
    batch: Any = field(default=None, metadata={"type": "integer, list of integers or null"})
    tokens_per_parameter: float = 5.0
    spend: Any = field(default=(0.25, 0.5, 1.0), metadata={"type": "number or list of numbers"})
    dtype: str | None = None
    rows: int = 12
    out: str | None = None

    def __post_init__(self) -> None:
        check_choice("format", self.format, FORMATS)
        check_choice("per", self.per, PER)
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "no budget"
            raise UserError(f"{said}: give exactly one of hours, money (USD) and flops")
        for name in (*given, "tokens_per_parameter"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be above 0 and finite")
        if not self.budget.open or self.budget.phases is not None:
            said = f"budget.{self.budget.length}" if self.budget.length else "budget.phases"
            raise UserError(f"{said}: the length of a run follows from {given[0]}; leave it out")
        if self.init_from is not None:
            raise UserError(f"init_from={self.init_from}: provision plans new models; leave it out")
        if self.optimizer.name != "adamw":
            raise UserError(f"optimizer.name={self.optimizer.name}: the laws are about AdamW")
        if self.seconds is not None or self.flops_per_second is not None:
            raise UserError("seconds and flops_per_second are for suggest: give hours, and a machine")
        self.machines = _texts("machine", self.machine)
        for name, default in (("devices", (1,)), ("width", _WIDTHS), ("depth", _DEPTHS), ("batch", _BATCHES)):
            setattr(self, name, _wholes(name, getattr(self, name), default))
        self.spend = _numbers("spend", self.spend, 0.0, 1.0, "above 0 and at most 1", lowest=False, highest=True)
        if self.rows < 1:
            raise UserError(f"rows={self.rows} must be at least 1")
        if self.d_head is not None and self.d_head < 1:
            raise UserError(f"d_head={self.d_head} must be at least 1")
        section = self.sparsity
        if section.allocation != "uniform" or section.nnz is not None or section.groups:
            raise UserError("sparsity: provision divides zeros evenly: leave out allocation, nnz and groups")
        flops, self.flops = self.flops, None  # the budget of a whole search, and not of the run in the settings
        super().__post_init__()
        self.flops = flops

    @property
    def kind(self) -> str:
        """Which budget is given."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        """The budget in hours, USD or FLOPs."""
        return float(getattr(self, self.kind))

    def places(self) -> list[Machine]:
        """Return the machines.

        Raises:
            UserError: one is unknown, or has no price where the budget is money.
        """
        found = [Machine.load(name) for name in dict.fromkeys(self.machines)]
        for place in found:
            if self.kind == "money" and place.price is None:
                raise UserError(f"machine={place.name}: its file has no price, and the budget is money; give hours")
        return found

    def loss_laws(self) -> tuple[list[LossLaw], list[Law], list[str]]:
        """Return the laws of loss, the other laws, and notes about laws without a use here.

        Raises:
            UserError: there is no law of loss, or a file holds no usable law.
        """
        published = [PUBLISHED[name] for name in self.law_files if name in PUBLISHED]
        found, rest = list(published), []
        for file in self.law_files:
            if file in PUBLISHED:
                continue
            law = Law.load(typed_path(file, "laws"))
            if law.kind == "loss" and isinstance(law, LossLaw):
                found.append(law)
            else:
                rest.append(file)
        if not found:
            raise UserError(
                "laws: the loss needs a law: give a file of `sparsetrain fit RUNS law=loss`, or laws=chinchilla, a "
                "published law of dense models"
            )
        seen = [law.sparsity for law in found]
        if len(set(seen)) < len(seen):
            raise UserError("laws: two laws of loss are of the same sparsity; give one")
        others, notes = laws_of(rest)
        return found, others, notes

    def grid_sparsities(self, laws: Sequence[LossLaw]) -> list[float]:
        """Return the sparsities of the grid."""
        default = (0.0,) if all(law in PUBLISHED.values() for law in laws) else SPARSITIES
        given = default if self.sparsities is None else self.sparsities
        return _numbers("sparsities", given, 0.0, 1.0, "in [0, 1)", lowest=True, highest=False)

    def shapes(self) -> list[dict[str, int]]:
        """Return the fields of ``model`` for each shape of the grid, from the smallest to the largest.

        Raises:
            UserError: a given width is no multiple of the head's, or narrower than the parameterization's base; or no
                shape is left.
        """
        base = model_config(self.model, self.model.get("vocab_size") or 1)
        head, given = self.d_head or base.d_head, {name: self._given(name) for name in ("width", "depth")}
        least = (self.parameterization.base_width or 1) if self.parameterization.uses_width else 1
        if given["width"]:
            for width in self.width:
                if width % head:
                    raise UserError(f"width={width} is no multiple of d_head={head}")
                self.parameterization.check_width(width, "width")
        low, high = self._aspect(all(given.values()))
        found = []
        for width in dict.fromkeys(max(head, width // head * head) for width in self.width):
            for depth in self.depth:
                heads, keys = width // head, width // head * base.kv_heads / base.n_heads
                if width < least or not low <= width / depth <= high or keys < 1 or not keys.is_integer():
                    continue
                shape = {"d_model": width, "n_layers": depth, "n_heads": heads}
                if base.n_kv_heads is not None:
                    shape["n_kv_heads"] = int(keys)
                if base.d_ff is not None:
                    shape["d_ff"] = max(1, round(base.d_ff * width / base.d_model))
                found.append(shape)
        if not found:
            raise UserError(f"width and depth: no pair of the grid has an aspect from {low:g} to {high:g}")
        return sorted(found, key=lambda shape: (shape["d_model"] ** 2 * shape["n_layers"], shape["d_model"]))

    def check_size(self, candidates: int) -> None:
        """Raise `UserError` if the grid is too large to be searched in seconds."""
        if candidates > _MOST_CANDIDATES:
            raise UserError(f"the grid has {candidates:,} candidates, more than {_MOST_CANDIDATES:,}: shorten a list")

    def _given(self, name: str) -> bool:
        return tuple(getattr(self, name)) != {"width": _WIDTHS, "depth": _DEPTHS}[name]

    def _aspect(self, both: bool) -> tuple[float, float]:
        if self.aspect is None:
            return (0.0, math.inf) if both else (16.0, 128.0)
        ends = _numbers("aspect", self.aspect, 0.0, math.inf, "above 0 and finite", lowest=False, highest=False)
        if len(ends) != 2:
            raise UserError(f"aspect={self.aspect} must be two numbers, the smallest and the largest width over depth")
        return ends[0], ends[1]


def _listed(name: str, value: Any) -> list[Any]:
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items:
        raise UserError(f"{name}=[] must have at least one value")
    return items


def _texts(name: str, value: Any) -> list[str]:
    items = _listed(name, value)
    for item in items:
        if not isinstance(item, str):
            raise UserError(f"{name}={item!r} must be a name or a file{nearest(str(item), ())}")
    return items


def _wholes(name: str, value: Any, default: Sequence[int]) -> tuple[int, ...]:
    items = _listed(name, default if value is None else value)
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int) or not 1 <= item <= 1 << 24:
            raise UserError(f"{name}={item!r} must be a whole number of at least 1")
    return tuple(sorted(set(items)))


def _numbers(
    name: str, value: Any, low: float, high: float, allowed: str, *, lowest: bool, highest: bool
) -> list[float]:
    """Return numbers in ascending order; ``lowest`` and ``highest`` tell whether the ends are allowed."""
    items = _listed(name, value)
    for item in items:
        number = isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item)
        if not number or not low <= item <= high or (item == low and not lowest) or (item == high and not highest):
            raise UserError(f"{name}={item!r} must be {allowed}")
    return sorted({float(item) for item in items})
