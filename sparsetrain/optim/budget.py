"""The budget of a run: its length, and its batch size, context and density over time. Everything else asks the budget.

A budget consists of consecutive phases; a run without configured phases has one. A length becomes steps as follows:

* Each phase has an exact length in steps, which need not be an integer: its share of the budget's tokens (for a budget
  in epochs: its share of the passes over the data), divided by the tokens (samples) of one of its steps.
* These lengths are summed. A border between two phases is rounded to the nearest step, half up. The end is rounded up
  for a budget in tokens, so that no token is missing, to the nearest step for one in epochs, and is exact for one in
  steps. A budget in FLOPs is the largest number of steps that these FLOPs pay for.
* A phase whose exact length is below one step is refused.

Steps are counted from 0: `Budget.at` (step) is the phase of the optimizer step that follows ``step`` steps.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from sparsetrain.errors import UserError
from sparsetrain.optim.schedule import ScheduleConfig

LENGTHS = ("steps", "tokens", "epochs", "flops")
"""Keys of ``budget`` that set the length of a run; exactly one of them is used."""

_SHARES = 1e-9  # tolerance for shares that must add up to 1
_ROUNDING = 1e-12  # relative rounding error of a length that should be an integer
_LONGEST = 1 << 32  # maximum steps of a run whose length is given in FLOPs


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

    Raises:
        UserError: a field is out of range, or not exactly one of share and tokens is given.
    """

    share: float | None = None
    tokens: int | None = None
    context: int | None = None
    batch_size: int | None = None
    density: float | None = None
    schedule: ScheduleConfig | None = None

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
        batch_size: sequences per optimizer step.
        phases: phases that differ in context, batch size, density or schedule; null for a single phase. If all phases
            have ``tokens``, they set the length of the run.

    Raises:
        UserError: a field is out of range, there are two lengths, or the shares do not add up to 1.
    """

    steps: int | None = None
    tokens: int | None = None
    epochs: float | None = None
    flops: float | None = None
    batch_size: int = 32
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
        if self.batch_size < 1:
            raise UserError(f"budget.batch_size={self.batch_size} must be at least 1")
        if self.phases is not None:
            self._check_phases(self.phases)

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

    @property
    def densities(self) -> list[float | None]:
        """The density of each phase; None for a phase that does not set one."""
        return [phase.density for phase in self.phases or []]


@dataclass(frozen=True)
class Phase:
    """A phase of a run whose length in steps is known.

    Args:
        index: index from 0.
        first_step, end_step: number of optimizer steps before it, and up to its end.
        context: maximum tokens per sequence.
        batch_size: sequences per optimizer step.
        density: density of the sparse layers; None for that of the sparsity section.
        schedule: schedule of this phase alone, or None.
        stream: index of the stream of samples that it reads; consecutive phases of the same context share one.
        first_sample: samples of that stream that were read before it.
        first_token: tokens of the run before it, if every sequence has ``context`` tokens.
    """

    index: int
    first_step: int
    end_step: int
    context: int
    batch_size: int
    density: float | None = None
    schedule: ScheduleConfig | None = None
    stream: int = 0
    first_sample: int = 0
    first_token: int = 0

    @property
    def steps(self) -> int:
        return self.end_step - self.first_step

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

    @property
    def tokens(self) -> int:
        """Tokens of the whole phase, if every sequence has ``context`` tokens."""
        return self.steps * self.tokens_per_step


SamplesPerEpoch = Callable[[int], int]
"""Maps a context to the number of samples of one pass over the data."""


@dataclass(frozen=True)
class Budget:
    """The phases of a run in steps, and what follows from them for each step."""

    phases: tuple[Phase, ...]
    _ends: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", tuple(phase.end_step for phase in self.phases))

    @classmethod
    def of(
        cls,
        config: BudgetConfig,
        context: int,
        samples_per_epoch: SamplesPerEpoch | None = None,
        flops: Callable[[Budget], float] | None = None,
    ) -> Budget:
        """Return the budget of a configuration.

        Args:
            context: ``data.context``, for phases that do not set their own.
            samples_per_epoch: needed for a budget in epochs.
            flops: maps a budget to its training FLOPs, needed for a budget in FLOPs; it grows with the number of steps.

        Raises:
            UserError: the length is not set, a phase is shorter than a step, the FLOPs do not pay for one step, or the
                kind of run does not support the unit of the length.
        """
        if config.open:
            raise UserError(f"run length is not set: give one of {', '.join(f'budget.{name}' for name in LENGTHS)}")
        if config.flops is not None:
            return cls._of_flops(config, context, flops)
        sized = _sized(config, context)
        lengths = _exact_lengths(config, sized, samples_per_epoch)
        total = sum(lengths)
        if config.steps is not None:
            steps = config.steps
        elif config.epochs is not None:
            steps = max(1, round(total))
        elif config.tokens is not None and len(sized) == 1:
            steps = -(-config.tokens // (sized[0][1] * sized[0][2]))  # integer arithmetic avoids rounding errors
        elif sized[0][0].tokens is not None:
            steps = max(1, math.floor(total + 0.5))
        else:
            steps = max(1, math.ceil(total - _ROUNDING * max(1.0, total)))
        return cls(_phases(sized, lengths, steps))

    @classmethod
    def _of_flops(cls, config: BudgetConfig, context: int, flops: Callable[[Budget], float] | None) -> Budget:
        """Return the largest budget whose FLOPs are at most ``config.flops``; FLOPs grow with every step."""
        assert config.flops is not None
        if flops is None:
            raise UserError(
                f"budget.flops={config.flops:g} is the length of a pre-training; set budget.epochs or budget.steps here"
            )
        limit, least = config.flops, len(config.phases or [None])

        def budget(steps: int) -> Budget:
            return cls.of(replace(config, flops=None, steps=steps), context)

        def pays_for(steps: int) -> bool:
            try:
                whole = budget(steps)
            except UserError:  # too few steps for all phases
                return True
            return flops(whole) <= limit

        low, high = 0, least
        while pays_for(high):
            low, high = high, 2 * high
            if high > _LONGEST:
                raise UserError(f"budget.flops={limit:g} pays for more than {low:,} steps of this model")
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if pays_for(middle) else (low, middle)
        if low < least:
            raise UserError(
                f"budget.flops={limit:g} does not pay for one step of this model ({flops(budget(least)):.3g} FLOPs)"
            )
        return budget(low)

    @property
    def total_steps(self) -> int:
        return self.phases[-1].end_step

    @property
    def tokens(self) -> int:
        """Tokens of the whole run, if every sequence has its context's number of tokens."""
        return sum(phase.tokens for phase in self.phases)

    def at(self, step: int) -> Phase:
        """Return the phase of the optimizer step that follows ``step`` steps; after the last step, the last phase."""
        return self.phases[min(bisect.bisect_right(self._ends, step), len(self.phases) - 1)]

    def before(self, step: int) -> Phase:
        """Return the phase of the optimizer step that led to ``step``; for 0, the first phase."""
        return self.at(max(0, step - 1))

    def samples_at(self, step: int) -> tuple[int, int]:
        """Return the stream that the optimizer step after ``step`` steps reads, and its first sample there."""
        phase = self.at(step)
        return phase.stream, phase.first_sample + (step - phase.first_step) * phase.batch_size

    def tokens_at(self, step: int) -> int:
        """Return the tokens of the first ``step`` steps, if every sequence has its context's number of tokens."""
        phase = self.at(step)
        return phase.first_token + (step - phase.first_step) * phase.tokens_per_step

    def steps_of_tokens(self, tokens: float) -> float:
        """Return the number of steps, not rounded, in which the first ``tokens`` tokens are seen."""
        phase = next((phase for phase in self.phases if phase.first_token + phase.tokens >= tokens), self.phases[-1])
        return phase.first_step + (tokens - phase.first_token) / phase.tokens_per_step

    @property
    def contexts(self) -> list[int]:
        """The context of each stream of samples."""
        return list({phase.stream: phase.context for phase in self.phases}.values())

    @property
    def largest(self) -> Phase:
        """The phase whose steps have the most tokens."""
        return max(self.phases, key=lambda phase: phase.tokens_per_step)


_SizedPhase = tuple[PhaseConfig, int, int]  # a phase, its context and its batch size


def _sized(config: BudgetConfig, context: int) -> list[_SizedPhase]:
    phases = config.phases if config.phases is not None else [PhaseConfig(share=1.0)]
    return [(phase, phase.context or context, phase.batch_size or config.batch_size) for phase in phases]


def _exact_lengths(
    config: BudgetConfig, sized: Sequence[_SizedPhase], samples_per_epoch: SamplesPerEpoch | None
) -> list[float]:
    """Return the length of each phase in steps, not rounded."""
    if config.steps is not None:
        # Shares are shares of tokens, so the total number of tokens follows from the number of steps.
        steps_per_token = [(phase.share or 0.0) / (context * batch) for phase, context, batch in sized]
        return [config.steps * weight / sum(steps_per_token) for weight in steps_per_token]
    if config.epochs is not None:
        if samples_per_epoch is None:
            raise UserError(f"budget.epochs={config.epochs}: the number of samples per epoch is unknown here")
        return [
            (phase.share or 0.0) * (config.epochs * samples_per_epoch(context) / batch)
            for phase, context, batch in sized
        ]
    lengths = []
    for phase, context, batch in sized:
        tokens = phase.tokens if phase.tokens is not None else (phase.share or 0.0) * (config.tokens or 0)
        lengths.append(tokens / (context * batch))
    return lengths


def _phases(sized: Sequence[_SizedPhase], lengths: Sequence[float], steps: int) -> tuple[Phase, ...]:
    ends = [min(math.floor(total + 0.5), steps) for total in accumulate(lengths)]
    ends[-1] = steps
    phases: list[Phase] = []
    for (config, context, batch), length, end in zip(sized, lengths, ends, strict=True):
        before = phases[-1] if phases else None
        first = before.end_step if before is not None else 0
        # A single phase is as long as the run, which has at least one step.
        if end <= first or (len(sized) > 1 and length < 1.0 - _SHARES):
            said = f"share={config.share}" if config.share is not None else f"tokens={config.tokens}"
            raise UserError(
                f"budget.phases[{len(phases)}]: {said} of a run of {steps} steps is shorter than one step "
                f"({context * batch} tokens)"
            )
        goes_on = before is not None and before.context == context
        phases.append(
            Phase(
                *(len(phases), first, end, context, batch, config.density, config.schedule),
                stream=0 if before is None else before.stream + (not goes_on),
                first_sample=before.first_sample + before.steps * before.batch_size
                if before is not None and goes_on
                else 0,
                first_token=0 if before is None else before.first_token + before.tokens,
            )
        )
    return tuple(phases)
