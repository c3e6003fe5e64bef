"""Published power laws for weight decay and batch size, with what they were fitted on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsetrain.errors import UserError


@dataclass(frozen=True)
class PublishedLaw:
    """A power law ``y = coefficient * x ** exponent`` from a paper.

    The levels depend on data, architecture and parameterization; the exponents less so. Where it matters, fit your own.

    Args:
        name: of x, for messages.
        coefficient, exponent: of the law.
        range: x between which it was fitted, or None where the paper's is not known here.
        r_squared: of the fit, in logarithms.
        exponent_interval: 10th and 90th percentile of the exponent over bootstrap samples, or None.
        source: the paper.
    """

    name: str
    coefficient: float
    exponent: float
    range: tuple[float, float] | None
    r_squared: float
    exponent_interval: tuple[float, float] | None
    source: str

    def __call__(self, x: float) -> float:
        """Return y at x; also outside of `range`, where it is an extrapolation.

        Raises:
            UserError: x is not above 0 and finite.
        """
        if not 0.0 < x < math.inf:
            raise UserError(f"{self.name}={x} must be above 0 and finite")
        return self.coefficient * float(x) ** self.exponent


tau_opt = PublishedLaw(
    name="tokens_per_parameter",
    coefficient=1.084,
    exponent=-0.527,
    range=(20.0, 1280.0),
    r_squared=0.975,
    exponent_interval=(-0.529, -0.507),
    source="Power Lines, arXiv 2505.13738",
)
"""The best timescale of AdamW, `sparsetrain.timescale`, by training tokens per parameter."""

batch_opt = PublishedLaw(
    name="tokens",
    coefficient=0.0306 * 2048,
    exponent=0.383,
    range=None,
    r_squared=0.984,
    exponent_interval=(0.367, 0.391),
    source="Power Lines, arXiv 2505.13738 (fitted in sequences of 2,048 tokens)",
)
"""The best batch size in tokens, by training tokens."""
