"""Weights times values of one tile, added to the outputs of 4 rows.

o = o * old + (Σ weight * value) * new, times the channel's scale where values are codes. Integers:
16 bytes of weights against 4 vectors of 4 channels by 16 tokens, as for scores.
"""

from __future__ import annotations

from typing import Any

from lath.formats.pages import PAGE, SUBPAGE, UNIT
from lath.kernels.attention.cpu_arguments import ROWS, Context, fields_of
from lath.kernels.attention.cpu_rows import RowTile, block_state, piece
from lath.kernels.attention.cpu_scores import float_dots, multiply
from lath.kernels.attention.cpu_scratch import STATE_HEADER
from lath.kernels.attention.cpu_softmax import Weights
from lath.kernels.attention.cpu_tile import SUBPAGES, VECTOR, KeyTile, ask, signed_code
from lath.kernels.simd import lanes
from lath.kernels.simd.emitter import FLOATS, I32, INTS, LANES

_LEVELS = {"int8": 127.0, "int16": 32512.0}


class _Outputs:
    """o of 4 rows: [4, values] in the state."""

    def __init__(self, c: Context, tile: RowTile, block: Any, weights: Weights) -> None:
        self.c, self.weights = c, weights
        self._base = c.e.add(block_state(c, tile.state, block), STATE_HEADER)

    def add(self, row: int, channel: Any, sums: Any, factor: Any | None = None) -> None:
        """Sixteen channels of a row. factor: of the sums, besides the row's own."""
        e, b, weights = self.c.e, self.c.b, self.weights
        place = e.add(self._base, e.multiply(self.c.a["stored_values"], 4 * row))
        place = e.offset(place, channel, 4)
        kept = e.load(place, FLOATS)
        own = weights.new[row] if factor is None else b.fmul(weights.new[row], factor)
        value = e.fma(sums, own, b.fmul(kept, weights.old[row]))
        # Where no key was read a NaN among the values must not show.
        e.store(place, b.select(weights.read[row], value, kept))


def _channel_scales(c: Context, keys: KeyTile, channel: Any, divisor: float) -> Any:
    address = c.e.add(keys.record, c.a["value_scales"])
    scales = c.e.load(c.e.offset(address, channel, 4), FLOATS)
    return c.b.fmul(scales, c.e.floats(1 / divisor))


def integer_values(c: Context, tile: RowTile, keys: KeyTile, block: Any, weights: Weights) -> None:
    e, a, kind = c.e, c.a, c.kind
    outputs = _Outputs(c, tile, block, weights)
    parts = fields_of(kind.value)
    width = e.divide(a["stored_values"], parts)
    with e.loop(e.divide(width, UNIT)) as unit:
        for part in range(parts):
            channel = e.add(e.multiply(width, part), e.multiply(unit, UNIT))
            scales = _channel_scales(c, keys, channel, _LEVELS[kind.precision])
            dots = _channel_dots(c, tile, keys, width, unit, part, weights)
            for r, dot in enumerate(dots):
                outputs.add(r, channel, e.to_floats(dot), scales)


def _channel_dots(
    c: Context, tile: RowTile, keys: KeyTile, width: Any, unit: Any, part: int, weights: Weights
) -> list[Any]:
    """Σ weight code * value code over 64 tokens, 16 channels, of each row."""
    e, a, b, kind = c.e, c.a, c.b, c.kind
    two = kind.precision == "int16"
    codes = piece(c, tile, "weights")
    upper = [[e.constant(0)] * 4 for _ in range(ROWS)]
    lower = [[e.constant(0)] * 4 for _ in range(ROWS)]
    for subpage in range(SUBPAGES):
        at = e.multiply(e.add(e.multiply(width, subpage), e.multiply(unit, UNIT)), SUBPAGE)
        for i in range(4):
            at_vector = e.add(at, VECTOR * i)
            stored = e.load(e.add(e.add(keys.record, a["values"]), at_vector))
            low = stored
            if kind.value == "int8-planes":
                low = e.load(e.add(e.add(keys.record, a["values_low"]), at_vector))
            if kind.few and part == 0:
                planes = 2 if kind.value == "int8-planes" else 1
                first = e.add(a["asked_values"], e.multiply(unit, UNIT * planes))
                for plane in range(planes):
                    ask(c, keys, first, planes * (4 * subpage + i) + plane)
            value = signed_code(c, stored, low, kind.value, part)
            for r in range(ROWS):
                place = e.add(codes, PAGE * r + SUBPAGE * subpage)
                weight = lanes.broadcast_unit(e, place)
                upper[r][i] = e.dot(upper[r][i], weight, value, narrow=True)
                if two:
                    second = lanes.broadcast_unit(e, e.add(place, ROWS * PAGE))
                    unsigned = b.xor(value, e.constant(-0x7F7F7F80))
                    lower[r][i] = e.dot(lower[r][i], unsigned, second, narrow=False)
    sums = [lanes.items(e, row, b.add) for row in upper]
    if not two:
        return sums
    joined = []
    for r in range(ROWS):
        rest = b.sub(lanes.items(e, lower[r], b.add), e.shift_left(weights.lower_sums[r], 7))
        joined.append(b.add(e.shift_left(sums[r], 8), rest))
    return joined


def channel_values(c: Context, tile: RowTile, keys: KeyTile, block: Any, weights: Weights) -> None:
    """Values staged channel by channel, [values, 64]."""
    e, a, kind = c.e, c.a, c.kind
    base = piece(c, tile, "weights")
    rows = [e.add(base, kind.item * PAGE * r) for r in range(ROWS)]
    result = piece(c, tile, "result")

    def store(r: int, first: Any, sums: Any) -> None:
        place = e.add(result, e.multiply(a["stored_values"], 4 * r))
        lanes.store_quad(e, e.offset(place, first, 4), sums)

    values = piece(c, tile, "value_rows")
    float_dots(c, rows, values, a["stored_values"], e.integer(PAGE), store)
    outputs = _Outputs(c, tile, block, weights)
    divisor = 256.0 if kind.precision == "e4m3" else 1.0
    with e.loop(e.divide(a["stored_values"], LANES)) as i:
        channel = e.multiply(i, LANES)
        scales = _channel_scales(c, keys, channel, divisor)
        for r in range(ROWS):
            place = e.add(result, e.multiply(a["stored_values"], 4 * r))
            outputs.add(r, channel, e.load(e.offset(place, channel, 4), FLOATS), scales)


def token_values(c: Context, tile: RowTile, block: Any, weights: Weights, limit: Any) -> None:
    """Values staged token by token, the first `limit` of them: 64 channels at a time, then 16."""
    e, a = c.e, c.a
    outputs = _Outputs(c, tile, block, weights)
    whole = e.divide(a["stored_values"], 4 * LANES)
    with e.loop(whole) as i:
        _channels(c, tile, outputs, e.multiply(i, 4 * LANES), 4, limit)
    first = e.multiply(whole, 4 * LANES)
    rest = e.divide(e.subtract(a["stored_values"], first), LANES)
    with e.loop(rest) as i:
        _channels(c, tile, outputs, e.add(first, e.multiply(i, LANES)), 1, limit)


def _channels(
    c: Context, tile: RowTile, outputs: _Outputs, channel: Any, vectors: int, limit: Any
) -> None:
    e, a, kind = c.e, c.a, c.kind
    tokens = 2 if kind.brain else 1
    weights = piece(c, tile, "weights")
    rows = [e.add(weights, kind.item * PAGE * r) for r in range(ROWS)]
    step = e.multiply(a["stored_values"], 4)
    base = e.add(piece(c, tile, "value_rows"), e.multiply(channel, 4))
    totals = [[e.variable(e.floats(0.0)) for _ in range(vectors)] for _ in range(ROWS)]
    with e.loop(e.divide(e.add(limit, tokens - 1), tokens)) as i:
        address = e.add(base, e.multiply(i, step))
        values = [e.load(e.add(address, VECTOR * j), INTS) for j in range(vectors)]
        for r in range(ROWS):
            weight = e.broadcast(e.offset(rows[r], i, 4), I32)
            for total, value in zip(totals[r], values, strict=True):
                total.value = multiply(c, total.value, weight, value)
    for r in range(ROWS):
        for j in range(vectors):
            outputs.add(r, e.add(channel, LANES * j), totals[r][j].value)
