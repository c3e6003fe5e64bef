"""The anatomy of a model: the role of each parameter wherever it is used, and the residual blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from sparsetrain import wrappers
from sparsetrain.errors import UserError
from sparsetrain.parameterization.depth import Blocks, find_blocks
from sparsetrain.parameterization.roles import (
    FINAL_NORM_NAMES,
    MATRIX_TYPES,
    Place,
    check_globs,
    find_role,
    home,
    is_norm,
    places,
    roles_inside_torch_layers,
)
from sparsetrain.parameterization.rules import MATRICES, Role
from sparsetrain.sparsity.layers.names import ends_with


@dataclass(frozen=True)
class Anatomy:
    """The parameters and blocks of a model.

    Args:
        tied: first name of each parameter -> all places where it is used.
        roles: name of a place -> its role; places without a known role are missing.
        blocks: the residual blocks.
    """

    tied: Mapping[str, list[Place]]
    roles: Mapping[str, Role]
    blocks: Blocks

    @property
    def everywhere(self) -> list[Place]:
        return [place for same in self.tied.values() for place in same]

    def with_role(self, *wanted: Role) -> list[Place]:
        """Return the places that have one of the given roles, including all places of tied parameters."""
        return [place for place in self.everywhere if self.roles[place.name] in wanted]

    def in_block(self, place: Place) -> bool:
        """Whether a place is inside a residual block; True for a model without blocks."""
        return not self.blocks.lists or self.blocks.block_of(place.module_name) is not None


def examine(model: nn.Module, roles: Mapping[str, Role | str], strict: bool = True) -> Anatomy:
    """Return the roles and blocks of a model.

    Args:
        roles: the user's roles, as `sparsetrain.parameterize` takes them.
        strict: whether a parameter without a role, or a glob that matches nothing, is an error.

    Raises:
        UserError: see ``strict``; the message names the parameter, its module and the possible roles.
    """
    shared: dict[int, list[Place]] = {}
    for place in places(model):
        shared.setdefault(id(place.parameter), []).append(place)
    tied = {same[0].name: same for same in shared.values()}
    everywhere = [place for same in tied.values() for place in same]
    if strict:
        check_globs(roles, everywhere)
    names = {name for name, _ in wrappers.named_modules(model)} | {place.name for place in everywhere}
    known = {**roles_inside_torch_layers(model), **roles}
    known = {**roles, **known}  # the user's roles come first, because the first match wins
    found: dict[str, Role] = {}
    for same in tied.values():
        of = {place.name: find_role(place, known, names) for place in same}
        # A role found at one place holds at the others too, e.g. for the bias of a head.
        first = next((role for place in (home(same), *same) if (role := of[place.name]) is not None), None)
        if first is not None:
            found |= {name: role if role is not None else first for name, role in of.items()}
        elif strict:
            raise _without_role(home(same))
    blocks = _blocks(model, everywhere, found)
    given = {p.name for p in everywhere if any(fnmatchcase(n, glob) for glob in roles for n in (p.module_name, p.name))}
    for place in everywhere:
        if place.name in found and place.name not in given:
            found[place.name] = _settle(found[place.name], place, blocks)
    return Anatomy(tied, found, blocks)


def _blocks(model: nn.Module, everywhere: list[Place], roles: Mapping[str, Role]) -> Blocks:
    def holders(*wanted: Role) -> list[nn.Module]:
        return [place.module for place in everywhere if roles.get(place.name) in wanted]

    return find_blocks(model, holders(*MATRICES), holders(Role.OUTPUT))


def _settle(role: Role, place: Place, blocks: Blocks) -> Role:
    """Correct a role outside the residual blocks: a norm there is a final norm, and no matrix ends a branch.

    In a model without blocks, a norm is final if it has the name of a final norm.
    """
    if blocks.lists:
        outside = blocks.block_of(place.module_name) is None
    else:
        numbered = any(part.isdigit() for part in place.module_name.split("."))
        outside = is_norm(place.module) and ends_with(place.module_name, FINAL_NORM_NAMES) and not numbered
    if outside and is_norm(place.module):
        return {Role.NORM: Role.FINAL_NORM, Role.BIAS: Role.FINAL_BIAS}.get(role, role)
    return Role.HIDDEN if outside and role is Role.OUTPUT else role


def _without_role(place: Place) -> UserError:
    # The weight may be computed in the layer itself (old weight norm, pruning) or in a module inside it.
    bare = isinstance(place.module, (*MATRIX_TYPES, nn.Embedding)) and place.module._parameters.get("weight") is None
    if bare or isinstance(place.module, ParametrizationList):
        name = place.module_name.split(".parametrizations.")[0]
        return UserError(
            f"parameter '{place.name}': the weight of '{name}' is computed (weight norm, a parametrization, pruning); "
            "call parameterize before that"
        )
    return UserError(
        f"parameter '{place.name}' ({type(place.module).__name__}) has no known role: pass "
        f"roles={{'{place.module_name}': ROLE}} with one of {', '.join(Role)}"
    )
