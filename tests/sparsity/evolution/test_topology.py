"""One change of a mask: sources, survivors and moments against a dense scatter; every torch optimizer."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsetrain import seeds
from sparsetrain.errors import UserError
from sparsetrain.sparsity import SET, SparseLinear, SparsityPattern, TopologyUpdate, apply_update
from sparsetrain.sparsity.evolution.exchange import (
    draw_grown,
    exchange_counts,
    select_grown,
    select_kept,
    stored_scores,
)
from sparsetrain.sparsity.evolution.topology import (
    _ELEMENTWISE,
    active_units,
    check_optimizer,
    register_elementwise_optimizer,
)
from sparsetrain.sparsity.patterns.draw import block_pattern, random_pattern
from sparsetrain.sparsity.patterns.select import bands

RULE = SET()


def patterns(seed: int, block: tuple[int, int], densities: tuple[float, float]) -> list[SparsityPattern]:
    shape = (6 * block[0], 5 * block[1])
    make = random_pattern if block == (1, 1) else lambda *given: block_pattern(*given, block=block)
    return [make(shape, density, seeds.generator(seed, index)) for index, density in enumerate(densities)]


@given(
    seed=st.integers(0, 2**40),
    block=st.sampled_from([(1, 1), (2, 3)]),
    densities=st.tuples(st.floats(0.1, 1.0), st.floats(0.1, 1.0)),
)
def test_carrying_values_matches_scatter_mask_gather(
    seed: int, block: tuple[int, int], densities: tuple[float, float]
) -> None:
    old, new = patterns(seed, block, densities)
    update = TopologyUpdate.between(old, new)
    values = torch.randn(old.nnz, generator=seeds.generator(seed), dtype=torch.float64)
    expected = new.gather(old.scatter(values))  # zero where the old pattern has nothing
    assert torch.equal(update.carry(values), expected)
    assert torch.equal(update.grown, new.gather(~old.mask()))
    assert torch.equal(values[update.source[~update.grown]], expected[~update.grown])


def test_survivors_keep_their_bits_even_those_of_nan_and_minus_zero() -> None:
    old = SparsityPattern.from_mask(torch.tensor([[True, True, True, False]]))
    new = SparsityPattern.from_mask(torch.tensor([[True, True, False, True]]))
    values = torch.tensor([-0.0, torch.nan, 1.0])
    carried = TopologyUpdate.between(old, new).carry(values)
    assert torch.equal(carried[:2].view(torch.int32), values[:2].view(torch.int32))
    assert carried[2].view(torch.int32) == 0


def test_patterns_of_another_shape_are_refused() -> None:
    one = SparsityPattern.from_mask(torch.ones(2, 2, dtype=torch.bool))
    other = SparsityPattern.from_mask(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(UserError, match="differ in shape or block"):
        TopologyUpdate.between(one, other)


# Who goes and who comes.


def in_grid(pattern: SparsityPattern, kept: Tensor) -> Tensor:
    """Return bool [U, V] of a choice among stored units."""
    grid = active_units(pattern)
    return grid.masked_scatter(grid, kept)


def keep(magnitudes: Tensor, counts: Any, protect_rows: bool = False) -> Tensor:
    """Return what is kept of a matrix of magnitudes, -1 where nothing is stored, as bool [U, V]."""
    pattern = SparsityPattern.from_mask(magnitudes >= 0)
    return in_grid(pattern, select_kept(pattern.gather(magnitudes), pattern, counts, SET(protect_rows=protect_rows)))


def test_kept_and_grown_match_an_exhaustive_search_with_ties() -> None:
    active = torch.tensor([[True, True, False], [True, False, True]])
    pattern = SparsityPattern.from_mask(active)
    magnitudes = torch.tensor([[2.0, 1.0, -1.0], [1.0, -1.0, 3.0]])
    counts = exchange_counts(pattern, 4, bands((2, 3), (1, 1)), 0.5)
    assert [(kept, grown) for _, kept, grown in counts] == [(2, 2)]
    kept = keep(magnitudes, counts)
    # Of 1, 1, 2, 3 the ones go.
    assert kept.tolist() == [[True, False, False], [False, False, True]]
    counts = exchange_counts(pattern, 4, bands((2, 3), (1, 1)), 0.25)
    # Only one of the two equal ones goes: the first in row-major order.
    assert keep(magnitudes, counts).tolist() == [[True, False, False], [True, False, True]]
    gradient = torch.tensor([[9.0, -9.0, -0.5], [9.0, 0.5, 9.0]])
    # Only empty positions grow; of two equal scores the first.
    assert select_grown(gradient, pattern, counts, RULE).tolist() == [2]


def test_a_grown_zero_is_weak_but_never_confused_with_an_empty_position() -> None:
    active = torch.tensor([[True, True, False, False]])
    magnitudes = torch.tensor([[0.0, 1.0, -1.0, -1.0]])
    counts = exchange_counts(SparsityPattern.from_mask(active), 2, bands((1, 4), (1, 1)), 0.0)
    assert torch.equal(keep(magnitudes, counts), active)


def test_a_protected_row_keeps_its_largest_weight() -> None:
    magnitudes = torch.tensor([[0.1, 0.2, -1.0], [5.0, 6.0, 7.0]])
    pattern = SparsityPattern.from_mask(magnitudes >= 0)
    counts = exchange_counts(pattern, 3, bands((2, 3), (1, 1)), 0.0)
    assert keep(magnitudes, counts).tolist() == [[False, False, False], [True, True, True]]
    assert keep(magnitudes, counts, protect_rows=True).tolist() == [[False, True, False], [False, True, True]]
    one = exchange_counts(pattern, 1, bands((2, 3), (1, 1)), 0.0)
    assert keep(magnitudes, one, protect_rows=True).nonzero().tolist() == [[1, 2]]  # not enough for both


@given(
    seed=st.integers(0, 2**40),
    density=st.floats(0.05, 1.0),
    target=st.floats(0.05, 1.0),
    drop=st.floats(0.0, 0.99),
    parts=st.sampled_from([(1, 1), (2, 1), (2, 4)]),
)
def test_counts_add_up_in_every_band(
    seed: int, density: float, target: float, drop: float, parts: tuple[int, int]
) -> None:
    active = torch.rand(6, 8, generator=seeds.generator(seed)) < density
    active[0, 0] = True
    pattern = SparsityPattern.from_mask(active)
    goal = max(1, round(48 * target))
    counts = exchange_counts(pattern, goal, bands((6, 8), parts), drop)
    assert sum(kept + grown for _, kept, grown in counts) == goal
    chosen = select_kept(torch.rand(pattern.nnz), pattern, counts, RULE)
    kept = in_grid(pattern, chosen)
    places = draw_grown(pattern, counts, seeds.generator(seed, "grow"))
    grown = torch.zeros(48, dtype=torch.bool).index_fill(0, places, True).view(6, 8)
    assert not bool((kept & ~active).any())
    assert not bool((grown & active).any())
    assert int((kept | grown).sum()) == goal
    assert torch.equal(TopologyUpdate.exchange(pattern, chosen, places).pattern.mask(), kept | grown)


# Layers that are worked on in several runs of rows, beside the whole matrix at once.


def whole_top(scores: Tensor, count: int) -> Tensor:
    """Return the largest scores, of equal ones the first, by a sort of all."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.reshape(-1).argsort(descending=True, stable=True)[:count]] = True
    return chosen.view(scores.shape)


@pytest.mark.parametrize("parts", [(1, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("density", [0.1, 0.7])
@pytest.mark.parametrize("ties", [False, True])
def test_runs_of_rows_choose_what_a_sort_of_the_whole_matrix_does(
    parts: tuple[int, int], density: float, ties: bool
) -> None:
    shape, source = (640, 400), seeds.generator(0)
    pattern = random_pattern(shape, density, source)
    assert len(pattern.panels()) > 8
    values = torch.randn(pattern.nnz, generator=source)
    gradient = torch.randn(shape, generator=source)
    if ties:
        values, gradient = (values * 2).round() / 2, (gradient * 2).round() / 2
    active = pattern.mask()
    counts = exchange_counts(pattern, pattern.nnz, bands(shape, parts), 0.3)
    kept, grown, drawn = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    generator = seeds.generator(7)
    for part, keeps, grows in counts:
        magnitudes = pattern.scatter(values).abs()[part].masked_fill(~active[part], torch.inf)
        goes = whole_top(-magnitudes, int(active[part].sum()) - keeps)
        kept[part] = active[part] & ~goes
        grown[part] = whole_top(gradient.abs()[part].masked_fill(active[part], -1.0), grows)
        empty = (~active[part]).nonzero()
        order = torch.randperm(len(empty), generator=generator)[:grows]
        chosen = torch.zeros_like(active[part])
        chosen[tuple(empty[order].t())] = True
        drawn[part] = chosen
    assert torch.equal(in_grid(pattern, select_kept(values, pattern, counts, RULE)), kept)
    places = select_grown(gradient, pattern, counts, RULE)
    assert places.tolist() == grown.view(-1).nonzero()[:, 0].tolist()
    assert draw_grown(pattern, counts, seeds.generator(7)).tolist() == drawn.view(-1).nonzero()[:, 0].tolist()
    exchange = TopologyUpdate.exchange(pattern, select_kept(values, pattern, counts, RULE), places)
    after = exchange.pattern
    assert torch.equal(after.mask(), kept | grown)
    # Trusted indices equal the indices that would be made and checked.
    checked = SparsityPattern.from_mask(kept | grown)
    assert after.equals(checked)
    assert (after.row_ptr.dtype, after.col.dtype) == (checked.row_ptr.dtype, checked.col.dtype)
    old_place = torch.full((active.numel(),), -1).index_copy(0, pattern.positions(), torch.arange(pattern.nnz))
    for update in (exchange, TopologyUpdate.between(pattern, after)):
        assert torch.equal(update.carry(values), after.gather(pattern.scatter(values)))
        assert torch.equal(update.source, old_place[after.positions()])
        assert update.grown_count == int((grown & ~active).sum())


def test_units_of_blocks_have_the_sum_of_their_magnitudes() -> None:
    pattern = block_pattern((4, 6), 0.5, seeds.generator(0), (2, 3))
    values = torch.randn(pattern.nnz)
    dense = pattern.scatter(values).abs().view(2, 2, 2, 3).sum((1, 3))
    torch.testing.assert_close(stored_scores(values, None, pattern.block, RULE), dense[active_units(pattern)])


# Optimizers.

OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "Adam": {"amsgrad": True}, "RMSprop": {"momentum": 0.9}}


def trained(kind: type[torch.optim.Optimizer], steps: int) -> tuple[SparseLinear, torch.optim.Optimizer]:
    layer = SparseLinear(10, 8, density=0.4, seed=0, bias=False)
    optimizer = kind(layer.parameters(), lr=1e-2, **OPTIONS.get(kind.__name__, {}))  # type: ignore[call-arg]
    for step in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(5, 10, generator=seeds.generator(step))).square().sum().backward()
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("kind", sorted(_ELEMENTWISE, key=lambda kind: kind.__name__))
def test_every_known_optimizer_goes_on_with_the_moments_of_the_survivors(kind: type[torch.optim.Optimizer]) -> None:
    layer, optimizer = trained(kind, 3)
    old, parameter = layer.pattern, layer.values
    new = random_pattern((8, 10), 0.5, seeds.generator(9))
    before = {key: value.clone() for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
    gradient = parameter.grad.clone()
    values = parameter.detach().clone()
    apply_update(layer, TopologyUpdate.between(old, new), optimizer)
    assert layer.values is parameter
    state = optimizer.state[parameter]
    assert any(value.shape == (new.nnz,) for value in state.values() if isinstance(value, Tensor))
    for key, value in before.items():
        if value.shape == (old.nnz,):
            assert torch.equal(state[key], new.gather(old.scatter(value))), key
        else:
            assert torch.equal(state[key], value), key
    assert torch.equal(parameter.grad, new.gather(old.scatter(gradient)))
    assert torch.equal(parameter.detach(), new.gather(old.scatter(values)))
    optimizer.zero_grad()
    layer(torch.randn(5, 10)).sum().backward()
    optimizer.step()
    assert bool(torch.isfinite(parameter).all())


def test_a_resized_layer_trains_while_an_old_graph_is_alive() -> None:
    layer, optimizer = trained(torch.optim.AdamW, 1)
    loss = layer(torch.randn(5, 10)).sum()
    loss.backward()
    for density in (0.8, 0.2, 1.0):
        new = random_pattern((8, 10), density, seeds.generator(1))
        apply_update(layer, TopologyUpdate.between(layer.pattern, new), optimizer)
        optimizer.zero_grad()
        again = layer(torch.randn(5, 10)).sum()  # `loss` still holds the graph of the old size
        again.backward()
        assert layer.values.grad is not None
        assert layer.values.grad.shape == (new.nnz,)
        optimizer.step()
        loss = again
    assert loss.isfinite()


class Factored(torch.optim.Optimizer):
    """Keeps something that does not belong to single weights."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for parameter in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
            self.state[parameter] = {"rows": torch.ones(3)}


def test_an_optimizer_of_unknown_kind_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SparseLinear(10, 8, density=0.4, seed=0)
    held = {"layer.values": layer.values}
    with pytest.raises(UserError, match="optimizer Factored is not known to keep one number per weight; known are A"):
        check_optimizer(Factored(layer.parameters()), held)
    with pytest.raises(UserError, match="optimizer LBFGS is not known"):
        check_optimizer(torch.optim.LBFGS(layer.parameters()), held)
    monkeypatch.setattr("sparsetrain.sparsity.evolution.topology._ELEMENTWISE", set(_ELEMENTWISE))
    register_elementwise_optimizer(Factored)
    optimizer = Factored(layer.parameters())
    check_optimizer(optimizer, held)  # taken at its word, but its state is looked at
    optimizer.step()
    before = layer.values.detach().clone()
    new = random_pattern((8, 10), 0.5, seeds.generator(1))
    with pytest.raises(UserError, match=r"optimizer state 'rows' has shape \(3,\), which cannot follow"):
        apply_update(layer, TopologyUpdate.between(layer.pattern, new), optimizer)
    assert torch.equal(layer.values, before)


def test_an_optimizer_built_too_early_is_one_line() -> None:
    layer = SparseLinear(10, 8, density=0.4, seed=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(UserError, match=r"does not hold layer\.values: build MaskManager\(model, rule\) first"):
        check_optimizer(optimizer, {"layer.values": layer.values})


# What a grown weight's state starts with.


def grown_once(moments: str, optimizer: torch.optim.Optimizer, layer: SparseLinear) -> Tensor:
    """Exchange half of a layer's weights; return what has grown, bool [nnz]."""
    old = layer.pattern
    kept = torch.arange(old.nnz) % 2 == 0
    places = (~old.mask()).view(-1).nonzero()[: int((~kept).sum()), 0]
    update = TopologyUpdate.exchange(old, kept, places)
    apply_update(layer, update, optimizer, grown_moments=moments)
    return update.grown


@pytest.mark.parametrize(("beta2", "rates"), [(0.999, 3.162), (0.95, 0.447)])
def test_the_first_step_of_a_grown_weight_under_adamw_is_as_documented(beta2: float, rates: float) -> None:
    layer = SparseLinear(40, 20, density=0.4, seed=0, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, betas=(0.9, beta2), weight_decay=0.0)
    for step in range(1, 3):
        layer.values.grad = torch.randn(layer.pattern.nnz, generator=seeds.generator(step))
        optimizer.step()
    optimizer.state[layer.values]["step"].fill_(10_000)  # a training that corrects no bias any more
    grown = grown_once("zero", optimizer, layer)
    before = layer.values.detach().clone()
    layer.values.grad = torch.randn(layer.pattern.nnz, generator=seeds.generator(3)) * 1e3
    optimizer.step()
    moved = (layer.values.detach() - before).abs()[grown] / 1e-3
    torch.testing.assert_close(moved, torch.full_like(moved, rates), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Rprop])
def test_grown_moments_are_zero_or_the_mean_of_the_survivors(kind: type[torch.optim.Optimizer]) -> None:
    for moments in ("zero", "mean"):
        layer, optimizer = trained(kind, 3)
        before = {key: value.clone() for key, value in optimizer.state[layer.values].items() if value.ndim == 1}
        kept = torch.arange(layer.pattern.nnz) % 2 == 0
        grown = grown_once(moments, optimizer, layer)
        assert before
        for key, old in before.items():
            now = optimizer.state[layer.values][key]
            assert torch.equal(now[~grown], old[kept])
            start = old[kept].double().mean().float() if moments == "mean" else torch.zeros(())
            assert torch.equal(now[grown], start.expand(int(grown.sum())))
    with pytest.raises(UserError, match="grown_moments='median' is not one of zero, mean"):
        grown_once("median", optimizer, layer)
