"""Roles in foreign modules: norms, padding, kept values, heads, routers, experts, shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.errors import UserError
from sparsetrain.parameterization import Parameterization, Role, assignment, param_groups, parameterize

P = Parameterization


def parts(**modules: nn.Module) -> Any:
    return nn.ModuleDict(modules)


def roles_of(model: nn.Module, **options: Any) -> dict[str, Role]:
    return {
        name: traits.role
        for name, traits in assignment(parameterize(model, P.sp(), seed=0, **options)).traits_of.items()
    }


# -- norms -------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * gain, as in most models; ``shift`` is added to the gain (1 in Gemma and Qwen3-Next)."""

    def __init__(self, width: int, shift: float = 0.0, start: float | None = None, name: str = "weight") -> None:
        super().__init__()
        self.shift, self.leaf = shift, name
        start = 1.0 - shift if start is None else start
        self.register_parameter(name, nn.Parameter(torch.full((width,), start)))

    def forward(self, x: Tensor) -> Tensor:
        gain = self._parameters[self.leaf]
        assert gain is not None
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.shift + gain)


class GatedRMSNorm(RMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * nn.functional.silu(gate)


class LayerNormPlusOne(nn.LayerNorm):
    """A subclass of torch's norm that adds one to its gain, which starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1.0, self.bias, self.eps)


class GammaBeta(nn.Module):
    """A layer norm whose gain and bias are called gamma and beta; its class name contains LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (x.shape[-1],), self.gamma, self.beta)


GammaBeta.__name__ = "OldLayerNorm"
NORMS: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: nn.LayerNorm(32),
    "torch RMSNorm": lambda: nn.RMSNorm(32),
    "plain": lambda: RMSNorm(32),
    "one more": lambda: RMSNorm(32, shift=1.0),
    "gain under another name": lambda: RMSNorm(32, name="scale"),
    "gain called gamma": lambda: RMSNorm(32, name="gamma"),
    "gated": lambda: GatedRMSNorm(32),
    "gated, one more": lambda: GatedRMSNorm(32, shift=1.0),
    "gamma and beta": lambda: GammaBeta(32),
    "subclass of torch's": lambda: LayerNormPlusOne(32),
}


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_a_norm_has_the_gain_of_its_author_fresh_or_trained(make: Callable[[], nn.Module]) -> None:
    """A parameterization keeps the initial gain of a norm, and resets a trained one to it."""
    start = {name: value.clone() for name, value in make().state_dict().items()}
    fresh, trained = parts(norm=make(), head=nn.Linear(32, 5)), parts(norm=make(), head=nn.Linear(32, 5))
    with torch.no_grad():
        for parameter in trained["norm"].parameters():
            parameter.add_(torch.randn(parameter.shape))
    for model in (fresh, trained):
        assert roles_of(model)["head.weight"] is Role.HEAD
        assert all(torch.equal(value, start[name]) for name, value in model["norm"].state_dict().items())


@pytest.mark.parametrize("gain", [0.1, 0.0])
def test_a_norm_that_was_meant_to_start_small_does(gain: float) -> None:
    """A gain that its author set to another constant, e.g. for a branch that starts at zero, stays."""
    model = parts(first=RMSNorm(8), small=nn.LayerNorm(8), norm=nn.LayerNorm(8))
    nn.init.constant_(model["small"].weight, gain)
    parameterize(model, P.sp(), seed=0)
    assert torch.equal(model["small"].weight, torch.full((8,), gain))


def test_memory_that_no_author_filled_is_no_gain_of_zero() -> None:
    """After ``to_empty`` memory may be all zeros; torch's norms then start at one."""
    model = nn.ModuleDict({"norm1": nn.LayerNorm(8), "norm": nn.RMSNorm(8)}).to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    parameterize(model, P.sp(), seed=0)
    assert all(module.weight.eq(1.0).all() for module in model.values())


def test_a_trained_norm_that_cannot_be_tried_out_is_named() -> None:
    class FusedNorm(RMSNorm):
        def forward(self, x: Tensor, residual: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + residual) * gate

    model = parts(norm=FusedNorm(8))
    parameterize(model, P.sp(), seed=0)  # untrained, so its initial gain is known
    nn.init.normal_(model["norm"].weight)
    with pytest.raises(UserError, match=r"parameter 'norm.weight' \(FusedNorm\) was trained already.*'keep'") as caught:
        parameterize(model, P.sp(), seed=0)
    assert "\n" not in str(caught.value)
    before = model["norm"].weight.clone()
    parameterize(model, P.sp(), roles={"norm.weight": "keep"}, seed=0)
    assert torch.equal(model["norm"].weight, before)


def test_a_norm_without_weights_needs_no_role() -> None:
    model = parts(norm=nn.LayerNorm(8, elementwise_affine=False), fc1=nn.Linear(8, 8))
    assert roles_of(model) == {"fc1.weight": Role.HIDDEN, "fc1.bias": Role.BIAS}


# -- embeddings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("tied", [False, True])
def test_the_padding_row_stays_zero(kind: type[nn.Embedding] | type[nn.EmbeddingBag], tied: bool) -> None:
    """Also if the head, which shares the weight, comes first."""
    model = parts(head=nn.Linear(8, 10, bias=False), embed=kind(10, 8, padding_idx=3))
    if tied:
        model["head"].weight = model["embed"].weight
    assert roles_of(model)["head.weight" if tied else "embed.weight"] is Role.EMBEDDING
    weight = model["embed"].weight
    assert weight[3].abs().max() == 0.0
    assert int(weight.abs().sum(1).count_nonzero()) == 9


def test_a_frozen_table_of_positions_keeps_its_values() -> None:
    """Whisper's sinusoidal table is a frozen embedding."""
    positions = nn.Embedding(10, 8)
    positions.weight.requires_grad_(False)
    before = positions.weight.clone()
    assert roles_of(parts(embed=nn.Embedding(10, 8), embed_positions=positions))["embed_positions.weight"] is Role.KEEP
    assert torch.equal(positions.weight, before)


# -- keep --------------------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Parameters of state-space and similar layers besides their matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.arange(1.0, width + 1).log())
        self.D = nn.Parameter(torch.ones(width))
        self.dt_bias = nn.Parameter(torch.randn(width))
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.warmth = nn.Parameter(torch.tensor(0.7))
        self.layer_scale = nn.Parameter(torch.full((width,), 1e-4))
        self.conv1d = nn.Conv1d(width, width, 4, groups=width)
        self.dt_proj = nn.Linear(2, width)
        self.in_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)


def test_what_a_module_initialises_in_a_way_of_its_own_is_kept() -> None:
    """It keeps its values, and gets the plain learning rate and no decay under all rules."""
    model, base = parts(mixer=Mixer(32)), parts(mixer=Mixer(16))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rules = P.supar(16, embedding_lr_multiplier=3.0)
    parameterize(model, rules, base, seed=0)
    traits_of = assignment(model).traits_of
    drawn = {"mixer.in_proj.weight", "mixer.in_proj.bias", "mixer.out_proj.weight", "mixer.out_proj.bias"}
    assert {name for name, traits in traits_of.items() if traits.role is not Role.KEEP} == drawn
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in drawn), name
    groups = param_groups(model, rules, lr=0.5, weight_decay=0.1)
    kept = next(group for group in groups if group["name"] == "keep")
    assert (kept["lr"], kept["weight_decay"], len(kept["params"])) == (0.5, 0.0, len(traits_of) - 4)


def test_a_role_may_be_given_to_a_parameter_or_to_a_module() -> None:
    """The first matching glob wins; one for a module gives its bias a bias role, one for a parameter does not."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.special, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def given(**roles: str) -> dict[str, Role]:
        return roles_of(parts(odd=Odd()), roles={name.replace("_", "*"): role for name, role in roles.items()})

    assert given(odd="hidden") == {"odd.special": Role.HIDDEN, "odd.bias": Role.BIAS}
    assert given(_special="keep", odd="head") == {"odd.special": Role.KEEP, "odd.bias": Role.FINAL_BIAS}
    assert given(odd="keep") == {"odd.special": Role.KEEP, "odd.bias": Role.KEEP}
    assert given(_bias="keep", _special="output") == {"odd.special": Role.OUTPUT, "odd.bias": Role.KEEP}
    with pytest.raises(UserError, match=r"roles\['odd.specials'\] matches no module or parameter \(did you mean"):
        roles_of(parts(odd=Odd()), roles={"odd.specials": "keep"})
    with pytest.raises(
        UserError, match=r"parameter 'odd.special' \(Odd\) has no known role: pass roles=\{'odd': ROLE\}"
    ):
        roles_of(parts(odd=Odd()))


# -- heads, routers, experts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm_head", "score", "classifier", "qa_outputs", "output", "to_logits"])
def test_heads_are_those_that_stay_dense_by_default(name: str) -> None:
    assert roles_of(parts(fc1=nn.Linear(8, 8), **{name: nn.Linear(8, 3)}))[f"{name}.weight"] is Role.HEAD


def test_a_router_and_the_heads_of_attention_are_no_output_heads() -> None:
    """A router reads the residual stream, so it is a hidden matrix; so is a projection in a list called heads."""
    inner = parts(heads=nn.ModuleList(parts(key=nn.Linear(8, 4)) for _ in range(2)), proj=nn.Linear(8, 8))
    model = parts(sa=inner, mlp=parts(router=nn.Linear(8, 4), experts=nn.ModuleList([parts(w1=nn.Linear(8, 8))])))
    found = roles_of(model, roles={"sa.proj": "output"})
    assert found["sa.heads.0.key.weight"] is Role.HIDDEN
    assert found["mlp.router.weight"] is Role.HIDDEN
    assert Role.HEAD not in found.values()


class Experts(nn.Module):
    """Experts in one tensor each, [E, in, out], without an attribute that says so."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, width, 2 * inner))
        self.down_proj = nn.Parameter(torch.zeros(2, inner, width))


def test_a_stack_that_does_not_say_which_way_it_is_stored_is_asked_for_where_it_matters() -> None:
    """If both dimensions grow alike, m_d is the same; if not, the message says how to give the layout."""
    traits_of = assignment(
        parameterize(parts(experts=Experts(32, 64)), P.mup(16), parts(experts=Experts(16, 32)))
    ).traits_of
    assert {traits.m_d for traits in traits_of.values()} == {2.0}
    model, base = parts(experts=Experts(32, 24)), parts(experts=Experts(16, 24))
    with pytest.raises(
        UserError, match=r"'experts.gate_up_proj' is a stack of matrices .32, 48., .*pass fan_in=\{'experts"
    ):
        parameterize(model, P.mup(16), base)
    traits_of = assignment(parameterize(model, P.mup(16), base, fan_in={"*_proj": -2})).traits_of
    assert (traits_of["experts.gate_up_proj"].m_d, traits_of["experts.down_proj"].m_d) == (2.0, 1.0)
    for wrong, words in (
        ({"*_proj": 3}, "has 3 dimensions, so there is no dimension"),
        ({"no": 0}, r"fan_in\['no'\] matches no"),
    ):
        with pytest.raises(UserError, match=words):
            parameterize(model, P.mup(16), base, fan_in=wrong)


@pytest.mark.parametrize(
    ("make", "m_d"),
    [
        (lambda width: nn.Conv1d(width, width, 3, groups=4), 4.0),
        (lambda width: nn.Conv2d(3, width, 4, 4), 1.0),
        (lambda width: nn.ConvTranspose1d(width, 2 * width, 4, stride=2, groups=2), 4.0),
        (lambda width: nn.ConvTranspose1d(width, 8, 3), 4.0),
        (lambda width: nn.Bilinear(width, 8, 8), 4.0),
        (lambda width: nn.Bilinear(width, width, 8), 16.0),
    ],
)
def test_m_d_counts_what_one_output_sees(make: Callable[[int], nn.Module], m_d: float) -> None:
    """The oracle is the module itself: the ratio of output variances for weights of unit variance."""

    def variance(module: nn.Module) -> float:
        nn.init.normal_(module.weight)  # type: ignore[arg-type]
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        if isinstance(module, nn.Bilinear):
            x = (torch.randn(4096, module.in1_features), torch.randn(4096, module.in2_features))
        else:
            sides = (16,) * len(module.kernel_size)  # type: ignore[arg-type]
            x = (torch.randn(64, module.in_channels, *sides),)  # type: ignore[assignment,arg-type]
        with torch.no_grad():
            y: Tensor = module(*x)
        return float((y[..., 4:-4] if y.ndim == 3 else y).var())

    torch.manual_seed(0)
    rules, base = P.mup(16), parts(embed=nn.Embedding(5, 16), layer=make(16))
    model = parameterize(
        parts(embed=nn.Embedding(5, 64), layer=make(64)), rules, base, roles={"layer": "hidden"}, seed=0
    )
    assert assignment(model).traits_of["layer.weight"].m_d == m_d
    assert variance(make(64)) / variance(make(16)) == pytest.approx(m_d, rel=0.25)


def test_a_recurrent_layer_has_the_fan_in_of_each_of_its_matrices() -> None:
    make = lambda width: parts(rnn=nn.LSTM(10, width, 2))  # noqa: E731
    traits_of = assignment(parameterize(make(32), P.mup(16), make(16), roles={"rnn": "hidden"}, seed=0)).traits_of
    found = {name.removeprefix("rnn."): (traits.role, traits.m_d) for name, traits in traits_of.items()}
    assert found["weight_ih_l0"] == (Role.HIDDEN, 1.0)
    assert found["weight_hh_l0"] == found["weight_ih_l1"] == (Role.HIDDEN, 2.0)
    assert found["bias_ih_l0"] == found["bias_hh_l1"] == (Role.BIAS, 2.0)


def test_sgd_steps_by_which_side_of_a_matrix_grows() -> None:
    """The gradient of an output falls as 1 / m_out, and a matrix has m_d inputs: eta m_out / m_d."""

    def make(width: int) -> Any:
        return parts(
            input=nn.Linear(10, width, bias=False), fc1=nn.Linear(width, width, bias=False), router=nn.Linear(width, 4)
        )

    rules = P.mup(16, optimizer="sgd")
    model = parameterize(make(64), rules, make(16), roles={"input": "embedding"}, seed=0)
    rates = {id(p): group["lr"] for group in param_groups(model, rules, lr=1.0) for p in group["params"]}
    assert [rates[id(model[name].weight)] for name in ("input", "fc1", "router")] == [4.0, 1.0, 0.25]
    as_hidden = parameterize(make(64), rules, make(16), roles={"input": "hidden"}, seed=0)
    rates = {id(p): group["lr"] for group in param_groups(as_hidden, rules, lr=1.0) for p in group["params"]}
    assert rates[id(as_hidden["input"].weight)] == 4.0


def test_a_computed_weight_is_named() -> None:
    """Weight norm and parametrizations hold other tensors than the weight, and drawing those would be wrong."""
    normed = parts(fc1=nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(UserError, match=r"the weight of 'fc1' is computed .*call parameterize before that"):
        parameterize(normed, P.sp(), seed=0)
