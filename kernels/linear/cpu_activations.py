"""Preparing x for the CPU kernels of `linear`: whole codes or fp32, token tiles interleaved.

    codes   [M/tile, K'/4, tile] words of four int8 (columns 4i .. 4i+3), or
            [M/tile, K', tile] fp32;  K' = groups * group, columns beyond K are 0
    scales  fp32 [M/tile, groups, tile]
    sums    [M/tile, groups, tile]: int32 sums of codes, or fp32 sums of x

The codes are those of `lath.formats.activations`, bit for bit. Where they or the weight's numbers
are not whole, their values code * scale, in fp32, stand in the place of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from lath.formats.activations import SMALLEST_ABSMAX
from lath.kernels.linear.cpu_arguments import Arguments
from lath.kernels.simd import mathematics
from lath.kernels.simd.emitter import (
    BYTES,
    F32,
    I16,
    I32,
    I64,
    INTS,
    ITEM_BYTES,
    LANES,
    Emitter,
)

_INFINITY_BITS = 0x7F800000
_QUADS = ir.VectorType(I32, 4)


def emit_quantize(e: Emitter, begin: Any, end: Any, arguments: Any, kind: int) -> None:
    """Whole codes, scales and sums of the tokens [begin, end); tokens beyond M become zeros.

    kind: type of x in memory.
    """

    def put(token: _Token, group: Any, first: Any, left: Any, scale: Any, inverse: Any) -> None:
        token.put_side(group, _put_codes(e, token, first, left, inverse), scale)

    _visit_groups(e, begin, end, arguments, kind, put)


def emit_round(
    e: Emitter, begin: Any, end: Any, arguments: Any, kind: int, values: str = ""
) -> None:
    """As `emit_quantize`, but the numbers that the codes stand for and their sums, as fp32.

    values: what x is rounded to, an 8-bit float or whole numbers.
    """

    def rounded(scaled: Any) -> Any:
        if values:
            return mathematics.round_float8(e, scaled, values)
        return e.to_floats(e.nearest(scaled))

    def put(token: _Token, group: Any, first: Any, left: Any, scale: Any, inverse: Any) -> None:
        total = _put_rounded(e, token, first, left, e.splat(scale), inverse, rounded)
        token.put_side(group, total)

    _visit_groups(e, begin, end, arguments, kind, put)


def _visit_groups(
    e: Emitter, begin: Any, end: Any, arguments: Any, kind: int, put: Callable[..., None]
) -> None:
    """put(token, group, its first column, its columns, scale, inverse) for every group."""
    a = Arguments(e, arguments)
    per_scale = e.divide(a["shared"], a["group"])
    runs = e.divide(e.subtract(e.add(a["groups"], per_scale), 1), per_scale)
    with e.loop(e.subtract(end, begin)) as index:
        token = _Token(e, a, e.add(begin, index), kind)
        with e.loop(runs) as run:
            first = e.multiply(run, a["shared"])
            count = e.clip(e.subtract(token.columns, first), a["shared"])
            scale, inverse, finite = _scale(e, token, first, count)
            # NaN or infinity: codes 0 everywhere, the scale carries the NaN.
            count = e.builder.select(finite, count, e.integer(0))
            start = e.multiply(run, per_scale)
            with e.loop(e.clip(e.subtract(a["groups"], start), per_scale)) as i:
                offset = e.multiply(i, a["group"])
                left = e.clip(e.subtract(count, offset), a["group"])
                put(token, e.add(start, i), e.add(first, offset), left, scale, inverse)


def emit_widen(e: Emitter, begin: Any, end: Any, arguments: Any, kind: int) -> None:
    """fp32 values and sums of the tokens [begin, end); tokens beyond M become zeros.

    kind: type of x in memory.
    """
    a = Arguments(e, arguments)
    with e.loop(e.subtract(end, begin)) as index:
        token = _Token(e, a, e.add(begin, index), kind)
        with e.loop(a["groups"]) as group:
            first = e.multiply(group, a["group"])
            left = e.clip(e.subtract(token.columns, first), a["group"])
            token.put_side(group, _put_values(e, token, first, left))


class _Token:
    """One token: its row of x in memory and its place among the prepared activations.

    Sixteen columns at a time, which may lie anywhere in x ("x_runs"); columns beyond K, and tokens
    beyond M, read as nothing.
    """

    def __init__(self, e: Emitter, a: Arguments, token: Any, kind: int) -> None:
        self.e, self.a, self.kind = e, a, kind
        self.item = ITEM_BYTES[kind]
        self.row = e.add(a["x"], e.multiply(token, a["x_stride"]))
        present = e.builder.icmp_signed("<", token, a["tokens"])
        self.columns = e.builder.select(present, a["columns"], e.integer(0))
        tile = e.divide(token, a["tile"])
        lane = e.multiply(e.subtract(token, e.multiply(tile, a["tile"])), 4)
        groups_before = e.multiply(e.multiply(tile, a["groups"]), a["tile"])
        columns_before = e.multiply(groups_before, a["group"])
        self._codes = e.add(e.add(a["codes"], e.multiply(columns_before, a["item"])), lane)
        self._side = e.add(e.multiply(groups_before, 4), lane)
        self._tail = e.buffer(1)

    def visit(self, first: Any, count: Any, use: Callable[[Any, Any], None]) -> None:
        """use(column, vector) over `count` columns from `first`; a tail is filled with zeros."""
        e = self.e
        whole = e.divide(count, LANES)
        with e.loop(whole) as i:
            column = e.add(first, e.multiply(i, LANES))
            use(column, e.load_floats(self._source(column), self.kind))
        rest = e.subtract(count, e.multiply(whole, LANES))
        with e.when(e.builder.icmp_signed(">", rest, e.integer(0))):
            column = e.add(first, e.multiply(whole, LANES))
            use(column, self._load_tail(column, rest))

    def visit_padding(self, first: Any, count: Any, use: Callable[[Any], None]) -> None:
        """use(column) for the sixteens of a group at `first` behind its `count` columns."""
        e = self.e
        done = e.divide(e.add(count, LANES - 1), LANES)
        with e.loop(e.subtract(e.divide(self.a["group"], LANES), done)) as i:
            use(e.add(first, e.multiply(e.add(done, i), LANES)))

    def put_codes(self, column: Any, codes: Any) -> None:
        """Sixteen int8 codes as four words, `tile` words apart."""
        e = self.e
        quads = e.builder.bitcast(e.builder.trunc(codes, BYTES), _QUADS)
        place = e.add(self._codes, e.multiply(column, self.a["tile"]))
        for i in range(4):
            word = e.builder.extract_element(quads, ir.Constant(I32, i))
            e.store(e.add(place, e.multiply(self.a["tile"], 4 * i)), word)

    def put_values(self, column: Any, values: Any) -> None:
        """Sixteen fp32 values, `tile` words apart."""
        e = self.e
        place = e.add(self._codes, e.multiply(e.multiply(column, self.a["tile"]), 4))
        for i in range(LANES):
            value = e.builder.extract_element(values, ir.Constant(I32, i))
            e.store(e.add(place, e.multiply(self.a["tile"], 4 * i)), value)

    def put_side(self, group: Any, total: Any, scale: Any | None = None) -> None:
        """The sum over a group of columns and its scale."""
        e = self.e
        entry = e.add(self._side, e.multiply(e.multiply(group, self.a["tile"]), 4))
        e.store(e.add(self.a["sums"], entry), total)
        if scale is not None:
            e.store(e.add(self.a["scales"], entry), scale)

    def _source(self, column: Any) -> Any:
        """Where sixteen columns begin in memory; column: a multiple of sixteen."""
        e, place = self.e, self.e.variable(column)
        with e.when(e.builder.icmp_signed("!=", self.a["x_runs"], e.integer(0))):
            run = e.load(e.offset(self.a["x_runs"], e.divide(column, LANES), 4), I32)
            place.value = e.builder.sext(run, I64)
        return e.offset(self.row, place.value, self.item)

    def _load_tail(self, column: Any, count: Any) -> Any:
        """`count` < 16 columns, read one by one: the memory behind them need not be ours."""
        e, scalar = self.e, I32 if self.item == 4 else I16
        e.store(self._tail, e.constant(0))
        source = self._source(column)
        with e.loop(count) as i:
            value = e.load(e.offset(source, i, self.item), scalar)
            e.store(e.offset(self._tail, i, self.item), value)
        return e.load_floats(self._tail, self.kind)


def _scale(e: Emitter, token: _Token, first: Any, count: Any) -> tuple[Any, Any, Any]:
    """Scale, splat inverse, and whether all of `count` columns from `first` are finite."""
    largest = e.variable(e.constant(0))
    magnitude = e.constant(0x7FFFFFFF)

    def use(_: Any, vector: Any) -> None:
        bits = e.builder.and_(e.builder.bitcast(vector, INTS), magnitude)
        largest.value = e.larger(largest.value, bits)

    # Magnitudes of floats order like their bits, and NaN lies above infinity.
    token.visit(first, count, use)
    bits = e.largest_lane(largest.value)
    absmax = e.builder.bitcast(bits, F32)
    top, one = e.builder.sitofp(token.a["largest"], F32), ir.Constant(F32, 1.0)
    small = e.builder.fcmp_ordered("<", absmax, ir.Constant(F32, SMALLEST_ABSMAX))
    finite = e.builder.icmp_unsigned("<", bits, ir.Constant(I32, _INFINITY_BITS))
    scale = e.builder.select(small, one, e.builder.fdiv(absmax, top))
    inverse = e.builder.select(small, ir.Constant(F32, 0.0), e.builder.fdiv(top, absmax))
    scale = e.builder.select(finite, scale, ir.Constant(F32, float("nan")))
    return scale, e.splat(inverse), finite


def _put_codes(e: Emitter, token: _Token, first: Any, left: Any, inverse: Any) -> Any:
    """Write the codes of the group at `first`, `left` columns long; returns their int32 sum."""
    total = e.variable(e.constant(0))

    def use(column: Any, vector: Any) -> None:
        codes = e.nearest(e.builder.fmul(vector, inverse))
        total.value = e.builder.add(total.value, codes)
        token.put_codes(column, codes)

    token.visit(first, left, use)
    token.visit_padding(first, left, lambda column: token.put_codes(column, e.constant(0)))
    return e.sum_of_lanes(total.value)


def _put_values(e: Emitter, token: _Token, first: Any, left: Any) -> Any:
    """Write the fp32 values of the group at `first`; returns their sum."""
    total = e.variable(e.floats(0.0))

    def use(column: Any, vector: Any) -> None:
        total.value = e.builder.fadd(total.value, vector)
        token.put_values(column, vector)

    token.visit(first, left, use)
    token.visit_padding(first, left, lambda column: token.put_values(column, e.floats(0.0)))
    return e.sum_of_lanes(total.value)


def _put_rounded(
    e: Emitter,
    token: _Token,
    first: Any,
    left: Any,
    scale: Any,
    inverse: Any,
    rounded: Callable[[Any], Any],
) -> Any:
    """Write code * scale of the group at `first` as fp32; returns their sum."""
    total = e.variable(e.floats(0.0))

    def use(column: Any, vector: Any) -> None:
        values = e.builder.fmul(rounded(e.builder.fmul(vector, inverse)), scale)
        total.value = e.builder.fadd(total.value, values)
        token.put_values(column, values)

    token.visit(first, left, use)
    # Zeros, but NaN where the scale is.
    padding = e.builder.fmul(e.floats(0.0), scale)
    token.visit_padding(first, left, lambda column: token.put_values(column, padding))
    return e.sum_of_lanes(total.value)
