"""Published laws for weight decay, batch size and loss, with what they were fitted on.

The levels depend on data, architecture and parameterization; the exponents less so. Where it matters, fit your own.
"""

from __future__ import annotations

from sparsetrain.scaling.law import LossLaw, PowerLaw, Quantity

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

chinchilla = LossLaw(
    parameters={"floor": 1.8172, "a": 482.01, "b": 2085.43, "alpha": 0.3478, "beta": 0.3658},
    kind="loss",
    inputs=(Quantity("parameters", "parameters"), Quantity("tokens", "tokens")),
    output=Quantity("loss", "nats per token"),
    ranges=((7e7, 1.6e10), (5e9, 5e11)),
    sparsity=0.0,
    source="Chinchilla, arXiv 2203.15556, approach 3 as refitted by arXiv 2404.10102",
    verified=_UNREAD,
)
"""The loss of dense models on the text of Chinchilla, by all parameters, embeddings included, and training tokens."""
