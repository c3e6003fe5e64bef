"""The configuration of ``sparsetrain bench``: one dataclass, validated when it is created."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsetrain.errors import UserError, check_choice
from sparsetrain.machine import available_cores
from sparsetrain.models import ModelConfig
from sparsetrain.sparsity.backends.base import backend_names
from sparsetrain.sparsity.patterns.spec import check_sparsity

PARTS = ("layers", "model", "scaling", "decoding")
PEERS = ("dense_bf16", "torch_csr", "scipy", "sparselab", "sparseprop")
# Accepted even if they are not registered: the same command is valid on every machine and reports what it skips.
BACKENDS = ("csr", "bsr", "masked")
BLOCK_BACKENDS = ("bsr", "triton")


@dataclass
class GptSection:
    """The model whose whole training step is measured: ``model.loss``, clipping, fused AdamW.

    Args:
        d_model, n_layers, n_heads, vocab_size: shape of a `sparsetrain.Transformer` with defaults for the rest.
        context, batch: tokens per sequence and sequences per step.
        backends: backends of the sparse models.
    """

    d_model: int = 512
    n_layers: int = 6
    n_heads: int = 8
    vocab_size: int = 4096
    context: int = 256
    batch: int = 8
    backends: list[str] = field(default_factory=lambda: ["csr"])

    def __post_init__(self) -> None:
        _counts("gpt.batch", [self.batch])
        _names("gpt.backends", self.backends, (*BACKENDS, *backend_names()))
        try:
            self.model_config()
        except UserError as error:
            raise UserError(f"gpt: {error}") from None

    def model_config(self) -> ModelConfig:
        """Return the configuration of the dense model."""
        return ModelConfig(
            self.d_model, self.n_layers, self.n_heads, self.vocab_size, max_context=self.context, sparsity=0.0, seed=0
        )


@dataclass
class ScalingSection:
    """A series to show how time scales with nonzeros and tokens, and where sparse becomes faster than dense.

    Args:
        shape: (in_features, out_features) of the layer.
        sparsities: sparsities of the series over nonzeros, measured with the ``tokens`` of the top level.
        token_counts: numbers of tokens of the series over tokens, measured at ``sparsity``.
        sparsity: sparsity of the series over tokens.
        backends: backends to measure beside dense float32.
    """

    shape: list[int] = field(default_factory=lambda: [1024, 1024])
    sparsities: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98])
    token_counts: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096, 8192])
    sparsity: float = 0.75
    backends: list[str] = field(default_factory=lambda: ["csr"])

    def __post_init__(self) -> None:
        _shape("scaling.shape", self.shape)
        _sparsities("scaling.sparsities", self.sparsities)
        _counts("scaling.token_counts", self.token_counts)
        check_sparsity(self.sparsity, "scaling.sparsity")
        _names("scaling.backends", self.backends, (*BACKENDS, *backend_names()))


@dataclass
class DecodingSection:
    """Few tokens without gradients, as in decoding: layers whose weights come from memory, and whole generations.

    Args:
        shape: (in_features, out_features) of the layers.
        layers: number of layers that take turns in a measurement.
        token_counts: tokens of a product, and rows of a generation, at most 48 for the kernels for few tokens.
        backends: backends to measure beside dense float32 and the ``peers`` of the top level.
        repeats: rounds per cell of layers.
        d_model, n_layers, n_heads, vocab_size: shape of the `sparsetrain.Transformer` that generates.
        prompt, new_tokens: tokens that each row of a generation begins with, and gets.
        generations: rounds per cell of generations.
    """

    shape: list[int] = field(default_factory=lambda: [768, 3072])
    layers: int = 24
    token_counts: list[int] = field(default_factory=lambda: [1, 4, 16])
    backends: list[str] = field(default_factory=lambda: ["csr", "bsr", "auto"])
    repeats: int = 15
    d_model: int = 768
    n_layers: int = 10
    n_heads: int = 12
    vocab_size: int = 8192
    prompt: int = 32
    new_tokens: int = 64
    generations: int = 5

    def __post_init__(self) -> None:
        _shape("decoding.shape", self.shape)
        _counts("decoding.token_counts", self.token_counts)
        for name in ("layers", "repeats", "prompt", "new_tokens", "generations"):
            _counts(f"decoding.{name}", [getattr(self, name)])
        _names("decoding.backends", self.backends, (*BACKENDS, *backend_names()))
        try:
            self.model_config()
        except UserError as error:
            raise UserError(f"decoding: {error}") from None

    def model_config(self) -> ModelConfig:
        """Return the configuration of the dense model."""
        context = self.prompt + self.new_tokens
        shape = (self.d_model, self.n_layers, self.n_heads, self.vocab_size)
        return ModelConfig(*shape, max_context=context, sparsity=0.0, seed=0)


@dataclass
class BenchConfig:
    """Measure the speed of layers, a whole model, two scaling series and decoding, each beside dense float32.

    Args:
        what: layers, model, scaling, decoding or all.
        sparsities: sparsities of the layers and models, each in [0, 1).
        shapes: (in_features, out_features) of the layers.
        tokens: rows of a layer's input.
        threads: thread counts to measure, one after the other.
        backends: backends of the sparse layers: csr (unstructured), bsr (blocks), masked (dense computation, for
            comparison); an unavailable one is skipped with a message.
        peers: other implementations: dense_bf16 (bfloat16 weights and activations), torch_csr, scipy (forward only),
            sparselab and sparseprop (if installed).
        block: (rows, columns) of the blocks of ``bsr``.
        repeats: rounds per cell; each round times every contender once, in changing order. The median counts.
        least_seconds: a contender that takes less is called several times per round.
        patience: a contender that takes more than this many times as long as dense is timed only once (such as
            bfloat16 on a processor without instructions for it).
        memory: whether to measure bytes per nonzero and peak activation memory as well.
        max_seconds: start no new cell or series after this time; the same command resumes. Null for no limit.
        seed: seed of weights, masks and inputs.
        run_dir: directory of the results; null for one below ``runs_dir`` that is named after the configuration.
        runs_dir: the parent of unnamed directories.
        force: run even if the estimated memory exceeds the free memory; the option ``--force`` sets it.
    """

    what: str = "all"
    sparsities: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9, 0.95])
    shapes: list[list[int]] = field(
        default_factory=lambda: [[512, 512], [512, 2048], [2048, 512], [1024, 1024], [768, 3072]]
    )
    tokens: int = 2048
    threads: list[int] = field(default_factory=lambda: [count for count in (1, 2) if count <= available_cores()])
    backends: list[str] = field(default_factory=lambda: list(BACKENDS))
    peers: list[str] = field(default_factory=lambda: list(PEERS))
    block: list[int] = field(default_factory=lambda: [16, 16])
    repeats: int = 7
    least_seconds: float = 0.02
    patience: float = 8.0
    memory: bool = True
    gpt: GptSection = field(default_factory=GptSection)
    scaling: ScalingSection = field(default_factory=ScalingSection)
    decoding: DecodingSection = field(default_factory=DecodingSection)
    max_seconds: float | None = None
    seed: int = 0
    run_dir: str | None = None
    runs_dir: str = "runs"
    force: bool = False

    def __post_init__(self) -> None:
        check_choice("what", self.what, (*PARTS, "all"))
        _sparsities("sparsities", self.sparsities)
        if not self.shapes:
            raise UserError("shapes=[] must name at least one shape, such as [512,2048]")
        for shape in self.shapes:
            _shape("shapes", shape)
        _shape("block", self.block)
        _counts("tokens", [self.tokens])
        _counts("threads", self.threads)
        cores = available_cores()
        if max(self.threads) > cores:
            raise UserError(f"threads={self.threads}: this process may use {cores} cores")
        _counts("repeats", [self.repeats])
        _names("backends", self.backends, (*BACKENDS, *backend_names()))
        if self.peers:
            _names("peers", self.peers, PEERS)
        if not 0 <= self.least_seconds < 60:
            raise UserError(f"least_seconds={self.least_seconds} must lie in [0, 60)")
        if not self.patience >= 1:
            raise UserError(f"patience={self.patience} must be at least 1")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise UserError(f"max_seconds={self.max_seconds} must be above 0, or null")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must be at least 0")

    @property
    def parts(self) -> tuple[str, ...]:
        """The kinds of measurement to make, in order."""
        return PARTS if self.what == "all" else (self.what,)


def _counts(name: str, values: Sequence[int]) -> None:
    if not values:
        raise UserError(f"{name}=[] must name at least one number")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value!r} must be an integer of at least 1")
    if len(set(values)) < len(values):
        raise UserError(f"{name}={list(values)} names a value twice")


def _shape(name: str, value: Sequence[int]) -> None:
    if len(value) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in value):
        raise UserError(f"{name}: {list(value)} must be two integers of at least 1, such as [512,2048]")


def _sparsities(name: str, values: Sequence[float]) -> None:
    if not values or len(set(values)) < len(values):
        raise UserError(f"{name}={list(values)} must name at least one sparsity, and no sparsity twice")
    for value in values:
        check_sparsity(value, name)


def _names(name: str, values: Sequence[str], options: Sequence[str]) -> None:
    if not values or len(set(values)) < len(values):
        raise UserError(f"{name}={list(values)} must name at least one of {', '.join(dict.fromkeys(options))}")
    for value in values:
        check_choice(name, value, dict.fromkeys(options))
