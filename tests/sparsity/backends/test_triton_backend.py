"""The backend ``triton``: its cases in a process of their own, and what holds where nothing is interpreted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsetrain.errors import UserError
from sparsetrain.registry import Registry
from sparsetrain.sparsity import SparseLinear, SparsityPattern, backend_names
from sparsetrain.sparsity.backends import base
from sparsetrain.sparsity.backends.triton import register_triton

INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="the optional extra 'triton' is not installed")


def test_the_cases_pass(triton_cases: Callable[[Path, str], None]) -> None:
    triton_cases(Path(__file__).with_name("triton_backend_cases.py"), "test")


def test_it_is_registered_where_triton_is_installed_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("triton" in backend_names()) == INSTALLED
    monkeypatch.setattr(base, "BACKENDS", Registry("backend", "backend"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not register_triton()
    assert backend_names() == ["auto"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert register_triton()
    assert backend_names() == ["auto", "triton"]


@needs_triton
def test_a_tensor_on_the_cpu_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain.kernels import triton_bsr

    monkeypatch.setattr(triton_bsr, "INTERPRETED", False)
    pattern = SparsityPattern.from_mask(torch.ones(16, 16, dtype=torch.bool), (8, 8))
    layer = SparseLinear(16, 16, pattern=pattern, backend="triton", seed=0)
    with pytest.raises(
        UserError, match=r"^backend 'triton' computes on a GPU, not on cpu; backend='auto' takes another$"
    ):
        layer(torch.randn(2, 16))
