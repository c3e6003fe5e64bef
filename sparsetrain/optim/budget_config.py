"""The section ``budget`` of a configuration: the length of a run, its batch size, and its phases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparsetrain.errors import UserError, check_choice
from sparsetrain.optim.batch_size import BatchSizeConfig, checked
from sparsetrain.optim.schedule import ScheduleConfig

LENGTHS = ("steps", "tokens", "epochs", "flops")
"""Keys of ``budget`` that set the length of a run; exactly one of them is used."""

LR_RULES = ("none", "sqrt", "linear")
WD_RULES = ("none", "tau")

_SHARES = 1e-9  # tolerance for shares that must add up to 1


@dataclass
class PhaseConfig:
    """A phase of a run. Settings that it leaves out are those of the run.

    Args:
        share: share of the budget's tokens, above 0; the shares of all phases add up to 1.
        tokens: length of this phase in tokens, instead of a share; it is rounded to the nearest step.
        context: tokens per sequence.
        batch_size: sequences per optimizer step.
        density: density of the sparse layers, in (0, 1]; it replaces 1 - ``sparsity.sparsity``. If the density falls,
            the smallest magnitudes are dropped; if it rises, weights grow as ``sparsity.evolution.grow`` says.
        schedule: a schedule of this phase alone, over its own steps; null continues with the run's schedule.
        mixture: weights by tokens of the corpora of ``data.sources``; null takes ``data.mixture``.

    Raises:
        UserError: a field is out of range, or not exactly one of share and tokens is given.
    """

    share: float | None = None
    tokens: int | None = None
    context: int | None = None
    batch_size: int | None = None
    density: float | None = None
    schedule: ScheduleConfig | None = None
    mixture: dict[str, float] | None = None

    def __post_init__(self) -> None:
        where = "budget.phases"
        if (self.share is None) == (self.tokens is None):
            raise UserError(f"{where}: share={self.share}, tokens={self.tokens}: give exactly one of share and tokens")
        if self.share is not None and not 0.0 < self.share <= 1.0:
            raise UserError(f"{where}: share={self.share} must lie in (0, 1]")
        for name in ("tokens", "context", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{where}: {name}={value} must be at least 1")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise UserError(f"{where}: density={self.density} must lie in (0, 1]")


@dataclass
class BudgetConfig:
    """The length of training, and its batch size and phases.

    Args:
        steps: number of optimizer steps.
        tokens: number of training tokens; the number of steps is rounded up.
        epochs: passes over the training examples.
        flops: training FLOPs of a pre-training by formula, with the masks and the context of each step. Give exactly
            one of steps, tokens, epochs and flops; some verbs have a default number of epochs.
        batch_size: sequences per optimizer step: a number; or a section (`BatchSizeConfig`) with a ramp, a list, or a
            size that follows the gradient noise scale; ``gns`` is the last with its defaults. Where it is no number,
            schedules are functions of the tokens seen and not of the steps.
        lr_rule: factor of the learning rate in a step whose batch is b times as large as that of the first step:
            ``none`` is 1, ``sqrt`` is sqrt(b), ``linear`` is b.
        wd_rule: factor of the weight decay there: ``none`` is 1, ``tau`` is b divided by the factor of the learning
            rate, so that the decay per token, and tau in tokens, stay the same.
        phases: phases that differ in context, batch size, density, schedule or mixture; null for a single phase. If
            all phases have ``tokens``, they set the length of the run.

    Raises:
        UserError: a field is out of range, there are two lengths, or the shares do not add up to 1.
    """

    steps: int | None = None
    tokens: int | None = None
    epochs: float | None = None
    flops: float | None = None
    batch_size: int | str | BatchSizeConfig = 32
    lr_rule: str = "none"
    wd_rule: str = "none"
    phases: list[PhaseConfig] | None = None

    def __post_init__(self) -> None:
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) > 1:
            said = " and ".join(f"budget.{name}={getattr(self, name)}" for name in given)
            raise UserError(f"{said}: a run has one length; give only one of {', '.join(LENGTHS)}")
        for name in ("steps", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"budget.{name}={value} must be at least 1")
        for name in ("epochs", "flops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"budget.{name}={value} must be above 0 and finite")
        check_choice("budget.lr_rule", self.lr_rule, LR_RULES)
        check_choice("budget.wd_rule", self.wd_rule, WD_RULES)
        self.batch_size = checked(self.batch_size)
        if self.phases is not None:
            self._check_phases(self.phases)
        if self.led is not None:
            self._check_led()

    def _check_phases(self, phases: Sequence[PhaseConfig]) -> None:
        if not phases:
            raise UserError("budget.phases=[]: a run has at least one phase; leave phases out for a single phase")
        shares = [phase.share for phase in phases if phase.share is not None]
        if 0 < len(shares) < len(phases):
            raise UserError("budget.phases: give every phase a share, or every phase tokens")
        if shares and abs(sum(shares) - 1.0) > _SHARES:
            raise UserError(f"budget.phases: the shares {shares} add up to {sum(shares):.10g}; they must add up to 1")
        if not shares:
            total = sum(phase.tokens or 0 for phase in phases)
            said = self.length
            if said is not None and (said != "tokens" or self.tokens != total):
                raise UserError(
                    f"budget.{said}={getattr(self, said)}: the phases have {total} tokens in total, which sets the "
                    "length of the run"
                )

    def _check_led(self) -> None:
        """Raise `UserError` for what needs the number of steps, which no one knows if the noise scale leads."""
        if self.phases is not None:
            raise UserError("budget.phases cannot be combined with budget.batch_size led by gns")
        if self.length not in (None, "tokens"):
            raise UserError(
                f"budget.{self.length}={getattr(self, str(self.length))}: with budget.batch_size led by gns the length "
                "is in tokens; give budget.tokens"
            )

    @property
    def changing(self) -> BatchSizeConfig | None:
        """The batch size, if it is no number."""
        return self.batch_size if isinstance(self.batch_size, BatchSizeConfig) else None

    @property
    def led(self) -> BatchSizeConfig | None:
        """The batch size, if the noise scale leads it."""
        return self.changing if self.changing is not None and self.changing.led else None

    @property
    def first_batch(self) -> int:
        """The batch size of the first step of a run without phases."""
        return self.batch_size.first if isinstance(self.batch_size, BatchSizeConfig) else int(self.batch_size)

    @property
    def length(self) -> str | None:
        """The one of `LENGTHS` that is set, or None."""
        return next((name for name in LENGTHS if getattr(self, name) is not None), None)

    @property
    def open(self) -> bool:
        """Whether no setting determines the length of the run."""
        return self.length is None and not (self.phases is not None and self.phases[0].tokens is not None)

    def with_epochs(self, epochs: float) -> BudgetConfig:
        """Return this budget, with a length of ``epochs`` if it has no length."""
        return replace(self, epochs=epochs) if self.open else self

    def named(self, setting: str, name: str, otherwise: int) -> dict[str, int]:
        """Return the values of ``setting`` over all phases, by the configuration keys that set them.

        Args:
            name: the key of ``otherwise``, the value of phases that do not set their own.
        """
        phases = self.phases or []
        own = {index: getattr(phase, setting) for index, phase in enumerate(phases)}
        found = {f"budget.phases[{index}].{setting}": value for index, value in own.items() if value is not None}
        return found if phases and len(found) == len(phases) else {**found, name: otherwise}

    def batch_sizes(self) -> list[tuple[str, int]]:
        """Return each batch size of the run that is known beforehand, with the configuration key that sets it."""
        found = self.named("batch_size", "budget.batch_size", 0)
        sizes = [self.first_batch] if self.changing is None else self.changing.sizes
        return [(name, size) for name, own in found.items() for size in ([own] if own else sizes)]

    @property
    def densities(self) -> list[float | None]:
        """The density of each phase; None for a phase that does not set one."""
        return [phase.density for phase in self.phases or []]
