"""Page lists as the CPU kernels walk over them: an entry, and what is asked for before its turn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lath.formats.pages import PAGE
from lath.kernels.attention.cpu_arguments import LIST_FIELDS, Context
from lath.kernels.attention.cpu_ask import asked_of
from lath.kernels.attention.cpu_rows import RowTile, Unit
from lath.kernels.attention.cpu_tile import VECTOR, KeyTile
from lath.kernels.simd.emitter import I32, I64

# Records between the one that is read and the one that is asked for.
AHEAD = 2


@dataclass(frozen=True)
class Entry:
    """An entry of a list; all fields are values in the kernel.

    read: whether any token is. Where lists have masks, as bits: tokens: those that are read;
    missing: the others that count; coming: those of the following entry.
    """

    page: Any
    following: Any
    start: Any
    count: Any
    read: Any
    tokens: Any = None
    missing: Any = None
    coming: Any = None


class PageList:
    """The list of a unit's heads: one of all heads, or that of the unit's only head."""

    def __init__(self, c: Context, unit: Unit) -> None:
        self.c, self._unit = c, unit
        e, a = c.e, c.a
        self._address = {}
        for name in LIST_FIELDS:
            sequence = e.multiply(unit.sequence, a[f"{name}_sequence"])
            head = e.multiply(unit.first_head, a[f"{name}_head"])
            self._address[name] = e.add(a[name], e.add(sequence, head))

    def _integer(self, name: str, i: Any) -> Any:
        e = self.c.e
        return e.builder.sext(e.load(e.offset(self._address[name], i, 4), I32), I64)

    def run(self) -> tuple[Any, Any]:
        """The entries of the unit's split: the first, and the one behind the last."""
        e, a, split = self.c.e, self.c.a, self._unit.split
        number = self._integer("page_counts", e.integer(0))
        begin = e.divide(e.multiply(number, split), a["splits"])
        return begin, e.divide(e.multiply(number, e.add(split, 1)), a["splits"])

    def entry(self, at: Any, end: Any) -> Entry:
        """Entry `at` of a run that ends before `end`."""
        e, b = self.c.e, self.c.b
        following = e.smaller_of(e.add(at, 1), e.subtract(end, 1))
        count = self._integer("counts", at)
        entry = Entry(
            self._integer("table", at), self._integer("table", following),
            self._integer("starts", at), count, self.c.true,
        )  # fmt: skip
        if not self.c.kind.masked:
            return entry
        counted = b.lshr(e.integer(-1), e.subtract(e.integer(PAGE), count))
        tokens, coming = (
            e.load(e.offset(self._address["tokens"], i, 8), I64) for i in (at, following)
        )
        tokens = b.and_(counted, tokens)
        return replace(
            entry, read=b.icmp_signed("!=", tokens, e.integer(0)), tokens=tokens,
            missing=b.xor(counted, tokens), coming=coming,
        )  # fmt: skip

    def tile(self, entry: Entry, tile: RowTile, h: Any) -> KeyTile:
        """The page of an entry for head number h of the unit; asks for what comes next."""
        e = self.c.e
        upcoming, following = (self._coming(entry, h, ahead) for ahead in (AHEAD, 1))
        keys = KeyTile(
            page=True,
            start=entry.start,
            count=entry.count,
            tokens=entry.tokens,
            missing=entry.missing,
            record=self._place("records", "record", entry.page, tile.kv_head),
            mean=self._place("index", "index", entry.page, tile.kv_head),
            upcoming=self._place("records", "record", *upcoming),
            following=self._place("records", "record", *following),
            next_mean=self._place("index", "index", *following),
        )
        if self.c.kind.few:
            self._ask_for_sides(keys, self._place("index", "index", *upcoming))
            if self.c.kind.masked:
                inside = e.less(e.add(h, AHEAD), self._unit.heads)
                coming = self.c.b.select(inside, entry.tokens, entry.coming)
                keys = replace(keys, asked=asked_of(self.c, keys, coming))
        return keys

    def _coming(self, entry: Entry, h: Any, ahead: int) -> tuple[Any, Any]:
        """Page and KV head of the record `ahead` of one: they go by head, then by page."""
        e, b, unit = self.c.e, self.c.b, self._unit
        head = e.add(h, ahead)
        inside = e.less(head, unit.heads)
        wrapped = e.smaller_of(e.subtract(head, unit.heads), e.subtract(unit.heads, 1))
        page = b.select(inside, entry.page, entry.following)
        head = e.add(unit.first_head, b.select(inside, head, wrapped))
        return page, e.divide(head, self.c.a["repeat"])

    def _place(self, base: str, prefix: str, page: Any, head: Any) -> Any:
        """The address of a page's record or index row of a KV head."""
        e, a = self.c.e, self.c.a
        address = e.add(a[base], e.multiply(page, a[f"{prefix}_page"]))
        return e.add(address, e.multiply(head, a[f"{prefix}_head"]))

    def _ask_for_sides(self, keys: KeyTile, mean: Any) -> None:
        """Scales and mean of a page that will be read soon: it would wait for each line of them."""
        e, a = self.c.e, self.c.a
        first, end = a["value_scales"], a["record_end"]
        for address, nbytes in (
            (e.add(keys.upcoming, first), e.subtract(end, first)),
            (mean, e.multiply(a["stored_keys"], 2)),
        ):
            with e.loop(e.divide(e.add(nbytes, VECTOR - 1), VECTOR)) as i:
                e.prefetch(e.offset(address, i, VECTOR))
