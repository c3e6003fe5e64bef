"""The memory that a model needs at its peak, estimated in closed form before anything is built.

Every part has two numbers. ``least`` is a lower bound: it counts tensors that exist at the same moment under every
allocator, backend and evolution rule. ``likely`` adds the usual extras: the layouts of the kernels, the buffers of a
backward pass, and the copy from which a checkpoint is written. A run should be refused by ``least``, so that no run
that fits is refused. Advice on a size that fits should use ``likely``.

Compared with the growth of the resident size over whole runs, ``likely`` lies within a factor of 1.5 if the model needs
most of the memory; ``tests/cost/test_footprint.py`` has the ratios.

Legend: B sequences that pass through the model at once, T context, N = B T tokens, D model width, F width of the MLP,
K width of all keys (and of all values), L layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from sparsetrain.cost.activations import certain_values
from sparsetrain.cost.flops import matrices
from sparsetrain.cost.sizes import Sizes
from sparsetrain.models.config import DYNAMIC, ModelConfig
from sparsetrain.models.cross_entropy import chunk_tokens
from sparsetrain.sparsity.config import SparsityConfig
from sparsetrain.sparsity.evolution.base import RULES
from sparsetrain.sparsity.evolution.rules import Static
from sparsetrain.sparsity.layers.allocation import matches

WEIGHTS, EMBEDDINGS, ACTIVATIONS = "weights and optimizer", "embeddings and head", "activations"
LOGITS, BATCH, CACHE = "logits", "the tokens of a batch", "keys and values"

_FLOAT, _TOKEN = 4, 8  # bytes of a float32 and of an int64
# Bytes of a nonzero's column, of a nonzero in the layouts of the kernels, and of a row pointer.
_COLUMN, _LAYOUT, _ROW = 4, 8, 8
_DRAWN = 16  # bytes per element of a matrix while its mask is drawn
# Bytes of the Python objects of a block: its modules and parameters, and the optimizer's entries for them.
_OBJECTS = 30_000


@dataclass(frozen=True)
class Part:
    """Bytes for one purpose: a lower bound and a likely value."""

    name: str
    least: int
    likely: int


@dataclass(frozen=True)
class Footprint:
    """Bytes that are needed at the same time, by purpose; ``least`` is the certain part of their sum."""

    parts: tuple[Part, ...]
    least: int

    @property
    def likely(self) -> int:
        """The sum over the parts."""
        return sum(part.likely for part in self.parts)

    @property
    def main(self) -> Part:
        """The part that likely needs most bytes."""
        return max(self.parts, key=lambda part: part.likely)


@dataclass(frozen=True)
class Workload:
    """A use of a model, with everything that its memory depends on.

    Args:
        model: the transformer.
        sparsity: the sparsity section; None for a dense model.
        batch_size: sequences per optimizer step, whose tokens are in memory together; 0 without training.
        micro_batch: sequences per forward pass in training.
        context: tokens per sequence.
        evaluated: sequences per forward pass without gradients; 0 without evaluation.
        cached: tokens per evaluated sequence whose keys and values are kept, as in generation and scoring.
        moments: values that the optimizer keeps per weight: 2 for AdamW.
        trained: whether weights have gradients; False for a soft prompt of a frozen model.
        half: whether activations have 16 bits.
        whole_logits: whether the logits of all tokens exist at once, instead of one chunk at a time.
        prompt_tokens: learned vectors of a soft prompt.
    """

    model: ModelConfig
    sparsity: SparsityConfig | None = None
    batch_size: int = 0
    micro_batch: int = 0
    context: int = 1
    evaluated: int = 0
    cached: int = 0
    moments: int = 2
    trained: bool = True
    half: bool = False
    whole_logits: bool = False
    prompt_tokens: int = 0

    def footprint(self) -> Footprint:
        """Return the parts at the moment that likely needs most, with the largest ``least`` of all moments."""
        moments = [self._built()]
        if self.batch_size:
            moments += [self._forward(), self._update()]
        if self.evaluated:
            moments.append(self._evaluation())
        worst = max(moments, key=lambda parts: sum(part.likely for part in parts))
        return Footprint(tuple(worst), max(sum(part.least for part in parts) for parts in moments))

    # ------------------------------------------------------------------------------------------------ moments

    def _built(self) -> list[Part]:
        """The dense matrices of a new model, which `sparsetrain.sparsify` replaces later."""
        dense = hidden_matrices(self.model, None)
        size = dense.stored * _FLOAT
        drawn = dense.largest * _DRAWN if self.sparsity is not None and self.sparsity.is_sparse else 0
        return [Part(WEIGHTS, size, size + drawn + self._others()), self._embeddings(1, 1)]

    def _forward(self) -> list[Part]:
        """The end of a forward pass. Moments exist after the first step, gradients after the first micro-batch."""
        several = int(self.batch_size > self.micro_batch and self.trained)
        copies = 1 + several, 1 + several + (self.moments if self.trained else 0)
        return [*self._state(*copies), self._activations(), self._logits(), self._tokens(self.batch_size)]

    def _update(self) -> list[Part]:
        """The optimizer's step with its gradients, or the checkpoint after it with a copy of the written tensors."""
        copies = (2 + self.moments, 1 + self.moments + max(1, self.moments)) if self.trained else (1, 2)
        return [*self._state(*copies), self._tokens(self.batch_size)]

    def _evaluation(self) -> list[Part]:
        """A forward pass without gradients, which holds the activations of one block at a time."""
        model, rows = self.model, self.evaluated
        # Beyond the trained length, dynamic positions read all cached tokens again, from their embeddings.
        dynamic = model.positions_scale == DYNAMIC
        again = dynamic and self.cached > model.max_context
        tokens = rows * (max(self.context, self.cached) if again else self.context)
        least = tokens * (2 * model.d_model + (3 if model.mlp == "swiglu" else 2) * model.ffn_width)
        likely = least + tokens * model.d_model
        cached = 2 * model.n_layers * model.kv_heads * model.d_head + (model.d_model if dynamic else 0)
        cache = rows * self.cached * cached * _FLOAT
        chunk = self._chunk(tokens)
        return [
            *self._state(1, 1 + (self.moments if self.trained and self.batch_size else 0)),
            Part(ACTIVATIONS, least * (2 if self.half else 4), likely * 4),
            Part(CACHE, cache // 2, cache),
            Part(LOGITS, chunk // 2, 2 * chunk),
            self._tokens(max(self.evaluated, self.batch_size)),
        ]

    # -------------------------------------------------------------------------------------------------- parts

    def _state(self, least: int, likely: int) -> list[Part]:
        """Return weights with indices, and embeddings; ``least`` and ``likely`` are numbers of values per weight."""
        fewest = hidden_matrices(self.model, self.sparsity, fewest=True)
        usual = hidden_matrices(self.model, self.sparsity)
        certain = fewest.stored * least * _FLOAT + fewest.sparse * _COLUMN
        indices = usual.sparse * (_COLUMN + _LAYOUT) + usual.sparse_rows * _ROW
        weights = Part(WEIGHTS, certain, usual.stored * likely * _FLOAT + indices + self._others())
        return [weights, self._embeddings(least, likely)]

    def _others(self) -> int:
        """Return the likely bytes of Python objects and, if masks evolve, of one dense matrix and the mask history.

        RigL holds the dense gradient of one layer at a time, and SET a random order of its empty positions. The
        history has two bits per element.
        """
        objects = self.model.n_layers * _OBJECTS
        sparsity = self.sparsity
        if sparsity is None or not sparsity.is_sparse or sparsity.evolution.rule == "static" or not self.batch_size:
            return objects
        dense = hidden_matrices(self.model, None)
        return objects + dense.largest * _FLOAT + dense.stored // 4

    def _embeddings(self, least: int, likely: int) -> Part:
        model = self.model
        rows = model.vocab_size * (1 if model.tie_embeddings else 2) + self.prompt_tokens
        rows += model.max_context if model.positions == "learned" else 0
        size = rows * model.d_model * _FLOAT
        return Part(EMBEDDINGS, size * least, size * likely)

    def _activations(self) -> Part:
        """Return the tensors kept for the backward pass, as `sparsetrain.cost.activations` counts them."""
        model, tokens = self.model, self.micro_batch * self.context
        width, inner, sizes = model.d_model, model.ffn_width, Sizes.of(self.model)
        trained = int(certain_values(sizes))
        frozen = int(certain_values(sizes, sizes.matrices()))
        outside = 2 * width  # the input of the final norm, and the gradient of its output
        # Gradients inside the block that the backward pass has reached.
        passing = 2 * inner + 3 * width
        more = 2 * width * ((model.norm == "rmsnorm") + (model.dropout > 0.0))
        least = tokens * (model.n_layers * (trained if self.trained else frozen) + outside)
        likely = tokens * (model.n_layers * (trained + more) + outside + passing)
        return Part(ACTIVATIONS, least * (2 if self.half else 4), likely * (3 if self.half else 4))

    def _logits(self) -> Part:
        model, tokens = self.model, self.micro_batch * self.context
        if self.whole_logits:
            size = tokens * model.vocab_size * _FLOAT
            return Part(LOGITS, 2 * size, 3 * size)
        # The loss of a chunk computes the gradient of the head's weight in the forward pass already.
        gradient = model.vocab_size * model.d_model * _FLOAT if self.trained else 0
        return Part(LOGITS, gradient // 2, 2 * self._chunk(tokens) + 2 * gradient)

    def _chunk(self, tokens: int) -> int:
        return min(tokens, chunk_tokens(self.model.vocab_size)) * self.model.vocab_size * _FLOAT

    def _tokens(self, rows: int) -> Part:
        size = 2 * rows * self.context * _TOKEN  # inputs and targets
        return Part(BATCH, size, 2 * size)


@dataclass(frozen=True)
class Hidden:
    """Sums over the hidden matrices.

    Args:
        stored: stored values of all matrices.
        sparse: stored values of the sparse matrices.
        sparse_rows: rows of the sparse matrices.
        largest: elements of the largest matrix.
    """

    stored: int
    sparse: int
    sparse_rows: int
    largest: int


def hidden_matrices(model: ModelConfig, sparsity: SparsityConfig | None, fewest: bool = False) -> Hidden:
    """Return sums over the hidden matrices, computed from one block, so that the cost does not grow with the layers.

    Args:
        model: the transformer.
        sparsity: the sparsity section; None for dense matrices. Its globs are matched against the first block.
        fewest: whether to count the fewest values that the section allows at any time, for any match of its globs.
            Otherwise the values are counted at the time with the most.
    """
    block, layers = matrices(replace(model, n_layers=1)), model.n_layers
    numel = sum(matrix.numel for matrix in block)
    largest = max(matrix.numel for matrix in block)
    if sparsity is None or not sparsity.is_sparse:
        return Hidden(numel * layers, 0, 0, largest)
    densities = {matrix.name: _density(matrix.name, sparsity, fewest, numel * layers) for matrix in block}
    # A rule that changes densities keeps the sparse form, with its indices, while a layer is dense.
    resized = RULES[sparsity.evolution.rule].resizes and not fewest
    stored = {matrix.name: int(densities[matrix.name] * matrix.numel) for matrix in block}
    sparse = [
        matrix for matrix in block if densities[matrix.name] < 1.0 or (resized and _sparsified(matrix.name, sparsity))
    ]
    return Hidden(
        sum(stored.values()) * layers,
        sum(stored[matrix.name] for matrix in sparse) * layers,
        sum(matrix.out_features for matrix in sparse) * layers,
        largest,
    )


def _density(name: str, sparsity: SparsityConfig, fewest: bool, numel: int) -> float:
    """Return the largest density that a matrix has in training, or the smallest that any matrix can have."""
    own = sparsity.sparsity if sparsity.nnz is None else max(0.0, 1.0 - sparsity.nnz / numel)
    needs_sparsity = RULES[sparsity.evolution.rule].needs_sparsity
    rule = sparsity.evolution.build(None, own) if own or not needs_sparsity else Static()
    if fewest:
        return min(*rule.densities(1.0 - own), *(1.0 - group.sparsity for group in sparsity.groups), 1.0 - own)
    if not _sparsified(name, sparsity):
        return 1.0
    for group in sparsity.groups:
        if fnmatchcase(name, group.match):
            return max(rule.densities(1.0 - group.sparsity))
    return max(rule.densities(1.0 - own))


def _sparsified(name: str, sparsity: SparsityConfig) -> bool:
    if not matches(name, sparsity.include) or matches(name, sparsity.exclude):
        return False
    return next((group.sparsity > 0.0 for group in sparsity.groups if fnmatchcase(name, group.match)), True)
