"""Sparse matrices of scipy or torch as patterns; no unchecked index reaches compiled code.

scipy and torch convert between formats in compiled code that follows the stored indices without looking at them: an
index outside of the matrix writes into memory that is not the matrix's. So every format is taken apart here, the
arrays are checked, and the positions of the entries other than zero are computed by numpy, which checks its indices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.sparsity.patterns.pattern import SparsityPattern

MAX_MASK_SIDE = 2**22
"""The most rows or columns of a matrix from a file or of another library; a vocabulary has some 10^5."""

Array = np.ndarray[Any, Any]
_Entries = tuple[Array, Array, Array]  # row, column and value of each stored entry


def check_sides(shape: tuple[int, int]) -> None:
    """Raise `UserError` unless both sides lie in [1, `MAX_MASK_SIDE`]: a side costs 8 bytes of each."""
    if not all(1 <= side <= MAX_MASK_SIDE for side in shape):
        raise UserError(f"shape={shape} must have sides from 1 to {MAX_MASK_SIDE}")


def is_sparse(matrix: Any) -> bool:
    """Whether it is a sparse matrix of scipy, or of a library with the same methods, or of torch."""
    if isinstance(matrix, Tensor):
        return matrix.layout != torch.strided
    return hasattr(matrix, "tocsr") and hasattr(matrix, "nnz")


def pattern_of_sparse(matrix: Any) -> SparsityPattern:
    """Return the nonzero entries of a sparse matrix of scipy or torch; entries at the same place are summed.

    Raises:
        UserError: not two dimensions, a side beyond `MAX_MASK_SIDE`, an unknown layout, or indices of no matrix
            of that shape.
    """
    if isinstance(matrix, Tensor):
        return _of_torch(matrix)
    if getattr(matrix, "format", None) == "lil":
        return _of_lists(matrix)
    if getattr(matrix, "format", None) not in READERS:  # a dictionary, which holds no index that is followed
        matrix = matrix.tocoo() if hasattr(matrix, "tocoo") else matrix.tocsr()
    names = _ARRAYS[matrix.format]
    arrays = {name: np.asarray(getattr(matrix, name)) for name in names}
    return pattern_of_arrays(matrix.format, _pair_of(matrix.shape), arrays)


def pattern_of_arrays(layout: str, shape: tuple[int, int], arrays: Mapping[str, Array]) -> SparsityPattern:
    """Return the nonzero entries of a matrix in one of scipy's formats, given by the arrays of that format.

    Args:
        layout: ``csr``, ``csc``, ``bsr``, ``coo`` or ``dia``.
        shape: ``(R, C)``.
        arrays: ``data`` and ``indices``, ``indptr`` (csr, csc, bsr), ``row``, ``col`` (coo) or ``offsets`` (dia).

    Raises:
        UserError: see `pattern_of_sparse`, or an array that is missing.
    """
    if layout not in READERS:
        raise UserError(f"format={layout!r:.60} is not one of {', '.join(READERS)}")
    check_sides(shape)
    for name in _ARRAYS[layout]:
        if name not in arrays:
            raise UserError(f"a matrix in the format {layout} needs {name}")
        if arrays[name].dtype.kind not in ("biufc" if name == "data" else "iu"):
            raise UserError(
                f"{name} has dtype {arrays[name].dtype}; {'numbers' if name == 'data' else 'integers'} are needed"
            )
    row, column, value = READERS[layout](shape, arrays)
    return _compressed(shape, row, column, value)


def _of_torch(matrix: Tensor) -> SparsityPattern:
    values = matrix.detach()
    if matrix.ndim != 2:
        raise UserError(f"mask has {matrix.ndim} dimensions; a matrix [out_features, in_features] is needed")
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    if matrix.layout == torch.sparse_coo:
        # `coalesce` would follow unchecked indices.
        places = _array(values._indices())
        if places.ndim != 2 or places.shape[0] != 2:
            raise UserError(f"a sparse tensor with {matrix.sparse_dim()} sparse dimensions is no mask; two are needed")
        return pattern_of_arrays("coo", shape, {"row": places[0], "col": places[1], "data": _array(values._values())})
    by_rows = matrix.layout in (torch.sparse_csr, torch.sparse_bsr)
    pointers = values.crow_indices() if by_rows else values.ccol_indices()
    indices = values.col_indices() if by_rows else values.row_indices()
    arrays = {"indptr": _array(pointers), "indices": _array(indices), "data": _array(values.values())}
    layout = str(matrix.layout).removeprefix("torch.sparse_")
    if layout == "bsc":  # the transposed matrix in blocks of rows
        arrays["data"] = arrays["data"].swapaxes(1, -1)
        check_sides(shape)
        row, column, value = _bsr((shape[1], shape[0]), arrays)
        return _compressed(shape, column, row, value)
    return pattern_of_arrays(layout, shape, arrays)


def _of_lists(matrix: Any) -> SparsityPattern:
    """Return the entries of scipy's list of lists: ``rows`` has a list of columns for each row, ``data`` the values."""
    shape = _pair_of(matrix.shape)
    check_sides(shape)
    counts = [[len(entries) for entries in lists] for lists in (matrix.rows, matrix.data)]
    if len(counts[0]) != shape[0] or counts[0] != counts[1]:
        raise UserError("rows and data must have a list of the same length for each row")
    column, value = ([entry for entries in lists for entry in entries] for lists in (matrix.rows, matrix.data))
    row = np.repeat(np.arange(shape[0]), counts[0])
    arrays = {"row": row, "col": np.asarray(column, np.int64), "data": np.asarray(value, matrix.dtype)}
    return pattern_of_arrays("coo", shape, arrays)


def _array(tensor: Tensor) -> Array:
    tensor = tensor.cpu()
    floating = tensor.is_floating_point()  # numpy has fewer of those types
    array: Array = (tensor.double() if floating else tensor).numpy()
    return array


def _pair_of(shape: Any) -> tuple[int, int]:
    if len(shape) != 2:
        raise UserError(f"mask has {len(shape)} dimensions; a matrix [out_features, in_features] is needed")
    return int(shape[0]), int(shape[1])


def _compressed(shape: tuple[int, int], row: Array, column: Array, value: Array) -> SparsityPattern:
    """Return the pattern of checked entries in any order; places may repeat."""
    keys = row * shape[1] + column
    falls = keys[1:] <= keys[:-1]
    if falls.any():
        order = np.argsort(keys, kind="stable")
        keys, value = keys[order], value[order]
        first = np.concatenate([[True], keys[1:] != keys[:-1]])
        if not first.all():
            starts = np.flatnonzero(first)
            keys, value = keys[starts], np.add.reduceat(value, starts)
    keys = keys[value != 0]
    row_ptr = np.zeros(shape[0] + 1, np.int64)
    np.cumsum(np.bincount(keys // shape[1], minlength=shape[0]), out=row_ptr[1:])
    return SparsityPattern(shape, torch.from_numpy(row_ptr), torch.from_numpy(keys % shape[1]))


def _within(name: str, indices: Array, end: int) -> Array:
    """Return indices as int64 ``[n]`` if they lie in [0, end)."""
    if indices.ndim != 1:
        raise UserError(f"{name} has {indices.ndim} dimensions; one is needed")
    outside = (indices < 0) | (indices >= end)
    if outside.any():
        raise UserError(f"{name} has {indices[outside.argmax()]}; it must lie in [0, {end - 1}]")
    return indices.astype(np.int64)


def _groups(indptr: Array, groups: int, room: int) -> Array:
    """Return the group (row or column) of each stored entry; the arrays of entries have the length ``room``."""
    if indptr.shape != (groups + 1,):
        raise UserError(f"indptr has shape {indptr.shape}; the matrix needs ({groups + 1},)")
    if int(indptr[0]) != 0 or int(indptr[-1]) > room:
        raise UserError(f"indptr runs from {indptr[0]} to {indptr[-1]}; it must run from 0 to at most {room}")
    falls = indptr[1:] < indptr[:-1]
    if falls.any():
        raise UserError(f"indptr decreases at {int(falls.argmax())}")
    ends = indptr.astype(np.int64)
    return np.repeat(np.arange(groups), ends[1:] - ends[:-1])


def _csr(shape: tuple[int, int], arrays: Mapping[str, Array]) -> _Entries:
    data, indices = arrays["data"], arrays["indices"]
    if data.ndim != 1 or data.shape != indices.shape:
        raise UserError(f"data has shape {data.shape} and indices {indices.shape}; one length is needed")
    row = _groups(arrays["indptr"], shape[0], len(indices))
    return row, _within("indices", indices[: len(row)], shape[1]), data[: len(row)]


def _csc(shape: tuple[int, int], arrays: Mapping[str, Array]) -> _Entries:
    column, row, data = _csr((shape[1], shape[0]), arrays)
    return row, column, data


def _bsr(shape: tuple[int, int], arrays: Mapping[str, Array]) -> _Entries:
    data, indices = arrays["data"], arrays["indices"]
    if data.ndim != 3 or data.shape[:1] != indices.shape:
        raise UserError(f"data has shape {data.shape}; ({len(indices) if indices.ndim else 0}, bh, bw) is needed")
    _, bh, bw = data.shape
    if min(bh, bw) < 1 or shape[0] % bh or shape[1] % bw:
        raise UserError(f"block {bh}x{bw} does not divide the matrix {shape[0]}x{shape[1]}")
    row = _groups(arrays["indptr"], shape[0] // bh, len(indices))
    column = _within("indices", indices[: len(row)], shape[1] // bw)
    block, high, wide = data[: len(row)].nonzero()
    return row[block] * bh + high, column[block] * bw + wide, data[block, high, wide]


def _coo(shape: tuple[int, int], arrays: Mapping[str, Array]) -> _Entries:
    row, column = _within("row", arrays["row"], shape[0]), _within("col", arrays["col"], shape[1])
    if not row.shape == column.shape == arrays["data"].shape:
        shapes = f"{row.shape}, {column.shape} and {arrays['data'].shape}"
        raise UserError(f"row, col and data have shapes {shapes}; they must be the same")
    return row, column, arrays["data"]


def _dia(shape: tuple[int, int], arrays: Mapping[str, Array]) -> _Entries:
    data, offsets = arrays["data"], arrays["offsets"]
    if data.ndim != 2 or offsets.shape != data.shape[:1]:
        raise UserError(f"data has shape {data.shape} and offsets {offsets.shape}; one row for each offset is needed")
    if len(np.unique(offsets)) < len(offsets):
        raise UserError("offsets has an entry twice")
    reach = (offsets > -shape[0]) & (offsets < shape[1])  # a diagonal beyond the corners has no entry
    data, offsets = data[reach], offsets[reach].astype(np.int64)
    diagonal, column = data[:, : shape[1]].nonzero()
    row = column - offsets[diagonal]
    inside = (row >= 0) & (row < shape[0])
    diagonal, column = diagonal[inside], column[inside]
    return row[inside], column, data[diagonal, column]


READERS: dict[str, Callable[[tuple[int, int], Mapping[str, Array]], _Entries]] = {
    "csr": _csr,
    "csc": _csc,
    "bsr": _bsr,
    "coo": _coo,
    "dia": _dia,
}
_ARRAYS = {
    **dict.fromkeys(("csr", "csc", "bsr"), ("indptr", "indices", "data")),
    "coo": ("row", "col", "data"),
    "dia": ("offsets", "data"),
}
