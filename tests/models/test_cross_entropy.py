"""Chunked cross-entropy against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsetrain.models import cross_entropy as module


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_CPU_ELEMENTS", "_GPU_ELEMENTS"):
        monkeypatch.setattr(module, name, 7 * 50)
    monkeypatch.setattr(module, "_LEAST_TOKENS", 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradients_equal_torch_cross_entropy(
    dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    hidden = (3 * torch.randn(40, 8, dtype=dtype, device=device)).requires_grad_()
    weight = torch.randn(50, 8, dtype=dtype, device=device, requires_grad=True)
    targets = torch.randint(0, 50, (40,), device=device)
    targets[3:20] = module.IGNORED
    expected = F.cross_entropy(hidden @ weight.t(), targets)
    actual = module.cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(
        torch.autograd.grad(2.5 * actual, (hidden, weight)),
        torch.autograd.grad(2.5 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_gradcheck() -> None:
    hidden = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (9,))
    targets[0] = module.IGNORED
    assert torch.autograd.gradcheck(lambda h, w: module.cross_entropy(h, w, targets), (hidden, weight))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient(frozen: int) -> None:
    inputs = [torch.randn(9, 4, requires_grad=frozen != 0), torch.randn(50, 4, requires_grad=frozen != 1)]
    module.cross_entropy(*inputs, torch.randint(0, 50, (9,))).backward()
    assert inputs[frozen].grad is None
    assert inputs[1 - frozen].grad is not None


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight = torch.full((2, 1), 1e4), torch.tensor([[1.0], [-1.0]])
    loss = module.cross_entropy(hidden, weight, torch.tensor([0, 1]))
    assert float(loss) == pytest.approx(1e4)


def test_autocast_matches_torch_under_autocast() -> None:
    hidden = torch.randn(40, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        actual = module.cross_entropy(hidden, weight, targets)
        expected = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    torch.testing.assert_close(actual, expected)
    ours = torch.autograd.grad(actual, (hidden, weight))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other, atol=2e-3, rtol=2e-2)


def test_token_losses_equal_torch_cross_entropy() -> None:
    hidden, weight, targets = torch.randn(40, 8), torch.randn(50, 8), torch.randint(0, 50, (40,))
    targets[5] = module.IGNORED
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    actual = module.token_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(actual, expected)
    assert actual[5] == 0
