"""The depth of a model, and bases with fewer blocks: eight blocks count as eight at any place in the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from sparsetrain.errors import UserError
from sparsetrain.parameterization import Parameterization, assignment, param_groups, parameterize
from sparsetrain.sparsity import sparsify

P = Parameterization
DEEP = P.completep(32, base_layers=2)


class Block(nn.Module):
    def __init__(self, width: int = 32, inner: int | None = None) -> None:
        super().__init__()
        inner = width if inner is None else inner
        self.norm1, self.q_proj, self.o_proj = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o_proj(self.q_proj(self.norm1(x)))


class MLPBlock(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm1, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)


class Experts(Block):
    """A block that contains a list of experts, which are not blocks."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(width)
        parts = [nn.ModuleDict({"w1": nn.Linear(width, width), "w2": nn.Linear(width, width)}) for _ in range(3)]
        self.experts = nn.ModuleList(parts)


class Sandwich(nn.Module):
    """An embedding, blocks, and on either side a projection named like a hidden matrix."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.project_in = nn.Embedding(11, 16), nn.Linear(16, 32)
        self.layers = blocks
        self.project_out, self.head = nn.Linear(32, 16), nn.Linear(16, 11)


def blocks(count: int, kind: Callable[[], nn.Module] = Block) -> nn.ModuleList:
    return nn.ModuleList(kind() for _ in range(count))


def stages(*counts: int) -> nn.ModuleList:
    return nn.ModuleList(nn.ModuleDict({"blocks": blocks(count), "norm": nn.LayerNorm(32)}) for count in counts)


def same_block_eight_times() -> nn.Module:
    block = Block()
    return nn.ModuleDict({"layers": nn.ModuleList([block] * 8)})


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "one list": lambda: nn.ModuleDict({"blocks": blocks(8)}),
    "Sequential in Sequential": lambda: nn.Sequential(nn.Embedding(11, 32), nn.Sequential(*blocks(8))),
    "one Sequential": lambda: nn.Sequential(nn.Embedding(11, 32), *blocks(8), nn.LayerNorm(32), nn.Linear(32, 32)),
    "stages of blocks": lambda: nn.ModuleDict({"stages": stages(2, 6)}),
    "stages of one block": lambda: nn.ModuleDict({"stages": stages(*[1] * 8)}),
    "experts inside": lambda: nn.ModuleDict({"layers": blocks(8, Experts)}),
    "kinds that alternate": lambda: nn.ModuleDict({"layers": nn.ModuleList([Block(), MLPBlock()] * 4)}),
    "one block applied eight times": same_block_eight_times,
    "matrices around": lambda: Sandwich(blocks(8)),
}


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_eight_blocks_count_as_eight(make: Callable[[], nn.Module]) -> None:
    """The branches are multiplied by base_layers / 8."""
    roles = {"10": "head"} if isinstance(model := make(), nn.Sequential) and len(model) > 8 else None
    assert assignment(parameterize(model, DEEP, make(), roles=roles, seed=0)).depth == 8
    names = [name for name, module in model.named_modules() if isinstance(module, Block)]
    for name in names:
        module: Any = model.get_submodule(f"{name}.o_proj")
        x = torch.randn(3, 32)
        torch.testing.assert_close(module(x), (x @ module.weight.T + module.bias) / 4)


UNCLEAR: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two towers": (
        lambda: nn.ModuleDict({"vision": blocks(2), "text": blocks(4)}),
        "2 blocks in 'vision' and 4 blocks in 'text'",
    ),
    "sublayers that may be blocks": (
        lambda: nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleList([Block(), MLPBlock()]) for _ in range(4))}),
        "4 blocks in 'layers', and 'layers.0' inside them may be a list of blocks too",
    ),
    "no numbers": (lambda: nn.ModuleDict({"block_a": Block(), "block_b": Block()}), "it has no numbered blocks"),
}


@pytest.mark.parametrize(("make", "words"), UNCLEAR.values(), ids=UNCLEAR)
def test_what_cannot_be_counted_is_asked_for(make: Callable[[], nn.Module], words: str) -> None:
    """The refusal names n_layers and changes nothing; passing n_layers suffices."""
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=f"{words}; pass n_layers=") as caught:
        parameterize(model, DEEP, make(), seed=0)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert assignment(parameterize(model, DEEP, make(), n_layers=4, seed=0)).depth == 4
    # If nothing depends on the depth, n_layers is not needed.
    parameterize(model, P.sp(), reinitialise=False)
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(UserError, match=r"n_layers=.* is not a positive integer"):
            parameterize(model, DEEP, make(), n_layers=wrong, seed=0)  # type: ignore[arg-type]


def test_the_configuration_of_a_model_is_asked_and_must_agree() -> None:
    """ALBERT applies one group of layers four times; a truncated model contradicts its configuration."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 8}
    fields: dict[str, Any] = {"vocab_size": 11, "num_hidden_layers": 4, **sizes}
    albert = hf.AlbertModel(hf.AlbertConfig(embedding_size=8, **fields))
    assert assignment(parameterize(albert, P.sp(), seed=0)).depth == 4
    llama = hf.LlamaModel(hf.LlamaConfig(**fields))
    llama.layers = llama.layers[:3]
    with pytest.raises(UserError, match=r"says 4 layers, and it has 3 blocks in 'layers'; pass n_layers="):
        parameterize(llama, P.sp(), seed=0)
    assert assignment(parameterize(llama, P.sp(), n_layers=3, seed=0)).depth == 3


# -- bases of fewer blocks ---------------------------------------------------------------------------------------------


def hybrid(count: int, width: int, kinds: tuple[type[nn.Module], ...] = (Block, MLPBlock)) -> nn.Module:
    layers = nn.ModuleList(kinds[index % len(kinds)](width) for index in range(count))
    return nn.ModuleDict({"embed": nn.Embedding(11, width), "layers": layers})


def rates(model: nn.Module, rules: Parameterization) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in param_groups(model, rules, lr=1.0) for p in group["params"]}


@pytest.mark.parametrize("rules", [P.mup(32), DEEP])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_base_of_fewer_blocks_gives_the_widths_of_one_of_as_many(rules: Parameterization, sparse: bool) -> None:
    """Also for a hybrid, whose blocks are matched by structure, and for a sparse model or base."""

    def make(count: int, width: int) -> nn.Module:
        model = hybrid(count, width)
        return sparsify(model, 0.5, seed=0) if sparse and count == 8 else model

    short = rates(parameterize(make(8, 64), rules, make(2, 32), seed=0), rules)
    long = rates(parameterize(make(8, 64), rules, make(8, 32), seed=0), rules)
    longer = rates(parameterize(make(8, 64), rules, hybrid(10, 32), seed=0), rules)
    assert short == long == longer
    leaf = "values" if sparse else "weight"
    assert short[f"layers.0.q_proj.{leaf}"] == short[f"layers.7.fc2.{leaf}"] == pytest.approx(0.5)


def test_attention_is_one_thing_sparse_or_dense() -> None:
    """Attention that was split into sparse layers takes widths and numbers from the dense tensor."""

    def make(width: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(width, width // 8, 2 * width, 0.0, batch_first=True, norm_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    rules = P.mup(16, wd_rule="coupled")
    models = (make(32), sparsify(make(32), 0.5, seed=0))
    dense, sparse = (parameterize(model, rules, make(16), seed=0) for model in models)
    shared = {name: rate for name, rate in rates(dense, rules).items() if name in rates(sparse, rules)}
    assert shared.items() <= rates(sparse, rules).items()
    attention: Any = sparse.layers[0].self_attn  # type: ignore[union-attr,index]
    rows = dense.layers[0].self_attn.in_proj_weight[32:64]  # type: ignore[union-attr,index]
    assert torch.equal(attention.k_proj.values, attention.k_proj.pattern.gather(rows.detach()))
    assert set(rates(dense, rules).values()) == set(rates(sparse, rules).values()) == {0.5, 1.0}
    parameterize(make(32), rules, sparsify(make(16), 0.5, seed=0), seed=0)


def test_a_base_that_does_not_tell_is_refused_in_words_of_blocks() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(Block(64, 64) for _ in range(4))})
    uneven = nn.ModuleDict({"layers": nn.ModuleList([Block(32, 32), Block(32, 16)])})
    with pytest.raises(
        UserError, match=r"fewer blocks than the model, and its blocks 'layers.0' and 'layers.1' differ"
    ):
        parameterize(model, P.mup(32), uneven, seed=0)
    with pytest.raises(UserError, match=r"no block of the base has the layers of 'layers.1': a base of fewer blocks"):
        parameterize(hybrid(4, 64), P.mup(32), hybrid(2, 32, (Block,)), seed=0)
