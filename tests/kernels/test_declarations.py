"""Declarations of arguments, by kernels made for these tests: what a signature says, refuses and lets pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pytest
import torch

from sparsetrain.kernels.simd import kernel as kernel_module
from sparsetrain.kernels.simd.arguments import (
    Array,
    Buffer,
    Int,
    Output,
    Step,
    Team,
    computed,
    element_type,
    float32,
    int32,
    step,
    where,
)
from sparsetrain.kernels.simd.checks import ArgumentError
from sparsetrain.kernels.simd.kernel import Kernel
from sparsetrain.kernels.simd.words import share


@Kernel
def _scaled(
    team: Team,
    x: Annotated[Array, float32["rows", "columns"]],
    x_step: Annotated[Int, step["x"]],
    out: Annotated[Output, float32["rows * columns"]],
    rows: Annotated[Int, where["rows <= columns + threads"]],
    columns: Int,
    twice: Annotated[Int, computed["2 * columns + threads"]],
) -> None:
    """Write the rows of x times ``twice``."""
    first, last, _ = share(team, rows)
    for row in range(first, last):
        for column in range(columns):
            out[row * columns + column] = twice * x[row * x_step + column]


@pytest.mark.parametrize("threads", [1, 3])
def test_steps_and_computed_integers_are_those_of_the_arrays(threads: int) -> None:
    wide = np.arange(60, dtype=np.float32).reshape(6, 10)
    for x in (wide[1::2, 2:7], torch.from_numpy(wide)[1::2, 2:7], wide[3:, 3:8]):
        out = np.full(15, np.nan, np.float32)
        _scaled(threads, x=x, out=out, rows=3, columns=5)
        np.testing.assert_array_equal(out.reshape(3, 5), (10 + threads) * np.asarray(x))


def test_a_matrix_that_is_larger_than_needed_is_taken() -> None:
    x, out = torch.ones(9, 9), torch.full((20,), -1.0)
    _scaled(1, x=x, out=out, rows=2, columns=3)
    assert out.tolist() == [7.0] * 6 + [-1.0] * 14


def without_memory() -> dict[str, torch.Tensor]:
    freed = torch.zeros(3, 5)
    freed.untyped_storage().resize_(0)
    return {
        "freed": freed,
        "zeros": torch._efficientzerotensor((3, 5)),
        "functional": torch._to_functional_tensor(torch.zeros(3, 5)),
        "uninitialised": torch.nn.parameter.UninitializedParameter(),
        "nested": torch.nested.nested_tensor([torch.zeros(5)] * 3),
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_tensor_without_memory_of_its_own_is_refused() -> None:
    given = {"out": torch.ones(15), "rows": 3, "columns": 5}
    for what, tensor in without_memory().items():
        with pytest.raises(ArgumentError, match=r"x must be an array of float32 in memory; given is torch"):
            _scaled(1, x=tensor, **given)
        assert what
    seen: list[Any] = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(ArgumentError, match="x must be an array of float32 in memory") as error:
            _scaled(1, x=x, **given)
        seen.append(error)
        return x.sum()

    torch.func.vmap(inside)(torch.zeros(2, 3, 5))
    torch.func.grad(inside)(torch.zeros(3, 5))
    assert len(seen) == 2


@Kernel
def _copied(
    team: Team,
    x: Annotated[Array, float32["== size_x"]],
    y: Annotated[Output, float32["== 1", "==at_x"]],
    y_step: Annotated[Int, step["y"]],
    size_x: Int,
    at_x: Int,
) -> None:
    """Its arguments have names that a check might use itself."""


def test_names_of_arguments_mean_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_copied, "_entry", (0, lambda words: None))
    words: list[Any] = []
    monkeypatch.setattr(kernel_module, "run", lambda address, entry, given, threads: words.append(list(given)))
    given = {"x": torch.zeros(4), "y": torch.zeros(1, 2), "size_x": 4, "at_x": 2}
    _copied(1, **given)
    assert words[0][-2:] == [4, 2]
    for wrong in ({"size_x": 1000}, {"at_x": 3}):
        with pytest.raises(ArgumentError):
            _copied(1, **{**given, **wrong})


@Kernel
def _filled(
    team: Team, y: Annotated[Output, float32["rows", "4"]], y_step: Annotated[Int, step["y"]], rows: Int
) -> None:
    """Its output is a matrix with any stride."""


def test_an_output_whose_rows_share_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_filled, "_entry", (0, lambda words: None))
    monkeypatch.setattr(kernel_module, "run", lambda *call: None)
    for right in (torch.zeros(3, 4), torch.zeros(3, 9)[:, 2:6], torch.zeros(1, 4).as_strided((1, 4), (0, 1))):
        for kind in (right, right.numpy()):
            _filled(1, y=kind, rows=len(right))
    for wrong in (torch.zeros(1, 4).expand(3, 4), torch.zeros(20).as_strided((3, 4), (3, 1))):
        for kind in (wrong, wrong.numpy()):
            with pytest.raises(ArgumentError, match=r"y must be (an array whose rows share no memory|writeable)"):
                _filled(1, y=kind, rows=3)


_POSITIVE = "an array whose strides are not negative"


def test_a_message_says_what_was_needed_and_what_was_given() -> None:
    given = {"x": torch.ones(3, 5), "out": torch.ones(15), "rows": 3, "columns": 5}
    for wrong, message in (
        ({"out": torch.ones(14)}, "out must be an array of rows * columns = 15 elements or more; given is one of 14"),
        ({"x": torch.ones(3, 4)}, "x must be of shape [rows, columns] = [3, 5] or larger; given is [3, 4]"),
        ({"x": torch.ones(15)}, "x must be of shape [rows, columns]; given is [15]"),
        ({"rows": torch.tensor(3)}, "rows must be an integer; given is torch.Tensor"),
        (
            {"rows": 7},
            "rows must be an integer where rows <= columns + threads; given is 7 with columns = 5, threads = 1",
        ),
        (
            {"columns": 2**62},
            f"twice must be an integer of 64 bits; given is 2 * columns + threads with columns = {2**62}, threads = 1",
        ),
        ({"rows": 2**400}, "rows must be an integer from 0 to 2**63 - 1; given is one of 401 bits"),
        (
            {"x": np.ones((5, 5), np.float32)[::-1]},
            f"x must be {_POSITIVE}; given is shape [5, 5] with strides [-5, 1]",
        ),
        ({"out": np.zeros(15, ">f4")}, "out must be an array of float32; given is one of >f4"),
    ):
        with pytest.raises(ArgumentError) as error:
            _scaled(1, **{**given, **wrong})
        assert str(error.value) == f"kernel test_declarations._scaled: {message}"
    with pytest.raises(
        ArgumentError, match=r"has no argument 'colums' \(did you mean 'columns'\?\); it takes x, out, rows"
    ):
        _scaled(1, **given, colums=5)


def _undeclared(team: Team, x: Array) -> None: ...
def _unannotated(team: Team, x) -> None: ...  # type: ignore[no-untyped-def]
def _unknown(team: Team, x: Annotated[Array, float32["rows + 1"]]) -> None: ...
def _stepless(team: Team, x: Annotated[Array, float32["1"]], x_step: Annotated[Int, step["x"]]) -> None: ...
def _open(team: Team, x: Annotated[Array, element_type["1"]]) -> None: ...
def _flagged(team: Team, x: Annotated[Array, float32["n if f > 0"]], n: Int, f: Int) -> None: ...
def _reserved(team: Team, words: Annotated[Array, float32["1"]]) -> None: ...
def _early(team: Team, a: Annotated[Int, computed["b + 1"]], b: Annotated[Int, computed["3"]]) -> None: ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_undeclared, "x is declared neither as an array with a size nor as Int"),
        (_unannotated, "x is declared neither"),
        (_unknown, r"'rows \+ 1' names rows, which is none of its integers"),
        (_stepless, "is no stride of an array with several sizes"),
        (_open, "x has an open type: give element_type"),
        (_flagged, "'f > 0' is none of its integers"),
        (_reserved, "no argument can be called 'words'"),
        (_early, "a is computed from b, which comes later"),
    ],
)
def test_a_signature_that_declares_too_little_is_refused(function: Callable[..., None], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Kernel(function)


def test_declarations_are_what_the_signature_says() -> None:
    declaration = Kernel(_open, "opened", int32).declaration
    assert (declaration.kernel, declaration.arrays["x"]) == ("test_declarations.opened", int32["1"])
    assert _scaled.declaration.given == ("x", "out", "rows", "columns")
    assert _scaled.declaration.integers["x_step"] == Step("x", 0)


def test_a_buffer_is_contiguous() -> None:
    with pytest.raises(ValueError, match="a buffer is contiguous"):
        Buffer(np.zeros((4, 4), np.float32)[:, ::2])
