"""How compiled code reads its list of words: arrays of unknown length, integers, and which share of the work it has."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from sparsetrain.kernels.simd.arguments import Int, Team
from sparsetrain.kernels.simd.compile import inlined

_I64 = ir.IntType(64)
_UNKNOWN = 1 << 40  # the length that such an array claims; nothing in a kernel asks for it


def _word(context: Any, builder: Any, words: Any, index: Any) -> Any:
    return builder.load(builder.gep(builder.bitcast(words, _I64.as_pointer()), [index]))


@intrinsic
def number(typing: Any, words: Any, index: Any) -> Any:
    """Return word ``index`` as an integer."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _word(context, builder, *arguments)

    return types.int64(types.voidptr, types.intp), build


def _array(element: Any) -> Any:
    kind = types.Array(element, 1, "C")

    @intrinsic
    def array(typing: Any, words: Any, index: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            made = context.make_array(kind)(context, builder)
            size = context.get_abi_sizeof(context.get_data_type(element))
            length, step = ir.Constant(_I64, _UNKNOWN), ir.Constant(_I64, size)
            populate_array(
                made,
                data=builder.inttoptr(_word(context, builder, *arguments), made.data.type),
                shape=[length],
                strides=[step],
                itemsize=step,
                meminfo=None,
            )
            return made._getvalue()

        return kind(types.voidptr, types.intp), build

    return array


floats = _array(types.float32)
shorts = _array(types.uint16)
ints = _array(types.int32)
longs = _array(types.int64)


@intrinsic
def _ask(typing: Any, address: Any) -> Any:
    """Call a C function without arguments that returns an int."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.sext(builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), []), _I64)

    return types.int64(types.int64), build


@inlined
def share(team: Team, total: Int) -> tuple[int, int, int]:
    """Return this thread's share of ``total`` pieces of work, from the first to before the second, and its index."""
    index, threads = number(team, 2), sharers(team)
    if number(team, 0) != 0:
        index = _ask(number(team, 0))
    return total * index // threads, total * (index + 1) // threads, index


@inlined
def sharers(team: Team) -> int:
    """Return how many threads share the work: a runtime may lend fewer than were asked for."""
    return _ask(number(team, 1)) if number(team, 0) != 0 else number(team, 3)
