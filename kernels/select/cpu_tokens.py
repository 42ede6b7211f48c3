"""Scores of tokens as attention computes them: its own kernels' scores, page by page, kept."""

from __future__ import annotations

import functools
import struct
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lath.formats.attention import PageView, Queries
from lath.formats.pages import PAGE, PageFormat
from lath.kernels.attention.cpu_arguments import FIELDS, INDEX, ROWS, Arguments, Context, Kind
from lath.kernels.attention.cpu_block import fill_pages, fill_rows, lists_of
from lath.kernels.attention.cpu_pages import PageList
from lath.kernels.attention.cpu_rows import (
    RowTile,
    Unit,
    batch_and_row,
    blocks_of,
    piece,
    prepare_rows,
    token_and_head,
)
from lath.kernels.attention.cpu_scores import corrections_of, float_scores, integer_scores
from lath.kernels.attention.cpu_scratch import scratch_of
from lath.kernels.attention.cpu_tile import VECTOR, KeyTile, stage_page_keys
from lath.kernels.simd.emitter import F32, FLOATS, LANES, Emitter

TILE_ROWS = 64


def emit_token_scores(
    e: Emitter, thread: Any, threads: Any, arguments: Any,
    key: str, query: str, dtype: int, brain: bool,
) -> None:  # fmt: skip
    """The units thread, thread + threads, … of all; scores go where attention has its output."""
    a = Arguments(e, arguments)
    c = Context(e, a, Kind(key, "int8", "float", query, dtype, brain, few=False))
    share = e.divide(e.add(e.subtract(a["units"], thread), e.subtract(threads, 1)), threads)
    with e.loop(share) as i:
        unit = Unit(c, thread, e.add(thread, e.multiply(i, threads)))
        with e.when(e.less(e.integer(0), unit.count)):
            with e.loop(unit.heads) as h:
                prepare_rows(c, unit.tile_of(h))
            pages = PageList(c, unit)
            begin, end = pages.run()
            with e.loop(e.subtract(end, begin)) as n:
                at = e.add(begin, n)
                entry = pages.entry(at, end)
                with e.loop(unit.heads) as h:
                    tile = unit.tile_of(h)
                    keys = pages.tile(entry, tile, h)
                    if not c.kind.integer_scores:
                        stage_page_keys(c, tile, keys)
                    with e.loop(blocks_of(c, tile)) as block:
                        _score(c, tile, keys, block)
                        _store(c, tile, keys, block, at)


def _score(c: Context, tile: RowTile, keys: KeyTile, block: Any) -> None:
    if c.kind.key == "float":
        float_scores(c, tile, keys, block, keys.count, None)
        return
    corrections = corrections_of(c, tile, keys, block)
    scores = integer_scores if c.kind.integer_scores else float_scores
    scores(c, tile, keys, block, keys.count, corrections)


def _store(c: Context, tile: RowTile, keys: KeyTile, block: Any, entry: Any) -> None:
    """Scores of 4 rows of scratch → of the tokens that count, at the place of the entry."""
    e, a = c.e, c.a
    first = e.add(tile.first, e.multiply(block, ROWS))
    rows = e.clip(e.subtract(tile.rows, first), e.integer(ROWS))
    with e.loop(rows) as r:
        token, head = token_and_head(c, tile, e.add(first, r))
        batch, row = batch_and_row(c, tile, token)
        target = e.add(a["o"], e.multiply(batch, a["o_batch"]))
        target = e.add(target, e.multiply(head, a["o_head"]))
        target = e.add(target, e.multiply(row, a["o_row"]))
        target = e.add(target, e.multiply(entry, 4 * PAGE))
        source = e.add(piece(c, tile, "scores"), e.multiply(r, 4 * PAGE))
        with e.choice(e.less(keys.count, PAGE)) as (part, whole):
            with whole:
                for g in range(PAGE // LANES):
                    scores = e.load(e.add(source, VECTOR * g), FLOATS)
                    e.store(e.add(target, VECTOR * g), scores)
            with part, e.loop(keys.count) as i:
                e.store(e.offset(target, i, 4), e.load(e.offset(source, i, 4), F32))


class Division(NamedTuple):
    """How the work is divided into units (attention's). block: the fields that it settles."""

    units: int
    threads: int
    slot: int
    block: list[int]


@functools.lru_cache(maxsize=256)
def divide(
    fmt: PageFormat, sequences: int, kv_heads: int, group: int, longest: int, entries: int,
    threads: int,
) -> Division:  # fmt: skip
    """longest: rows of q. Every entry is scored for itself: threads may share a table."""
    rows = longest * group
    tile_rows = min(TILE_ROWS, -(-rows // ROWS) * ROWS)
    tiles, chunk = -(-rows // tile_rows), kv_heads if tile_rows <= ROWS else 1
    chunks = -(-kv_heads // chunk)
    units = sequences * tiles * chunks
    splits = min(-(-threads // units), entries)
    stored = fmt.padded_key_dim
    staged = -(-stored // 32) * 32
    scratch = scratch_of(tile_rows, staged, fmt.padded_value_dim)
    values = {
        "key_dim": fmt.key_dim, "stored_keys": stored, "stored_values": fmt.padded_value_dim,
        "staged_keys": staged, "record_end": fmt.record_bytes, "tile_rows": tile_rows,
        "tiles": tiles, "chunk": chunk, "chunks": chunks, "splits": splits,
        "units": units * splits, "heads": kv_heads, "group": group, "repeat": 1,
        "at_rows": scratch.shared, "row_slot": scratch.rows,
        "slot": scratch.shared + chunk * scratch.rows,
        **{name: field.offset for name, field in fmt.fields.items()},
        **{f"at_{name}": offset for name, offset in scratch.offsets.items()},
    }  # fmt: skip
    block = [values.get(name, 0) for name in FIELDS]
    threads = min(threads, units * splits)
    return Division(units * splits, threads, threads * values["slot"], block)


def fill(
    queries: Queries, pages: PageView, scores: Tensor, scale: float, division: Division
) -> tuple[array[int], Tensor]:
    """The argument block of a call, and the scratch that must live as long as it."""
    block = array("q", division.block)
    scratch = torch.empty(division.slot, dtype=torch.uint8)
    block[INDEX["scratch"]] = scratch.data_ptr()
    block[INDEX["scale"]] = int(struct.unpack("<I", struct.pack("<f", scale))[0])
    fill_rows(block, queries, scores, scores[..., 0])  # attention's other result is not written
    fill_pages(block, pages, lists_of(pages, queries.q.shape[1]))
    return block, scratch
