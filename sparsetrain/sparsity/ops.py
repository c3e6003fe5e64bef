"""The differentiable product of a batch of rows and a sparse matrix, and the backends that compute it.

Legend: N rows (tokens), K in_features, M out_features, nnz stored values.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.errors import UserError, check_choice
from sparsetrain.sparsity.pattern import SparsityPattern


class Backend:
    """Three contractions over a pattern, and how forward and backward share work between them.

    Subclasses define `matmul`, `matmul_t` and `sampled`. One that can reuse something computed in the forward
    pass (a packed input, a scattered matrix) returns it from `forward` and takes it back in `backward`.
    """

    name: str

    def matmul(self, x: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        """Return ``x @ W.T``: ``[N, K] -> [N, M]``."""
        raise NotImplementedError

    def matmul_t(self, g: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        """Return ``g @ W``: ``[N, M] -> [N, K]``."""
        raise NotImplementedError

    def sampled(self, g: Tensor, x: Tensor, pattern: SparsityPattern) -> Tensor:
        """Return the values ``[nnz]`` of ``g.T @ x`` at the stored positions."""
        raise NotImplementedError

    def forward(self, x: Tensor, values: Tensor, pattern: SparsityPattern) -> tuple[Tensor, Tensor]:
        """Return ``x @ W.T`` and whatever `backward` wants kept (an empty tensor for nothing)."""
        return self.matmul(x, values, pattern), x.new_empty(0)

    def packed_shape(self, x: Tensor, pattern: SparsityPattern) -> tuple[int, ...]:
        """Return the shape of the second result of `forward`, for shape propagation without data."""
        return (0,)

    def input_gradient(self, g: Tensor, values: Tensor, packed: Tensor, pattern: SparsityPattern) -> Tensor:
        """Return ``g @ W`` with the help of what `forward` kept."""
        return self.matmul_t(g, values, pattern)


class MaskedBackend(Backend):
    """Scatters the values into a dense matrix and computes densely: right on every device, and saves no time.

    The scattered matrix is kept for the backward pass, which costs the memory of the dense layer and no more.
    """

    name = "masked"

    def matmul(self, x: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        return F.linear(x, pattern.scatter(values))

    def matmul_t(self, g: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
        return g @ pattern.scatter(values)

    def sampled(self, g: Tensor, x: Tensor, pattern: SparsityPattern) -> Tensor:
        return pattern.gather(g.t() @ x)

    def forward(self, x: Tensor, values: Tensor, pattern: SparsityPattern) -> tuple[Tensor, Tensor]:
        dense = pattern.scatter(values)
        return F.linear(x, dense), dense

    def packed_shape(self, x: Tensor, pattern: SparsityPattern) -> tuple[int, ...]:
        return pattern.shape

    def input_gradient(self, g: Tensor, values: Tensor, packed: Tensor, pattern: SparsityPattern) -> Tensor:
        return g @ packed


BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Make ``backend`` available to every sparse layer under ``backend.name``; an earlier one of that name is replaced.

    Raises:
        UserError: the name ``auto``, which stands for a choice among backends.
    """
    if backend.name == "auto":
        raise UserError("backend name 'auto' is taken: it stands for the choice among the registered ones")
    BACKENDS[backend.name] = backend


register_backend(MaskedBackend())


def backend_names() -> list[str]:
    """Return the names that a layer's ``backend`` accepts."""
    return ["auto", *BACKENDS]


def resolve_backend(name: str, pattern: SparsityPattern, tokens: int) -> str:
    """Return the registered backend that ``name`` stands for at this pattern and number of rows."""
    check_choice("backend", name, backend_names())
    return "masked" if name == "auto" else name


# A pattern cannot cross the boundary of a custom op, its tensors and a number can. The number finds the pattern, and
# the layouts derived from it, again; when the pattern is gone it is rebuilt from the tensors.
_LAYOUTS: weakref.WeakValueDictionary[int, SparsityPattern] = weakref.WeakValueDictionary()
_COUNTER = itertools.count(1)


def layout_id(pattern: SparsityPattern) -> int:
    """Return the number by which this process finds ``pattern`` again."""

    def register() -> int:
        number = next(_COUNTER)
        _LAYOUTS[number] = pattern
        return number

    return pattern.derived("layout_id", register)


def _find(layout: int, row_ptr: Tensor, col: Tensor, shape: list[int], block: list[int]) -> SparsityPattern:
    pattern = _LAYOUTS.get(layout)
    if pattern is None or pattern.device != col.device:
        pattern = SparsityPattern((shape[0], shape[1]), row_ptr, col, (block[0], block[1]))
    return pattern


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
) -> tuple[Tensor, Tensor]:
    return BACKENDS[backend].forward(x, values, _find(layout, row_ptr, col, shape, block))


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
) -> tuple[Tensor, Tensor]:
    packed = BACKENDS[backend].packed_shape(x, _LAYOUTS[layout])
    return x.new_empty(x.shape[0], shape[0]), x.new_empty(packed)


@torch.library.custom_op("sparsetrain::sparse_linear_backward", mutates_args=())
def _sparse_linear_backward(
    g: Tensor,
    x: Tensor,
    values: Tensor,
    packed: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    shape: list[int],
    block: list[int],
    backend: str,
    layout: int,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    engine, pattern = BACKENDS[backend], _find(layout, row_ptr, col, shape, block)
    grad_x = engine.input_gradient(g, values, packed, pattern) if need_x else x.new_empty(0)
    grad_values = engine.sampled(g, x, pattern) if need_values else values.new_empty(0)
    return grad_x, grad_values


@_sparse_linear_backward.register_fake
def _(
    g: Tensor,
    x: Tensor,
    values: Tensor,
    packed: Tensor,
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
        # Contiguous whatever the strides of x are: that is how a backend writes it.
        x.new_empty(x.shape) if need_x else x.new_empty(0),
        values.new_empty(values.shape) if need_values else values.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, values, row_ptr, col, *rest = inputs
    ctx.save_for_backward(x, values, output[1], row_ptr, col)
    ctx.rest = rest
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, g: Tensor, _packed: Tensor | None) -> tuple[Tensor | None, ...]:
    need_x, need_values = ctx.needs_input_grad[:2]
    grad_x, grad_values = _sparse_linear_backward(g.contiguous(), *ctx.saved_tensors, *ctx.rest, need_x, need_values)
    return (grad_x if need_x else None, grad_values if need_values else None, *[None] * 6)


def _refuse_double_backward(ctx: Any, *_gradients: Tensor) -> None:
    raise RuntimeError("a sparse layer has no second derivative: call backward without create_graph=True")


_sparse_linear.register_autograd(_backward, setup_context=_setup)
_sparse_linear_backward.register_autograd(_refuse_double_backward)


def sparse_linear(
    x: Tensor, values: Tensor, pattern: SparsityPattern, bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Return ``x @ W.T + bias`` for the matrix W that has ``values`` at the positions of ``pattern``.

    Differentiable once in ``x``, ``values`` and ``bias``; the gradient of ``values`` exists at the stored positions
    only. Inside ``torch.autocast`` the product is computed in the autocast type, as ``nn.Linear`` does.

    Args:
        x: ``[..., K]``. values: ``[nnz]``, in the order of the pattern. bias: ``[M]`` or None.
        backend: a registered name, or ``auto``.

    Returns:
        ``[..., M]``.

    Raises:
        UserError: an input of another width, or values that do not fit the pattern.
    """
    if x.ndim == 0 or x.shape[-1] != pattern.shape[1]:
        raise UserError(f"the input has shape {tuple(x.shape)}; its last dimension must be {pattern.shape[1]}")
    if values.shape != (pattern.nnz,):
        raise UserError(f"values have shape {tuple(values.shape)}; the pattern has {pattern.nnz} nonzeros")
    if torch.is_autocast_enabled(x.device.type):
        x, values = _autocast(x), _autocast(values)
        bias = None if bias is None else _autocast(bias)
    rows = x.reshape(-1, x.shape[-1])
    y, _ = _sparse_linear(
        rows,
        values,
        pattern.row_ptr,
        pattern.col,
        list(pattern.shape),
        list(pattern.block),
        resolve_backend(backend, pattern, rows.shape[0]),
        layout_id(pattern),
    )
    y = y.view(*x.shape[:-1], pattern.shape[0])
    return y if bias is None else y + bias


def _autocast(tensor: Tensor) -> Tensor:
    # float64 stays what it is, as in torch's own casts.
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(tensor.device.type))
