"""The memory that a model needs at its peak: estimated before anything is built, in closed form.

Every part has two numbers. ``least`` is certain: it counts tensors that exist at the same moment, whatever the
allocator, the backend or the rule of the masks does. ``likely`` adds what is usual: the layouts of the kernels, the
buffers of a backward pass, the copy that a checkpoint is written from. A run should be refused by ``least``, so that
nothing is refused that fits, and what would fit should be told by ``likely``.

Measured against the growth of the resident size over whole runs, ``likely`` lies within a factor of 1.5 where the model
is what needs the memory; ``tests/cost/test_footprint.py`` holds the ratios.

Legend: B sequences that pass through the model at once, T context, N = B T tokens, D model width, F width of the MLP,
K width of all keys (and of all values), L layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from sparsetrain.cost.flops import matrices
from sparsetrain.models.config import ModelConfig
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
_DRAWN = 16  # bytes of each place of a matrix while its mask is drawn
# Bytes of the Python objects of a block: its modules and parameters, and what an optimizer keeps about them.
_OBJECTS = 30_000


@dataclass(frozen=True)
class Part:
    """Bytes for one purpose: at least, and likely."""

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
        """The part that needs most."""
        return max(self.parts, key=lambda part: part.likely)


@dataclass(frozen=True)
class Workload:
    """What is done with a model, as far as memory depends on it.

    Args:
        model: the transformer. plan: which of its matrices are sparse; None for none.
        batch_size: sequences of an optimizer step, whose tokens are held together; 0 without training.
        micro_batch: sequences that pass through the model at once. context: tokens of a sequence.
        evaluated: sequences that pass through the model at once without gradients.
        cached: tokens of each of these whose keys and values are kept, as in generation and scoring.
        moments: values that the optimizer keeps for a weight: 2 for AdamW.
        trained: whether weights have gradients; False for a soft prompt of a frozen model.
        half: whether activations have 16 bits.
        whole_logits: whether the logits of all tokens exist at once, not those of a chunk.
        prompt_tokens: learned vectors of a soft prompt.
    """

    model: ModelConfig
    plan: SparsityConfig | None = None
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
        """Return the moment that likely needs most, with the largest ``least`` of all moments."""
        moments = [self._built()]
        if self.batch_size:
            moments += [self._forward(), self._update()]
        if self.evaluated:
            moments.append(self._evaluation())
        worst = max(moments, key=lambda parts: sum(part.likely for part in parts))
        return Footprint(tuple(worst), max(sum(part.least for part in parts) for parts in moments))

    # ------------------------------------------------------------------------------------------------ moments

    def _built(self) -> list[Part]:
        """Dense matrices, of which `sparsetrain.sparsify` makes sparse ones."""
        dense = hidden_matrices(self.model, None)
        size = dense.stored * _FLOAT
        drawn = dense.largest * _DRAWN if self.plan is not None and self.plan.is_sparse else 0
        return [Part(WEIGHTS, size, size + drawn + self._others()), self._embeddings(1, 1)]

    def _forward(self) -> list[Part]:
        """The end of a forward pass. Moments exist from the second step on, gradients from the second micro-batch."""
        several = int(self.batch_size > self.micro_batch and self.trained)
        copies = 1 + several, 1 + several + (self.moments if self.trained else 0)
        return [*self._state(*copies), self._activations(), self._logits(), self._tokens(self.batch_size)]

    def _update(self) -> list[Part]:
        """The optimizer's step, and the checkpoint after it: instead of gradients, a copy of what is being written."""
        copies = (2 + self.moments, 1 + self.moments + max(1, self.moments)) if self.trained else (1, 2)
        return [*self._state(*copies), self._tokens(self.batch_size)]

    def _evaluation(self) -> list[Part]:
        """A pass without gradients: the activations of one block."""
        model, tokens = self.model, self.evaluated * self.context
        least = tokens * (2 * model.d_model + (3 if model.mlp == "swiglu" else 2) * model.ffn_width)
        likely = least + tokens * model.d_model
        cache = 2 * self.evaluated * self.cached * model.n_layers * model.kv_heads * model.d_head * _FLOAT
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
        """Return so many values for each weight, and the indices of sparse matrices."""
        fewest, usual = hidden_matrices(self.model, self.plan, fewest=True), hidden_matrices(self.model, self.plan)
        certain = fewest.stored * least * _FLOAT + fewest.sparse * _COLUMN
        indices = usual.sparse * (_COLUMN + _LAYOUT) + usual.sparse_rows * _ROW
        weights = Part(WEIGHTS, certain, usual.stored * likely * _FLOAT + indices + self._others())
        return [weights, self._embeddings(least, likely)]

    def _others(self) -> int:
        """Return what comes with the blocks likely: objects, and for masks that evolve one dense matrix and a history.

        RigL has the dense gradient of one layer at a time, SET an order of its empty places; the history is two bits
        for each place.
        """
        objects = self.model.n_layers * _OBJECTS
        if self.plan is None or not self.plan.is_sparse or self.plan.evolution.rule == "static" or not self.batch_size:
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
        """Return what the forward pass keeps for the backward pass: 64 D bytes for each token and layer if F = 4 D.

        A branch keeps its input and that of its first matrix, attention also queries, keys, values and its result, the
        MLP two tensors of its width, or four if it is gated. The scores of attention are never stored. Frozen weights
        need no input of their matrix.
        """
        model, tokens = self.model, self.micro_batch * self.context
        width, inner, gated = model.d_model, model.ffn_width, model.mlp == "swiglu"
        qkv = width + 2 * model.kv_heads * model.d_head
        trained = 5 * width + qkv + (4 if gated else 2) * inner
        frozen = 3 * width + qkv + (3 if gated else 1) * inner
        outside = 2 * width  # the input of the final norm, and the gradient of its output
        # Gradients inside the block at which a backward pass stands.
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
        # Beside the chunk: the gradient of the head's weight, which exists before the backward pass begins.
        gradient = model.vocab_size * model.d_model * _FLOAT if self.trained else 0
        return Part(LOGITS, gradient // 2, 2 * self._chunk(tokens) + 2 * gradient)

    def _chunk(self, tokens: int) -> int:
        return min(tokens, chunk_tokens(self.model.vocab_size)) * self.model.vocab_size * _FLOAT

    def _tokens(self, rows: int) -> Part:
        size = 2 * rows * self.context * _TOKEN  # inputs and targets
        return Part(BATCH, size, 2 * size)


@dataclass(frozen=True)
class Hidden:
    """Sums over the hidden matrices: stored values, those of sparse matrices and their rows, and the largest matrix."""

    stored: int
    sparse: int
    sparse_rows: int
    largest: int


def hidden_matrices(model: ModelConfig, plan: SparsityConfig | None, fewest: bool = False) -> Hidden:
    """Return what the hidden matrices store, from those of one block: no list grows with the number of layers.

    Args:
        plan: None for dense ones. Globs are read for the first block.
        fewest: the least number of values that the plan allows at any time, whatever its globs select; else the
            number at the time when there are most.
    """
    block, layers = matrices(replace(model, n_layers=1)), model.n_layers
    numel = sum(matrix.numel for matrix in block)
    largest = max(matrix.numel for matrix in block)
    if plan is None or not plan.is_sparse:
        return Hidden(numel * layers, 0, 0, largest)
    densities = {matrix.name: _density(matrix.name, plan, fewest, numel * layers) for matrix in block}
    # A layer that is dense only at times stores its indices all the same.
    resized = RULES[plan.evolution.rule].resizes and not fewest
    stored = {matrix.name: int(densities[matrix.name] * matrix.numel) for matrix in block}
    sparse = [
        matrix for matrix in block if densities[matrix.name] < 1.0 or (resized and _takes_part(matrix.name, plan))
    ]
    return Hidden(
        sum(stored.values()) * layers,
        sum(stored[matrix.name] for matrix in sparse) * layers,
        sum(matrix.out_features for matrix in sparse) * layers,
        largest,
    )


def _density(name: str, plan: SparsityConfig, fewest: bool, numel: int) -> float:
    """Return the density of a matrix where the plan gives it most weights, or the smallest that is possible."""
    own = plan.sparsity if plan.nnz is None else max(0.0, 1.0 - plan.nnz / numel)
    rule = plan.evolution.build(None, own) if own or not RULES[plan.evolution.rule].needs_sparsity else Static()
    if fewest:
        return min(*rule.densities(1.0 - own), *(1.0 - group.sparsity for group in plan.groups), 1.0 - own)
    if not _takes_part(name, plan):
        return 1.0
    for group in plan.groups:
        if fnmatchcase(name, group.match):
            return max(rule.densities(1.0 - group.sparsity))
    return max(rule.densities(1.0 - own))


def _takes_part(name: str, plan: SparsityConfig) -> bool:
    if not matches(name, plan.include) or matches(name, plan.exclude):
        return False
    return next((group.sparsity > 0.0 for group in plan.groups if fnmatchcase(name, group.match)), True)
