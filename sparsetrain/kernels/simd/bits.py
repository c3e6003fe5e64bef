"""Vectors by bits: sixteen of them say which lanes of a vector there are.

AVX-512 has an instruction that reads as many floats as bits are set and spreads them over those lanes, its later part
VBMI2 one for elements of 16 bits. Elsewhere LLVM makes a branch and a load of each lane, which is right and slow.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from sparsetrain.kernels.simd.vectors import F32X16, FLOAT, I16, I32, call, pointer, stored, widened
from sparsetrain.machine import target_features, target_name

LANES = 16
_FEATURES = f"{target_features()},"
_MEASURED = not target_name().startswith("znver")  # AMD's later processors have the instruction; its speed is not known
# Whether float32 and bfloat16 are spread fast.
SPREADS = _MEASURED and "+avx512f," in _FEATURES
SPREADS_BFLOAT16 = SPREADS and "+avx512vbmi2," in _FEATURES


def _flags(builder: Any, bits: Any) -> Any:
    return builder.bitcast(bits, ir.VectorType(ir.IntType(1), LANES))


@intrinsic
def spread(typing: Any, array: Any, offset: Any, bits: Any) -> Any:
    """Return as many floats from ``array[offset:]`` as bits are set, in the lanes of these bits; the others are zero.

    Nothing else of the array, of float32 or of bfloat16 passed as uint16, is read.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, offset, bits = arguments
        element = stored(signature.args[0])
        first = pointer(context, builder, signature.args[0], array, offset, element)
        none = ir.Constant(ir.VectorType(element, LANES), [0.0 if element is FLOAT else 0] * LANES)
        name = f"llvm.masked.expandload.v{LANES}{'f32' if element is FLOAT else 'i16'}"
        return widened(builder, call(builder, name, none.type, [first, _flags(builder, bits), none]))

    return F32X16(array, types.intp, types.uint16), build


@intrinsic
def load_at(typing: Any, array: Any, offset: Any, bits: Any) -> Any:
    """Return ``array[offset:offset + 16]`` of float32 in the lanes of the set bits; others are zero, and not read."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, offset, bits = arguments
        kind = ir.VectorType(FLOAT, LANES)
        first = pointer(context, builder, signature.args[0], array, offset, kind)
        operands = [first, ir.Constant(I32, 4), _flags(builder, bits), ir.Constant(kind, [0.0] * LANES)]
        return call(builder, f"llvm.masked.load.v{LANES}f32.p0v{LANES}f32", kind, operands)

    return F32X16(array, types.intp, types.uint16), build


@intrinsic
def ones(typing: Any, bits: Any) -> Any:
    """Return how many of 16 bits are set."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(call(builder, "llvm.ctpop.i16", I16, list(arguments)), ir.IntType(64))

    return types.int64(types.uint16), build
