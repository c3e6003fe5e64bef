"""Stretched positions against the transformers library, and the same factor on every path of a forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor
from transformers import (
    BloomConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
)
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
from transformers.models.mpt import modeling_mpt
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

import sparsetrain as st
from sparsetrain.errors import UserError
from sparsetrain.models import KVCache, ModelConfig, SoftPrompt, Transformer, attention
from sparsetrain.models.attention import Attention, make_span
from sparsetrain.models.prompted import Prompted

Scramble = Callable[[PreTrainedModel], Mapping[str, Tensor]]
State = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

VOCAB, LAYERS, TRAINED = 61, 2, 16
EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
KINDS: dict[str, dict[str, Any]] = {
    "alibi": {},
    "alibi of six heads": {"n_heads": 6, "n_kv_heads": 2},
    "linear": {"positions": "rope"},
    "ntk": {"positions": "rope", "rope_scaling": "ntk", "n_kv_heads": 1},
    "yarn": {"positions": "rope", "rope_scaling": "yarn", "rope_fraction": 0.5},
}


def build(**options: Any) -> Transformer:
    shape = {"d_model": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB, "max_context": TRAINED, "seed": 0}
    return Transformer(ModelConfig(**{**shape, "init_std": 0.2, **options})).eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, 3 * TRAINED), generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------------------------------------------- other libraries


@pytest.mark.parametrize("n_heads", range(1, 33))
def test_slopes_are_those_of_bloom_and_of_mpt(n_heads: int) -> None:
    bloom = build_alibi_tensor(torch.ones(1, 2), n_heads, torch.float32).view(n_heads, 2)[:, 1]  # at position 1
    torch.testing.assert_close(st.alibi_slopes(n_heads).float(), bloom)
    mpt = -build_mpt_alibi_tensor(n_heads, 2).view(n_heads, 2)[:, 0]  # at distance 1
    torch.testing.assert_close(st.alibi_slopes(n_heads).float(), mpt)


@pytest.mark.parametrize("n_heads", [0, -2, True, 2.0, "4"])
def test_slopes_of_no_number_of_heads_are_refused(n_heads: Any) -> None:
    with pytest.raises(UserError, match=r"n_heads=.* is not a positive integer"):
        st.alibi_slopes(n_heads)


@pytest.mark.parametrize("n_heads", [4, 6])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_alibi_attention_matches_transformers_bloom(n_heads: int, factor: float) -> None:
    length, width = 40, 8 * n_heads
    theirs = BloomAttention(BloomConfig(hidden_size=width, n_head=n_heads, hidden_dropout=0.0), layer_idx=0).eval()
    config = ModelConfig(width, 1, n_heads, VOCAB, bias=True, positions_scale=factor)
    ours = Attention(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 4)
        # Bloom's rows are query, key and value of a head, then those of the next one.
        for name, tensor in ours.qkv.named_parameters():
            other = theirs.query_key_value.get_parameter(name)
            tensor.copy_(rearrange(other, "(h three d) ... -> (three h d) ...", three=3, d=8))
        ours.out.load_state_dict(theirs.dense.state_dict())
        x = torch.randn(2, length, width)
        alibi = build_alibi_tensor(torch.ones(2, length), n_heads, torch.float32) / factor
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        expected = theirs(x, torch.zeros_like(x), alibi, mask)[0]
        actual = ours(x, make_span(config, ours.scale, x, 0))
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("n_heads", [4, 6])
def test_stretched_alibi_matches_transformers_mpt_with_divided_slopes(
    n_heads: int, tokens: Tensor, scramble: Scramble, mpt_state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def divided(*given: Any, **named: Any) -> Tensor:
        return build_mpt_alibi_tensor(*given, **named) / 3.0

    monkeypatch.setattr(modeling_mpt, "build_mpt_alibi_tensor", divided)
    theirs = MptForCausalLM(
        MptConfig(vocab_size=VOCAB, d_model=48, n_heads=n_heads, n_layers=LAYERS, expansion_ratio=4, max_seq_len=64)
    )
    source = scramble(theirs)
    for scale in (3.0, "dynamic"):
        ours = build(n_heads=n_heads, positions_scale=scale)
        ours.load_state_dict(mpt_state(source))
        _assert_same_logits(ours, theirs, tokens)


def _assert_same_logits(ours: Transformer, theirs: PreTrainedModel, tokens: Tensor) -> None:
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, **EXACT)
    assert expected.std() > 0.1  # nearly constant logits would match trivially


# Lengths of one third, the whole and three times the trained length. Transformers' dynamic NTK follows the length.
@pytest.mark.parametrize("length", [TRAINED // 3, TRAINED, 3 * TRAINED])
@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"positions_scale": 3.0}, {"rope_type": "linear", "factor": 3.0}),
        ({"positions_scale": "dynamic", "rope_scaling": "ntk"}, {"rope_type": "dynamic", "factor": 1.0}),
        ({"positions_scale": 3.0, "rope_scaling": "yarn"}, {"rope_type": "yarn", "factor": 3.0}),
        ({"positions_scale": 40.0, "rope_scaling": "yarn", "rope_base": 150.0}, {"rope_type": "yarn", "factor": 40.0}),
    ],
)
def test_stretched_rope_matches_transformers_llama(
    options: dict[str, Any],
    parameters: dict[str, Any],
    length: int,
    tokens: Tensor,
    scramble: Scramble,
    llama_state: State,
) -> None:
    llama = {"positions": "rope", "mlp": "swiglu", "d_ff": 40, "norm": "rmsnorm", "tie_embeddings": False}
    ours = build(n_kv_heads=2, **llama, **options)
    theirs = _llama({**parameters, "rope_theta": ours.config.rope_base})
    ours.load_state_dict(llama_state(scramble(theirs)))
    _assert_same_logits(ours, theirs, tokens[:, :length])


def _llama(rope_parameters: dict[str, Any]) -> LlamaForCausalLM:
    if rope_parameters["rope_type"] == "yarn":
        rope_parameters = {**rope_parameters, "original_max_position_embeddings": TRAINED}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=48,
            intermediate_size=40,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            # Transformers wants the stretched length here, except for dynamic NTK, which divides by it.
            max_position_embeddings=int(TRAINED * rope_parameters["factor"]),
            rope_parameters=rope_parameters,
            tie_word_embeddings=False,
        )
    )


@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_ntk_at_a_fixed_factor_matches_transformers_dynamic_at_the_length_that_gives_it(
    factor: float, tokens: Tensor, scramble: Scramble, llama_state: State
) -> None:
    llama = {"positions": "rope", "mlp": "swiglu", "d_ff": 40, "norm": "rmsnorm", "tie_embeddings": False}
    ours = build(n_kv_heads=2, positions_scale=factor, rope_scaling="ntk", **llama)
    theirs = _llama({"rope_type": "dynamic", "factor": 1.0, "rope_theta": 10000.0})
    # At T tokens theirs is f T / M - (f - 1): for M = 16 and T = 48 this f gives our factor.
    theirs.config.rope_parameters["factor"] = (factor - 1) / 2
    ours.load_state_dict(llama_state(scramble(theirs)))
    _assert_same_logits(ours, theirs, tokens)


@pytest.mark.parametrize(
    ("fraction", "options", "parameters"),
    [
        (0.25, {}, {"rope_type": "default"}),
        (0.5, {}, {"rope_type": "default"}),
        (0.5, {"positions_scale": 3.0, "rope_scaling": "yarn"}, {"rope_type": "yarn", "factor": 3.0}),
        (0.5, {"positions_scale": "dynamic", "rope_scaling": "ntk"}, {"rope_type": "dynamic", "factor": 1.0}),
    ],
)
def test_rotation_of_a_part_of_each_head_matches_transformers_gpt_neox(
    fraction: float, options: dict[str, Any], parameters: dict[str, Any], tokens: Tensor, scramble: Scramble
) -> None:
    yarn = {"original_max_position_embeddings": TRAINED} if parameters["rope_type"] == "yarn" else {}
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=40,
            hidden_act="gelu",
            max_position_embeddings=int(TRAINED * parameters.get("factor", 1.0)),
            use_parallel_residual=False,
            tie_word_embeddings=False,
            rope_parameters={**parameters, **yarn, "rope_theta": 10000.0, "partial_rotary_factor": fraction},
        )
    )
    source = scramble(theirs)
    state = {"embed.weight": source["gpt_neox.embed_in.weight"], "head.weight": source["lm_head.weight"]}
    for leaf in ("weight", "bias"):
        state[f"final_norm.{leaf}"] = source[f"gpt_neox.final_layer_norm.{leaf}"]
        for i in range(LAYERS):
            for name, other in (
                ("attn_norm", "input_layernorm"),
                ("attn.qkv", "attention.query_key_value"),
                ("attn.out", "attention.dense"),
                ("mlp_norm", "post_attention_layernorm"),
                ("mlp.up", "mlp.dense_h_to_4h"),
                ("mlp.down", "mlp.dense_4h_to_h"),
            ):
                state[f"blocks.{i}.{name}.{leaf}"] = source[f"gpt_neox.layers.{i}.{other}.{leaf}"]
            fused = state[f"blocks.{i}.attn.qkv.{leaf}"]
            state[f"blocks.{i}.attn.qkv.{leaf}"] = rearrange(fused, "(h three d) ... -> (three h d) ...", three=3, d=16)
    shape = {"d_model": 64, "d_ff": 40, "bias": True, "tie_embeddings": False}
    ours = build(positions="rope", rope_fraction=fraction, **shape, **options)
    ours.load_state_dict(state)
    _assert_same_logits(ours, theirs, tokens)


# ------------------------------------------------------------------------------------------- one factor everywhere


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [TRAINED - 3, 3 * TRAINED])
def test_prefill_equals_step_by_step_at_a_fixed_factor(
    kind: str, length: int, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 4)
    model, tokens = build(positions_scale=2.5, **KINDS[kind]), tokens[:, :length]
    with torch.no_grad():
        expected = model(tokens)
        for parts in ([1] * length, [7, length - 7]):
            cache = model.new_cache(model.embed_tokens(tokens), length)
            pieces = [model.logits(model.hidden(part, cache=cache)) for part in tokens.split(parts, dim=1)]
            torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_follows_the_length_and_changes_no_bit_up_to_the_trained_one(kind: str, tokens: Tensor) -> None:
    plain, dynamic = build(**KINDS[kind]), build(positions_scale="dynamic", **KINDS[kind])
    with torch.no_grad():
        for length in (1, TRAINED - 1, TRAINED):
            assert torch.equal(dynamic(tokens[:, :length]), plain(tokens[:, :length]))
        for length in (TRAINED + 1, 3 * TRAINED):
            fixed = build(positions_scale=length / TRAINED, **KINDS[kind])
            assert torch.equal(dynamic(tokens[:, :length]), fixed(tokens[:, :length]))
            assert not torch.allclose(dynamic(tokens[:, :length]), plain(tokens[:, :length]), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [[1] * 40, [14, 1, 1, 1, 1, 22], [30, 10]])
def test_a_cache_gives_what_a_fresh_pass_gives_while_the_factor_grows(
    kind: str, parts: list[int], tokens: Tensor
) -> None:
    model = build(positions_scale="dynamic", **KINDS[kind]).double()
    cache, start = model.new_cache(model.embed_tokens(tokens), 40), 0
    with torch.no_grad():
        for part in parts:
            cached = model.hidden(tokens[:, start : start + part], cache=cache)
            start += part
            assert cache.length == start
            assert cache.factor == max(1.0, start / TRAINED)
            torch.testing.assert_close(cached, model.hidden(tokens[:, :start])[:, -part:])


@pytest.mark.parametrize("kind", ["alibi", "yarn"])
def test_generation_past_the_trained_length_equals_repeated_full_passes(
    kind: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "sparsetrain.models.decoding.generate.sample",
        lambda logits, *settings: seen.append(logits) or logits.argmax(-1),
    )
    model = build(positions_scale="dynamic", **KINDS[kind])
    made = model.generate(tokens[:, : TRAINED - 4], 12)
    with torch.no_grad():
        expected = [model(made[:, :length])[:, -1] for length in range(TRAINED - 4, made.shape[1])]
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_the_vectors_of_a_soft_prompt_count(tokens: Tensor) -> None:
    model = build(positions_scale="dynamic")
    words = tokens[0, -8:]
    prompt = SoftPrompt.from_embeddings(model.embed.weight[words])
    source = tokens[:, : TRAINED - 4]
    hard = model.generate(torch.cat((source, words.expand(2, -1)), dim=1), 6, temperature=0.0)
    soft = model.generate(source, 6, temperature=0.0, prompt=prompt)
    assert torch.equal(soft[:, -6:], hard[:, -6:])
    row = torch.cat((source, words.expand(2, -1)), dim=1)
    slots = torch.cat((torch.full_like(source, -1), torch.arange(8).expand(2, -1)), dim=1)
    with torch.no_grad():
        assert torch.equal(Prompted(model, prompt)(row, slots=slots), model(row))


def test_a_rewound_cache_goes_back_to_the_factor_of_its_length(tokens: Tensor) -> None:
    model = build(positions_scale="dynamic").double()
    row, longer = tokens[:, : TRAINED - 2], tokens[0, TRAINED - 2 : TRAINED + 6].tolist()
    with torch.no_grad():
        both = model.continuation_scores(model.embed_tokens(row), [longer, longer[:2]])
        again = model.continuation_scores(model.embed_tokens(row), [longer[:2]])
        first = model(row)[:, -1].log_softmax(-1)[:, longer[0]]
        rest = model(torch.cat((row, torch.tensor([longer[:-1]]).expand(2, -1)), dim=1)).log_softmax(-1)
        known = rest[:, TRAINED - 2 :].gather(2, torch.tensor(longer[1:]).expand(2, -1)[..., None])
    torch.testing.assert_close(both[:, 1:], again)
    torch.testing.assert_close(both[:, 0], (first + known.sum((1, 2))).float())


@pytest.mark.parametrize("kind", ["alibi of six heads", "yarn"])
def test_the_kernels_use_the_same_factor(kind: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for CPUs takes slopes, torch's kernel extra features, and a cache an explicit bias."""
    model = build(positions_scale=2.5, **KINDS[kind])
    with torch.no_grad():
        fused = model.hidden(tokens)
        monkeypatch.setattr(attention, "suits", lambda *_: False)
        torch.testing.assert_close(model.hidden(tokens), fused, **EXACT)
        cache = model.new_cache(model.embed_tokens(tokens), tokens.shape[1])
        pieces = [model.hidden(part, cache=cache) for part in tokens.split(30, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), fused, **EXACT)


def test_a_full_dynamic_cache_says_so(tokens: Tensor) -> None:
    model = build(positions_scale="dynamic")
    cache = KVCache(model.config, 2, 3, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="holds 3 tokens; 4 do not fit"):
        model.hidden(tokens[:, :4], cache=cache)


def test_training_reaches_every_weight_at_a_stretched_length(tokens: Tensor) -> None:
    model = build(positions_scale="dynamic", positions="rope", rope_scaling="yarn", rope_fraction=0.5)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(bool(p.grad is not None and p.grad.abs().sum() > 0) for p in model.parameters())


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions_scale": 0.5}, "positions_scale=0.5 is neither a number of at least 1 nor 'dynamic'"),
        ({"positions_scale": math.nan}, "positions_scale=nan is neither"),
        ({"positions_scale": math.inf}, "positions_scale=inf is neither"),
        ({"positions_scale": True}, "positions_scale=True is neither"),
        ({"positions_scale": "dynamc"}, "positions_scale='dynamc' is neither"),
        ({"positions_scale": None}, "positions_scale=None is neither"),
        (
            {"positions_scale": "dynamic", "positions": "learned"},
            "positions_scale=dynamic needs positions=alibi or rope",
        ),
        ({"positions_scale": 2.0, "positions": "none"}, "positions_scale=2.0 needs positions=alibi or rope"),
        ({"rope_scaling": "yarn"}, "rope_scaling=yarn needs positions=rope, not alibi"),
        ({"rope_fraction": 0.5}, "rope_fraction=0.5 needs positions=rope, not alibi"),
        ({"rope_scaling": "cubic", "positions": "rope"}, "rope_scaling='cubic' is not one of"),
        ({"rope_fraction": 0.0, "positions": "rope"}, r"rope_fraction=0.0 is not in \(0, 1\]"),
        ({"rope_fraction": 0.25, "positions": "rope"}, "rope_fraction=0.25 rotates 3 of d_model / n_heads = 12"),
        ({"rope_fraction": 0.1, "positions": "rope"}, "rope_fraction=0.1 rotates 1 of"),
        ({"rope_base": 1.0, "rope_scaling": "yarn", "positions": "rope"}, "rope_base=1.0 must be above 1"),
    ],
)
def test_contradictions_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(**options)
    assert "\n" not in str(caught.value)
