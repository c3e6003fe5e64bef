"""Linear layers that others wrote: what comes back is what was there, and what a sparse layer cannot be is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as prune
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.pytorch_utils import Conv1D

from sparsetrain.errors import UserError
from sparsetrain.sparsity import (
    SET,
    MaskManager,
    SparseLinear,
    SparsityConfig,
    SparsityGroup,
    densify,
    sparse_layers,
    sparsify,
)

VOCAB = 37
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
}


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=24, n_layer=2, n_head=3)).eval()


def tokens() -> Tensor:
    return torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def make(loader: Any, kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return loader.from_config(AutoConfig.for_model(kind, **(TINY | options))).eval()


CAUSAL, MASKED, CLASSES = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "gpt2": (gpt2, {"lm_head"}),
    "gpt2 classifier": (
        lambda: make(CLASSES, "gpt2", n_embd=24, n_layer=2, n_head=3, n_positions=16, pad_token_id=0),
        {"score"},
    ),
    "llama": (lambda: make(CAUSAL, "llama", num_key_value_heads=3), {"lm_head"}),
    "opt": (lambda: make(CAUSAL, "opt", ffn_dim=40, word_embed_proj_dim=24), {"lm_head"}),
    "neox": (lambda: make(CAUSAL, "gpt_neox"), {"lm_head"}),
    "falcon": (lambda: make(CAUSAL, "falcon"), {"lm_head"}),
    "bert": (lambda: make(MASKED, "bert"), {"cls.predictions.decoder"}),
    "roberta": (lambda: make(MASKED, "roberta", pad_token_id=0), {"lm_head.dense", "lm_head.decoder"}),
    "distilbert": (
        lambda: make(MASKED, "distilbert", dim=24, hidden_dim=40, n_layers=2, n_heads=3),
        {"vocab_projector"},
    ),
    "bert classifier": (lambda: make(CLASSES, "bert", num_labels=3), {"classifier"}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    """Heads stay dense; classes, names of tensors and logits are those of before; what is saved loads as the same."""
    model, heads = MODELS[kind][0](), MODELS[kind][1]
    classes = {name: type(module) for name, module in model.named_modules()}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    sparsify(model, 0.6, seed=0)
    assert linears - {name for name, _ in sparse_layers(model)} == heads
    expected = model(tokens()).logits
    densify(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    torch.testing.assert_close(model(tokens()).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(tokens()).logits, expected)
    assert list(loaded.state_dict()) == list(model.state_dict())


def test_everything_that_others_put_on_a_layer_comes_along_and_back() -> None:
    """Attributes of layer and parameters, mode, dtype, frozen weights and the bias object itself are kept."""
    model = gpt2().train().to(torch.float64)
    layer = model.transformer.h[0].mlp.c_fc
    layer.scale_init, layer._is_hf_initialized = 0.5, True
    layer.weight._no_weight_decay = True
    layer.weight.requires_grad_(False)
    layer.eval()
    bias = layer.bias
    sparsify(model, 0.5, seed=0)
    sparse = model.transformer.h[0].mlp.c_fc
    assert isinstance(sparse, SparseLinear)
    for module, weight in ((sparse, sparse.values), (densify(model).transformer.h[0].mlp.c_fc, None)):
        weight = module.weight if weight is None else weight
        assert (module.scale_init, module._is_hf_initialized, weight._no_weight_decay) == (0.5, True, True)
        assert (module.nf, module.nx, module.training) == (96, 24, False)
        assert not weight.requires_grad
        assert weight.dtype == torch.float64
        assert module.bias is bias
        module.set_later = 1
    back = model.transformer.h[0].mlp.c_fc
    assert type(back) is Conv1D
    assert back.set_later == 1
    assert back.weight.shape == (24, 96)
    assert back.weight.is_contiguous()


class Marked(nn.Linear):
    """A subclass with another constructor and the forward of nn.Linear."""

    def __init__(self, width: int, *, note: str) -> None:
        super().__init__(width, width, bias=False)
        self.note = note


def test_subclasses_with_the_forward_of_linear_come_back_as_they_were() -> None:
    """Also where their constructor takes other arguments, and after a copy of the sparse model."""
    model = nn.ModuleDict({"a": Marked(8, note="one"), "b": NonDynamicallyQuantizableLinear(8, 8)})
    back = densify(copy.deepcopy(sparsify(model, 0.5, seed=0)))
    assert (type(back["a"]), type(back["b"])) == (Marked, NonDynamicallyQuantizableLinear)
    assert (back["a"].note, back["a"].bias, back["a"].in_features) == ("one", None, 8)
    assert back["a"](torch.ones(8)).shape == (8,)
    sparsify(back, 0.5, seed=1)


class Doubled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class WithScale(nn.Linear):
    """A subclass with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.scale = nn.Parameter(torch.ones(8))


def changed(change: Callable[[nn.Linear], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.Linear(8, 8)
        change(layer)
        return layer

    return build


def _half(layer: nn.Module) -> None:
    layer.forward = lambda x: x / 2  # type: ignore[method-assign]


def _meta(layer: nn.Linear) -> None:
    layer.to("meta")


def _integers(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lambda: nn.LazyLinear(8), "its size is not known yet"),
    "own forward": (lambda: Doubled(8, 8), "its class Doubled has its own forward"),
    "own parameter": (WithScale, "holds more than weight and bias"),
    "replaced forward": (changed(_half), "its forward was replaced on the object"),
    "compiled alone": (changed(lambda layer: layer.compile(backend="eager")), "its forward was replaced"),
    "pruned weight": (changed(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)), "masked by torch's pruning"),
    "pruned bias": (changed(lambda layer: prune.l1_unstructured(layer, "bias", 0.5)), "holds more than weight"),
    "spectral norm": (changed(nn.utils.spectral_norm), "its weight is computed"),
    "parametrized bias": (
        changed(lambda layer: nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())),
        "holds more than weight and bias|bias is computed|has a forward",
    ),
    "meta": (changed(_meta), "on the meta device"),
    "quantized": (changed(_integers), r"quantized or sharded \(Parameter, int8\)"),
    "weight hook": (changed(lambda layer: layer.weight.register_hook(lambda g: g)), "gradient hooks"),
    "no inputs": (lambda: _empty(0, 8), r"it has no weights \(8x0\)"),
    "no outputs": (lambda: _empty(8, 0), r"it has no weights \(0x8\)"),
    "own attribute": (changed(lambda layer: setattr(layer, "backend", "x")), "its attribute 'backend'"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_sparse_layer_cannot_be_is_refused_by_name_and_left_alone(kind: str) -> None:
    """sparsify and MaskManager refuse it, change nothing, and do without it where it is excluded."""
    build, message = REFUSED[kind]

    def model() -> nn.ModuleDict:
        return nn.ModuleDict({"fine": nn.Linear(8, 8), "odd": build()})

    for act in (
        lambda made: sparsify(made, 0.5, seed=0),
        lambda made: sparsify(made, plan=SparsityConfig(sparsity=0.5, allocation="erk"), seed=0),
        lambda made: MaskManager(made, SET(sparsity=0.5), seed=0),
    ):
        made = model()
        with pytest.raises(UserError, match=f"odd: .*({message})"):
            act(made)
        assert not list(sparse_layers(made))
    assert [name for name, _ in sparse_layers(sparsify(model(), 0.5, exclude=["odd"], seed=0))] == ["fine"]
    if not kind.startswith("no "):
        plan = SparsityConfig(sparsity=0.5, groups=[SparsityGroup("odd", 0.0)])
        assert [name for name, _ in sparse_layers(sparsify(model(), plan=plan, seed=0))] == ["fine"]


def _empty(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, of transformers
def test_layers_inside_an_adapter_are_refused_by_name() -> None:
    """peft merges into ``base_layer.weight``, which a sparse layer only computes; its factors are no layers to thin."""
    model = get_peft_model(
        gpt2(), LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True, task_type="CAUSAL_LM")
    )
    with pytest.raises(UserError, match=r"c_attn\.base_layer: it belongs to an adapter of peft"):
        sparsify(model, 0.5, seed=0)
    assert not list(sparse_layers(model))
    sparsify(model, 0.5, exclude=["*c_attn*", "*head*"], seed=0)
    assert model(tokens()).logits.isfinite().all()


def test_a_bias_that_two_layers_share_stays_shared() -> None:
    """The bias of a sparse layer is the very parameter that the dense one had."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].bias = model["a"].bias
    sparsify(model, 0.5, seed=0)
    assert model["a"].bias is model["b"].bias
    densify(model)
    assert model["a"].bias is model["b"].bias


@pytest.mark.parametrize("name", ["score", "classifier", "qa_outputs", "lm_head", "output", "head"])
def test_heads_stay_dense_by_default_and_can_be_asked_for(name: str) -> None:
    """Under the default alone: an empty list of exclude takes the head, and globs of the user's own mean themselves."""

    def model() -> nn.ModuleDict:
        return nn.ModuleDict({"fc": nn.Linear(16, 16), name: nn.Linear(16, 3), "heads_up": nn.Linear(16, 16)})

    def sparse(**options: Any) -> set[str]:
        return {name for name, _ in sparse_layers(sparsify(model(), 0.5, seed=0, **options))}

    assert sparse() == {"fc", "heads_up"}
    assert sparse(exclude=[]) == {"fc", "heads_up", name}
    assert sparse(exclude=["*head*"]) == {"fc", name} - {"head", "lm_head"}


def test_projections_of_attention_heads_become_sparse() -> None:
    """A name that only contains the word is no output head."""
    heads = nn.ModuleList(nn.ModuleDict({"key": nn.Linear(32, 8)}) for _ in range(2))
    model = nn.ModuleDict({"heads": heads, "my_header": nn.ModuleDict({"fc": nn.Linear(32, 32)})})
    sparsify(model, 0.5, seed=0)
    assert [name for name, _ in sparse_layers(model)] == ["heads.0.key", "heads.1.key", "my_header.fc"]


@pytest.mark.parametrize(
    "act", [lambda m: sparsify(m, 0.5, seed=0), lambda m: MaskManager(m, SET(sparsity=0.5), seed=0)]
)
def test_routers_stay_dense_and_gates_of_a_gated_mlp_do_not(act: Callable[[nn.Module], Any]) -> None:
    """A gate beside experts chooses among them; the one beside up and down is a matrix like these."""
    experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(16, 16)}) for _ in range(2))
    model = nn.ModuleDict(
        {
            "moe": nn.ModuleDict({"gate": nn.Linear(16, 2), "experts": experts, "router": nn.Linear(16, 2)}),
            "mlp": nn.ModuleDict({"gate": nn.Linear(16, 16), "up": nn.Linear(16, 16)}),
        }
    )
    act(model)
    names = {name for name, _ in sparse_layers(model)}
    assert names == {"moe.experts.0.w1", "moe.experts.1.w1", "mlp.gate", "mlp.up"}
