"""Arguments of kernels: a call that does not match the declaration raises before any memory is touched."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import pkgutil
import random
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np
import pytest
import scipy.sparse
import torch

from sparsetrain import kernels
from sparsetrain.kernels import bsr_layout, csr_layout
from sparsetrain.kernels.simd import kernel as kernel_module
from sparsetrain.kernels.simd.arguments import (
    Array,
    Buffer,
    Computed,
    Declaration,
    Given,
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
from sparsetrain.kernels.simd.checks import MISSED, ArgumentError, in_words, straight
from sparsetrain.kernels.simd.kernel import Kernel
from sparsetrain.kernels.simd.words import share

THREADS = 2
DTYPES = {"float32": np.float32, "bfloat16": np.uint16, "uint16": np.uint16, "int32": np.int32, "int64": np.int64}


def all_kernels() -> dict[str, Kernel]:
    found = {}
    for module in pkgutil.walk_packages(kernels.__path__, "sparsetrain.kernels."):
        if "triton" not in module.name:
            things = vars(importlib.import_module(module.name)).values()
            found |= {thing.declaration.kernel: thing for thing in things if isinstance(thing, Kernel)}
    return found


KERNELS = all_kernels()


@functools.cache
def integers_of(kernel: str) -> dict[str, int]:
    """Return valid integers of a kernel, drawn until its conditions hold, each from 3 on and different if it can be."""
    declaration, draw = KERNELS[kernel].declaration, random.Random(1)
    names = [name for name in declaration.given if name in declaration.integers]
    flags = {size.flag for array in declaration.arrays.values() for size in array.sizes}
    for _ in range(1_000_000):
        found = dict(zip(names, draw.sample(range(3, 40), len(names)), strict=True))
        found |= {name: 1 if name in flags else THREADS for name in names if name in flags or name == "pieces"}
        everything = {"threads": THREADS, **found}
        conditions = (
            one.condition for one in declaration.integers.values() if isinstance(one, Given) and one.condition
        )
        if all(declaration.value(condition, everything) for condition in conditions):
            return found
    raise AssertionError(f"no integers for {kernel}")


def arguments_of(kernel: str) -> dict[str, Any]:
    """Return valid arguments of a kernel, made from its declaration alone; each array is just large enough."""
    declaration = KERNELS[kernel].declaration
    given: dict[str, Any] = dict(integers_of(kernel))
    known = {"threads": THREADS, **given}
    for name, declared in declaration.integers.items():
        if isinstance(declared, Computed):
            known[name] = declaration.value(declared.expression, known)
    for name, array in declaration.arrays.items():
        shape = [declaration.value(size.expression, known) for size in array.sizes]
        kinds = array.elements.dtypes
        dtype = DTYPES[kinds[0]] if kinds else (np.float32 if array.elements.itemsize == 4 else np.uint16)
        given[name] = np.full(shape, 7, dtype)
    return given


def same_memory(array: np.ndarray) -> torch.Tensor | np.ndarray:
    """Return a tensor on the array's memory; torch has no read-only ones."""
    return torch.from_numpy(array) if array.flags.writeable else array


def apart(array: np.ndarray) -> np.ndarray:
    """Return an equal array whose last dimension is not contiguous."""
    return np.repeat(array, 2, axis=-1)[..., ::2]


def shorter(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the array without the last index of each dimension."""
    for axis, size in enumerate(array.shape):
        yield array[tuple(slice(0, size - 1) if at == axis else slice(None) for at in range(array.ndim))]


def longer(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the array with an index more in each dimension."""
    for axis in range(array.ndim):
        yield np.concatenate((array, array.take([0], axis)), axis)


def read_only(array: np.ndarray) -> np.ndarray:
    copied = array.copy()
    copied.flags.writeable = False
    return copied


def mistakes(declaration: Declaration, given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield descriptions of mistakes, each with arguments that have the mistake and a pattern of the message."""
    for name in given:
        yield f"no {name}", {key: value for key, value in given.items() if key != name}, f"lacks the argument '{name}'"
        yield f"None for {name}", {**given, name: None}, f"{name} must be .*; given is NoneType"
    yield "an argument more", {**given, "unheard_of": 1}, "has no argument 'unheard_of'"
    for name in declaration.arrays:
        array = given[name]
        strange = array.astype(np.float64 if array.dtype != np.float64 else np.float32)
        yield f"{name} of another type", {**given, name: strange}, f"{name} must be an array of .*; given is .*float64"
        if not np.array_equal(array.shape, [1]):
            yield f"{name} with gaps", {**given, name: apart(array)}, f"{name} must be contiguous"
        for short in shorter(array):
            yield f"{name} too short", {**given, name: np.ascontiguousarray(short)}, f"{name} must be (an|of shape)"
        if all(size.exact for size in declaration.arrays[name].sizes):
            for long in longer(array):
                yield f"{name} too long", {**given, name: long}, f"{name} must be (an|of shape)"
        if declaration.arrays[name].written:
            yield f"{name} read-only", {**given, name: read_only(array)}, f"{name} must be writeable"
        on_gpu = torch.empty(array.shape, dtype=same_memory(array).dtype, device="meta")
        yield f"{name} elsewhere", {**given, name: on_gpu}, f"{name} must be on the CPU; given is an array on meta"
        sparse = torch.empty(array.shape, dtype=same_memory(array).dtype, layout=torch.sparse_coo)
        yield f"{name} sparse", {**given, name: sparse}, f"{name} must be an array of .*; given is .* torch.sparse_coo"
    for name, other in itertools.combinations(given, 2):
        # Arrays of one size may be exchanged, unless they are buffers: see the next test.
        if not alike(given[name], given[other]):
            exchanged = {**given, name: given[other], other: given[name]}
            yield f"{name} and {other} exchanged", exchanged, "must be|cannot be checked"
    for name, value in given.items():
        if isinstance(value, int):
            yield f"{name} is no integer", {**given, name: 2.0}, f"{name} must be an integer; given is float"
            yield f"{name} is a truth value", {**given, name: True}, f"{name} must be an integer; given is bool"
            for beyond in (-1, -(2**63), 2**63, 2**400):
                yield f"{name} is {beyond}", {**given, name: beyond}, f"{name} must be an integer from 0 to"


def alike(one: Any, other: Any) -> bool:
    """Return whether two arguments may take each other's place."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    if isinstance(one, int) or isinstance(other, int):
        return False
    return bool(one.dtype == other.dtype and one.shape == other.shape)


@pytest.mark.parametrize("name", KERNELS)
def test_every_mistake_raises_in_words_and_nothing_is_touched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KERNELS[name]
    given = arguments_of(name)
    ran: list[Any] = []
    monkeypatch.setattr(kernel, "_entry", (0, lambda words: None))
    monkeypatch.setattr(kernel_module, "run", lambda *call: ran.append(call))  # so that a missed mistake does not crash
    kernel(THREADS, **given)
    assert len(ran) == 1
    ran.clear()
    kinds: list[Callable[[Any], Any]] = [lambda value: value, same_memory]
    for what, wrong, message in mistakes(kernel.declaration, given):
        for kind in kinds:
            called = {key: kind(one) if isinstance(one, np.ndarray) else one for key, one in wrong.items()}
            with pytest.raises(ArgumentError, match=message) as error:
                kernel(THREADS, **called)
            assert f"kernel {name}" in str(error.value), what
            assert "\n" not in str(error.value)
    for threads in (0, -1, 2.0, None, "2", True, 10**9, 2**70):
        with pytest.raises(ArgumentError, match=r"threads must be an integer"):
            kernel(threads, **given)  # type: ignore[arg-type]
    assert not ran
    assert all((value == 7).all() for value in given.values() if isinstance(value, np.ndarray))


@pytest.mark.parametrize("name", KERNELS)
def test_the_straight_check_returns_the_words_of_the_other_for_tensors_and_buffers(name: str) -> None:
    declaration = KERNELS[name].declaration
    given = arguments_of(name)
    expected = in_words(declaration, THREADS, given)
    check = straight(declaration)
    tensors = {key: same_memory(one) if isinstance(one, np.ndarray) else one for key, one in given.items()}
    bfloat16 = [key for key, array in declaration.arrays.items() if array.elements.dtypes[:1] == ("bfloat16",)]
    for key in bfloat16:
        tensors[key] = tensors[key].view(torch.bfloat16)
    assert check(THREADS, **tensors) == in_words(declaration, THREADS, tensors) == expected
    flat = [key for key, array in declaration.arrays.items() if len(array.sizes) == 1]
    buffers = {key: Buffer(given[key]) for key in flat if not declaration.arrays[key].written}
    assert check(THREADS, **{**tensors, **buffers}) == expected
    for what, wrong, _ in mistakes(declaration, given):
        if wrong.keys() == given.keys():
            called = {
                key: same_memory(one) if isinstance(one, np.ndarray) and key not in bfloat16 else one
                for key, one in {**tensors, **{key: one for key, one in wrong.items() if one is not given[key]}}.items()
            }
            with contextlib.suppress(*MISSED):
                assert check(THREADS, **called) is None, what


def layouts() -> dict[str, Any]:
    """Return what real layouts of a square matrix give the kernels that compute gradients, by kernel."""
    draw = np.random.default_rng(0)
    matrix = scipy.sparse.csr_array(draw.random((128, 128)) < 0.5)
    row_ptr, col = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32)
    blocks = scipy.sparse.csr_array(draw.random((16, 16)) < 0.5)
    block_ptr, block_col = blocks.indptr.astype(np.int64), blocks.indices.astype(np.int32)
    return {
        "csr.gradients": {
            **csr_layout.build_layout(row_ptr, col, 128).arguments,
            **csr_layout.build_transposed(row_ptr, col, 128).turned_arguments,
        },
        "bsr.gradients": {
            **bsr_layout.build_blocks(block_ptr, block_col, (128, 128), (8, 8)).arguments,
            **bsr_layout.build_turned(block_ptr, block_col, (128, 128), (8, 8)).turned_arguments,
        },
    }


@pytest.mark.parametrize("name", ["csr.gradients", "bsr.gradients"])
def test_index_arrays_of_one_type_and_size_cannot_be_exchanged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, indices = KERNELS[name], layouts()[name]
    declaration = kernel.declaration
    known = {"threads": 1, "tokens": 70, "columns": 128, "rows": 128, "need_dx": 1, "need_values": 1, "pieces": 1}
    known |= {key: value for key, value in indices.items() if isinstance(value, int)}
    for key, declared in declaration.integers.items():
        if isinstance(declared, Computed):
            known[key] = declaration.value(declared.expression, known)
    given: dict[str, Any] = {key: known[key] for key in declaration.given if key in known} | indices
    for key, array in declaration.arrays.items():
        if key not in indices:
            dtype = torch.int64 if array.elements.name == "int64" else torch.float32
            given[key] = torch.zeros([declaration.value(size.expression, known) for size in array.sizes], dtype=dtype)
    ran: list[Any] = []
    monkeypatch.setattr(kernel, "_entry", (0, lambda words: None))
    monkeypatch.setattr(kernel_module, "run", lambda *call: ran.append(call))
    kernel(1, **given)
    assert len(ran) == 1
    check = straight(declaration)
    assert check(1, **given) == in_words(declaration, 1, given)
    for one, other in itertools.combinations([key for key, value in indices.items() if isinstance(value, Buffer)], 2):
        with pytest.raises(ArgumentError, match=r"must be (a buffer for|an array of)"):
            kernel(1, **{**given, one: given[other], other: given[one]})
    if name == "csr.gradients":
        for width in (63, 65, 100, 127):  # some have as many blocks of columns as 64
            with pytest.raises(ArgumentError, match=r"(width|ends|t_ends) must be"):
                kernel(1, **{**given, "width": width})
    with pytest.raises(ArgumentError, match=r"dx must be of shape"):  # as if only the values were needed, exchanged
        kernel(1, **{**given, "need_values": 0, "dx": torch.empty(0, 0)})
    assert len(ran) == 1


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


def test_there_are_kernels_to_test() -> None:
    assert {"csr.multiply", "bsr.gradients_bfloat16", "attention.backward", "scatter.gather16"} <= KERNELS.keys()


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


_FLIPPED, _POSITIVE = np.ones((5, 5), np.float32)[::-1], "an array whose strides are not negative"


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
        assert str(error.value) == f"kernel test_arguments._scaled: {message}"
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
    assert (declaration.kernel, declaration.arrays["x"]) == ("test_arguments.opened", int32["1"])
    assert _scaled.declaration.given == ("x", "out", "rows", "columns")
    assert _scaled.declaration.integers["x_step"] == Step("x", 0)


def test_a_buffer_is_contiguous() -> None:
    with pytest.raises(ValueError, match="a buffer is contiguous"):
        Buffer(np.zeros((4, 4), np.float32)[:, ::2])
