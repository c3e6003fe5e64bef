"""The dense matrix of a sparse layer, for code that reads it instead of calling the product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.sparsity.backends.layouts import check_fit, find, layout_id
from sparsetrain.sparsity.layers.ops import refuse_double_backward
from sparsetrain.sparsity.patterns.pattern import SparsityPattern


@torch.library.custom_op("sparsetrain::dense_matrix", mutates_args=())
def _dense_matrix(
    values: Tensor, row_ptr: Tensor, col: Tensor, shape: list[int], block: list[int], layout: int
) -> Tensor:
    pattern = find(layout, row_ptr, col, shape, block)
    check_fit(pattern, values)
    if pattern.request is not None:
        pattern.request.opened()
    return pattern.scatter(values)


@_dense_matrix.register_fake
def _(values: Tensor, row_ptr: Tensor, col: Tensor, shape: list[int], block: list[int], layout: int) -> Tensor:
    return values.new_empty(shape)


@torch.library.custom_op("sparsetrain::dense_matrix_backward", mutates_args=())
def _dense_matrix_backward(
    g: Tensor, row_ptr: Tensor, col: Tensor, shape: list[int], block: list[int], layout: int, nnz: int
) -> Tensor:
    pattern = find(layout, row_ptr, col, shape, block)
    if pattern.request is not None:
        pattern.request.add_dense(g)
    return pattern.gather(g)


@_dense_matrix_backward.register_fake
def _(g: Tensor, row_ptr: Tensor, col: Tensor, shape: list[int], block: list[int], layout: int, nnz: int) -> Tensor:
    return g.new_empty(nnz)


def _dense_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, row_ptr, col, *ctx.rest = inputs
    ctx.nnz = values.shape[0]
    ctx.save_for_backward(row_ptr, col)


def _dense_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return _dense_matrix_backward(g, *ctx.saved_tensors, *ctx.rest, ctx.nnz), *[None] * 5


_dense_matrix.register_autograd(_dense_backward, setup_context=_dense_setup)
_dense_matrix_backward.register_autograd(refuse_double_backward)


class _DenseMatrix(torch.autograd.Function):
    """`SparsityPattern.scatter` that gives its gradient to a request."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, pattern: SparsityPattern) -> Tensor:
        ctx.pattern = pattern
        pattern.request.opened(ctx)
        return pattern.scatter(values)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        if ctx.pattern.request is not None:
            ctx.pattern.request.add_dense(g, ctx)
        return ctx.pattern.gather(g), None


def dense_matrix(values: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return the dense matrix ``[R, C]`` that has ``values`` ``[nnz]`` at the positions of ``pattern``.

    Differentiable in ``values``. Code that reads it in place of calling `sparse_linear` (``nn.MultiheadAttention`` does
    so with its output projection) serves a request for the dense gradient all the same.

    Raises:
        UserError: values that do not fit the pattern.
    """
    if torch.compiler.is_compiling():
        place = pattern.row_ptr, pattern.col, list(pattern.shape), list(pattern.block), layout_id(pattern)
        return _dense_matrix(values, *place)
    check_fit(pattern, values)
    if pattern.request is None:
        return pattern.scatter(values)
    if torch.is_grad_enabled() and values.requires_grad:
        return _DenseMatrix.apply(values, pattern)
    pattern.request.passed()
    return pattern.scatter(values)


def from_dense(weight: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return ``[nnz]``: a stored dense ``weight`` ``[R, C]`` at the positions of ``pattern``, and zero everywhere else.

    Raises:
        UserError: a weight of another shape, or one that has weights outside the pattern.
    """
    if tuple(weight.shape) != pattern.shape:
        raise UserError(f"weight has shape {tuple(weight.shape)}; the layer needs {pattern.shape}")
    values = pattern.gather(weight.to(pattern.device))
    outside = int(weight.count_nonzero()) - int(values.count_nonzero())
    if outside:
        raise UserError(
            f"weight is dense and has {outside} weights outside the mask: load the masks first (st.sparsify(model, "
            "masks=...)), or load into the dense model"
        )
    return values


def block_of(row_ptr: Tensor, col: Tensor, nnz: int, out_features: int, in_features: int) -> tuple[int, int]:
    """Return the block that the sizes of the stored tensors imply, so that no separate entry can disagree."""
    block_rows = row_ptr.numel() - 1
    if block_rows < 1 or out_features % block_rows or col.numel() < 1:
        raise UserError(f"row_ptr with {row_ptr.numel()} and col with {col.numel()} entries fit no {out_features} rows")
    bh = out_features // block_rows
    if nnz % (col.numel() * bh):
        raise UserError(f"{nnz} values do not fill {col.numel()} stored blocks of {bh} rows")
    return bh, nnz // (col.numel() * bh)
