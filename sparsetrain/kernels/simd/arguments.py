"""What a kernel takes: declared once, in the signature of its function, and checked before every call.

```python
def scale(team: Team, x: Annotated[Array, float32["== rows", "== columns"]], x_step: Annotated[Int, step["x"]],
          sums: Annotated[Output, float32["threads * columns"]], rows: Int,
          columns: Annotated[Int, where["columns % 4 == 0"]]) -> None: ...
```

An array is declared with the type of its elements and either of two kinds of sizes:

    float32["== rows + 1"]          contiguous, of any shape, with that number of elements
    float32["== rows", "== columns"]    of as many dimensions, each of that length; the last one is contiguous, the
                                    others may have any strides

Without ``==`` a size is the least that is taken, which suits scratch. A size that ends in ``if flag`` counts only where
the integer ``flag`` is not 0. What the kernel writes to is an `Output`, which must be writeable.

The values of index arrays are not checked: patterns do that once, when they are built. A `Buffer` that holds such an
array can be given as one argument only, and an array declared with ``unit["n"]`` only beside the n that it counts in.

An integer is given by the caller and is not negative; ``where["condition"]`` says what else it must satisfy. It is not
given if it is declared as ``step["x"]``, which is the distance between the rows of x in elements (``step["x", 1]``:
along dimension 1), or as ``computed["expression"]``.

Sizes, conditions and expressions are Python expressions over the integers of the same signature, ``threads``, and what
the kernel's module defines. Whatever bounds an access to an array belongs into its size. An integer that an exact size
contains cannot be exchanged with another.

From the signature follow the keywords of a call, what is checked before it (`checks`), and the order of the words that
the compiled code reads (`words`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Annotated, Any, get_args, get_type_hints

import numpy as np

# The most threads of a call: more than any machine has. A runtime dies of much more.
MAX_THREADS = 4096

_INTEGER = "an integer that the caller gives"
_WRITTEN = "an array that the kernel writes to"

Array = Any  # torch.Tensor, numpy.ndarray or Buffer; inside a kernel, Numba's array
Output = Annotated[Any, _WRITTEN]  # an Array that the kernel writes to
Int = Annotated[Any, _INTEGER]  # int; inside a kernel, int64
Team = Any  # inside a kernel, the address of its words: `words.share` and `words.sharers` read it

# Names that the functions made of a declaration use themselves, beside names that begin with an underscore.
_RESERVED = ("threads", "words", "body", "middle", "min", "max", "number", "floats", "shorts", "ints", "longs")

# The first words of every list: two functions of the OpenMP runtime, or thread and threads where there is none.
HEADER = 4


@dataclass(frozen=True)
class Elements:
    """The type of an array's elements.

    Args:
        name: as messages call it.
        reader: the function of `words` by which the compiled code reads such an array.
        itemsize: bytes of an element.
        dtypes: names of the torch and numpy types that are taken; none for all of that size.
    """

    name: str
    reader: str
    itemsize: int
    dtypes: tuple[str, ...]

    def __getitem__(self, sizes: str | tuple[str, ...]) -> ArrayOf:
        return ArrayOf(self, tuple(map(_size, (sizes,) if isinstance(sizes, str) else sizes)))

    def takes(self, dtype: Any) -> bool:
        """Return whether elements of a torch or numpy type may be read as this type."""
        if self.dtypes:
            return str(dtype).removeprefix("torch.") in self.dtypes  # a foreign byte order has another name: >f4
        return dtype.itemsize == self.itemsize


float32 = Elements("float32", "floats", 4, ("float32",))
bfloat16 = Elements("bfloat16 (or its bits as uint16)", "shorts", 2, ("bfloat16", "uint16"))
uint16 = Elements("uint16", "shorts", 2, ("uint16",))
int32 = Elements("int32", "ints", 4, ("int32",))
int64 = Elements("int64", "longs", 8, ("int64",))
# For kernels that move elements and do not compute with them.
bits32 = Elements("a type of 32 bits", "floats", 4, ())
bits16 = Elements("a type of 16 bits", "shorts", 2, ())
# Stands in a signature for the type that `Kernel(function, element_type=...)` names.
element_type = Elements("element_type", "", 0, ())


@dataclass(frozen=True)
class Size:
    """The number of elements of an array, or of one of its dimensions.

    Args:
        expression: what it is. exact: whether more is refused.
        flag: the integer without which the size does not count, or None.
    """

    expression: str
    exact: bool
    flag: str | None

    def suits(self, size: int, needed: int) -> bool:
        """Return whether an array of that size has what is needed."""
        return size == needed if self.exact else size >= needed


def _size(text: str) -> Size:
    expression, _, flag = text.partition(" if ")
    return Size(expression.removeprefix("==").strip(), expression.startswith("=="), flag.strip() or None)


@dataclass(frozen=True)
class ArrayOf:
    """The declaration of an array: type and sizes, whether the kernel writes to it, and the integer it counts in."""

    elements: Elements
    sizes: tuple[Size, ...]
    written: bool = False
    unit: str | None = None


@dataclass(frozen=True)
class Given:
    """The declaration of an integer that the caller gives, and the condition that it satisfies, if there is one."""

    condition: str | None = None


@dataclass(frozen=True)
class Unit:
    """The integer that the values of an index array count in."""

    integer: str


@dataclass(frozen=True)
class Computed:
    """The declaration of an integer that follows from others."""

    expression: str


@dataclass(frozen=True)
class Step:
    """The declaration of an integer that is the stride of an array, in elements."""

    array: str
    dimension: int = 0


class _Computed:
    def __getitem__(self, expression: str) -> Computed:
        return Computed(expression)


class _Step:
    def __getitem__(self, of: str | tuple[str, int]) -> Step:
        return Step(of) if isinstance(of, str) else Step(*of)


class _Where:
    def __getitem__(self, condition: str) -> Given:
        return Given(condition)


class _Unit:
    def __getitem__(self, integer: str) -> Unit:
        return Unit(integer)


computed, step, where, unit = _Computed(), _Step(), _Where(), _Unit()


class Buffer:
    """A contiguous numpy array whose address, type and length are looked up once, for one that many calls take.

    Args:
        array: the array.
        name: the only argument that it may be given as; None for any. The values of an index array fit into one place
            only, which its type and its size do not tell.
        unit: what its values count in, for an argument that is declared with a `unit`; None for anything.
    """

    __slots__ = ("address", "array", "dtype", "name", "size", "unit")

    def __init__(self, array: np.ndarray, name: str | None = None, unit: int | None = None) -> None:
        if not array.flags.c_contiguous:
            raise ValueError(f"a buffer is contiguous; given is an array with strides {array.strides}")
        self.array, self.address = array, array.ctypes.data
        self.dtype, self.size = array.dtype.str, array.size
        self.name, self.unit = name, unit


class Declaration:
    """The arguments of one kernel, read from the signature of its function.

    Args:
        kernel: its name, for messages.
        function: its first parameter is the `Team`.
        chosen: what `element_type` stands for.

    Attributes:
        order: all arguments, in the order of their words.
        arrays, integers: the declarations by name.
        given: the keywords of a call.
        open: the arrays whose type is ``chosen``.
        names: what expressions may name beside the arguments: the globals of the kernel's module.
        expressions: the compiled form of each expression.

    Raises:
        TypeError: a parameter without a declaration, or an expression that names what is not there.
    """

    def __init__(self, kernel: str, function: Callable[..., None], chosen: Elements | None = None) -> None:
        hints = get_type_hints(function, include_extras=True)
        self.kernel, self.names, self._code = kernel, function.__globals__, function.__code__
        self.order = tuple(inspect.signature(function).parameters)[1:]
        self.arrays: dict[str, ArrayOf] = {}
        self.integers: dict[str, Computed | Step | Given] = {}
        self.open: list[str] = []
        for name in self.order:
            if name.startswith("_") or name in _RESERVED:
                raise TypeError(f"kernel {kernel}: no argument can be called {name!r}")
            said = get_args(hints.get(name)) or (None,)
            units = [one.integer for one in said if isinstance(one, Unit)]
            declared = [one for one in said if not isinstance(one, Unit)][-1]
            if isinstance(declared, ArrayOf):
                elements = declared.elements
                if elements is element_type:
                    if chosen is None:
                        raise TypeError(f"kernel {kernel}: {name} has an open type: give element_type")
                    elements = chosen
                    self.open.append(name)
                self.arrays[name] = ArrayOf(elements, declared.sizes, _WRITTEN in said, *units)
            elif declared is _INTEGER:
                self.integers[name] = Given()
            elif isinstance(declared, Computed | Step | Given):
                self.integers[name] = declared
            else:
                raise TypeError(f"kernel {kernel}: {name} is declared neither as an array with a size nor as Int")
        self.given = tuple(name for name in self.order if isinstance(self.integers.get(name, Given()), Given))
        self.expressions = self._compiled()

    def _compiled(self) -> dict[str, CodeType]:
        sizes = [size for array in self.arrays.values() for size in array.sizes]
        flags = [size.flag for size in sizes if size.flag]
        units = [array.unit for array in self.arrays.values() if array.unit]
        for name in flags:
            if name not in self.integers:
                raise TypeError(f"kernel {self.kernel}: {name!r} is none of its integers")
        for name in units:
            if not isinstance(self.integers.get(name), Given):
                raise TypeError(f"kernel {self.kernel}: {name!r} is none of the integers that its caller gives")
        texts = [size.expression for size in sizes]
        for declared in self.integers.values():
            if isinstance(declared, Computed):
                texts.append(declared.expression)
            if isinstance(declared, Given) and declared.condition:
                texts.append(declared.condition)
            if isinstance(declared, Step) and declared.dimension >= len(self._sizes(declared.array)) - 1:
                raise TypeError(f"kernel {self.kernel}: {declared} is no stride of an array with several sizes")
        codes = {text: compile(text, f"<{self.kernel}>", "eval") for text in texts}
        known = {*self.integers, *self.names, "threads", "min", "max"}
        later = {name for name, declared in self.integers.items() if isinstance(declared, Computed)}
        for name, declared in self.integers.items():
            if isinstance(declared, Computed):
                if early := set(codes[declared.expression].co_names) & later:
                    raise TypeError(f"kernel {self.kernel}: {name} is computed from {min(early)}, which comes later")
                later.remove(name)
        for text, code in codes.items():
            if unknown := set(code.co_names) - known:
                raise TypeError(f"kernel {self.kernel}: {text!r} names {min(unknown)}, which is none of its integers")
        return codes

    def _sizes(self, array: str) -> tuple[Size, ...]:
        return self.arrays[array].sizes if array in self.arrays else ()

    def value(self, expression: str, integers: Mapping[str, int]) -> int:
        """Return what an expression comes to; `ZeroDivisionError` may be raised."""
        return eval(self.expressions[expression], self.names, dict(integers))

    def entry(self, body: Callable[..., None], readers: Mapping[str, Any], inlined: Callable[[Any], Any]) -> Any:
        """Return the function of the words alone that calls ``body`` with the arguments that it reads from them.

        Arrays of an open type are read outside of an ``inlined`` function, which reads the rest. What LLVM makes of a
        kernel depends on what is inlined when, and the kernels were measured in this order.

        Args:
            body: the kernel's function, compiled so that it is inlined before LLVM sees it.
            readers: the functions of `words`. inlined: the decorator of `compile`.
        """
        reads = {
            name: f"{self.arrays[name].elements.reader if name in self.arrays else 'number'}(words, {place})"
            for place, name in enumerate(self.order, HEADER)
        }
        outside = {name: reads.pop(name) for name in self.open}
        inside = ", ".join(["words", *(reads.get(name, name) for name in self.order)])
        if not outside:
            return self._made(f"(words): body({inside})", {**readers, "body": body})
        middle = self._made(f"({', '.join(['words', *outside])}): body({inside})", {**readers, "body": body})
        call = f"(words): middle({', '.join(['words', *outside.values()])})"
        return self._made(call, {**readers, "middle": inlined(middle)})

    def _made(self, rest: str, names: dict[str, Any]) -> Any:
        """Return ``def <kernel><rest>``, in the place of the kernel's function, by which Numba's cache knows it."""
        name = self.kernel.rsplit(".", 1)[-1]
        blank_lines = "\n" * (self._code.co_firstlineno - 1)
        found = {**names, "__name__": self.names["__name__"]}
        exec(compile(f"{blank_lines}def {name}{rest}", self._code.co_filename, "exec"), found)
        return found[name]
