"""The attend loop of the CPU: tiles of rows over pages, one kernel for a few rows and for many.

For each page, 4 rows at a time: scores, softmax relative to the page, weights times values (online
softmax). A page that no row reads is skipped, and so are 16 tokens side by side that a list leaves
out; a page whose codes are not multiplied as integers is
turned into floats once per tile of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lath.formats.pages import SUBPAGES
from lath.kernels.attention.cpu_arguments import (
    INDEX,
    PART_FIELDS,
    PARTS,
    ROWS,
    Arguments,
    Context,
    Kind,
)
from lath.kernels.attention.cpu_ask import ask_for_mean
from lath.kernels.attention.cpu_pages import PageList
from lath.kernels.attention.cpu_rows import (
    RowTile,
    Unit,
    blocks_of,
    clear_states,
    finish_rows,
    piece,
    position_of,
    prepare_rows,
)
from lath.kernels.attention.cpu_scores import corrections_of, float_scores, integer_scores
from lath.kernels.attention.cpu_softmax import apply_options, exclude_tokens, reach_of, softmax
from lath.kernels.attention.cpu_tile import (
    VECTOR,
    KeyTile,
    stage_page_keys,
    stage_page_values,
    stage_part_keys,
    stage_tokens,
    subpage_is_read,
)
from lath.kernels.attention.cpu_values import channel_values, integer_values, token_values
from lath.kernels.simd.emitter import I32, I64, Emitter


def emit_attend(
    e: Emitter, thread: Any, threads: Any, arguments: Any,
    key: str, value: str, precision: str, query: str, dtype: int, brain: bool, few: bool,
    masked: bool,
) -> None:  # fmt: skip
    """The units thread, thread + threads, … of all. Options: the fields of `Kind`."""
    a = Arguments(e, arguments)
    c = Context(e, a, Kind(key, value, precision, query, dtype, brain, few, masked))
    with e.loop(_share(e, a["units"], thread, threads)) as i:
        unit = Unit(c, thread, e.add(thread, e.multiply(i, threads)))
        with e.when(e.less(e.integer(0), unit.count)):
            with e.loop(unit.heads) as h:
                tile = unit.tile_of(h)
                clear_states(c, tile)
                prepare_rows(c, tile)
                _attend_parts(c, unit, tile)
            _attend_pages(c, unit)
        with (
            e.when(c.b.icmp_signed("==", a["splits"], e.integer(1))),
            e.loop(unit.heads) as h,
        ):
            finish_rows(c, unit.tile_of(h), _rows_to_write(c, unit))


def emit_merge(e: Emitter, thread: Any, threads: Any, arguments: Any, dtype: int) -> None:
    """o and lse from the states of all splits, for the tiles thread, thread + threads, …"""
    a = Arguments(e, arguments)
    c = Context(e, a, Kind("int8", "int8", "int8", "int8", dtype, False, False))
    with e.loop(_share(e, e.divide(a["units"], a["splits"]), thread, threads)) as i:
        first = e.multiply(e.add(thread, e.multiply(i, threads)), a["splits"])
        unit = Unit(c, thread, first)
        with e.loop(unit.heads) as h:
            finish_rows(c, unit.tile_of(h), _rows_to_write(c, unit))


def _share(e: Emitter, units: Any, thread: Any, threads: Any) -> Any:
    """How many of `units` are this thread's."""
    return e.divide(e.add(e.subtract(units, thread), e.subtract(threads, 1)), threads)


def _rows_to_write(c: Context, unit: Unit) -> Any:
    e, a = c.e, c.a
    limit = e.multiply(a["row_limit"], a["group"])
    rows = c.b.select(e.less(unit.rows, limit), limit, unit.rows)
    return e.clip(e.subtract(rows, unit.first), a["tile_rows"])


def _attend_pages(c: Context, unit: Unit) -> None:
    """The pages of one split, a run of the list: each for all heads of the unit."""
    e = c.e
    pages = PageList(c, unit)
    begin, end = pages.run()
    with e.loop(e.subtract(end, begin)) as i:
        entry = pages.entry(e.add(begin, i), end)
        with e.when(entry.read), e.loop(unit.heads) as h:
            tile = unit.tile_of(h)
            keys = pages.tile(entry, tile, h)
            _attend_tile(c, tile, keys, functools.partial(_stage_page, c, unit, tile, keys))


def _stage_page(c: Context, unit: Unit, tile: RowTile, keys: KeyTile) -> None:
    _count(c, unit, keys)
    if not c.kind.integer_scores:
        stage_page_keys(c, tile, keys)
    if not c.kind.integer_values:
        stage_page_values(c, tile, keys)


def _count(c: Context, unit: Unit, keys: KeyTile) -> None:
    """One more page that the thread has read for a head, and its sub-pages, where that is asked
    for."""
    e, b, counts = c.e, c.b, c.a["traffic"]
    with e.when(b.icmp_signed("!=", counts, e.integer(0))):
        subpages: Any = e.integer(SUBPAGES)
        if keys.tokens is not None:
            read = [subpage_is_read(c, keys.tokens, subpage) for subpage in range(SUBPAGES)]
            subpages = functools.reduce(b.add, (b.zext(one, I64) for one in read))
        own = e.offset(counts, unit.thread, VECTOR)
        for place, more in ((own, e.integer(1)), (e.add(own, 8), subpages)):
            e.store(place, b.add(e.load(place, I64), more))


def _attend_parts(c: Context, unit: Unit, tile: RowTile) -> None:
    """The float parts of the cache: the first by the first split, the last by the last."""
    e, a, b = c.e, c.a, c.b
    with e.loop(e.integer(len(PARTS))) as number:

        def field(name: str) -> Any:
            return a.at(e.add(e.multiply(number, len(PART_FIELDS)), INDEX[f"{PARTS[0]}_{name}"]))

        is_last = b.icmp_signed("==", number, e.integer(1))
        own = b.select(is_last, e.subtract(a["splits"], 1), e.integer(0))
        present = b.icmp_signed("!=", field("keys"), e.integer(0))
        with e.when(b.and_(present, b.icmp_signed("==", unit.split, own))):
            address = e.offset(field("lengths"), tile.sequence, 4)
            count = b.sext(e.load(address, I32), I64)
            end = e.subtract(a.integer("lengths", tile.sequence), count)
            start = b.select(is_last, end, e.integer(0))

            def source(side: str) -> Any:
                batch = e.multiply(tile.sequence, field(f"{side}_batch"))
                head = e.multiply(tile.kv_head, field(f"{side}_head"))
                return e.add(e.add(field(f"{side}s"), batch), head)

            def stage() -> None:
                values = source("value"), field("value_row")
                stage_part_keys(c, tile, source("key"), field("key_row"), count, values)
                stage_tokens(c, *values, count, a["value_dim"], piece(c, tile, "value_rows"))

            _attend_tile(c, tile, KeyTile(page=False, start=start, count=count), stage)


def _attend_tile(c: Context, tile: RowTile, keys: KeyTile, stage: Callable[[], None]) -> None:
    """All rows of the tile over the keys of one page or part."""
    e = c.e
    if c.kind.few:
        _attend_block(c, tile, keys, e.integer(0), stage)
        return
    last_row = e.subtract(e.add(tile.first, tile.count), 1)
    reach = reach_of(c, keys, position_of(c, tile, tile.first), position_of(c, tile, last_row))
    with e.when(e.less(e.integer(0), reach.limit)):
        stage()
        with e.loop(blocks_of(c, tile)) as block:
            _attend_block(c, tile, keys, block, None)


def _attend_block(
    c: Context, tile: RowTile, keys: KeyTile, block: Any, stage: Callable[[], None] | None
) -> None:
    """4 rows over the keys of one page or part. stage: what to fetch first if any row reads it."""
    e, a = c.e, c.a
    first = e.add(tile.first, e.multiply(block, ROWS))
    low, high = position_of(c, tile, first), position_of(c, tile, e.add(first, ROWS - 1))
    reach = reach_of(c, keys, low, high)
    with e.when(e.less(e.integer(0), reach.limit)):
        if stage is not None:
            stage()
        _scores(c, tile, keys, block, reach.limit)
        special = c.b.icmp_signed("!=", a["special"], e.integer(0))
        with e.when(c.b.or_(reach.crossed, special)):
            apply_options(c, tile, keys, block)
        if keys.missing is not None:
            with e.when(c.b.icmp_signed("!=", keys.missing, e.integer(0))):
                exclude_tokens(c, tile, keys)
        weights = softmax(c, tile, keys, block)
        _values(c, tile, keys, block, weights, reach.limit)


def _scores(c: Context, tile: RowTile, keys: KeyTile, block: Any, limit: Any) -> None:
    if not keys.page or c.kind.key == "float":
        float_scores(c, tile, keys, block, limit, None)
        return
    corrections = corrections_of(c, tile, keys, block)
    scores = integer_scores if c.kind.integer_scores else float_scores
    scores(c, tile, keys, block, limit, corrections)
    if c.kind.few:
        ask_for_mean(c, keys)


def _values(c: Context, tile: RowTile, keys: KeyTile, block: Any, weights: Any, limit: Any) -> None:
    if not keys.page or c.kind.value == "float":
        token_values(c, tile, keys, block, weights, limit)
    elif c.kind.integer_values:
        integer_values(c, tile, keys, block, weights)
    else:
        channel_values(c, tile, keys, block, weights)
