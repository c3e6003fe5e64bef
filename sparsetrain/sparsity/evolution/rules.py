"""The rules of evolution that come with the library, and the schedules that they follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsetrain.errors import UserError, check_choice
from sparsetrain.sparsity.evolution.base import (
    GROWTH,
    Rule,
    in_steps,
    register_rule,
    setting,
    steps,
)
from sparsetrain.sparsity.patterns.spec import check_sparsity

STAIRS = 4  # of the curve "step"

PROGRESS: dict[str, Callable[[float], float]] = {
    "cubic": lambda x: 1.0 - (1.0 - x) ** 3,  # Zhu and Gupta, equation 1
    "linear": lambda x: x,
    "cosine": lambda x: (1.0 - math.cos(math.pi * x)) / 2.0,
    "step": lambda x: math.floor(x * STAIRS + 1e-9) / STAIRS,
}
"""The fraction of the way from the initial to the final sparsity after the fraction x of the time."""

DROP: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2.0,  # RigL, section 3 (2)
}
"""The factor of the drop fraction after the fraction x of the time until ``stop``."""


@dataclass
class Phase:
    """A phase of variable sparsity in a configuration.

    Args:
        at: fraction of the training from which on its sparsity holds, in [0, 1).
        sparsity: fraction of zeros, in [0, 1).

    Raises:
        UserError: a number is out of range.
    """

    at: float
    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, "sparsity.evolution.phases: sparsity")
        if isinstance(self.at, bool) or not 0.0 <= self.at < 1.0:
            raise UserError(f"sparsity.evolution.phases: at={self.at} must lie in [0, 1)")


@register_rule("static")
@dataclass(frozen=True, kw_only=True)
class Static(Rule):
    """The mask of the first step stays: SPDF (arXiv 2303.10464), MediSwift (arXiv 2403.00952).

    SμPar (arXiv 2405.15743) claims that hyperparameters transfer across sparsity for random static masks only.
    """

    def updates(self, end: int) -> Sequence[int]:
        return ()


@dataclass(frozen=True, kw_only=True)
class _Periodic(Rule):
    """Updates come every ``every`` steps while start <= step < stop; ``stop=None`` is no end."""

    every: int = 100
    start: int = steps(0, fraction=0.0)
    stop: int | None = steps(None, fraction=0.75)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise self._refuse(f"every={self.every} must be at least 1")
        if self.start < 0:
            raise self._refuse(f"start={self.start} must be at least 0")
        if self.stop is not None and self.stop <= self.start:
            raise self._refuse(f"stop={self.stop} must be above start={self.start}")

    def due(self, step: int) -> bool:
        return (
            step > 0 and step % self.every == 0 and self.start <= step < (math.inf if self.stop is None else self.stop)
        )

    def updates(self, end: int) -> Sequence[int]:
        last = end if self.stop is None else min(end, self.stop - 1)
        return range(max(1, -(-self.start // self.every)) * self.every, last + 1, self.every)

    def check(self, total_steps: int) -> None:
        if self.stop is not None and self.stop > total_steps:
            raise self._refuse(f"stop={self.stop} lies after the end of training, at step {total_steps}")
        first = max(1, -(-self.start // self.every)) * self.every
        if first > min(total_steps, math.inf if self.stop is None else self.stop - 1):
            end = f"{total_steps} steps" if self.stop is None else f"stop={self.stop} of {total_steps} steps"
            raise self._refuse(f"every={self.every} with start={self.start} leaves no update within {end}")


@dataclass(frozen=True, kw_only=True)
class _Exchange(_Periodic):
    drop_fraction: float = 0.3
    drop_schedule: str = setting("constant", type=str, configured="cosine")
    protect_rows: bool = False  # type: ignore[misc]
    grown_moments: str = "zero"  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.drop_fraction < 1.0:
            raise self._refuse(f"drop_fraction={self.drop_fraction} must lie in (0, 1)")
        check_choice(f"{self.name}: drop_schedule", self.drop_schedule, DROP)
        if self.drop_schedule != "constant" and self.stop is None:
            raise self._refuse(f"drop_schedule={self.drop_schedule} falls until stop; set stop")

    def drop(self, step: int) -> float:
        return self.drop_fraction * DROP[self.drop_schedule](step / self.stop if self.stop else 0.0)


@register_rule("set")
@dataclass(frozen=True, kw_only=True)
class SET(_Exchange):
    """Sparse evolutionary training (Mocanu et al. 2018, arXiv 1707.04780): drop the smallest, grow at random.

    An update removes ``floor(drop * nnz)`` weights of smallest magnitude from each layer and grows as many at positions
    drawn uniformly among the positions that were empty before the update, so a dropped weight does not return at once.
    Of equal magnitudes the first in row-major order is dropped. The density never changes.

    Args:
        sparsity: of the layers.
        every: steps from one update to the next.
        start: the step from which masks are updated; a configuration gives it as a fraction of the training.
        stop: the step from which they stay, without an update of its own; likewise a fraction there.
        drop_fraction: share of a layer's weights that an update exchanges, zeta of the paper.
        drop_schedule: how that share falls to 0 at ``stop``: ``constant`` (it does not), ``linear`` or ``cosine``.
        protect_rows: never drop the largest weight of an output while the other weights suffice. Otherwise an output
            may lose its last weight; reports count these dead rows.
        grown_moments: the initial optimizer state of a grown weight: ``zero``, or ``mean``, the mean over the layer's
            surviving weights. From zero, the first step of a grown weight under AdamW is 3.2 learning rates at
            beta2 = 0.999 and 0.45 at 0.95, for beta1 = 0.9; see
            `sparsetrain.sparsity.evolution.topology.apply_update`.
    """


@register_rule("rigl")
@dataclass(frozen=True, kw_only=True)
class RigL(_Exchange):
    """Rigging the lottery (Evci et al. 2020, arXiv 1911.11134): drop the smallest, grow where the gradient is largest.

    As `SET`, but the empty positions grow whose gradient of the loss would be largest if they were weights of value
    zero. This dense gradient exists for one layer at a time, at update steps only. Of equal gradients the first in
    row-major order grows. A layer without a gradient in an update step keeps its mask.

    Two points differ from Algorithm 1. It skips the optimizer's step when it updates the mask; here the mask is updated
    after that step, from the gradient that the step used. Algorithm 1 also lets a weight that was just dropped return,
    and the published code then keeps its value, so the weight was not dropped at all. Here only positions that were
    empty before the update grow, and every update exchanges exactly ``floor(drop * nnz)`` weights.

    **SμPar is not claimed to transfer here.** Its argument (arXiv 2405.15743) needs normally distributed weights and
    random masks. RigL gives neither, and the authors of SμPar found no stable optimum. Learning rates keep the
    multipliers of the density at the start. In experiments/dynamic_masks_caveat the best rate falls as sparsity rises:
    at 93.75 % it is 1.48 doublings (95 %: 1.34 to 1.61, three seeds) below that of static masks.

    Args:
        sparsity, every, start, stop, drop_fraction, drop_schedule, protect_rows, grown_moments: as in `SET`.
        accumulation: with several backward passes per step, ``last`` ranks the gradient of the last pass. ``staggered``
            ranks the sum of all passes, and spreads the layers' updates over the steps of a period, so that still only
            one dense gradient exists at a time.
        grown_scale: 0 starts grown weights at zero, as in the paper. A number c starts them at ``-c r g / rms(g)``,
            where g is their gradient and r the root mean square of the layer's surviving weights.
    """

    grows: ClassVar[str] = "gradient"
    accumulation: str = "last"  # type: ignore[misc]
    grown_scale: float = 0.0  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.grown_scale < math.inf:
            raise self._refuse(f"grown_scale={self.grown_scale} must be at least 0 and finite")


@register_rule("gmp")
@dataclass(frozen=True, kw_only=True)
class GMP(_Periodic):
    """Gradual magnitude pruning (Zhu and Gupta 2017, arXiv 1710.01878): from ``initial_sparsity`` down to ``sparsity``.

    After t steps a layer with the allocated density d_f has the density ``d_i + (d_f - d_i) p(x)``, where d_i is ``1 -
    initial_sparsity``, ``x = (t - start) / (stop - start)``, and ``p = 1 - (1 - x)^3`` for ``cubic``. Updates come
    every ``every`` steps from ``start`` on, and at ``stop``, after which the layer has exactly its allocated number of
    weights. The smallest magnitudes go, of equal magnitudes the first in row-major order, and no weight returns.

    **SμPar is not claimed to transfer here.** Magnitude masks change the distribution of the remaining weights, and the
    authors of SμPar found no stable optimum (arXiv 2405.15743). Learning rates and weight decays keep the multipliers
    of the density at the *start*, usually that of a dense model, after the model has become sparse, unless the rules
    have ``follow="density"`` (`sparsetrain.follow_density`). In experiments/dynamic_masks_caveat the best rate at
    93.75 % is 0.58 doublings (95 %: 0.37 to 0.78, three seeds) above that of static masks.

    Args:
        sparsity: at the end; None takes that of the section ``sparsity``, or of ``plan``.
        every, start, stop: in steps; ``stop`` must be given.
        initial_sparsity: at the start; at 0 the layers begin dense, with all weights stored in `SparseLinear`.
        curve: how the density falls: ``cubic``, ``linear``, ``cosine`` or ``step`` (four equal stairs).
        protect_rows: as in `SET`.
    """

    resizes: ClassVar[bool] = True
    initial_sparsity: float = 0.0
    curve: str = "cubic"
    protect_rows: bool = False  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop is None:
            raise self._refuse("stop=None: say at which step the final sparsity is reached")
        check_sparsity(self.initial_sparsity, f"{self.name}: initial_sparsity")
        if self.sparsity is not None and self.initial_sparsity > self.sparsity:
            raise self._refuse(f"initial_sparsity={self.initial_sparsity} is above sparsity={self.sparsity}")
        check_choice(f"{self.name}: curve", self.curve, PROGRESS)

    def due(self, step: int) -> bool:
        assert self.stop is not None
        inside = step > 0 and self.start <= step <= self.stop
        return inside and ((step - self.start) % self.every == 0 or step == self.stop)

    def updates(self, end: int) -> Sequence[int]:
        assert self.stop is not None
        regular = [step for step in range(self.start, min(end, self.stop) + 1, self.every) if step > 0]
        return regular if not self.start <= self.stop <= end or self.stop in regular[-1:] else [*regular, self.stop]

    def layer_density(self, allocated: float, step: int) -> float:
        assert self.stop is not None
        if step >= self.stop:
            return allocated
        # Between two updates the target is that of the earlier one.
        updated = self.start + max(0, step - self.start) // self.every * self.every
        progress = PROGRESS[self.curve]((updated - self.start) / (self.stop - self.start))
        initial = self._initial(allocated)
        return initial + (allocated - initial) * progress

    def densities(self, allocated: float) -> Iterable[float]:
        return self._initial(allocated), allocated

    def _initial(self, allocated: float) -> float:
        return max(1.0 - self.initial_sparsity, allocated)

    def check(self, total_steps: int) -> None:
        assert self.stop is not None
        if self.stop > total_steps:
            raise self._refuse(f"stop={self.stop} lies after the end of training, at step {total_steps}")


def _phases_in_steps(phases: Sequence[Phase], total_steps: int | None) -> tuple[tuple[Any, float], ...]:
    return tuple((in_steps(phase.at, total_steps), phase.sparsity) for phase in phases)


@register_rule("vspdf")
@dataclass(frozen=True, kw_only=True)
class VariableSparsity(Rule):
    """A sparsity that changes at given steps, usually downwards: 90 % → 50 % → dense (variable SPDF).

    New weights start at zero with fresh moments, at positions drawn at random or, with ``grow="gradient"``, at the
    largest gradients. A rising sparsity drops the smallest magnitudes. A layer with another sparsity, from a group or
    from ERK, keeps its ratio to the whole: its sparsity is ``own * s(t) / s(0)``.

    Learning rates keep the SμPar multipliers of the density at the start, unless the rules have ``follow="density"``
    (`sparsetrain.follow_density`); SμPar makes no claim about other densities within one run.

    Args:
        sparsity: at the start; layers are allocated by it.
        phases: ``(step, sparsity)`` pairs in order; each sparsity holds from its step on. A phase at step 0 replaces
            ``sparsity`` at the start, so masks may begin dense.
        grow: where weights grow: at ``random`` empty positions, or where the ``gradient`` is largest.
        grown_moments: as in `SET`.
    """

    resizes: ClassVar[bool] = True
    needs_sparsity: ClassVar[bool] = True
    phases: Sequence[tuple[int, float]] = setting((), type=list[Phase], configured=(), convert=_phases_in_steps)
    grow: str = "random"
    protect_rows: bool = False  # type: ignore[misc]
    grown_moments: str = "zero"  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_choice(f"{self.name}: grow", self.grow, GROWTH)
        super().__post_init__()
        if not self.sparsity:
            raise self._refuse(f"sparsity={self.sparsity} at the start must be above 0")
        if not self.phases:
            raise self._refuse("phases=(): at least one (step, sparsity) is needed")
        before = -1
        for step, sparsity in self.phases:
            if step <= before:
                raise self._refuse(f"phases: {step} follows {before}; phases must begin one after the other")
            check_sparsity(sparsity, f"{self.name}: sparsity of the phase at step {step}")
            before = step

    @property
    def grows(self) -> str:  # type: ignore[override]
        return self.grow

    def due(self, step: int) -> bool:
        return step > 0 and any(step == at for at, _ in self.phases)

    def updates(self, end: int) -> Sequence[int]:
        return [at for at, _ in self.phases if 0 < at <= end]

    def layer_density(self, allocated: float, step: int) -> float:
        assert self.sparsity is not None
        now = self.sparsity
        for at, sparsity in self.phases:
            if at <= step:
                now = sparsity
        return self._scaled(allocated, now)

    def densities(self, allocated: float) -> Iterable[float]:
        assert self.sparsity is not None
        return [self._scaled(allocated, sparsity) for sparsity in (self.sparsity, *(now for _, now in self.phases))]

    def _scaled(self, allocated: float, sparsity: float) -> float:
        """Return the density of a layer when the sparsity of the whole is ``sparsity``."""
        assert self.sparsity is not None
        return allocated if sparsity == self.sparsity else 1.0 - (1.0 - allocated) * sparsity / self.sparsity

    def check(self, total_steps: int) -> None:
        last = self.phases[-1][0]
        if last >= total_steps:
            raise self._refuse(f"the phase at step {last} lies after the end of training, at step {total_steps}")
