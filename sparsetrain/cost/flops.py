"""Training FLOPs and parameter counts in closed form, from a `ModelConfig` alone.

The count is that of MediSwift (arXiv 2403.00952) and SPDF (arXiv 2303.10464), which reproduces their
published ratios::

    F = 6 [ sum of nnz(hidden matrices) + V d + 2 L T d ]      FLOPs per training token

Legend: V vocabulary, d model width, L layers, T context, nnz stored weights. A multiply-add is 2 FLOPs; the
backward pass costs twice the forward pass, hence the 6. Q K^T and A V are counted dense and non-causal, as
the papers do. The embedding look-up, norms, biases, activations, softmax and the optimizer are not counted.

These are *theoretical* FLOPs: what a machine does that skips every zero. How long a step takes is measured,
never derived from this number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

from sparsetrain.errors import UserError, nearest
from sparsetrain.models.config import ModelConfig

Density = float | Mapping[str, float]


@dataclass(frozen=True)
class MatrixShape:
    """One hidden matrix of the model, ``[out_features, in_features]``, and the fraction of it that is stored."""

    name: str
    out_features: int
    in_features: int
    density: float = 1.0

    @property
    def numel(self) -> int:
        """Entries of the dense matrix."""
        return self.out_features * self.in_features

    @property
    def nnz(self) -> int:
        """Stored weights: the exact count of `sparsetrain.sparsity.patterns.draw.random_pattern`."""
        return round(self.density * self.numel)


@dataclass(frozen=True)
class FlopTerms:
    """FLOPs by term; per token from the functions below, of a whole run after `for_tokens`."""

    sparse_linears: float
    head: float
    attention: float

    @property
    def total(self) -> float:
        """The sum of the terms."""
        return self.sparse_linears + self.head + self.attention

    def for_tokens(self, tokens: float) -> FlopTerms:
        """Return the terms times a number of tokens (or any other factor)."""
        return FlopTerms(self.sparse_linears * tokens, self.head * tokens, self.attention * tokens)

    def as_dict(self) -> dict[str, float]:
        """Return the terms and their total, as a report stores them."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by kind. ``matrices`` counts stored weights only; a tied head counts 0."""

    embedding: int
    positions: int
    matrices: int
    biases: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """All parameters that the model stores."""
        return self.non_embedding + self.embedding + self.positions + self.head

    @property
    def non_embedding(self) -> int:
        """Parameters outside embedding, learned positions and head: the N of scaling laws."""
        return self.matrices + self.biases + self.norms

    def as_dict(self) -> dict[str, int]:
        """Return every field and both sums."""
        return {**asdict(self), "total": self.total, "non_embedding": self.non_embedding}


def hidden_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return ``(out_features, in_features)`` of the hidden matrices by name."""
    return {matrix.name: (matrix.out_features, matrix.in_features) for matrix in matrices(config)}


def hidden_density(config: ModelConfig, densities: Mapping[str, float]) -> float:
    """Return nonzeros over elements of all hidden matrices; those that ``densities`` does not name are dense."""
    hidden = matrices(config, densities or 1.0)
    return sum(matrix.nnz for matrix in hidden) / sum(matrix.numel for matrix in hidden)


def matrices(config: ModelConfig, density: Density = 1.0) -> list[MatrixShape]:
    """Return the hidden matrices of ``Transformer(config)`` in the order of its modules.

    Args:
        config: the model.
        density: stored fraction of each matrix. One number for all of them, or a mapping from qualified name
            (``"blocks.3.attn.qkv"``) or glob (``"blocks.*.mlp.*"``) to density, where the first match wins
            and a matrix that nothing matches is dense.

    Raises:
        UserError: a density outside (0, 1], or a key of the mapping that no matrix takes its density from.
    """
    d_kv = config.kv_heads * config.d_head
    inner = {
        "attn.qkv": (config.d_model + 2 * d_kv, config.d_model),
        "attn.out": (config.d_model, config.d_model),
    }
    if config.mlp == "swiglu":
        inner["mlp.gate"] = (config.ffn_width, config.d_model)
    inner["mlp.up"] = (config.ffn_width, config.d_model)
    inner["mlp.down"] = (config.d_model, config.ffn_width)
    shapes = {f"blocks.{layer}.{name}": shape for layer in range(config.n_layers) for name, shape in inner.items()}
    densities = _resolve(density, list(shapes))
    return [MatrixShape(name, *shape, densities[name]) for name, shape in shapes.items()]


def training_flops_per_token(config: ModelConfig, density: Density = 1.0, context: int | None = None) -> FlopTerms:
    """Return the FLOPs of forward and backward pass per token, by term: equation F at the top of this file.

    Args:
        config: the model. Grouped-query attention makes the qkv matrix smaller, not the attention term.
        density: as in `matrices`.
        context: tokens T that one token attends over; None is ``config.max_context``.

    Raises:
        UserError: as `matrices`, or a context that is not positive.
    """
    length = config.max_context if context is None else context
    if length < 1:
        raise UserError(f"context={context} is not a positive number of tokens")
    return FlopTerms(
        sparse_linears=6.0 * sum(matrix.nnz for matrix in matrices(config, density)),
        head=6.0 * config.vocab_size * config.d_model,
        attention=12.0 * config.n_layers * length * config.d_model,
    )


def forward_flops_per_token(config: ModelConfig, density: Density = 1.0, context: int | None = None) -> FlopTerms:
    """Return the FLOPs of the forward pass alone: a third of `training_flops_per_token`."""
    return training_flops_per_token(config, density, context).for_tokens(1.0 / 3.0)


def flop_ratio(dense: FlopTerms, sparse: FlopTerms) -> float:
    """Return how many times fewer FLOPs ``sparse`` has than ``dense``; 2.0 is half of them."""
    return dense.total / sparse.total


def parameter_count(config: ModelConfig, density: Density = 1.0) -> ParameterCount:
    """Return the parameters of ``Transformer(config)`` by kind without building it; ``density`` as in `matrices`."""
    hidden = matrices(config, density)
    width, layers = config.d_model, config.n_layers
    gain_and_bias = 2 if config.bias and config.norm == "layernorm" else 1
    return ParameterCount(
        embedding=config.vocab_size * width,
        positions=config.max_context * width if config.positions == "learned" else 0,
        matrices=sum(matrix.nnz for matrix in hidden),
        biases=sum(matrix.out_features for matrix in hidden) if config.bias else 0,
        norms=(2 * layers + 1) * width * gain_and_bias,
        head=0 if config.tie_embeddings else config.vocab_size * width,
    )


def _resolve(density: Density, names: list[str]) -> dict[str, float]:
    if not isinstance(density, Mapping):
        _check_density("density", density)
        return dict.fromkeys(names, density)
    resolved = dict.fromkeys(names, 1.0)
    unmatched = list(names)
    for glob, value in density.items():
        _check_density(f"density['{glob}']", value)
        taken = [name for name in unmatched if fnmatchcase(name, glob)]
        if not taken:
            raise UserError(f"density['{glob}'] applies to no hidden matrix of the model{nearest(glob, names)}")
        resolved.update(dict.fromkeys(taken, value))
        unmatched = [name for name in unmatched if name not in set(taken)]
    return resolved


def _check_density(field: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise UserError(f"{field}={value} must lie in (0, 1]")
