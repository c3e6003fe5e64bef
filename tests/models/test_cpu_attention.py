"""Attention as a torch operation: when it is used, what it refuses, and training through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparsetrain.errors import UserError
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.models import attention as module
from sparsetrain.models.cpu_attention import fused_attention, suits
from sparsetrain.models.positions import alibi_slopes

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "alibi": {},
    "grouped": {"n_kv_heads": 2},
    "rope": {"positions": "rope", "n_kv_heads": 1},
    "none": {"positions": "none"},
}


def build(**changes: Any) -> Transformer:
    return Transformer(ModelConfig(32, 2, 4, 50, seed=0, init_std=0.2, **changes))


def gradients(model: Transformer, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss = model.loss(tokens, tokens.roll(-1, 1))
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("kind", KINDS)
def test_models_compute_what_they_do_with_torchs_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(0, 50, (2, 70))
    ours, mine = gradients(build(**KINDS[kind]), tokens)
    monkeypatch.setattr(module, "suits", lambda dtype, device: False)
    theirs, other = gradients(build(**KINDS[kind]), tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    # float32 on both sides, two layers of sums of up to 140 terms.
    torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)
    exact, _ = gradients(build(**KINDS[kind]).double(), tokens)
    torch.testing.assert_close(ours.double(), exact, atol=1e-6, rtol=1e-6)


def test_it_is_used_for_float32_on_a_cpu_alone() -> None:
    assert suits(torch.float32, CPU)
    assert not suits(torch.float64, CPU)
    assert not suits(torch.bfloat16, CPU)
    assert not suits(torch.float32, torch.device("cuda"))
    assert not suits(torch.float32, torch.device("meta"))


def test_bfloat16_and_autocast_are_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(qkv: Tensor, *rest: Any) -> Tensor:
        seen.append(qkv.dtype)
        return fused_attention(qkv, *rest)

    monkeypatch.setattr(module, "fused_attention", spy)
    tokens = torch.randint(0, 50, (1, 20))
    with torch.autocast("cpu", torch.bfloat16):
        build().loss(tokens, tokens).backward()
    assert build().bfloat16()(tokens).dtype == torch.bfloat16
    assert seen == [torch.float32] * 4


def test_a_compiler_is_given_torchs_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build(), torch.randint(0, 50, (1, 20))
    expected = model(tokens)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(module, "fused_attention", None)
    torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-5)


def test_an_exported_model_holds_no_operation_of_ours() -> None:
    tokens = torch.randint(0, 50, (1, 20))
    exported = torch.export.export(build(), (tokens,))
    assert "scaled_dot_product" in str(exported.graph)
    assert "sparsetrain" not in str(exported.graph)


@pytest.mark.parametrize(("kv_heads", "shape"), [(2, (2, 9, 8, 6)), (1, (1, 70, 6, 16))])
def test_it_is_an_operation_as_torch_wants_one(kv_heads: int, shape: tuple[int, ...]) -> None:
    qkv = torch.randn(shape, requires_grad=True)
    arguments = (qkv, alibi_slopes(4).float(), kv_heads, 0.3)
    torch.library.opcheck(torch.ops.sparsetrain.attention.default, arguments)
    g, logs = torch.randn(*shape[:2], 4 * shape[3]), torch.randn(shape[0], 4, shape[1])
    torch.library.opcheck(
        torch.ops.sparsetrain.attention_backward.default, (g, qkv.detach(), g, logs, *arguments[1:]),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_a_second_derivative_is_refused_in_words() -> None:
    qkv = torch.randn(1, 5, 3, 4, requires_grad=True)
    y = fused_attention(qkv, torch.zeros(1), 1, 0.5)
    (grad,) = torch.autograd.grad(y.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_checkpointing_gives_the_same_gradients() -> None:
    qkv, slopes = torch.randn(2, 33, 6, 8, requires_grad=True), torch.rand(2)

    def run(x: Tensor) -> Tensor:
        return fused_attention(x, slopes, 2, 0.3).square().sum()

    (plain,) = torch.autograd.grad(run(qkv), qkv)
    again = checkpoint(run, qkv, use_reentrant=False)
    assert isinstance(again, Tensor)
    assert torch.equal(torch.autograd.grad(again, qkv)[0], plain)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "last dimension apart", "columns of a wider matrix"])
def test_any_strides(layout: str) -> None:
    x = {
        "transposed": lambda: torch.randn(20, 2, 6, 8).transpose(0, 1),
        "expanded": lambda: torch.randn(1, 20, 6, 8).expand(2, -1, -1, -1),
        "last dimension apart": lambda: torch.randn(2, 20, 8, 6).transpose(2, 3),
        "columns of a wider matrix": lambda: torch.randn(2, 20, 64)[..., 3:51].unflatten(2, (6, 8)),
    }[layout]()
    results = []
    for qkv in (x, x.contiguous()):
        leaf = qkv.detach().requires_grad_()
        y = fused_attention(leaf, torch.rand(2, generator=torch.Generator().manual_seed(0)), 2, 0.3)
        # A gradient expanded from a single number.
        results.append((y, torch.autograd.grad(y.sum(), leaf)[0]))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


def test_the_same_bits_on_two_threads_and_every_time() -> None:
    qkv, g = torch.randn(2, 100, 9, 20, requires_grad=True), torch.randn(2, 100, 60)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        y = fused_attention(qkv, torch.rand(3, generator=torch.Generator().manual_seed(0)), 3, 0.2)
        results.append((y.detach(), torch.autograd.grad(y, qkv, g)[0]))
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_nothing_in_nothing_out() -> None:
    for shape in ((0, 5, 3, 4), (2, 0, 3, 4)):
        qkv = torch.randn(shape, requires_grad=True)
        y = fused_attention(qkv, torch.zeros(1), 1, 0.5)
        assert y.shape == (*shape[:2], 4)
        assert torch.autograd.grad(y.sum(), qkv)[0].shape == shape


@pytest.mark.parametrize(
    ("qkv", "slopes", "kv_heads", "words"),
    [
        (torch.zeros(1, 2, 3, 4, dtype=torch.float64), torch.zeros(1), 1, "float32 on a CPU"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1), 1, "do not hold 1 heads"),
        (torch.zeros(1, 2, 7, 4), torch.zeros(3), 2, "3 heads of queries and 2"),
        (torch.zeros(2, 3, 4), torch.zeros(1), 1, "do not hold"),
    ],
)
def test_what_does_not_fit_is_named(qkv: Tensor, slopes: Tensor, kv_heads: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        fused_attention(qkv, slopes, kv_heads, 0.5)


def test_the_backward_pass_keeps_the_activations_and_little_more() -> None:
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    qkv = torch.randn(1, 4096, 6, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        fused_attention(qkv, torch.zeros(2), 2, 0.25)
    assert kept == 4096 * (6 * 16 + 2 * 16 + 2) + 2  # qkv, y, one number a head and token, slopes
