"""What per-example gradient norms do around a model: repeats, checkpointing, accumulation, refusals, processes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from example_norms import assert_norms, batch, transformer
from fresh import Fresh
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsetrain
from sparsetrain import UserError


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_a_layer_once(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5), nn.LayerNorm(5))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.inner, x, use_reentrant=reentrant)
            return out

    model, x, weights = Checkpointed(), torch.randn(4, 7, 5, requires_grad=True), torch.randn(4, 7, 5)
    assert_norms(
        model,
        lambda: (model(x) * weights).mean(),
        lambda one: (model(x[one : one + 1]) * weights[one]).mean() / 4,
        4,
    )


def test_accumulated_micro_batches_give_the_norms_of_one_batch() -> None:
    model = transformer(sparsity=0.5)
    tokens, targets = batch(examples=6, masked=0.0)
    targets[0] = 1
    with sparsetrain.per_example_norms(model) as norms:
        model(tokens, targets).backward()
    whole = norms.squared
    for micros in ((2, 4), (3, 3)):
        with sparsetrain.per_example_norms(model) as norms:
            losses = [
                model(x, t) * (len(x) / 6) for x, t in zip(tokens.split(micros), targets.split(micros), strict=True)
            ]
            if micros[0] == 3:
                sum(losses[1:], losses[0]).backward()  # one backward pass through two forward passes
            else:
                for loss in losses:
                    loss.backward()
        assert norms.squared.keys() == whole.keys()
        for name, squared in norms.squared.items():
            torch.testing.assert_close(squared, whole[name], rtol=1e-4, atol=0.0)


def test_autocast_gives_norms_within_the_rounding_of_bfloat16() -> None:
    model = transformer(sparsity=0.5, bias=True)
    tokens, targets = batch(masked=0.0)
    targets[0] = 1
    plain, rounded = [], []
    for into, enabled in ((plain, False), (rounded, True)):
        with sparsetrain.per_example_norms(model) as norms, torch.autocast("cpu", torch.bfloat16, enabled):
            model(tokens, targets).backward()
        into.append(norms.squared)
    for name, squared in plain[0].items():
        torch.testing.assert_close(rounded[0][name], squared, rtol=0.05, atol=0.0)
        assert rounded[0][name].dtype == torch.float32
    assert any((rounded[0][name] != squared).any() for name, squared in plain[0].items())


def test_only_the_included_modules_and_only_parameters_with_a_gradient_have_norms() -> None:
    model = transformer()
    model.blocks[0].requires_grad_(False)
    tokens, targets = batch()
    before = {name: vars(module).keys() for name, module in model.named_modules()}
    with sparsetrain.per_example_norms(model, include=["*norm"]) as norms:
        model(tokens, targets).backward()
    assert list(norms.squared) == ["blocks.1.attn_norm.weight", "blocks.1.mlp_norm.weight", "final_norm.weight"]
    assert {name: vars(module).keys() for name, module in model.named_modules()} == before  # nothing stays behind


def test_forward_passes_without_a_backward_pass_change_nothing() -> None:
    model = transformer()
    tokens, targets = batch(masked=0.0)
    targets[0] = 1
    found = []
    for more in (False, True):
        with sparsetrain.per_example_norms(model) as norms:
            if more:
                with torch.no_grad():
                    model(tokens[:2])
                model(tokens[:1], targets[:1])
            loss = model(tokens, targets)
            if more:
                with torch.no_grad():
                    model.head(torch.randn(3, 4, 32))  # a metric
            loss.backward()
        found.append(norms.squared)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class Labelled(nn.Module):
    """An embedding of one label for each example, beside one of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.label, self.position, self.last = nn.Embedding(5, 6), nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = torch.tanh(x + self.label(labels)[:, None] + self.position(torch.arange(x.shape[1])))
        out: Tensor = self.last(input=x)
        out += 1.0
        return out.square()


def test_labels_of_examples_are_told_from_positions() -> None:
    model, x, labels = Labelled(), torch.randn(4, 7, 6), torch.tensor([3, 0, 3, 1])
    assert_norms(model, lambda: model(x, labels).mean(), lambda b: model(x[b : b + 1], labels[b : b + 1]).mean() / 4, 4)


def test_ids_that_go_up_by_one_and_may_be_of_examples_are_refused_unless_their_shape_says_it() -> None:
    model, x = Labelled(), torch.randn(4, 7, 6)
    with (
        pytest.raises(UserError, match=r"label\.weight: its table is read at the ids 1 to 4, .* the shape \[B, 1\]"),
        sparsetrain.per_example_norms(model),
    ):
        model(x, torch.arange(1, 5))
    with (
        pytest.raises(UserError, match=r"position\.weight: its table is read at the ids 0 to 6, .* the shape \[1, T\]"),
        sparsetrain.per_example_norms(model),
    ):
        model(torch.randn(7, 7, 6), torch.zeros(7).long())
    # One example: there is nothing to tell apart, and the output keeps its shape.
    one, label = x[:1], torch.tensor([2])
    assert_norms(model, lambda: model(one, label).mean(), lambda b: model(one, label).mean(), 1)


class Flat(nn.Module):
    """A model that sees all tokens of all examples as one list."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.table(tokens.flatten())))
        return out.square().mean()


def test_a_table_that_is_read_at_a_list_of_all_tokens_matches_autograd() -> None:
    model, tokens = Flat(), torch.randint(0, 11, (3, 5))
    assert_norms(model, lambda: model(tokens), lambda b: model(tokens[b : b + 1]) / 3, 3)


def test_gradients_that_are_not_finite_are_the_users_to_handle() -> None:
    model, tokens = Flat(), torch.randint(0, 11, (3, 5))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with sparsetrain.per_example_norms(model) as norms:
        scaler.scale(1e6 * model(tokens)).backward()
    assert not torch.isfinite(norms.squared["out.weight"]).all()
    model.zero_grad()
    with sparsetrain.per_example_norms(model) as norms:
        (math.nan * model(tokens)).backward()
    assert norms.squared["table.weight"].isnan().all()


@pytest.mark.parametrize("layer", [nn.LayerNorm(6), nn.RMSNorm(6), nn.Linear(6, 6)])
def test_outputs_can_be_changed_in_place(layer: nn.Module) -> None:
    x, weights = torch.randn(4, 7, 6), torch.randn(4, 7, 6)

    def share(x: Tensor, weights: Tensor) -> Tensor:
        return (F.relu(layer(x), inplace=True) * weights).sum() / 168

    assert_norms(layer, lambda: share(x, weights), lambda one: share(x[one : one + 1], weights[one]), 4)


class Rows(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer, self.table = how, nn.Linear(6, 6), nn.Embedding(50, 6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.how == "pairs":
            return self.layer(torch.cat([x[:, 0], x[:, 1]]))
        if self.how == "table":
            return self.table(torch.zeros(3, 2, dtype=torch.long)).sum() + self.layer(x)
        return self.layer(x.transpose(0, 1))


def test_rows_that_cannot_be_told_apart_by_example_are_refused() -> None:
    x = torch.randn(4, 7, 6)
    for how, message in {
        "pairs": r"layer\.(weight|bias): its layer sees a tensor of shape \(8, 6\)",
        "tokens first": r"layer\.(weight|bias): its layer sees a tensor of shape \(7, 4, 6\)",
        "table": r"table\.weight: its table is read at ids of shape \(3, 2\)",
    }.items():
        with pytest.raises(UserError, match=message), sparsetrain.per_example_norms(Rows(how)) as norms:
            norms._model(x)
    model = Rows("pairs")
    with pytest.raises(UserError, match="do not tell B; pass examples=B"), sparsetrain.per_example_norms(model):
        model(x, torch.ones(7, 7))


def test_a_copy_made_inside_computes_with_its_own_weights_and_can_be_measured() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    with sparsetrain.per_example_norms(model):
        model(x).mean().backward()
        copied, stored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in (copied, stored):
        nn.init.zeros_(one[0].weight)
        nn.init.zeros_(one[0].bias)
        assert not one(x).any()
        with sparsetrain.per_example_norms(one) as norms:
            one(x).mean().backward()
        assert norms.squared.keys() == {"0.weight", "0.bias"}


def test_a_layer_used_twice_under_reentrant_checkpointing_needs_its_backward_pass_first() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def block(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(torch.tanh(self.layer(x))))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.block, x, use_reentrant=True)
            return out

    model = Checkpointed()
    x = torch.randn(3, 7, 5, requires_grad=True)
    assert_norms(model, lambda: model(x).square().mean(), lambda one: model(x[one : one + 1]).square().mean() / 3, 3)
    extra = nn.Linear(5, 5)
    both = nn.Sequential(extra, model)
    with pytest.raises(UserError, match="two forward passes await"), sparsetrain.per_example_norms(both):
        (both(x).mean() + both(x + 1).mean()).backward()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.inner(x, x, x, need_weights=False)[0])
        return out


def test_unknown_modules_are_named_or_left_out() -> None:
    model, x = Attention(), torch.randn(2, 5, 8)
    with pytest.raises(UserError, match=r"knows no rule for inner \(MultiheadAttention\): register_example_gradients"):
        sparsetrain.per_example_norms(model).__enter__()
    with sparsetrain.per_example_norms(model, strict=False) as norms:
        model(x).square().mean().backward()
    assert norms.squared.keys() == {"out.weight", "out.bias"}
    # The output projection is a layer, whose weight the attention reads without a call.
    assert set(norms.left_out) == {
        "inner.in_proj_weight",
        "inner.in_proj_bias",
        "inner.out_proj.weight",
        "inner.out_proj.bias",
    }


class Functional(nn.Module):
    """Reads the weights of its layers without calling them."""

    def __init__(self, embed: bool) -> None:
        super().__init__()
        self.table, self.layer, self.embed = nn.Embedding(5000, 4), nn.Linear(4, 5000, bias=False), embed

    def forward(self, ids: Tensor) -> Tensor:
        if self.embed:
            return self.layer(F.embedding(ids, self.layer.weight)) + self.table(ids).sum()
        return F.linear(self.table(ids), self.table.weight).sum() + self.layer(self.table(ids))


def test_a_backward_pass_outside_of_the_context_is_refused() -> None:
    model = torch.nn.Linear(3, 2)
    with (
        pytest.raises(UserError, match=r"no backward pass has reached the parameters; call loss.backward\(\) inside"),
        sparsetrain.per_example_norms(model),
    ):
        loss = model(torch.ones(4, 3)).mean()
    loss.backward()
    with sparsetrain.per_example_norms(model) as norms, torch.no_grad():
        model(torch.ones(4, 3))
    assert norms.squared == {}


@pytest.mark.parametrize(("embed", "named"), [(True, "layer.weight"), (False, "table.weight")])
def test_a_weight_that_is_also_read_elsewhere_is_refused(embed: bool, named: str) -> None:
    model, ids = Functional(embed), torch.arange(8).view(2, 4)
    with (
        pytest.raises(UserError, match=f"{named} has a gradient that its modules compute in part only; strict=False"),
        sparsetrain.per_example_norms(model),
    ):
        model(ids).square().mean().backward()
    with sparsetrain.per_example_norms(model, strict=False) as norms:
        model(ids).square().mean().backward()
    assert named in norms.left_out
    assert named not in norms.squared


def test_what_cannot_be_measured_is_said_in_one_line() -> None:
    linear, x = nn.Linear(4, 4), torch.randn(6, 4)
    compiled = type("OptimizedModule", (nn.Module,), {})()  # recognised by its name: see `wrappers`
    compiled._orig_mod = linear
    cases: list[tuple[str, Callable[[], Any]]] = [
        (r"include='\*norm' must be a list", lambda: sparsetrain.per_example_norms(linear, include="*norm")),
        (r"examples=0 must be at least 1", lambda: sparsetrain.per_example_norms(linear, examples=0)),
        (r"no parameter", lambda: sparsetrain.per_example_norms(linear, include=["nowhere"]).__enter__()),
        (r"is compiled", lambda: sparsetrain.per_example_norms(compiled).__enter__()),
        (r"DataParallel", lambda: sparsetrain.per_example_norms(nn.DataParallel(linear)).__enter__()),
        (r"must be a class of modules", lambda: sparsetrain.register_example_gradients(linear)),  # type: ignore[arg-type]
    ]
    for message, call in cases:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    with (
        pytest.raises(UserError, match=r"weight: its layer sees a tensor of shape \(6, 4\), whose first"),
        sparsetrain.per_example_norms(linear, examples=4),
    ):
        linear(x)
    with sparsetrain.per_example_norms(linear, include=[""]):
        loss = linear(x).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(UserError, match="a second backward pass"):
            loss.backward()
    with sparsetrain.per_example_norms(linear), pytest.raises(UserError, match="is inside such a context already"):
        sparsetrain.per_example_norms(linear).__enter__()
    model = transformer()
    with (
        pytest.raises(UserError, match=r"blocks\.0\.attn_norm is called outside of the model's own forward pass"),
        sparsetrain.per_example_norms(model, include=["*norm"]),
    ):
        model.blocks[0].attn_norm(torch.randn(1, 2, 32))
    assert "forward" not in vars(model.blocks[0].attn_norm)


@pytest.mark.slow
def test_each_process_of_ddp_gets_the_norms_of_its_own_examples(fresh: Fresh, tmp_path: Path) -> None:
    script = Path(__file__).with_name("ddp_norms.py")
    for rank in [fresh.start(script, str(rank), str(tmp_path)) for rank in range(2)]:
        ended = rank.wait()
        assert ended.returncode == 0, ended.stderr


def test_the_mean_of_norms_and_the_norm_of_the_mean_give_the_noise_scale_of_a_known_problem() -> None:
    """Gradients that are draws around a mean: tr Sigma over |G|^2 is known."""
    generator, width, examples = torch.Generator().manual_seed(0), 400, 64
    layer = nn.Linear(width, 1, bias=False)
    scale = sparsetrain.NoiseScale(decay=1.0)
    for _ in range(60):
        x = 0.05 + torch.randn(examples, width, generator=generator)
        with sparsetrain.per_example_norms(layer) as norms:
            layer.zero_grad()
            layer(x).mean().backward()
        assert layer.weight.grad is not None
        scale.update(float(norms.squared["weight"].mean()), float(layer.weight.grad.square().sum()), big=examples)
    low, high = scale.interval(0.99)
    assert low < 1.0 / 0.05**2 < high
    assert high / low < 1.5
    assert not math.isinf(high)
