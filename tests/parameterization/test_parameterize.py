"""`parameterize` on foreign models: roles, forward multipliers as hooks, initial values."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from math import sqrt
from typing import Any

import pytest
import torch
from tiny_models import RULES, VOCAB, gpt2, mlp
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.parameterization import (
    Parameterization,
    Role,
    TensorTraits,
    assignment,
    initialise,
    param_groups,
    parameterize,
)
from sparsetrain.sparsity import SparseLinear, densify, sparse_layers, sparsify

P = Parameterization
MLP_ROLES = {"0": "embedding", "2": "hidden", "4": "head"}


def llama(width: int = 32) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def logits(model: nn.Module) -> Tensor:
    tokens = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


# -- roles -----------------------------------------------------------------------------------------------------------


def test_roles_and_multipliers_of_gpt2() -> None:
    model = parameterize(sparsify(gpt2(), 0.75, seed=0), RULES, gpt2(16), seed=0)
    expected: dict[str, TensorTraits] = {
        "transformer.wte.weight": TensorTraits(Role.EMBEDDING, 2.0),
        "transformer.wpe.weight": TensorTraits(Role.POSITION, 2.0),
        "transformer.ln_f.weight": TensorTraits(Role.FINAL_NORM, 2.0),
        "transformer.ln_f.bias": TensorTraits(Role.FINAL_BIAS, 2.0),
    }
    for block in ("transformer.h.0.", "transformer.h.1."):
        for norm in ("ln_1", "ln_2"):
            expected[f"{block}{norm}.weight"] = TensorTraits(Role.NORM, 2.0)
            expected[f"{block}{norm}.bias"] = TensorTraits(Role.BIAS, 2.0)
        for name, role in (
            ("attn.c_attn", Role.HIDDEN),
            ("mlp.c_fc", Role.HIDDEN),
            ("attn.c_proj", Role.OUTPUT),
            ("mlp.c_proj", Role.OUTPUT),
        ):
            expected[f"{block}{name}.values"] = TensorTraits(role, 2.0, 0.25)
            expected[f"{block}{name}.bias"] = TensorTraits(Role.BIAS, 2.0)
    assert assignment(model).traits_of == expected
    assert assignment(model).depth == 2


def test_roles_and_multipliers_of_llama() -> None:
    model = parameterize(llama(), P.mup(16), llama(16), seed=0)
    roles = {name: traits.role for name, traits in assignment(model).traits_of.items()}
    expected = {"model.embed_tokens": Role.EMBEDDING, "model.norm": Role.FINAL_NORM, "lm_head": Role.HEAD}
    for block in ("model.layers.0.", "model.layers.1."):
        expected |= {f"{block}{norm}": Role.NORM for norm in ("input_layernorm", "post_attention_layernorm")}
        expected |= {f"{block}self_attn.{part}_proj": Role.HIDDEN for part in "qkv"}
        expected |= {f"{block}mlp.{part}_proj": Role.HIDDEN for part in ("gate", "up")}
        expected |= {f"{block}self_attn.o_proj": Role.OUTPUT, f"{block}mlp.down_proj": Role.OUTPUT}
    assert roles == {f"{name}.weight": role for name, role in expected.items()}
    assert {traits.m_d for traits in assignment(model).traits_of.values()} == {2.0}


def test_a_norm_inside_a_numbered_block_is_not_the_final_one() -> None:
    # OPT calls both of them final_layer_norm.
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        ffn_dim=32,
        num_attention_heads=2,
        max_position_embeddings=8,
        word_embed_proj_dim=16,
    )
    traits_of: Any = assignment(parameterize(OPTForCausalLM(config), P.sp(), seed=0)).traits_of
    assert traits_of["model.decoder.layers.0.final_layer_norm.weight"].role is Role.NORM
    assert traits_of["model.decoder.final_layer_norm.weight"].role is Role.FINAL_NORM
    assert traits_of["model.decoder.embed_positions.weight"].role is Role.POSITION


def test_roles_of_a_plain_mlp_are_given_by_name() -> None:
    with pytest.raises(UserError, match=r"parameter '0.weight' \(Linear\) has no known role: pass roles=\{'0': ROLE\}"):
        parameterize(mlp(), P.mup(16), mlp(16))
    model = parameterize(mlp(), P.mup(16), mlp(16), roles=MLP_ROLES, seed=0)
    assert assignment(model).traits_of == {
        "0.weight": TensorTraits(Role.EMBEDDING, 1.0),
        "0.bias": TensorTraits(Role.BIAS, 2.0),  # its own length, not what its matrix reads
        "2.weight": TensorTraits(Role.HIDDEN, 2.0),
        "2.bias": TensorTraits(Role.BIAS, 2.0),
        "4.weight": TensorTraits(Role.HEAD, 2.0),
        "4.bias": TensorTraits(Role.FINAL_BIAS, 1.0),
    }


def test_modules_with_other_parameter_names_take_a_role_too() -> None:
    class Model(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.zeros(3, width))
            self.attend = nn.MultiheadAttention(width, 2)

    roles = {"attend": "hidden", "": "prompt"}
    assert assignment(parameterize(Model(32), P.mup(16), Model(16), roles=roles, seed=0)).traits_of == {
        "query": TensorTraits(Role.PROMPT, 2.0),
        "attend.in_proj_weight": TensorTraits(Role.HIDDEN, 2.0),
        "attend.in_proj_bias": TensorTraits(Role.BIAS, 2.0),
        "attend.out_proj.weight": TensorTraits(Role.OUTPUT, 2.0),
        "attend.out_proj.bias": TensorTraits(Role.BIAS, 2.0),
    }


def test_fan_in_of_a_convolution_counts_its_kernel() -> None:
    def model(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv1d(width, 2 * width, 3))

    traits_of = assignment(parameterize(model(64), P.mup(96), model(32), roles={"0": "hidden"}, seed=0)).traits_of
    assert traits_of["0.weight"].m_d == 2.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parameterize(gpt2(), P.mup(16)), "parameterize: mup needs base=, the same model at the base width"),
        (
            lambda: parameterize(gpt2(16), P.mup(32), gpt2(32)),
            r"the base is wider than the model: '.*wte' has 32 there",
        ),
        (lambda: Transformer(ModelConfig(16, 1, 2, VOCAB), P.mup(32)), r"base_width=32 is wider than .*d_model=16"),
        (
            lambda: parameterize(gpt2(), P.mup(24), gpt2(16)),
            r"no module of the base model has the width base_width=24 .* 16, 64\)",
        ),
        (lambda: parameterize(gpt2(), P.mup(16), llama(16)), "the base model has no module 'transformer.wte'"),
        (lambda: parameterize(mlp(), P.sp(), roles={"*": "hiden"}), r"roles\['\*'\]='hiden' is not one of .*'hidden'"),
        (lambda: parameterize(gpt2(), P.sp(), roles={"wet": "head"}), r"roles\['wet'\] matches no module"),
    ],
)
def test_what_cannot_be_parameterized_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


# -- forward multipliers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, llama])
def test_hooks_equal_the_multipliers_put_into_the_weights(make: Callable[..., Any]) -> None:
    model = parameterize(make(), RULES, make(16), reinitialise=False)
    # The oracle has no hooks: its copy of the weights contains the factors, with an untied head.
    reference = copy.deepcopy(make())
    reference.load_state_dict(model.state_dict())
    reference.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * (3.0 / 2.0))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if any(part in name for part in (".wte.", ".wpe.", "embed_tokens")):
                parameter.mul_(2.0)
            if any(part in name for part in ("c_proj", "o_proj", "down_proj")):
                parameter.mul_(1 / sqrt(2))
    torch.testing.assert_close(logits(model), logits(reference))
    assert not torch.allclose(logits(model), logits(make()), atol=1e-3)


def test_hooks_are_idempotent_and_follow_the_last_rules() -> None:
    model = parameterize(gpt2(), RULES, gpt2(16), seed=0)
    once = logits(model)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    parameterize(model, RULES, gpt2(16), seed=0)
    assert torch.equal(logits(model), once)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert sum(hooks) == 2 + 4 + 1
    parameterize(model, P.sp(), seed=0)
    assert not any(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_hooks_and_roles_survive_copies(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = parameterize(sparsify(gpt2(), 0.5, seed=0), RULES, gpt2(16), seed=0)
    other = duplicate(model)
    assert torch.equal(logits(other), logits(model))
    groups = [param_groups(m, RULES, lr=0.1) for m in (model, other)]
    assert [g["name"] for g in groups[0]] == [g["name"] for g in groups[1]]
    assert {id(p) for g in groups[1] for p in g["params"]} == {id(p) for p in other.parameters()}


def test_a_transformer_parameterized_after_surgery_equals_one_built_so() -> None:
    def build(rules: Parameterization, sparsity: float) -> Transformer:
        return Transformer(ModelConfig(32, 2, 2, VOCAB, seed=0, sparsity=sparsity, init_std=0.1), rules)

    built = build(RULES, 0.75)
    changed = parameterize(sparsify(build(P.sp(), 0.0), 0.75, seed=0), RULES, seed=0)
    tokens = torch.randint(0, VOCAB, (2, 9))
    assert torch.equal(changed(tokens), built(tokens))
    assert not torch.allclose(changed(tokens), build(P.sp(), 0.75)(tokens))
    for ours, theirs in zip(param_groups(changed, RULES, lr=1.0), param_groups(built, RULES, lr=1.0), strict=True):
        assert {**ours, "params": len(ours["params"])} == {**theirs, "params": len(theirs["params"])}


def test_densify_after_parameterize_keeps_the_function() -> None:
    model = parameterize(sparsify(gpt2(), 0.5, seed=0), RULES, gpt2(16), seed=0)
    expected = logits(model)
    torch.testing.assert_close(logits(densify(model)), expected)
    # And again under the roles that a dense model needs.
    parameterize(model, RULES, gpt2(16), reinitialise=False)
    torch.testing.assert_close(logits(model), expected)
    param_groups(model, RULES, lr=0.1)


def test_without_reinitialise_the_weights_stay() -> None:
    model = gpt2()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameterize(model, RULES, gpt2(16), reinitialise=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_attributes_of_the_users_model_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.depth, model.rules = "mine", [1]  # type: ignore[assignment]
    parameterize(model, P.sp(), roles={"0": "hidden"}, seed=0)
    assert (model.depth, model.rules) == ("mine", [1])


# -- initial values --------------------------------------------------------------------------------------------------


def test_measured_std_of_each_role_of_gpt2() -> None:
    rules = P.supar(32, 0.5)
    model = parameterize(sparsify(gpt2(128), 0.75, seed=0), rules, gpt2(32), sigma=0.1, seed=0)
    matrix = 0.1 / sqrt(4 * 0.5)  # m_d = 4, m_rho = 0.25 / 0.5
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if ".ln_" in name:
            assert torch.equal(values, torch.full_like(values, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert torch.count_nonzero(values) == 0
        else:
            std = matrix / sqrt(2 * 2) if "c_proj" in name else matrix if ".h." in name else 0.1
            # 5 standard errors of the standard deviation of as many draws.
            assert float(values.std()) == pytest.approx(std, rel=5 / sqrt(2 * values.numel())), name
            assert abs(float(values.mean())) < 5 * std / sqrt(values.numel()), name


@pytest.mark.parametrize("make", [gpt2, llama])
def test_sparse_and_dense_models_share_their_draws(make: Callable[..., Any]) -> None:
    # Under muP the density changes no standard deviation, so the numbers are equal.
    dense = parameterize(make(), P.mup(16), make(16), seed=3)
    sparse = parameterize(sparsify(make(), 0.6, seed=0), P.mup(16), make(16), seed=3)
    compared = 0
    for name, layer in sparse_layers(sparse):
        module = dense.get_submodule(name)
        weight: Any = module.weight
        weight = weight if isinstance(module, nn.Linear) else weight.t()
        assert torch.equal(layer.values, layer.pattern.gather(weight)), name
        compared += 1
    assert compared >= 8
    # Under SuPar they differ only by the factor of the density.
    scaled = parameterize(sparsify(make(), 0.6, seed=0), P.supar(16), make(16), seed=3)
    for (_, a), (_, b) in zip(sparse_layers(scaled), sparse_layers(sparse), strict=True):
        torch.testing.assert_close(a.values, b.values / sqrt(a.pattern.density))


def test_a_bare_sparse_layer_shares_the_draws_of_a_bare_linear_layer() -> None:
    linear, sparse = nn.Linear(16, 16, bias=False), SparseLinear(16, 16, density=0.5, bias=False, seed=0)
    initialise(linear, {"weight": TensorTraits(Role.HIDDEN)}, P.sp(), 0.1, 1, seed=0)
    initialise(sparse, {"values": TensorTraits(Role.HIDDEN, 1.0, 0.5)}, P.sp(), 0.1, 1, seed=0)
    assert torch.equal(sparse.values, sparse.pattern.gather(linear.weight))


def test_initial_values_depend_on_seed_and_name_only() -> None:
    first, other = mlp(), nn.Sequential(*mlp(), nn.Linear(5, 5))
    parameterize(first, P.sp(), roles=MLP_ROLES, seed=0)
    torch.set_default_dtype(torch.float64)
    try:
        parameterize(other, P.sp(), roles={**MLP_ROLES, "5": "head"}, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))
    assert not torch.equal(first[2].weight, parameterize(mlp(), P.sp(), roles=MLP_ROLES, seed=1)[2].weight)  # type: ignore[index]


def test_without_a_seed_initial_values_follow_the_global_generator() -> None:
    drawn = []
    for seed in (3, 3, 4):
        model = mlp()
        torch.manual_seed(seed)
        drawn.append(parameterize(model, P.sp(), roles=MLP_ROLES)[2].weight)  # type: ignore[index]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_parameter_without_a_spec_is_named() -> None:
    with pytest.raises(UserError, match=r"parameter 'bias' has no role; 1 of \d+ parameters have none"):
        initialise(nn.Linear(2, 2), {"weight": TensorTraits(Role.HIDDEN)}, P.sp(), 0.1, 1, seed=0)
