"""SparseLinear as a module: built, to and from dense, given another topology, inside other people's code."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from layers import K, M, layer
from torch import nn

from sparsetrain.errors import UserError
from sparsetrain.sparsity import SparseLinear, SparsityPattern, sparsify

EYE = SparsityPattern.from_mask(torch.eye(4, dtype=torch.bool))


# -- construction ----------------------------------------------------------------------------------------------------


@given(density=st.floats(0.02, 1.0), seed=st.integers(0, 2**31))
@pytest.mark.filterwarnings("ignore:.* have no weight")
def test_number_of_values_is_exact(density: float, seed: int) -> None:
    made = layer(density, seed)
    assert made.values.shape == (round(density * K * M),)
    assert made.pattern.nnz == int(made.pattern.mask().sum()) == made.values.numel()
    assert set(dict(made.named_parameters())) == {"values", "bias"}


def test_values_are_drawn_as_linear_does_for_the_live_fan_in() -> None:
    made = SparseLinear(256, 256, density=0.25, seed=0)
    bound = 1.0 / math.sqrt(0.25 * 256)
    for tensor in (made.values, made.bias):
        assert tensor is not None
        assert float(tensor.detach().abs().max()) <= bound
    # The standard deviation of a uniform distribution, to 4 standard errors of 16384 draws.
    assert float(made.values.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_a_seed_gives_one_layer_and_no_seed_follows_the_global_generator() -> None:
    first, second = layer().state_dict(), layer().state_dict()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert not layer(seed=1).pattern.equals(layer(seed=2).pattern)
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made += [SparseLinear(K, M, density=0.5), SparseLinear(K, M, density=0.5)]
    assert torch.equal(made[0].values, made[2].values)
    assert made[1].pattern.equals(made[3].pattern)
    assert not made[0].pattern.equals(made[1].pattern)


def test_a_seed_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    layer().to_linear()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseLinear(4, 4), "exactly one of density and pattern"),
        (lambda: SparseLinear(4, 4, density=0.5, pattern=EYE), "exactly one of density and pattern"),
        (lambda: SparseLinear(4, 3, pattern=EYE), r"pattern has shape \(4, 4\); the layer needs \(3, 4\)"),
        (lambda: SparseLinear(4, 4, density=1.5), r"density=1.5 must lie in \(0, 1\]"),
        (lambda: SparseLinear(4, 4, density=0.01), "density=0.01 leaves no weight at all in a 4x4 matrix"),
        (lambda: SparseLinear(0, 4, density=0.5), "leaves no weight at all in a 4x0 matrix"),
        (
            lambda: SparseLinear(2, 2, pattern=SparsityPattern.from_mask(torch.zeros(2, 2, dtype=torch.bool))),
            r"SparseLinear\(2, 2\) would have no weight at all",
        ),
        (lambda: SparseLinear(4, 4, density=0.5, backend="mask"), "backend='mask' is not one of .*'masked'"),
        (lambda: SparseLinear(4, 4, density=0.5, device="meta"), "cannot be built on the meta device"),
    ],
)
def test_what_cannot_be_built_is_named(make: Callable[[], SparseLinear], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_the_default_device_is_that_of_linear() -> None:
    with torch.device("meta"), pytest.raises(UserError, match="meta device"):
        layer()


def test_empty_rows_warn_and_count() -> None:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0] = True
    with pytest.warns(UserWarning, match=r"3 of 4 outputs of a SparseLinear\(4, 4\) have no weight"):
        made = SparseLinear(4, 4, pattern=SparsityPattern.from_mask(mask), bias=False)
    assert torch.equal(made(torch.randn(2, 4))[:, 1:], torch.zeros(2, 3))


# -- to and from dense -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_from_linear_and_to_linear_are_exact(bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    linear = nn.Linear(K, M, bias=bias, dtype=dtype, device=device).eval()
    linear.weight.requires_grad_(False)
    mask = torch.rand(M, K) < 0.5
    sparse = SparseLinear.from_linear(linear, SparsityPattern.from_mask(mask))
    assert torch.equal(sparse.dense_weight(), linear.weight * mask.to(device))
    back = sparse.to_linear()
    assert torch.equal(back.weight, linear.weight * mask.to(device))
    assert bias == (back.bias is not None) == (sparse.bias is not None)
    if bias:
        assert torch.equal(back.bias, linear.bias)
        assert sparse.bias is not None
        assert sparse.bias.requires_grad
    for made in (sparse, back):
        assert not made.training
        assert next(made.parameters()).dtype == dtype
        assert next(made.parameters()).device == linear.weight.device
        assert not next(made.parameters()).requires_grad


def test_densified_weights_are_zero_where_the_mask_was_and_train_from_there() -> None:
    sparse = layer(0.25)
    dense = sparse.to_linear()
    outside = ~sparse.pattern.mask()
    assert torch.count_nonzero(dense.weight[outside]) == 0
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-3)
    dense(torch.randn(8, K)).square().sum().backward()
    optimizer.step()
    assert torch.count_nonzero(dense.weight[outside]) == int(outside.sum())


def test_training_a_sparse_layer_equals_training_under_a_mask() -> None:
    sparse = layer(0.4)
    mask = sparse.pattern.mask()
    dense = sparse.to_linear()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1) for m in (sparse, dense)]
    for _ in range(5):
        x = torch.randn(8, K)
        for model, optimizer in zip((sparse, dense), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if isinstance(model, nn.Linear):
                model.weight.grad *= mask
            optimizer.step()
    torch.testing.assert_close(sparse.dense_weight(), dense.weight)
    torch.testing.assert_close(sparse.bias, dense.bias)


# -- changing the topology -------------------------------------------------------------------------------------------


def test_set_topology_keeps_the_parameter_and_copies_what_it_is_given() -> None:
    made = layer(0.4)
    parameter, pattern = made.values, layer(0.7, seed=6).pattern
    values = torch.randn(pattern.nnz)
    made(torch.randn(2, K)).sum().backward()
    made.set_topology(pattern, values)
    assert made.values is parameter
    assert parameter.grad is None
    assert parameter.is_leaf
    assert parameter.requires_grad
    assert torch.equal(made.dense_weight(), pattern.scatter(values))
    expected = values.clone()
    with torch.no_grad():
        made.values.zero_()
    assert torch.equal(values, expected)
    assert "density=0.6979" in repr(made)


@pytest.mark.parametrize(
    ("pattern", "size", "message"),
    [(EYE, 4, r"pattern has shape \(4, 4\); the layer needs"), (layer().pattern, 3, r"values have shape \(3,\)")],
)
def test_a_topology_that_does_not_fit_is_named(pattern: SparsityPattern, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layer().set_topology(pattern, torch.zeros(size))


# -- other people's code ---------------------------------------------------------------------------------------------


def test_the_ndim_rule_of_weight_decay_misses_the_values() -> None:
    # The note in the docstring: such code decays the dense weight and not the sparse one.
    def decayed(model: nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    assert decayed(layer().to_linear()) == ["weight"]
    assert decayed(layer()) == []
    assert "weight decay" in (SparseLinear.__doc__ or "")


def test_weight_works_inside_multihead_attention() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    nn.init.normal_(attention.out_proj.bias)
    reference = copy.deepcopy(attention)
    sparsify(attention, 0.5, include=["out_proj"], seed=0)
    sparse = attention.out_proj
    assert isinstance(sparse, SparseLinear)
    with torch.no_grad():
        reference.out_proj.weight.mul_(sparse.pattern.mask())
    x = torch.randn(2, 5, 8)
    ours, theirs = attention(x, x, x)[0], reference(x, x, x)[0]
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert reference.out_proj.weight.grad is not None
    torch.testing.assert_close(sparse.values.grad, sparse.pattern.gather(reference.out_proj.weight.grad))


@pytest.mark.parametrize("training", [True, False])
def test_weight_works_inside_the_encoder_layer_and_its_fast_path(training: bool) -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    reference = copy.deepcopy(encoder)
    sparsify(encoder, 0.5, include=["linear*", "*.out_proj"], seed=0)
    with torch.no_grad():
        for name in ("linear1", "linear2", "self_attn.out_proj"):
            sparse = encoder.get_submodule(name)
            assert isinstance(sparse, SparseLinear)
            dense = reference.get_submodule(name)
            assert isinstance(dense, nn.Linear)
            dense.weight.mul_(sparse.pattern.mask())
        x = torch.randn(2, 5, 8)
        torch.testing.assert_close(encoder(x), reference(x))


def test_weight_is_read_only() -> None:
    made = layer()
    with torch.no_grad():
        made.weight.zero_()
    assert torch.count_nonzero(made.values) == made.values.numel()
    with pytest.raises(KeyError, match="attribute 'weight' already exists"):
        made.weight = nn.Parameter(torch.zeros(M, K))  # type: ignore[misc]


def test_functional_call_sees_the_values_it_is_given() -> None:
    made = layer()
    x, values = torch.randn(2, K), torch.randn_like(made.values)
    ours = torch.func.functional_call(made, {"values": values}, (x,))
    torch.testing.assert_close(ours, F.linear(x, made.pattern.scatter(values), made.bias))
