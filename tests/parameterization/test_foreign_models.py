"""Models of transformers, one row each: depth, roles and multipliers are right, or one line says what to do."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from sparsetrain.errors import UserError
from sparsetrain.parameterization import Parameterization, Role, assignment, param_groups, parameterize
from sparsetrain.sparsity import sparsify

P = Parameterization
VOCAB, LAYERS = 61, 2
MUP = P.mup(16, wd_rule="coupled")
# m_L = 2: residual branches are multiplied by 1/2.
DEEP = P.completep(16, base_layers=1)
POST_NORM = "is normalised after the addition .*: the depth multiplier .* use rules without depth, or base_layers"


def decoder(width: int, **options: Any) -> dict[str, Any]:
    """Return the fields that most decoders share: heads of width 8 at every model width."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": width // 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **options,
    }


def encoder(width: int, **options: Any) -> dict[str, Any]:
    fields = decoder(width, max_position_embeddings=16, **options)
    return {key: value for key, value in fields.items() if key not in ("num_key_value_heads", "head_dim")}


def gpt2(width: int) -> nn.Module:
    sizes = {"n_embd": width, "n_layer": LAYERS, "n_head": width // 8, "n_positions": 16}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, **sizes))


def opt(width: int, **options: Any) -> nn.Module:
    return hf.OPTForCausalLM(hf.OPTConfig(**encoder(width, ffn_dim=2 * width, **options)))


def t5(width: int) -> nn.Module:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": LAYERS, "num_heads": width // 8}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes))


def qwen3_next(width: int) -> nn.Module:
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": width // 8, "linear_key_head_dim": 8}
    experts = {"num_experts": 4, "moe_intermediate_size": width, "shared_expert_intermediate_size": width}
    kinds = ["linear_attention", "full_attention"]
    fields = decoder(width, linear_value_head_dim=8, layer_types=kinds, **sizes, **experts)
    return hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**fields))


def mamba(width: int) -> nn.Module:
    fields = {"vocab_size": VOCAB, "hidden_size": width, "num_hidden_layers": LAYERS, "state_size": 8}
    return hf.MambaForCausalLM(hf.MambaConfig(**fields, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def vit(width: int) -> nn.Module:
    fields = {"hidden_size": width, "num_hidden_layers": LAYERS, "num_attention_heads": width // 8}
    return hf.ViTForImageClassification(hf.ViTConfig(**fields, intermediate_size=64, image_size=8, patch_size=4))


class Row(NamedTuple):
    """What parameterize does with one model.

    Args:
        branches: number of branch ends that the depth multiplier reaches, by the last part of their names; or the words
            with which a depth rule is refused.
        keep: last parts of the parameters that keep their values.
        head: last parts of the modules that are the head.
    """

    make: Callable[[int], nn.Module]
    branches: dict[str, int] | str
    keep: frozenset[str] = frozenset()
    head: str = "lm_head"
    depth: int = LAYERS


LLAMA_BRANCHES = {"o_proj": LAYERS, "down_proj": LAYERS}
NORM_BRANCHES = {"post_attention_layernorm": LAYERS, "post_feedforward_layernorm": LAYERS}
MOE_BRANCHES = {"o_proj": LAYERS, "experts": LAYERS}
MODELS: dict[str, Row] = {
    "gpt2": Row(gpt2, {"c_proj": 2 * LAYERS}),
    "llama": Row(lambda width: hf.LlamaForCausalLM(hf.LlamaConfig(**decoder(width))), LLAMA_BRANCHES),
    "opt": Row(lambda width: opt(width, word_embed_proj_dim=width), {"out_proj": LAYERS, "fc2": LAYERS}),
    "opt like 350m": Row(lambda width: opt(width, word_embed_proj_dim=8, do_layer_norm_before=False), POST_NORM),
    "bert": Row(lambda width: hf.BertForMaskedLM(hf.BertConfig(**encoder(width))), POST_NORM, head="decoder"),
    "albert": Row(
        lambda width: hf.AlbertForMaskedLM(hf.AlbertConfig(**encoder(width, embedding_size=16))),
        POST_NORM,
        head="decoder",
    ),
    "t5": Row(t5, {"o": 3 * LAYERS, "wo": 2 * LAYERS}, frozenset({"relative_attention_bias.weight"})),
    "gemma": Row(lambda width: hf.GemmaForCausalLM(hf.GemmaConfig(**decoder(width))), LLAMA_BRANCHES),
    "gemma2": Row(lambda width: hf.Gemma2ForCausalLM(hf.Gemma2Config(**decoder(width))), NORM_BRANCHES),
    "gemma3": Row(lambda width: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**decoder(width))), NORM_BRANCHES),
    "mixtral": Row(
        lambda width: hf.MixtralForCausalLM(hf.MixtralConfig(**decoder(width, num_local_experts=4))), MOE_BRANCHES
    ),
    "gpt-oss": Row(
        lambda width: hf.GptOssForCausalLM(hf.GptOssConfig(**decoder(width, num_local_experts=4))),
        MOE_BRANCHES,
        frozenset({"self_attn.sinks"}),
    ),
    "qwen3-next": Row(
        qwen3_next,
        {"o_proj": 1, "out_proj": 1, "experts": LAYERS, "down_proj": LAYERS},
        frozenset({"conv1d.weight", "linear_attn.A_log", "linear_attn.dt_bias"}),
    ),
    "mamba": Row(
        mamba,
        {"mixer": LAYERS},
        frozenset({"mixer.A_log", "mixer.D", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias"}),
    ),
    "vit": Row(vit, {"o_proj": LAYERS, "fc2": LAYERS}, head="classifier"),
}


def factors(model: nn.Module) -> dict[str, list[float]]:
    """Return the factor of each multiplier, by the last component of its module's name."""
    found: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            found.setdefault(name.rpartition(".")[2], []).append(hook.factor)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("row", MODELS.values(), ids=MODELS)
def test_what_parameterize_does_with_models_of_transformers(row: Row) -> None:
    """Depth, kept tensors, the head, and the places of multipliers; norms keep their gain."""
    model, base = row.make(32), row.make(16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    norms = {name for name, m in model.named_modules() if "Norm" in type(m).__name__}
    parameterize(model, MUP, base, seed=0)
    recorded = assignment(model)
    assert recorded.depth == row.depth
    kept = {name for name, traits in recorded.traits_of.items() if traits.role is Role.KEEP}
    assert {".".join(name.split(".")[-2:]) for name in kept} == row.keep
    for name, parameter in model.named_parameters():
        gain = name.rpartition(".")[0] in norms and name.endswith("weight")
        if name in kept or gain:
            assert torch.equal(parameter, before[name]), name
        elif "bias" not in name:
            assert not torch.equal(parameter, before[name]), name
    # Under muP only the head has a multiplier, 1 / m_d, unless the model's own code multiplies.
    assert set(factors(model)) <= {row.head, "embed_tokens"}
    assert sum(len(g["params"]) for g in param_groups(model, MUP, lr=1.0)) == len(list(model.parameters()))
    if isinstance(row.branches, str):
        with pytest.raises(UserError, match=row.branches):
            parameterize(model, DEEP, base, reinitialise=False)
        return
    parameterize(model, DEEP, base, reinitialise=False)
    ends = {name: found for name, found in factors(model).items() if name not in (row.head, "embed_tokens")}
    assert {name: len(found) for name, found in ends.items()} == row.branches
    assert {factor for found in ends.values() for factor in found} == {0.5}


def embedded(model: Any) -> Tensor:
    with torch.no_grad():
        return model.get_input_embeddings()(torch.arange(VOCAB))


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3"])
def test_the_embeddings_of_gemma_keep_the_scale_of_the_base(kind: str) -> None:
    """Its own factor sqrt(d_model) would let the residual stream grow with the width; under SP it stays."""
    model, base = MODELS[kind].make(64), MODELS[kind].make(16)
    parameterize(model, MUP, base, seed=0)
    weight: Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    torch.testing.assert_close(embedded(model), weight * sqrt(16))
    parameterize(model, P.sp(), seed=0)
    weight = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    torch.testing.assert_close(embedded(model), weight * sqrt(64))


def test_the_logits_of_t5_are_divided_by_the_width_once() -> None:
    """T5 multiplies the input of its tied head by d_model^-0.5; with the hook the factor is 16^-0.5 / m_d."""
    model: Any = parameterize(t5(64), MUP, t5(16), seed=0).eval()
    seen: list[Tensor] = []
    model.decoder.final_layer_norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        logits = model(input_ids=tokens, decoder_input_ids=tokens).logits
        torch.testing.assert_close(logits, seen[0] @ model.shared.weight.T * (16**-0.5 / 4.0))


def test_alpha_in_acts_behind_the_norm_of_the_embeddings_and_on_no_table_inside_a_block() -> None:
    """A norm right after the embeddings would cancel it (BERT); T5's table of position biases is not an embedding."""
    rules = P.mup(16, alpha_in=3.0)
    bert = parameterize(MODELS["bert"].make(32), rules, MODELS["bert"].make(16), seed=0)
    assert factors(bert) == {"LayerNorm": [3.0], "decoder": [0.5]}
    model: Any = parameterize(t5(32), rules, t5(16), seed=0)
    found = factors(model)
    assert found.pop("lm_head") == [pytest.approx(sqrt(0.5))]
    assert found == {"shared": [3.0], "embed_tokens": [3.0, 3.0]} or found == {"shared": [3.0]}
    with pytest.raises(UserError, match=r"alpha_in=3 cannot reach parameter 'vit.embeddings.cls_token', which ViT"):
        parameterize(vit(32), rules, vit(16), seed=0)


def test_experts_that_are_stored_in_out_are_measured_along_their_inputs() -> None:
    """GPT-OSS stores [experts, in, out]; with a constant inner width, m_d differs between the dimensions."""

    def make(width: int) -> nn.Module:
        return hf.GptOssForCausalLM(hf.GptOssConfig(**{**decoder(width, num_local_experts=2), "intermediate_size": 24}))

    traits_of = assignment(parameterize(make(32), MUP, make(16), seed=0)).traits_of
    experts = "model.layers.0.mlp.experts."
    assert (traits_of[f"{experts}gate_up_proj"].m_d, traits_of[f"{experts}down_proj"].m_d) == (2.0, 1.0)
    assert traits_of[f"{experts}gate_up_proj"].role is Role.HIDDEN
    assert traits_of[f"{experts}down_proj"].role is Role.OUTPUT
    assert traits_of[f"{experts}down_proj_bias"].role is Role.BIAS
    router = traits_of["model.layers.0.mlp.router.weight"]
    assert (router.role, router.m_d) == (Role.HIDDEN, 2.0)


def test_matrices_around_the_blocks_have_no_depth_factor() -> None:
    """OPT-350m's projections into and out of the blocks are hidden matrices that depth does not affect."""
    make = MODELS["opt like 350m"].make
    model = parameterize(make(32), P.completep(16, base_layers=LAYERS, alpha=0.5), make(16), seed=0)
    traits_of = assignment(model).traits_of
    around = {name for name, traits in traits_of.items() if not traits.in_block}
    assert around == {"model.decoder.project_in.weight", "model.decoder.project_out.weight"}
    assert traits_of["model.decoder.project_out.weight"].m_d == 2.0
    rules = P.completep(16, base_layers=1, alpha=0.5)
    assert rules.learning_rate(traits_of["model.decoder.project_out.weight"], 1.0, LAYERS) == 0.5
    assert rules.learning_rate(traits_of["model.decoder.layers.0.fc1.weight"], 1.0, LAYERS) == pytest.approx(
        sqrt(0.5) / 2
    )


def test_a_model_on_the_meta_device_gets_roles_and_multipliers_without_values() -> None:
    """A model can be examined before its memory is allocated."""
    with torch.device("meta"):
        model, base = MODELS["gemma"].make(64), MODELS["gemma"].make(16)
    parameterize(model, DEEP, base, seed=0)
    assert factors(model)["embed_tokens"] == [0.5]
    assert factors(model)["lm_head"] == [0.25]
    assert sum(len(g["params"]) for g in param_groups(model, DEEP, lr=1.0)) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_sparse_experts_share_the_rates_and_the_numbers_of_the_dense_stack(kind: str) -> None:
    """Each expert's layer replaces a slice of the tensor in the dense model, in the model and in the base."""
    make = MODELS[kind].make
    dense, sparse = make(32), sparsify(make(32), 0.5, seed=0)
    for base in (make(16), sparsify(make(16), 0.5, seed=0)):
        for model in (dense, sparse):
            parameterize(model, MUP, base, seed=0)
    rates = [{id(p): g["lr"] for g in param_groups(m, MUP, lr=1.0) for p in g["params"]} for m in (dense, sparse)]
    stack: Any = dense.get_submodule("model.layers.0.mlp.experts")
    held: Any = sparse.get_submodule("model.layers.0.mlp.experts")
    for leaf in ("gate_up_proj", "down_proj"):
        layer, whole = getattr(held, f"{leaf}_layers")[1], getattr(stack, leaf)
        assert rates[1][id(layer.values)] == rates[0][id(whole)] == 0.5
        matrix = whole[1].t() if stack.is_transposed else whole[1]
        assert torch.equal(layer.values, layer.pattern.gather(matrix.detach().contiguous()))
    parameterize(sparse, DEEP, make(16), reinitialise=False)
    assert factors(sparse)["experts"] == [0.5] * LAYERS
