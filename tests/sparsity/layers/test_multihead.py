"""torch's attention with sparse input projections: the function of the dense module whose weights are masked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.sparsity import (
    MaskManager,
    RigL,
    SparseMultiheadAttention,
    densify,
    sparse_layers,
    sparsify,
)

WIDTH, HEADS, BATCH, LENGTH, SOURCE = 16, 4, 3, 5, 7


class Holder(nn.Module):
    """A model with one attention module, which is called with whatever the holder is called with."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **options)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn_like(parameter))

    def forward(self, *inputs: Tensor, **options: Any) -> Any:
        return self.attn(*inputs, **options)


def masked(dense: Holder, sparse: Holder) -> Holder:
    """A copy of the dense model with the zeros of the sparse one."""
    other = copy.deepcopy(dense)
    attention, of = other.attn, dict(sparse_layers(sparse))
    masks = [of[f"attn.{name}"].pattern.mask() for name in ("q_proj", "k_proj", "v_proj")]
    with torch.no_grad():
        if attention.in_proj_weight is not None:
            attention.in_proj_weight.mul_(torch.cat(masks))
        else:
            for weight, mask in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), masks, strict=True):
                getattr(attention, weight).mul_(mask)
        attention.out_proj.weight.mul_(of["attn.out_proj"].pattern.mask())
    return other


PLAIN: dict[str, Any] = {}
MODULES = [
    {"batch_first": True},
    {"batch_first": False},
    {"batch_first": True, "bias": False},
    {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
    {"batch_first": False, "kdim": 12, "vdim": 10, "add_zero_attn": True},
]


def calls() -> list[dict[str, Any]]:
    causal = torch.ones(LENGTH, SOURCE, dtype=torch.bool).triu(1)
    padding = torch.zeros(BATCH, SOURCE, dtype=torch.bool)
    padding[1, 4:] = True
    full = 0.3 * torch.randn(BATCH * HEADS, LENGTH, SOURCE)
    return [
        {},
        {"need_weights": False},
        {"average_attn_weights": False, "key_padding_mask": padding},
        {"attn_mask": causal, "need_weights": False},
        {"attn_mask": causal, "need_weights": False, "is_causal": True},
        {"attn_mask": causal, "key_padding_mask": padding, "need_weights": False},
        {"attn_mask": full, "need_weights": True},
        {"attn_mask": full, "key_padding_mask": 0.1 * torch.randn(BATCH, SOURCE), "need_weights": False},
    ]


@pytest.mark.parametrize("options", MODULES, ids=str)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "single"])
def test_output_and_gradients_are_those_of_the_masked_module(options: dict[str, Any], batched: bool) -> None:
    """Cross attention under every kind of mask, with and without weights: equal to torch's own module."""
    torch.manual_seed(0)
    dense = Holder(**options)
    sparse = sparsify(copy.deepcopy(dense), 0.5, seed=0)
    assert isinstance(sparse.attn, SparseMultiheadAttention)
    reference = masked(dense, sparse)
    widths = (WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
    shapes = [(BATCH, length, width) for length, width in zip((LENGTH, SOURCE, SOURCE), widths, strict=True)]
    inputs = [torch.randn(shape) for shape in shapes]
    if not options["batch_first"]:
        inputs = [x.transpose(0, 1) for x in inputs]
    for call in calls():
        if not batched:
            inputs_now = [x[0] if options["batch_first"] else x[:, 0] for x in inputs]
            call = {key: _first(key, value) for key, value in call.items()}
        else:
            inputs_now = inputs
        ours, our_weights = sparse(*inputs_now, **call)
        theirs, their_weights = reference(*inputs_now, **call)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(our_weights, their_weights)
        for model, output in ((sparse, ours), (reference, theirs)):
            model.zero_grad()
            output.square().sum().backward()
        layers = dict(sparse_layers(sparse))
        if reference.attn.in_proj_weight is not None:
            rows = reference.attn.in_proj_weight.grad.split(WIDTH)
        else:
            rows = [getattr(reference.attn, f"{name}_proj_weight").grad for name in "qkv"]
        for name, gradient in zip("qkv", rows, strict=True):
            layer = layers[f"attn.{name}_proj"]
            torch.testing.assert_close(layer.values.grad, layer.pattern.gather(gradient), rtol=1e-4, atol=1e-5)
        for name, parameter in sparse.attn.named_parameters(recurse=False):
            torch.testing.assert_close(parameter.grad, getattr(reference.attn, name).grad, rtol=1e-4, atol=1e-5)


def _first(key: str, value: Any) -> Any:
    if key == "key_padding_mask":
        return value[0]
    return value[:HEADS] if key == "attn_mask" and value.dim() == 3 else value


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


def test_densify_gives_torchs_module_back() -> None:
    """Class, parameters that are no matrices, attributes, hooks and function are those of before, state dicts too."""
    model = encoder()
    model.layers[0].self_attn.note = "kept"
    bias = model.layers[0].self_attn.in_proj_bias
    seen: list[str] = []
    handle = model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append("called"))
    names = list(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    sparsify(model, 0.5, seed=0)
    x = torch.randn(2, 6, WIDTH)
    expected = model(x)
    assert densify(model) is model
    attention = model.layers[0].self_attn
    assert [type(module) for module in model.modules()] == kinds
    assert attention.in_proj_bias is bias
    assert attention.note == "kept"
    assert sorted(model.state_dict()) == sorted(names)
    assert attention.in_proj_weight.requires_grad
    assert int((attention.in_proj_weight == 0).sum()) == attention.in_proj_weight.numel() // 2
    torch.testing.assert_close(model(x), expected)
    assert len(seen) == 2
    handle.remove()
    encoder().load_state_dict(model.state_dict())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own, where it fuses
@pytest.mark.parametrize("left_out", [["*head*"], ["*_proj"]], ids=["all", "feed-forward only"])
@pytest.mark.parametrize("padded", [True, False])
def test_the_fused_path_of_the_encoder_computes_with_the_sparse_layers(padded: bool, left_out: list[str]) -> None:
    """Evaluation without gradients, where torch may fuse a whole encoder layer, equals training mode."""
    model = sparsify(encoder(), 0.5, seed=0, exclude=left_out)
    x = torch.randn(2, 6, WIDTH)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = padded
    options = {"src_key_padding_mask": padding} if padded else {}
    expected = model.train()(x, **options)
    with torch.no_grad():
        found = model.eval()(x, **options)
    torch.testing.assert_close(found[~padding], expected[~padding])


def test_state_dicts_round_trip_and_copies_are_independent() -> None:
    """Saved values load into a model of another seed, and a deep copy computes the same."""
    one, other = sparsify(encoder(), 0.5, seed=0), sparsify(encoder(), 0.5, seed=1)
    x = torch.randn(2, 6, WIDTH)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(x), one(x))
    torch.testing.assert_close(copy.deepcopy(one)(x), one(x))


def test_every_layer_of_an_encoder_explores_under_rigl() -> None:
    """Input and output projections of the attention are called as layers, so a rule can rank their gradients."""
    model = encoder()
    manager = MaskManager(model, RigL(sparsity=0.5, every=1), seed=0)
    assert {f"layers.0.self_attn.{name}_proj" for name in ("q", "k", "v", "out")} < set(manager.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        model(torch.randn(2, 6, WIDTH)).square().mean().backward()
        optimizer.step()
        manager.step(optimizer)
        optimizer.zero_grad()
    assert all(row.overlap < 1.0 for row in manager.report())


def test_a_hook_on_the_output_projection_is_called() -> None:
    """A multiplier on ``out_proj`` reaches the result, which torch's own module would ignore."""
    model = sparsify(encoder(), 0.5, seed=0)
    x = torch.randn(2, 6, WIDTH)
    attention = model.layers[0].self_attn
    before = attention(x, x, x)[0]
    attention.out_proj.register_forward_hook(lambda module, inputs, output: output / 2)
    torch.testing.assert_close(attention(x, x, x)[0], before / 2)


def test_only_the_chosen_projections_become_sparse() -> None:
    """The others become dense layers of the same values, with memory of their own."""
    model = sparsify(encoder(), 0.5, include=["*.v_proj"], seed=0)
    assert {name for name, _ in sparse_layers(model)} == {f"layers.{i}.self_attn.v_proj" for i in range(2)}
    assert torch.equal(model.layers[0].self_attn.q_proj.weight, encoder().layers[0].self_attn.in_proj_weight[:WIDTH])


def test_a_compiled_attention_computes_the_same() -> None:
    """A compiler traces through the module, in training and in evaluation."""
    model = sparsify(encoder(), 0.5, seed=0)
    x = torch.randn(2, 6, WIDTH)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model.eval(), backend="eager")(x), expected)


def test_a_whole_transformer_attends_across_and_comes_back() -> None:
    """Encoder and decoder of torch, self and cross attention: the function of its dense equal, before and after."""
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 32, dropout=0.0, batch_first=True)
    sparsify(model, 0.5, seed=0)
    assert "decoder.layers.0.multihead_attn.k_proj" in dict(sparse_layers(model))
    inputs = torch.randn(2, 6, WIDTH), torch.randn(2, 4, WIDTH)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    options = {"tgt_mask": causal, "tgt_is_causal": True}
    expected = model(*inputs, **options)
    torch.testing.assert_close(densify(copy.deepcopy(model))(*inputs, **options), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*inputs, **options), expected)


def test_attention_with_a_forward_of_its_own_is_named() -> None:
    """A subclass computes with ``in_proj_weight`` itself, so that stays what it is, and a line says so."""

    class Own(nn.MultiheadAttention):
        def forward(self, *inputs: Tensor, **options: Any) -> Any:
            return super().forward(*inputs, **options)

    model = nn.ModuleDict({"own": Own(WIDTH, HEADS)})
    with pytest.warns(UserWarning, match=r"own\.in_proj_weight \(attention input projection"):
        sparsify(model, 0.5, seed=0)
    assert [name for name, _ in sparse_layers(model)] == ["own.out_proj"]
    x = torch.randn(4, 2, WIDTH)
    assert model["own"](x, x, x)[0].isfinite().all()
