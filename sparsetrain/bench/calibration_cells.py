"""What a calibration times: single operations as a training step executes them, each with its entry in the ledger.

Legend: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain import seeds
from sparsetrain.bench.contenders import LayerCase, contender
from sparsetrain.bench.timing import Work
from sparsetrain.cost import operations as ops
from sparsetrain.cost.operations import BACKWARD, FORWARD, UPDATE, Layers, Operation, Sizes, step_operations
from sparsetrain.models.cpu_attention import fused_attention
from sparsetrain.models.cross_entropy import cross_entropy
from sparsetrain.models.norm import LayerNorm
from sparsetrain.models.positions import rope_frequencies, rope_tables, rotate

WIDTHS, TOKENS, DENSITIES = (64, 128, 256, 512, 1024), (128, 512, 2048), (0.5, 0.25, 0.1, 0.04)
CONTEXTS, HEAD_WIDTHS = (32, 128, 512, 1024), (16, 32, 64, 128)
ELEMENTS = (1 << 13, 1 << 16, 1 << 19, 1 << 22)
VOCABULARIES, HEAD_INPUTS = (256, 2048, 8192), (64, 256, 768)
PARAMETERS = (1 << 14, 1 << 17, 1 << 20, 1 << 23)
_SQUARE = (ops.LINEAR, ops.BIAS)
_FEATURES = 256  # of a token where only the number of elements counts


@dataclass(frozen=True)
class Cell:
    """One operation at one size.

    Args:
        operations: its entries in the ledger by phase.
        implementation: ``dense`` or a backend.
        make: prepares the inputs and returns the work to be timed.
    """

    operations: dict[str, Operation]
    implementation: str
    make: Callable[[], Work]


def cells(implementations: tuple[str, ...]) -> Iterator[list[Cell]]:
    """Yield groups of cells whose contenders are to take turns.

    Args:
        implementations: backends of sparse layers to time beside dense.
    """
    for width in WIDTHS:
        for tokens in TOKENS:
            yield [_linear("dense", width, tokens, 1.0)] + [
                _linear(name, width, tokens, density) for name in implementations for density in DENSITIES
            ]
    for d_head in HEAD_WIDTHS:
        yield [_attention(context, d_head) for context in CONTEXTS]
    for elements in ELEMENTS:
        tokens = elements // _FEATURES
        yield [
            _norm(tokens),
            _add(tokens),
            _bias(tokens),
            _gelu(tokens),
            _swiglu(tokens),
            _rotary(tokens),
            _embedding(tokens),
        ]
    for features in HEAD_INPUTS:
        yield [_head(vocabulary, features, tokens) for vocabulary in VOCABULARIES for tokens in (256, 1024)]
    yield [_optimizer(parameters) for parameters in PARAMETERS]


def _sizes(width: int, **changes: float | bool) -> Sizes:
    base = {"layers": 1.0, "heads": 1.0, "kv_width": float(width), "ffn": float(width), "vocabulary": 1.0}
    return Sizes(**{"width": float(width), **base, **changes})  # type: ignore[arg-type]


def _entries(
    sizes: Sizes, kind: str, tokens: int, context: int | None = None, density: float = 1.0
) -> dict[str, Operation]:
    """Return the ledger's first entries of a kind, by phase."""
    length = tokens if context is None else context
    groups = [Layers(1.0, {"attn.out": density})]
    found: dict[str, Operation] = {}
    for operation in step_operations(sizes, float(length), tokens / length, groups):
        # Of the matrices of a block, the square one, which has the density of the cell.
        if kind in (operation.kind, operation.curve) and (kind not in _SQUARE or operation.module.endswith("attn.out")):
            found.setdefault(operation.phase, operation)
    return found


def _linear(name: str, width: int, tokens: int, density: float) -> Cell:
    case = LayerCase(width, width, tokens, 1.0 - density, (8, 8), 0)
    entries = _entries(_sizes(width), ops.LINEAR, tokens, density=density)
    return Cell(entries, name, lambda: contender(name, case).work)


def _attention(context: int, d_head: int) -> Cell:
    heads, tokens = max(1, 256 // d_head), max(2048, context)
    sizes = _sizes(heads * d_head, heads=float(heads))
    entries = _entries(sizes, ops.ATTENTION, tokens, context)

    def make() -> Work:
        qkv = _draw(tokens // context, context, 3 * heads, d_head).requires_grad_()
        slopes = torch.zeros(heads)
        g = _draw(tokens // context, context, heads * d_head)
        return _step(lambda: fused_attention(qkv, slopes, heads, d_head**-0.5), g, [qkv])

    return Cell(entries, "dense", make)


def _norm(tokens: int) -> Cell:
    norm = LayerNorm(_FEATURES)
    return _pass(ops.NORM, tokens, norm, list(norm.parameters()))


def _add(tokens: int) -> Cell:
    def make() -> Work:
        x, branch = _draw(tokens, _FEATURES).requires_grad_(), _draw(tokens, _FEATURES).requires_grad_()
        first, second = _draw(tokens, _FEATURES), _draw(tokens, _FEATURES)

        # Backward, autograd adds the gradients of the residual stream and of the branch's input.
        def backward(y: Tensor) -> None:
            torch.add(first, second)

        return Work(lambda: torch.add(x, branch, alpha=1.0), backward)

    return Cell(_entries(_sizes(_FEATURES), ops.ADD, tokens), "dense", make)


def _bias(tokens: int) -> Cell:
    def make() -> Work:
        bias = _draw(_FEATURES).requires_grad_()
        product = _draw(1, tokens, _FEATURES).requires_grad_()
        return _step(lambda: product + bias, _draw(1, tokens, _FEATURES), [product, bias])

    sizes = _sizes(_FEATURES, biased=True)
    return Cell(_entries(sizes, ops.BIAS, tokens, density=0.5), "dense", make)


def _gelu(tokens: int) -> Cell:
    return _pass(ops.GELU, tokens, F.gelu, [])


def _swiglu(tokens: int) -> Cell:
    def make() -> Work:
        gate, up = _draw(tokens, _FEATURES).requires_grad_(), _draw(tokens, _FEATURES).requires_grad_()
        return _step(lambda: F.silu(gate) * up, _draw(tokens, _FEATURES), [gate, up])

    return Cell(_entries(_sizes(_FEATURES, gated=True), ops.SWIGLU, tokens), "dense", make)


def _rotary(tokens: int) -> Cell:
    # Rotation turns queries and keys, and copies them together with the values.
    d_head, heads = 32, _FEATURES // 32

    def make() -> Work:
        qkv = _draw(1, tokens, 3 * heads, d_head).requires_grad_()
        tables = rope_tables(0, tokens, rope_frequencies(d_head, 1e4, "linear", 1.0, tokens)[0], qkv.device)

        def forward() -> Tensor:
            turned, v = qkv.split((2 * heads, heads), dim=2)
            return torch.cat((rotate(turned, *tables), v), dim=2)

        return _step(forward, _draw(1, tokens, 3 * heads, d_head), [qkv])

    sizes = _sizes(_FEATURES, rotated=True, heads=float(heads))
    return Cell(_entries(sizes, ops.ROTARY, tokens), "dense", make)


def _embedding(tokens: int) -> Cell:
    vocabulary = 1024

    def make() -> Work:
        weight = _draw(vocabulary, _FEATURES).requires_grad_()
        ids = torch.randint(vocabulary, (1, tokens), generator=seeds.generator(0, "calibration", "ids"))
        return _step(lambda: F.embedding(ids, weight), _draw(1, tokens, _FEATURES), [weight])

    sizes = _sizes(_FEATURES, vocabulary=float(vocabulary), tied=False)
    return Cell(_entries(sizes, ops.EMBEDDING, tokens), "dense", make)


def _head(vocabulary: int, features: int, tokens: int) -> Cell:
    def make() -> Work:
        hidden = _draw(tokens, features).requires_grad_()
        # Logits of a model: with larger ones most probabilities would be denormal numbers, which are slow.
        weight = (_draw(vocabulary, features) * features**-0.5).requires_grad_()
        targets = torch.randint(vocabulary, (tokens,), generator=seeds.generator(0, "calibration", "targets"))

        def backward(loss: Tensor) -> None:
            loss.backward()
            hidden.grad = weight.grad = None

        return Work(lambda: cross_entropy(hidden, weight, targets), backward)

    return Cell(_entries(_sizes(features, vocabulary=float(vocabulary)), ops.HEAD, tokens), "dense", make)


def _optimizer(parameters: int) -> Cell:
    # As many tensors as a small model has, so that the time of each call is shared as in a step.
    sizes = _sizes(1, vocabulary=float(parameters))

    def make() -> Work:
        weights = [nn.Parameter(_draw(parameters // 16)) for _ in range(16)]
        for weight in weights:
            weight.grad = torch.full_like(weight, 1e-3)
        optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
        return Work(lambda: optimizer.step())

    return Cell(_entries(sizes, ops.OPTIMIZER, 1), "dense", make)


def _pass(kind: str, tokens: int, call: Callable[[Tensor], Tensor], weights: list[nn.Parameter]) -> Cell:
    def make() -> Work:
        x = _draw(1, tokens, _FEATURES).requires_grad_()
        return _step(lambda: call(x), _draw(1, tokens, _FEATURES), [x, *weights])

    return Cell(_entries(_sizes(_FEATURES), kind, tokens), "dense", make)


def _step(forward: Callable[[], Tensor], g: Tensor, leaves: list[Tensor] | list[nn.Parameter]) -> Work:
    def backward(y: Tensor) -> None:
        y.backward(g)
        for leaf in leaves:
            leaf.grad = None

    return Work(forward, backward)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeds.generator(0, "calibration", "values", *shape))


PHASES = (FORWARD, BACKWARD, UPDATE)
