"""What happens to the scores of 4 rows and one tile: options and masks, softmax, weights.

Most tiles of most calls need no pass over their scores but that of the softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from lath.formats.pages import PAGE
from lath.kernels.attention.cpu_arguments import ROWS, Context
from lath.kernels.attention.cpu_ask import ask_beside_softmax
from lath.kernels.attention.cpu_rows import (
    RowTile,
    block_state,
    piece,
    position_of,
    token_and_head,
)
from lath.kernels.attention.cpu_tile import VECTOR, KeyTile, subpage_is_read, when_read
from lath.kernels.simd import brain, lanes, mathematics
from lath.kernels.simd.emitter import BYTES, F32, FLOATS, I8, I16, I32, INTS, LANES

GROUPS = PAGE // LANES
_LOWEST = float("-inf")


@dataclass(frozen=True)
class Reach:
    """What the order of positions admits of a tile for some rows. All are values in the kernel.

    limit: the first tokens of the tile beyond which no row reads; 0 or less for none at all.
    crossed: whether some row may not read some of the 64.
    """

    limit: Any
    crossed: Any


def reach_of(c: Context, keys: KeyTile, lowest: Any, highest: Any) -> Reach:
    """For rows at positions lowest .. highest: key n is read if nearest <= row - n <= farthest."""
    e, a, b = c.e, c.a, c.b
    last = e.subtract(e.add(keys.start, keys.count), 1)
    admitted = e.add(e.subtract(e.subtract(highest, a["nearest"]), keys.start), 1)
    limit = e.smaller_of(keys.count, admitted)
    beyond = e.less(a["farthest"], e.subtract(lowest, last))
    limit = b.select(beyond, e.integer(0), limit)
    near = e.less(e.subtract(lowest, last), a["nearest"])
    far = e.less(a["farthest"], e.subtract(highest, keys.start))
    partial = e.less(limit, e.integer(PAGE))
    return Reach(limit, b.or_(b.or_(near, far), partial))


def apply_options(c: Context, tile: RowTile, keys: KeyTile, block: Any) -> None:
    """Softcap, bias, slopes and masks on the scores in scratch; -inf beyond the tile's tokens."""
    e, a, b = c.e, c.a, c.b
    with e.loop(e.integer(ROWS)) as r:
        row = e.add(tile.first, e.add(e.multiply(block, ROWS), r))
        row = e.smaller_of(row, e.subtract(tile.rows, 1))
        token, head = token_and_head(c, tile, row)
        where = _Where(c, tile, token, head)
        base = e.subtract(position_of(c, tile, row), keys.start)
        with e.loop(e.integer(GROUPS)) as group:
            first = e.multiply(group, LANES)
            place = e.add(
                piece(c, tile, "scores"), e.multiply(e.add(e.multiply(r, PAGE), first), 4)
            )
            slots = b.add(e.splat(b.trunc(first, I32)), lanes.positions(e))
            distance = b.sub(e.splat(b.trunc(base, I32)), slots)
            score = e.variable(e.load(place, FLOATS))
            valid = e.variable(_in_order(c, keys, slots, distance))
            with e.when(b.icmp_signed("!=", a["special"], e.integer(0))):
                key = e.add(keys.start, first)
                score.value = where.adjusted(score.value, key, distance)
                valid.value = where.allowed(valid.value, key)
            e.store(place, b.select(valid.value, score.value, e.floats(_LOWEST)))


def exclude_tokens(c: Context, tile: RowTile, keys: KeyTile) -> None:
    """-inf in place of the scores in scratch of tokens that a list leaves out. Sub-pages without
    any other have no scores, and `softmax` takes none from them."""
    e, b = c.e, c.b
    for group in range(GROUPS):
        bits = b.trunc(b.lshr(keys.missing, e.integer(LANES * group)), I16)
        some = b.icmp_signed("!=", bits, ir.Constant(I16, 0))
        with e.when(b.and_(some, subpage_is_read(c, keys.tokens, group))):
            excluded = b.bitcast(bits, ir.VectorType(ir.IntType(1), LANES))
            for r in range(ROWS):
                place = e.add(piece(c, tile, "scores"), 4 * (PAGE * r + LANES * group))
                score = e.load(place, FLOATS)
                e.store(place, b.select(excluded, e.floats(_LOWEST), score))


def _in_order(c: Context, keys: KeyTile, slots: Any, distance: Any) -> Any:
    e, a, b = c.e, c.a, c.b
    valid = b.icmp_signed("<", slots, e.splat(b.trunc(keys.count, I32)))
    near = b.icmp_signed(">=", distance, e.splat(b.trunc(a["nearest"], I32)))
    far = b.icmp_signed("<=", distance, e.splat(b.trunc(a["farthest"], I32)))
    return b.and_(valid, b.and_(near, far))


class _Where:
    """One row's options: bias, mask, slope and tree bits at keys."""

    def __init__(self, c: Context, tile: RowTile, token: Any, head: Any) -> None:
        self.c, self.tile, self.token, self.head = c, tile, token, head

    def _present(self, name: str) -> Any:
        return self.c.b.icmp_signed("!=", self.c.a[name], self.c.e.integer(0))

    def _row(self, name: str) -> Any:
        e, a = self.c.e, self.c.a
        address = e.add(a[name], e.multiply(self.tile.sequence, a[f"{name}_batch"]))
        address = e.add(address, e.multiply(self.head, a[f"{name}_head"]))
        return e.add(address, e.multiply(self.token, a[f"{name}_row"]))

    def _sixteen(self, name: str, key: Any, kind: Any, size: int) -> Any:
        """Entries key .. key + 15 of a row of bias or mask; zeros behind its end."""
        e = self.c.e
        tail = self.c.tail
        left = e.subtract(self.c.a[f"{name}_keys"], key)
        address = e.offset(self._row(name), key, size)
        source = e.variable(address)
        with e.when(e.less(left, e.integer(LANES))):
            e.store(tail, e.constant(0))
            with e.loop(e.clip(e.multiply(left, size), e.integer(VECTOR))) as i:
                e.store(e.add(tail, i), e.load(e.add(address, i), I8))
            source.value = tail
        return e.load(source.value, kind)

    def adjusted(self, score: Any, key: Any, distance: Any) -> Any:
        e, a, b = self.c.e, self.c.a, self.c.b
        value = e.variable(score)
        with e.when(self._present("softcap")):
            cap = e.splat(a.real("softcap"))
            value.value = b.fmul(cap, mathematics.tanh(e, b.fdiv(value.value, cap)))
        with e.when(self._present("bias")):
            bias = self._sixteen("bias", key, FLOATS, 4)
            value.value = e.fma(bias, e.floats(mathematics.LOG2E), value.value)
        with e.when(self._present("alibi")):
            slope = e.broadcast(e.offset(a["alibi"], self.head, 4), F32)
            slope = b.fmul(slope, e.floats(-mathematics.LOG2E))
            value.value = e.fma(slope, e.to_floats(distance), value.value)
        return value.value

    def allowed(self, valid: Any, key: Any) -> Any:
        e, b = self.c.e, self.c.b
        value = e.variable(valid)
        with e.when(self._present("mask")):
            bytes_read = self._sixteen("mask", key, BYTES, 1)
            value.value = b.and_(value.value, b.icmp_signed("!=", bytes_read, BYTES(None)))
        with e.when(self._present("tree")):
            value.value = b.and_(value.value, self._tree_bits(key))
        return value.value

    def _tree_bits(self, key: Any) -> Any:
        """Whether the row reads the keys key .. key + 15 as nodes of the tree; others it reads."""
        e, a, b = self.c.e, self.c.a, self.c.b
        row = e.add(a["tree"], e.multiply(self.tile.sequence, a["tree_batch"]))
        row = e.add(row, e.multiply(self.token, a["tree_row"]))
        nodes = a.integer("query_lengths", self.tile.sequence)
        first = e.subtract(key, self.tile.shift)
        with e.loop(e.integer(LANES)) as i:
            node, entry = e.add(first, i), e.offset(self.c.tail, i, 4)
            inside = b.and_(e.less(e.integer(-1), node), e.less(node, nodes))
            e.store(entry, ir.Constant(I32, 1))
            with e.when(inside):
                word = e.load(e.offset(row, e.divide(node, 32), 4), I32)
                shift = b.trunc(e.remainder(node, 32), I32)
                e.store(entry, b.and_(b.lshr(word, shift), ir.Constant(I32, 1)))
        return b.icmp_signed("!=", e.load(self.c.tail), e.constant(0))


@dataclass(frozen=True)
class Weights:
    """What the values' side needs; vectors with row l % 4 in lane l, or a vector per row.

    old: factor of what was summed before. new: factor of this tile's sums. read: bool vectors,
    whether a row reads any key of the tile. lower_sums: sums of the lower plane ("int16").
    """

    old: list[Any]
    new: list[Any]
    read: list[Any]
    lower_sums: list[Any]


def softmax(c: Context, tile: RowTile, keys: KeyTile, block: Any) -> Weights:
    """Scores in scratch → weights in scratch relative to the tile's own largest score; m and l of
    the rows brought up to date. Sums are of the weights before they are rounded."""
    e, b = c.e, c.b
    scores = piece(c, tile, "scores")

    def score(r: int, g: int) -> Any:
        return e.load(e.add(scores, 4 * (PAGE * r + LANES * g)), FLOATS)

    loaded = _of_groups(c, keys, _LOWEST, score)
    tops = [_combine(c, mathematics.greater, row) for row in loaded]
    top = lanes.rows(e, tops, lambda x, y: mathematics.greater(e, x, y))
    # A row that reads nothing here, or only NaN: any finite number does in place of -inf.
    top = b.select(b.fcmp_ordered("==", top, e.floats(_LOWEST)), e.floats(0.0), top)
    largest = [lanes.lane(e, top, r) for r in range(ROWS)]
    rows = _of_groups(
        c, keys, 0.0, lambda r, g: mathematics.exp2(e, b.fsub(loaded[r][g], largest[r]))
    )
    sums = [_combine(c, lambda _, x, y: b.fadd(x, y), row) for row in rows]
    lower = []
    for r, row in enumerate(rows):
        lower.append(_store_weights(c, tile, keys, r, row))
        if c.kind.few and keys.page and keys.asked is None:
            ask_beside_softmax(c, keys, r)
    total = lanes.rows(e, sums, b.fadd)
    read = b.fcmp_unordered("une", total, e.floats(0.0))
    old, new = _update(c, block_state(c, tile.state, block), top, total, read)
    wide_read = b.sext(read, INTS)
    return Weights(
        [lanes.lane(e, old, r) for r in range(ROWS)],
        [lanes.lane(e, new, r) for r in range(ROWS)],
        [b.icmp_signed("!=", lanes.lane(e, wide_read, r), e.constant(0)) for r in range(ROWS)],
        lower,
    )


def _of_groups(
    c: Context, keys: KeyTile, nothing: float, value: Callable[[int, int], Any]
) -> list[list[Any]]:
    """value(row, group of 16 tokens) of each row; `nothing` of groups that are not read."""
    found = [[c.e.variable(c.e.floats(nothing)) for _ in range(GROUPS)] for _ in range(ROWS)]
    for group in range(GROUPS):
        with when_read(c, keys, group):
            for r, row in enumerate(found):
                row[group].value = value(r, group)
    return [[variable.value for variable in row] for row in found]


def _combine(c: Context, combine: Any, vectors: list[Any]) -> Any:
    first, second = (combine(c.e, a, b) for a, b in (vectors[:2], vectors[2:]))
    return combine(c.e, first, second)


def _update(c: Context, state: Any, top: Any, total: Any, read: Any) -> tuple[Any, Any]:
    """m and l of 4 rows; returns the factors of the old and of the tile's sums."""
    e, b = c.e, c.b
    before = lanes.load_quad(e, state)
    after = b.select(read, mathematics.greater(e, top, before), before)
    old = b.select(read, mathematics.exp2(e, b.fsub(before, after)), e.floats(1.0))
    new = b.select(read, mathematics.exp2(e, b.fsub(top, after)), e.floats(0.0))
    summed = lanes.load_quad(e, e.add(state, 16))
    lanes.store_quad(e, state, after)
    lanes.store_quad(e, e.add(state, 16), e.fma(summed, old, b.fmul(total, new)))
    return old, new


def _store_weights(c: Context, tile: RowTile, keys: KeyTile, r: int, row: list[Any]) -> Any:
    """64 weights of row r; returns the sum of the lower plane's codes where there is one."""
    e, b, kind = c.e, c.b, c.kind
    target = piece(c, tile, "weights")
    if keys.page and kind.integer_values:
        return _store_codes(c, e.add(target, PAGE * r), row)
    if keys.page and kind.precision == "e4m3" and kind.value == "e4m3":
        row = [mathematics.round_e4m3(e, b.fmul(p, e.floats(256.0))) for p in row]
    for g, p in enumerate(row):
        place = e.add(target, kind.item * (PAGE * r + LANES * g))
        e.store(place, brain.narrow(e, p) if kind.brain else p)
    return None


def _store_codes(c: Context, target: Any, row: list[Any]) -> Any:
    e, b = c.e, c.b
    if c.kind.precision == "int8":
        for g, p in enumerate(row):
            codes = e.nearest(b.fmul(p, e.floats(127.0)))
            e.store(e.add(target, LANES * g), b.trunc(codes, BYTES))
        return None
    total = e.constant(0)
    for g, p in enumerate(row):
        full = e.nearest(b.fmul(p, e.floats(32512.0)))
        upper = e.shift_right_signed(b.add(full, e.constant(128)), 8)
        lower = b.sub(full, e.shift_left(upper, 8))
        total = b.add(total, lower)
        e.store(e.add(target, LANES * g), b.trunc(upper, BYTES))
        e.store(e.add(target, ROWS * PAGE + LANES * g), b.trunc(lower, BYTES))
    return e.splat(e.sum_of_lanes(total))
