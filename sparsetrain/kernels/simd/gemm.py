"""Small dense products of matrices that lie in the caches, for kernels that make blocks of a larger one.

`multiply_add` adds ``A B`` to ``C [rows, lanes]``. A may lie in either direction: element (row, term) is at
``a_at + row * a_row + term * a_step``. The rows of B and C are contiguous. Six rows of C by `WIDTH` lanes stay
in registers for all terms: twelve accumulators. A term costs two loads of B, six broadcasts of A and twelve FMAs.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from sparsetrain.kernels.simd.arguments import Array, Int
from sparsetrain.kernels.simd.compile import inlined, procedure
from sparsetrain.kernels.simd.vectors import FLOAT, I32, I64, NATIVE_LANES, read, shuffle, write

# Two registers: with six rows that makes 12 accumulators, enough to hide the latency of the FMAs, and leaves four of 16
# registers for B and the broadcasts of A.
WIDTH = max(16, 2 * NATIVE_LANES)

# Which terms a product inside a causal block on the diagonal leaves out.
WHOLE = 0
ROWS_TO_LANE = 1  # rows behind the last of WIDTH lanes are left as they are
TERMS_TO_ROW = 2  # terms behind the last row of a group are zero in A
TERMS_FROM_ROW = 3  # terms before the first row of a group are zero in A


def _product(rows: int) -> Any:
    @intrinsic
    def product(
        typing: Any,
        c: Any,
        c_at: Any,
        c_step: Any,
        a: Any,
        a_at: Any,
        a_row: Any,
        a_step: Any,
        b: Any,
        b_at: Any,
        b_step: Any,
        terms: Any,
    ) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            c, c_at, c_step, a, a_at, a_row, a_step, b, b_at, b_step, terms = arguments
            kinds, vector = signature.args, ir.VectorType(FLOAT, WIDTH)
            name = f"llvm.fmuladd.v{WIDTH}f32"
            multiply_add = builder.module.globals.get(name) or ir.Function(
                builder.module, ir.FunctionType(vector, [vector] * 3), name
            )

            def moved(at: Any, step: Any, count: Any) -> Any:
                return builder.add(at, builder.mul(step, count))

            data = context.make_array(kinds[3])(context, builder, a).data
            places = [moved(c_at, c_step, ir.Constant(I64, row)) for row in range(rows)]
            firsts = [moved(a_at, a_row, ir.Constant(I64, row)) for row in range(rows)]
            sums = [cgutils.alloca_once(builder, vector) for _ in range(rows)]
            for place, kept in zip(places, sums, strict=True):
                builder.store(read(context, builder, kinds[0], c, place, WIDTH), kept)
            with cgutils.for_range(builder, terms) as loop:
                line = read(context, builder, kinds[7], b, moved(b_at, b_step, loop.index), WIDTH)
                for first, kept in zip(firsts, sums, strict=True):
                    value = builder.load(builder.gep(data, [moved(first, a_step, loop.index)]))
                    empty = ir.Constant(vector, ir.Undefined)
                    one = builder.insert_element(empty, value, ir.Constant(I32, 0))
                    factor = shuffle(builder, one, empty, [0] * WIDTH)
                    builder.store(builder.call(multiply_add, [factor, line, builder.load(kept)]), kept)
            for place, kept in zip(places, sums, strict=True):
                write(context, builder, kinds[0], c, place, builder.load(kept))
            return context.get_dummy_value()

        i = types.intp
        return types.void(c, i, i, a, i, i, i, b, i, i, i), build

    return product


_product1, _product2, _product4, _product6 = (_product(rows) for rows in (1, 2, 4, 6))


@inlined
def _terms(row: Int, many: Int, terms: Int, edge: Int) -> tuple[int, int]:
    """Return the range of terms of a group of rows: from the first to before the second."""
    if edge == TERMS_TO_ROW:
        return 0, min(terms, row + many)
    return (row if edge == TERMS_FROM_ROW else 0), terms


@procedure
def multiply_add(
    c: Array,
    c_at: Int,
    c_step: Int,
    a: Array,
    a_at: Int,
    a_row: Int,
    a_step: Int,
    b: Array,
    b_at: Int,
    b_step: Int,
    rows: Int,
    lanes: Int,
    terms: Int,
    edge: Int,
) -> None:
    """Add ``A B`` to C for ``lanes`` lanes, rounded up to a multiple of WIDTH; ``edge`` says what can be left out."""
    for lane in range(0, lanes, WIDTH):
        limit = min(rows, lane + WIDTH) if edge == ROWS_TO_LANE else rows
        to, line = c_at + lane, b_at + lane
        row = 0
        while row + 6 <= limit:
            first, last = _terms(row, 6, terms, edge)
            _product6(
                *(c, to + row * c_step, c_step, a, a_at + row * a_row + first * a_step, a_row, a_step),
                *(b, line + first * b_step, b_step, last - first),
            )
            row += 6
        if row + 4 <= limit:
            first, last = _terms(row, 4, terms, edge)
            _product4(
                *(c, to + row * c_step, c_step, a, a_at + row * a_row + first * a_step, a_row, a_step),
                *(b, line + first * b_step, b_step, last - first),
            )
            row += 4
        if row + 2 <= limit:
            first, last = _terms(row, 2, terms, edge)
            _product2(
                *(c, to + row * c_step, c_step, a, a_at + row * a_row + first * a_step, a_row, a_step),
                *(b, line + first * b_step, b_step, last - first),
            )
            row += 2
        if row < limit:
            first, last = _terms(row, 1, terms, edge)
            _product1(
                *(c, to + row * c_step, c_step, a, a_at + row * a_row + first * a_step, a_row, a_step),
                *(b, line + first * b_step, b_step, last - first),
            )
