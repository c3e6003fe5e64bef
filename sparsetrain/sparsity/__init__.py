"""Patterns, sparse layers, the surgery that puts them into a model, and masks that evolve."""

import importlib
import pkgutil

from sparsetrain.sparsity import backends
from sparsetrain.sparsity.backends.auto import choose
from sparsetrain.sparsity.backends.base import Backend, backend_names, register_backend, set_choice
from sparsetrain.sparsity.config import EvolutionConfig, SparsityConfig, SparsityGroup, make_rule
from sparsetrain.sparsity.evolution.averaging import AveragedModel
from sparsetrain.sparsity.evolution.base import Rule, register_rule
from sparsetrain.sparsity.evolution.manager import MaskManager, MaskUpdate
from sparsetrain.sparsity.evolution.optimizers import register_elementwise_optimizer
from sparsetrain.sparsity.evolution.rules import GMP, SET, Phase, RigL, Static, VariableSparsity
from sparsetrain.sparsity.evolution.state import LayerReport
from sparsetrain.sparsity.evolution.topology import TopologyUpdate, apply_update
from sparsetrain.sparsity.layers.allocation import allocate, allocate_densities
from sparsetrain.sparsity.layers.linear import SparseLinear
from sparsetrain.sparsity.layers.multihead import SparseMultiheadAttention
from sparsetrain.sparsity.layers.ops import sparse_linear
from sparsetrain.sparsity.layers.prepared import prepared
from sparsetrain.sparsity.layers.replaced import StaleOptimizerWarning
from sparsetrain.sparsity.layers.summary import Summary, SummaryRow, summary
from sparsetrain.sparsity.layers.surgery import densify, sparse_layers, sparsify
from sparsetrain.sparsity.patterns.draw import (
    balanced_pattern,
    block_pattern,
    given_pattern,
    magnitude_pattern,
    make_pattern,
    nm_pattern,
    random_pattern,
)
from sparsetrain.sparsity.patterns.pattern import SparsityPattern
from sparsetrain.sparsity.patterns.spec import PatternSpec, pattern_nnz, register_pattern

# A backend is registered by the file that defines it, so that to add one is to add a file.
for _found in pkgutil.iter_modules(backends.__path__, f"{backends.__name__}."):
    importlib.import_module(_found.name)
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
    "prepared",
    "random_pattern",
    "register_backend",
    "register_elementwise_optimizer",
    "register_pattern",
    "register_rule",
    "sparse_layers",
    "sparse_linear",
    "sparsify",
    "summary",
]
