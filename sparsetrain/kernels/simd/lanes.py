"""Operations across the lanes of a vector: sums, transposes, and tails that fill a vector only in part.

Shuffles compete with FMAs for ports, so sums and transposes are trees of as few shuffles as possible.

Sums of lanes are taken in a fixed order, so that results have the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from sparsetrain.kernels.simd.vectors import (
    F32X16,
    FLOAT,
    I32,
    I64,
    NATIVE_LANES,
    Vector,
    call,
    pointer,
    read,
    shuffle,
    write,
)


def _masked(kind: Vector) -> Any:
    @intrinsic
    def load_head(typing: Any, array: Any, offset: Any, count: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array, offset, count = arguments
            place = pointer(context, builder, signature.args[0], array, offset, ir.VectorType(FLOAT, kind.lanes))
            return _masked_call(builder, "load", [place], count, kind.lanes)

        return kind(array, types.intp, types.intp), build

    return load_head


def _masked_call(builder: Any, what: str, operands: list[Any], count: Any, lanes: int) -> Any:
    """Call LLVM's masked load or store for the first ``count`` lanes."""
    vector = ir.VectorType(FLOAT, lanes)
    wide = ir.VectorType(I64, lanes)
    first = builder.insert_element(ir.Constant(wide, ir.Undefined), count, ir.Constant(I32, 0))
    limit = shuffle(builder, first, first, [0] * lanes)
    mask = builder.icmp_signed("<", ir.Constant(wide, list(range(lanes))), limit)
    align = ir.Constant(I32, 4)
    if what == "load":
        result = vector
        operands = [*operands, align, mask, ir.Constant(vector, [0.0] * lanes)]
    else:
        result = ir.VoidType()
        operands = [*operands, align, mask]
    return call(builder, f"llvm.masked.{what}.v{lanes}f32.p0v{lanes}f32", result, operands)


load_head = _masked(F32X16)


@intrinsic
def store_head(typing: Any, array: Any, offset: Any, vector: Any, count: Any) -> Any:
    """Write the first ``count`` lanes of ``vector`` to ``array[offset:offset + count]``, and nothing behind them."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, offset, value, count = arguments
        place = pointer(context, builder, signature.args[0], array, offset, value.type)
        _masked_call(builder, "store", [value, place], count, value.type.count)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector, types.intp), build


def _halves(builder: Any, x: Any) -> tuple[Any, Any]:
    half = x.type.count // 2
    return shuffle(builder, x, x, range(half)), shuffle(builder, x, x, range(half, 2 * half))


def _sum_lanes(builder: Any, x: Any) -> Any:
    while x.type.count > 1:
        if x.type.count == 2:
            return builder.fadd(*(builder.extract_element(x, ir.Constant(I32, lane)) for lane in (0, 1)))
        x = builder.fadd(*_halves(builder, x))
    return x


@intrinsic
def sum_lanes(typing: Any, x: Any) -> Any:
    """Return the sum of the lanes, by halving."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _sum_lanes(builder, arguments[0])

    return types.float32(x), build


def _unpack_add(builder: Any, x: Any, y: Any, width: int) -> Any:
    """Interleave groups of ``width`` lanes of x and y inside each 4 lanes, and add the lower and the upper halves.

    Two instructions of the 128-bit unpack family and one addition, on every processor that has them.
    """
    lanes = x.type.count
    low, high = [], []
    for base in range(0, lanes, 4):
        for group in range(0, 2, width):
            low += [base + group + k for k in range(width)] + [lanes + base + group + k for k in range(width)]
            high += [base + 2 + group + k for k in range(width)] + [lanes + base + 2 + group + k for k in range(width)]
    return builder.fadd(shuffle(builder, x, y, low), shuffle(builder, x, y, high))


def _sums(builder: Any, vectors: Sequence[Any]) -> Any:
    """Return the sums of four vectors as a vector with as many lanes, the four of each 128 bits still apart."""
    a, b, c, d = vectors
    return _unpack_add(builder, _unpack_add(builder, a, b, 1), _unpack_add(builder, c, d, 1), 2)


def _fold(builder: Any, x: Any, lanes: int) -> Any:
    while x.type.count > lanes:
        x = builder.fadd(*_halves(builder, x))
    return x


@intrinsic
def add_sums4(typing: Any, array: Any, offset: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Add the sums of the lanes of four vectors to ``array[offset:offset + 4]``."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, offset, *vectors = arguments
        sums = _fold(builder, _sums(builder, vectors), 4)
        _accumulate(context, builder, signature.args[0], array, offset, sums)
        return context.get_dummy_value()

    return types.void(array, types.intp, a, a, a, a), build


@intrinsic
def add_sums_head(typing: Any, array: Any, offset: Any, count: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Add the sums of the lanes of the first ``count`` of four vectors to ``array[offset:offset + count]``."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, offset, count, *vectors = arguments
        sums = _fold(builder, _sums(builder, vectors), 4)
        place = pointer(context, builder, signature.args[0], array, offset, sums.type)
        before = _masked_call(builder, "load", [place], count, 4)
        _masked_call(builder, "store", [builder.fadd(before, sums), place], count, 4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, a, a, a, a), build


@intrinsic
def add_sums8(
    typing: Any, array: Any, offset: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any
) -> Any:
    """Add the sums of the lanes of eight vectors to ``array[offset:offset + 8]``."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, offset, *vectors = arguments
        _accumulate(context, builder, signature.args[0], array, offset, _sums_of_eight(builder, vectors))
        return context.get_dummy_value()

    return types.void(array, types.intp, *[a] * 8), build


@intrinsic
def add_sums_2x4(
    typing: Any, array: Any, offset: Any, other: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any
) -> Any:
    """Add the sums of the lanes of four vectors to ``array[offset:offset + 4]``, of four more to ``array[other:]``."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, offset, other, *vectors = arguments
        sums = _halves(builder, _sums_of_eight(builder, vectors))
        for place, four in zip((offset, other), sums, strict=True):
            _accumulate(context, builder, signature.args[0], array, place, four)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, *[a] * 8), build


@intrinsic
def write_sums4(typing: Any, array: Any, at: Any, step: Any, last: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Write the sums of the lanes of vectors 0 to ``last`` of four to ``array[at]``, ``array[at + step]`` and so on."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _write_apart(context, builder, signature, arguments, _fold(builder, _sums(builder, arguments[4:]), 4))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, types.intp, *[a] * 4), build


@intrinsic
def write_sums8(
    typing: Any,
    array: Any,
    at: Any,
    step: Any,
    last: Any,
    a: Any,
    b: Any,
    c: Any,
    d: Any,
    e: Any,
    f: Any,
    g: Any,
    h: Any,
) -> Any:
    """Do the same for eight vectors."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _write_apart(context, builder, signature, arguments, _sums_of_eight(builder, arguments[4:]))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, types.intp, *[a] * 8), build


def _write_apart(context: Any, builder: Any, signature: Any, arguments: Sequence[Any], sums: Any) -> None:
    array, at, step, last = arguments[:4]
    # From the last lane on: those behind ``last`` are written in its place first, and then it is.
    for lane in reversed(range(sums.type.count)):
        place = ir.Constant(I64, lane)
        place = builder.select(builder.icmp_signed("<", place, last), place, last)
        offset = builder.add(at, builder.mul(place, step))
        value = builder.extract_element(sums, ir.Constant(I32, lane))
        builder.store(value, pointer(context, builder, signature.args[0], array, offset, FLOAT))


def _sums_of_eight(builder: Any, vectors: Sequence[Any]) -> Any:
    first = _fold(builder, _sums(builder, vectors[:4]), 8)
    second = _fold(builder, _sums(builder, vectors[4:]), 8)
    # Each has its four sums twice over, in halves that are still to be added: one addition does both.
    low = shuffle(builder, first, second, [0, 1, 2, 3, 8, 9, 10, 11])
    high = shuffle(builder, first, second, [4, 5, 6, 7, 12, 13, 14, 15])
    return builder.fadd(low, high)


def _accumulate(context: Any, builder: Any, kind: Any, array: Any, offset: Any, vector: Any) -> None:
    place = pointer(context, builder, kind, array, offset, vector.type)
    before = builder.load(place)
    before.align = 4  # of a float: places in the values of a matrix are aligned to nothing more
    written = builder.store(builder.fadd(before, vector), place)
    written.align = 4


def _in_lane_transpose(builder: Any, rows: Sequence[Any]) -> list[Any]:
    """Transpose 4 x 4 inside each 128 bits of four vectors."""
    a, b, c, d = rows
    lanes = a.type.count

    def zipped(x: Any, y: Any, pairs: Sequence[tuple[int, int]]) -> Any:
        return shuffle(
            builder, x, y, [side * lanes + base + lane for base in range(0, lanes, 4) for side, lane in pairs]
        )

    unpacked = [((0, 0), (1, 0), (0, 1), (1, 1)), ((0, 2), (1, 2), (0, 3), (1, 3))]
    joined = [((0, 0), (0, 1), (1, 0), (1, 1)), ((0, 2), (0, 3), (1, 2), (1, 3))]
    low, high = zipped(a, b, unpacked[0]), zipped(a, b, unpacked[1])
    low2, high2 = zipped(c, d, unpacked[0]), zipped(c, d, unpacked[1])
    return [zipped(x, y, pick) for x, y in ((low, low2), (high, high2)) for pick in joined]


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Return the columns of a square of 8 x 8 or 16 x 16 floats given as rows."""
    size = len(rows)

    def blocks(pair: Sequence[Any], which: Sequence[int]) -> Any:
        x, y = pair
        return shuffle(builder, x, y, [4 * block + lane for block in which for lane in range(4)])

    groups = [_in_lane_transpose(builder, rows[first : first + 4]) for first in range(0, size, 4)]
    columns = [None] * size
    for j in range(4):
        parts = [group[j] for group in groups]
        if size == 8:
            columns[j], columns[4 + j] = blocks(parts, (0, 2)), blocks(parts, (1, 3))
        else:
            even = [blocks(parts[pair : pair + 2], (0, 2, 4, 6)) for pair in (0, 2)]
            odd = [blocks(parts[pair : pair + 2], (1, 3, 5, 7)) for pair in (0, 2)]
            columns[j], columns[8 + j] = blocks(even, (0, 2, 4, 6)), blocks(even, (1, 3, 5, 7))
            columns[4 + j], columns[12 + j] = blocks(odd, (0, 2, 4, 6)), blocks(odd, (1, 3, 5, 7))
    return columns


@intrinsic
def transpose16(typing: Any, source: Any, at: Any, step: Any, target: Any, to: Any, target_step: Any) -> Any:
    """Write the transpose of 16 rows of 16 elements, ``step`` apart from ``source[at]`` on, to ``target[to:]``.

    ``target[to + j * target_step + i] = source[at + i * step + j]``; either side may be bfloat16 as uint16.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, at, step, target, to, target_step = arguments
        kinds = signature.args

        def moved(offset: Any, step: Any, row: int, lane: int) -> Any:
            shifted = builder.add(offset, builder.mul(step, ir.Constant(I64, row)))
            return builder.add(shifted, ir.Constant(I64, lane))

        # A square has as many rows as a register has lanes, so that all of it is in registers.
        size = NATIVE_LANES
        for top in range(0, 16, size):
            for left in range(0, 16, size):
                rows = [
                    read(context, builder, kinds[0], source, moved(at, step, top + row, left), size)
                    for row in range(size)
                ]
                for row, column in enumerate(_transposed(builder, rows)):
                    place = moved(to, target_step, left + row, top)
                    write(context, builder, kinds[3], target, place, column)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), build


def _square(size: int) -> Any:
    @intrinsic
    def turn(typing: Any, source: Any, at: Any, step: Any, last: Any, target: Any, to: Any, target_step: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, at, step, last, target, to, target_step = arguments
            kinds, starts = signature.args, []
            for row in range(size):
                place = ir.Constant(I64, row)
                present = builder.select(builder.icmp_signed("<", place, last), place, last)
                starts.append(builder.add(at, builder.mul(present, step)))
            side = min(size, NATIVE_LANES)
            for top in range(0, size, side):
                for left in range(0, size, side):
                    shift = ir.Constant(I64, left)
                    rows = [
                        read(context, builder, kinds[0], source, builder.add(start, shift), side)
                        for start in starts[top : top + side]
                    ]
                    for row, column in enumerate(_transposed(builder, rows)):
                        line = builder.mul(target_step, ir.Constant(I64, left + row))
                        place = builder.add(builder.add(to, line), ir.Constant(I64, top))
                        write(context, builder, kinds[4], target, place, column)
            return context.get_dummy_value()

        return types.void(source, *[types.intp] * 3, target, types.intp, types.intp), build

    return turn


# Write the transpose of a square of 8 or of 16 elements a side, as `transpose16` does; rows behind row ``last`` do not
# exist, and that row stands for them.
turn8, turn16 = _square(8), _square(16)
