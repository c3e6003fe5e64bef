"""Efficiency over size, sparsity and whatever else it depends on: a table, interpolated in logarithms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsetrain.cost.operations import Number
from sparsetrain.errors import UserError


@dataclass(frozen=True, eq=False)
class Curve:
    """A positive quantity as a function of named sizes.

    Between two places of an axis, the logarithm of the value is linear in the logarithm of the place; beyond the last
    place, the value at the edge counts. If the table gives the seconds of an operation divided by its work, and these
    seconds fall along no axis, then the interpolated seconds fall nowhere.

    Args:
        axes: increasing positive places by the name of the size.
        values: positive values ``[axis 1, axis 2, ...]``.

    Raises:
        UserError: a place or value is not positive, an axis does not increase, or the shapes differ.
    """

    axes: Mapping[str, Sequence[float]]
    values: NDArray[np.float64]

    def __post_init__(self) -> None:
        shape = tuple(len(places) for places in self.axes.values())
        if self.values.shape != shape:
            over = f"a curve over {', '.join(self.axes)}" if self.axes else "a curve without axes"
            raise UserError(f"{over} has values of the shape {list(self.values.shape)} instead of {list(shape)}")
        if not (np.isfinite(self.values).all() and (self.values > 0.0).all()):
            raise UserError("an efficiency must be a finite number above 0")
        for name, places in self.axes.items():
            array = np.asarray(places, dtype=float)
            if not (np.isfinite(array).all() and (array > 0.0).all() and (np.diff(array) > 0.0).all()):
                raise UserError(f"the places of {name} in a curve do not increase from above 0: {list(places)}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Curve):
            return NotImplemented
        same = {name: tuple(places) for name, places in self.axes.items()} == {
            name: tuple(places) for name, places in other.axes.items()
        }
        return same and np.array_equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash((tuple(self.axes), self.values.tobytes()))

    @classmethod
    def constant(cls, value: float) -> Curve:
        """Return a curve that has one value everywhere."""
        return cls({}, np.asarray(value, dtype=float))

    @cached_property
    def _logs(self) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
        return {name: np.log(np.asarray(places, dtype=float)) for name, places in self.axes.items()}, np.log(
            self.values
        )

    def at(self, sizes: Mapping[str, Number]) -> Number:
        """Return the value at one place, or at arrays of places, which broadcast.

        Raises:
            UserError: a size of the curve is missing.
        """
        places, table = self._logs
        brackets: list[tuple[tuple[NDArray[np.intp], Number], ...]] = []
        for name, axis in reversed(places.items()):
            if name not in sizes:
                raise UserError(f"a curve over {', '.join(self.axes)} was asked without {name}")
            where = np.log(np.maximum(np.asarray(sizes[name], dtype=float), 1e-300))
            if len(axis) == 1:
                low, share = np.zeros(where.shape, dtype=np.intp), np.zeros(where.shape)
            else:
                low = np.clip(np.searchsorted(axis, where, side="right") - 1, 0, len(axis) - 2)
                share = np.clip((where - axis[low]) / (axis[low + 1] - axis[low]), 0.0, 1.0)
            if where.size == 1:  # one place for all: the table loses its axis
                at, part = int(low.item()), float(share.item())
                last = table.ndim - 1 - len(brackets)
                first = np.take(table, at, axis=last)
                table = first if part == 0.0 else (1.0 - part) * first + part * np.take(table, at + 1, axis=last)
            elif len(axis) == 1:
                brackets.insert(0, ((low, 1.0),))
            else:
                brackets.insert(0, ((low, 1.0 - share), (low + 1, share)))
        if not brackets:
            return np.exp(table)
        steps = [stride // table.itemsize for stride in np.ascontiguousarray(table).strides]
        flat = np.ravel(table)
        total: Number = 0.0
        for corner in product(*brackets):
            weight: Number = 1.0
            place: Any = 0
            for (index, part_of), step in zip(corner, steps, strict=True):
                weight, place = weight * part_of, place + index * step
            total = total + weight * flat.take(place)
        return np.exp(total)
