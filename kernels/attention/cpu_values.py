"""Weights times values of one tile, added to the outputs of 4 rows.

o = o * old + (Σ weight * value) * new, times the channel's scale where values are codes. Integers:
16 bytes of weights against 4 vectors of 4 channels by 16 tokens, as for scores.
"""

from __future__ import annotations

from typing import Any

from lath.formats.pages import PAGE, SUBPAGE, SUBPAGES, UNIT
from lath.kernels.attention.cpu_arguments import ROWS, Context, fields_of
from lath.kernels.attention.cpu_ask import ask, ask_alike
from lath.kernels.attention.cpu_rows import RowTile, block_state, piece
from lath.kernels.attention.cpu_scores import float_dots, multiply
from lath.kernels.attention.cpu_scratch import STATE_HEADER
from lath.kernels.attention.cpu_softmax import Weights
from lath.kernels.attention.cpu_tile import VECTOR, KeyTile, signed_code, when_read
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
    e, b, kind = c.e, c.b, c.kind
    two = kind.precision == "int16"
    codes = piece(c, tile, "weights")
    upper, lower = (
        [[e.variable(e.constant(0)) for _ in range(4)] for _ in range(ROWS)] for _ in range(2)
    )
    for subpage in range(SUBPAGES):
        at = e.multiply(e.add(e.multiply(width, subpage), e.multiply(unit, UNIT)), SUBPAGE)
        with when_read(c, keys, subpage):
            stored = _vectors(c, keys, subpage, at, unit, ask_for=part == 0)
            for i, (first, low) in enumerate(stored):
                value = signed_code(c, first, low, kind.value, part)
                for r in range(ROWS):
                    place = e.add(codes, PAGE * r + SUBPAGE * subpage)
                    weight, total = lanes.broadcast_unit(e, place), upper[r][i]
                    total.value = e.dot(total.value, weight, value, narrow=True)
                    if two:
                        second = lanes.broadcast_unit(e, e.add(place, ROWS * PAGE))
                        unsigned, total = b.xor(value, e.constant(-0x7F7F7F80)), lower[r][i]
                        total.value = e.dot(total.value, unsigned, second, narrow=False)
    sums, rest = (
        [lanes.items(e, [total.value for total in row], b.add) for row in plane]
        for plane in (upper, lower)
    )
    if not two:
        return sums
    return [
        b.add(e.shift_left(own, 8), b.sub(low, e.shift_left(less, 7)))
        for own, low, less in zip(sums, rest, weights.lower_sums, strict=True)
    ]


def _vectors(
    c: Context, keys: KeyTile, subpage: int, at: Any, unit: Any, ask_for: bool
) -> list[tuple[Any, Any]]:
    """Four vectors of each plane of a sub-page, at an offset. ask_for: lines of what comes up."""
    e, a, kind = c.e, c.a, c.kind
    names = ("values", "values_low") if kind.value == "int8-planes" else ("values",)
    found = []
    for i in range(4):
        places = [e.add(e.add(keys.record, a[name]), e.add(at, VECTOR * i)) for name in names]
        vectors = [e.load(place) for place in places]
        found.append((vectors[0], vectors[-1]))
        if kind.few and ask_for:
            first = e.add(a["asked_values"], e.multiply(unit, UNIT * len(names)))
            for plane, place in enumerate(places):
                if keys.asked is None:
                    ask(c, keys, first, len(names) * (4 * subpage + i) + plane)
                else:
                    ask_alike(c, keys.asked.values, subpage, place)
    return found


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


def token_values(
    c: Context, tile: RowTile, keys: KeyTile, block: Any, weights: Weights, limit: Any
) -> None:
    """Values staged token by token, the first `limit` of them: 64 channels at a time, then 16."""
    e, a = c.e, c.a
    outputs = _Outputs(c, tile, block, weights)
    whole = e.divide(a["stored_values"], 4 * LANES)
    with e.loop(whole) as i:
        _channels(c, tile, keys, outputs, e.multiply(i, 4 * LANES), 4, limit)
    first = e.multiply(whole, 4 * LANES)
    rest = e.divide(e.subtract(a["stored_values"], first), LANES)
    with e.loop(rest) as i:
        _channels(c, tile, keys, outputs, e.add(first, e.multiply(i, LANES)), 1, limit)


def _channels(
    c: Context,
    tile: RowTile,
    keys: KeyTile,
    outputs: _Outputs,
    channel: Any,
    vectors: int,
    limit: Any,
) -> None:
    e, a, kind = c.e, c.a, c.kind
    tokens = 2 if kind.brain else 1
    weights = piece(c, tile, "weights")
    rows = [e.add(weights, kind.item * PAGE * r) for r in range(ROWS)]
    step = e.multiply(a["stored_values"], 4)
    base = e.add(piece(c, tile, "value_rows"), e.multiply(channel, 4))
    totals = [[e.variable(e.floats(0.0)) for _ in range(vectors)] for _ in range(ROWS)]
    steps = e.divide(e.add(limit, tokens - 1), tokens)
    with e.loop(steps) as i, when_read(c, keys, e.divide(i, SUBPAGE // tokens)):
        address = e.add(base, e.multiply(i, step))
        values = [e.load(e.add(address, VECTOR * j), INTS) for j in range(vectors)]
        for r in range(ROWS):
            weight = e.broadcast(e.offset(rows[r], i, 4), I32)
            for total, value in zip(totals[r], values, strict=True):
                total.value = multiply(c, total.value, weight, value)
    for r in range(ROWS):
        for j in range(vectors):
            outputs.add(r, e.add(channel, LANES * j), totals[r][j].value)
