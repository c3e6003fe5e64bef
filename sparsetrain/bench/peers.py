"""Sparse layers of other libraries. They are measured if installed, and reported as missing otherwise.

Shapes: N tokens, K in_features, M out_features.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsetrain.bench.timing import Work
from sparsetrain.sparsity import SparsityPattern


@dataclass(frozen=True)
class PeerLayer:
    """A sparse layer of another library.

    Attributes:
        call: ``[N, K] -> [N, M]``.
        weights: what a backward pass gives a gradient besides the input; empty if there is none.
        dense: the matrix ``[M, K]`` that it multiplies by, to check the result; None if unavailable.
        index_bytes: bytes of all indices; None if unknown.
        note: what a reader must know to compare it.
    """

    call: Callable[[Tensor], Any]
    weights: Sequence[Tensor]
    dense: Tensor | None = None
    index_bytes: int | None = None
    note: str = ""

    def step(self, x: Tensor, g: Tensor) -> tuple[Work, str]:
        """Return the training step and a note; without a backward pass the step is the forward pass alone.

        Raises:
            Skipped: the forward pass fails as well.
        """
        work = step_of(self.call, self.weights, x, g)
        with _quiet():
            return self._checked(work)

    def _checked(self, work: Work) -> tuple[Work, str]:
        try:
            result = work.forward()
        except Exception as error:
            raise Skipped(f"forward fails: {first_line(error)}") from None
        if not self.weights:
            return Work(work.forward), self.note
        try:
            assert work.backward is not None
            work.backward(result)
        except Exception as error:
            return Work(work.forward), f"forward only, backward is not supported: {first_line(error)}"
        return work, self.note


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


def peer_layer(name: str, pattern: SparsityPattern, values: Tensor) -> PeerLayer:
    """Return the layer of another library with this pattern and these values, as far as the library takes them.

    Raises:
        Skipped: it cannot be used here; the message says why.
    """
    with _quiet():
        return _PEERS[name](pattern, values)


def _torch_csr(pattern: SparsityPattern, values: Tensor) -> PeerLayer:
    index = (pattern.row_ptr, pattern.col.to(torch.int64))
    weight = torch.sparse_csr_tensor(*index, values.clone(), pattern.shape).requires_grad_()
    size = sum(part.numel() * part.element_size() for part in index)
    note = "torch.sparse.mm, int64 indices"
    return PeerLayer(lambda x: torch.sparse.mm(weight, x.t()).t(), [weight], pattern.scatter(values), size, note)


def _scipy(pattern: SparsityPattern, values: Tensor) -> PeerLayer:
    from scipy.sparse import csr_array

    parts = (values.numpy(), pattern.col.numpy(), pattern.row_ptr.numpy().astype("int32"))
    weight: Any = csr_array(parts, shape=pattern.shape)
    size = 4 * (pattern.nnz + pattern.shape[0] + 1)
    dense = pattern.scatter(values)
    return PeerLayer(lambda x: (weight @ x.detach().numpy().T).T, [], dense, size, "forward only, one thread")


def _sparselab(pattern: SparsityPattern, values: Tensor) -> PeerLayer:
    module = _load("sparselab")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rows, columns = pattern.shape
        layer = module.SparseLinear(columns, rows, bias=False, sparsity=1.0 - pattern.density)
    return PeerLayer(layer, list(layer.parameters()), note="its own random mask of the same sparsity")


def _sparseprop(pattern: SparsityPattern, values: Tensor) -> PeerLayer:
    _load("sparseprop")
    module = _load("sparseprop.modules.linear")
    weight = pattern.scatter(values)
    layer = module.SparseLinear(weight)
    return PeerLayer(layer, list(layer.parameters()), weight)


_PEERS: dict[str, Callable[[SparsityPattern, Tensor], PeerLayer]] = {
    "torch_csr": _torch_csr,
    "scipy": _scipy,
    "sparselab": _sparselab,
    "sparseprop": _sparseprop,
}


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beta features, and the way other libraries create arrays
        yield


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Skipped(f"cannot be imported: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
