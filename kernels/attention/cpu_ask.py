"""What is asked of memory before its turn: lines of the record that comes up.

A list of whole pages asks in the order of cpu_order.py. Where lists have masks of tokens, each
sub-page that is read asks for one that will be: first for first, line for line; those of a record
that has more of them than the one before, all at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from lath.formats.pages import SUBPAGE, SUBPAGES
from lath.kernels.attention.cpu_arguments import ROWS, Context, fields_of
from lath.kernels.attention.cpu_tile import VECTOR, KeyTile, subpage_is_read
from lath.kernels.simd.emitter import I1, I32, I64


@dataclass(frozen=True)
class Asked:
    """Addresses of four distances each, int64: from a sub-page of keys, or of values, to the one
    that it asks for; 0 for none."""

    keys: Any
    values: Any


def ask(c: Context, keys: KeyTile, first: Any, i: int) -> None:
    """Ask for line first + i, in the order of cpu_order.py, of the record that comes up, and again
    of the one before it."""
    e = c.e
    offset = e.builder.sext(e.load(e.add(e.offset(c.a["asked"], first, 4), 4 * i), I32), I64)
    for record in (keys.upcoming, keys.following):
        e.prefetch(e.add(record, offset))


def ask_beside_softmax(c: Context, keys: KeyTile, row: int) -> None:
    """A row's share of the lines that are asked for neither beside keys nor beside values."""
    e, lines = c.e, c.a["asked_values"]
    share = e.divide(lines, 4 * ROWS)
    first = e.add(e.multiply(share, 3 * ROWS), e.multiply(share, row))
    with e.loop(share) as i:
        ask(c, keys, e.add(first, i), 0)


def ask_for_mean(c: Context, keys: KeyTile) -> None:
    """The mean that is read next, as near as can be: scores wait for it."""
    e = c.e
    with e.loop(e.divide(e.add(e.multiply(c.a["stored_keys"], 2), VECTOR - 1), VECTOR)) as i:
        e.prefetch(e.offset(keys.next_mean, i, VECTOR), near=True)


def ask_alike(c: Context, distances: Any, subpage: Any, place: Any) -> None:
    """Ask for the line that stands where `place` does, in the sub-page that is asked for."""
    e = c.e
    at = e.integer(subpage) if isinstance(subpage, int) else subpage
    e.prefetch(e.add(place, e.load(e.offset(distances, at, 8), I64)))


def asked_of(c: Context, keys: KeyTile, coming: Any) -> Asked:
    """What the sub-pages of `keys` ask for. coming: bits of the tokens that will be read of the
    record that comes up. Asks for those that are too many."""
    e, b = c.e, c.b
    asked = Asked(c.distances, e.add(c.distances, 8 * SUBPAGES))
    left: Any = e.integer(0)
    for subpage in range(SUBPAGES):
        bit = b.zext(subpage_is_read(c, coming, subpage), I64)
        left = b.or_(left, b.shl(bit, e.integer(subpage)))
    record = e.subtract(keys.upcoming, keys.record)
    for subpage in range(SUBPAGES):
        found = b.icmp_signed("!=", left, e.integer(0))
        found = b.and_(found, subpage_is_read(c, keys.tokens, subpage))
        moved = e.subtract(b.cttz(left, ir.Constant(I1, 0)), e.integer(subpage))
        for distances, nbytes in zip((asked.keys, asked.values), _bytes(c), strict=True):
            distance = e.add(record, e.multiply(moved, nbytes))
            distance = b.select(found, distance, e.integer(0))
            e.store(e.add(distances, 8 * subpage), distance)
        left = b.select(found, b.and_(left, e.subtract(left, 1)), left)
    with e.when(b.icmp_signed("!=", left, e.integer(0))):
        for subpage in range(SUBPAGES):
            bit = b.and_(left, e.integer(1 << subpage))
            with e.when(b.icmp_signed("!=", bit, e.integer(0))):
                _ask_for_all(c, keys, subpage)
    return asked


def _bytes(c: Context) -> tuple[Any, Any]:
    """Bytes of a sub-page in a plane of keys and of values."""
    e, a = c.e, c.a
    sides = ((a["stored_keys"], c.kind.key), (a["stored_values"], c.kind.value))
    keys, values = (e.multiply(e.divide(n, fields_of(codec)), SUBPAGE) for n, codec in sides)
    return keys, values


def _ask_for_all(c: Context, keys: KeyTile, subpage: int) -> None:
    """Every line of a sub-page of the record that comes up, of what is multiplied as integers."""
    e, kind = c.e, c.kind
    sides = (
        ("keys", kind.key, kind.integer_scores), ("values", kind.value, kind.integer_values),
    )  # fmt: skip
    for (side, codec, wanted), nbytes in zip(sides, _bytes(c), strict=True):
        for plane in (side, f"{side}_low") if codec == "int8-planes" else (side,):
            if not wanted:
                continue
            first = e.add(e.add(keys.upcoming, c.a[plane]), e.multiply(nbytes, subpage))
            with e.loop(e.divide(nbytes, VECTOR)) as i:
                e.prefetch(e.offset(first, i, VECTOR))
