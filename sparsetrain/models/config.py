"""The configuration of a `Transformer`: one dataclass, validated when it is created."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsetrain.errors import UserError, check_choice
from sparsetrain.parameterization.initial import LEAST_TRUNCATION
from sparsetrain.sparsity.patterns.spec import PATTERNS

MLPS = ("gelu", "gelu_tanh", "swiglu")
NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("alibi", "rope", "learned", "none")
ROPE_SCALINGS = ("linear", "ntk", "yarn")
DYNAMIC = "dynamic"
ADJUSTABLE = ("positions_scale", "rope_scaling")
"""Fields that may differ from the settings of the training."""

# Indices of a sparse matrix have 32 bits. Blocks are Python objects, whose list must not exhaust the memory.
_MOST, _MOST_LAYERS = 2**31 - 1, 2**16


@dataclass
class ModelConfig:
    """Shape, components and initial scale of a decoder-only transformer.

    Args:
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_heads: number of query heads; must divide ``d_model``.
        vocab_size: rows of the embedding and of the head.
        n_kv_heads: number of key and value heads, a divisor of ``n_heads``; None means ``n_heads``.
        max_context: tokens in the longest training sequence, the trained length. It limits the length only with learned
            positions.
        mlp: matrices of the MLP: ``"gelu"`` (up, down), the same with the approximation by tanh of GPT-2 and Bloom,
            ``"gelu_tanh"``, or ``"swiglu"`` (gate, up, down).
        d_ff: width inside the MLP; None means ``4 d_model`` for GELU and ``floor(8 d_model / 3)`` for SwiGLU, which
            give both the same number of parameters.
        norm: norm before each branch and before the head: ``"layernorm"`` or ``"rmsnorm"``.
        norm_eps: epsilon that a norm adds to the variance (layernorm) or the mean square (rmsnorm).
        bias: whether linear layers and layer norms have a bias. RMSNorm never has one.
        positions: how a token knows its place: ``"alibi"``, ``"rope"``, ``"learned"`` or ``"none"``.
        positions_scale: factor s, at least 1, by which ALiBi or RoPE is stretched for sequences beyond the trained
            length. ALiBi divides its slopes by s (arXiv 2310.13017); `rope_scaling` says what RoPE does. ``"dynamic"``
            takes s = max(1, T / ``max_context``) from the T tokens of each pass, with padding and the tokens of a
            cache, so that passes up to the trained length stay bit for bit the same.
        rope_base: base of the geometric sequence of rotary wavelengths.
        rope_fraction: part of each head that RoPE rotates, in (0, 1]: its first ``d_rotary`` features.
        rope_scaling: what RoPE does with the factor s. ``"linear"`` divides positions by s (arXiv 2306.15595).
            ``"ntk"`` multiplies ``rope_base`` by s^(R / (R - 2)) for R rotated features. ``"yarn"`` divides only the
            slow frequencies, and multiplies the scores of rotated features by (0.1 ln s + 1)^2 (arXiv 2309.00071).
        tie_embeddings: whether the head shares the embedding's weight.
        init_std: standard deviation sigma of the initial weights, before the parameterization scales it.
        init_truncation: initial weights lie within this many standard deviations of 0, each matrix's own; numbers
            beyond are drawn again. Sigma is that of the normal distribution before the cut, as in the configurations
            of BTLM (arXiv 2309.11568) and Crystal (arXiv 2411.04156), which cut at 2: the deviation that is left is
            0.880 sigma. At least 0.5; None cuts nothing.
        scale_glu_init: whether the gate of ``"swiglu"`` starts like the other matrices, as under
            ``scale_glu_initialization: true`` in the configuration of Crystal. False draws it uniformly within
            +-1 / sqrt(fan_in), the values that ``nn.Linear`` is born with, whatever the parameterization; Cerebras'
            Model Zoo of July 2023, which knew the flag, left the gate so without it.
        sparsity: fraction of zeros in each hidden matrix, in [0, 1). 0 builds plain ``nn.Linear`` layers.
        sparsity_pattern: how the positions of nonzeros are chosen; see `sparsetrain.sparsity`.
        seed: seed of masks and initial values; None draws one from torch's global generator.
        dropout: probability of dropping an element of the embeddings and of each residual branch.

    Raises:
        UserError: a field is out of range, or two fields contradict each other.
    """

    d_model: int
    n_layers: int
    n_heads: int
    vocab_size: int
    n_kv_heads: int | None = None
    max_context: int = 2048
    mlp: str = "gelu"
    d_ff: int | None = None
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    bias: bool = False
    positions: str = "alibi"
    positions_scale: float | str = 1.0
    rope_base: float = 10000.0
    rope_fraction: float = 1.0
    rope_scaling: str = "linear"
    tie_embeddings: bool = True
    init_std: float = 0.02
    sparsity: float = 0.0
    sparsity_pattern: str = "random"
    seed: int | None = None
    dropout: float = 0.0
    init_truncation: float | None = None
    scale_glu_init: bool = True

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "n_heads", "vocab_size", "max_context"):
            _check_count(name, getattr(self, name))
        for name in ("n_kv_heads", "d_ff"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if self.d_model % self.n_heads:
            raise UserError(f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise UserError(f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}")
        check_choice("mlp", self.mlp, MLPS)
        check_choice("norm", self.norm, NORMS)
        check_choice("positions", self.positions, POSITIONS)
        if self.sparsity_pattern not in PATTERNS:
            check_choice("sparsity_pattern", self.sparsity_pattern, PATTERNS)
        for name in ("bias", "tie_embeddings", "scale_glu_init"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}={getattr(self, name)!r} is not true or false")
        for name in ("sparsity", "dropout"):
            _check_real(name, getattr(self, name))
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name}={getattr(self, name)} is not in [0, 1)")
        for name in ("norm_eps", "rope_base", "init_std"):
            _check_real(name, getattr(self, name))
            if getattr(self, name) <= 0.0:
                raise UserError(f"{name}={getattr(self, name)} is not positive")
        if self.init_truncation is not None:
            _check_real("init_truncation", self.init_truncation)
            if self.init_truncation < LEAST_TRUNCATION:
                raise UserError(f"init_truncation={self.init_truncation} is not at least {LEAST_TRUNCATION}, or null")
        if not self.scale_glu_init and self.mlp != "swiglu":
            raise UserError(f"scale_glu_init=False: only mlp='swiglu' has a gate, and mlp is {self.mlp!r}")
        self._check_positions()
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0):
            raise UserError(f"seed={self.seed!r} is not a non-negative integer or null")

    def _check_positions(self) -> None:
        check_choice("rope_scaling", self.rope_scaling, ROPE_SCALINGS)
        _check_real("rope_fraction", self.rope_fraction)
        if not 0.0 < self.rope_fraction <= 1.0:
            raise UserError(f"rope_fraction={self.rope_fraction} is not in (0, 1]")
        scale, stretched = self.positions_scale, self.positions in ("alibi", "rope")
        number = isinstance(scale, int | float) and not isinstance(scale, bool) and 1.0 <= scale < math.inf
        if scale != DYNAMIC and not number:
            raise UserError(f"positions_scale={scale!r} is neither a number of at least 1 nor {DYNAMIC!r}")
        if scale != 1.0 and not stretched:
            raise UserError(
                f"positions_scale={scale} needs positions=alibi or rope: positions={self.positions} has none"
            )
        if self.positions != "rope":
            for name, usual in (("rope_fraction", 1.0), ("rope_scaling", ROPE_SCALINGS[0])):
                if getattr(self, name) != usual:
                    raise UserError(f"{name}={getattr(self, name)} needs positions=rope, not {self.positions}")
            return
        if self.rope_fraction == 1.0 and self.d_head % 2:
            raise UserError(
                f"d_model / n_heads = {self.d_head} is odd: positions='rope' rotates pairs and needs an even head width"
            )
        if self.d_rotary < 2 or self.d_rotary % 2:
            raise UserError(
                f"rope_fraction={self.rope_fraction} rotates {self.d_rotary} of d_model / n_heads = {self.d_head} "
                "features, but positions='rope' rotates pairs and needs an even number of them"
            )
        if self.rope_scaling == "yarn" and self.rope_base <= 1.0:
            raise UserError(f"rope_base={self.rope_base} must be above 1 with rope_scaling=yarn")

    @property
    def d_rotary(self) -> int:
        """Features of a head that RoPE rotates: ``rope_fraction`` of them, rounded down."""
        return int(self.d_head * self.rope_fraction)

    def positions_factor(self, tokens: int) -> float:
        """Return the factor s of ``positions_scale`` for a pass over ``tokens`` tokens, with those in a cache."""
        if isinstance(self.positions_scale, str):
            return max(1.0, tokens / self.max_context)
        return float(self.positions_scale)

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, with the default of ``n_kv_heads`` filled in."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_width(self) -> int:
        """Width inside the MLP, with the default of ``d_ff`` filled in."""
        if self.d_ff is not None:
            return self.d_ff
        return 8 * self.d_model // 3 if self.mlp == "swiglu" else 4 * self.d_model

    def width_multipliers(self, base_width: int) -> tuple[float, float]:
        """Return fan_in / fan_in at ``d_model = base_width``, for matrices with d_model inputs and for ``mlp.down``.

        A configured ``d_ff`` is scaled in proportion to d_model. The default width is recomputed for the base, so that
        it is rounded as in the base model.
        """
        m_d = self.d_model / base_width
        if self.d_ff is not None:
            return m_d, m_d
        base_ffn = 8 * base_width // 3 if self.mlp == "swiglu" else 4 * base_width
        return m_d, self.ffn_width / base_ffn


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={value!r} is not a positive integer")
    most = _MOST_LAYERS if name == "n_layers" else _MOST
    if value > most:
        raise UserError(f"{name}={value!r:.30} is above the limit of {most}: such a model fits into no memory")


def _check_real(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name}={value!r} is not a finite number")
