"""Whether a call gives a kernel what it declares: asked before any memory is touched.

Two checks have one meaning. `in_words` finds what is wrong and says it. `straight` makes a function for one kernel,
without loops and look-ups, that lets right arguments pass in a microsecond or two; what it does not know, such as numpy
arrays, is left to `in_words`.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from sparsetrain.errors import nearest
from sparsetrain.kernels.simd.arguments import ArrayOf, Buffer, Computed, Declaration, Elements, Step


class ArgumentError(TypeError):
    """A kernel was called with an argument that it does not take; nothing was read and nothing was written."""


def in_words(declaration: Declaration, threads: int, arguments: Mapping[str, Any]) -> array[int]:
    """Return the words of a call.

    Raises:
        ArgumentError: what is given is not what is declared; the message names the argument and both.
    """
    _check_names(declaration, arguments)
    kernel, found = declaration.kernel, {"threads": threads}
    for name, declared in declaration.integers.items():
        if declared is None:
            found[name] = _integer(kernel, name, arguments[name])
    views = {name: _array(kernel, name, declared, arguments[name]) for name, declared in declaration.arrays.items()}
    # In the order of the signature: a computed integer may be computed from one before it.
    for name, declared in declaration.integers.items():
        if isinstance(declared, Step):
            found[name] = views[declared.array].strides[declared.dimension]
        elif isinstance(declared, Computed):
            found[name] = declaration.value(declared.expression, found)
    for name, view in views.items():
        sizes = declaration.arrays[name].sizes
        least = [declaration.value(size, found) for size in sizes]
        if len(sizes) == 1 and view.size < least[0]:
            _refuse(kernel, name, f"an array of {sizes[0]} = {least[0]} elements or more", f"one of {view.size}")
        if len(sizes) > 1 and any(have < need for have, need in zip(view.shape, least, strict=True)):
            _refuse(kernel, name, f"of shape {_shape(sizes)} = {_shape(least)} or larger", _shape(view.shape))
    words = (views[name].address if name in views else found[name] for name in declaration.order)
    return array("q", [0, 0, 0, 1, *words])


def _refuse(kernel: str, name: str, needed: str, found: str) -> NoReturn:
    raise ArgumentError(f"kernel {kernel}: {name} must be {needed}; given is {found}")


def _check_names(declaration: Declaration, arguments: Mapping[str, Any]) -> None:
    kernel, takes = declaration.kernel, declaration.given
    for name in arguments:
        if name not in takes:
            hint = nearest(name, takes)
            raise ArgumentError(f"kernel {kernel} has no argument {name!r}{hint}; it takes {', '.join(takes)}")
    if missing := [name for name in takes if name not in arguments]:
        raise ArgumentError(f"kernel {kernel} lacks the argument {missing[0]!r}; it takes {', '.join(takes)}")


def _integer(kernel: str, name: str, value: Any) -> int:
    if not isinstance(value, int | np.integer):
        _refuse(kernel, name, "an integer", _kind(value))
    if not -(2**63) <= value < 2**63:
        _refuse(kernel, name, "an integer of 64 bits", str(value))
    return int(value)


def _array(kernel: str, name: str, declared: ArrayOf, value: Any) -> _View:
    """Return where an array lies, if its type, its device and its strides are what is declared."""
    view = _view(value)
    if view is None:
        _refuse(kernel, name, f"an array of {declared.elements.name}", _kind(value))
    if not declared.elements.takes(view.dtype):
        _refuse(kernel, name, f"an array of {declared.elements.name}", f"one of {view.dtype}")
    if view.device != "cpu":
        _refuse(kernel, name, "on the CPU", f"an array on {view.device}")
    strided = f"shape {_shape(view.shape)} with strides {_shape(view.strides)}"
    if len(declared.sizes) == 1:
        if not view.contiguous:
            _refuse(kernel, name, "contiguous", strided)
    elif len(view.shape) != len(declared.sizes):
        _refuse(kernel, name, f"of shape {_shape(declared.sizes)}", _shape(view.shape))
    elif view.size > 0 and view.shape[-1] > 1 and view.strides[-1] != 1:
        _refuse(kernel, name, "contiguous along its last dimension", strided)
    elif min(view.strides) < 0:
        _refuse(kernel, name, "an array whose strides are not negative", strided)
    return view


def _shape(sizes: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


@dataclass(frozen=True)
class _View:
    """Where an array lies. Strides count elements; the device is ``cpu`` or another."""

    address: int
    dtype: Any
    device: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    size: int
    contiguous: bool


def _view(value: Any) -> _View | None:
    """Return where an array lies, or None for what is no array."""
    if isinstance(value, Buffer):
        value = value.array
    if isinstance(value, np.ndarray):
        strides = tuple(each // max(1, value.itemsize) for each in value.strides)
        if any(each % max(1, value.itemsize) for each in value.strides):
            return None  # a field of records, or the like: no array of such elements
        address, contiguous = value.ctypes.data, bool(value.flags.c_contiguous)
        return _View(address, value.dtype, "cpu", value.shape, strides, value.size, contiguous)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return None
    device = value.device.type
    address = value.data_ptr() if device == "cpu" else 0
    shape, strides = tuple(value.shape), tuple(value.stride())
    return _View(address, value.dtype, device, shape, strides, value.numel(), value.is_contiguous())


def _kind(value: Any) -> str:
    """Return what a message calls a value that is no array, or no integer."""
    module = type(value).__module__
    return type(value).__name__ if module == "builtins" else f"{module}.{type(value).__name__}"


def straight(declaration: Declaration) -> Callable[..., array[int] | None]:
    """Return a function that takes threads and the arguments by keyword, and returns the words or None.

    None, a `TypeError` (names) and an `OverflowError` (integers of more than 64 bits) mean that `in_words` must look.
    It takes more than plain torch tensors and buffers, or says what is wrong. Without torch in the process every answer
    is None.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return lambda threads, **arguments: None
    given = [name for name, declared in declaration.integers.items() if declared is None]
    lines = [f"if not ({' is '.join(f'type({name})' for name in given)} is int): return None"] if given else []
    found: dict[str, Any] = {**declaration.names, "Tensor": torch.Tensor, "Buffer": Buffer, "array": array}
    too_small = []
    for name, declared in declaration.arrays.items():
        if declared.elements.dtypes:
            found[f"dtype_{name}"] = getattr(torch, declared.elements.dtypes[0])
        found[f"taken_{name}"] = _buffer_types(declared.elements)
        if len(declared.sizes) == 1:
            lines += _flat(name, declared.elements)
            too_small.append(f"size_{name} < ({declared.sizes[0]})")
        else:
            lines += _strided(name, declared)
            too_small += [f"shape_{name}[{axis}] < ({size})" for axis, size in enumerate(declared.sizes)]
    for name, one in declaration.integers.items():
        if isinstance(one, Step):
            lines.append(f"{name} = step_{one.array}[{one.dimension}]")
        elif isinstance(one, Computed):
            lines.append(f"{name} = {one.expression}")
    if too_small:
        lines.append(f"if {' or '.join(too_small)}: return None")
    words = [f"at_{name}" if name in declaration.arrays else name for name in declaration.order]
    lines.append(f"return array('q', (0, 0, 0, 1, {', '.join(words)}))")
    exec(f"def check(threads, *, {', '.join(declaration.given)}):\n    " + "\n    ".join(lines), found)
    return found["check"]


def _flat(name: str, elements: Elements) -> list[str]:
    return [
        f"if type({name}) is Tensor:",
        f"    if {_other_type(name, elements)} or not {name}.is_contiguous() or not {name}.is_cpu: return None",
        f"    size_{name}, at_{name} = {name}.numel(), {name}.data_ptr()",
        f"elif type({name}) is Buffer:",
        f"    if {name}.dtype not in taken_{name}: return None",
        f"    size_{name}, at_{name} = {name}.size, {name}.address",
        "else: return None",
    ]


def _strided(name: str, declared: ArrayOf) -> list[str]:
    other = f"{_other_type(name, declared.elements)} or {name}.dim() != {len(declared.sizes)} or not {name}.is_cpu"
    return [
        f"if type({name}) is not Tensor or {other}: return None",
        f"shape_{name}, step_{name}, at_{name} = {name}.shape, {name}.stride(), {name}.data_ptr()",
        f"if step_{name}[-1] != 1 and shape_{name}[-1] > 1: return None",
    ]


def _other_type(name: str, elements: Elements) -> str:
    return f"{name}.dtype is not dtype_{name}" if elements.dtypes else f"{name}.itemsize != {elements.itemsize}"


def _buffer_types(elements: Elements) -> set[str]:
    kinds = (np.float32, np.uint16, np.int16, np.int32, np.uint32, np.int64)
    return {np.dtype(kind).str for kind in kinds if elements.takes(np.dtype(kind))}
