"""The tensors of a model compared with those of its base: m_d and m_out of each."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from sparsetrain.errors import UserError, nearest
from sparsetrain.parameterization.anatomy import Anatomy, examine
from sparsetrain.parameterization.depth import counterpart
from sparsetrain.parameterization.roles import Place, home, places
from sparsetrain.parameterization.rules import INSIDE_BLOCK, MATRICES, Parameterization, Role, TensorTraits
from sparsetrain.parameterization.shapes import check_orientation, fan_in, fan_out
from sparsetrain.sparsity import SparseLinear


class Base:
    """The base model of a width rule, compared with the model that it gives base widths to.

    Args:
        base: a model of the same architecture, at any density, with at most as many blocks.
        own: the anatomy of the model.
        roles: the user's roles.
        dims: glob over parameter names -> the dimension that counts inputs.

    Raises:
        UserError: a glob of ``dims`` matches no parameter of the model, or the base does not have the base width.
    """

    def __init__(
        self,
        base: nn.Module | None,
        own: Anatomy,
        rules: Parameterization,
        roles: Mapping[str, Role | str],
        dims: Mapping[str, int],
    ) -> None:
        self._own, self._dims, self._sgd = own, dims, rules.optimizer == "sgd"
        names = {name for place in own.everywhere for name in (place.name, ".".join(place.dense))}
        for glob in dims:
            if not any(fnmatchcase(name, glob) for name in names):
                raise UserError(f"parameterize: fan_in['{glob}'] matches no parameter{nearest(glob, names)}")
        self._places: dict[str, dict[str, Place]] | None = None
        if base is None:
            return
        self._places = {}
        for place in places(base):
            self._places.setdefault(place.dense[0], {}).setdefault(place.dense[1], place)
        self._blocks = examine(base, roles, strict=False).blocks
        self._shapes = {block: self._widths_inside(block) for block in self._blocks.structures}
        widths = {fan_in(p, self._dim(p)) for of in self._places.values() for p in of.values() if not p.is_bias}
        if rules.uses_width and rules.base_width not in widths:
            raise UserError(
                f"parameterize: no module of the base model has the width base_width={rules.base_width} (its widths: "
                f"{', '.join(str(width) for width in sorted(widths))})"
            )

    def traits(self, tied: list[Place]) -> TensorTraits:
        """Return the traits of a parameter, given all its places."""
        place = home(tied)
        role = self._own.roles[place.name]
        module = place.module
        density = module.pattern.density if isinstance(module, SparseLinear) and place.leaf == "values" else 1.0
        inside = role not in INSIDE_BLOCK or self._own.in_block(place)
        other = self.counterpart(place)
        if other is None or role is Role.KEEP:
            return TensorTraits(role, 1.0, density, in_block=inside)
        check_orientation(place, other, role, self._dim(place) is not None)
        m_d = self.m_d(place)
        m_out = fan_out(place) / fan_out(other)
        # m_out matters only if one side grows and the other does not; see the rules of SGD.
        one_sided = self._sgd and (m_d == 1.0) != (m_out == 1.0)
        says = one_sided and not place.is_bias and role in (*MATRICES, Role.EMBEDDING, Role.POSITION)
        return TensorTraits(role, m_d, density, m_out if says else None, inside)

    def m_d(self, place: Place) -> float:
        """Return fan_in divided by the base's, or the ratio of lengths for a norm or a bias; 1 without a base.

        Raises:
            UserError: the base lacks the module, or is wider.
        """
        other = self.counterpart(place)
        if other is None:
            return 1.0
        own, theirs = fan_in(place, self._dim(place)), fan_in(other, self._dim(place))
        if own < theirs:
            raise UserError(
                f"parameterize: the base is wider than the model: '{place.module_name}' has {theirs} there "
                f"and {own} here; the base is the small model that was tuned"
            )
        return own / theirs

    def counterpart(self, place: Place) -> Place | None:
        """Return the base's tensor for one of the model's; None if there is no base, or no such bias in it."""
        if self._places is None:
            return None
        name, leaf = place.dense
        block = self._own.blocks.block_of(name)
        if block is not None and self._blocks.lists:
            same = counterpart(block, self._own.blocks, self._blocks, self._shapes)
            name = same + name[len(block) :]
        held = self._places.get(name)
        if held is None or (leaf not in held and not place.is_bias):
            raise UserError(f"parameterize: the base model has no module '{place.module_name}'")
        return held.get(leaf)

    def _widths_inside(self, block: str) -> dict[str, int]:
        assert self._places is not None
        held = [p for of in self._places.values() for p in of.values() if f"{p.name}.".startswith(f"{block}.")]
        return {".".join(p.dense)[len(block) :]: fan_in(p, self._dim(p)) for p in held}

    def _dim(self, place: Place) -> int | None:
        names = {place.name, ".".join(part for part in place.dense if part)}
        return next((dim for glob, dim in self._dims.items() if any(fnmatchcase(name, glob) for name in names)), None)
