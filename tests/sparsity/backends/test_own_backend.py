"""A backend of one's own in two files, a kernel and a backend, against dense torch and up to the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparsetrain import SparseLinear, plugins
from sparsetrain.bench.crossover import measurable, tuned
from sparsetrain.cli import main
from sparsetrain.errors import UserError
from sparsetrain.kernels.simd.checks import ArgumentError
from sparsetrain.sparsity.backends import auto
from sparsetrain.sparsity.backends.auto import Crossover
from sparsetrain.sparsity.backends.base import BACKENDS, Backend, register_backend
from sparsetrain.sparsity.backends.cpu import CpuBackend

KERNEL = """
from typing import Annotated
from sparsetrain.kernels.simd.arguments import Array, Int, Output, Team, float32, int32, int64, step
from sparsetrain.kernels.simd.kernel import Kernel
from sparsetrain.kernels.simd.words import share


@Kernel
def multiply(
    team: Team,
    x: Annotated[Array, float32["== tokens", "== columns"]],
    x_step: Annotated[Int, step["x"]],
    y: Annotated[Output, float32["== tokens * rows"]],
    values: Annotated[Array, float32["== nnz"]],
    row_ptr: Annotated[Array, int64["== rows + 1"]],
    col: Annotated[Array, int32["== nnz"]],
    tokens: Int,
    columns: Int,
    rows: Int,
    nnz: Int,
) -> None:
    first, last, _ = share(team, tokens)
    for token in range(first, last):
        for row in range(rows):
            total = values[0] * 0
            for place in range(row_ptr[row], row_ptr[row + 1]):
                total += values[place] * x[token * x_step + col[place]]
            y[token * rows + row] = total
"""

BACKEND = """
import torch
import sparsetrain
import toy_kernel


@sparsetrain.register_backend("toy")
class Toy(sparsetrain.Backend):
    tuned_with = (1, 1)

    def refusal(self, dtype, device, pattern):
        return None if dtype == torch.float32 and pattern.block == (1, 1) else "computes single weights in float32"

    def product(self, x, values, pattern):
        y = x.new_empty(len(x), pattern.shape[0])
        toy_kernel.multiply(
            2, x=x, y=y, values=values, row_ptr=pattern.row_ptr, col=pattern.col,
            tokens=len(x), columns=pattern.shape[1], rows=pattern.shape[0], nnz=pattern.nnz,
        )
        return y

    def matmul(self, x, values, pattern):
        return self.product(x, values, pattern)

    def matmul_t(self, g, values, pattern):
        transposed, order = pattern.transpose()
        return self.product(g, values[order], transposed)

    def sampled(self, g, x, pattern):
        rows, columns = pattern.positions() // pattern.shape[1], pattern.positions() % pattern.shape[1]
        return (g[:, rows] * x[:, columns]).sum(0)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy_kernel.py").write_text(KERNEL)
    path = tmp_path / "toy_backend.py"
    path.write_text(BACKEND)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(plugins.VARIABLE, str(path))
    monkeypatch.setattr(plugins, "_loaded", set())
    monkeypatch.setattr(BACKENDS, "_things", dict(BACKENDS._things))
    monkeypatch.delitem(__import__("sys").modules, "toy_backend", raising=False)
    return path


def test_it_computes_what_dense_torch_computes(toy: Path) -> None:
    layer = SparseLinear(24, 40, density=0.3, seed=0, backend="toy")  # the name leads to the plugin
    x = torch.randn(3, 7, 24, requires_grad=True)
    g = torch.randn(3, 7, 40)
    y = layer(x)
    found = y, *torch.autograd.grad(y, (x, layer.values, layer.bias), g)
    weight = layer.dense_weight().detach().requires_grad_()
    dense = F.linear(x, weight, layer.bias)
    of_x, of_weight, of_bias = torch.autograd.grad(dense, (x, weight, layer.bias), g)
    torch.testing.assert_close(found, (dense, of_x, of_weight[layer.pattern.mask()], of_bias))


def test_its_kernel_checks_what_it_is_called_with(toy: Path) -> None:
    BACKENDS.check("toy")
    import toy_kernel  # type: ignore[import-not-found]

    pattern = SparseLinear(24, 40, density=0.3, seed=0).pattern
    y = torch.full((2, 40), 7.0)
    given = {
        "x": torch.ones(2, 24),
        "y": y,
        "values": torch.ones(pattern.nnz),
        "row_ptr": pattern.row_ptr,
        "col": pattern.col,
        "tokens": 2,
        "columns": 24,
        "rows": 40,
        "nnz": pattern.nnz,
    }
    with pytest.raises(ArgumentError, match=r"toy_kernel\.multiply: values .*float64"):
        toy_kernel.multiply(1, **{**given, "values": torch.ones(pattern.nnz, dtype=torch.float64)})
    with pytest.raises(ArgumentError, match=r"toy_kernel\.multiply: row_ptr"):
        toy_kernel.multiply(1, **{**given, "row_ptr": pattern.row_ptr[:-1]})
    assert bool((y == 7.0).all())
    toy_kernel.multiply(1, **given)
    assert bool((y != 7.0).any())


def test_a_backend_without_a_product_is_refused_when_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS, "_things", dict(BACKENDS._things))

    class Half(Backend):
        def matmul(self, x: Any, values: Any, pattern: Any) -> Any: ...

    class Compiled(CpuBackend): ...

    class Odd(Half):
        def matmul_t(self, g: Any) -> Any: ...

        def sampled(self, g: Any, x: Any, pattern: Any) -> Any: ...

    for kind, message in (
        (Half, r"backend 'mine': .*Half must define matmul_t, sampled"),
        (Compiled, r"backend 'mine': .*Compiled must define backward, by_example, forward, unsuited"),
        (Odd, r"backend 'mine': matmul_t .* must be a function of \(g, values, pattern\)"),
        (int, r"backend 'mine': <class 'int'> must be a sparsetrain.Backend, or a class derived from it"),
    ):
        with pytest.raises(UserError, match=message):
            register_backend("mine", kind)  # type: ignore[type-var]
    assert "mine" not in BACKENDS


def test_auto_chooses_it_where_its_table_leads_further_than_the_others(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BACKENDS.check("toy")
    assert tuned()["toy"] == (1, 1)
    assert [pair for pair in measurable() if pair[0] == "toy"] == [("toy", torch.float32)]  # it refuses bfloat16
    tables = {name: Crossover([64], [64], [1], [[[density]]]) for name, density in (("csr", 0.4), ("toy", 0.6))}
    monkeypatch.setattr(auto, "_tables", tables)
    monkeypatch.setattr(auto, "_read", [True])
    cpu = torch.device("cpu")
    patterns = {density: SparseLinear(64, 64, density=density, seed=0).pattern for density in (0.3, 0.5, 0.7)}
    chosen = [auto.choose(pattern, 64, torch.float32, cpu) for pattern in patterns.values()]
    assert chosen == ["toy", "toy", "masked"]
    assert auto.choose(patterns[0.3], 64, torch.bfloat16, cpu) == "csr"
    monkeypatch.setitem(tables, "toy", Crossover([64], [64], [1], [[[0.35]]]))
    assert auto.choose(patterns[0.3], 64, torch.float32, cpu) == "csr"


def test_a_configuration_names_it(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the sentence of number {number} is here" for number in range(300)))
    command = [
        *("pretrain", "model=tiny", f"data.path={text}", "data.tokenizer=bytes", "data.context=16"),
        *("sparsity.sparsity=0.5", "budget.steps=2", "budget.batch_size=2", f"run_dir={tmp_path / 'run'}"),
    ]
    assert main([*command, "sparsity.backend=toyy"]) == 2
    assert "sparsity.backend='toyy' is not one of auto, " in capsys.readouterr().err
    assert main([*command, "sparsity.backend=toy"]) == 0
    chosen = json.loads((tmp_path / "run" / "backends.json").read_text())
    assert set(chosen.values()) == {"toy"}
