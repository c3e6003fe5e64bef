"""The backend ``triton`` inside layers, autograd and torch's own tools. Run by `test_triton_backend.py`.

To run one by hand: ``TRITON_INTERPRET=1 python -m pytest tests/sparsity/backends/triton_backend_cases.py -k NAME``,
on a GPU without the variable.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsetrain.errors import UserError
from sparsetrain.kernels import triton_bsr
from sparsetrain.sparsity import SparseLinear, SparsityPattern, sparse_linear
from sparsetrain.sparsity.backends.layouts import layout_id
from sparsetrain.sparsity.backends.triton import TritonBackend
from sparsetrain.sparsity.layers import ops

DEVICE = torch.device("cpu" if triton_bsr.INTERPRETED else "cuda")
# Larger than the rounding of one operation in the type, smaller than any mistake.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def pattern_of(block: tuple[int, int] = (16, 8), rows: int = 4, columns: int = 5, seed: int = 0) -> SparsityPattern:
    """Return random blocks; the second row of blocks has none."""
    tiles = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    tiles[0, 0], tiles[1] = True, False
    mask = tiles.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return SparsityPattern.from_mask(mask, block).to(DEVICE)


@pytest.fixture
def layer() -> SparseLinear:
    return layer_of(pattern_of())


def layer_of(pattern: SparsityPattern, **options: Any) -> SparseLinear:
    rows, columns = pattern.shape
    with pytest.warns(UserWarning, match="no weight"):
        return SparseLinear(columns, rows, pattern=pattern, seed=0, backend="triton", device=DEVICE, **options)


def step(layer: SparseLinear, x: Tensor, backend: str) -> list[Tensor]:
    """Return the output of ``layer`` and the gradients of the input, the values and the bias."""
    layer.backend = backend
    x = x.detach().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), (x, *layer.parameters()))]


@pytest.mark.parametrize("dtype", triton_bsr.DTYPES)
def test_a_layer_matches_the_masked_backend(dtype: torch.dtype) -> None:
    layer = layer_of(pattern_of(), dtype=dtype)
    x = torch.randn(3, 7, layer.in_features, device=DEVICE, dtype=dtype)
    for ours, theirs in zip(step(layer, x, "triton"), step(layer, x, "masked"), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 3), (0,), (2, 0)])
def test_any_leading_dimensions_match_the_masked_backend(leading: tuple[int, ...], layer: SparseLinear) -> None:
    x = torch.randn(*leading, layer.in_features, device=DEVICE)
    for ours, theirs in zip(step(layer, x, "triton"), step(layer, x, "masked"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_non_contiguous_inputs_and_values_match_the_masked_backend() -> None:
    pattern = pattern_of()
    x = torch.randn(pattern.shape[1], 6, device=DEVICE).t().requires_grad_()
    values = torch.randn(2 * pattern.nnz, device=DEVICE)[::2].requires_grad_()
    assert not values.is_contiguous()
    results = []
    for backend in ("triton", "masked"):
        y = sparse_linear(x, values, pattern, backend=backend)
        results.append((y, *torch.autograd.grad(y.t().cumsum(0).sum(), (x, values))))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_forward_and_backward(transposed: bool) -> None:
    pattern = pattern_of()
    rows, columns = pattern.shape
    x = torch.randn(columns, 5, device=DEVICE).t() if transposed else torch.randn(5, columns, device=DEVICE)
    values, g = torch.randn(pattern.nnz, device=DEVICE), torch.randn(5, rows, device=DEVICE)
    place = (
        pattern.row_ptr,
        pattern.col,
        list(pattern.shape),
        list(pattern.block),
        "triton",
        layout_id(pattern),
    )
    torch.library.opcheck(ops._sparse_linear, (x.requires_grad_(), values.requires_grad_(), *place, True))
    kept = torch.empty(0, device=DEVICE)
    for needs in ((True, True), (False, True), (True, False)):
        call = (g, x.detach(), values.detach(), kept, *place, *needs)
        torch.library.opcheck(ops._sparse_linear_backward, call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_type_as_the_masked_backend_does(dtype: torch.dtype, layer: SparseLinear) -> None:
    x = torch.randn(6, layer.in_features, device=DEVICE)
    results = []
    for backend in ("triton", "masked"):
        with torch.autocast(DEVICE.type, dtype):
            layer.backend = backend
            y = layer(x)
        assert y.dtype == dtype
        results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), layer.parameters())))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


def test_compiled_without_graph_breaks_equals_eager() -> None:
    # `aot_eager` traces forward and backward through the shape functions but calls no C++ compiler.
    torch.compiler.reset()
    first, second = pattern_of(), pattern_of((8, 16), 3, 4)
    model = nn.Sequential(layer_of(first), nn.GELU(), layer_of(second))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, first.shape[1], device=DEVICE)

    def assert_equal() -> None:
        results = []
        for run in (model, compiled):
            y = run(x)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))))
        torch.testing.assert_close(*results, rtol=0, atol=0)

    assert_equal()
    # A new topology behind the compiled graph's back.
    layer = model[0]
    assert isinstance(layer, SparseLinear)
    changed = pattern_of(seed=5)
    layer.set_topology(changed, torch.randn(changed.nnz, device=DEVICE))
    assert_equal()
    torch.compiler.reset()


def test_gradient_checkpointing_matches_plain_backward(layer: SparseLinear) -> None:
    x = torch.randn(4, layer.in_features, device=DEVICE, requires_grad=True)
    wanted = (x, *layer.parameters())
    plain = torch.autograd.grad(layer(x).square().sum(), wanted)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), wanted)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_training_steps_are_bitwise_repeatable_and_match_the_masked_backend() -> None:
    trained = []
    for backend in ("triton", "triton", "masked"):
        layer = layer_of(pattern_of())
        layer.backend = backend
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        draws = torch.Generator().manual_seed(0)
        for _ in range(3):
            x = torch.randn(9, layer.in_features, generator=draws).to(DEVICE)
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(layer.values.detach())
    assert torch.equal(trained[0], trained[1])
    torch.testing.assert_close(trained[0], trained[2], rtol=1e-4, atol=1e-5)


def test_the_layout_is_built_once_a_pattern(monkeypatch: pytest.MonkeyPatch, layer: SparseLinear) -> None:
    built = []
    build = triton_bsr.layout

    def count(*args: Any) -> Any:
        built.append(args)
        return build(*args)

    monkeypatch.setattr(triton_bsr, "layout", count)
    for _ in range(2):
        step(layer, torch.randn(3, layer.in_features, device=DEVICE), "triton")
    assert len(built) == 1
    layer.set_topology(pattern_of(seed=3), torch.randn(pattern_of(seed=3).nnz, device=DEVICE))
    step(layer, torch.randn(3, layer.in_features, device=DEVICE), "triton")
    assert len(built) == 2


@pytest.mark.parametrize(("block", "refused"), [((1, 1), True), ((3, 8), True), ((8, 65), True), ((4, 64), False)])
def test_blocks_outside_4_to_64_are_refused_in_one_line(block: tuple[int, int], refused: bool) -> None:
    pattern = pattern_of(block, 2, 2)
    x, values = torch.randn(3, pattern.shape[1], device=DEVICE), torch.randn(pattern.nnz, device=DEVICE)
    if not refused:
        sparse_linear(x, values, pattern, backend="triton")
        return
    message = f"backend 'triton' computes block patterns; blocks of {block[0]}x{block[1]} have a side outside 4 to 64"
    message += "; backend='auto' takes another"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        sparse_linear(x, values, pattern, backend="triton")


def test_types_and_shapes_that_do_not_fit_are_refused_in_one_line() -> None:
    backend, pattern = TritonBackend(), pattern_of()
    rows, columns = pattern.shape
    x, g, values = (torch.randn(*shape, device=DEVICE) for shape in ((3, columns), (3, rows), (pattern.nnz,)))
    for call, message in (
        (lambda: backend.matmul(x.double(), values, pattern), r"not torch.float64 \(x\)"),
        (lambda: backend.matmul(x, values.half(), pattern), "x has dtype torch.float32 and values has dtype"),
        (
            lambda: backend.matmul(x[:, 1:], values, pattern),
            rf"x has shape \(3, {columns - 1}\); \(tokens, {columns}\)",
        ),
        (lambda: backend.matmul(x[0], values, pattern), rf"x has shape \({columns},\)"),
        (lambda: backend.matmul_t(g[:, 1:], values, pattern), rf"g has shape \(3, {rows - 1}\)"),
        (lambda: backend.matmul_t(g, values[1:], pattern), rf"values has shape .* \({pattern.nnz},\) is needed"),
        (lambda: backend.sampled(g[1:], x, pattern), "g has 2 rows and x has 3"),
        (lambda: backend.sampled(g.half(), x, pattern), "one type is needed"),
        (lambda: backend.matmul(x.to("meta"), values, pattern), "x is on meta, the pattern on "),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert str(caught.value).startswith("backend 'triton'")
        assert "\n" not in str(caught.value)
