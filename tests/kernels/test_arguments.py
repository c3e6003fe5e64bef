"""The arguments of all kernels: a call that does not match raises before any memory is touched."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from all_kernels import all_kernels

from sparsetrain.kernels import bsr_layout, csr_layout
from sparsetrain.kernels.simd import kernel as kernel_module
from sparsetrain.kernels.simd.arguments import (
    Buffer,
    Computed,
    Declaration,
    Given,
)
from sparsetrain.kernels.simd.checks import MISSED, ArgumentError, in_words, straight

THREADS = 2
DTYPES = {"float32": np.float32, "bfloat16": np.uint16, "uint16": np.uint16, "int32": np.int32, "int64": np.int64}


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


def test_there_are_kernels_to_test() -> None:
    assert {"csr.multiply", "bsr.gradients_bfloat16", "attention.backward", "scatter.gather16"} <= KERNELS.keys()
