"""A kernel: a function of named arguments, compiled when it is first called, whose every call is checked.

```python
@Kernel
def double(team: Team, x: Annotated[Array, float32["count"]], count: Int) -> None:
    first, last, _ = share(team, count)
    for place in range(first, last):
        x[place] *= 2.0

double(threads, x=values, count=len(values))
```

The compiled function has one parameter, the address of a list of 64-bit words: integers and addresses of arrays.
`arguments` says how they are declared and read, `checks` how they are checked, and `threads` which threads run it.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numba

from sparsetrain.kernels.simd import words
from sparsetrain.kernels.simd.arguments import HEADER, Declaration, Elements
from sparsetrain.kernels.simd.checks import MISSED, in_words, straight
from sparsetrain.kernels.simd.compile import OPTIONS, inlined, numba_cache
from sparsetrain.kernels.simd.threads import Entry, entry_at, run


class Kernel:
    """A kernel by the function that defines it, as a decorator or under another name for one type of elements.

    Args:
        function: its first parameter is the team of threads; the others are declared as `arguments` says.
        name: of the kernel, where it is not that of the function.
        element_type: what `arguments.element_type` stands for in the signature.

    Attributes:
        function, declaration: what it was made of, and what it takes.
    """

    def __init__(
        self, function: Callable[..., None], name: str | None = None, element_type: Elements | None = None
    ) -> None:
        self.function, self.__doc__ = function, function.__doc__
        self.__name__ = name or function.__name__
        module = function.__module__.rsplit(".", 1)[-1]
        self.declaration = Declaration(f"{module}.{self.__name__}", function, element_type)
        self._lock = threading.Lock()
        self._compiled: Any = None
        self._entry: tuple[int, Entry] | None = None
        self._straight: Callable[..., array[int] | None] | None = None

    @property
    def compiled(self) -> Any:
        """Numba's object for the compiled function."""
        with self._lock:
            if self._compiled is None:
                body = numba.njit(self.function, inline="always", **OPTIONS)
                entry = self.declaration.entry(body, vars(words), inlined)
                with numba_cache() as writable:
                    kept = writable and os.path.exists(self.function.__code__.co_filename)
                    self._compiled = numba.cfunc("void(voidptr)", cache=kept, **OPTIONS)(entry)
        return self._compiled

    def __call__(self, threads: int, /, **arguments: Any) -> None:
        """Run all of the kernel's work on at most ``threads`` threads.

        Args:
            arguments: integers and arrays (torch tensors on the CPU, numpy arrays, buffers) by the names of the
                signature. Arrays live until the call returns.

        Raises:
            ArgumentError: an argument is missing, unknown, or not what the signature declares; nothing was touched.
        """
        if self._straight is None:
            self._straight = straight(self.declaration)
        try:
            given = self._straight(threads, **arguments)
        except MISSED:
            given = None
        if given is None:
            given = in_words(self.declaration, threads, arguments)
        address, entry = self._entry or self._load()
        run(address, entry, given, threads)

    def bound(self, threads: int, /, arrays: Sequence[str], **arguments: Any) -> Bound:
        """Check a call, and return it as one in which ``arrays`` can be replaced by their addresses.

        Its own calls check nothing: a small product takes as long as its check. The caller must give addresses of
        arrays of the size, the type and the strides of those that were checked.

        Raises:
            ArgumentError: as a call does.
        """
        words = in_words(self.declaration, threads, arguments)
        places = [HEADER + self.declaration.order.index(name) for name in arrays]
        return Bound(*(self._entry or self._load()), words, places, threads)

    def _load(self) -> tuple[int, Entry]:
        address = self.compiled.address
        self._entry = address, entry_at(address)
        return self._entry


class Bound:
    """A call of a kernel that was checked, see `Kernel.bound`."""

    __slots__ = ("_address", "_entry", "_places", "_threads", "_words")

    def __init__(self, address: int, entry: Entry, words: array[int], places: Sequence[int], threads: int) -> None:
        self._address, self._entry, self._words = address, entry, words
        self._places, self._threads = tuple(places), threads

    def __call__(self, *addresses: int) -> None:
        """Run the kernel with these addresses in the places of the arrays that `Kernel.bound` named."""
        words = self._words[:]  # several threads of Python may make the same call
        for place, address in zip(self._places, addresses, strict=True):
            words[place] = address
        run(self._address, self._entry, words, self._threads)
