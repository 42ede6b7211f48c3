"""The attend loop of the CPU: tiles of rows over pages, one kernel for a few rows and for many.

A unit is a tile of rows of one KV head of one sequence and one piece of its pages. For each page, 4
rows at a time: scores, softmax relative to the page, weights times values (online softmax). A page
that no row reads is skipped; one whose codes are not multiplied as integers is turned into floats
once per tile of rows.
"""

from __future__ import annotations

from typing import Any

from lath.kernels.attention.cpu_arguments import ROWS, Arguments, Context, Kind
from lath.kernels.attention.cpu_rows import (
    RowTile,
    blocks_of,
    clear_states,
    finish_rows,
    piece,
    position_of,
    prepare_rows,
    row_tile,
)
from lath.kernels.attention.cpu_scores import corrections_of, float_scores, integer_scores
from lath.kernels.attention.cpu_softmax import apply_options, reach_of, softmax
from lath.kernels.attention.cpu_tile import (
    KeyTile,
    stage_page_keys,
    stage_page_values,
    stage_part_keys,
    stage_tokens,
)
from lath.kernels.attention.cpu_values import channel_values, integer_values, token_values
from lath.kernels.simd.emitter import I32, I64, Emitter

# Pages between the one that is read and the one that is asked for.
AHEAD = 2


def emit_attend(
    e: Emitter, thread: Any, threads: Any, arguments: Any,
    key: str, value: str, precision: str, query: str, dtype: int, brain: bool, prefetch: bool,
) -> None:  # fmt: skip
    """The units thread, thread + threads, … of all. Options: the fields of `Kind`."""
    a = Arguments(e, arguments)
    c = Context(e, a, Kind(key, value, precision, query, dtype, brain, prefetch))
    with e.loop(e.divide(e.add(e.subtract(a["units"], thread), e.subtract(threads, 1)), threads)) as i:
        unit = e.add(thread, e.multiply(i, threads))
        split = e.remainder(unit, a["splits"])
        tile = row_tile(c, thread, unit, split)
        clear_states(c, tile)
        with e.when(e.less(e.integer(0), tile.count)):
            prepare_rows(c, tile)
            with e.when(c.b.icmp_signed("==", split, e.integer(0))):
                _attend_part(c, tile, "first")
            _attend_pages(c, tile, split)
            with e.when(c.b.icmp_signed("==", split, e.subtract(a["splits"], 1))):
                _attend_part(c, tile, "last")
        with e.when(c.b.icmp_signed("==", a["splits"], e.integer(1))):
            finish_rows(c, tile, _rows_to_write(c, tile))


def emit_merge(
    e: Emitter, thread: Any, threads: Any, arguments: Any, dtype: int
) -> None:
    """o and lse from the states of all splits, for the tiles thread, thread + threads, …"""
    a = Arguments(e, arguments)
    c = Context(e, a, Kind("int8", "int8", "int8", "int8", dtype, False, False))
    tiles = e.divide(a["units"], a["splits"])
    with e.loop(e.divide(e.add(e.subtract(tiles, thread), e.subtract(threads, 1)), threads)) as i:
        unit = e.multiply(e.add(thread, e.multiply(i, threads)), a["splits"])
        tile = row_tile(c, thread, unit, e.integer(0))
        finish_rows(c, tile, _rows_to_write(c, tile))


def _rows_to_write(c: Context, tile: RowTile) -> Any:
    e, a = c.e, c.a
    limit = e.multiply(a["row_limit"], a["group"])
    rows = c.b.select(e.less(tile.rows, limit), limit, tile.rows)
    return e.clip(e.subtract(rows, tile.first), a["tile_rows"])


def _attend_pages(c: Context, tile: RowTile, split: Any) -> None:
    """The pages of one split: a run of the list, as even as it goes."""
    e, a = c.e, c.a
    pages = a.integer("page_counts", tile.sequence)
    begin = e.divide(e.multiply(pages, split), a["splits"])
    end = e.divide(e.multiply(pages, e.add(split, 1)), a["splits"])
    row = e.multiply(tile.sequence, a["table_row"])
    head = e.multiply(tile.kv_head, a["record_head"])

    def entry(name: str, i: Any) -> Any:
        return e.builder.sext(e.load(e.offset(e.add(a[name], row), i, 4), I32), I64)

    def record(i: Any) -> Any:
        page = entry("table", i)
        return e.add(e.add(a["records"], e.multiply(page, a["record_page"])), head)

    with e.loop(e.subtract(end, begin)) as i:
        number = e.add(begin, i)
        page = entry("table", number)
        mean = e.add(a["index"], e.multiply(page, a["index_page"]))
        following = e.smaller_of(e.add(number, AHEAD), e.subtract(end, 1))
        keys = KeyTile(
            page=True,
            start=entry("starts", number),
            count=entry("counts", number),
            record=record(number),
            mean=e.add(mean, e.multiply(tile.kv_head, a["index_head"])),
            upcoming=record(following),
        )

        def stage(keys: KeyTile = keys) -> None:
            if not c.kind.integer_scores:
                stage_page_keys(c, tile, keys)
            if not c.kind.integer_values:
                stage_page_values(c, tile, keys)

        _attend_tile(c, tile, keys, stage)


def _attend_part(c: Context, tile: RowTile, name: str) -> None:
    """A float part of the cache: "first" or "last"."""
    e, a, b = c.e, c.a, c.b
    with e.when(b.icmp_signed("!=", a[f"{name}_keys"], e.integer(0))):
        count = a.integer(f"{name}_lengths", tile.sequence)
        start = e.integer(0)
        if name == "last":
            start = e.subtract(a.integer("lengths", tile.sequence), count)

        def source(side: str) -> Any:
            address = e.add(a[f"{name}_{side}s"], e.multiply(tile.sequence, a[f"{name}_{side}_batch"]))
            return e.add(address, e.multiply(tile.kv_head, a[f"{name}_{side}_head"]))

        def stage() -> None:
            stage_part_keys(c, tile, source("key"), a[f"{name}_key_row"], count)
            stage_tokens(
                c, source("value"), a[f"{name}_value_row"], count, a["value_dim"],
                piece(c, tile, "value_rows"),
            )  # fmt: skip

        _attend_tile(c, tile, KeyTile(page=False, start=start, count=count), stage)


def _attend_tile(c: Context, tile: RowTile, keys: KeyTile, stage: Any) -> None:
    """All rows of the tile over the keys of one page or part."""
    e, a = c.e, c.a
    last_row = e.subtract(e.add(tile.first, tile.count), 1)
    reach = reach_of(c, keys, position_of(c, tile, tile.first), position_of(c, tile, last_row))
    with e.when(e.less(e.integer(0), reach.limit)):
        stage()
        with e.loop(blocks_of(c, tile)) as block:
            first = e.add(tile.first, e.multiply(block, ROWS))
            low = position_of(c, tile, first)
            high = position_of(c, tile, e.add(first, ROWS - 1))
            own = reach_of(c, keys, low, high)
            with e.when(e.less(e.integer(0), own.limit)):
                _scores(c, tile, keys, block, own.limit)
                special = c.b.icmp_signed("!=", a["special"], e.integer(0))
                with e.when(c.b.or_(own.crossed, special)):
                    apply_options(c, tile, keys, block)
                weights = softmax(c, tile, keys, block)
                _values(c, tile, keys, block, weights, own.limit)


def _scores(c: Context, tile: RowTile, keys: KeyTile, block: Any, limit: Any) -> None:
    if not keys.page or c.kind.key == "float":
        float_scores(c, tile, keys, block, limit, None)
        return
    corrections = corrections_of(c, tile, keys, block)
    scores = integer_scores if c.kind.integer_scores else float_scores
    scores(c, tile, keys, block, limit, corrections)


def _values(
    c: Context, tile: RowTile, keys: KeyTile, block: Any, weights: Any, limit: Any
) -> None:
    if not keys.page or c.kind.value == "float":
        token_values(c, tile, block, weights, limit)
    elif c.kind.integer_values:
        integer_values(c, tile, keys, block, weights)
    else:
        channel_values(c, tile, keys, block, weights)
