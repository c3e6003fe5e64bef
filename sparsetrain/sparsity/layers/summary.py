"""A summary of a model: which matrices are sparse, how sparse, and why the others stay dense."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from sparsetrain import wrappers
from sparsetrain.sparsity.config import SparsityConfig
from sparsetrain.sparsity.layers.allocation import matches
from sparsetrain.sparsity.layers.experts import stacks_of
from sparsetrain.sparsity.layers.foreign import adapters_of, is_linear, refusal, shape_of, tied_heads, uses_of
from sparsetrain.sparsity.layers.linear import SparseLinear
from sparsetrain.sparsity.layers.multihead import can_split
from sparsetrain.sparsity.layers.names import default_reason

WORTH_A_WARNING = 0.01  # of all weights
# Why a matrix stays dense; the first group is what everybody expects to stay dense.
EXPECTED = ("head", "router", "embedding", "norm", "excluded", "not sparse yet")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class SummaryRow:
    """One matrix of a model.

    Args:
        name: qualified name of the module for its ``weight`` or ``values``, else of the parameter.
        module: qualified name of the module that holds it. kind: the class of that module.
        shape: of the dense matrix; more than two dimensions for convolutions and stacked experts.
        parameters: number of entries of the dense matrix.
        nnz: stored weights of a sparse layer; entries other than zero of a dense matrix.
        reason: why the matrix is dense; empty for a sparse layer.
        share: of all weights of the model, counted dense.
    """

    name: str
    module: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    nnz: int
    reason: str
    share: float

    @property
    def density(self) -> float:
        """Fraction of entries that are stored, or not zero."""
        return self.nnz / self.parameters if self.parameters else 1.0

    @property
    def is_sparse(self) -> bool:
        """Whether a sparse layer holds the matrix."""
        return not self.reason


@dataclass(frozen=True)
class Summary:
    """The result of `summary`; ``str`` gives a table.

    Args:
        rows: one per matrix, in the order of the model. A matrix that several modules share has a row for each.
        parameters: number of weights of the whole model, counted dense, shared ones once.
        nnz: of those, the weights that are stored and not zero; vectors (biases, norms) count in full.
        matrix_parameters, matrix_nnz: the same over matrices alone.
    """

    rows: tuple[SummaryRow, ...]
    parameters: int
    nnz: int
    matrix_parameters: int
    matrix_nnz: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the whole model."""
        return 1.0 - self.nnz / self.parameters if self.parameters else 0.0

    @property
    def matrix_sparsity(self) -> float:
        """Fraction of zeros over all matrices."""
        return 1.0 - self.matrix_nnz / self.matrix_parameters if self.matrix_parameters else 0.0

    @property
    def sparse_share(self) -> float:
        """Share of all weights, counted dense, that lies in sparse layers."""
        return sum(row.share for row in self.rows if row.is_sparse)

    def __str__(self) -> str:
        head = ("name", "class", "shape", "weights", "nonzero", "density", "share", "dense because")
        cells = [
            (
                row.name or "(model)",
                row.kind,
                " x ".join(map(str, row.shape)),
                f"{row.parameters:,}",
                f"{row.nnz:,}",
                f"{row.density:.4f}",
                f"{100 * row.share:.1f} %",
                row.reason or "(sparse)",
            )
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in (head, *cells)) for column in range(len(head))]
        right = (3, 4, 5, 6)
        lines = [
            "  ".join(
                cell.rjust(width) if column in right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (head, *cells)
        ]
        return "\n".join(
            [
                *lines,
                f"matrices: {self.matrix_parameters:,} weights, {self.matrix_nnz:,} nonzero, sparsity "
                f"{self.matrix_sparsity:.4f}",
                f"model:    {self.parameters:,} weights, {self.nnz:,} nonzero, sparsity {self.sparsity:.4f}; "
                f"{100 * self.sparse_share:.1f} % of the weights are in sparse layers",
            ]
        )


def summary(model: nn.Module) -> Summary:
    """Return which matrices of a model are sparse, how sparse, their share of all weights, and why others stay dense.

    Reasons are ``head``, ``router``, ``embedding`` and ``norm``, which stay dense by default; ``excluded`` for a linear
    layer that could be sparse beside others that are, ``not sparse yet`` where none is; what a sparse layer cannot
    replace (a shared or computed weight, a forward of its own, quantized weights, an adapter); and matrices that are no
    linear layers: ``convolution``, ``RNN``, ``bilinear``, ``attention input projection``, ``stacked experts``, and
    ``parameter of CLASS`` for any other.

    Args:
        model: with or without sparse layers; wrappers are no part of the names.
    """
    return _summarise(model, count=True)


def _summarise(model: nn.Module, count: bool) -> Summary:
    """Return the summary of a model; without ``count``, dense matrices count as full and are not read."""
    rows: list[SummaryRow] = []
    found = list(_matrices(model))
    sparse = any(isinstance(module, SparseLinear) for _, module, _, _ in found)
    total = _total(model)
    uses, adapters = uses_of(model), adapters_of(model)
    others = [name for name, _ in wrappers.named_modules(model)]
    others += [name for name, _ in wrappers.named_parameters(model)]
    tied = tied_heads(model, {name: module for name, module, _, _ in found if is_linear(module)})
    counted: set[int] = set()
    matrix_parameters = matrix_nnz = 0
    for name, module, leaf, parameter in found:
        if isinstance(module, SparseLinear):
            shape: tuple[int, ...] = shape_of(module)
            numel, nnz, reason = shape[0] * shape[1], parameter.numel(), ""
        else:
            shape, numel = tuple(parameter.shape), parameter.numel()
            nnz = numel if parameter.is_meta or not count else int(parameter.detach().count_nonzero())
            reason = "head" if name in tied else _reason(name, module, leaf, others, uses, adapters)
            if not reason:
                reason = "excluded" if sparse else "not sparse yet"
        full = name if leaf in ("weight", "values") else f"{name}.{leaf}" if name else leaf
        owner = name.partition(".parametrizations.")[0]
        rows.append(
            SummaryRow(full, owner, type(module).__name__, shape, numel, nnz, reason, numel / total if total else 0.0)
        )
        if id(parameter) not in counted:
            counted.add(id(parameter))
            matrix_parameters, matrix_nnz = matrix_parameters + numel, matrix_nnz + nnz
    return Summary(tuple(rows), total, total - matrix_parameters + matrix_nnz, matrix_parameters, matrix_nnz)


def warn_of_dense(model: nn.Module, plan: SparsityConfig, caller: str, stacklevel: int) -> None:
    """Warn once of large matrices that stay dense although ``plan`` does not exclude them.

    Args:
        plan: its ``include``, ``exclude`` and groups of sparsity 0 tell what the user excluded.
        caller: the name of the function that warns.
    """
    said = large_dense(model, plan)
    if said:
        warnings.warn(
            f"{caller}: these matrices stay dense: {'; '.join(said)}; exclude them to silence this warning, and see "
            "sparsetrain.summary(model)",
            stacklevel=stacklevel,
        )


def large_dense(model: nn.Module, plan: SparsityConfig) -> list[str]:
    """Return a phrase for each kind of large matrix that stays dense although ``plan`` does not exclude it."""
    left_out = [*(() if plan.excludes_by_default else plan.exclude), *(g.match for g in plan.groups if g.sparsity == 0)]
    groups: dict[tuple[str, str], list[SummaryRow]] = {}
    for row in _summarise(model, count=False).rows:
        asked_for = row.name in plan.include  # by its very name, as in include=["lm_head"]
        if row.is_sparse or (row.reason in EXPECTED and not asked_for):
            continue
        names = (row.name, row.module, f"{row.module}.weight")
        if not any(matches(name, plan.include) for name in names) or any(matches(name, left_out) for name in names):
            continue
        # The same matrix of all blocks makes one phrase.
        groups.setdefault((re.sub(r"\b\d+\b", "*", row.name), row.reason), []).append(row)
    said = []
    for (_, reason), rows in groups.items():
        share = sum(row.share for row in rows)
        if share > WORTH_A_WARNING:
            more = f" and {len(rows) - 1} more like it" if len(rows) > 1 else ""
            said.append(f"{rows[0].name}{more} ({reason}, {100 * share:.1f} % of the weights)")
    return said


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield (module name, module, parameter's own name, parameter) of all matrices; a shared one for each holder.

    Biases are no matrices, even if each expert has one.
    """
    for name, module in wrappers.named_modules(model):
        for leaf, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, UninitializedParameter):
                continue
            stored = isinstance(module, SparseLinear) and leaf == "values"
            if stored or (parameter.ndim > 1 and "bias" not in leaf):
                yield name, module, leaf, parameter


def _total(model: nn.Module) -> int:
    """Return the number of weights of a model, sparse layers counted dense and shared parameters once."""
    total = 0
    seen: set[int] = set()
    for _, module in wrappers.named_modules(model):
        for leaf, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or isinstance(parameter, UninitializedParameter):
                continue
            seen.add(id(parameter))
            if isinstance(module, SparseLinear) and leaf == "values":
                total += module.out_features * module.in_features
            else:
                total += parameter.numel()
    return total


def _reason(
    name: str, module: nn.Module, leaf: str, others: list[str], uses: dict[int, int], adapters: tuple[str, ...]
) -> str:
    """Return why a dense matrix cannot be sparse, or is not by default; empty if it could be."""
    path = name if leaf == "weight" else f"{name}.{leaf}" if name else leaf
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if type(module).__name__.endswith("Norm"):
        return "norm"
    if ".parametrizations." in name:
        return "weight is computed (a parametrization)"
    if is_linear(module):
        return default_reason(name, others) or (refusal(name, module, uses, adapters) or "").removeprefix("its ")
    if isinstance(module, _CONVOLUTIONS):
        return "convolution"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "RNN"
    if isinstance(module, nn.Bilinear):
        return "bilinear"
    if isinstance(module, nn.MultiheadAttention):
        return "" if name and can_split(module, uses) else "attention input projection"
    known = default_reason(path, others)
    if known is not None:
        return known
    if "pos" in leaf or "token" in leaf:
        return "embedding"
    if "expert" in f"{name}.{type(module).__name__}".lower():
        return "" if leaf in stacks_of(name, module, uses) else "stacked experts"
    return f"parameter of {type(module).__name__}"
