"""Vectors of float32 for Numba: 8 and 16 lanes, held in registers of whatever width the processor has.

A vector is an LLVM ``<8 x float>`` or ``<16 x float>``; LLVM splits it into AVX-512, AVX2, SSE or NEON registers, so a
kernel written on it is compiled for the machine that it runs on. Offsets count elements of the array and nothing is
checked: an offset outside the array reads or writes other memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

from sparsetrain.machine import target_features, target_name

# The widest vector that a register holds where AVX-512 is, and half of it elsewhere (one of AVX2, two of NEON).
NATIVE_LANES = 16 if "+avx512f" in target_features() else 8
# Lanes of one load, multiply-add or shuffle: on Zen 4 one of 16 lanes is two of 8.
PATH_LANES = 8 if target_name() == "znver4" else NATIVE_LANES
_AVX = "+avx," in f"{target_features()},"

FLOAT, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)


class Vector(types.Type):
    """A vector of ``lanes`` float32 values."""

    def __init__(self, lanes: int) -> None:
        super().__init__(name=f"f32x{lanes}")
        self.lanes = lanes


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(FLOAT, kind.lanes))


F32X8, F32X16 = Vector(8), Vector(16)


def pointer(context: Any, builder: Any, kind: Any, array: Any, offset: Any, to: Any) -> Any:
    """Return the address of an element of an array, as a pointer to the LLVM type ``to``."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), to.as_pointer())


def call(builder: Any, name: str, result: Any, operands: Sequence[Any]) -> Any:
    """Call a function that LLVM knows by its name."""
    known = builder.module.globals.get(name)
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(known or ir.Function(builder.module, kind, name), operands)


def read(context: Any, builder: Any, kind: Any, array: Any, offset: Any, lanes: int) -> Any:
    """Return ``lanes`` floats from an array of float32, or of bfloat16 passed as uint16."""
    element = stored(kind)
    value = builder.load(pointer(context, builder, kind, array, offset, ir.VectorType(element, lanes)))
    value.align = 2 if element is I16 else 4
    return widened(builder, value)


def widened(builder: Any, vector: Any) -> Any:
    """Return a vector of floats as it is, and one of the bits of bfloat16 as floats."""
    if vector.type.element is FLOAT:
        return vector
    lanes = vector.type.count
    wide = builder.zext(vector, ir.VectorType(I32, lanes))
    return builder.bitcast(builder.shl(wide, _same(I32, 16, lanes)), ir.VectorType(FLOAT, lanes))


def write(context: Any, builder: Any, kind: Any, array: Any, offset: Any, vector: Any) -> None:
    """Store a vector into an array of float32, or, rounded to nearest even, of bfloat16 passed as uint16."""
    element, lanes = stored(kind), vector.type.count
    if element is I16:
        vector = _rounded(builder, vector)
    written = builder.store(vector, pointer(context, builder, kind, array, offset, ir.VectorType(element, lanes)))
    written.align = 2 if element is I16 else 4


def stored(kind: Any) -> Any:
    """Return the LLVM type of an array's elements: a float, or the 16 bits of a bfloat16."""
    if kind.dtype == types.float32:
        return FLOAT
    if kind.dtype == types.uint16:
        return I16
    raise TypeError(f"vectors are read from float32 or uint16 (bfloat16), not from {kind.dtype}")


def _same(kind: Any, number: int, lanes: int) -> Any:
    return ir.Constant(ir.VectorType(kind, lanes), [number] * lanes)


def _rounded(builder: Any, vector: Any) -> Any:
    lanes = vector.type.count
    bits = builder.bitcast(vector, ir.VectorType(I32, lanes))
    odd = builder.and_(builder.lshr(bits, _same(I32, 16, lanes)), _same(I32, 1, lanes))
    nearest = builder.add(bits, builder.add(odd, _same(I32, 0x7FFF, lanes)))
    # Adding would carry some NaNs over into a number: they are cut off and kept quiet instead.
    quiet = builder.or_(bits, _same(I32, 0x400000, lanes))
    bits = builder.select(builder.fcmp_unordered("uno", vector, vector), quiet, nearest)
    return builder.trunc(builder.lshr(bits, _same(I32, 16, lanes)), ir.VectorType(I16, lanes))


def _load(kind: Vector) -> Any:
    @intrinsic
    def load(typing: Any, array: Any, offset: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return read(context, builder, signature.args[0], arguments[0], arguments[1], kind.lanes)

        return kind(array, types.intp), build

    return load


load = _load(F32X16)
load8 = _load(F32X8)


@intrinsic
def store(typing: Any, array: Any, offset: Any, vector: Any) -> Any:
    """Write all lanes of ``vector`` to ``array[offset:]``."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        write(context, builder, signature.args[0], *arguments)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), build


@intrinsic
def element(typing: Any, array: Any, offset: Any) -> Any:
    """Return ``array[offset]`` without Numba's test for negative indices."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load(builder.gep(data, [arguments[1]]))

    return array.dtype(array, types.intp), build


@intrinsic
def get(typing: Any, array: Any, offset: Any) -> Any:
    """Return ``array[offset]`` as float32, whether stored so or as bfloat16."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.extract_element(
            read(context, builder, signature.args[0], arguments[0], arguments[1], 1), ir.Constant(I32, 0)
        )

    return types.float32(array, types.intp), build


@intrinsic
def put(typing: Any, array: Any, offset: Any, number: Any) -> Any:
    """Store a float32 in ``array[offset]``, as it is or rounded to bfloat16."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, offset, number = arguments
        empty = ir.Constant(ir.VectorType(FLOAT, 1), ir.Undefined)
        write(
            context,
            builder,
            signature.args[0],
            array,
            offset,
            builder.insert_element(empty, number, ir.Constant(I32, 0)),
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), build


@intrinsic
def load_quad(typing: Any, array: Any, offset: Any) -> Any:
    """Return four uint16 from ``array[offset:]`` as one uint64, the first in its lowest bits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = builder.load(pointer(context, builder, signature.args[0], arguments[0], arguments[1], I64))
        value.align = 2
        return value

    return types.uint64(array, types.intp), build


def _splat(kind: Vector) -> Any:
    @intrinsic
    def splat(typing: Any, number: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            empty = ir.Constant(ir.VectorType(FLOAT, kind.lanes), ir.Undefined)
            first = builder.insert_element(empty, arguments[0], ir.Constant(I32, 0))
            return shuffle(builder, first, empty, [0] * kind.lanes)

        return kind(types.float32), build

    return splat


splat = _splat(F32X16)
splat8 = _splat(F32X8)

_OF_LANES = {8: (load8, splat8), 16: (load, splat)}
native_load, native_splat = _OF_LANES[NATIVE_LANES]
path_load, path_splat = _OF_LANES[PATH_LANES]


@intrinsic
def load_four(typing: Any, array: Any, offset: Any) -> Any:
    """Return ``array[offset:offset + 4]`` twice over, in 8 lanes, for `lane` to pick from.

    It is one load for four multipliers, in kernels that the load ports bind.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        four = read(context, builder, signature.args[0], arguments[0], arguments[1], 4)
        both = shuffle(builder, four, four, [0, 1, 2, 3] * 2)
        if not _AVX:
            return both
        # LLVM would fold this into four broadcast loads again; an empty instruction hides where the lanes come from.
        hide = ir.InlineAsm(ir.FunctionType(both.type, [both.type]), "", "=x,0", side_effect=False)
        return builder.call(hide, [both])

    return F32X8(array, types.intp), build


def _lane(number: int) -> Any:
    @intrinsic
    def pick(typing: Any, vector: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            half = shuffle(builder, arguments[0], arguments[0], [number] * 4 + [4 + number] * 4)
            return shuffle(builder, half, half, list(range(8)) * 2)

        return F32X16(vector), build

    return pick


lane = tuple(_lane(number) for number in range(4))


@intrinsic
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """Return ``x * y + z``, rounded once where the processor has such an instruction."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(FLOAT, signature.return_type.lanes)
        return call(builder, f"llvm.fmuladd.v{kind.count}f32", kind, arguments)

    return x(x, x, x), build


@intrinsic
def add(typing: Any, x: Any, y: Any) -> Any:
    """Return ``x + y``, lane by lane."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return x(x, x), build


def shuffle(builder: Any, x: Any, y: Any, lanes: Sequence[int]) -> Any:
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))
