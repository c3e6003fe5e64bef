"""The Triton kernels: their cases in separate processes, and their compiled code for GPUs that are not present."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_compiler import Compiler

PRODUCTS = ["matmul", "matmul_t", "sampled"]


# The cases are divided in two, so that two workers can share them.
@pytest.mark.parametrize("selection", ["the_three_products or every_", "not (the_three_products or every_)"])
def test_the_cases_pass(selection: str, triton_cases: Callable[[Path, str], None]) -> None:
    triton_cases(Path(__file__).with_name("triton_cases.py"), selection)


# -- compiled without a GPU ------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    pytest.importorskip("triton", reason="the optional extra 'triton' is not installed")
    from sparsetrain.kernels import triton_bsr

    if triton_bsr.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: there is nothing to compile")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return triton_bsr


def compiled(
    kernels: Any,
    monkeypatch: pytest.MonkeyPatch,
    product: str,
    block: tuple[int, int],
    dtype: torch.dtype,
    capability: int,
    tokens: int = 2048,
) -> Any:
    """Return what ``product`` of a matrix of 12 x 12 blocks launches, compiled."""
    rows, columns = 12 * block[0], 12 * block[1]
    row_ptr, col = torch.arange(0, 12 * 6 + 1, 6), torch.arange(0, 12, 2).repeat(12)
    layout = kernels.layout(row_ptr, col, (rows, columns), block)
    compilers = [Compiler(kernel, capability) for kernel in (kernels._product, kernels._sampled)]
    monkeypatch.setattr(kernels, "_product", compilers[0])
    monkeypatch.setattr(kernels, "_sampled", compilers[1])
    shapes = ((tokens, columns), (tokens, rows), (72 * block[0] * block[1],))
    x, g, values = (torch.empty(*shape, dtype=dtype) for shape in shapes)
    first, second = {"matmul": (x, values), "matmul_t": (g, values), "sampled": (g, x)}[product]
    getattr(kernels, product)(first, second, layout)
    (only,) = compilers[0].compiled + compilers[1].compiled
    return only


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    ("capability", "dtype", "block", "tokens"),
    [
        (80, torch.bfloat16, (16, 16), 2048),
        (80, torch.float32, (16, 16), 2048),
        (80, torch.float16, (5, 12), 2048),
        (90, torch.bfloat16, (64, 64), 2048),
        (90, torch.float32, (64, 64), 2048),
        (90, torch.bfloat16, (4, 4), 1),
    ],
    ids=str,
)
def test_it_compiles_without_a_gpu(
    product: str,
    capability: int,
    dtype: torch.dtype,
    block: tuple[int, int],
    tokens: int,
    kernels: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    binary = compiled(kernels, monkeypatch, product, block, dtype, capability, tokens)
    ptx = binary.asm["ptx"]
    assert f"sm_{capability}" in ptx
    # The smallest shared memory per program among these generations (8.6 and 8.9).
    assert binary.metadata.shared <= 99 * 1024
    on_tensor_cores = bool(re.search(r"\bw?g?mma\.", ptx))
    assert on_tensor_cores == (dtype != torch.float32)
    assert "tf32" not in ptx
    assert not re.search(r"^\s*(@%p\d+ )?(atom|red)\.", ptx, re.MULTILINE)


@pytest.mark.parametrize("product", PRODUCTS)
def test_inputs_are_copied_16_bytes_at_a_time(product: str, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the alignment hints to the compiler, each of these copies would be loads of 2 bytes.
    ptx = compiled(kernels, monkeypatch, product, (16, 16), torch.bfloat16, 80).asm["ptx"]
    assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10,", ptx)
    assert not re.search(r"ld\.global\S*\.b16", ptx)
