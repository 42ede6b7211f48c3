"""The loops of `linear` on a CPU over vector codebooks: entries fetched, widened, multiplied.

A lane is a column here and not a row: sixteen columns of a row are one or more entries side by
side, widened to fp32 and multiplied with the same sixteen columns of x, four rows at a time.
Fetching is the price, and books stay in fp16: one of 256 lives in the first-level cache, one of
65536 in the second. For many tokens a piece of sixteen rows is decoded into memory first
("staged").
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from lath.kernels.linear.cpu_arguments import Arguments
from lath.kernels.linear.cpu_record import Output
from lath.kernels.simd import half, lanes
from lath.kernels.simd.emitter import (
    F32,
    FLOATS,
    HALVES,
    I8,
    I16,
    I64,
    INTS,
    LANES,
    Emitter,
)

_ROWS = 4  # whose accumulators and decoded weights fit the registers beside those of the tokens
# Sixteens of columns of a panel that are decoded at once, 32 KB: they and a tile of tokens stay in
# the first-level cache. And the tokens that they serve.
_PIECE = 32
_SPAN = 256
_LINE = 64  # bytes of a cache


def emit_vectors(
    e: Emitter, begin: Any, end: Any, arguments: Any, tokens: int, *shape: int
) -> None:
    """All tokens, `tokens` at a time, panels [begin, end); shape: of `_Shape`."""
    a = Arguments(e, arguments)
    rows, output, sums = _Rows(e, a, shape), Output(e, a), e.buffer(tokens)
    with e.loop(e.subtract(end, begin)) as index:
        panel = e.add(begin, index)
        with e.loop(_tiles(e, a, tokens)) as tile:
            first = e.multiply(tile, tokens)
            with e.loop(e.integer(LANES // _ROWS)) as quad:
                row = e.add(e.multiply(panel, LANES), e.multiply(quad, _ROWS))
                rows.start(row)
                rows.prefetch(e.add(row, _ROWS))
                totals = _multiply(e, a, rows, first, tokens)
                _put_sums(e, sums, quad, totals)
            _store(e, a, output, sums, panel, first, tokens)


def emit_staged(e: Emitter, begin: Any, end: Any, arguments: Any, tokens: int, *shape: int) -> None:
    """As `emit_vectors`, for many tokens: a piece of a panel is decoded once for _SPAN of them."""
    a = Arguments(e, arguments)
    rows, output, sums = _Rows(e, a, shape), Output(e, a), e.buffer(_SPAN)
    stage = e.buffer(LANES * _PIECE)
    length = e.divide(e.multiply(a["groups"], a["group"]), LANES)
    pieces = e.divide(e.add(length, _PIECE - 1), _PIECE)
    spans = e.divide(e.add(a["tokens"], _SPAN - 1), _SPAN)
    with e.loop(e.subtract(end, begin)) as index, e.loop(spans) as span:
        panel, start = e.add(begin, index), e.multiply(span, _SPAN)
        count = e.smaller_of(e.subtract(a["tokens"], start), _SPAN)
        tiles = e.divide(e.add(count, tokens - 1), tokens)
        with e.loop(e.integer(_SPAN)) as m:
            e.store(e.offset(sums, m, 64), e.floats(0.0))
        with e.loop(pieces) as piece:
            step = e.multiply(piece, _PIECE)
            steps = e.smaller_of(e.subtract(length, step), _PIECE)
            with e.loop(e.integer(LANES // _ROWS)) as quad:
                rows.start(e.add(e.multiply(panel, LANES), e.multiply(quad, _ROWS)))
                _decode(e, a, rows, _stage_of(e, stage, quad), step, steps)
            with e.loop(tiles) as tile, e.loop(e.integer(LANES // _ROWS)) as quad:
                inside = e.multiply(tile, tokens)
                x = _tokens_of_x(e, a, e.add(start, inside), tokens)
                x = [e.offset(own, step, 4 * LANES) for own in x]
                totals = _multiply_staged(e, _stage_of(e, stage, quad), x, steps)
                _put_sums(e, e.offset(sums, inside, 64), quad, totals, added=True)
        with e.loop(tiles) as tile:
            inside = e.multiply(tile, tokens)
            first = e.add(start, inside)
            _store(e, a, output, e.offset(sums, inside, 64), panel, first, tokens)


def _stage_of(e: Emitter, stage: Any, quad: Any) -> Any:
    """Where four rows of a piece begin."""
    return e.offset(stage, quad, 64 * _ROWS * _PIECE)


def _tiles(e: Emitter, a: Arguments, tokens: int) -> Any:
    return e.divide(e.add(a["tokens"], tokens - 1), tokens)


def _put_sums(
    e: Emitter, sums: Any, quad: Any, totals: list[list[Any]], added: bool = False
) -> None:
    """Sums of four rows over their columns, for each token, to their place among sixteen; or added
    to what is there."""
    for m, own in enumerate(totals):
        summed = lanes.rows(e, own, e.builder.fadd)
        place = e.add(sums, e.add(e.multiply(quad, 4 * _ROWS), 64 * m))
        if added:
            summed = e.builder.fadd(summed, lanes.load_quad(e, place))
        lanes.store_quad(e, place, summed)


def _store(
    e: Emitter, a: Arguments, output: Output, sums: Any, panel: Any, first: Any, tokens: int
) -> None:
    for m in range(tokens):
        token = e.add(first, m)
        with e.when(e.less(token, a["tokens"])):
            output.store(token, panel, e.load(e.add(sums, 64 * m), FLOATS))


def _tokens_of_x(e: Emitter, a: Arguments, first: Any, tokens: int) -> list[Any]:
    """Where the prepared x of each token of a tile begins."""
    length = e.multiply(a["groups"], a["group"])
    last = e.subtract(a["tokens"], 1)
    # A tile over the end computes the last token again, which is harmless.
    places = [e.smaller_of(e.add(first, m), last) for m in range(tokens)]
    return [e.add(a["codes"], e.multiply(e.multiply(place, length), 4)) for place in places]


def _multiply(e: Emitter, a: Arguments, rows: _Rows, first: Any, tokens: int) -> list[list[Any]]:
    """For each token the sums of four rows, apart by column modulo sixteen."""
    x = _tokens_of_x(e, a, first, tokens)
    totals = _zeros(e, tokens)
    # One book after the other, each over the whole row: entries of a large one drive those of a
    # small one from the first-level cache.
    for book in rows.books:
        with e.loop(a["groups"]) as group:
            parts = _zeros(e, tokens)
            with rows.steps(group) as step:
                values = [e.load(e.offset(start, step, 4 * LANES), FLOATS) for start in x]
                for r in range(_ROWS):
                    decoded = book.numbers(r, step)
                    for m in range(tokens):
                        parts[m][r].value = e.fma(decoded, values[m], parts[m][r].value)
            for r in range(_ROWS):
                scale = rows.scale(r, group)
                for m in range(tokens):
                    totals[m][r].value = e.fma(parts[m][r].value, scale, totals[m][r].value)
    return [[total.value for total in own] for own in totals]


def _decode(e: Emitter, a: Arguments, rows: _Rows, stage: Any, first: Any, count: Any) -> None:
    """`count` sixteens of columns of four rows, from number `first`, as fp32 in memory."""
    each = e.divide(a["group"], LANES)
    with e.loop(count) as i:
        step = e.add(first, i)
        group = e.divide(step, each)
        for r in range(_ROWS):
            value = e.builder.fmul(rows.numbers(r, step), rows.scale(r, group))
            e.store(e.add(e.offset(stage, i, 64 * _ROWS), 64 * r), value)


def _multiply_staged(e: Emitter, stage: Any, x: list[Any], count: Any) -> list[list[Any]]:
    """As `_multiply`, of `count` sixteens of decoded columns; x: where each token's begin."""
    totals = _zeros(e, len(x))
    with e.loop(count) as i:
        place = e.offset(stage, i, 64 * _ROWS)
        decoded = [e.load(e.add(place, 64 * r), FLOATS) for r in range(_ROWS)]
        for m, own in enumerate(x):
            value = e.load(e.offset(own, i, 64), FLOATS)
            for r in range(_ROWS):
                totals[m][r].value = e.fma(decoded[r], value, totals[m][r].value)
    return [[total.value for total in own] for own in totals]


def _zeros(e: Emitter, tokens: int) -> list[list[Any]]:
    return [[e.variable(e.floats(0.0)) for _ in range(_ROWS)] for _ in range(tokens)]


class _Rows:
    """Reads four rows of a view: scales, and the sum of the entries of its books."""

    def __init__(self, e: Emitter, a: Arguments, shape: tuple[int, ...]) -> None:
        self.e, self.a = e, a
        self._length = e.multiply(a["groups"], a["group"])
        self.books = [_Book(e, a["records"], a["table"], *shape[:2])]
        if shape[2]:
            residual = (a["residual_records"], a["residual_table"])
            self.books.append(_Book(e, *residual, *shape[2:]))
        self._scales: Any = None

    def start(self, row: Any) -> None:
        """Go to the four rows from `row`."""
        for book in self.books:
            book.start(row, self._length)
        self._scales = self._scales_of(row)

    def prefetch(self, row: Any) -> None:
        """Ask for the indices and scales of four rows, which need not be there: those of one are a
        few lines, too few for the machine to see where they go on."""
        e = self.e
        found = [book.row(row, self._length) for book in self.books]
        found += [(self._scales_of(row), e.multiply(self.a["groups"], 4))]
        for start, stride in found:
            size = e.multiply(stride, _ROWS)
            with e.loop(e.divide(e.add(size, _LINE - 1), _LINE)) as line:
                e.prefetch(e.offset(start, line, _LINE))

    def _scales_of(self, row: Any) -> Any:
        return self.e.offset(self.a["outer"], self.e.multiply(row, self.a["groups"]), 4)

    @contextlib.contextmanager
    def steps(self, group: Any) -> Iterator[Any]:
        """A loop over the sixteens of columns of a group; yields their number in the row."""
        e, each = self.e, self.e.divide(self.a["group"], LANES)
        before = e.multiply(group, each)
        with e.loop(each) as i:
            yield e.add(before, i)

    def scale(self, r: int, group: Any) -> Any:
        e = self.e
        own = e.add(self._scales, e.multiply(self.a["groups"], 4 * r))
        return e.broadcast(e.add(own, e.multiply(group, 4)), F32)

    def numbers(self, r: int, step: Any) -> Any:
        """Columns 16 * step .. 16 * step + 15 of row r, fp32, before the scale."""
        total = self.books[0].numbers(r, step)
        for book in self.books[1:]:
            total = self.e.builder.fadd(total, book.numbers(r, step))
        return total


class _Book:
    """Reads one book's entries by the indices of four rows."""

    def __init__(self, e: Emitter, indices: Any, table: Any, vector: int, size: int) -> None:
        self.e, self.vector, self.size = e, vector, size
        self._indices, self._table = indices, table
        self._rows: list[Any] = []

    def start(self, row: Any, length: Any) -> None:
        """Go to four rows; length: columns of a row."""
        e = self.e
        first, stride = self.row(row, length)
        self._rows = [e.add(first, e.multiply(stride, r)) for r in range(_ROWS)]

    def row(self, row: Any, length: Any) -> tuple[Any, Any]:
        """Where the indices of a row begin, and their bytes."""
        e = self.e
        stride = e.multiply(e.divide(length, self.vector), self.size)
        return e.add(self._indices, e.multiply(row, stride)), stride

    def numbers(self, r: int, step: Any) -> Any:
        """Columns 16 * step .. 16 * step + 15 of row r, fp32."""
        e = self.e
        count = LANES // self.vector
        place = e.offset(self._rows[r], step, count * self.size)
        if count * self.size == 8:
            # So many loads bound the loop: the indices come in one word and are taken apart.
            word = e.load(place, I64)
            indices = [self._field(word, i) for i in range(count)]
        else:
            item = I8 if self.size == 1 else I16
            indices = [e.load(e.add(place, self.size * i), item) for i in range(count)]
        entries = [self._entry(index) for index in indices]
        while len(entries) > 1:
            entries = [
                e.shuffle(a, b, list(range(2 * a.type.count)))
                for a, b in zip(entries[::2], entries[1::2], strict=True)
            ]
        if e.native_half:
            return e.builder.fpext(e.builder.bitcast(entries[0], HALVES), FLOATS)
        return half.widen(e, e.builder.zext(entries[0], INTS))

    def _field(self, word: Any, i: int) -> Any:
        bits = 8 * self.size
        shifted = self.e.builder.lshr(word, ir.Constant(I64, bits * i))
        return self.e.builder.trunc(shifted, ir.IntType(bits))

    def _entry(self, index: Any) -> Any:
        """The bits of the v numbers of one entry."""
        e = self.e
        place = e.offset(self._table, e.builder.zext(index, I64), 2 * self.vector)
        return e.load(place, ir.VectorType(I16, self.vector))
