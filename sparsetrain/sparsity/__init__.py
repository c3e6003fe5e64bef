"""Patterns, sparse layers, the surgery that puts them into a model, and masks that evolve."""

from sparsetrain.sparsity.allocation import allocate, allocate_densities
from sparsetrain.sparsity.auto import choose
from sparsetrain.sparsity.averaging import AveragedModel
from sparsetrain.sparsity.bsr_backend import BsrBackend
from sparsetrain.sparsity.config import EvolutionConfig, Phase, SparsityConfig, SparsityGroup
from sparsetrain.sparsity.csr_backend import CsrBackend
from sparsetrain.sparsity.evolution import GMP, SET, RigL, Rule, Static, VariableSparsity, make_rule
from sparsetrain.sparsity.init import (
    balanced_pattern,
    block_pattern,
    given_pattern,
    magnitude_pattern,
    make_pattern,
    nm_pattern,
    random_pattern,
)
from sparsetrain.sparsity.linear import SparseLinear
from sparsetrain.sparsity.manager import MaskManager, MaskUpdate
from sparsetrain.sparsity.mask_state import LayerReport
from sparsetrain.sparsity.masked_backend import MaskedBackend
from sparsetrain.sparsity.multihead import SparseMultiheadAttention
from sparsetrain.sparsity.ops import Backend, backend_names, register_backend, set_choice, sparse_linear
from sparsetrain.sparsity.optimizers import register_elementwise_optimizer
from sparsetrain.sparsity.pattern import SparsityPattern
from sparsetrain.sparsity.replaced import StaleOptimizerWarning
from sparsetrain.sparsity.spec import PatternSpec, pattern_nnz
from sparsetrain.sparsity.summary import Summary, SummaryRow, summary
from sparsetrain.sparsity.surgery import densify, sparse_layers, sparsify
from sparsetrain.sparsity.topology import TopologyUpdate, apply_update
from sparsetrain.sparsity.triton_backend import register_triton

register_backend(MaskedBackend())
register_backend(CsrBackend())
register_backend(BsrBackend())
register_triton()
set_choice(choose)

__all__ = [
    "GMP",
    "SET",
    "AveragedModel",
    "Backend",
    "EvolutionConfig",
    "LayerReport",
    "MaskManager",
    "MaskUpdate",
    "PatternSpec",
    "Phase",
    "RigL",
    "Rule",
    "SparseLinear",
    "SparseMultiheadAttention",
    "SparsityConfig",
    "SparsityGroup",
    "SparsityPattern",
    "StaleOptimizerWarning",
    "Static",
    "Summary",
    "SummaryRow",
    "TopologyUpdate",
    "VariableSparsity",
    "allocate",
    "allocate_densities",
    "apply_update",
    "backend_names",
    "balanced_pattern",
    "block_pattern",
    "densify",
    "given_pattern",
    "magnitude_pattern",
    "make_pattern",
    "make_rule",
    "nm_pattern",
    "pattern_nnz",
    "random_pattern",
    "register_backend",
    "register_elementwise_optimizer",
    "sparse_layers",
    "sparse_linear",
    "sparsify",
    "summary",
]
