"""Memory of a training step by component, and its peak: what the allocator holds when it holds most.

A step is forward and backward pass in float32 on a CPU, and a fused AdamW step. Weights, moments and the positions of
nonzeros stay between steps. Activations grow until the loss is known, and then turn into gradients, block by block; so
the peak lies at one of a few moments, whose sums are compared. Numbers are bytes here and values in the functions.

The legend is that of `sparsetrain.cost.operations`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from sparsetrain.cost.activations import FLOAT, block_values, norm_values, outer_values
from sparsetrain.cost.blocks import Shape, shape_of_config, shape_of_model
from sparsetrain.cost.flop_ledger import check_whole
from sparsetrain.cost.flops import Density
from sparsetrain.cost.operations import INDEX_BYTES, ROW_BYTES
from sparsetrain.cost.sizes import Layers, Number, Sizes, block_weights, nonzeros, trained_weights
from sparsetrain.errors import UserError, check_choice
from sparsetrain.models.config import ModelConfig
from sparsetrain.models.cross_entropy import chunk_tokens
from sparsetrain.sparsity.backends.base import BACKENDS, resolve_backend
from sparsetrain.sparsity.layers.linear import SparseLinear

_MOMENTS = 2
_TILE, _WIDTH = 64, 96  # tokens of a tile, and usual columns of a block, of the backend csr


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step.

    Args:
        parameters: of weights.
        indices: of the positions of nonzeros, with the layouts that the kernels derive from them.
        gradients: of all gradients, at the end of the backward pass.
        moments: of the optimizer.
        activations: of what autograd saves until the backward pass, among it the gradients that the loss computes.
        workspace: of what else is held at the peak: logits, gradients of activations, memory of kernels.
        peak: the most that is held at a time; less than the sum, since activations go as gradients come.
    """

    parameters: int
    indices: int
    gradients: int
    moments: int
    activations: int
    workspace: int
    peak: int

    @property
    def resident(self) -> int:
        """What stays between steps, after the gradients are dropped."""
        return self.parameters + self.indices + self.moments

    def as_dict(self) -> dict[str, int]:
        """Return every field, as a report stores them."""
        return asdict(self)


def step_memory(
    model: ModelConfig | nn.Module,
    context: int,
    batch: int,
    *,
    density: Density | None = None,
    backend: str | None = None,
    threads: int | None = None,
) -> StepMemory:
    """Return the memory of a training step of ``batch`` sequences of ``context`` tokens, in closed form.

    Args:
        model: a configuration, whose ``sparsity`` counts, or a live `Transformer` or `Prompted` in float32.
        context: tokens T of a sequence. batch: sequences B.
        density: stored fraction of the hidden matrices of a configuration, as `sparsetrain.cost.flops.matrices` takes
            it; None is that of its ``sparsity``.
        backend: of the sparse layers: ``csr``, or ``masked``, which keeps each matrix in dense form until the backward
            pass. None takes that of the layers of a model, and ``csr`` for a configuration.
        threads: of the kernels; None is torch's number.

    Raises:
        UserError: a number is out of range, the backend is unknown, or the model is none of the library's.
    """
    check_whole("context", context, 1)
    check_whole("batch", batch, 1)
    if threads is not None:
        check_whole("threads", threads, 1)
    if backend is not None and backend not in BACKENDS:
        check_choice("backend", backend, list(BACKENDS))
    if isinstance(model, ModelConfig):
        shape: Shape | None = shape_of_config(model, density)
    else:
        shape = shape_of_model(model) if isinstance(model, nn.Module) else None
        if shape is None:
            raise UserError(f"model is a {type(model).__name__}, neither a ModelConfig nor a Transformer as built")
    tokens = context + shape.prompt_tokens
    if backend is None:
        backend = _backend(model, tokens * batch) if isinstance(model, nn.Module) else "csr"
    masked, threads = backend == "masked", threads or torch.get_num_threads()
    return memory_of(shape, float(tokens), float(batch), masked, float(threads))


def _backend(model: nn.Module, tokens: int) -> str:
    """Return the backend of the first sparse layer of a model."""
    layer = next((module for module in model.modules() if isinstance(module, SparseLinear)), None)
    return "csr" if layer is None else resolve_backend(layer.backend, layer.pattern, tokens)


def memory_of(shape: Shape, context: float, batch: float, masked: bool, threads: float) -> StepMemory:
    """Return the memory of a step of a model's shape; see `step_memory`."""
    sizes, layers, tokens = Sizes.of(shape.config), shape.layers, context * batch
    stream, table = tokens * sizes.width, sizes.vocabulary * sizes.width
    saved = [block_values(sizes, tokens, group.frozen, _kept(sizes, group, masked)) for group in layers]
    outer = outer_values(sizes, context, tokens)
    gradients = trained_weights(sizes, layers, shape.frozen)
    blocks = sum(group.count * values for group, values in zip(layers, saved, strict=True))

    chunk = chunk_tokens(int(sizes.vocabulary))
    logits = min(tokens, chunk) * sizes.vocabulary * (2.0 if tokens > chunk else 1.0)
    # The result of the final norm lives until the loss is known.
    moments = [blocks + outer + stream + logits, blocks + outer + stream + table]
    held = blocks + outer - norm_values(sizes, tokens)  # the gradients of the loss have taken the saved ones' place
    moments.append(held + stream + norm_values(sizes, tokens))
    for group, values in zip(reversed(layers), reversed(saved), strict=True):
        steps = _backward(sizes, group, context, batch, masked, threads)
        now = np.cumsum([change for taken, freed in steps for change in (taken, -freed)])
        most, net = float(now.max()), block_weights(sizes, group.densities, group.frozen) - values
        moments += [held + most, held + (group.count - 1.0) * net + most]
        held += group.count * net
    # The gradient of the embedding, and its sum with that of a tied head.
    moments.append(held + (2.0 if sizes.tied else 1.0) * table + sizes.positions * sizes.width)
    moments.append(gradients)

    weights = trained_weights(sizes, [Layers(g.count, g.densities) for g in layers])
    indices = sum(group.count * _index_bytes(sizes, group, masked) for group in layers)
    resident = FLOAT * (weights + _MOMENTS * gradients) + indices
    peak = resident + FLOAT * max(moments)
    activations = FLOAT * (blocks + outer)
    return StepMemory(
        parameters=round(FLOAT * weights),
        indices=round(indices),
        gradients=round(FLOAT * gradients),
        moments=round(FLOAT * _MOMENTS * gradients),
        activations=round(activations),
        workspace=round(max(0.0, FLOAT * max(moments) - activations)),
        peak=round(peak),
    )


def _backward(
    sizes: Sizes, group: Layers, context: float, batch: float, masked: bool, threads: float
) -> list[tuple[float, float]]:
    """Return what each operation of a block's backward pass takes and then frees.

    The gradient of the block's result is held before, and that of its input afterwards.
    """
    tokens = context * batch
    stream, inner, qkv = tokens * sizes.width, tokens * sizes.ffn, tokens * (sizes.width + 2.0 * sizes.kv_width)
    norm, logs = norm_values(sizes, tokens), tokens * sizes.heads
    dropped = stream if sizes.dropout else 0.0

    def product(name: str, gradient: float, input_: float, output: float) -> tuple[float, float]:
        """Take the gradients of input and weights; free the input and the gradient of the result."""
        rows, columns = sizes.matrices()[name]
        density = group.densities.get(name, 1.0)
        nnz = float(nonzeros(rows, columns, density))
        work = 0.0
        if density < 1.0:
            work = rows * columns if masked else threads * (nnz + 2.0 * (rows + columns) * _TILE) + nnz
        kept = rows * columns if density < 1.0 and masked else 0.0
        return gradient + nnz + (rows if sizes.biased else 0.0) + work, input_ + output + work + kept

    steps = [(dropped, dropped), product("mlp.down", inner, inner, dropped)]
    if sizes.gated:
        steps += [(2.0 * inner, 3.0 * inner), (inner, 2.0 * inner)]
        steps += [product("mlp.up", stream, 0.0, inner), product("mlp.gate", stream, 2.0 * stream, inner)]
    else:
        steps += [(inner, 2.0 * inner), product("mlp.up", stream, stream, inner)]
    steps += [(stream, stream + norm), (dropped, dropped), product("attn.out", stream, 0.0, dropped)]
    pitch = np.ceil(sizes.width / sizes.heads / 16.0) * 16.0 + 16.0
    scratch = threads * (4.0 * context + 600.0) * pitch
    steps.append((qkv + scratch, scratch + qkv + 2.0 * stream + logs))
    if sizes.rotated:
        turned = tokens * (sizes.width + sizes.kv_width)
        steps += [(4.0 * turned, 3.0 * turned), (qkv, qkv + turned)]
    steps += [product("attn.qkv", stream, stream, qkv), (stream, stream + norm)]
    return [(float(taken), float(freed)) for taken, freed in steps]


def _kept(sizes: Sizes, group: Layers, masked: bool) -> Number:
    """Return the values of the dense matrices that the backend ``masked`` keeps for the backward pass."""
    sparse = (name for name, density in group.densities.items() if density < 1.0 and masked)
    return sum(sizes.matrices()[name][0] * sizes.matrices()[name][1] for name in sparse)


def _index_bytes(sizes: Sizes, group: Layers, masked: bool) -> float:
    """Return the bytes of the positions of a block's nonzeros, and of the layouts that kernels make of them.

    The backend csr has the places of all nonzeros, rounded up to four in a row, in two bytes for the matrix and for its
    transpose, and an order of four bytes; masked has a copy of the positions.
    """
    total = 0.0
    for name, density in group.densities.items():
        if density < 1.0:
            rows, columns = sizes.matrices()[name]
            nnz = float(nonzeros(rows, columns, density))
            own = INDEX_BYTES * nnz + ROW_BYTES * (rows + 1.0)
            ends = 2.0 * 4.0 * rows * columns / _WIDTH
            layout = own if masked else 2.0 * (nnz + 1.5 * rows) + 6.0 * (nnz + 1.5 * columns) + ends + ROW_BYTES * rows
            total += own + layout
    return total
