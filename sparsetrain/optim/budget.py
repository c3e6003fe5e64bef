"""The budget of a run: its length, and its batch size, context and density over time. Everything else asks the budget.

A budget consists of consecutive phases; a run without configured phases has one. A length becomes steps as follows:

* Each phase has an exact length in steps, which need not be an integer: its share of the budget's tokens (for a budget
  in epochs: its share of the passes over the data), divided by the tokens (samples) of one of its steps.
* These lengths are summed. A border between two phases is rounded to the nearest step, half up. The end is rounded up
  for a budget in tokens, so that no token is missing, to the nearest step for one in epochs, and is exact for one in
  steps. A budget in FLOPs is the largest number of steps that these FLOPs pay for.
* A phase whose exact length is below one step is refused.
* Where ``budget.batch_size`` is no number, a phase consists of parts of one batch size each, which end by the same
  rounding; a part that is rounded to no step is left out. A run in tokens then has the fewest steps that see them all.
* If the gradient noise scale leads the batch size, the run is one phase, and `Budget.decide` gives its remaining steps
  another size.

Steps are counted from 0: `Budget.at` (step) is the phase of the optimizer step that follows ``step`` steps.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

from sparsetrain.errors import UserError
from sparsetrain.optim.batch_size import Decision
from sparsetrain.optim.budget_config import LENGTHS, BudgetConfig, PhaseConfig
from sparsetrain.optim.schedule import ScheduleConfig

_SHARES = 1e-9  # tolerance for shares that must add up to 1
_ROUNDING = 1e-12  # relative rounding error of a length that should be an integer
_LONGEST = 1 << 32  # maximum steps of a run whose length is given in FLOPs


@dataclass(frozen=True)
class Phase:
    """A phase of a run whose length in steps is known, or the part of one that has one batch size.

    Args:
        index: index of the configured phase, from 0; all its parts share it.
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


@dataclass
class Budget:
    """The phases of a run in steps, and what follows from them for each step.

    Args:
        phases: one after the other; where the batch size changes within a phase, its parts.
        config: the section that they follow from.
        decisions: what the noise scale has led to so far.
    """

    phases: tuple[Phase, ...]
    config: BudgetConfig = field(compare=False)
    decisions: tuple[Decision, ...] = ()

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
        parts = _parts(config, context)
        lengths = _exact_lengths(config, parts, samples_per_epoch)
        total = sum(lengths)
        if config.steps is not None:
            steps = config.steps
        elif config.epochs is not None:
            steps = max(1, round(total))
        elif config.tokens is not None and len(parts) == 1:
            steps = -(-config.tokens // parts[0].tokens_per_step)  # integer arithmetic avoids rounding errors
        elif parts[0].phase.tokens is not None:
            steps = max(1, math.floor(total + 0.5))
        else:
            steps = max(1, math.ceil(total - _ROUNDING * max(1.0, total)))
        phases = _phases(parts, lengths, steps)
        if config.changing is not None and config.tokens is not None:
            phases = _covering(phases, config.tokens)
        return cls(phases, config)

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

    @property
    def in_tokens(self) -> bool:
        """Whether schedules are functions of the tokens seen, because the batch size is no number."""
        return self.config.changing is not None

    @property
    def scheduled_tokens(self) -> int:
        """Tokens that a schedule is spread over: those of the run, or, if the noise scale leads, those asked for."""
        return self.tokens if self.config.led is None else int(self.config.tokens or 0)

    def at(self, step: int) -> Phase:
        """Return the phase of the optimizer step that follows ``step`` steps; after the last step, the last phase."""
        found = bisect.bisect_right(self.phases, step, key=lambda phase: phase.end_step)
        return self.phases[min(found, len(self.phases) - 1)]

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
        """The phase whose steps have, or may come to have, the most tokens."""
        largest, led = max(self.phases, key=lambda phase: phase.tokens_per_step), self.config.led
        return largest if led is None else replace(largest, batch_size=led.sizes[-1])

    # -- a batch size that the noise scale leads -----------------------------------------------------------------------

    def decides(self, step: int) -> bool:
        """Whether the noise scale is looked at after ``step`` steps: it is at equal distances in tokens."""
        led = self.config.led
        if led is None or not 0 < step < self.total_steps:
            return False
        assert led.points is not None
        points, tokens = led.points, self.scheduled_tokens
        return self.tokens_at(step) * points // tokens > self.tokens_at(step - 1) * points // tokens

    def decide(self, step: int, noise_scale: float) -> Decision:
        """Give the steps after the first ``step`` the size that a measurement leads to, and return that decision.

        Args:
            noise_scale: in sequences; not finite if nothing is known.
        """
        led = self.config.led
        assert led is not None
        size = led.grown(self.at(step).batch_size, noise_scale)
        found = Decision(step, self.tokens_at(step), noise_scale if math.isfinite(noise_scale) else None, size)
        self.replay([found])
        return found

    def replay(self, decisions: Sequence[Decision]) -> None:
        """Apply decisions that were made before, in order."""
        for decision in decisions:
            self.decisions += (decision,)
            last, step = self.phases[-1], decision.step
            if decision.batch_size != last.batch_size:
                left = self.scheduled_tokens - self.tokens_at(step)
                self.phases = (
                    *self.phases[:-1],
                    replace(last, end_step=step),
                    replace(
                        last,
                        first_step=step,
                        end_step=step - (-left // (decision.batch_size * last.context)),
                        batch_size=decision.batch_size,
                        first_sample=self.samples_at(step)[1],
                        first_token=self.tokens_at(step),
                    ),
                )

    def fewest_steps(self) -> int:
        """Return the number of steps if every coming decision raises the batch size as far as it may."""
        led, ahead, tokens = self.config.led, replace(self), self.scheduled_tokens
        assert led is not None
        assert led.points is not None
        for point in range(1, led.points):
            last, needed = ahead.phases[-1], -(-point * tokens // led.points)
            step = last.first_step - (last.first_token - needed) // last.tokens_per_step
            if step > last.first_step and ahead.decides(step):
                ahead.decide(step, float(led.sizes[-1]) / (led.ratio or 1.0))
        return ahead.total_steps


class _Part(NamedTuple):
    """The part of a configured phase that has one batch size, with its share of the tokens or its tokens."""

    number: int
    phase: PhaseConfig
    context: int
    batch_size: int
    share: float | None
    tokens: float | None

    @property
    def tokens_per_step(self) -> int:
        return self.context * self.batch_size


def _parts(config: BudgetConfig, context: int) -> list[_Part]:
    phases = config.phases if config.phases is not None else [PhaseConfig(share=1.0)]
    whole = [
        _Part(*(index, phase, phase.context or context), phase.batch_size or config.first_batch, *_length(phase))
        for index, phase in enumerate(phases)
    ]
    if config.changing is None:
        return whole
    tokens = config.tokens
    if phases[0].tokens is not None:
        tokens = sum(phase.tokens or 0 for phase in phases)
    stretches = config.changing.stretches(tokens)
    found: list[_Part] = []
    first = 0.0
    for part in whole:
        last = first + (part.share if part.tokens is None else part.tokens / (tokens or 1))  # type: ignore[operator]
        own = [(math.inf, part.batch_size)] if part.phase.batch_size else stretches
        begin = first
        for end, size in own:
            # Up to the end of the stretch, or of the phase; rounding errors are no part of their own.
            stop = last if end > last - _SHARES else end
            if stop > begin + _SHARES:
                share = stop - begin
                length = (share, None) if part.tokens is None else (None, share * (tokens or 0))
                found.append(_Part(part.number, part.phase, part.context, size, *length))
                begin = stop
        first = last
    return found


def _length(phase: PhaseConfig) -> tuple[float | None, float | None]:
    return phase.share, phase.tokens


def _covering(phases: tuple[Phase, ...], tokens: int) -> tuple[Phase, ...]:
    """Return phases that have the fewest steps, and each at least one, with which the run sees ``tokens``."""
    while len(phases) > 1 and phases[-1].first_token >= tokens and phases[-2].index == phases[-1].index:
        phases = phases[:-1]
    last = phases[-1]
    steps = max(1, -(-(tokens - last.first_token) // last.tokens_per_step))
    return (*phases[:-1], replace(last, end_step=last.first_step + steps))


def _exact_lengths(
    config: BudgetConfig, parts: Sequence[_Part], samples_per_epoch: SamplesPerEpoch | None
) -> list[float]:
    """Return the length of each part in steps, not rounded."""
    if config.steps is not None:
        # Shares are shares of tokens, so the total number of tokens follows from the number of steps.
        steps_per_token = [(part.share or 0.0) / part.tokens_per_step for part in parts]
        return [config.steps * weight / sum(steps_per_token) for weight in steps_per_token]
    if config.epochs is not None:
        if samples_per_epoch is None:
            raise UserError(f"budget.epochs={config.epochs}: the number of samples per epoch is unknown here")
        return [
            (part.share or 0.0) * (config.epochs * samples_per_epoch(part.context) / part.batch_size) for part in parts
        ]
    return [
        (part.tokens if part.tokens is not None else (part.share or 0.0) * (config.tokens or 0)) / part.tokens_per_step
        for part in parts
    ]


def _phases(parts: Sequence[_Part], lengths: Sequence[float], steps: int) -> tuple[Phase, ...]:
    ends = [min(math.floor(total + 0.5), steps) for total in accumulate(lengths)]
    ends[-1] = steps
    phases: list[Phase] = []
    count = parts[-1].number + 1
    for at, (part, end) in enumerate(zip(parts, ends, strict=True)):
        before = phases[-1] if phases else None
        first = before.end_step if before is not None else 0
        if at == 0 or parts[at - 1].number != part.number:
            own = [place for place, other in enumerate(parts) if other.number == part.number]
            length, last = sum(lengths[place] for place in own), ends[own[-1]]
            # A single phase is as long as the run, which has at least one step.
            if last <= first or (count > 1 and length < 1.0 - _SHARES):
                config = part.phase
                said = f"share={config.share}" if config.share is not None else f"tokens={config.tokens}"
                raise UserError(
                    f"budget.phases[{part.number}]: {said} of a run of {steps} steps is shorter than one step "
                    f"({part.tokens_per_step} tokens)"
                )
        if end <= first:
            continue
        goes_on = before is not None and before.context == part.context
        phases.append(
            Phase(
                *(part.number, first, end, part.context, part.batch_size, part.phase.density, part.phase.schedule),
                stream=0 if before is None else before.stream + (not goes_on),
                first_sample=before.first_sample + before.steps * before.batch_size
                if before is not None and goes_on
                else 0,
                first_token=0 if before is None else before.first_token + before.tokens,
            )
        )
    return tuple(phases)
