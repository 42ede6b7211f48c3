"""Repair: attention over the means of the pages' values, weighted by what was not read of each.

A thread goes over the entries of a table in order, 16 at a time (online softmax), for 4 rows of q.
Weights are 2 to the logarithm of what is left of a page, relative to the row's largest.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from lath.formats.selection import LOGISTIC
from lath.kernels.select.cpu_arguments import ROWS, TILE, VECTOR, Arguments, Context
from lath.kernels.select.cpu_scores import centre_of, mass_of, sum_centres, sum_mass
from lath.kernels.select.cpu_units import (
    STATE_HEADER,
    Tile,
    Unit,
    prepare_pages,
    prepare_rows,
    prepare_targets,
    share,
    tiles_of,
)
from lath.kernels.simd import lanes, mathematics
from lath.kernels.simd.emitter import BF16, F32, FLOATS, I16, I32, I64, INTS, LANES, Emitter

_LOWEST = float("-inf")
_GROUP = 4  # vectors of channels whose sums stay in registers, for 4 rows


def emit_repair(
    e: Emitter,
    thread: Any,
    threads: Any,
    arguments: Any,
    spreads: bool,
    own_lists: bool,
    dtype: int,
) -> None:
    """The units thread, thread + threads, … of all, each over a whole table. spreads: of scores of
    a page, else they are all that of its centre. own_lists: rows of a head may have different z.
    """
    a = Arguments(e, arguments)
    c = Context(e, a, dtype)
    with e.loop(share(c, thread, threads)) as i:
        unit = Unit(c, thread, e.add(thread, e.multiply(i, threads)))
        with e.when(c.b.not_(unit.empty)):
            prepare_rows(c, unit, squares=spreads)
            prepare_targets(c, unit, a["o"], e.multiply(a["value_dim"], 4))
            _prepare_lists(c, unit)
            prepare_pages(c, unit, logs=True)
            _clear_states(c, unit)
            with e.loop(tiles_of(c, unit)) as t, e.loop(unit.heads) as h:
                tile = Tile(c, unit, t, h)
                with e.loop(unit.blocks) as block:
                    (sum_mass if spreads else sum_centres)(c, tile, block)
                    _Block(c, tile, block, spreads, own_lists).add()
            with e.loop(unit.heads) as h, e.loop(unit.rows) as n:
                _finish_row(c, unit, h, n)


def _prepare_lists(c: Context, unit: Unit) -> None:
    """Where the z of each row begin; a row behind the last has those of the last."""
    e, a = c.e, c.a
    with e.loop(unit.heads) as h, e.loop(e.multiply(unit.blocks, ROWS)) as n:
        head, _ = unit.head_and_token(h, e.smaller_of(n, e.subtract(unit.rows, 1)))
        address = e.add(a["unread"], e.multiply(unit.sequence, a["unread_sequence"]))
        address = e.add(address, e.multiply(e.divide(head, a["sharing"]), a["unread_head"]))
        e.store(unit.row_of("lists", h, n, e.integer(8)), address)


def _state(c: Context, unit: Unit, h: Any, block: Any) -> Any:
    e, a = c.e, c.a
    size = e.add(e.multiply(a["stored_values"], 4 * ROWS), STATE_HEADER)
    head = e.add(unit.piece("states"), e.multiply(h, a["state"]))
    return e.add(head, e.multiply(block, size))


def _clear_states(c: Context, unit: Unit) -> None:
    """Nothing yet: m = -inf, l = 0, o = 0."""
    e = c.e
    with e.loop(unit.heads) as h, e.loop(unit.blocks) as block:
        state = _state(c, unit, h, block)
        lanes.store_quad(e, state, e.floats(_LOWEST))
        lanes.store_quad(e, e.add(state, 16), e.floats(0.0))
        with e.loop(e.divide(c.a["stored_values"], LANES // ROWS)) as i:
            e.store(e.offset(e.add(state, STATE_HEADER), i, VECTOR), e.floats(0.0))


class _Block:
    """What 16 entries add to 4 rows."""

    def __init__(self, c: Context, tile: Tile, block: Any, spreads: bool, own_lists: bool) -> None:
        self.c, self.tile, self.block = c, tile, block
        self.spreads, self.own_lists = spreads, own_lists
        self.state = _state(c, tile.unit, tile.h, block)
        self.weights = tile.unit.piece("weights")
        self.taken = c.e.add(self.weights, 4 * ROWS * TILE)

    def add(self) -> None:
        e, b = self.c.e, self.c.b
        left = [self._left(r) for r in range(ROWS)]
        counted = [counts for _, counts in left]
        logs = [log for log, _ in left]
        any_row = counted[0]
        for counts in counted[1:]:
            any_row = b.or_(any_row, counts)
        bits = b.zext(b.bitcast(any_row, I16), I64)
        with e.when(b.icmp_signed("!=", bits, e.integer(0))):
            old = self._weigh(logs, counted)
            self._add_values(bits, old)

    def _left(self, r: int) -> tuple[Any, Any]:
        """log2 of what is left of the 16 entries for row r, and which of them count."""
        c, e, b = self.c, self.c.e, self.c.b
        z = self._quantiles(r)
        if self.spreads:
            mass, sigma = mass_of(c, self.tile, r)
            x = b.fmul(b.fsub(z, sigma), e.floats(LOGISTIC))
        else:
            mass, x = centre_of(c, self.tile, r), b.fmul(z, e.floats(LOGISTIC))
        # log of the logistic function: min(x, 0) - log(1 + exp(-|x|)).
        rest = mathematics.exp2(
            e, b.fmul(mathematics.magnitude(e, x), e.floats(-mathematics.LOG2E))
        )
        low = b.select(b.fcmp_ordered(">", x, e.floats(0.0)), e.floats(0.0), x)
        log = mathematics.log2(e, b.fadd(rest, e.floats(1.0)))
        left = b.fsub(b.fmul(b.fadd(mass, low), e.floats(mathematics.LOG2E)), log)
        exists = b.icmp_signed("<", lanes.positions(e), e.splat(b.trunc(self.tile.count, I32)))
        counts = b.and_(exists, b.fcmp_unordered("une", z, e.floats(_LOWEST)))
        return b.select(counts, left, e.floats(_LOWEST)), counts

    def _quantiles(self, r: int) -> Any:
        """z of the 16 entries for row r."""
        c, e = self.c, self.c.e
        n = e.add(e.multiply(self.block, ROWS), r)
        base = e.load(self.tile.unit.row_of("lists", self.tile.h, n, e.integer(8)), I64)
        base = e.offset(base, e.add(self.tile.unit.begin, self.tile.first), 4)
        source = e.variable(base)
        with e.when(e.less(self.tile.count, TILE)):
            # What follows the last entry need not be ours.
            e.store(c.tail, e.floats(_LOWEST))
            with e.loop(self.tile.count) as i:
                e.store(e.offset(c.tail, i, 4), e.load(e.offset(base, i, 4), F32))
            source.value = c.tail
        return e.load(source.value, FLOATS)

    def _weigh(self, logs: list[Any], counted: list[Any]) -> list[Any]:
        """Stores the weights; m and l of the rows brought up to date. What was summed before is to
        be multiplied with what this returns, a vector for each row."""
        e, b = self.c.e, self.c.b

        def greater(x: Any, y: Any) -> Any:
            return mathematics.greater(e, x, y)

        before = lanes.load_quad(e, self.state)
        after = greater(lanes.rows(e, logs, greater), before)
        # Nothing but NaN so far: any finite number does in place of -inf.
        shift = b.select(b.fcmp_ordered("==", after, e.floats(_LOWEST)), e.floats(0.0), after)
        old = mathematics.exp2(e, b.fsub(before, shift))
        weights = []
        for r, log in enumerate(logs):
            weight = mathematics.exp2(e, b.fsub(log, lanes.lane(e, shift, r)))
            e.store(e.add(self.weights, 4 * TILE * r), weight)
            weights.append(weight)
            if self.own_lists:
                e.store(e.add(self.taken, 4 * TILE * r), b.sext(counted[r], INTS))
        total = lanes.rows(e, weights, b.fadd)
        summed = e.fma(lanes.load_quad(e, e.add(self.state, 16)), old, total)
        lanes.store_quad(e, self.state, after)
        lanes.store_quad(e, e.add(self.state, 16), summed)
        return [lanes.lane(e, old, r) for r in range(ROWS)]

    def _add_values(self, bits: Any, old: list[Any]) -> None:
        e = self.c.e
        vectors = e.divide(self.c.a["stored_values"], LANES)
        groups = e.divide(vectors, _GROUP)
        with e.loop(groups) as i:
            self._add_channels(e.multiply(i, _GROUP), _GROUP, bits, old)
        done = e.multiply(groups, _GROUP)
        with e.loop(e.subtract(vectors, done)) as i:
            self._add_channels(e.add(done, i), 1, bits, old)

    def _add_channels(self, first: Any, vectors: int, bits: Any, old: list[Any]) -> None:
        """o of `vectors` vectors of channels of 4 rows."""
        c, e, b = self.c, self.c.e, self.c.b
        at = e.add(c.a["value_mean"], e.multiply(first, 2 * LANES))
        places = [[self._output(r, e.add(first, v)) for v in range(vectors)] for r in range(ROWS)]
        sums = [
            [e.variable(b.fmul(e.load(place, FLOATS), old[r])) for place in row]
            for r, row in enumerate(places)
        ]
        with e.loop(self.tile.count) as entry:
            for upcoming in self.tile.upcoming(entry):
                for v in range(0, vectors, 2):
                    e.prefetch(e.add(e.add(upcoming, at), 2 * LANES * v))
            bit = b.and_(b.lshr(bits, entry), e.integer(1))
            with e.when(b.icmp_signed("!=", bit, e.integer(0))):
                row = e.add(self.tile.row(entry), at)
                means = [e.load_floats(e.add(row, 2 * LANES * v), BF16) for v in range(vectors)]
                for r in range(ROWS):
                    self._add_row(r, entry, sums[r], means)
        for row_sums, row_places in zip(sums, places, strict=True):
            for total, place in zip(row_sums, row_places, strict=True):
                e.store(place, total.value)

    def _output(self, r: int, vector: Any) -> Any:
        e = self.c.e
        row = e.add(self.state, e.multiply(self.c.a["stored_values"], 4 * r))
        return e.offset(e.add(row, STATE_HEADER), vector, VECTOR)

    def _add_row(self, r: int, entry: Any, sums: list[Any], means: list[Any]) -> None:
        e, b = self.c.e, self.c.b
        weight = e.broadcast(e.offset(e.add(self.weights, 4 * TILE * r), entry, 4), F32)
        for total, mean in zip(sums, means, strict=True):
            value = e.fma(weight, mean, total.value)
            if self.own_lists:
                # A NaN among the values of an entry that does not count must not show.
                taken = e.broadcast(e.offset(e.add(self.taken, 4 * TILE * r), entry, 4))
                value = b.select(b.icmp_signed("!=", taken, e.constant(0)), value, total.value)
            total.value = value


def _finish_row(c: Context, unit: Unit, h: Any, n: Any) -> None:
    e, a, b = c.e, c.a, c.b
    block = e.divide(n, ROWS)
    within = e.subtract(n, e.multiply(block, ROWS))
    state = _state(c, unit, h, block)
    header = e.offset(state, within, 4)
    top, total = e.broadcast(header, F32), e.broadcast(e.add(header, 16), F32)
    empty = b.fcmp_ordered("==", total, e.floats(0.0))
    inverse = b.select(empty, e.floats(0.0), b.fdiv(e.floats(1.0), total))
    log = b.fadd(top, mathematics.log2(e, b.select(empty, e.floats(1.0), total)))
    lse = b.select(empty, e.floats(_LOWEST), b.fmul(log, e.floats(mathematics.LN2)))
    head, token = unit.head_and_token(h, n)
    target = e.offset(a["lse"], unit.flat_row(head, token), 4)
    e.store(target, b.extract_element(lse, ir.Constant(I32, 0)))
    outputs = e.add(state, STATE_HEADER)
    outputs = e.add(outputs, e.multiply(e.multiply(within, a["stored_values"]), 4))
    target = e.load(unit.row_of("targets", h, n, e.integer(8)), I64)
    whole = e.divide(a["value_dim"], LANES)
    with e.loop(whole) as i:
        value = b.fmul(e.load(e.offset(outputs, i, VECTOR), FLOATS), inverse)
        e.store(e.offset(target, i, VECTOR), value)
    rest = e.subtract(a["value_dim"], e.multiply(whole, LANES))
    with e.when(e.less(e.integer(0), rest)):
        e.store(c.tail, b.fmul(e.load(e.offset(outputs, whole, VECTOR), FLOATS), inverse))
        with e.loop(rest) as i:
            place = e.offset(e.offset(target, whole, VECTOR), i, 4)
            e.store(place, e.load(e.offset(c.tail, i, 4), F32))
