"""Forward multipliers in foreign models: they reach their target, or one line says why they cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from sparsetrain.errors import UserError
from sparsetrain.models import SoftPrompt
from sparsetrain.parameterization import Parameterization, input_scale, parameterize
from sparsetrain.sparsity import sparsify

P = Parameterization
# Four blocks over two in the base halve every branch.
DEEP = P.completep(32, base_layers=2)


def encoder(norm_first: bool = True, width: int = 32, heads: int = 4) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, heads, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_output_projection_of_torchs_attention_is_reached(sparse: bool) -> None:
    """``nn.MultiheadAttention`` reads the weight of out_proj and never calls it, so its own output is multiplied."""
    model, x = encoder(), torch.randn(2, 8, 32)
    if sparse:
        sparsify(model, 0.5, include=["*linear*", "*out_proj"], seed=0)
    attention: Any = model.layers[0].self_attn
    before, weights = attention(x, x, x)
    parameterize(model, DEEP, encoder(), reinitialise=False)
    after, same = attention(x, x, x)
    torch.testing.assert_close(after, before / 2)
    assert torch.equal(same, weights)


def test_torchs_encoder_is_the_same_in_training_and_evaluation() -> None:
    """The fused evaluation path, which calls no module, is not taken if there are multipliers."""
    model, x = encoder(), torch.randn(2, 8, 32)
    reference = encoder()
    parameterize(model, DEEP, encoder(), reinitialise=False)
    with torch.no_grad():
        for layer in reference.layers:
            for projection in (layer.self_attn.out_proj, layer.linear2):  # type: ignore[union-attr]
                projection.weight.mul_(0.5)  # type: ignore[union-attr,operator]
                projection.bias.mul_(0.5)  # type: ignore[union-attr,operator]
        for mode in (True, False):
            torch.testing.assert_close(model.train(mode)(x), reference.train(mode)(x))


# -- normalised branches -----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block of one branch, with the norm at the place given by ``kind``."""

    def __init__(self, kind: str, width: int = 32) -> None:
        super().__init__()
        self.kind, self.norm1 = kind, nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.fc2(F.relu(self.fc1(self.norm1(x) if self.kind == "before" else x)))
        if self.kind == "in the branch":
            return x + self.norm1(branch)
        return self.norm1(x + branch) if self.kind == "after" else x + branch


def stack(kind: str, count: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(kind) for _ in range(count)))


def test_a_pre_norm_branch_is_multiplied() -> None:
    model, x = stack("before"), torch.randn(2, 5, 32)
    before = model[0](x) - x
    parameterize(model, DEEP, stack("before"), reinitialise=False)
    torch.testing.assert_close(model[0](x) - x, before / 2)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: stack("after"), r"branch of '0.fc2' is normalised after the addition \(Block normalises what"),
        (lambda: stack("in the branch"), r"'0.fc2' is normalised inside its branch \(Block '0'\)"),
        (lambda: encoder(norm_first=False), r"'layers.0.self_attn' is .*TransformerEncoderLayer with norm_first=False"),
    ],
)
def test_a_branch_whose_norm_changes_the_multiplier_is_refused(make: Callable[[], nn.Module], words: str) -> None:
    """Depth rules hold for pre-norm blocks; other rules apply, and so do depth rules at the base's depth."""
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=words) as caught:
        parameterize(model, DEEP, make(), seed=0)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    parameterize(model, P.mup(32), make(), seed=0)
    parameterize(model, P.completep(32, base_layers=4), make(), seed=0)


# -- modules that are read and not called ------------------------------------------------------------------------------


class LM(nn.Module):
    """A language model that computes its logits in the way of ``kind``."""

    def __init__(self, kind: str, width: int = 32) -> None:
        super().__init__()
        self.kind, self.embed = kind, nn.Embedding(11, width)
        if "head" in kind:
            self.head = nn.Linear(width, 11, bias=False)
            nn.init.normal_(self.head.weight)


class CallsHead(LM):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).to(self.head.weight.dtype))


class ReadsHead(LM):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.embed(tokens), self.head.weight)


class ReadsEmbedding(LM):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens) @ self.embed.weight.T


class AddsPositions(LM):
    def __init__(self, kind: str, width: int = 32) -> None:
        super().__init__(kind, width)
        self.positions = nn.Embedding(7, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens) + self.positions.weight[: tokens.shape[1]])


def test_a_head_that_is_called_is_multiplied() -> None:
    model, tokens = CallsHead("head"), torch.arange(5).view(1, 5)
    before = model(tokens)
    parameterize(model, P.mup(16, alpha_out=3.0), CallsHead("head", 16), reinitialise=False)
    torch.testing.assert_close(model(tokens), before * 1.5)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (ReadsHead, r"alpha_out / m_d cannot reach 'head': ReadsHead reads its weight and never calls it"),
        (ReadsEmbedding, r"cannot reach the logits: ReadsEmbedding multiplies by the weight of 'embed' itself"),
        (AddsPositions, r"alpha_in cannot reach 'positions': AddsPositions reads its weight and never calls it"),
    ],
)
def test_a_module_that_is_read_and_never_called_is_named(kind: type[LM], words: str) -> None:
    head = "no" if kind is ReadsEmbedding else "head"
    with pytest.raises(UserError, match=words) as caught:
        parameterize(kind(head), P.mup(16, alpha_in=2.0), kind(head, 16), seed=0)
    assert "\n" not in str(caught.value)
    parameterize(kind(head), P.sp(), seed=0)  # multiplies nothing


class RootEmbedding(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.embedding_dim**0.5


class RootsInside(LM):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens) * sqrt(self.embed.embedding_dim))


def test_a_factor_of_the_width_on_an_embedding_is_taken_back_or_named() -> None:
    """In a subclass of the embedding it is measured; in the model's own code it is refused."""

    def make(width: int) -> nn.ModuleDict:
        return nn.ModuleDict({"embed": RootEmbedding(11, width), "head": nn.Linear(width, 11)})

    model = parameterize(make(64), P.mup(16, alpha_in=3.0), make(16), seed=0)
    torch.testing.assert_close(model["embed"](torch.arange(11)), model["embed"].weight * 4.0 * 3.0)
    with pytest.raises(
        UserError, match="RootsInside multiplies 'embed' by a square root; under mup the output of an embedding"
    ):
        parameterize(RootsInside("head"), P.mup(16), RootsInside("head", 16), seed=0)
    parameterize(RootsInside("head"), P.sp(), seed=0)


# -- attention heads, soft prompts -------------------------------------------------------------------------------------


def test_a_head_width_that_differs_from_the_bases_is_said() -> None:
    """muP scales attention by 1 / d_head; the model's own scale differs from it by a constant only at one d_head."""
    with pytest.warns(UserWarning, match=r"d_head is 64 in 'layers.0.self_attn' and 8 in the base: mup scales") as said:
        parameterize(encoder(width=256), P.mup(32), encoder(width=32), reinitialise=False)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parameterize(encoder(width=64, heads=8), P.mup(32), encoder(width=32), reinitialise=False)
        parameterize(encoder(width=64), P.mup(32, attention_scale="sqrt"), encoder(width=32), reinitialise=False)
        parameterize(encoder(width=64), P.sp(), reinitialise=False)


class Attention(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self.q_proj = n_heads, nn.Linear(width, width)


def test_the_width_of_heads_is_found_in_a_module_and_in_a_configuration() -> None:
    for n_heads, words in ((2, r"d_head is 32 in 'attn' and 8 in the base"), (8, "")):
        model, base = (nn.ModuleDict({"attn": Attention(*of)}) for of in ((64, n_heads), (16, 2)))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            parameterize(model, P.mup(16), base, seed=0)
        assert len(said) == bool(words)
    config = {"vocab_size": 11, "n_positions": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    models = (GPT2LMHeadModel(GPT2Config(n_embd=width, **config)) for width in (32, 16))
    with pytest.warns(UserWarning, match="d_head is 16 in 'GPT2LMHeadModel' and 8 in the base"):
        parameterize(next(models), P.mup(16), next(models), seed=0)


def test_a_soft_prompt_acts_as_tokens_in_a_model_of_others() -> None:
    """If alpha_in is a hook on the embedding, the prompt's vectors are multiplied as well."""
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    parameterize(model, P.mup(16, alpha_in=3.0), model, seed=0)
    embed = model.get_input_embeddings()
    assert input_scale(embed) == 3.0
    tokens = torch.tensor([[4, 5, 6, 7]])
    prompt = SoftPrompt.from_embeddings(embed.weight[tokens[0, :2]], scale=input_scale(embed))
    slots = torch.tensor([[0, 1, -1, -1]])
    with torch.no_grad():
        embeddings = prompt.inject(embed(tokens), slots)
        torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(tokens).logits)
    assert input_scale(nn.Embedding(3, 3)) == 1.0


def test_the_shrunk_output_projections_follow_the_counted_depth() -> None:
    """sigma / sqrt(2 n_layers) under SP, with n_layers of the whole model."""
    model = parameterize(stack("before", 8), P.sp(), sigma=0.5, seed=0)
    drawn = torch.cat([block.fc2.weight.flatten() for block in model.children()])  # type: ignore[union-attr,operator]
    assert drawn.std().item() == pytest.approx(0.5 / sqrt(16), rel=0.02)
