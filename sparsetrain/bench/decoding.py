"""Decoding: products of few tokens whose weights come from memory, and whole generations, without gradients.

Each is timed in turns with a plain read of memory, which bounds it: a product of few tokens waits for the bytes of its
weights. Shapes: N tokens, K in_features, M out_features, B rows.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain import seeds
from sparsetrain.bench.config import PEERS, BenchConfig, DecodingSection
from sparsetrain.bench.contenders import DENSE, LayerCase, backend_layer, error_of
from sparsetrain.bench.gpt import dense_model, replaced, sparse_model
from sparsetrain.bench.peers import Skipped, first_line, peer_layer
from sparsetrain.bench.timing import Work, interleaved
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.sparsity import SparseLinear, SparsityPattern, prepared
from sparsetrain.sparsity.backends.auto import FEW_TOKENS
from sparsetrain.sparsity.backends.few_tokens import index_bytes

DENSE_BF16 = "dense_bf16"
GENERATING_PEERS = ("torch_csr", "sparselab")
"""Peers that stand in for the layers of a whole model."""

READ_BYTES = 1 << 28
"""Bytes of the plain read, more than the caches hold."""

_READ = "read"
_KNOWN = (DENSE, *FEW_TOKENS)  # those whose bytes are known; the others may read dense copies, or make them
_VALUE = 4  # bytes

Product = Callable[[Tensor], Any]


@dataclasses.dataclass
class Stack:
    """Layers of one implementation that take turns.

    Attributes:
        products: ``[N, K] -> [N, M]`` of each layer.
        x: the input of all layers.
        stored: weights of all layers.
        bytes: bytes that a pass over all layers has to read; None if unknown.
        note: what a reader must know to compare it.
    """

    products: list[Product]
    x: Tensor
    stored: int
    bytes: int | None
    note: str = ""

    def run(self) -> None:
        """Multiply by the weights of each layer."""
        for product in self.products:
            product(self.x)


def measure_products(names: Sequence[str], case: LayerCase, config: BenchConfig) -> dict[str, Any]:
    """Measure a pass over ``decoding.layers`` layers of a case's shape in each implementation.

    Returns:
        ``results`` and ``skipped`` as `sparsetrain.bench.cells.measure` describes them, with ``bytes``, and
        ``bandwidth``: the ``bytes`` of a plain read and its ``seconds`` in each round.
    """
    section, stacks, skipped = config.decoding, {}, {}
    with torch.no_grad(), ExitStack() as while_open:
        for name in names:
            try:
                stacks[name] = _stack(name, case, section.layers, while_open)
            except Skipped as reason:
                skipped[name] = str(reason)
        works = {name: stack.run for name, stack in stacks.items()}
        results, bandwidth = _timed(works, section.repeats, config.patience)
    for name, stack in stacks.items():
        results[name]["note"] = "; ".join(filter(None, [stack.note, results[name]["note"]]))
        results[name] |= {"stored_weights": stack.stored, "bytes": stack.bytes}
    return {"results": results, "skipped": skipped, "bandwidth": bandwidth}


def measure_generation(names: Sequence[str], rows: int, sparsity: float, config: BenchConfig) -> dict[str, Any]:
    """Measure how long a model of each implementation takes to continue ``rows`` prompts, greedily.

    Returns:
        As `measure_products`, and ``new_tokens``: tokens that each row gets.
    """
    section = config.decoding
    models: dict[str, Transformer] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            models[name] = _model(name, section.model_config(), sparsity, (config.block[0], config.block[1]))
        except Skipped as reason:
            skipped[name] = str(reason)
    generator = seeds.generator(config.seed, "bench", "prompt")
    tokens = torch.randint(section.vocab_size, (rows, section.prompt), generator=generator)
    works = {
        name: partial(model.generate, tokens, section.new_tokens, temperature=0.0) for name, model in models.items()
    }
    results, bandwidth = _timed(works, section.generations, config.patience)
    for name, model in models.items():
        results[name]["stored_weights"] = _stored(model)
        results[name]["bytes"] = bytes_of_generation(model, section, rows) if name in _KNOWN else None
    return {"results": results, "skipped": skipped, "bandwidth": bandwidth, "new_tokens": section.new_tokens}


def bytes_of_generation(model: Transformer, section: DecodingSection, rows: int) -> int:
    """Return the bytes that generation has to read: all weights and indices for each new token, keys and values.

    A new token reads the keys and values of all tokens before it. The pass over the prompt, which gives the first new
    token, reads the weights once and computes its keys.
    """
    config = model.config
    weights = sum(bytes_of(module, rows) for module in model.modules())  # of an embedding only a row is read
    a_token = 2 * _VALUE * config.n_layers * config.kv_heads * config.d_head
    cached = sum(range(section.prompt + 1, section.prompt + section.new_tokens))
    return section.new_tokens * weights + rows * cached * a_token


def bytes_of(module: nn.Module, tokens: int) -> int:
    """Return the bytes of weights and indices that a product of at most 48 tokens reads, 0 for another module."""
    if isinstance(module, nn.Linear):
        return _VALUE * module.weight.numel()
    if not isinstance(module, SparseLinear):
        return 0
    return _VALUE * module.pattern.nnz + index_bytes(module.pattern, tokens)


def _timed(
    calls: Mapping[str, Callable[[], Any]], repeats: int, patience: float
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the times of all calls, and those of a plain read of memory in the same rounds.

    Each runs once a round, and before it, outside of its time, more memory is read than the caches hold: no call finds
    its weights in a cache. A generation may find them there from its second token on.
    """
    memory = torch.ones(READ_BYTES // _VALUE)
    every: dict[str, Callable[[], Any]] = {**calls, _READ: memory.sum}
    works = {name: Work(call, before=memory.sum) for name, call in every.items()}
    times = interleaved(works, repeats, 0.0, patience, dict.fromkeys(calls, DENSE) | {_READ: _READ})
    bandwidth = {"bytes": READ_BYTES, "seconds": times.pop(_READ).forward}
    return {name: taken.plain() for name, taken in times.items()}, bandwidth


def _stack(name: str, case: LayerCase, count: int, while_open: ExitStack) -> Stack:
    x = case.draw(case.tokens, case.in_features, "input")
    cases = [dataclasses.replace(case, seed=case.seed + number) for number in range(count)]
    if name in (DENSE, DENSE_BF16):
        return _dense(cases, x, torch.float32 if name == DENSE else torch.bfloat16)
    if name in PEERS:
        return _peer(name, cases, x)
    made = [backend_layer(name, each) for each in cases]
    layers = nn.ModuleList(layer for layer, _ in made)
    while_open.enter_context(prepared(layers))
    for layer, _ in made:
        own = layer.pattern  # a separate one, since `scatter` caches positions
        _check(layer, x, SparsityPattern(own.shape, own.row_ptr, own.col, own.block).scatter(layer.values))
    stored = sum(layer.pattern.nnz for layer, _ in made)
    if name == "auto":
        return Stack(list(layers), x, stored, None, "as `st.prepared` chooses by the number of tokens")
    known = sum(bytes_of(layer, case.tokens) for layer in layers) if name in _KNOWN else None
    return Stack(list(layers), x, stored, known, ", ".join(made[0][1]))


def _dense(cases: Sequence[LayerCase], x: Tensor, dtype: torch.dtype) -> Stack:
    layers = [nn.Linear(each.in_features, each.out_features, bias=False, dtype=dtype) for each in cases]
    stored = sum(layer.weight.numel() for layer in layers)
    note = "" if dtype == torch.float32 else "weights and activations in bfloat16"
    return Stack(list(layers), x.to(dtype), stored, dtype.itemsize * stored, note)


def _peer(name: str, cases: Sequence[LayerCase], x: Tensor) -> Stack:
    products: list[Product] = []
    stored, index, note = 0, 0, ""
    for each in cases:
        pattern = each.pattern()
        layer = peer_layer(name, pattern, each.values(pattern))
        _check(layer.call, x, layer.dense)
        products.append(layer.call)
        stored, note = stored + pattern.nnz, layer.note
        index += layer.index_bytes or 0
    return Stack(products, x, stored, _VALUE * stored + index if index else None, note)


def _check(product: Product, x: Tensor, weight: Tensor | None) -> None:
    """Raise `Skipped` for a product that fails, or is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries say that they are in beta
        try:
            result = torch.as_tensor(product(x))
        except Exception as error:
            raise Skipped(f"forward fails: {first_line(error)}") from None
    if weight is not None and (reason := error_of(result, x, weight)):
        raise Skipped(reason)


def _model(name: str, config: ModelConfig, sparsity: float, block: tuple[int, int]) -> Transformer:
    if name == DENSE:
        return dense_model(config)
    if name in PEERS:
        return replaced(dense_model(config), sparsity, block, lambda linear, case: PeerLinear(name, linear, case))
    return sparse_model(config, sparsity, name, block)


def _stored(model: Transformer) -> int:
    """Return the number of trained weights; a layer of another library may hide them from ``parameters``."""
    peers = [module for module in model.modules() if isinstance(module, PeerLinear)]
    inside = {id(parameter) for peer in peers for parameter in peer.parameters()}
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return outside + sum(peer.stored for peer in peers)


class PeerLinear(nn.Module):
    """A layer of another library in place of ``linear``.

    Attributes:
        stored: its trained weights, without the bias.
    """

    def __init__(self, name: str, linear: nn.Linear, case: LayerCase) -> None:
        super().__init__()
        pattern = case.pattern()
        layer = peer_layer(name, pattern, case.values(pattern) * linear.weight.std())
        _check(layer.call, case.draw(case.tokens, case.in_features, "input"), None)
        self.call, self.bias, self.stored = layer.call, linear.bias, pattern.nnz

    def forward(self, x: Tensor) -> Tensor:
        y = torch.as_tensor(self.call(x.flatten(0, -2))).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias
