"""Memory of a training step by component, and its peak: what the allocator holds when it holds most.

A step is forward and backward pass in float32 on a CPU, and a fused AdamW step. Weights, moments and the positions of
nonzeros stay between steps. Activations grow until the loss is known, and then turn into gradients, block by block; so
the peak lies at one of a few moments, whose sums are compared. Numbers are bytes here and values in the functions.

The legend is that of `sparsetrain.cost.operations`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
    shape = shape_of_config(model, density) if isinstance(model, ModelConfig) else None
    if isinstance(model, nn.Module):
        shape = shape_of_model(model)
    if shape is None:
        raise UserError(f"model is a {type(model).__name__}, neither a ModelConfig nor a Transformer as it was built")
    tokens = context + shape.prompt_tokens
    if backend is None:
        backend = backend_of(model, tokens * batch) if isinstance(model, nn.Module) else "csr"
    masked, threads = backend == "masked", threads or torch.get_num_threads()
    return memory_of(shape, float(tokens), float(batch), masked, float(threads))


def backend_of(model: nn.Module, tokens: int) -> str:
    """Return the backend of the first sparse layer of a model."""
    layer = next((module for module in model.modules() if isinstance(module, SparseLinear)), None)
    return "csr" if layer is None else resolve_backend(layer.backend, layer.pattern, tokens)


def memory_of(shape: Shape, context: float, batch: float, masked: bool, threads: float) -> StepMemory:
    """Return the memory of a step of a model's shape; see `step_memory`."""
    found = bytes_of(
        Sizes.of(shape.config),
        shape.layers,
        context,
        batch,
        masked,
        threads,
        reached=_reached(shape),
        frozen=shape.frozen,
        prompt_tokens=shape.prompt_tokens,
    )
    return StepMemory(**{name: round(float(value)) for name, value in found.items()})


def bytes_of(
    sizes: Any,
    blocks_by_density: Sequence[Layers],
    context: Number,
    batch: Number,
    masked: bool,
    threads: float,
    *,
    reached: Sequence[Layers] | None = None,
    frozen: Collection[str] = (),
    prompt_tokens: float = 0.0,
) -> dict[str, Number]:
    """Return the fields of `StepMemory`, not rounded; sizes and densities may be arrays, all but the vocabulary.

    Args:
        sizes: the model. blocks_by_density: its blocks. context: T. batch: B.
        masked: whether the sparse layers have the backend ``masked`` instead of ``csr``. threads: of the kernels.
        reached: the blocks that the backward pass reaches; None is all.
        frozen: names of parameters outside of the blocks without a gradient.
        prompt_tokens: learned vectors of a soft prompt, among the T tokens.
    """
    layers, tokens = blocks_by_density if reached is None else reached, context * batch
    stream, vocabulary = tokens * sizes.width, sizes.vocabulary * sizes.width
    head, table = (0.0 if name in frozen else vocabulary for name in ("embed" if sizes.tied else "head", "embed"))
    norm = norm_values(sizes, tokens)
    saved = [block_values(sizes, tokens, group.frozen, _kept(sizes, group, masked)) for group in layers]
    outer = outer_values(sizes, context, tokens, bool(np.any(head > 0.0)))
    gradients = trained_weights(sizes, blocks_by_density, frozen) + prompt_tokens * sizes.width
    blocks = sum(group.count * values for group, values in zip(layers, saved, strict=True))

    # The logits of a chunk are made while those of the one before are still held.
    logits = np.minimum(tokens, 2.0 * chunk_tokens(int(sizes.vocabulary))) * sizes.vocabulary
    # The result of the final norm lives until the loss is known.
    moments = [blocks + outer + stream + logits, blocks + outer + stream + head]
    held = blocks + outer - norm  # new gradients have taken the place of the gradients that the loss has saved
    moments.append(held + stream + norm)
    for group, values in zip(reversed(layers), reversed(saved), strict=True):
        now: Number = 0.0
        most: Number = -np.inf
        for taken, freed in _backward(sizes, group, context, batch, masked, threads):
            most = np.maximum(most, now + taken)
            now = now + taken - freed
        net = block_weights(sizes, group.densities, group.frozen) - values
        moments += [held + most, held + (group.count - 1.0) * net + most]
        held = held + group.count * net
    # The gradient of the embedding, and its sum with that of a tied head.
    places = 0.0 if "positions" in frozen else sizes.positions * sizes.width
    moments.append(held + (2.0 if sizes.tied else 1.0) * table + places)
    moments.append(gradients)

    weights = trained_weights(sizes, [Layers(group.count, group.densities) for group in blocks_by_density])
    weights = weights + prompt_tokens * sizes.width
    indices = sum(group.count * _index_bytes(sizes, group, masked) for group in blocks_by_density)
    resident = FLOAT * (weights + _MOMENTS * gradients) + indices
    highest: Number = functools.reduce(np.maximum, moments)
    activations = FLOAT * (blocks + outer)
    return {
        "parameters": FLOAT * weights,
        "indices": indices,
        "gradients": FLOAT * gradients,
        "moments": FLOAT * _MOMENTS * gradients,
        "activations": activations,
        "workspace": np.maximum(0.0, FLOAT * highest - activations),
        "peak": resident + FLOAT * highest,
    }


def _reached(shape: Shape) -> list[Layers]:
    """Return the blocks that the backward pass reaches: those below every trained parameter save nothing."""
    if "embed" not in shape.frozen or shape.prompt_tokens:
        return shape.layers
    names = {"attn_norm", "mlp_norm", *Sizes.of(shape.config).matrices()}
    first = next((index for index, group in enumerate(shape.layers) if names - set(group.frozen)), len(shape.layers))
    return shape.layers[first:]


def _backward(
    sizes: Any, group: Layers, context: Number, batch: Number, masked: bool, threads: float
) -> list[tuple[Number, Number]]:
    """Return what each operation of a block's backward pass takes and then frees.

    The gradient of the block's result is held before, and that of its input afterwards.
    """
    tokens = context * batch
    stream, inner, qkv = tokens * sizes.width, tokens * sizes.ffn, tokens * (sizes.width + 2.0 * sizes.kv_width)
    norm, logs = norm_values(sizes, tokens), tokens * sizes.heads
    dropped = stream if sizes.dropout else 0.0

    def product(name: str, gradient: Number, input_: Number, output: Number) -> tuple[Number, Number]:
        """Take the gradients of input and weights; free the input and the gradient of the result."""
        rows, columns = sizes.matrices()[name]
        density = group.densities.get(name, 1.0)
        nnz, sparse = nonzeros(rows, columns, density), np.asarray(density) < 1.0
        work = rows * columns if masked else threads * (nnz + 2.0 * (rows + columns) * _TILE) + nnz
        work = np.where(sparse, work, 0.0)
        kept = np.where(sparse, rows * columns, 0.0) if masked else 0.0
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
    return steps


def _kept(sizes: Any, group: Layers, masked: bool) -> Number:
    """Return the values of the dense matrices that the backend ``masked`` keeps for the backward pass."""
    total: Number = 0.0
    for name, density in group.densities.items():
        rows, columns = sizes.matrices()[name]
        total = total + np.where(np.asarray(density) < 1.0, rows * columns, 0.0) * masked
    return total


def _index_bytes(sizes: Any, group: Layers, masked: bool) -> Number:
    """Return the bytes of the positions of a block's nonzeros, and of the layouts that kernels make of them.

    The backend csr has the places of all nonzeros, rounded up to four in a row, in two bytes for the matrix and for its
    transpose, and an order of four bytes; masked has a copy of the positions.
    """
    total: Number = 0.0
    for name, density in group.densities.items():
        rows, columns = sizes.matrices()[name]
        nnz = nonzeros(rows, columns, density)
        own = INDEX_BYTES * nnz + ROW_BYTES * (rows + 1.0)
        ends = 2.0 * 4.0 * rows * columns / _WIDTH
        layout = own if masked else 2.0 * (nnz + 1.5 * rows) + 6.0 * (nnz + 1.5 * columns) + ends + ROW_BYTES * rows
        total = total + np.where(np.asarray(density) < 1.0, own + layout, 0.0)
    return total
