"""Vectors of elements that stand apart: gathers by 16-bit columns, and the first lanes of a vector.

Intel's processors have an instruction that gathers; on AMD's it takes longer than as many loads, and elsewhere there is
none. A load for each lane serves both.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from sparsetrain.kernels.simd.vectors import F32X16, FLOAT, I16, I32, I64, call, pointer, shuffle
from sparsetrain.machine import target_features, target_name

LANES = 16
_FEATURES = f"{target_features()},"
_BY_HARDWARE = not target_name().startswith(("znver", "bdver", "btver"))
_AVX512 = _BY_HARDWARE and "+avx512f," in _FEATURES
_AVX2 = _BY_HARDWARE and "+avx2," in _FEATURES
_BIT, _BYTES = ir.IntType(1), ir.IntType(8).as_pointer()


def _flags(builder: Any, count: Any, lanes: int = LANES) -> Any:
    """Return whether each lane is among the first ``count``."""
    wide = ir.VectorType(I32, lanes)
    first = builder.insert_element(ir.Constant(wide, ir.Undefined), builder.trunc(count, I32), ir.Constant(I32, 0))
    limit = shuffle(builder, first, first, [0] * lanes)
    return builder.icmp_signed("<", ir.Constant(wide, list(range(lanes))), limit)


def _half(builder: Any, vector: Any, which: int) -> Any:
    return shuffle(builder, vector, vector, range(8 * which, 8 * which + 8))


def _gathered(builder: Any, base: Any, columns: Any, count: Any = None) -> Any:
    """Return the floats at ``base[columns]`` in the first ``count`` lanes, and zero in the others, which read nothing.

    Args:
        columns: the address of the first of 16 columns.
        count: None for all lanes.
    """
    zero = ir.Constant(ir.VectorType(FLOAT, LANES), [0.0] * LANES)
    every = ir.Constant(ir.VectorType(_BIT, LANES), [1] * LANES)
    flags = every if count is None else _flags(builder, count)
    if not (_AVX512 or _AVX2):
        return builder.select(flags, _loaded(builder, base, columns, count), zero)
    value = builder.load(builder.bitcast(columns, ir.VectorType(I16, LANES).as_pointer()))
    value.align = 2
    indices = builder.zext(value, ir.VectorType(I32, LANES))
    start = builder.bitcast(base, _BYTES)
    if _AVX512:
        operands = [zero, start, indices, flags, ir.Constant(I32, 4)]
        return call(builder, "llvm.x86.avx512.mask.gather.dps.512", zero.type, operands)
    none = ir.Constant(ir.VectorType(FLOAT, 8), [0.0] * 8)
    signs = builder.bitcast(builder.sext(flags, ir.VectorType(I32, LANES)), ir.VectorType(FLOAT, LANES))
    halves = [
        call(
            builder,
            "llvm.x86.avx2.gather.d.ps.256",
            none.type,
            [none, start, _half(builder, indices, h), _half(builder, signs, h), ir.Constant(ir.IntType(8), 4)],
        )
        for h in (0, 1)
    ]
    return shuffle(builder, halves[0], halves[1], range(LANES))


def _loaded(builder: Any, base: Any, columns: Any, count: Any) -> Any:
    """Return the floats at ``base[columns]``, by a load for each; lanes from ``count`` on read ``base[0]``.

    Four columns are read as one little-endian word and taken apart by shifts: out of a vector they would come one a
    cycle. A column behind the last one of a row may belong to another segment, and lie behind the end of the array.
    """
    found = ir.Constant(ir.VectorType(FLOAT, LANES), ir.Undefined)
    words = builder.bitcast(columns, I64.as_pointer())
    for quad in range(LANES // 4):
        word = builder.load(builder.gep(words, [ir.Constant(I64, quad)]))
        word.align = 2
        for lane in range(4):
            place = builder.and_(builder.lshr(word, ir.Constant(I64, 16 * lane)), ir.Constant(I64, 0xFFFF))
            if count is not None:
                within = builder.icmp_signed("<", ir.Constant(count.type, 4 * quad + lane), count)
                place = builder.select(within, place, ir.Constant(I64, 0))
            value = builder.load(builder.gep(base, [place]))
            found = builder.insert_element(found, value, ir.Constant(I32, 4 * quad + lane))
    return found


@intrinsic
def gather(typing: Any, array: Any, at: Any, columns: Any, place: Any) -> Any:
    """Return ``array[at + columns[place:place + 16]]``, from float32 by uint16."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at, columns, place = arguments
        base = pointer(context, builder, signature.args[0], array, at, FLOAT)
        first = pointer(context, builder, signature.args[2], columns, place, I16)
        return _gathered(builder, base, first)

    return F32X16(array, types.intp, columns, types.intp), build


@intrinsic
def gather_head(typing: Any, array: Any, at: Any, columns: Any, place: Any, count: Any) -> Any:
    """Do the same for the first ``count`` lanes; the others are zero. All 16 columns are read, and no other input."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at, columns, place, count = arguments
        base = pointer(context, builder, signature.args[0], array, at, FLOAT)
        first = pointer(context, builder, signature.args[2], columns, place, I16)
        return _gathered(builder, base, first, count)

    return F32X16(array, types.intp, columns, types.intp, types.intp), build


@intrinsic
def head(typing: Any, vector: Any, count: Any) -> Any:
    """Return the first ``count`` lanes of a vector, and zero in the others."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, count = arguments
        lanes = vector.type.count
        zero = ir.Constant(vector.type, [0.0] * lanes)
        return builder.select(_flags(builder, count, lanes), vector, zero)

    return vector(vector, types.intp), build


@intrinsic
def prefetch(typing: Any, array: Any, place: Any) -> Any:
    """Ask for the cache line of ``array[place]``, which may lie behind the end of the array."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, place = arguments
        at = pointer(context, builder, signature.args[0], array, place, ir.IntType(8))
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [at, *(ir.Constant(I32, flag) for flag in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.intp), build
