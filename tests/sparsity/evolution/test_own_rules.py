"""Rules of one's own: what goes and what grows follow their scores, and what cannot be a rule is one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from regression import adamw, batch, dense_gradients, loss_of, mlp
from torch import Tensor

import sparsetrain as st
from sparsetrain.errors import NotFiniteError, UserError
from sparsetrain.sparsity.evolution.base import RULES, Rule


@dataclass(frozen=True, kw_only=True)
class Saliency(st.RigL):
    """The least |w g| go, and the positions grow whose weight would become most negative."""

    def score(self, values: Tensor, gradient: Tensor) -> Tensor:
        return (values * gradient).abs()

    def growth(self, gradient: Tensor) -> Tensor:
        return gradient


@pytest.mark.parametrize("block", [(1, 1), (4, 2)])
@pytest.mark.parametrize("protect_rows", [False, True])
def test_the_lowest_scores_go_and_the_highest_grow(block: tuple[int, int], protect_rows: bool) -> None:
    model = mlp()
    pattern = "random" if block == (1, 1) else "block"
    plan = st.SparsityConfig(sparsity=0.5, pattern=pattern, block=list(block))
    rule = Saliency(every=1, drop_fraction=0.5, protect_rows=protect_rows)
    manager = st.MaskManager(model, rule, plan=plan, seed=0)
    optimizer = adamw(model)

    def sums(matrix: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(matrix[None].double(), block)[0]

    for step in range(3):
        old = {name: layer.pattern for name, layer in manager.layers.items()}
        dense = dense_gradients(model, [batch(step)])
        loss_of(model, batch(step)).backward()
        optimizer.step()
        ranked = {
            name: (layer.values.detach() * layer.values.grad).abs()  # type: ignore[operator]
            for name, layer in manager.layers.items()
        }
        assert manager.step(optimizer) is not None
        optimizer.zero_grad()
        for name, layer in manager.layers.items():
            was, now = sums(old[name].mask()) > 0, sums(layer.pattern.mask()) > 0
            score, growth = sums(old[name].scatter(ranked[name])), sums(dense[name])
            gone, count = was & ~now, int(0.5 * int(was.sum()))
            assert int(gone.sum()) == int((now & ~was).sum()) == count
            if protect_rows:
                best = torch.zeros_like(was).scatter_(1, score.masked_fill(~was, -1.0).argmax(1, keepdim=True), True)
                assert not bool((gone & best & was).any())
                score = score.masked_fill(best & was, torch.inf)
            assert score[gone].max() <= score[was & now].min()
            assert growth[now & ~was].min() >= growth[~was & ~now].max()


def test_a_layer_without_a_gradient_has_gradients_of_zero_to_score_by() -> None:
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Watching(st.SET):
        def score(self, values: Tensor, gradient: Tensor) -> Tensor:
            seen.append((values.shape, gradient.clone()))
            return values.abs()

    model = mlp()
    manager = st.MaskManager(model, Watching(sparsity=0.5, every=1), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    name = next(iter(manager.layers))
    manager.layers[name].values.grad = None
    optimizer.param_groups[0]["params"][-1].grad = torch.zeros_like(optimizer.param_groups[0]["params"][-1])
    optimizer.step()
    manager.step(optimizer)
    assert seen
    assert all(shape == gradient.shape and not gradient.any() for shape, gradient in seen)


def scored(function: Callable[[Tensor], Tensor]) -> type[Rule]:
    @dataclass(frozen=True, kw_only=True)
    class Own(st.SET):
        def score(self, values: Tensor, gradient: Tensor) -> Tensor:
            return function(values)

    return Own


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda values: values[:-1], UserError, r"^layer '0' at step 1: Own: score\(\) returned shape .* must be"),
        (lambda values: values / 0.0 * 0.0, NotFiniteError, r"^layer '0' at step 1: Own: score\(\) returned NaN"),
        (lambda values: None, UserError, r"^layer '0' at step 1: Own: score\(\) returned NoneType; it must return a"),
        (lambda values: values * 1j, UserError, r"score\(\) returned a tensor of torch\.complex\d+ .* must be real"),
        (lambda values: values.to("meta"), UserError, r"score\(\) returned a tensor .* on meta .* must be .* on cpu"),
        (lambda values: values.to_sparse(), UserError, r"score\(\) returned a tensor .*sparse_coo.* dense"),
    ],
)
def test_scores_that_cannot_be_ranked_change_nothing(
    function: Callable[[Tensor], Tensor], error: type[UserError], message: str
) -> None:
    model = mlp()
    manager = st.MaskManager(model, scored(function)(sparsity=0.5, every=1), seed=0)
    optimizer, before = adamw(model), manager.hash()
    loss_of(model, batch(0)).backward()
    optimizer.step()
    with pytest.raises(error, match=message):
        manager.step(optimizer)
    assert manager.hash() == before


def test_scores_may_be_computed_in_place_and_in_few_bits() -> None:
    """A method that changes its argument changes no weight."""
    results = []
    for function in (lambda values: values.abs(), lambda values: values.abs_()):
        model = mlp()
        manager = st.MaskManager(model, scored(function)(sparsity=0.5, every=1), seed=0)
        optimizer = adamw(model)
        loss_of(model, batch(0)).backward()
        optimizer.step()
        assert manager.step(optimizer) is not None
        results.append([layer.values.detach() for layer in manager.layers.values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert any(bool((values < 0).any()) for values in results[1])
    rule = scored(lambda values: values.abs().clamp(max=400).to(torch.float8_e4m3fn))(sparsity=0.5, every=1)
    manager = st.MaskManager(model := mlp(), rule, seed=0)
    optimizer = adamw(model)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    assert manager.step(optimizer) is not None


def test_scores_of_growth_name_the_layer_and_an_unknown_way_to_grow_is_always_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Short(st.RigL):
        def growth(self, gradient: Tensor) -> Tensor:
            return gradient[:-1]

    model = mlp()
    manager = st.MaskManager(model, Short(sparsity=0.5, every=1), seed=0)
    loss = loss_of(model, batch(0))
    with pytest.raises(UserError, match=r"^layer '\S+' at step 1: Short: growth\(\) returned shape"):
        loss.backward()  # which ranks the gradients at once, so that none is kept
    assert manager.steps == 0

    @dataclass(frozen=True, kw_only=True)
    class Forgetful(st.SET):
        grows: str = "random"  # type: ignore[misc]

        def __post_init__(self) -> None:
            """Leave out the checks of the base class."""

    with pytest.raises(UserError, match=r"Forgetful: grows='gradent' is not one of random, gradient \(did you mean"):
        st.MaskManager(mlp(), Forgetful(sparsity=0.5, every=1, grows="gradent"), seed=0)


def test_infinite_scores_are_the_highest_and_the_lowest() -> None:
    model = mlp()
    rule = scored(lambda values: torch.where(values > 0, torch.inf, -torch.inf))
    manager = st.MaskManager(model, rule(sparsity=0.5, every=1, drop_fraction=0.2, protect_rows=True), seed=0)
    optimizer = adamw(model)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    old = {name: (layer.pattern, layer.values.detach().clone()) for name, layer in manager.layers.items()}
    manager.step(optimizer)
    for name, layer in manager.layers.items():
        pattern, values = old[name]
        gone = pattern.mask() & ~layer.pattern.mask()
        assert gone.any()
        assert bool((pattern.scatter(values)[gone] <= 0).all())


# The registry.


@pytest.fixture
def registered() -> Iterator[None]:
    before = RULES.names()
    yield
    for name in set(RULES) - set(before):
        RULES.unregister(name)


@pytest.mark.usefixtures("registered")
def test_a_registered_rule_is_a_section_with_its_fields() -> None:
    @st.register_rule("salient")
    @dataclass(frozen=True, kw_only=True)
    class Salient(Saliency):
        temperature: float = 1.0

    section = st.EvolutionConfig("salient", every=5, temperature=2.0)
    plan = st.SparsityConfig(sparsity=0.5, evolution=section)
    assert st.sparsity.make_rule(plan, 100) == Salient(every=5, stop=75, drop_schedule="cosine", temperature=2.0)
    with pytest.raises(UserError, match=r"salient.*did you mean 'salient'"):
        st.EvolutionConfig("saliemt")
    with pytest.raises(UserError, match=r"temprature is no setting of rule=salient .did you mean 'temperature'"):
        st.EvolutionConfig("salient", temprature=1.0)
    with pytest.raises(UserError, match="'salient' is taken"):
        st.register_rule("salient", Saliency)


def _without_decorator() -> type[Rule]:
    class Plain(st.SET):
        temperature: float = 1.0

    return Plain


def _without_default() -> type[Rule]:
    @dataclass(frozen=True, kw_only=True)
    class Needy(st.SET):
        temperature: float = field()

    return Needy


def _with_a_field_rule() -> type[Rule]:
    @dataclass(frozen=True, kw_only=True)
    class Own(st.SET):
        rule: str = "x"

    return Own


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: int, "must be a class derived from sparsetrain.Rule"),
        (_without_decorator, "Plain needs the decorator @dataclass"),
        (_without_default, "the field 'temperature' of Needy needs a default"),
        (_with_a_field_rule, "Own has a field 'rule'"),
    ],
)
def test_what_cannot_be_a_rule_is_not_registered(make: Callable[[], type[Rule]], message: str) -> None:
    before = RULES.names()
    with pytest.raises(UserError, match=message) as caught:
        st.register_rule("own", make())
    assert "\n" not in str(caught.value)
    assert RULES.names() == before


def test_a_way_to_grow_that_is_unknown_raises_when_the_class_is_made() -> None:
    with pytest.raises(UserError, match=r"Own: grows='gradients' is not one of random, gradient .did you mean"):

        class Own(st.SET):
            grows = "gradients"


def test_a_way_to_grow_that_is_unknown_raises_when_the_rule_is_made() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own(st.SET):
        how: str = "random"

        @property
        def grows(self) -> str:  # type: ignore[override]
            return self.how

    assert Own(how="gradient").needs_gradient
    with pytest.raises(UserError, match="Own: grows='magnitude' is not one of random, gradient"):
        Own(how="magnitude")
