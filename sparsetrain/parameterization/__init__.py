"""SP, muP, SμPar, CompleteP and their product, for our model and for any other."""

from sparsetrain.parameterization.groups import assign, assignment, initialise, param_groups, parameterize
from sparsetrain.parameterization.rules import Parameterization, Role, TensorSpec

__all__ = [
    "Parameterization",
    "Role",
    "TensorSpec",
    "assign",
    "assignment",
    "initialise",
    "param_groups",
    "parameterize",
]
