"""Four rows of q times numbers of four index rows, 16 channels a step.

relu(q)·max - relu(-q)·min = q·centre + |q|·reach with centre = (max + min) / 2 and reach = (max -
min) / 2: two multiplications of a number of q, and an index row is widened once for four rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lath.kernels.select.cpu_arguments import ROWS, TILE, VECTOR, Context
from lath.kernels.select.cpu_units import Tile
from lath.kernels.simd import lanes, mathematics
from lath.kernels.simd.arguments import load_index
from lath.kernels.simd.emitter import BF16, BYTES, F32, FLOATS, INTS, LANES

QUADS = TILE // 4
_WIDE = 2.0**-8  # how far a mean rounded to bfloat16 may lie from the mean, of its size
# What q is multiplied with, and |q|; None where nothing is.
Terms = list[tuple[Any, Any | None]]


@dataclass(frozen=True)
class _Row:
    """An index row. upcoming: some that are read soon. half: half its index unit in all lanes."""

    address: Any
    upcoming: list[Any]
    half: Any


def quad_sums(
    c: Context, rows: Any, vectors: Any, operands: Callable[[Any], Terms], before: Any = None
) -> Any:
    """Σ over channels for 4 rows of q by 4 items → lane 4 * row + item.

    rows: address of fp32 [4, stored keys]. operands(i): the terms of each item for channels 16 i ..
    16 i + 15. before: sums to begin with, [4][4] vectors.
    """
    e = c.e
    totals = sums_of(c)
    with e.loop(vectors) as i:
        add_terms(c, totals, rows, i, operands(i))
    return reduce_sums(c, totals)


def sums_of(c: Context) -> list[list[Any]]:
    return [[c.e.variable(c.e.floats(0.0)) for _ in range(4)] for _ in range(ROWS)]


def add_terms(c: Context, totals: list[list[Any]], rows: Any, i: Any, terms: Terms) -> None:
    e = c.e
    stride = e.multiply(c.a["stored_keys"], 4)
    for r in range(ROWS):
        own = e.load(e.offset(e.add(rows, e.multiply(stride, r)), i, VECTOR), FLOATS)
        size = mathematics.magnitude(e, own)
        for total, (centre, reach) in zip(totals[r], terms, strict=True):
            value = e.fma(own, centre, total.value)
            total.value = value if reach is None else e.fma(size, reach, value)


def reduce_sums(c: Context, totals: list[list[Any]]) -> Any:
    add = c.b.fadd
    parts = [lanes.items(c.e, [total.value for total in row], add) for row in totals]
    return lanes.items(c.e, parts, add)


class Quads:
    """Sums over the entries of a tile for four rows, into `dots`."""

    def __init__(self, c: Context, tile: Tile, rows: Any) -> None:
        self.c, self.tile, self._rows = c, tile, rows
        self._vectors = c.e.divide(c.a["stored_keys"], LANES)

    def _index_rows(self, quad: Any) -> list[_Row]:
        e = self.c.e
        found = []
        for p in range(4):
            entry = e.add(e.multiply(quad, 4), p)
            address = self.tile.row(entry)
            unit = e.broadcast(e.add(address, self.c.a["numbers"]), F32)
            half = self.c.b.fmul(unit, e.floats(0.5))
            found.append(_Row(address, self.tile.upcoming(entry), half))
            self._ask(found[-1], self.c.a["numbers"])
        return found

    def _ask(self, row: _Row, place: Any) -> None:
        for address in row.upcoming:
            self.c.e.prefetch(self.c.e.add(address, place))

    def _run(self, operands: Callable[[list[_Row], Any], Callable[[Any], Terms]], at: int) -> None:
        """operands(rows of four entries, number of the first) → what `quad_sums` takes."""
        e = self.c.e
        with e.loop(e.divide(e.add(self.tile.count, 3), 4)) as quad:
            own = operands(self._index_rows(quad), e.multiply(quad, 4))
            sums = quad_sums(self.c, self._rows, self._vectors, own)
            for r in range(ROWS):
                place = e.add(self.tile.unit.piece("dots"), at + 4 * TILE * r)
                four = e.shuffle(sums, sums, [4 * r + p for p in range(4)])
                e.store(e.offset(place, quad, LANES), four)

    def means(self) -> None:
        """Σ q mean."""
        self._run(lambda rows, _: lambda i: [(self._mean(row, i), None) for row in rows], 0)

    def deviations(self) -> None:
        """Σ q² deviation², deviation in half index units; the rows are those of q²."""
        self._run(lambda rows, _: lambda i: [(self._square(row, i), None) for row in rows],
                  4 * ROWS * TILE)  # fmt: skip

    def bounds(self) -> None:
        """Σ q mean + unit (relu(q) max - relu(-q) min)."""
        self._run(lambda rows, _: lambda i: [self._bound(row, i) for row in rows], 0)

    def floors(self) -> None:
        """The most that a page's log-sum-exp of n tokens exceeds for certain, less ln n."""

        def operands(rows: list[_Row], first: Any) -> Callable[[Any], Terms]:
            whole = [self._whole(row, first, p) for p, row in enumerate(rows)]
            return lambda i: [self._floor(row, w, i) for row, w in zip(rows, whole, strict=True)]

        self._run(operands, 0)

    def _whole(self, row: _Row, first: Any, p: int) -> Any:
        """Whether all tokens that were written count."""
        c, e = self.c, self.c.e
        counted = e.offset(self.tile.per_entry("counted"), e.add(first, p), 4)
        count = c.b.sitofp(load_index(e, counted), F32)
        written = e.load(e.add(row.address, e.add(c.a["numbers"], 4)), F32)
        return e.splat(c.b.fcmp_ordered("==", count, written))

    def _mean(self, row: _Row, i: Any) -> Any:
        """The means of 16 channels; those of rows that are read soon are asked for."""
        e = self.c.e
        place = e.offset(self.c.a["mean"], i, 2 * LANES)
        self._ask(row, place)
        return e.load_floats(e.add(row.address, place), BF16)

    def _square(self, row: _Row, i: Any) -> Any:
        e = self.c.e
        place = e.offset(self.c.a["deviation"], i, LANES)
        self._ask(row, place)
        deviation = e.to_floats(e.load_bytes(e.add(row.address, place)))
        return self.c.b.fmul(deviation, deviation)

    def _bound(self, row: _Row, i: Any) -> tuple[Any, Any]:
        e, a = self.c.e, self.c.a
        # Mean, max and min of 16 channels are 64 bytes together.
        self._ask(row, e.offset(a["mean"], i, VECTOR))
        mean = e.load_floats(e.offset(e.add(row.address, a["mean"]), i, 2 * LANES), BF16)
        largest, smallest = (
            e.load(e.offset(e.add(row.address, a[name]), i, LANES), BYTES)
            for name in ("max", "min")
        )
        return middle(self.c, mean, largest, smallest, row.half)

    def _floor(self, row: _Row, whole: Any, i: Any) -> tuple[Any, Any]:
        """By convexity where μ is the mean of just the tokens that count, else the least score."""
        c, e, b = self.c, self.c.e, self.c.b
        mean = e.load_floats(e.offset(e.add(row.address, c.a["mean"]), i, 2 * LANES), BF16)
        centre, reach = self._bound(row, i)
        rounding = e.fma(mathematics.magnitude(e, mean), e.floats(_WIDE), row.half)
        reach = b.select(whole, rounding, reach)
        return b.select(whole, mean, centre), b.fneg(reach)


def middle(c: Context, mean: Any, largest: Any, smallest: Any, half: Any) -> tuple[Any, Any]:
    """Centre and reach of 16 channels: bytes in index units about the mean → real units."""
    e, b = c.e, c.b
    high, low = (b.sext(side, INTS) for side in (largest, smallest))
    centre = e.fma(e.to_floats(b.add(high, low)), half, mean)
    return centre, b.fmul(e.to_floats(b.sub(high, low)), half)
