"""The differentiable product of a batch of rows and a sparse matrix.

Legend: N rows (tokens), K in_features, M out_features, nnz stored values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.flop_formulas import count_by
from sparsetrain.gradients.record import Use, digest
from sparsetrain.sparsity.backends.base import BACKENDS, resolve_backend
from sparsetrain.sparsity.backends.layouts import LAYOUTS, check_fit, check_shapes, find, layout_id
from sparsetrain.sparsity.patterns.pattern import SparsityPattern


@torch.library.custom_op("sparsetrain::sparse_linear", mutates_args=())
def _sparse_linear(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    shape: list[int],
    block: list[int],
    backend: str,
    layout: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    pattern = find(layout, row_ptr, col, shape, block)
    check_shapes(pattern, x=x, values=values)
    if keep and pattern.request is not None:
        pattern.request.opened()
    return BACKENDS[backend].forward(x, values, pattern, keep)


@_sparse_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    shape: list[int],
    block: list[int],
    backend: str,
    layout: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    kept = BACKENDS[backend].kept(x, LAYOUTS[layout]) if keep else x.new_empty(0)
    return x.new_empty(x.shape[0], shape[0]), kept


@torch.library.custom_op("sparsetrain::sparse_linear_backward", mutates_args=())
def _sparse_linear_backward(
    g: Tensor,
    x: Tensor,
    values: Tensor,
    kept: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    shape: list[int],
    block: list[int],
    backend: str,
    layout: int,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    pattern = find(layout, row_ptr, col, shape, block)
    check_shapes(pattern, x=x if need_values else None, g=g, values=values)
    if need_values and pattern.request is not None:
        pattern.request.add(g, x)
    return BACKENDS[backend].backward(g, x, values, kept, pattern, need_x, need_values)


@_sparse_linear_backward.register_fake
def _(
    g: Tensor,
    x: Tensor,
    values: Tensor,
    kept: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    shape: list[int],
    block: list[int],
    backend: str,
    layout: int,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    return (
        # A backend writes contiguous rows, for any strides of x.
        g.new_empty(g.shape[0], shape[1]) if need_x else g.new_empty(0),
        values.new_empty(values.shape) if need_values else values.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, values, row_ptr, col, *rest, _keep = inputs
    # Otherwise autograd allocates zeros of the size of `kept` as its gradient.
    ctx.set_materialize_grads(False)
    x = x if ctx.needs_input_grad[1] else x.new_empty(0)
    ctx.save_for_backward(x, values.detach(), output[1], row_ptr, col)
    ctx.rest = rest
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, g: Tensor | None, _kept: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 9
    need_x, need_values = ctx.needs_input_grad[:2]
    grad_x, grad_values = _sparse_linear_backward(g.contiguous(), *ctx.saved_tensors, *ctx.rest, need_x, need_values)
    return (grad_x if need_x else None, grad_values if need_values else None, *[None] * 7)


def refuse_double_backward(ctx: Any, *_gradients: Tensor) -> None:
    """Raise `RuntimeError`: the backward pass of a custom op cannot be differentiated."""
    raise RuntimeError("a sparse layer has no second derivative: call backward without create_graph=True")


_sparse_linear.register_autograd(_backward, setup_context=_setup)
_sparse_linear_backward.register_autograd(refuse_double_backward)


def _flops(x: Any, values: Any, *_: Any, **__: Any) -> int:
    """Return 2 N nnz: a multiply-add for each row and stored value."""
    return 2 * x[0] * values[0]


def _dense_flops(x: Any, values: Any, row_ptr: Any, col: Any, shape: list[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * shape[0] * shape[1]


def _flops_backward(g: Any, x: Any, values: Any, *rest: Any, **__: Any) -> int:
    """Return 2 N nnz for each of the two gradients that is needed."""
    *_, need_x, need_values = rest
    return 2 * g[0] * values[0] * (need_x + need_values)


def _dense_flops_backward(
    g: Any, x: Any, values: Any, kept: Any, row_ptr: Any, col: Any, shape: list[int], *rest: Any, **__: Any
) -> int:
    *_, need_x, need_values = rest
    return 2 * g[0] * shape[0] * shape[1] * (need_x + need_values)


count_by("sparse_linear", _flops, _dense_flops)
count_by("sparse_linear_backward", _flops_backward, _dense_flops_backward)


class _Direct(torch.autograd.Function):
    """`_sparse_linear` without the custom op, whose own overhead is about half a millisecond per step.

    Input and output have any number of leading dimensions. Views made outside of this function would be nodes of the
    graph, whose cost shows beside a small layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, pattern: SparsityPattern, backend: str, use: Use | None) -> Tensor:
        y, kept = BACKENDS[backend].forward(_rows(x), values, pattern, keep=True)
        ctx.set_materialize_grads(False)
        ctx.pattern, ctx.backend, ctx.changes, ctx.use = pattern, backend, pattern.changes, use
        given = x if ctx.needs_input_grad[1] else None
        if pattern.request is not None and given is not None:
            pattern.request.opened(ctx)
        # A topology that is set before the backward pass replaces the parameter's data, and not this detached tensor.
        ctx.save_for_backward(given, values.detach(), kept)
        # Autograd must not see a view: views that a function returns cannot be changed in place.
        return y if x.ndim == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 5
        need_x, need_values, *_ = ctx.needs_input_grad
        x, values, kept = ctx.saved_tensors
        pattern, leading = ctx.pattern, g.shape[:-1]
        pattern.refresh()
        if pattern.changes != ctx.changes:
            raise RuntimeError(
                f"{pattern.owner}: its indices were changed in place between the forward and the backward pass"
            )
        g = _rows(g).contiguous()
        x = g.new_empty(0) if x is None else _rows(x)
        if torch.is_grad_enabled():
            # Under create_graph the custom op raises when it is differentiated, even if only the input or the values
            # lead back to it.
            place = _place(pattern, ctx.backend)
            g = g if g.requires_grad else g.detach().requires_grad_()
            grads = _sparse_linear_backward(g, x.detach(), values, kept, *place, need_x, need_values)
        else:
            if need_values and pattern.request is not None:
                pattern.request.add(g, x, ctx)
            if need_values and pattern.copied:
                pattern.__dict__["trained"] = True
            by_example = need_values and ctx.use is not None
            grads = BACKENDS[ctx.backend].backward(g, x, values, kept, pattern, need_x, need_values and not by_example)
            if by_example:
                grads = grads[0], _values_by_example(ctx.use, g, x, pattern, ctx.backend).to(values.dtype)
        grad_x = grads[0] if need_x else None
        if grad_x is not None and len(leading) != 1:
            grad_x = grad_x.view(*leading, grad_x.shape[1])
        return (grad_x, grads[1] if need_values else None, None, None, None)


def _values_by_example(use: Use, g: Tensor, x: Tensor, pattern: SparsityPattern, backend: str) -> Tensor:
    """Return the gradient ``[nnz]`` of the values, and record its norms over examples.

    Args:
        g: ``[N, M]``. x: ``[N, K]``; rows of all examples, one after the other.
    """
    parts_of_g, parts_of_x = use.by_example(g), use.by_example(x)
    if use.alone:
        gradient, squared = BACKENDS[backend].sampled_by_example(g, x, pattern, use.examples)
        use.add(squared)
    else:
        gradient = BACKENDS[backend].sampled(g, x, pattern)
        use.defer(lambda one: BACKENDS[backend].sampled(parts_of_g[one], parts_of_x[one], pattern))
    use.expect(digest(gradient))
    return gradient


def _rows(tensor: Tensor) -> Tensor:
    """Return a tensor as a matrix with its last dimension."""
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def _place(pattern: SparsityPattern, backend: str) -> tuple[Any, ...]:
    """Return the arguments by which the custom ops get a pattern and a backend."""
    return pattern.row_ptr, pattern.col, list(pattern.shape), list(pattern.block), backend, layout_id(pattern)


def dispatched(*tensors: Tensor) -> bool:
    """Return whether a call must go through an operation that torch knows.

    That is so while a compiler, a tracer or a dispatch mode is active, or if an argument is a Tensor subclass.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def sparse_linear(
    x: Tensor,
    values: Tensor,
    pattern: SparsityPattern,
    bias: Tensor | None = None,
    backend: str = "auto",
    use: Use | None = None,
) -> Tensor:
    """Return ``x @ W.T + bias`` for the matrix W that has ``values`` at the positions of ``pattern``.

    Differentiable once in ``x``, ``values`` and ``bias``; the gradient of ``values`` exists at the stored positions
    only. Inside ``torch.autocast`` the product is computed in the autocast type, as ``nn.Linear`` does.

    Args:
        x: ``[..., K]``. values: ``[nnz]``, in the order of the pattern. bias: ``[M]`` or None.
        backend: a registered name, or ``auto``.
        use: receives the norms of the examples' own gradients of ``values``, see `sparsetrain.per_example_norms`.

    Returns:
        ``[..., M]``.

    Raises:
        UserError: an input of another width, values that do not fit the pattern, or a backend that cannot compute this.
    """
    if x.ndim == 0 or x.shape[-1] != pattern.shape[1]:
        raise UserError(f"the input has shape {tuple(x.shape)}; its last dimension must be {pattern.shape[1]}")
    traced = dispatched(x, values)
    if not traced:
        check_fit(pattern, values)
    elif use is not None:
        raise UserError(f"per-example norms of {use.name}: they are not computed inside a compiler, tracer or mode")
    if torch.is_autocast_enabled(x.device.type):
        x, values = _autocast(x), _autocast(values)
        bias = None if bias is None else _autocast(bias)
    keep = torch.is_grad_enabled() and (x.requires_grad or values.requires_grad)
    name = resolve_backend(backend, pattern, x.numel() // x.shape[-1], x.dtype, x.device, forward_only=not keep)
    if traced:
        y, _ = _sparse_linear(_rows(x), values, *_place(pattern, name), keep)
    elif keep:
        y = _Direct.apply(x, values, pattern, name, use)
    else:
        if pattern.request is not None:
            pattern.request.passed()
        y, _ = BACKENDS[name].forward(_rows(x), values, pattern, keep=False)
    if y.ndim != x.ndim:
        y = y.view(*x.shape[:-1], pattern.shape[0])
    return y if bias is None else y + bias


def _autocast(tensor: Tensor) -> Tensor:
    # float64 is not cast, as in torch's own autocast.
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(tensor.device.type))
