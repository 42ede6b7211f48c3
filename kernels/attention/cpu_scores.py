"""Scores of 4 rows over the keys of a tile, fp32 [4, 64] in units of log2.

Integer codes: 16 bytes of q are broadcast against 4 vectors of 4 tokens by 16 channels; 16 sums
stay in registers, and one reduction per row and subpage makes 16 scores. Keys are the unsigned side
of the dot (code + 128), so that 128 Σ q is taken out again. Floats: 4 tokens by 4 rows at a time.
"""

from __future__ import annotations

import itertools
from typing import Any

from lath.formats.pages import PAGE, SUBPAGE, UNIT
from lath.kernels.attention.cpu_arguments import ROWS, Context, fields_of
from lath.kernels.attention.cpu_ask import ask, ask_alike
from lath.kernels.attention.cpu_rows import RowTile, piece
from lath.kernels.attention.cpu_tile import (
    VECTOR,
    KeyTile,
    offset_code,
    page_scale,
    token_scale,
    when_read,
)
from lath.kernels.simd import brain, lanes
from lath.kernels.simd.emitter import BF16, FLOATS, INTS, LANES, SHORTS


def integer_scores(
    c: Context, tile: RowTile, keys: KeyTile, block: Any, limit: Any, corrections: Any
) -> None:
    """Codes of q times codes of keys, for the subpages that hold the first `limit` tokens.

    corrections: q·mean in units of log2, of row l % 4 in lane l.
    """
    e, a, b, kind = c.e, c.a, c.b, c.kind
    first_row = e.multiply(block, ROWS)
    codes = e.add(piece(c, tile, "codes"), e.multiply(first_row, a["stored_keys"]))
    factors = lanes.load_quad(e, e.offset(piece(c, tile, "factors"), first_row, 4))
    if not kind.token_scales:
        factors = b.fmul(factors, page_scale(c, keys))
    sums = e.offset(piece(c, tile, "sums"), first_row, 4)
    offsets = [e.shift_left(e.broadcast(e.add(sums, 4 * r)), 7) for r in range(ROWS)]
    row_factors = [lanes.lane(e, factors, r) for r in range(ROWS)]
    row_corrections = [lanes.lane(e, corrections, r) for r in range(ROWS)]
    subpages = e.divide(e.add(limit, SUBPAGE - 1), SUBPAGE)
    with e.loop(subpages) as subpage, when_read(c, keys, subpage):
        totals = _subpage_dots(c, keys, codes, subpage)
        for r in range(ROWS):
            dots = e.to_floats(b.sub(totals[r], offsets[r]))
            factor = row_factors[r]
            if kind.token_scales:
                factor = b.fmul(factor, token_scale(c, keys, subpage))
            score = e.fma(dots, factor, row_corrections[r])
            place = e.add(piece(c, tile, "scores"), 4 * PAGE * r)
            e.store(e.offset(place, subpage, VECTOR), score)


def _subpage_dots(c: Context, keys: KeyTile, codes: Any, subpage: Any) -> list[Any]:
    """Σ q code * (key code + 128) of 4 rows, over 16 tokens each."""
    e, a, kind = c.e, c.a, c.kind
    parts = fields_of(kind.key)
    width = e.divide(a["stored_keys"], parts)
    totals = [[e.variable(e.constant(0)) for _ in range(4)] for _ in range(ROWS)]
    start = e.multiply(subpage, e.multiply(width, SUBPAGE))
    rows = [e.add(codes, e.multiply(a["stored_keys"], r)) for r in range(ROWS)]
    with e.loop(e.divide(width, UNIT)) as unit:
        at = e.add(start, e.multiply(unit, SUBPAGE * UNIT))
        planes = ("keys", "keys_low") if kind.key == "int8-planes" else ("keys",)
        if kind.few:
            if keys.asked is None:
                # Three of four; the others beside the softmax.
                lines = 3 * len(planes)
                first = e.multiply(e.divide(at, 4 * VECTOR), lines)
                for i in range(lines):
                    ask(c, keys, first, i)
            else:
                for plane, i in itertools.product(planes, range(4)):
                    place = e.add(e.add(keys.record, a[plane]), e.add(at, VECTOR * i))
                    ask_alike(c, keys.asked.keys, subpage, place)
        stored, low = (_vectors(c, keys, a[plane], at) for plane in (planes[0], planes[-1]))
        for part in range(parts):
            channel = e.add(e.multiply(width, part), e.multiply(unit, UNIT))
            decoded = [
                offset_code(c, s, t, kind.key, part) for s, t in zip(stored, low, strict=True)
            ]
            for r in range(ROWS):
                query = lanes.broadcast_unit(e, e.add(rows[r], channel))
                for i in range(4):
                    total = totals[r][i]
                    total.value = e.dot(total.value, decoded[i], query, narrow=False)
    return [lanes.items(e, [part.value for part in row], e.builder.add) for row in totals]


def _vectors(c: Context, keys: KeyTile, field: Any, at: Any) -> list[Any]:
    """Four vectors of a plane."""
    e = c.e
    address = e.add(e.add(keys.record, field), at)
    return [e.load(e.add(address, VECTOR * i)) for i in range(4)]


def corrections_of(c: Context, tile: RowTile, keys: KeyTile, block: Any) -> Any:
    """scale * q·mean of 4 rows, row l % 4 in lane l; q as it came."""
    e, a, kind = c.e, c.a, c.kind
    first = _row_addresses(c, piece(c, tile, "q"), block)
    totals = [e.variable(e.floats(0.0)) for _ in range(ROWS)]
    channels = LANES * (2 if kind.brain else 1)
    whole = e.divide(a["stored_keys"], channels)
    with e.loop(whole) as i:
        if kind.brain:
            mean = e.load(e.offset(keys.mean, i, VECTOR))
        else:
            mean = e.load_floats(e.offset(keys.mean, i, 2 * LANES), BF16)
        for total, row in zip(totals, first, strict=True):
            total.value = multiply(c, total.value, e.load(e.offset(row, i, VECTOR)), mean)
    if kind.brain:
        rest = e.subtract(a["stored_keys"], e.multiply(whole, channels))
        with e.when(e.less(e.integer(0), rest)):
            # What follows the mean is not its own.
            half = e.load(e.offset(keys.mean, whole, VECTOR), SHORTS)
            wide = e.shuffle(half, SHORTS(None), list(range(2 * LANES)))
            mean = c.b.bitcast(wide, INTS)
            for total, row in zip(totals, first, strict=True):
                total.value = multiply(c, total.value, e.load(e.offset(row, whole, VECTOR)), mean)
    sums = lanes.rows(e, [total.value for total in totals], e.builder.fadd)
    return c.b.fmul(sums, e.splat(a.real("scale")))


def multiply(c: Context, total: Any, left: Any, right: Any) -> Any:
    """total + left * right of a vector of floats that are multiplied: pairs of bf16, or fp32."""
    if c.kind.brain:
        return brain.dot_pairs(c.e, total, left, right)
    return c.e.fma(c.b.bitcast(left, FLOATS), c.b.bitcast(right, FLOATS), total)


def _row_addresses(c: Context, base: Any, block: Any) -> list[Any]:
    e = c.e
    row_bytes = e.multiply(c.a["staged_keys"], c.kind.item)
    first = e.add(base, e.multiply(e.multiply(block, ROWS), row_bytes))
    return [e.add(first, e.multiply(row_bytes, r)) for r in range(ROWS)]


def float_dots(
    c: Context,
    rows: list[Any],
    items: Any,
    count: Any,
    length: Any,
    store: Any,
    keys: KeyTile | None = None,
) -> None:
    """4 rows times `count` items, each `length` floats long: store(r, first item, sums).

    items: address of [count, length]; in quads, so that up to 3 items behind the last are read.
    sums: of item l % 4 in lane l. keys: the page whose tokens the items are.
    """
    e = c.e
    step = e.multiply(length, c.kind.item)
    quads = e.divide(e.add(count, 3), 4)
    with e.loop(quads) as quad, when_read(c, keys, e.divide(quad, SUBPAGE // 4)):
        base = e.add(items, e.multiply(e.multiply(quad, 4), step))
        addresses = [e.add(base, e.multiply(step, i)) for i in range(4)]
        totals = [[e.variable(e.floats(0.0)) for _ in range(4)] for _ in range(ROWS)]
        with e.loop(e.divide(step, VECTOR)) as i:
            values = [e.load(e.offset(address, i, VECTOR)) for address in addresses]
            for r in range(ROWS):
                row = e.load(e.offset(rows[r], i, VECTOR))
                for total, value in zip(totals[r], values, strict=True):
                    total.value = multiply(c, total.value, row, value)
        for r in range(ROWS):
            sums = lanes.rows(e, [total.value for total in totals[r]], e.builder.fadd)
            store(r, e.multiply(quad, 4), sums)


def float_scores(
    c: Context, tile: RowTile, keys: KeyTile, block: Any, limit: Any, corrections: Any | None
) -> None:
    """Floats of q times staged keys. corrections: as in `integer_scores`, and the rows' factors and
    the keys' scales are multiplied in; None: keys that were not rounded."""
    e, a, b, kind = c.e, c.a, c.b, c.kind
    rounded = corrections is not None
    rows = _row_addresses(c, piece(c, tile, "rounded" if rounded else "q"), block)
    if rounded:
        address = e.offset(piece(c, tile, "factors"), e.multiply(block, ROWS), 4)
        factors = lanes.load_quad(e, address)
        if not kind.token_scales:
            factors = b.fmul(factors, page_scale(c, keys))
    scale = e.splat(a.real("scale"))

    def store(r: int, first: Any, sums: Any) -> None:
        if rounded:
            factor = lanes.lane(e, factors, r)
            if kind.token_scales:
                scales = e.add(keys.record, a["token_scales"])
                factor = b.fmul(factor, lanes.load_quad(e, e.offset(scales, first, 4)))
            score = e.fma(sums, factor, lanes.lane(e, corrections, r))
        else:
            score = b.fmul(sums, scale)
        place = e.add(piece(c, tile, "scores"), 4 * PAGE * r)
        lanes.store_quad(e, e.offset(place, first, 4), score)

    float_dots(c, rows, piece(c, tile, "key_rows"), limit, a["staged_keys"], store, keys)
