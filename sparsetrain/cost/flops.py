"""Training FLOPs and parameter counts in closed form, from a `ModelConfig` alone.

The formula is the one of MediSwift (arXiv 2403.00952) and SPDF (arXiv 2303.10464); it reproduces their published
ratios::

    F = 6 [ sum of nnz(hidden matrices) + V d + 2 L T d ]      FLOPs per training token

Legend: V vocabulary, d model width, L layers, T context, nnz stored weights. A multiply-add is 2 FLOPs, and the
backward pass costs twice the forward pass, hence the factor 6. Q K^T and A V are counted dense and non-causal, as in
the papers. The embedding look-up, norms, biases, activations, softmax and the optimizer are not counted.

These are *theoretical* FLOPs: the work of a machine that skips every zero. The time of a step is measured, never
derived from this number.
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
    """A hidden matrix of the model, ``[out_features, in_features]``; ``density`` is the stored fraction of it."""

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
    """FLOPs by term: per token in the functions below, for a number of tokens after `for_tokens`."""

    sparse_linears: float
    head: float
    attention: float

    @property
    def total(self) -> float:
        """The sum of the terms."""
        return self.sparse_linears + self.head + self.attention

    def for_tokens(self, tokens: float) -> FlopTerms:
        """Return every term times a number of tokens, or another factor."""
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
        """Return every field, ``total`` and ``non_embedding``."""
        return {**asdict(self), "total": self.total, "non_embedding": self.non_embedding}


def hidden_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return ``(out_features, in_features)`` of each hidden matrix by name."""
    return {matrix.name: (matrix.out_features, matrix.in_features) for matrix in matrices(config)}


def hidden_density(config: ModelConfig, densities: Mapping[str, float]) -> float:
    """Return nonzeros over elements of all hidden matrices; a matrix that ``densities`` does not name is dense."""
    hidden = matrices(config, densities or 1.0)
    return sum(matrix.nnz for matrix in hidden) / sum(matrix.numel for matrix in hidden)


def matrices(config: ModelConfig, density: Density = 1.0) -> list[MatrixShape]:
    """Return the hidden matrices of ``Transformer(config)`` in the order of its modules.

    Args:
        config: the model.
        density: stored fraction of each matrix. It is one number for all matrices, or a mapping from qualified name
            (``"blocks.3.attn.qkv"``) or glob (``"blocks.*.mlp.*"``) to density. The first match wins, and a matrix
            without a match is dense.

    Raises:
        UserError: a density is outside (0, 1], or no matrix takes its density from a key of the mapping.
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
        context: tokens T that one token attends to; None is ``config.max_context``.

    Raises:
        UserError: ``context`` is not positive, or ``density`` is refused by `matrices`.
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
    """Return the FLOPs of ``dense`` over those of ``sparse``: 2.0 if ``sparse`` has half as many."""
    return dense.total / sparse.total


def parameter_count(config: ModelConfig, density: Density = 1.0) -> ParameterCount:
    """Return the parameters of ``Transformer(config)`` by kind, without building it.

    Args:
        config: the model.
        density: as in `matrices`, which also gives the errors.
    """
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
