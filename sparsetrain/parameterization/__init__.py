"""Parameterizations (SP, muP, SμPar, CompleteP and their product) for our model and for any ``nn.Module``."""

from sparsetrain.parameterization.apply import parameterize
from sparsetrain.parameterization.coordinates import Coordinate, Spread, Trial, coordinate_check, spreads
from sparsetrain.parameterization.follow import follow_density
from sparsetrain.parameterization.groups import assign, assignment, decay_groups, param_groups
from sparsetrain.parameterization.initial import initialise
from sparsetrain.parameterization.rules import Parameterization, Role, TensorTraits
from sparsetrain.parameterization.scales import input_scale

__all__ = [
    "Coordinate",
    "Parameterization",
    "Role",
    "Spread",
    "TensorTraits",
    "Trial",
    "assign",
    "assignment",
    "coordinate_check",
    "decay_groups",
    "follow_density",
    "initialise",
    "input_scale",
    "param_groups",
    "parameterize",
    "spreads",
]
