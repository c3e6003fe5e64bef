"""The grid of ``sparsetrain provision``: what each candidate takes, what the budget pays for, and the Pareto set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.search import Array, Candidates, pareto, predict, rounded
from sparsetrain.cost.sizes import Sizes, trained_weights
from sparsetrain.cost.timing import Setting
from sparsetrain.errors import UserError
from sparsetrain.models.config import ModelConfig
from sparsetrain.scaling.law import Law, LossLaw, PowerLaw
from sparsetrain.scaling.loss_law import losses
from sparsetrain.scaling.published import batch_opt
from sparsetrain.stages.config import model_config
from sparsetrain.studies.provision_config import BUDGETS, ProvisionConfig
from sparsetrain.studies.suggest import chosen_law

LEAST_STEPS = 100
ABOVE_BEST = 1.5  # how many times the best batch a batch may be

Place = tuple[int, int, int, int, int]
"""Indices of a candidate: machines, shape, sparsity, batch, share of the budget."""


@dataclass(frozen=True)
class Machines:
    """A number of equal machines and how they compute."""

    machine: Machine
    devices: int
    setting: Setting

    @property
    def label(self) -> str:
        """Such as ``8 x h100``."""
        return f"{self.devices} x {self.machine.name}"

    @property
    def dollars(self) -> float:
        """USD of a second of all machines; NaN without a price."""
        price = self.machine.price
        return float("nan") if price is None else price.value * self.devices / 3600.0


@dataclass(frozen=True)
class Search:
    """All candidates. C machines, S shapes, P sparsities, B batches, K shares of the budget.

    Args:
        config: the settings. groups: ``[C]``. shapes: ``[S]``. sparsities, batches, shares: their values.
        laws: of loss, ``[P]``.
        weights, nonzeros: of the hidden matrices, ``[S, P]``. parameters: what the law counts, ``[S, P]``.
        seconds, memory, micro, division: of a step, ``[C, S, P, B]``; see `Predicted`. rooms: bytes, ``[C]``.
        flops: of a step, ``[S, P, B]``.
        needed: steps that a candidate has to have, ``[S, P, B]``.
    """

    config: ProvisionConfig
    groups: Sequence[Machines]
    shapes: Sequence[ModelConfig]
    sparsities: Sequence[float]
    batches: Sequence[int]
    shares: Sequence[float]
    laws: Sequence[LossLaw]
    weights: Array
    nonzeros: Array
    parameters: Array
    seconds: Array
    memory: Array
    micro: Array
    division: NDArray[np.intp]
    rooms: Sequence[float]
    flops: Array
    needed: Array

    @property
    def context(self) -> int:
        """Tokens of a sequence."""
        return self.config.data.context

    @cached_property
    def price(self) -> Array:
        """What a step takes of the budget: hours, USD or FLOPs, ``[C, S, P, B]``."""
        if self.config.kind == "flops":
            return np.where(self.fits, self.flops[None], np.inf)
        if self.config.kind == "hours":
            return self.seconds / 3600.0
        return self.seconds * self._dollars

    @property
    def _dollars(self) -> Array:
        return np.array([group.dollars for group in self.groups])[:, None, None, None]

    @property
    def fits(self) -> NDArray[np.bool_]:
        """Whether a step fits into the memory, ``[C, S, P, B]``."""
        return np.asarray(self.division >= 0)

    @cached_property
    def affordable(self) -> Array:
        """Steps that a candidate can pay for, fractions included, ``[C, S, P, B, K]``."""
        budget = self.config.amount * np.array(self.shares)
        return np.asarray(budget / self.price[..., None])

    @cached_property
    def steps(self) -> Array:
        """Whole steps that a candidate takes; the budget is never exceeded, ``[C, S, P, B, K]``."""
        whole = np.floor(self.affordable)
        budget = self.config.amount * np.array(self.shares)
        over = whole * np.where(np.isfinite(self.price), self.price, 0.0)[..., None] > budget
        return np.asarray(whole - over)

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """Which candidates fit and are long enough, ``[C, S, P, B, K]``."""
        return np.asarray(self.fits[..., None] & (self.steps >= self.needed[None, ..., None]))

    @cached_property
    def loss(self) -> Array:
        """The loss by the law at the tokens that the budget pays for; infinite if not valid, ``[C, S, P, B, K]``."""
        sequences = np.array(self.batches, dtype=float)[None, None, :, None] * self.context
        tokens = np.maximum(self.affordable * sequences, 1.0)
        found = np.stack(
            [
                losses(law, self.parameters[None, :, index, None, None], tokens[:, :, index])
                for index, law in enumerate(self.laws)
            ],
            axis=2,
        )
        return np.where(self.valid, found, np.inf)

    @cached_property
    def objectives(self) -> Array:
        """Loss, seconds and USD of each candidate with the whole of its share, ``[C S P B K, 3]``."""
        with np.errstate(invalid="ignore"):
            seconds = np.where(self.valid, self.affordable * self.seconds[..., None], np.inf)
            dollars = np.where(self.valid, seconds * self._dollars[..., None], np.inf)
        return np.stack([self.loss.ravel(), seconds.ravel(), dollars.ravel()], axis=1)

    def front(self) -> list[Place]:
        """Return the Pareto set over loss, time and cost, the lowest loss first.

        Raises:
            UserError: no candidate fits, or the budget pays for none; the line says how much is missing.
        """
        if not self.valid.any():
            raise UserError(self._missing())
        where = np.flatnonzero(self.valid.ravel())
        kept = where[pareto(self.objectives[where])]
        places = [self.place(index) for index in kept]
        # Of candidates that are equal in all three, such as two batches on a wafer, the largest batch has fewest steps.
        places.sort(key=lambda place: -place[3])
        compared = np.nan_to_num(rounded(self.objectives[[self._flat(place) for place in places]]))
        unlike = {tuple(row): place for row, place in zip(compared[::-1].tolist(), places[::-1], strict=True)}
        return [unlike[key] for key in sorted(unlike)]

    def _flat(self, place: Place) -> int:
        return int(np.ravel_multi_index(place, self.valid.shape))

    def place(self, flat: int) -> Place:
        """Return the indices of a candidate by its place among all."""
        found = np.unravel_index(flat, self.valid.shape)
        return tuple(int(index) for index in found)  # type: ignore[return-value]

    def _missing(self) -> str:
        kind, unit = self.config.kind, BUDGETS[self.config.kind]
        if not self.fits.any():
            lacking = self.memory - np.array(self.rooms)[:, None, None, None]
            c, s, p, b = _lowest(lacking)
            if not np.isfinite(lacking[c, s, p, b]):
                return "batch and devices: no batch of the grid is a multiple of the devices"
            shape = self.shapes[s]
            return (
                f"no candidate fits: {shape.d_model} x {shape.n_layers} at sparsity {self.sparsities[p]:g} needs "
                f"{self.memory[c, s, p, b] / 2**30:.3g} GiB, and {self.groups[c].machine.name} has "
                f"{self.rooms[c] / 2**30:.3g} GiB: {lacking[c, s, p, b] / 2**30:.3g} GiB are missing"
            )
        wanted = np.where(self.fits, self.price, np.inf) * self.needed[None] / max(self.shares)
        c, s, p, b = _lowest(wanted)
        least, shape = float(wanted[c, s, p, b]), self.shapes[s]
        return (
            f"{kind}={self.config.amount:g} pays for no candidate: the cheapest, {shape.d_model} x {shape.n_layers} at "
            f"sparsity {self.sparsities[p]:g} on {self.groups[c].label}, needs {least:.3g} {unit} for "
            f"{self.needed[s, p, b]:,.0f} steps: {least - self.config.amount:.3g} {unit} are missing"
        )


def _lowest(values: Array) -> tuple[int, ...]:
    """Return the indices of the smallest value."""
    return tuple(int(index) for index in np.unravel_index(int(np.argmin(values)), values.shape))


def search(config: ProvisionConfig, vocabulary: int) -> tuple[Search, list[Law], list[str]]:
    """Return all candidates of a grid, the laws of other kinds than loss, and notes.

    Raises:
        UserError: a machine, a law or the grid is unusable.
    """
    places = config.places()
    of_loss, others, notes = config.loss_laws()
    sparsities, batches, shares = config.grid_sparsities(of_loss), config.batch, config.spend
    groups = _groups(config, places, sparsities, notes)
    base = model_config(config.model, vocabulary)
    shapes = [_shaped(base, shape) for shape in config.shapes()]
    config.check_size(len(groups) * len(shapes) * len(sparsities) * len(batches) * len(shares))
    laws = []
    for sparsity in sparsities:
        law, warnings = chosen_law(of_loss, "loss", sparsity)
        assert isinstance(law, LossLaw)
        laws.append(law)
        notes += [f"Sparsity {sparsity:g}: {warning}" for warning in warnings]
    grid = (len(shapes), len(sparsities), len(batches))
    index = np.indices(grid).reshape(3, -1)
    flat = _candidates(config, shapes, np.array(sparsities), np.array(batches, dtype=float), index)
    weights, nonzeros = (found.reshape(grid)[:, :, 0] for found in (flat.weights, flat.nonzeros))
    stored = np.asarray(trained_weights(flat.sizes, flat.layers)).reshape(grid)[:, :, 0]
    counted = {"hidden weights": weights, "hidden nonzeros": nonzeros}
    parameters = np.stack([counted.get(law.inputs[0].unit, stored)[:, place] for place, law in enumerate(laws)], axis=1)
    found: dict[str, list[Any]] = {"seconds": [], "memory": [], "micro_batch": [], "division": []}
    rooms = []
    for group in groups:
        divides = np.mod(flat.batch, group.devices) == 0.0
        these = flat.part(divides)
        predicted = predict(_with(these, group.devices), group.machine, group.setting)
        rooms.append(predicted.room)
        for name, empty in (("seconds", np.inf), ("memory", np.inf), ("micro_batch", 0.0), ("division", -1)):
            whole = np.full(len(flat), empty)
            whole[divides] = getattr(predicted, name)
            found[name].append(whole.reshape(grid))
    done = Search(
        config,
        groups,
        shapes,
        sparsities,
        batches,
        shares,
        laws,
        weights,
        nonzeros,
        parameters,
        np.stack(found["seconds"]),
        np.stack(found["memory"]),
        np.stack(found["micro_batch"]),
        np.stack(found["division"]).astype(np.intp),
        rooms,
        flat.flops.reshape(grid),
        _needed(config, others, nonzeros, sparsities, batches),
    )
    return done, others, notes


def _groups(
    config: ProvisionConfig, places: Sequence[Machine], sparsities: Sequence[float], notes: list[str]
) -> list[Machines]:
    found = []
    for place in places:
        most = max((link.devices for link in place.links), default=1)
        accelerator = "float16" in place.peak
        dtype = config.dtype or ("bfloat16" if accelerator and "bfloat16" in place.peak else "float32")
        spec = config.sparsity.spec()
        setting = Setting(
            dtype,
            config.sparsity.backend,
            min(spec.block),
            spec.name == "nm"
            and spec.m == 4
            and min([each for each in config.sparsities or () if each], default=0) >= 0.5,
            config.threads or torch.get_num_threads(),
        )
        place.peak_rate(dtype)
        joined = [devices for devices in config.devices if devices <= most]
        if len(joined) < len(config.devices):
            notes.append(f"{place.name} has links for at most {most}: larger numbers of it are left out.")
        found += [Machines(place, devices, setting) for devices in joined]
    if not found:
        raise UserError(f"devices={list(config.devices)}: no machine has links for so many")
    return found


def _shaped(base: ModelConfig, shape: dict[str, int]) -> ModelConfig:
    return ModelConfig(**{each.name: shape.get(each.name, getattr(base, each.name)) for each in fields(ModelConfig)})


def _candidates(
    config: ProvisionConfig, shapes: Sequence[ModelConfig], sparsities: Array, batches: Array, index: NDArray[np.intp]
) -> Candidates:
    sizes = [Sizes.of(shape) for shape in shapes]
    same = ("vocabulary", "gated", "biased", "tied", "layernorm", "rotated", "positions", "dropout")
    arrays = {
        each.name: np.array([getattr(one, each.name) for one in sizes])[index[0]]
        for each in fields(Sizes)
        if each.name not in same
    }
    shared = {name: getattr(sizes[0], name) for name in same}
    batch = batches[index[2]]
    density = 1.0 - sparsities[index[1]]
    return Candidates(Sizes(**arrays, **shared), density, float(config.data.context), batch, np.ones(len(batch)))


def _with(candidates: Candidates, devices: int) -> Candidates:
    return Candidates(
        candidates.sizes,
        candidates.density,
        candidates.context,
        candidates.batch,
        np.full(len(candidates), float(devices)),
    )


def _needed(
    config: ProvisionConfig, laws: Sequence[Law], nonzeros: Array, sparsities: Sequence[float], batches: Sequence[int]
) -> Array:
    """Return the steps after which a batch is near the best one, and the weights have seen enough tokens."""
    size = np.array(batches, dtype=float) * config.data.context
    found = []
    for index, sparsity in enumerate(sparsities):
        law, _ = chosen_law(laws, "batch", sparsity)
        law = batch_opt if law is None else law
        assert isinstance(law, PowerLaw)
        if not law.exponent > 0.0:
            raise UserError(f"laws: the best batch falls with the tokens (exponent {law.exponent:g}): of no use here")
        tokens = np.power(size / (ABOVE_BEST * law.coefficient), 1.0 / law.exponent)
        tokens = np.maximum(tokens, config.tokens_per_parameter * nonzeros[:, index, None])
        found.append(np.maximum(np.ceil(tokens / size), LEAST_STEPS))
    return np.stack(found, axis=1)
