"""Finds a pattern again by a number, and makes sure that the tensors beside it fit it before a kernel goes by it.

Legend: N rows (tokens), K in_features, M out_features, nnz stored values.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

# A pattern cannot cross the boundary of a custom op, its tensors and a number can. The number finds the pattern, and
# the layouts derived from it, again; when the pattern is gone it is rebuilt from the tensors.
LAYOUTS: weakref.WeakValueDictionary[int, SparsityPattern] = weakref.WeakValueDictionary()
_COUNTER = itertools.count(1)


def layout_id(pattern: SparsityPattern) -> int:
    """Return the number by which this process finds ``pattern`` again."""

    def register() -> int:
        number = next(_COUNTER)
        LAYOUTS[number] = pattern
        return number

    return pattern.derived("layout_id", register)


def _same(pattern: SparsityPattern, row_ptr: Tensor, col: Tensor, shape: list[int], block: list[int]) -> bool:
    """Return whether a number found the right pattern: that of an exported graph may mean another one here."""
    if (*pattern.shape, *pattern.block) != (*shape, *block) or pattern.device != col.device:
        return False
    pairs = ((pattern.row_ptr, row_ptr), (pattern.col, col))
    return all(mine.data_ptr() == given.data_ptr() or torch.equal(mine, given) for mine, given in pairs)


def find(layout: int, row_ptr: Tensor, col: Tensor, shape: list[int], block: list[int]) -> SparsityPattern:
    """Return the pattern that a number stands for in this process, or one made of the tensors beside it."""
    pattern = LAYOUTS.get(layout)
    if pattern is None or not _same(pattern, row_ptr, col, shape, block):
        pattern = SparsityPattern((shape[0], shape[1]), row_ptr, col, (block[0], block[1]))
    return pattern


def check_fit(pattern: SparsityPattern, values: Tensor) -> None:
    """Notice writes into the indices, and make sure that a kernel which goes by them stays inside ``values``.

    Raises:
        UserError: indices of no matrix of the pattern's shape, or another number of values.
    """
    if not pattern.untouched:
        pattern.refresh()
    if values.shape != pattern.fit:
        raise UserError(
            f"{pattern.owner}: values have shape {tuple(values.shape)}; the pattern has {pattern.nnz} nonzeros"
        )


def check_shapes(
    pattern: SparsityPattern, x: Tensor | None = None, g: Tensor | None = None, values: Tensor | None = None
) -> None:
    """Make sure that a kernel which goes by ``pattern`` stays inside x ``[N, K]``, g ``[N, M]`` and values.

    Raises:
        UserError: one of another shape, or indices of no matrix of the pattern's.
    """
    for name, given, columns in (("x", x, pattern.shape[1]), ("g", g, pattern.shape[0])):
        if given is not None and given.shape[1:] != (columns,):
            raise UserError(f"{pattern.owner}: {name} has shape {tuple(given.shape)}; (tokens, {columns}) is needed")
    if x is not None and g is not None and len(x) != len(g):
        raise UserError(f"{pattern.owner}: x has {len(x)} rows and g has {len(g)}")
    if values is not None:
        check_fit(pattern, values)
    else:
        pattern.refresh()
