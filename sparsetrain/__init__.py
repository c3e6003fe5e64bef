"""Train language models whose weights are unstructured sparse from the first step."""

from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, SoftPrompt, Transformer
from sparsetrain.parameterization import Parameterization, param_groups, parameterize
from sparsetrain.sparsity import (
    SparseLinear,
    SparsityConfig,
    SparsityGroup,
    SparsityPattern,
    densify,
    register_backend,
    sparse_linear,
    sparsify,
)

__version__ = "0.1.0"

__all__ = [
    "ModelConfig",
    "Parameterization",
    "SoftPrompt",
    "SparseLinear",
    "SparsityConfig",
    "SparsityGroup",
    "SparsityPattern",
    "Transformer",
    "UserError",
    "densify",
    "param_groups",
    "parameterize",
    "register_backend",
    "sparse_linear",
    "sparsify",
]
