"""Implementations of a layer against dense products in float64; memory of a step against known sizes."""

from __future__ import annotations

import dataclasses
import sys
import time
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.bench import GptSection, contenders, gpt
from sparsetrain.bench.contenders import LayerCase, contender, measure_memory, wrong
from sparsetrain.bench.memory import bytes_per_nonzero, layer_bytes, pattern_bytes, peak_bytes
from sparsetrain.bench.peers import Skipped, missing, step_of
from sparsetrain.bench.timing import Work, interleaved
from sparsetrain.models import Transformer
from sparsetrain.sparsity import SparseLinear

CASE = LayerCase(in_features=48, out_features=32, tokens=80, sparsity=0.75, block=(16, 16), seed=0)


@pytest.mark.parametrize("name", ["dense", "masked", "csr", "torch_csr", "scipy"])
def test_contenders_compute_the_product_of_their_weight(name: str) -> None:
    entry = contender(name, CASE)
    assert wrong(entry, CASE) is None
    assert entry.weight is not None
    x = CASE.draw(80, 48, "input").double()
    y = torch.as_tensor(entry.work.forward()).detach().double()
    torch.testing.assert_close(y, x @ entry.weight.double().t(), rtol=1e-4, atol=1e-4)
    if name != "dense":
        assert int((entry.weight != 0).sum()) == entry.stored == 384


def test_unstructured_contenders_share_their_positions() -> None:
    weights = [contender(name, CASE).weight for name in ("masked", "csr", "torch_csr", "scipy")]
    assert all(w is not None and torch.equal(w != 0, weights[0] != 0) for w in weights)  # type: ignore[operator]


def test_a_wrong_result_is_noticed() -> None:
    entry = contender("dense", CASE)
    assert entry.weight is not None
    changed = dataclasses.replace(entry, weight=entry.weight + 0.01)
    assert "relative error" in (wrong(changed, CASE) or "")


def test_a_step_computes_both_gradients_and_leaves_none() -> None:
    linear = nn.Linear(48, 32, bias=False)
    x, g = CASE.draw(80, 48, "input"), CASE.draw(80, 32, "gradient")
    seen: list[Tensor] = []
    for leaf in (x.requires_grad_(), linear.weight):
        leaf.register_hook(lambda grad: seen.append(grad.clone()))
    work = step_of(linear, [linear.weight], x, g)
    assert work.backward is not None
    work.backward(work.forward())
    shapes = {tuple(grad.shape): grad for grad in seen}
    torch.testing.assert_close(shapes[80, 48], g @ linear.weight)
    torch.testing.assert_close(shapes[32, 48], g.t() @ x)
    assert x.grad is None
    assert linear.weight.grad is None


def test_what_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {name: contenders.BACKENDS[name] for name in contenders.BACKENDS if name != "bsr"}
    monkeypatch.setattr(contenders.BACKENDS, "_things", others)
    with pytest.raises(Skipped, match="'bsr' does not exist"):
        contender("bsr", CASE)
    with pytest.raises(Skipped, match="do not divide"):
        dataclasses.replace(CASE, in_features=50).pattern((16, 16))


def test_block_patterns_have_the_density_of_the_case() -> None:
    pattern = dataclasses.replace(CASE, in_features=64, out_features=64).pattern((16, 16))
    assert pattern.block == (16, 16)
    assert pattern.density == 0.25


class _Forward(torch.autograd.Function):
    """A library whose layer has no backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("no backward here")


def test_a_peer_without_backward_counts_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer(nn.Module):
        def __init__(self, columns: int, rows: int, bias: bool, sparsity: float) -> None:
            super().__init__()
            assert (columns, rows, bias, sparsity) == (48, 32, False, 0.75)
            self.weight = nn.Parameter(torch.randn(rows, columns))

        def forward(self, x: Tensor) -> Tensor:
            return _Forward.apply(x, self.weight)

    module = types.ModuleType("sparselab")
    module.SparseLinear = Layer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sparselab", module)
    entry = contender("sparselab", CASE)
    assert entry.work.backward is None
    assert "backward is not supported: no backward here" in entry.note


def test_a_peer_that_does_not_import_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sparseprop", None)
    with pytest.raises(Skipped, match="cannot be imported"):
        contender("sparseprop", CASE)
    assert missing("scipy") is None


def test_rounds_take_turns_and_short_work_is_repeated() -> None:
    order: list[str] = []
    works = {name: Work(lambda name=name: order.append(name), lambda _: None) for name in "abc"}
    times = interleaved(works, repeats=3)
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab"
    assert all(len(entry.step) == len(entry.forward) == 3 for entry in times.values())
    assert interleaved(works, 1, least_seconds=1e-4)["a"].calls > 1
    assert interleaved({"a": Work(lambda: None)}, 2)["a"].step == []
    beside = {"a": "a", "b": "a", "c": "b"}
    pauses = {"a": 0.0, "b": 0.1, "c": 0.1}
    three = {name: Work(lambda pause=pause: time.sleep(pause)) for name, pause in pauses.items()}
    assert [entry.given_up for entry in interleaved(three, 3, 0.0, 4.0, beside).values()] == [False, True, False]
    slow = interleaved({"a": Work(lambda: None), "b": Work(lambda: time.sleep(0.01))}, 5, patience=2.0)
    assert (len(slow["a"].forward), len(slow["b"].forward), slow["b"].given_up) == (5, 1, True)


def test_index_bytes_are_the_patterns_own_and_those_of_both_layouts() -> None:
    layer = SparseLinear(128, 96, density=0.25, backend="csr", seed=0, bias=False)
    own = 8 * 97 + 4 * layer.pattern.nnz
    assert pattern_bytes(layer.pattern) == own
    layer(torch.randn(64, 128, requires_grad=True)).sum().backward()
    # Rows and columns are padded to multiples of four. 16-bit columns in both layouts, 32-bit places in the
    # transpose; ends of chunks: two blocks of columns, then one.
    rows, columns = (4 * int(torch.ceil(layer.pattern.mask().sum(side) / 4).sum()) for side in (1, 0))
    derived = 2 * rows + (2 + 4) * columns + 4 * (2 * 96 + 1) + 4 * (128 + 1)
    derived += 8 * 97  # its own copy of the row ends, which is never written while kernels read it
    assert pattern_bytes(layer.pattern) == own + derived
    assert layer_bytes(layer) == 16 * layer.pattern.nnz + own + derived
    assert bytes_per_nonzero(layer) == layer_bytes(layer) / layer.pattern.nnz
    assert bytes_per_nonzero(nn.Linear(2, 2)) is None


def test_peak_is_that_of_the_tensors_alive_at_once() -> None:
    def step() -> None:
        kept = torch.empty(1000)
        for _ in range(3):
            torch.empty(500)  # freed at once
        del kept
        torch.empty(1200)

    assert peak_bytes(step) == 4 * 1500


def test_what_a_step_leaves_does_not_count_from_where_it_was_made() -> None:
    left: list[torch.Tensor] = []

    def step() -> None:
        torch.empty(1000)  # the peak is here, before the remaining tensors exist
        left.append(torch.empty(800))
        torch.empty(600)

    assert peak_bytes(step) == 4 * 1400
    left.clear()
    assert peak_bytes(step, lambda: left) == 4 * 1000


def test_activation_memory_of_a_dense_step_is_input_output_and_input_gradient() -> None:
    found = measure_memory(contender("dense", CASE))
    assert found == {"state_bytes_per_weight": 16.0, "peak_activation_bytes": 4 * 80 * (48 + 32 + 48)}


SMALL = GptSection(d_model=32, n_layers=2, n_heads=2, vocab_size=64, context=16, batch=2)


def test_plain_gpt_has_the_shape_of_the_dense_model() -> None:
    plain, ours = gpt.PlainGPT(SMALL.model_config()), gpt.dense_model(SMALL.model_config())
    assert isinstance(ours, Transformer)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (plain, ours)]
    assert sizes[0] - sizes[1] == 16 * 32  # learned positions, which our model does not have
    tokens = torch.randint(64, (2, 16))
    assert plain.loss(tokens, tokens).item() == pytest.approx(float(torch.tensor(64.0).log()), abs=0.5)


def test_timed_products_change_nothing_but_the_clock() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 6, bias=False)
    x = torch.randn(2, 3, 8, requires_grad=True)
    g = torch.randn(2, 3, 6)
    expected = torch.autograd.grad(linear(x), [x, linear.weight], g)
    clock = [0.0]
    gpt._time_products(linear, clock)
    for ours, theirs in zip(torch.autograd.grad(linear(x), [x, linear.weight], g), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert clock[0] > 0


def test_profile_shares_are_parts_of_a_step() -> None:
    profile = gpt.profile_dense(SMALL, seed=0, repeats=2)
    assert 0 < profile["linear_share"] < 1
    assert 0 < profile["update_share"] < 1
    assert profile["linear_share"] + profile["update_share"] < 1
    assert profile["hidden_share"] == pytest.approx(2 * 12 * 32**2 / (2 * 12 * 32**2 + 64 * 32 + 5 * 32))


def test_sparse_models_hide_no_dense_matrix() -> None:
    model = gpt.sparse_model(SMALL.model_config(), 0.75, "masked", (16, 16))
    assert gpt.hidden_linears(model) == {}
    with pytest.raises(Skipped, match="'nowhere' does not exist"):
        gpt.sparse_model(SMALL.model_config(), 0.75, "nowhere", (16, 16))


def test_a_training_step_moves_the_weights_and_drops_the_gradients() -> None:
    step = gpt.TrainingStep(gpt.dense_model(SMALL.model_config()), SMALL, seed=0)
    before = step.parameters[0].detach().clone()
    step.backward(step.forward())
    assert not torch.equal(step.parameters[0], before)
    assert all(p.grad is None for p in step.parameters)
    assert step.peak_activation_bytes() > 0
    assert all(p.grad is None for p in step.parameters)
