"""The Triton kernels of LayerNorm and RMSNorm: their cases in separate processes, and code for GPUs not present."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_compiler import Compiler


def test_the_cases_pass(triton_cases: Callable[[Path, str], None]) -> None:
    triton_cases(Path(__file__).with_name("triton_norm_cases.py"), "test")


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize(
    ("capability", "dtype", "features", "affine"),
    [(80, torch.bfloat16, 768, True), (80, torch.float32, 500, False), (90, torch.bfloat16, 8192, True)],
    ids=str,
)
def test_it_compiles_without_a_gpu(
    capability: int,
    dtype: torch.dtype,
    features: int,
    affine: bool,
    rms: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pytest.importorskip("triton", reason="the optional extra 'triton' is not installed")
    from sparsetrain.kernels import triton_bsr, triton_norm

    if triton_bsr.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: there is nothing to compile")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made: dict[str, Any] = {}
    for name in ("_forward", "_backward"):
        made[name] = Compiler(getattr(triton_norm, name), capability)
        monkeypatch.setattr(triton_norm, name, made[name])
    x, weight = torch.empty(4, 100, features, dtype=dtype), torch.empty(features, dtype=dtype) if affine else None
    y, moments = triton_norm.forward(x, weight, None if rms else weight, 1e-5, rms)
    triton_norm.backward(y, x, weight, moments, 4, rms)
    for compiler in made.values():
        (binary,) = compiler.compiled
        ptx = binary.asm["ptx"]
        assert f"sm_{capability}" in ptx
        # Sums stay in registers: nothing spills to local memory, and nothing is added atomically.
        assert not re.search(r"(ld|st)\.local|^\s*(@%p\d+ )?(atom|red)\.", ptx, re.MULTILINE)
