"""The ledger of a step against torch's counter of FLOPs, against a count by hand, and against itself."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fresh import Fresh
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsetrain import Ledger, ModelConfig, SoftPrompt, Transformer, UserError, flops, quantize, sparsify
from sparsetrain.cost.ledger import Pass
from sparsetrain.cost.operations import Layers, Sizes, step_operations
from sparsetrain.cost.trace import trace
from sparsetrain.models.prompted import Prompted
from sparsetrain.sparsity import sparse_layers

SMALL = ModelConfig(d_model=32, n_layers=2, n_heads=2, vocab_size=64, max_context=32, seed=0)
B, T = 3, 16


def batch(vocabulary: int = 64, tokens: int = T) -> torch.Tensor:
    return torch.randint(0, vocabulary, (B, tokens))


def counted(model: nn.Module, *arguments: torch.Tensor, **options: Any) -> int:
    """Return what torch's counter sees of a real forward and backward pass."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = model(*arguments, **options)
        loss = getattr(result, "logits", result)
        (loss if loss.ndim == 0 else loss.sum()).backward()
    model.zero_grad()
    return counter.get_total_flops()


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize(
    ("positions", "more"),
    [
        ("learned", {"bias": True}),
        ("rope", {"mlp": "swiglu", "norm": "rmsnorm", "n_kv_heads": 1}),
        ("none", {"tie_embeddings": False}),
        ("alibi", {"d_ff": 50}),
    ],
)
def test_our_models_match_the_counter_of_torch(positions: str, more: dict[str, Any], sparsity: float) -> None:
    config = replace(SMALL, positions=positions, sparsity=sparsity, **more)
    model, tokens = Transformer(config), batch()
    seen = counted(model, tokens, tokens)
    ledger, live = flops(config, T, B), flops(model, T, B)
    assert ledger.total == live.total == seen
    assert ledger.by_module == live.by_module
    assert sum(ledger.by_module.values()) == sum(ledger.by_phase.values()) == ledger.total
    assert sum(ledger.by_kind[kind] for kind in ("linear", "head", "attention")) == ledger.total
    # By a trace each module has the same work.
    found: dict[str, int] = {}
    for entry in trace(model, Pass(T, B)).entries:
        found[entry.module] = found.get(entry.module, 0) + entry.flops
    assert found == ledger.by_module


@pytest.mark.parametrize("positions", ["learned", "rope", "none"])
def test_our_models_match_with_attention_by_the_math_backend_of_torch(positions: str) -> None:
    config = replace(SMALL, positions=positions)
    model = Transformer(config).double()  # our kernel is for float32
    assert counted(model, batch()) == flops(config, T, B).total


def test_sparse_layers_match_a_count_of_every_nonzero() -> None:
    model = Transformer(replace(SMALL, sparsity=0.8))
    by_hand = 0
    for _, layer in sparse_layers(model):
        for _row, _column in torch.nonzero(layer.weight != 0.0).tolist():
            by_hand += 3 * 2 * B * T  # a multiply-add a token: forward, for the input, for the weight
    by_hand += 6 * B * T * 64 * 32 + 12 * B * T * T * 32 * 2
    assert flops(model, T, B).total == by_hand


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_hugging_face_models_match_the_counter_of_torch(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    small = {
        "GPT2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 32}
        | {"bos_token_id": 0, "eos_token_id": 0},
        "Llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"intermediate_size": 80, "vocab_size": 64},
    }[name]
    config = getattr(transformers, f"{name}Config")(**small)
    model = (transformers.GPT2LMHeadModel if name == "GPT2" else transformers.LlamaForCausalLM)(config)
    tokens = batch()
    ledger = flops(model, T, B)
    assert ledger.total == counted(model, tokens)
    assert ledger.by_kind["head"] == 6 * B * T * 64 * 32
    assert ledger.by_kind["attention"] == 12 * B * T * T * 32 * 2
    assert ledger.by_module["lm_head"] == ledger.by_kind["head"]
    step = flops(model, 1, B, phase="decoding", cached=T - 1)
    assert step.by_kind["attention"] == 4 * B * T * 32 * 2
    width = 32 if name == "GPT2" else 16
    assert step.cache_bytes == 2 * 2 * B * T * width * 4
    sparsify(model, sparsity=0.5, seed=0)
    assert flops(model, T, B).total == counted(model, tokens) < ledger.total
    assert flops(model, T, B, sparsity="counted").total == ledger.total


def test_a_trace_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 8), nn.BatchNorm1d(T), nn.Dropout(0.5), nn.Linear(8, 4))
    calls: list[int] = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    model[1].weight.grad = torch.ones(8, 8)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert flops(model, T, B).total == 6 * B * T * (64 + 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == []
    assert len(model[1]._forward_hooks) == 1
    assert model.training
    assert torch.equal(model[1].weight.grad, torch.ones(8, 8))
    assert all(parameter.grad is None for parameter in model[4].parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model[1].weight) is nn.Parameter


def test_a_frozen_part_costs_only_what_it_costs() -> None:
    model = Transformer(replace(SMALL, n_layers=3, sparsity=0.5, mlp="swiglu", positions="rope"))
    tokens = batch()
    choices: dict[str, list[nn.Module]] = {
        "blocks": [model.blocks],
        "last block": [model.blocks[2]],
        "one matrix": [model.blocks[1].get_submodule("mlp.gate")],
        "embedding": [model.embed],
        "nothing": [],
    }
    for trained in choices.values():
        model.requires_grad_(False)
        for module in trained:
            module.requires_grad_(True)
        with FlopCounterMode(display=False) as counter:
            loss = model(tokens, tokens)
            if trained:
                loss.backward()
        assert flops(model, T, B).total == counter.get_total_flops()


@pytest.mark.parametrize("frozen", [True, False])
def test_prompt_tokens_lengthen_the_context(frozen: bool) -> None:
    model = Transformer(replace(SMALL, sparsity=0.5)).requires_grad_(not frozen)
    prompted = Prompted(model, SoftPrompt(4, 32))
    slots = torch.full((B, T + 4), -1)
    slots[:, :4] = torch.arange(4)
    tokens = batch(tokens=T + 4)
    seen = counted(prompted, tokens, tokens, slots)
    assert flops(prompted, T, B).total == seen
    if not frozen:
        assert flops(model, T, B, prompt_tokens=4).total == seen


def test_a_cache_is_read_once_for_a_token() -> None:
    config = replace(SMALL, n_kv_heads=1, positions="rope")
    model, past = Transformer(config).eval(), 12
    tokens = batch(tokens=past)
    with torch.no_grad():
        cache = model.new_cache(model.embed_tokens(tokens), past + 1)
        with FlopCounterMode(display=False) as first:
            model.logits(model.hidden(tokens, cache=cache)[:, -1])
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as second:
            model.logits(model.hidden(tokens[:, :1], cache=cache))
    assert flops(model, past, B, phase="prefill", last_logits=True).total == first.get_total_flops()
    step = flops(config, 1, B, phase="decoding", cached=past)
    assert step.total == second.get_total_flops()
    assert step.cache_bytes == cache.keys.nbytes + cache.values.nbytes
    assert flops(config, T, B, phase="prefill").total * 3 == flops(config, T, B).total


def test_a_quantized_model_has_fewer_bytes_and_the_same_products() -> None:
    model = Transformer(replace(SMALL, sparsity=0.5))
    plain = flops(model, T, B, phase="prefill")
    small = flops(quantize(model, group=32), T, B, phase="prefill")
    assert small.total == plain.total
    held = [*model.parameters(), *model.buffers()]
    assert small.weight_bytes == sum({id(one): one.nbytes for one in held}.values()) < plain.weight_bytes / 3
    with pytest.raises(UserError, match=r"phase=training: weights of 4 or 8 bits do not train"):
        flops(model, T, B)


def test_conventions() -> None:
    config = replace(SMALL, sparsity=0.75)
    full, causal = flops(config, T, B), flops(config, T, B, attention="causal")
    seen = sum(query + 1 for query in range(T))  # keys up to the query's own position
    assert causal.by_kind["attention"] == 12 * B * seen * 32 * 2
    assert full.by_kind["attention"] - causal.by_kind["attention"] == full.total - causal.total
    dense = flops(config, T, B, sparsity="counted")
    assert dense.total == flops(replace(config, sparsity=0.0), T, B).total
    assert full.totals == {
        f"attention {a}, zeros {s}": flops(config, T, B, attention=a, sparsity=s).total
        for a, s in itertools.product(("full", "causal"), ("skipped", "counted"))
    }


def test_other_work_stands_beside_the_total() -> None:
    config = replace(SMALL, sparsity=0.75)
    plain = flops(config, T, B)
    update = flops(config, T, B, mask_update="rigl", recomputation=True, device="cuda")
    assert update.total == plain.total
    numel = 2 * (96 * 32 + 32 * 32 + 2 * 128 * 32)
    assert update.by_kind["dense gradient"] == 2 * numel * B * T
    forward = flops(config, T, B, phase="prefill")
    assert update.by_kind["recomputation"] == forward.by_kind["linear"] + forward.by_kind["attention"]
    assert update.by_kind["alibi columns"] == plain.by_kind["attention"] // 2  # 8 columns beside 16
    assert "dense gradient" not in flops(config, T, B, mask_update="set").by_kind
    assert "alibi columns" not in plain.by_kind
    assert "index" not in flops(SMALL, T, B).by_kind


def test_ledgers_add_up_over_a_curriculum() -> None:
    short, long = flops(SMALL, 8, 4), flops(SMALL, 32, 1)
    both = short.times(30) + long.times(10)
    assert both.total == 30 * short.total + 10 * long.total
    assert both.by_module["head"] == 30 * short.by_module["head"] + 10 * long.by_module["head"]
    assert both.tokens == 1280
    with pytest.raises(UserError, match="add ledgers of one convention"):
        _ = short + flops(SMALL, 8, 4, attention="causal")


@settings(deadline=None, max_examples=40)
@given(
    context=st.integers(1, 64),
    batches=st.integers(1, 8),
    layers=st.integers(1, 4),
    sparsity=st.floats(0.0, 0.99),
    more=st.sampled_from(["context", "batch", "layers", "nonzeros"]),
)
def test_flops_never_fall(context: int, batches: int, layers: int, sparsity: float, more: str) -> None:
    def of(context: int, batches: int, layers: int, sparsity: float) -> Ledger:
        return flops(replace(SMALL, n_layers=layers, sparsity=sparsity), context, batches)

    sizes: dict[str, Any] = {"context": context, "batches": batches, "layers": layers, "sparsity": sparsity}
    grown: dict[str, Any] = {
        "context": {"context": context + 1},
        "batch": {"batches": batches + 1},
        "layers": {"layers": layers + 1},
        "nonzeros": {"sparsity": sparsity * 0.9},
    }[more]
    small, large = of(**sizes), of(**{**sizes, **grown})
    assert large.total >= small.total
    assert large.totals["attention causal, zeros skipped"] >= small.totals["attention causal, zeros skipped"]


def test_operations_of_many_configurations_equal_those_of_one() -> None:
    widths, densities = np.array([32.0, 64.0]), np.array([0.5, 0.25])
    sizes = replace(Sizes.of(SMALL), width=widths, ffn=4 * widths, kv_width=widths, heads=widths / 16)
    names = sizes.matrices()
    many = step_operations(sizes, 16.0, np.array([3.0, 5.0]), [Layers(2.0, dict.fromkeys(names, densities))])
    for index, (width, density, b) in enumerate(((32, 0.5, 3), (64, 0.25, 5))):
        config = replace(SMALL, d_model=width, n_heads=width // 16, sparsity=1.0 - density)
        one = step_operations(Sizes.of(config), 16.0, float(b), [Layers(2.0, dict.fromkeys(names, density))])
        for name in ("flops", "dense_flops", "bytes", "index_bytes"):
            found = [np.broadcast_to(getattr(operation, name), 2)[index] for operation in many]
            assert found == pytest.approx([getattr(operation, name) for operation in one], rel=1e-12)


@pytest.mark.parametrize("order", ["import torch.utils.flop_counter, sparsetrain", "import sparsetrain"])
def test_formulas_are_registered_whichever_module_is_imported_first(fresh: Fresh, order: str) -> None:
    code = f"{order}\nimport sys, torch\n"
    code += "print('torch.utils.flop_counter' in sys.modules)\nfrom torch.utils.flop_counter import flop_registry\n"
    code += "print(sum('sparsetrain' in str(name) for name in flop_registry))"
    run = fresh.run(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str("flop_counter" in order), "4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context=0 is not a whole number of at least 1"),
        ({"batch": 1.5}, "batch=1.5 is not a whole number"),
        ({"attention": "half"}, "attention='half' is not one of full, causal"),
        ({"sparsity": "skiped"}, "did you mean 'skipped'"),
        ({"phase": "train"}, "phase='train' is not one of"),
        ({"cached": 4}, "cached=4 needs phase=decoding, not training"),
        ({"phase": "decoding"}, "cached=0: phase=decoding needs"),
        ({"phase": "prefill", "mask_update": "rigl"}, "mask_update=rigl needs phase=training"),
        ({"mask_update": "rigel"}, "did you mean 'rigl'"),
        ({"model": 3}, "model is a int, neither a ModelConfig nor a torch.nn.Module"),
        ({"model": replace(SMALL, positions="learned"), "context": 33}, "33 tokens are more than the 32 learned"),
        ({"model": nn.Conv2d(1, 1, 3)}, "Conv2d has no embedding and no linear layer: give its arguments as inputs="),
        ({"model": nn.Linear(4, 4), "prompt_tokens": 2}, "prompt_tokens=2 needs a model of the library"),
        ({"model": nn.Bilinear(4, 4, 4)}, "inputs="),
    ],
)
def test_refusals_are_one_line(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": SMALL, "context": T, "batch": B, **options}
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        flops(**arguments)
    assert message in str(caught.value)


def test_a_module_with_inputs_of_its_own() -> None:
    image = torch.zeros(2, 1, 8, 8)
    model = nn.Conv2d(1, 3, 3)
    assert flops(model, 1, 1, phase="prefill", inputs=[image]).total == 2 * 2 * 36 * 3 * 9
