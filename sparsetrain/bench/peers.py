"""Sparse layers of other libraries. They are measured if installed, and reported as missing otherwise.

Shapes: N tokens, K in_features, M out_features.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsetrain.bench.memory import STATE_BYTES
from sparsetrain.bench.timing import Work
from sparsetrain.sparsity import SparsityPattern

# The step, its dense weight, its persistent bytes, and a note.
_Peer = tuple[Work, Tensor | None, Callable[[], int] | None, str]


class Skipped(Exception):
    """A contender cannot be measured here; the message says why."""


def missing(name: str) -> str | None:
    """Return the reason why the peer called ``name`` is unavailable on this machine, or None."""
    if name in ("sparselab", "sparseprop") and importlib.util.find_spec(name) is None:
        return f"not installed (pip install {name})"
    return None


def step_of(layer: Callable[[Tensor], Tensor], weights: Sequence[Tensor], x: Tensor, g: Tensor) -> Work:
    """Return the training step of ``layer`` through autograd.

    Args:
        weights: tensors that get a gradient besides the input.
        x: input ``[N, K]``.
        g: gradient of the output ``[N, M]``.
    """
    x = x.requires_grad_()

    def backward(y: Tensor) -> None:
        y.backward(g)
        x.grad = None
        for weight in weights:
            weight.grad = None

    def fresh() -> list[Tensor]:
        # The copy acts as the output of an earlier layer: it is freed as soon as nothing keeps it.
        layer(x.clone()).backward(g)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        gradients = [each.values() if each.layout == torch.sparse_csr else each for each in gradients]
        x.grad = None
        for weight in weights:
            weight.grad = None
        return gradients

    return Work(lambda: layer(x), backward, fresh)


def _torch_csr(pattern: SparsityPattern, values: Tensor, x: Tensor, g: Tensor) -> _Peer:
    index = (pattern.row_ptr, pattern.col.to(torch.int64))
    weight = torch.sparse_csr_tensor(*index, values.clone(), pattern.shape).requires_grad_()
    size = STATE_BYTES * pattern.nnz + sum(part.numel() * part.element_size() for part in index)
    work, note = _checked(step_of(lambda rows: torch.sparse.mm(weight, rows.t()).t(), [weight], x, g))
    return work, _dense(pattern, values), lambda: size, note or "torch.sparse.mm, int64 indices"


def _scipy(pattern: SparsityPattern, values: Tensor, x: Tensor, g: Tensor) -> _Peer:
    from scipy.sparse import csr_array

    parts = (values.numpy(), pattern.col.numpy(), pattern.row_ptr.numpy().astype("int32"))
    weight: Any = csr_array(parts, shape=pattern.shape)
    columns = x.detach().numpy().T
    return Work(lambda: (weight @ columns).T), _dense(pattern, values), None, "forward only, one thread"


def _sparselab(pattern: SparsityPattern, values: Tensor, x: Tensor, g: Tensor) -> _Peer:
    module = _load("sparselab")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rows, columns = pattern.shape
        layer = module.SparseLinear(columns, rows, bias=False, sparsity=1.0 - pattern.density)
    work, note = _checked(step_of(layer, list(layer.parameters()), x, g))
    return work, None, None, note or "its own random mask of the same sparsity"


def _sparseprop(pattern: SparsityPattern, values: Tensor, x: Tensor, g: Tensor) -> _Peer:
    _load("sparseprop")
    module = _load("sparseprop.modules.linear")
    weight = _dense(pattern, values)
    layer = module.SparseLinear(weight)
    work, note = _checked(step_of(layer, list(layer.parameters()), x, g))
    return work, weight, None, note


PEER_LAYERS: dict[str, Callable[[SparsityPattern, Tensor, Tensor, Tensor], _Peer]] = {
    "torch_csr": _torch_csr,
    "scipy": _scipy,
    "sparselab": _sparselab,
    "sparseprop": _sparseprop,
}


def _checked(work: Work) -> tuple[Work, str]:
    """Return ``work`` and a note. If the library has no backward pass, drop it and give the reason in the note.

    Raises:
        Skipped: the forward pass fails as well.
    """
    try:
        result = work.forward()
    except Exception as error:
        raise Skipped(f"forward fails: {_first_line(error)}") from None
    try:
        assert work.backward is not None
        work.backward(result)
    except Exception as error:
        return Work(work.forward), f"forward only, backward is not supported: {_first_line(error)}"
    return work, ""


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Skipped(f"cannot be imported: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _dense(pattern: SparsityPattern, values: Tensor) -> Tensor:
    return pattern.scatter(values)
