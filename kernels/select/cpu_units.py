"""Units of work of the kernels that read index rows, and what is made ready for one.

A unit is some neighbouring KV heads of a sequence over some entries of its table. Row n of a head
is query head `n % group` of its group at token `n // group`. A thread's scratch:

    pages     int64 [piece + 32]   address of the index rows of an entry's page
    places    int32 [piece + 32]   the page's number
    counted   int32 [piece + 32]   tokens that count
    logs      fp32 [piece + 32]    their natural logarithm
    unused    fp32 [width]         scores of rows that no sequence has got
    dots      fp32 [2, 4, 16]      Σ q mean (or its bound) and Σ q² deviation²: rows by entries
    units     fp32 [16]            index units of a tile's entries
    weights   fp32 [2, 4, 16]      weights of a tile's entries, and (as int32) whether they count
    q         fp32 [heads, rows, stored keys], squares: of its squares
    targets   int64 [heads, rows]  address of a row of scores, or of o
    lists     int64 [heads, rows]  address of a row's z
    picked    fp32 [heads, rows, chosen]   q at the channels of labels, channels: int32, which
    states    per head and 4 rows: m fp32 [4], l fp32 [4], 32 bytes unused, o fp32 [4, values]
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lath.kernels.select.cpu_arguments import PIECES, ROWS, TILE, VECTOR, Context
from lath.kernels.simd import mathematics
from lath.kernels.simd.arguments import load_index
from lath.kernels.simd.copy import copy_row
from lath.kernels.simd.emitter import FLOATS, FP32, I32, I64, LANES

STATE_HEADER = 64
# Heads between an index row that is read and those that are asked for. A core drops what is asked
# of memory while its miss buffers are full: each line is asked for twice.
AHEAD = (1, 2)


class Scratch(NamedTuple):
    """offsets: of every piece. slot: bytes in all."""

    offsets: dict[str, int]
    slot: int


def scratch_of(
    piece: int,
    width: int,
    heads: int,
    rows: int,
    stored_keys: int,
    stored_values: int,
    chosen: int,
) -> Scratch:
    """stored_values: 0 where there are no states. chosen: 0 where there are no labels."""
    entries, row_bytes = piece + 2 * TILE, heads * rows * stored_keys * 4
    states = heads * state_bytes(rows, stored_values) if stored_values else 0
    sizes = {
        "pages": 8 * entries, "places": 4 * entries, "counted": 4 * entries, "logs": 4 * entries,
        "unused": 4 * width,
        "dots": 8 * ROWS * TILE, "units": 4 * TILE, "weights": 8 * ROWS * TILE,
        "q": row_bytes, "squares": row_bytes,
        "targets": 8 * heads * rows, "lists": 8 * heads * rows, "states": states,
        "picked": 4 * heads * rows * chosen, "channels": 4 * heads * rows * chosen,
    }  # fmt: skip
    offsets, at = {}, 0
    for name in PIECES:
        offsets[name] = at
        at += -(-sizes[name] // VECTOR) * VECTOR
    return Scratch(offsets, at)


def state_bytes(rows: int, stored_values: int) -> int:
    return rows // ROWS * (STATE_HEADER + 4 * ROWS * stored_values)


class Unit:
    """A unit by its number. Units go over pieces, chunks of heads, sequences, in this order."""

    def __init__(self, c: Context, thread: Any, unit: Any) -> None:
        e, a = c.e, c.a
        self.c = c
        whole = e.divide(unit, a["pieces"])
        piece = e.subtract(unit, e.multiply(whole, a["pieces"]))
        self.sequence = e.divide(whole, a["chunks"])
        chunk = e.subtract(whole, e.multiply(self.sequence, a["chunks"]))
        self.first_head = e.multiply(chunk, a["chunk"])
        self.heads = e.clip(e.subtract(a["kv_heads"], self.first_head), a["chunk"])
        self.begin = e.multiply(piece, a["piece"])
        number = a.integer("page_counts", self.sequence)
        self.entries = e.clip(e.subtract(number, self.begin), a["piece"])
        self.rows = e.multiply(a.integer("query_lengths", self.sequence), a["group"])
        self.blocks = e.divide(e.add(self.rows, ROWS - 1), ROWS)
        self.slot = e.add(a["scratch"], e.multiply(thread, a["slot"]))

    @property
    def empty(self) -> Any:
        """Whether there is nothing to compute."""
        e = self.c.e
        return e.builder.or_(e.less(self.entries, 1), e.less(self.rows, 1))

    def piece(self, name: str) -> Any:
        """The address of a piece of scratch."""
        return self.c.e.add(self.slot, self.c.a[f"at_{name}"])

    def row_of(self, name: str, h: Any, n: Any, nbytes: Any) -> Any:
        """The address of row n of head number h in a piece with `nbytes` for each row."""
        e = self.c.e
        number = e.add(e.multiply(h, self.c.a["tile_rows"]), n)
        return e.add(self.piece(name), e.multiply(number, nbytes))

    def head_and_token(self, h: Any, n: Any) -> tuple[Any, Any]:
        """Query head and token of row n of head number h."""
        e, group = self.c.e, self.c.a["group"]
        token = e.divide(n, group)
        within = e.subtract(n, e.multiply(token, group))
        return e.add(e.multiply(e.add(self.first_head, h), group), within), token

    def flat_row(self, head: Any, token: Any) -> Any:
        """The number of a row of the result: of [S, Hq, rows]."""
        e, a = self.c.e, self.c.a
        heads = e.multiply(a["kv_heads"], a["group"])
        whole = e.add(e.multiply(self.sequence, heads), head)
        return e.add(e.multiply(whole, a["query_rows"]), token)


def share(c: Context, thread: Any, threads: Any) -> Any:
    """How many of the units are this thread's."""
    e = c.e
    return e.divide(e.add(e.subtract(c.a["units"], thread), e.subtract(threads, 1)), threads)


def prepare_rows(c: Context, unit: Unit, squares: bool) -> None:
    """q as fp32, zeros for rows behind the last, and where it is asked for its squares."""
    e, a = c.e, c.a
    row_bytes = e.multiply(a["stored_keys"], 4)
    with e.loop(unit.heads) as h, e.loop(e.multiply(unit.blocks, ROWS)) as n:
        head, token = unit.head_and_token(h, n)
        source = e.add(a["q"], e.multiply(unit.sequence, a["q_batch"]))
        source = e.add(source, e.multiply(head, a["q_head"]))
        source = e.add(source, e.multiply(token, a["q_row"]))
        count = c.b.select(e.less(n, unit.rows), a["key_dim"], e.integer(0))
        target = unit.row_of("q", h, n, row_bytes)
        copy_row(e, c.tail, source, c.dtype, count, target, FP32, a["stored_keys"])
        if squares:
            square = unit.row_of("squares", h, n, row_bytes)
            with e.loop(e.divide(a["stored_keys"], LANES)) as i:
                value = e.load(e.offset(target, i, VECTOR), FLOATS)
                e.store(e.offset(square, i, VECTOR), c.b.fmul(value, value))


def prepare_targets(c: Context, unit: Unit, base: Any, nbytes: Any) -> None:
    """Where the result of each row goes: a row of `nbytes` at `base`, or what nobody reads."""
    e = c.e
    with e.loop(unit.heads) as h, e.loop(e.multiply(unit.blocks, ROWS)) as n:
        head, token = unit.head_and_token(h, n)
        address = e.add(base, e.multiply(unit.flat_row(head, token), nbytes))
        address = c.b.select(e.less(n, unit.rows), address, unit.piece("unused"))
        e.store(unit.row_of("targets", h, n, e.integer(8)), address)


def prepare_pages(c: Context, unit: Unit, logs: bool) -> None:
    """Addresses and counts of the entries; behind the last one two tiles more like it."""
    e, a = c.e, c.a
    table = e.add(a["table"], e.multiply(unit.sequence, a["table_sequence"]))
    counts = e.add(a["counts"], e.multiply(unit.sequence, a["counts_sequence"]))
    with e.loop(e.add(unit.entries, 2 * TILE)) as i:
        at = e.add(unit.begin, e.smaller_of(i, e.subtract(unit.entries, 1)))
        page = load_index(e, e.offset(table, at, 4))
        e.store(e.offset(unit.piece("places"), i, 4), c.b.trunc(page, I32))
        address = e.add(a["index"], e.multiply(page, a["index_page"]))
        e.store(e.offset(unit.piece("pages"), i, 8), address)
        e.store(e.offset(unit.piece("counted"), i, 4), e.load(e.offset(counts, at, 4), I32))
    if logs:
        with e.loop(tiles_of(c, unit)) as t:
            count = e.to_floats(e.load(e.offset(unit.piece("counted"), t, VECTOR)))
            log = c.b.fmul(mathematics.log2(e, count), e.floats(mathematics.LN2))
            e.store(e.offset(unit.piece("logs"), t, VECTOR), log)


def tiles_of(c: Context, unit: Unit) -> Any:
    return c.e.divide(c.e.add(unit.entries, TILE - 1), TILE)


class Tile:
    """Sixteen entries of a unit and one of its heads: where their index rows are.

    first: the number of its first entry in the unit. count: entries that there are.
    """

    def __init__(self, c: Context, unit: Unit, t: Any, h: Any) -> None:
        e, a = c.e, c.a
        self.c, self.unit, self.h = c, unit, h
        self.first = e.multiply(t, TILE)
        self.count = e.clip(e.subtract(unit.entries, self.first), e.integer(TILE))
        self.head = e.add(unit.first_head, h)
        self._pages = e.offset(unit.piece("pages"), self.first, 8)
        self._at_head = e.multiply(self.head, a["index_head"])
        self._soon = [self._later(heads) for heads in AHEAD]

    def _later(self, heads: int) -> tuple[Any, Any]:
        """Addresses of pages, and the place of a head: what is read `heads` heads from now."""
        c, e, unit = self.c, self.c.e, self.unit
        later = e.add(self.h, heads)
        inside = e.less(later, unit.heads)
        wrapped = e.smaller_of(e.subtract(later, unit.heads), e.subtract(unit.heads, 1))
        pages = c.b.select(inside, self._pages, e.add(self._pages, 8 * TILE))
        head = e.add(unit.first_head, c.b.select(inside, later, wrapped))
        return pages, e.multiply(head, c.a["index_head"])

    def row(self, entry: Any) -> Any:
        """The address of the index row of an entry."""
        e = self.c.e
        return e.add(e.load(e.offset(self._pages, entry, 8), I64), self._at_head)

    def upcoming(self, entry: Any) -> list[Any]:
        """Those of an entry that are read soon."""
        e = self.c.e
        return [e.add(e.load(e.offset(pages, entry, 8), I64), head) for pages, head in self._soon]

    def per_entry(self, name: str) -> Any:
        """The address of four bytes for each entry: "places", "counted" or "logs"."""
        return self.c.e.offset(self.unit.piece(name), self.first, 4)
