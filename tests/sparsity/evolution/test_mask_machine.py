"""A state machine over everything that happens to a mask, beside a dense masked twin in float64.

The twin keeps dense weights, a bool mask, and torch's AdamW over the dense matrices. A masked weight is zero, so are
its gradient and its moments, and the twin does to the stored weights what sparse training should do to them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import Tensor, nn

from sparsetrain import seeds
from sparsetrain.runs.optimizer_state import optimizer_tensors, restore_optimizer
from sparsetrain.sparsity import (
    GMP,
    SET,
    MaskManager,
    RigL,
    Rule,
    SparseLinear,
    VariableSparsity,
    densify,
    magnitude_pattern,
    sparse_layers,
    sparsify,
)

WIDTH, HIDDEN, FOREVER = 6, 9, 10**6
LAYERS = {"0": (HIDDEN, WIDTH), "2": (WIDTH, HIDDEN)}
CLOSE = {"rtol": 0.0, "atol": 1e-11}


def make_rules() -> dict[str, Rule]:
    return {
        "set": SET(sparsity=0.6, every=2, drop_fraction=0.4),
        "rigl": RigL(sparsity=0.6, every=2, drop_fraction=0.4),
        "staggered": RigL(sparsity=0.6, every=3, drop_fraction=0.4, accumulation="staggered"),
        "protected": SET(sparsity=0.6, every=1, drop_fraction=0.5, protect_rows=True),
        "gmp": GMP(sparsity=0.7, every=2, stop=9, initial_sparsity=0.2),
        "vspdf": VariableSparsity(sparsity=0.7, phases=((3, 0.3), (6, 0.5), (8, 0.0)), grow="gradient"),
    }


def dense_model() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH)).double()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-2, weight_decay=0.2, betas=(0.8, 0.9))


class Twin:
    """Dense weights, biases, masks and moments; nothing of it is shared with the sparse model."""

    def __init__(self, model: nn.Module) -> None:
        layers = dict(sparse_layers(model))
        self.masks = {name: layer.pattern.mask() for name, layer in layers.items()}
        self.weights = {n: nn.Parameter(layer.dense_weight().detach().clone()) for n, layer in layers.items()}
        self.biases = {name: nn.Parameter(layer.bias.detach().clone()) for name, layer in layers.items()}
        self.optimizer = adamw([*self.weights.values(), *self.biases.values()])
        self.effective: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        for name, mask in self.masks.items():
            self.effective[name] = self.weights[name] * mask
            if self.effective[name].requires_grad:
                self.effective[name].retain_grad()
        hidden = torch.tanh(F.linear(x, self.effective["0"], self.biases["0"]))
        return F.linear(hidden, self.effective["2"], self.biases["2"])

    def change(self, name: str, kept: Tensor, mask: Tensor) -> None:
        """Zero everything that did not survive, in weight, gradient and moments."""
        weight = self.weights[name]
        with torch.no_grad():
            weight *= kept
            for value in self.optimizer.state[weight].values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value *= kept
        self.masks[name] = mask


class MaskMachine(RuleBasedStateMachine):
    @initialize(name=st.sampled_from(sorted(make_rules())), seed=st.integers(0, 2**30))
    def start(self, name: str, seed: int) -> None:
        self.rule, self.seed, self.batch = make_rules()[name], seed, 0
        self.model: nn.Module = dense_model()
        self.manager = MaskManager(self.model, self.rule, seed=seed)
        self.optimizer = adamw(self.model.parameters())
        self.twin = Twin(self.model)
        self.dense = False
        self.keep: Any = None

    def layers(self) -> dict[str, SparseLinear]:
        return dict(sparse_layers(self.model))

    def loss(self, output: Tensor, x: Tensor) -> Tensor:
        return (output - x.roll(1, 1)).square().sum()

    @rule(micro_batches=st.integers(1, 2), keep_graph=st.booleans())
    def optimizer_step(self, micro_batches: int, keep_graph: bool) -> None:
        if self.dense:
            return
        parameters = list(self.model.parameters())
        before = {name: (layer.pattern, layer.pattern.mask()) for name, layer in self.layers().items()}
        summed = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in LAYERS.items()}
        for _ in range(micro_batches):
            self.batch += 1
            x = torch.randn(4, WIDTH, generator=seeds.generator(self.seed, self.batch), dtype=torch.float64)
            ours, theirs = self.loss(self.model(x), x), self.loss(self.twin.forward(x), x)
            assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-10)
            ours.backward()
            theirs.backward()
            self.keep = ours if keep_graph else None  # a graph of the old size that is still alive
            last = {name: weight.grad.clone() for name, weight in self.twin.effective.items()}
            for name in LAYERS:
                summed[name] += last[name]
        self.optimizer.step()
        self.twin.optimizer.step()
        values = {name: layer.values.detach().clone() for name, layer in self.layers().items()}
        update = self.manager.step(self.optimizer)
        ranked = summed if getattr(self.rule, "accumulation", "last") == "staggered" else last
        for name, layer in self.layers().items():
            old, was = before[name]
            if update is None or name not in update.layers:
                assert layer.pattern is old
                continue
            now = layer.pattern.mask()
            self.check_choice(name, old.scatter(values[name]).abs(), was, now, ranked[name].abs())
            self.twin.change(name, was & now, now)
        self.optimizer.zero_grad()
        self.twin.optimizer.zero_grad()
        assert all(one is other for one, other in zip(parameters, self.model.parameters(), strict=True))

    def check_choice(self, name: str, magnitude: Tensor, was: Tensor, now: Tensor, gradient: Tensor) -> None:
        kept, dropped, grown = was & now, was & ~now, now & ~was
        protected = torch.zeros_like(was)
        if self.rule.protect_rows and int((was.any(1)).sum()) <= int(kept.sum()):
            best = magnitude.masked_fill(~was, -1.0).max(1)
            protected[torch.arange(len(was)), best.indices] = best.values >= 0
            assert not bool((dropped & protected).any())
        free = kept & ~protected
        if bool(dropped.any()) and bool(free.any()):
            assert float(magnitude[dropped].max()) <= float(magnitude[free].min())
        left = ~was & ~grown
        if self.rule.needs_gradient and bool(grown.any()) and bool(left.any()):
            assert float(gradient[grown].min()) >= float(gradient[left].max()) - 1e-10

    @rule()
    def save_and_load(self) -> None:
        if self.dense:
            return
        # safetensors would write these; names, shapes and bits are what counts.
        model_state = {key: value.clone() for key, value in self.model.state_dict().items()}
        saved = optimizer_tensors(self.optimizer, self.model.named_parameters())
        saved = saved._replace(tensors={key: value.clone() for key, value in saved.tensors.items()})
        state, history = copy.deepcopy(self.manager.state())
        model = dense_model()
        if self.rule.sparsity is None:  # since a re-sparsification: the layers have masks of their own
            sparsify(model, masks=self.patterns)
        manager = MaskManager(model, self.rule, seed=self.seed)
        optimizer = adamw(model.parameters())
        model.load_state_dict(model_state)
        restore_optimizer(optimizer, saved, model.named_parameters())
        manager.load_state(state, history)
        assert manager.hash() == self.manager.hash()
        assert manager.report() == self.manager.report()
        self.model, self.manager, self.optimizer = model, manager, optimizer

    @rule()
    def densify(self) -> None:
        if self.dense:
            return
        self.patterns = self.manager.patterns()
        weights = {name: layer.dense_weight().detach().clone() for name, layer in self.layers().items()}
        densify(self.model)
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                assert torch.equal(module.weight, weights[name])
                assert float(module.weight.detach()[~self.twin.masks[name]].abs().sum()) == 0.0
        self.dense = True

    @rule(magnitude=st.booleans())
    def resparsify(self, magnitude: bool) -> None:
        if not self.dense:
            return
        if magnitude:
            # The stored weights are the only ones that are not zero, so the largest magnitudes bring the mask back.
            nonzero = {name: int((self.twin.weights[name] * self.twin.masks[name] != 0).sum()) for name in LAYERS}
            if any(nonzero[name] < self.patterns[name].nnz for name in LAYERS):
                magnitude = False  # grown weights that are still zero cannot be told from empty positions
        if magnitude:
            masks = {
                name: magnitude_pattern(module.weight, self.patterns[name].density)
                for name, module in self.model.named_modules()
                if isinstance(module, nn.Linear)
            }
        else:
            masks = dict(self.patterns)
        sparsify(self.model, masks=masks)
        for name, layer in self.layers().items():
            assert layer.pattern.equals(self.patterns[name])
        self.rule = SET(every=2, drop_fraction=0.4)
        self.manager = MaskManager(self.model, self.rule, seed=self.seed)
        self.optimizer = adamw(self.model.parameters())
        self.twin = Twin(self.model)
        self.dense = False

    @invariant()
    def agrees_with_the_twin(self) -> None:
        if not hasattr(self, "twin") or self.dense:
            return
        for name, layer in self.layers().items():
            mask = layer.pattern.mask()
            assert torch.equal(mask, self.twin.masks[name])
            twin = self.twin.weights[name].detach()
            assert float(twin[~mask].abs().sum()) == 0.0
            torch.testing.assert_close(layer.dense_weight().detach(), twin, **CLOSE)
            ours, theirs = self.optimizer.state[layer.values], self.twin.optimizer.state[self.twin.weights[name]]
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                expected = theirs[key]
                if value.shape == layer.values.shape:
                    assert float(expected[~mask].abs().sum()) == 0.0
                    value = layer.pattern.scatter(value)
                torch.testing.assert_close(value, expected, **CLOSE)

    @invariant()
    def has_the_exact_number_of_weights(self) -> None:
        if not hasattr(self, "manager") or self.dense:
            return
        targets = self.manager.nnz_at(self.manager.steps)
        for report in self.manager.report():
            assert report.nnz == targets[report.name]
            assert report.density == report.target_density
            assert report.density <= report.itop_rate <= 1.0


@pytest.mark.filterwarnings("ignore:.* have no weight")
def test_masks_agree_with_a_dense_twin_whatever_happens() -> None:
    run_state_machine_as_test(
        MaskMachine,
        settings=settings(
            stateful_step_count=20,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
