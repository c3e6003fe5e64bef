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
from sparsetrain.kernels.simd.arguments import (
    MAX_THREADS,
    ArrayOf,
    Buffer,
    Computed,
    Declaration,
    Elements,
    Given,
    Size,
    Step,
)

# What `straight` may raise for wrong arguments: a name is missing or unknown, an integer has more than 64 bits, a size
# divides by zero, or a sparse tensor has no address.
MISSED = (TypeError, OverflowError, ZeroDivisionError, RuntimeError)


class ArgumentError(TypeError):
    """A kernel was called with an argument that it does not take; nothing was read and nothing was written."""


def in_words(declaration: Declaration, threads: int, arguments: Mapping[str, Any]) -> array[int]:
    """Return the words of a call.

    Raises:
        ArgumentError: what is given is not what is declared; the message names the argument and both.
    """
    kernel = declaration.kernel
    _check_names(declaration, arguments)
    found = {"threads": _integer(kernel, "threads", threads)}
    if not 1 <= found["threads"] <= MAX_THREADS:
        _refuse(kernel, "threads", f"an integer from 1 to {MAX_THREADS}", str(threads))
    for name in declaration.given:
        if name in declaration.integers:
            found[name] = _integer(kernel, name, arguments[name])
    views = {name: _array(kernel, name, declared, arguments[name]) for name, declared in declaration.arrays.items()}
    # In the order of the signature: a computed integer may be computed from one before it.
    for name, declared in declaration.integers.items():
        if isinstance(declared, Step):
            found[name] = views[declared.array].strides[declared.dimension]
        elif isinstance(declared, Computed):
            found[name] = _value(declaration, name, declared.expression, found)
            if not -(2**63) <= found[name] < 2**63:
                values = _values(declaration, declared.expression, found)
                _refuse(kernel, name, "an integer of 64 bits", f"{declared.expression} with {values}")
    for name, declared in declaration.integers.items():
        if isinstance(declared, Given) and declared.condition:
            _check_condition(declaration, name, declared.condition, found)
    for name, view in views.items():
        _check_size(declaration, name, view, found)
        integer, unit = declaration.arrays[name].unit, getattr(arguments[name], "unit", None)
        if integer and unit not in (None, found[integer]):
            _refuse(kernel, integer, f"{unit}, which {name} counts in", str(found[integer]))
    words = (views[name].address if name in views else found[name] for name in declaration.order)
    return array("q", [0, 0, 0, 1, *words])


def _refuse(kernel: str, name: str, needed: str, found: str) -> NoReturn:
    raise ArgumentError(f"kernel {kernel}: {name} must be {needed}; given is {found}")


def _value(declaration: Declaration, name: str, expression: str, found: Mapping[str, int]) -> int:
    try:
        return declaration.value(expression, found)
    except ZeroDivisionError:
        raise ArgumentError(
            f"kernel {declaration.kernel}: {name} cannot be checked: {expression} divides by zero "
            f"for {_values(declaration, expression, found)}"
        ) from None


def _values(declaration: Declaration, expression: str, found: Mapping[str, int], but: str = "") -> str:
    """Return the values of the integers that an expression contains."""
    names = (name for name in declaration.expressions[expression].co_names if name in found and name != but)
    return ", ".join(f"{name} = {found[name]}" for name in names)


def _check_condition(declaration: Declaration, name: str, condition: str, found: Mapping[str, int]) -> None:
    if not _value(declaration, name, condition, found):
        others = _values(declaration, condition, found, but=name)
        given = f"{found[name]} with {others}" if others else str(found[name])
        _refuse(declaration.kernel, name, f"an integer where {condition}", given)


def _check_size(declaration: Declaration, name: str, view: _View, found: Mapping[str, int]) -> None:
    sizes = declaration.arrays[name].sizes
    have: Sequence[int] = [view.size] if len(sizes) == 1 else view.shape
    pairs = [(size, one) for size, one in zip(sizes, have, strict=True) if not size.flag or found[size.flag]]
    if all(size.suits(one, _value(declaration, name, size.expression, found)) for size, one in pairs):
        return
    texts = [size.expression for size in sizes]
    needed = [_value(declaration, name, text, found) for text in texts]
    if len(sizes) == 1:
        more = "" if sizes[0].exact else " or more"
        _refuse(
            declaration.kernel, name, f"an array of {_equal(texts[0], needed[0])} elements{more}", f"one of {view.size}"
        )
    more = "" if all(size.exact for size in sizes) else " or larger"
    _refuse(declaration.kernel, name, f"of shape {_equal(_shape(texts), _shape(needed))}{more}", _shape(view.shape))


def _equal(text: str, value: object) -> str:
    """Return ``text = value``, or the value alone if the text is that."""
    return text if text == str(value) else f"{text} = {value}"


def _check_names(declaration: Declaration, arguments: Mapping[str, Any]) -> None:
    kernel, takes = declaration.kernel, declaration.given
    for name in arguments:
        if name not in takes:
            hint = nearest(name, takes)
            raise ArgumentError(f"kernel {kernel} has no argument {name!r}{hint}; it takes {', '.join(takes)}")
    if missing := [name for name in takes if name not in arguments]:
        raise ArgumentError(f"kernel {kernel} lacks the argument {missing[0]!r}; it takes {', '.join(takes)}")


def _integer(kernel: str, name: str, value: Any) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        _refuse(kernel, name, "an integer", _kind(value))
    given = int(value)
    if not 0 <= given < 2**63:
        bits = given.bit_length()
        _refuse(kernel, name, "an integer from 0 to 2**63 - 1", str(given) if bits <= 64 else f"one of {bits} bits")
    return given


def _array(kernel: str, name: str, declared: ArrayOf, value: Any) -> _View:
    """Return where an array lies, if its type, its device and its strides are what is declared."""
    view = _view(value)
    if view is None:
        _refuse(kernel, name, f"an array of {declared.elements.name} in memory", _kind(value))
    if not declared.elements.takes(view.dtype):
        _refuse(kernel, name, f"an array of {declared.elements.name}", f"one of {view.dtype}")
    if view.device != "cpu":
        _refuse(kernel, name, "on the CPU", f"an array on {view.device}")
    if declared.written and not view.writeable:
        _refuse(kernel, name, "writeable", "an array that is read-only")
    if isinstance(value, Buffer) and value.name not in (None, name):
        _refuse(kernel, name, f"a buffer for {name}", f"one for {value.name}")
    strided = f"shape {_shape(view.shape)} with strides {_shape(view.strides)}"
    if len(declared.sizes) == 1:
        if not view.contiguous:
            _refuse(kernel, name, "contiguous", strided)
    elif len(view.shape) != len(declared.sizes):
        _refuse(kernel, name, f"of shape {_shape([size.expression for size in declared.sizes])}", _shape(view.shape))
    elif view.size > 0 and view.shape[-1] > 1 and view.strides[-1] != 1:
        _refuse(kernel, name, "contiguous along its last dimension", strided)
    elif any(stride < 0 and length > 1 for stride, length in zip(view.strides, view.shape, strict=True)):
        _refuse(kernel, name, "an array whose strides are not negative", strided)
    elif declared.written and not _own_rows(view):
        _refuse(kernel, name, "an array whose rows share no memory", strided)
    return view


def _own_rows(view: _View) -> bool:
    """Return whether all elements of an array have places of their own, dimension inside dimension."""
    extents = [length * stride for length, stride in zip(view.shape, view.strides, strict=True)]
    extents[-1] = view.shape[-1]
    return all(view.strides[axis] >= extents[axis + 1] or view.shape[axis] <= 1 for axis in range(len(extents) - 1))


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
    writeable: bool


def _view(value: Any) -> _View | None:
    """Return where an array lies, or None for what is no array, or none with an address."""
    if isinstance(value, Buffer):
        value = value.array
    if isinstance(value, np.ndarray):
        if any(each % max(1, value.itemsize) for each in value.strides):
            return None  # a field of records, or the like: no array of such elements
        strides = tuple(each // max(1, value.itemsize) for each in value.strides)
        flags, at = value.flags, value.ctypes.data
        return _View(at, value.dtype, "cpu", value.shape, strides, value.size, flags.c_contiguous, flags.writeable)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_nested:
        return None
    try:
        shape, strides, size = tuple(value.shape), tuple(value.stride()), value.numel()
        device, address = value.device.type, 0
        if device == "cpu":
            if value.untyped_storage().device.type != "cpu":
                return None  # a fake tensor, which claims a device that it does not lie on
            address = value.data_ptr()
            if address == 0 and size > 0:
                return None  # its memory was freed, or never existed
        return _View(address, value.dtype, device, shape, strides, size, value.is_contiguous(), True)
    except (RuntimeError, ValueError):
        return None  # a wrapper without memory of its own, or a parameter whose shape is not known yet


def _kind(value: Any) -> str:
    """Return what a message calls a value that is no array, or no integer."""
    module, layout = type(value).__module__, getattr(value, "layout", None)
    name = type(value).__name__ if module == "builtins" else f"{module}.{type(value).__name__}"
    return name if str(layout) in ("None", "torch.strided") else f"{name} of layout {layout}"


def straight(declaration: Declaration) -> Callable[..., array[int] | None]:
    """Return a function that takes threads and the arguments by keyword, and returns the words or None.

    None, and each of `MISSED`, mean that `in_words` must look. It takes more than plain torch tensors and buffers, or
    says what is wrong. Without torch in the process every answer is None.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return lambda threads, **arguments: None
    given = [name for name in declaration.given if name in declaration.integers]
    lines = [
        f"if not ({' is '.join(f'type({name})' for name in ('threads', *given))} is int): return None",
        f"if {' | '.join((*given, 'threads - 1'))} < 0 or threads > {MAX_THREADS}: return None",
    ]
    found: dict[str, Any] = {**declaration.names, "_Tensor": torch.Tensor, "_Buffer": Buffer, "_array": array}
    wrong = []
    for name, declared in declaration.arrays.items():
        if declared.elements.dtypes:
            found[f"_dtype_{name}"] = getattr(torch, declared.elements.dtypes[0])
        found[f"_taken_{name}"] = _buffer_types(declared.elements)
        if len(declared.sizes) == 1:
            lines += _flat(name, declared)
            wrong.append(_unsuited(f"_size_{name}", declared.sizes[0]))
        else:
            lines += _strided(name, declared)
            wrong += [_unsuited(f"_shape_{name}[{axis}]", size) for axis, size in enumerate(declared.sizes)]
    for name, one in declaration.integers.items():
        if isinstance(one, Step):
            lines.append(f"{name} = _step_{one.array}[{one.dimension}]")
        elif isinstance(one, Computed):
            lines.append(f"{name} = {one.expression}")
        elif one.condition:
            wrong.insert(0, f"not ({one.condition})")
    if wrong:
        lines.append(f"if {' or '.join(wrong)}: return None")
    words = [f"_at_{name}" if name in declaration.arrays else name for name in declaration.order]
    lines.append(f"return _array('q', (0, 0, 0, 1, {', '.join(words)}))")
    exec(f"def check(threads, *, {', '.join(declaration.given)}):\n    " + "\n    ".join(lines), found)
    return found["check"]


def _unsuited(have: str, size: Size) -> str:
    """Return the source of the question whether a size is not what is needed."""
    different = f"{have} {'!=' if size.exact else '<'} ({size.expression})"
    return f"{size.flag} and {different}" if size.flag else different


def _flat(name: str, declared: ArrayOf) -> list[str]:
    other = _other_type(name, declared.elements)
    lines = [
        f"if type({name}) is _Tensor:",
        f"    if {other} or not {name}.is_contiguous() or not {name}.is_cpu: return None",
        f"    _size_{name}, _at_{name} = {name}.numel(), {name}.data_ptr()",
        f"    if not _at_{name} and _size_{name}: return None",
    ]
    if not declared.written:  # a buffer may be read-only
        other = f"{name}.dtype not in _taken_{name} or {name}.name not in (None, {name!r})"
        if declared.unit:
            other += f" or {name}.unit not in (None, {declared.unit})"
        lines += [
            f"elif type({name}) is _Buffer:",
            f"    if {other}: return None",
            f"    _size_{name}, _at_{name} = {name}.size, {name}.address",
        ]
    return [*lines, "else: return None"]


def _strided(name: str, declared: ArrayOf) -> list[str]:
    other = f"{_other_type(name, declared.elements)} or {name}.dim() != {len(declared.sizes)} or not {name}.is_cpu"
    return [
        f"if type({name}) is not _Tensor or {other}: return None",
        f"_shape_{name}, _step_{name}, _at_{name} = {name}.shape, {name}.stride(), {name}.data_ptr()",
        f"if _step_{name}[-1] != 1 and _shape_{name}[-1] > 1: return None",
        f"if not _at_{name} and {name}.numel(): return None",
        *_overlaps(name, declared),
    ]


def _overlaps(name: str, declared: ArrayOf) -> list[str]:
    """Return the lines that let no output pass whose rows share memory; see `_own_rows`."""
    if not declared.written:
        return []
    last = len(declared.sizes) - 1
    extents = [
        f"_shape_{name}[{axis}]" + ("" if axis == last else f" * _step_{name}[{axis}]") for axis in range(last + 1)
    ]
    return [
        f"if _step_{name}[{axis}] < {extents[axis + 1]} and _shape_{name}[{axis}] > 1: return None"
        for axis in range(last)
    ]


def _other_type(name: str, elements: Elements) -> str:
    return f"{name}.dtype is not _dtype_{name}" if elements.dtypes else f"{name}.itemsize != {elements.itemsize}"


def _buffer_types(elements: Elements) -> set[str]:
    kinds = (np.float32, np.uint16, np.int16, np.int32, np.uint32, np.int64)
    return {np.dtype(kind).str for kind in kinds if elements.takes(np.dtype(kind))}
