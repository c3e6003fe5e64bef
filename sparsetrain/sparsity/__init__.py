"""Patterns, sparse layers, and the surgery that puts them into a model."""

from sparsetrain.sparsity.allocation import SparsityConfig, SparsityGroup, allocate
from sparsetrain.sparsity.auto import choose
from sparsetrain.sparsity.csr_backend import CsrBackend
from sparsetrain.sparsity.linear import SparseLinear
from sparsetrain.sparsity.ops import Backend, backend_names, register_backend, set_choice, sparse_linear
from sparsetrain.sparsity.pattern import SparsityPattern
from sparsetrain.sparsity.surgery import densify, sparse_layers, sparsify
from sparsetrain.sparsity.triton_backend import register_triton

register_backend(CsrBackend())
register_triton()
set_choice(choose)

__all__ = [
    "Backend",
    "SparseLinear",
    "SparsityConfig",
    "SparsityGroup",
    "SparsityPattern",
    "allocate",
    "backend_names",
    "densify",
    "register_backend",
    "sparse_layers",
    "sparse_linear",
    "sparsify",
]
