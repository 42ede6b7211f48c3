"""Rows of q: which they are, how they are prepared, and what is written for them.

Row n of a head (a KV head, or a query head that has its own page list) is query head `n % group` of
its group at token `n // group`: the query heads that read the same keys stand together, and
neighbours see nearly the same keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from lath.formats.activations import LARGEST_CODE, SMALLEST_ABSMAX
from lath.kernels.attention.cpu_arguments import ROW_PIECES, ROWS, Context
from lath.kernels.attention.cpu_scratch import STATE_HEADER
from lath.kernels.simd import lanes, mathematics
from lath.kernels.simd.copy import copy_row
from lath.kernels.simd.emitter import (
    BYTES,
    F32,
    FLOATS,
    FP32,
    I8,
    I32,
    INTS,
    LANES,
)

_INFINITY_BITS = 0x7F800000
_E4M3_LARGEST = 448.0


@dataclass(frozen=True)
class RowTile:
    """A tile of rows of one head of one sequence; all fields are values in the kernel."""

    sequence: Any
    head: Any
    kv_head: Any  # whose keys and values it reads
    first: Any  # its first row
    rows: Any  # rows of the sequence and head, from 0
    count: Any  # rows of the tile
    shift: Any  # position of row 0's token: keys - queries
    slot: Any  # address of the thread's scratch
    row_slot: Any  # address of what scratch holds of this tile's rows
    state: Any  # address of the tile's state


class Unit:
    """A piece of work: a tile of rows, the same of each of a few neighbouring heads, and one split
    of the pages. Units go over splits, row tiles, chunks of heads, sequences, in this order.

    Several heads where they share a page list, because their records lie side by side: few rows are
    read for at the speed of memory only where addresses ascend for long.
    """

    def __init__(self, c: Context, thread: Any, unit: Any) -> None:
        e, a = c.e, c.a
        self.c, self.thread = c, thread
        whole = e.divide(unit, a["splits"])
        self.split = e.subtract(unit, e.multiply(whole, a["splits"]))
        chunk_index = e.divide(whole, a["tiles"])
        self.tile = e.subtract(whole, e.multiply(chunk_index, a["tiles"]))
        self.sequence = e.divide(chunk_index, a["chunks"])
        chunk = e.subtract(chunk_index, e.multiply(self.sequence, a["chunks"]))
        self.first_head = e.multiply(chunk, a["chunk"])
        self.heads = e.clip(e.subtract(a["heads"], self.first_head), a["chunk"])
        queries = a.integer("query_lengths", self.sequence)
        self.rows = e.multiply(queries, a["group"])
        self.first = e.multiply(self.tile, a["tile_rows"])
        self.count = e.clip(e.subtract(self.rows, self.first), a["tile_rows"])
        self.shift = e.subtract(a.integer("lengths", self.sequence), queries)
        self.slot = e.add(a["scratch"], e.multiply(thread, a["slot"]))

    def tile_of(self, h: Any, split: Any | None = None) -> RowTile:
        """The tile of head number h of the unit. split: whose state, the unit's own if None."""
        e, a = self.c.e, self.c.a
        head = e.add(self.first_head, h)
        index = e.add(e.multiply(self.sequence, a["heads"]), head)
        index = e.add(e.multiply(index, a["tiles"]), self.tile)
        index = e.add(e.multiply(index, a["splits"]), self.split if split is None else split)
        # States that nothing is merged with are the thread's own, used again for its next unit.
        alone = e.builder.icmp_signed("==", a["splits"], e.integer(1))
        index = e.builder.select(alone, e.add(e.multiply(self.thread, a["chunk"]), h), index)
        row_slot = e.add(self.slot, e.add(a["at_rows"], e.multiply(h, a["row_slot"])))
        return RowTile(
            self.sequence, head, e.divide(head, a["repeat"]), self.first, self.rows, self.count,
            self.shift, self.slot, row_slot, e.add(a["states"], e.multiply(index, a["state"])),
        )  # fmt: skip


def block_state(c: Context, state: Any, block: Any) -> Any:
    """The address of the state of 4 rows."""
    size = c.e.add(c.e.multiply(c.a["stored_values"], 4 * ROWS), STATE_HEADER)
    return c.e.add(state, c.e.multiply(block, size))


def piece(c: Context, tile: RowTile, name: str) -> Any:
    """The address of a piece of scratch."""
    return c.e.add(tile.row_slot if name in ROW_PIECES else tile.slot, c.a[f"at_{name}"])


def blocks_of(c: Context, tile: RowTile) -> Any:
    return c.e.divide(c.e.add(tile.count, ROWS - 1), ROWS)


def clear_states(c: Context, tile: RowTile) -> None:
    """No key yet: m = -inf, l = 0, o = 0."""
    e = c.e
    with e.loop(blocks_of(c, tile)) as block:
        state = block_state(c, tile.state, block)
        lanes.store_quad(e, state, e.floats(float("-inf")))
        lanes.store_quad(e, e.add(state, 16), e.floats(0.0))
        outputs = e.add(state, STATE_HEADER)
        with e.loop(e.divide(c.a["stored_values"], LANES // ROWS)) as i:
            e.store(e.offset(outputs, i, 64), e.floats(0.0))


def copy_floats(
    c: Context, source: Any, count: Any, padded: Any, target: Any, target_type: int
) -> None:
    """`count` floats of the caller's dtype → `padded` floats of `target_type`, zeros behind."""
    copy_row(c.e, c.tail, source, c.kind.dtype, count, target, target_type, padded)


def token_and_head(c: Context, tile: RowTile, row: Any) -> tuple[Any, Any]:
    """Token of the sequence and query head of a row."""
    e, group = c.e, c.a["group"]
    token = e.divide(row, group)
    within = e.subtract(row, e.multiply(token, group))
    return token, e.add(e.multiply(tile.head, group), within)


def batch_and_row(c: Context, tile: RowTile, token: Any) -> tuple[Any, Any]:
    """Where a token of the sequence lies in q and o: batch row and row."""
    e, a = c.e, c.a
    packed = e.builder.icmp_signed("!=", a["offsets"], e.integer(0))
    batch, row = e.variable(tile.sequence), e.variable(token)
    with e.when(packed):
        batch.value = e.integer(0)
        row.value = e.add(token, a.integer("offsets", tile.sequence))
    return batch.value, row.value


def prepare_rows(c: Context, tile: RowTile) -> None:
    """q of the tile, as floats that are multiplied and, where it is rounded, as codes."""
    e, a, kind = c.e, c.a, c.kind
    with e.loop(e.multiply(blocks_of(c, tile), ROWS)) as n:
        floats = e.add(piece(c, tile, "q"), e.multiply(e.multiply(n, a["staged_keys"]), kind.item))
        wide = piece(c, tile, "wide")
        row = e.add(tile.first, n)
        token, head = token_and_head(c, tile, row)
        batch, q_row = batch_and_row(c, tile, token)
        source = e.add(
            e.add(a["q"], e.multiply(batch, a["q_batch"])), e.multiply(head, a["q_head"])
        )
        source = e.add(source, e.multiply(q_row, a["q_row"]))
        # Rows behind the last are zeros: they are computed and never stored.
        count = e.builder.select(e.less(row, tile.rows), a["key_dim"], e.integer(0))
        copy_floats(c, source, count, a["staged_keys"], floats, kind.item_type)
        if kind.key != "float":
            copy_floats(c, source, count, a["staged_keys"], wide, FP32)
            _round_row(c, tile, n, wide)


def _round_row(c: Context, tile: RowTile, n: Any, wide: Any) -> None:
    """Codes and factor of one row of fp32 numbers."""
    e, a, kind, b = c.e, c.a, c.kind, c.b
    largest = LARGEST_CODE if kind.query == "int8" else _E4M3_LARGEST
    scale, inverse, finite = _scale_of(c, wide, float(largest))
    factor = b.fmul(scale, a.real("scale"))
    e.store(e.offset(piece(c, tile, "factors"), n, 4), factor)
    zero = e.floats(0.0)
    keep = e.splat(finite)
    if kind.query == "e4m3":
        target = e.add(
            piece(c, tile, "rounded"), e.multiply(e.multiply(n, a["staged_keys"]), kind.item)
        )
        with e.loop(e.divide(a["staged_keys"], LANES)) as i:
            scaled = b.fmul(e.load(e.offset(wide, i, 64), FLOATS), inverse)
            rounded = mathematics.round_e4m3(e, b.select(keep, scaled, zero))
            value = e.round_floats(rounded, kind.item_type)
            e.store(e.offset(target, i, LANES * kind.item), value)
        return
    codes = e.add(piece(c, tile, "codes"), e.multiply(n, a["stored_keys"]))
    total = e.variable(e.constant(0))
    with e.loop(e.divide(a["stored_keys"], LANES)) as i:
        scaled = b.fmul(e.load(e.offset(wide, i, 64), FLOATS), inverse)
        rounded = e.nearest(b.select(keep, scaled, zero))
        total.value = b.add(total.value, rounded)
        e.store(e.offset(codes, i, LANES), b.trunc(rounded, BYTES))
    e.store(e.offset(piece(c, tile, "sums"), n, 4), e.sum_of_lanes(total.value))


def _scale_of(c: Context, wide: Any, largest: float) -> tuple[Any, Any, Any]:
    """Scale, splat inverse, and whether all of a row is finite."""
    e, b = c.e, c.b
    top = e.variable(e.constant(0))
    with e.loop(e.divide(c.a["staged_keys"], LANES)) as i:
        bits = b.and_(e.load(e.offset(wide, i, 64), INTS), e.constant(0x7FFFFFFF))
        top.value = e.larger(top.value, bits)
    bits = e.largest_lane(top.value)
    absmax, one = b.bitcast(bits, F32), c.real(1.0)
    small = b.fcmp_ordered("<", absmax, c.real(SMALLEST_ABSMAX))
    finite = b.icmp_unsigned("<", bits, ir.Constant(I32, _INFINITY_BITS))
    scale = b.select(small, one, b.fdiv(absmax, c.real(largest)))
    inverse = b.select(small, c.real(0.0), b.fdiv(c.real(largest), absmax))
    scale = b.select(finite, scale, c.real(float("nan")))
    return scale, e.splat(inverse), finite


def position_of(c: Context, tile: RowTile, row: Any) -> Any:
    """The position of a row's token among the keys; rows behind the last count as the last."""
    e = c.e
    last = e.subtract(tile.rows, 1)
    return e.add(e.divide(e.smaller_of(row, last), c.a["group"]), tile.shift)


def finish_rows(c: Context, tile: RowTile, count: Any) -> None:
    """o and lse of `count` rows from the states of all splits; tile.state is the first of them.

    Rows that the sequence has not got are 0 and -inf.
    """
    e = c.e
    with e.loop(count) as n:
        row = e.add(tile.first, n)
        token, head = token_and_head(c, tile, row)
        batch, o_row = batch_and_row(c, tile, token)
        exists = e.less(row, tile.rows)
        place = (batch, head, o_row)
        with e.choice(exists) as (present, absent):
            with present:
                _finish_row(c, tile, n, place)
            with absent:
                weights, inverse = e.floats(0.0), e.floats(0.0)
                _store_output(c, place, lambda _: c.b.fmul(weights, inverse))
                _store_lse(c, place, c.real(float("-inf")))


def _finish_row(c: Context, tile: RowTile, n: Any, place: tuple[Any, Any, Any]) -> None:
    e, a, b = c.e, c.a, c.b
    block = e.divide(n, ROWS)
    within = e.subtract(n, e.multiply(block, ROWS))
    low = e.floats(float("-inf"))
    sink = e.variable(low)
    with e.when(b.icmp_signed("!=", a["sink"], e.integer(0))):
        value = e.broadcast(e.offset(a["sink"], place[1], 4), F32)
        sink.value = b.fmul(value, e.floats(mathematics.LOG2E))

    def header(split: Any) -> Any:
        state = e.add(tile.state, e.multiply(split, a["state"]))
        return e.add(block_state(c, state, block), e.multiply(within, 4))

    top = e.variable(sink.value)
    with e.loop(a["splits"]) as split:
        top.value = mathematics.greater(e, e.broadcast(header(split), F32), top.value)
    # Where nothing was read the maximum is -inf; any finite number does in its place.
    shift = b.select(b.fcmp_ordered("==", top.value, low), e.floats(0.0), top.value)
    total = e.variable(mathematics.exp2(e, b.fsub(sink.value, shift)))
    with e.loop(a["splits"]) as split:
        weight = mathematics.exp2(e, b.fsub(e.broadcast(header(split), F32), shift))
        sum_of_split = e.broadcast(e.add(header(split), 16), F32)
        total.value = e.fma(sum_of_split, weight, total.value)
    empty = b.fcmp_ordered("==", total.value, e.floats(0.0))
    inverse = b.select(empty, e.floats(0.0), b.fdiv(e.floats(1.0), total.value))

    def output(i: Any) -> Any:
        merged = e.variable(e.floats(0.0))
        with e.loop(a["splits"]) as split:
            weight = mathematics.exp2(e, b.fsub(e.broadcast(header(split), F32), shift))
            state = block_state(c, e.add(tile.state, e.multiply(split, a["state"])), block)
            outputs = e.add(
                e.add(state, STATE_HEADER), e.multiply(e.multiply(within, a["stored_values"]), 4)
            )
            merged.value = e.fma(e.load(e.offset(outputs, i, 64), FLOATS), weight, merged.value)
        return b.fmul(merged.value, inverse)

    _store_output(c, place, output)
    log = b.fadd(shift, mathematics.log2(e, b.select(empty, e.floats(1.0), total.value)))
    lse = b.select(empty, low, b.fmul(log, e.floats(mathematics.LN2)))
    _store_lse(c, place, b.extract_element(lse, ir.Constant(I32, 0)))


def _store_lse(c: Context, place: tuple[Any, Any, Any], value: Any) -> None:
    e, a = c.e, c.a
    batch, head, row = place
    address = e.add(
        e.add(a["lse"], e.multiply(batch, a["lse_batch"])), e.multiply(head, a["lse_head"])
    )
    e.store(e.offset(address, row, 4), value)


def _store_output(c: Context, place: tuple[Any, Any, Any], vector: Any) -> None:
    """vector(i) → channels 16 i .. 16 i + 15 of a row of o, rounded once."""
    e, a, kind = c.e, c.a, c.kind
    batch, head, row = place
    target = e.add(e.add(a["o"], e.multiply(batch, a["o_batch"])), e.multiply(head, a["o_head"]))
    target = e.add(target, e.multiply(row, a["o_row"]))
    size = kind.dtype_bytes
    with e.loop(e.divide(e.add(a["value_dim"], LANES - 1), LANES)) as i:
        value = e.round_floats(vector(i), kind.dtype)
        left = e.subtract(a["value_dim"], e.multiply(i, LANES))
        place_of = e.offset(target, i, LANES * size)
        with e.choice(e.less(left, e.integer(LANES))) as (part, whole):
            with whole:
                e.store(place_of, value)
            with part:
                e.store(c.tail, value)
                with e.loop(e.multiply(left, size)) as j:
                    e.store(e.add(place_of, j), e.load(e.add(c.tail, j), I8))
