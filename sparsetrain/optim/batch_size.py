"""The batch size over a run: a ramp over the tokens, a list of steps, or led by the gradient noise scale.

A ramp and a list are functions of the share of the budget's tokens that was seen. A size that follows the noise scale
is decided during the run, at points that are equally far apart in tokens, by `BatchSizeConfig.grown`:

* The wanted size is the smallest multiple of ``multiple`` that is at least ``ratio`` times the noise scale. At a batch
  as large as the noise scale, a step makes half the progress of a step along the true gradient, and a run takes twice
  the fewest steps and twice the fewest tokens (arXiv 1812.06162): below it larger batches cost few tokens, and above it
  they save few steps.
* The size never shrinks. The noise scale grows while the loss falls (arXiv 1812.06162), and so does the critical batch
  that is measured by branching: from near 0 at the start, fast at first, and then to a plateau (arXiv 2505.23971). A
  later measurement that is smaller is more likely noise than a fact.
* The size at most doubles at one decision, as in a batch warm-up (arXiv 2505.23971). The estimate is a ratio of two
  noisy averages, so a single one can be far too large, and tokens that were spent in too large a batch do not come
  back.
* A measurement that is not finite changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsetrain.errors import UserError, check_choice

LEADERS = ("tokens", "gns")
GNS = "gns"

_START, _END = 32, 256  # sizes of budget.batch_size=gns
_POINTS = {"tokens": 10, GNS: 20}
_SHARES = 1e-9  # tolerance for shares that must not exceed 1
_WHERE = "budget.batch_size"


@dataclass
class BatchStepConfig:
    """One entry of a list of batch sizes.

    Args:
        size: sequences per optimizer step.
        share: length as a share of the budget's tokens, in (0, 1].
        tokens: length in tokens, for a budget whose length is in tokens. An entry has at most one of both; the last
            one may have neither, and lasts to the end.

    Raises:
        UserError: a field is out of range, or there are two lengths.
    """

    size: int
    share: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        where = f"{_WHERE}.steps"
        if self.share is not None and self.tokens is not None:
            raise UserError(f"{where}: share={self.share}, tokens={self.tokens}: give at most one of share and tokens")
        if self.share is not None and not 0.0 < self.share <= 1.0:
            raise UserError(f"{where}: share={self.share} must lie in (0, 1]")
        for name in ("size", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{where}: {name}={value} must be at least 1")

    @property
    def open(self) -> bool:
        return self.share is None and self.tokens is None


@dataclass
class BatchSizeConfig:
    """A batch size that changes during the run, in sequences per optimizer step.

    It is one of three: a ramp from ``start`` to ``end``, a list of ``steps``, or, with ``led_by: gns``, a size that
    follows the gradient noise scale from ``start`` to at most ``end``.

    Args:
        start: the first size; with ``led_by: gns`` null means 32.
        end: the last size of a ramp, or the largest size that the noise scale may lead to; there null means 256.
        points: a ramp has so many sizes, equally spaced from ``start`` to ``end``, each for an equal share of the
            tokens; a noise scale is looked at after each of so many equal shares of the tokens. Null means 10, and 20
            with ``led_by: gns``.
        multiple: each size is a multiple of it; the sizes between are rounded up.
        led_by: ``tokens``, or ``gns``, the gradient noise scale.
        ratio: with ``led_by: gns``, the wanted size in units of the noise scale, above 0; null means 1.
        steps: sizes one after the other, each with its length.

    Raises:
        UserError: a field is out of range, missing, or has no meaning beside the others.
    """

    start: int | None = None
    end: int | None = None
    points: int | None = None
    multiple: int = 1
    led_by: str = "tokens"
    ratio: float | None = None
    steps: list[BatchStepConfig] | None = None

    def __post_init__(self) -> None:
        check_choice(f"{_WHERE}.led_by", self.led_by, LEADERS)
        if self.multiple < 1:
            raise UserError(f"{_WHERE}.multiple={self.multiple} must be at least 1")
        if self.steps is not None:
            self._check_steps(self.steps)
            return
        if self.led:
            self.start = _START if self.start is None else self.start
            self.end = max(_END, self.start) if self.end is None else self.end
            self.ratio = 1.0 if self.ratio is None else self.ratio
            if not 0.0 < self.ratio < math.inf:
                raise UserError(f"{_WHERE}.ratio={self.ratio} must be above 0 and finite")
        elif self.ratio is not None:
            raise UserError(f"{_WHERE}.ratio={self.ratio} has no meaning without led_by=gns")
        for name in ("start", "end"):
            value = getattr(self, name)
            if value is None:
                raise UserError(f"{_WHERE}: give start and end, or steps, or led_by=gns; {name} is missing")
            if value < 1 or value % self.multiple:
                raise UserError(f"{_WHERE}.{name}={value} must be a multiple of {self.multiple}, at least 1")
        self.points = _POINTS[self.led_by] if self.points is None else self.points
        least = 1 if self.led else 2
        if self.points < least:
            raise UserError(f"{_WHERE}.points={self.points} must be at least {least}")
        if self.led and self.end < self.start:  # type: ignore[operator]
            raise UserError(f"{_WHERE}.end={self.end} must be at least start={self.start}: with led_by=gns it grows")

    def _check_steps(self, steps: Sequence[BatchStepConfig]) -> None:
        for name in ("start", "end", "points", "ratio"):
            if getattr(self, name) is not None:
                raise UserError(f"{_WHERE}.{name}={getattr(self, name)} cannot be combined with steps")
        if self.led:
            raise UserError(f"{_WHERE}.led_by={self.led_by} cannot be combined with steps")
        if not steps:
            raise UserError(f"{_WHERE}.steps=[]: a list of sizes has at least one entry")
        if any(step.open for step in steps[:-1]):
            raise UserError(f"{_WHERE}.steps: only the last entry may be without share and tokens")
        shares = [step.share for step in steps if step.share is not None]
        if sum(shares) > 1.0 + _SHARES or (len(shares) == len(steps) and sum(shares) < 1.0 - _SHARES):
            raise UserError(
                f"{_WHERE}.steps: the shares {shares} add up to {sum(shares):.10g}; they must add up to 1, or the last "
                "entry has none"
            )
        for step in steps:
            if step.size % self.multiple:
                raise UserError(f"{_WHERE}.steps: size={step.size} must be a multiple of {self.multiple}")

    @property
    def led(self) -> bool:
        """Whether the noise scale decides the sizes during the run."""
        return self.led_by == GNS

    @property
    def first(self) -> int:
        """The size of the first optimizer step."""
        if self.steps is not None:
            return self.steps[0].size
        assert self.start is not None
        return self.start

    @property
    def sizes(self) -> list[int]:
        """The sizes that are known beforehand, in order; of a led one the first and the largest possible."""
        if self.steps is not None:
            return [step.size for step in self.steps]
        assert self.start is not None
        assert self.end is not None
        assert self.points is not None
        if self.led:
            return [self.start, self.end]
        last, rise = self.points - 1, self.end - self.start
        # Integer arithmetic: a size that is already a multiple must not be rounded up to the next one.
        return [
            -(-(self.start * last + rise * point) // (last * self.multiple)) * self.multiple
            for point in range(self.points)
        ]

    def stretches(self, tokens: int | None) -> list[tuple[float, int]]:
        """Return the share of the tokens at which each size ends, increasing to 1, and the size.

        Args:
            tokens: of the run; None if its length is not in tokens.

        Raises:
            UserError: an entry's length is in tokens and that of the run is not, or the entries do not fill the run.
        """
        if self.led:
            return [(1.0, self.first)]
        if self.steps is None:
            sizes = self.sizes
            return [((index + 1) / len(sizes), size) for index, size in enumerate(sizes)]
        ends: list[tuple[float, int]] = []
        for step in self.steps:
            share = step.share
            if step.tokens is not None:
                if tokens is None:
                    raise UserError(
                        f"{_WHERE}.steps: tokens={step.tokens} needs a run whose length is in tokens; give share"
                    )
                share = step.tokens / tokens
            end = 1.0 if share is None else (ends[-1][0] if ends else 0.0) + share
            ends.append((end, step.size))
        last = ends[-1][0]
        if last > 1.0 + _SHARES or any(end >= 1.0 for end, _ in ends[:-1]):
            raise UserError(f"{_WHERE}.steps: the entries before the last one fill the whole run of {tokens} tokens")
        if last < 1.0 - _SHARES:
            raise UserError(
                f"{_WHERE}.steps: the entries take {last:.6g} of the run's tokens; leave out the last one's length"
            )
        return [*ends[:-1], (1.0, ends[-1][1])]

    def grown(self, size: int, noise_scale: float) -> int:
        """Return the next size by the rule above, after ``size`` and a measurement in sequences, which may be NaN."""
        assert self.end is not None
        if not math.isfinite(noise_scale):
            return size
        # Bounded before it is rounded: a ratio may be too large for an integer.
        wanted = math.ceil(min((self.ratio or 1.0) * noise_scale, self.end) / self.multiple) * self.multiple
        return max(size, min(wanted, 2 * size, self.end))


def checked(size: int | str | BatchSizeConfig) -> int | BatchSizeConfig:
    """Return a batch size as a number or as a `BatchSizeConfig`; ``gns`` becomes one.

    Raises:
        UserError: it is below 1, or another text.
    """
    if isinstance(size, str):
        if size != GNS:
            raise UserError(f"{_WHERE}={size} must be a number, gns, or a section of settings")
        return BatchSizeConfig(led_by=GNS)
    if isinstance(size, int) and size < 1:
        raise UserError(f"{_WHERE}={size} must be at least 1")
    return size


@dataclass(frozen=True)
class Decision:
    """What the noise scale led to.

    Args:
        step: optimizer steps done.
        tokens: tokens seen by then, if every sequence has its context's number of tokens.
        noise_scale: the measurement in sequences; None if it was not finite.
        batch_size: sequences per optimizer step from then on.
    """

    step: int
    tokens: int
    noise_scale: float | None
    batch_size: int
