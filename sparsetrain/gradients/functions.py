"""Backward passes that compute the gradient of a weight example by example, and with it the norms of its parts.

Shapes: B examples, T rows of an example, K inputs, M outputs, V rows of a table, D its columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsetrain.gradients.record import Use, direction, length_of, wide
from sparsetrain.sparsity.backends.cpu import enough

# Elements of all examples' gradients that are computed at a time. Smaller products cost more than the caches save, and
# larger ones are allocated anew each time; measured with an L2 of 2 MB.
_CPU_ELEMENTS = 1 << 22
_KERNEL = 1 << 12  # a call of the kernel pays from so many elements on
_GPU_ELEMENTS = 1 << 24


def weight_gradient(
    g: Tensor, x: Tensor, ids: Tensor | None = None, total: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``sum_b g_b^T x_b`` ``[M, K]``, the squared norm of each term ``[B]``, and some of their rows.

    It costs the multiply-adds of the product over all rows, and a pass over ``[M, K]`` an example.

    Args:
        g: ``[B, T, M]``. x: ``[B, T, K]``.
        ids: int64 ``[B, R]``, rows of each term to return ``[B, R, K]``; None for none.
        total: a sum to add to, in place; None for a new one, float32 or float64.
    """
    (examples, length, outputs), inputs = g.shape, x.shape[2]
    fresh = total is None
    total = wide(x[:0]).new_empty(outputs, inputs) if total is None else total
    if length == 1 and ids is None:
        # A term is an outer product, whose norm is the product of two norms.
        squared = wide(g).square().sum((1, 2)) * wide(x).square().sum((1, 2))
        product = g[:, 0].t() @ x[:, 0]
        return total.copy_(product) if fresh else total.add_(product), squared, None
    squares = total.new_zeros(examples)
    rows = None if ids is None else total.new_zeros(examples, ids.shape[1], inputs)
    room = _CPU_ELEMENTS if g.is_cpu else _GPU_ELEMENTS
    height = min(outputs, max(16, room // (examples * inputs))) if g.is_cpu else outputs
    at_once = min(examples, max(1, room // (height * inputs)))
    buffer = x.new_empty(at_once * height * inputs)
    for top in range(0, outputs, height):
        band, target = g[:, :, top : top + height].mT, total[top : top + height]
        for first in range(0, examples, at_once):
            of_g, of_x = band[first : first + at_once], x[first : first + at_once]
            shape = (len(of_g), len(target), inputs)
            terms = torch.bmm(of_g, of_x, out=buffer[: math.prod(shape)].view(shape))
            squares[first : first + at_once] += _add(terms, target, fresh and first == 0)
            if ids is not None and rows is not None:
                for example, term in enumerate(terms, start=first):
                    inside = (ids[example] >= top) & (ids[example] < top + len(target))
                    rows[example, inside] = term[ids[example, inside] - top].to(rows.dtype)
    return total, squares, rows


def _add(terms: Tensor, target: Tensor, fresh: bool) -> Tensor:
    """Add ``terms`` ``[b, m, K]`` to ``target`` ``[m, K]``, and return their squared norms ``[b]``.

    Args:
        fresh: whether ``target`` has no content yet.
    """
    if terms.is_cpu and terms.dtype == torch.float32 and terms[0].numel() >= _KERNEL:
        from sparsetrain.kernels.by_example import add_parts  # imports a compiler

        examples, count = len(terms), target.numel()
        threads = enough(torch.get_num_threads(), terms.numel())
        squares = torch.zeros(threads, examples, device="cpu")
        add_parts(
            threads,
            parts=terms.view(-1),
            examples=examples,
            total=target.view(-1),
            count=count,
            fresh=int(fresh),
            squares=squares,
        )
        return squares.sum(0)
    flat = wide(terms).view(len(terms), -1)
    total = terms[0] if len(terms) == 1 else terms.sum(0)
    if fresh:
        target.copy_(total)
    else:
        target += total
    return torch.linalg.vecdot(flat, flat)


def matrix_gradient(use: Use, g: Tensor, x: Tensor, turn: bool = False) -> Tensor:
    """Return the gradient ``[M, K]`` of a weight, ``[K, M]`` if ``turn``, and record its norms.

    Args:
        g: gradient of the output ``[..., M]``. x: the input ``[..., K]``.
    """
    g, x = use.by_example(g), use.by_example(x)
    first, second = (x, g) if turn else (g, x)
    tied = None if turn else use.tied
    if use.alone or tied is not None:
        gradient, squared, rows = weight_gradient(first, second, None if tied is None else tied.ids)
        if tied is None:
            use.add(squared)
        else:
            assert rows is not None
            use.add_rows(squared, rows)
    else:
        gradient = first.flatten(0, 1).t() @ second.flatten(0, 1)
        use.defer(lambda example: first[example].t().double() @ second[example].double())
    use.expect(_digest_of_product(first, second), rounding(first) * float(length_of(second)))
    return gradient


def _digest_of_product(g: Tensor, x: Tensor) -> Tensor:
    """Return `digest` of ``sum_b g_b^T x_b`` from ``[B, T, M]`` and ``[B, T, K]``."""
    left, right = (wide(one) @ direction(one.shape[2], one.device).to(wide(one).dtype) for one in (g, x))
    return (left.double() * right.double()).sum()[None]


def rounding(g: Tensor) -> float:
    """Return the norm of a gradient times the unit roundoff of its type: what sums of its elements may be off by."""
    return 64.0 * torch.finfo(g.dtype).eps * float(length_of(g))


class Linear(torch.autograd.Function):
    """``x @ W.T + b``, whose backward pass records norms; ``x @ W + b`` if ``turn``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        of_weight: Use | None,
        of_bias: Use | None,
        turn: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.uses, ctx.turn = (of_weight, of_bias), turn
        y = F.linear(x.reshape(-1, x.shape[-1]), weight.t() if turn else weight, bias)
        # Autograd must not see a view: views that a function returns cannot be changed in place.
        return y if x.ndim == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_weight, of_bias = ctx.uses
        grad_x = g @ (weight.t() if ctx.turn else weight) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            if of_weight is None:
                rows, columns = g.flatten(0, -2), x.flatten(0, -2)
                grad_weight = columns.t() @ rows if ctx.turn else rows.t() @ columns
            else:
                grad_weight = matrix_gradient(of_weight, g, x, ctx.turn).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            total = g.flatten(0, -2).sum(0) if of_bias is None else bias_gradient(of_bias, g)
            grad_bias = total.to(g.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


def bias_gradient(use: Use, g: Tensor) -> Tensor:
    """Return the gradient ``[M]`` of a bias from that of the output ``[..., M]``, and record its norms."""
    return use.add_parts(wide(use.by_example(g)).sum(1), rounding(g))


def record_table(use: Use, ids: Tensor, g: Tensor) -> None:
    """Record the norms of a table ``[V, D]`` of which rows were taken.

    A token that occurs several times in an example adds several gradients to one row, which are summed before they are
    squared.

    Args:
        ids: int64 ``[B, T]``, negative where no row was taken.
        g: ``[B, T, D]``, gradient of the rows.
    """
    taken = ids >= 0
    g = wide(g) * taken[:, :, None]
    rows = use.parameter.shape[0]
    examples, _, width = g.shape
    flat = torch.arange(examples, device=ids.device)[:, None] * rows + ids.clamp_min(0)
    places, slots = torch.unique(flat, return_inverse=True)
    sums = g.new_zeros(len(places), width).index_add_(0, slots.flatten(), g.flatten(0, 1))
    squared = g.new_zeros(examples).index_add_(0, places // rows, sums.square().sum(1))
    if use.alone:
        use.add(squared)
    elif use.tied is not None:
        use.add_table(squared, g)
    else:

        def gradient(example: int) -> Tensor:
            return g.new_zeros(rows, width).index_add_(0, ids[example].clamp_min(0), g[example])

        use.defer(gradient)
    left, right = (direction(size, g.device).to(g.dtype) for size in use.parameter.shape)
    use.expect((left[ids.clamp_min(0)].double() * (g @ right).double()).sum()[None], rounding(g))
