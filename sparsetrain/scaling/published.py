"""Published power laws for weight decay and batch size, with what they were fitted on.

The levels depend on data, architecture and parameterization; the exponents less so. Where it matters, fit your own.
"""

from __future__ import annotations

from sparsetrain.scaling.law import PowerLaw, Quantity

_UNREAD = "The constants are those that users of the paper quote, in agreement; the paper itself was not at hand."

tau_opt = PowerLaw(
    parameters={"coefficient": 1.084, "exponent": -0.527},
    kind="tau",
    inputs=(Quantity("tokens_per_parameter", "tokens / parameter"),),
    output=Quantity("tau", "share of the training"),
    reported={"exponent": (-0.529, -0.507, 0.8)},
    ranges=((20.0, 1280.0),),
    r_squared=0.975,
    sparsity=0.0,
    source="Power Lines, arXiv 2505.13738",
    verified=_UNREAD,
)
"""The best timescale of AdamW, `sparsetrain.timescale`, by training tokens per parameter."""

batch_opt = PowerLaw(
    parameters={"coefficient": 0.0306 * 2048, "exponent": 0.383},
    kind="batch",
    inputs=(Quantity("tokens", "tokens"),),
    output=Quantity("batch", "tokens"),
    reported={"exponent": (0.367, 0.391, 0.8)},
    r_squared=0.984,
    sparsity=0.0,
    source="Power Lines, arXiv 2505.13738 (fitted in sequences of 2,048 tokens)",
    verified=_UNREAD,
)
"""The best batch size in tokens, by training tokens."""
