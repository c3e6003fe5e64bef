"""SP, muP, SμPar, CompleteP and their product, for our model and for any other."""

from sparsetrain.parameterization.coordinates import Coordinate, Spread, Trial, coordinate_check, spreads
from sparsetrain.parameterization.groups import assign, assignment, initialise, param_groups, parameterize
from sparsetrain.parameterization.rules import Parameterization, Role, TensorSpec

__all__ = [
    "Coordinate",
    "Parameterization",
    "Role",
    "Spread",
    "TensorSpec",
    "Trial",
    "assign",
    "assignment",
    "coordinate_check",
    "initialise",
    "param_groups",
    "parameterize",
    "spreads",
]
