"""Arithmetic on vectors, lane by lane, beyond the multiply-add: differences, products, maxima, powers of two."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from sparsetrain.kernels.simd.vectors import FLOAT, I32, Vector

# ln(2)^k / k! up to the seventh power: on [-1/2, 1/2] the first one left out is 5e-9 of the value.
_COEFFICIENTS = tuple(math.log(2.0) ** power / math.factorial(power) for power in range(8))
# Added to a float of magnitude below 2^22 it leaves the nearest integer, plus the exponent's bias of 127, in the
# lowest bits.
_ROUNDER = 1.5 * 2**23 + 127
# Powers below 2^-64 are 0. Beside a largest power of 1 they are far below the rounding of a sum, and products of still
# smaller ones with the small gradients of a real loss would be denormal numbers, which take some 100 cycles each.
_LEAST = -64.0


def _two(name: str, explanation: str, operation: Callable[[Any, Any, Any], Any]) -> Any:
    def pair(typing: Any, x: Any, y: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return operation(builder, *arguments)

        return x(x, x), build

    pair.__name__, pair.__doc__ = name, explanation
    return intrinsic(pair)


sub = _two("sub", "Return ``x - y``.", lambda builder, x, y: builder.fsub(x, y))
mul = _two("mul", "Return ``x * y``.", lambda builder, x, y: builder.fmul(x, y))
larger = _two(
    "larger",
    "Return x where it is larger than y, else y: a NaN in x is passed over.",
    lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y),
)


@intrinsic
def exp2(typing: Any, x: Any) -> Any:
    """Return ``2^x`` for x below 127.5, with a relative error of less than 2e-7; 0 below -64; NaN of NaN."""
    if not isinstance(x, Vector):
        raise TypeError(f"exp2 takes a vector, not {x}")

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (x,) = arguments
        lanes = x.type.count

        def same(number: float) -> Any:
            return ir.Constant(ir.VectorType(FLOAT, lanes), [number] * lanes)

        name = f"llvm.fmuladd.v{lanes}f32"
        kind = ir.FunctionType(x.type, [x.type] * 3)
        fma = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        moved = builder.fadd(x, same(_ROUNDER))
        rest = builder.fsub(x, builder.fsub(moved, same(_ROUNDER)))
        result = same(_single(_COEFFICIENTS[-1]))
        for coefficient in _COEFFICIENTS[-2::-1]:
            result = builder.call(fma, [result, rest, same(_single(coefficient))])
        wide = ir.VectorType(I32, lanes)
        power = builder.shl(builder.bitcast(moved, wide), ir.Constant(wide, [23] * lanes))
        # A product, not a sum of exponents, so that a NaN stays one.
        result = builder.fmul(result, builder.bitcast(power, x.type))
        return builder.select(builder.fcmp_ordered("<", x, same(_LEAST)), same(0.0), result)

    return x(x), build


def _single(number: float) -> float:
    """Return the float32 next to ``number``; LLVM refuses a constant that float32 cannot hold."""
    return float(np.float32(number))
