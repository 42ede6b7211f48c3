"""The attend kernel: a tile of rows over one piece of the keys.

Rows of a tile are the queries of PACK heads that share a KV head, the heads of one query side by
side. A program takes its piece of the list of pages, and then the float parts of the sequence, if
they are its piece's. Constexpr tuples as in `triton_pages`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lath.kernels.attention.triton_pages import (
    add_floats,
    add_pages,
    place_of_list,
    span_of_pages,
    upper_bound,
)
from lath.kernels.attention.triton_softmax import fresh_state, renormalised, with_sink

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Sums of weights relative to a bound: outside these the bound was too far off to have kept them.
_SMALLEST_SUM, _LARGEST_SUM = tl.constexpr(2.0**-100), tl.constexpr(2.0**100)


@triton.jit
def _append(values, value):
    return values + (value,)  # noqa: RUF005 (Triton has no starred expressions)


@triton.jit
def _load_rows(base, row, BLOCK: tl.constexpr, PAGES: tl.constexpr):
    """The rows of q as they are, [BM, BLOCK]. base: (q, its strides of heads and of tokens)."""
    channel = tl.arange(0, BLOCK)[None, :]
    offsets = row[2].to(tl.int64) * base[1] + row[1].to(tl.int64) * base[2]
    inside = row[3][:, None] & (channel < PAGES[6])
    return tl.load(base[0] + offsets[:, None] + channel, mask=inside, other=0.0)


@triton.jit
def _store(
    state,
    output,
    at,
    present,
    stored,
    VALUES: tl.constexpr,
    PAGES: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Write outputs and logarithms of the rows `stored`; those not `present` are 0 and -inf.

    output: (o, lse, ...). at: [BM] int64, the row of each.
    """
    top, total, _, sums = state
    empty = (total == 0) | (present == 0)  # not total > 0: a NaN must come out
    divisor = tl.where(empty, 1.0, total)
    logarithm = tl.where(empty, float("-inf"), top + tl.log2(divisor))
    if not PARTIAL:
        logarithm *= _LN2
    tl.store(output[1] + at, logarithm, mask=stored)
    channel = tl.arange(0, VALUES[4])[None, :]
    for part in tl.static_range(VALUES[1]):
        values = tl.where(empty[:, None], 0.0, sums[part] / divisor[:, None])
        own = part * VALUES[3] + channel
        pointers = output[0] + at[:, None] * PAGES[7] + own
        inside = (channel < VALUES[3]) & (own < PAGES[7])
        tl.store(pointers, values.to(output[0].dtype.element_ty), mask=stored[:, None] & inside)


@triton.jit
def load_query(base, query, row, KEYS: tl.constexpr, PAGES: tl.constexpr, QUERY: tl.constexpr):
    """Tiles [BM, block] of the rows, one per part of the keys, and their scales.

    base: (q, its strides of heads and of tokens). query: (codes, scales), at the tile.
    """
    BLOCK_M: tl.constexpr = row[0].shape[0]
    channel = tl.arange(0, KEYS[4])[None, :]
    tiles = ()
    if QUERY == "float":
        tiles = _append(tiles, _load_rows(base, row, KEYS[4], PAGES))
        return tiles, tl.zeros((BLOCK_M,), tl.float32)
    else:
        WIDTH: tl.constexpr = KEYS[3] * KEYS[1]
        rows = tl.arange(0, BLOCK_M)
        for part in tl.static_range(KEYS[1]):
            pointers = query[0] + rows[:, None] * WIDTH + part * KEYS[3] + channel
            if KEYS[3] != KEYS[4]:
                inside = (channel < KEYS[3]) & (rows[:, None] < BLOCK_M)
                if QUERY == "int8":
                    tile = tl.load(pointers, mask=inside, other=0)
                else:
                    tile = tl.load(pointers, mask=inside, other=0.0)
            else:
                tile = tl.load(pointers)
            tiles = _append(tiles, tile)
        return tiles, tl.load(query[1] + rows)


@triton.jit
def _all_pages(
    bounds,
    stride,
    span,
    query,
    view,
    row,
    extras,
    CLEAN: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    PAGES: tl.constexpr,
    MATH: tl.constexpr,
    OPTIONS: tl.constexpr,
    P_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The state after a span of pages. bounds: where MATH says unified, of `prepare_kernel`."""
    nothing = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    ONLINE: tl.constexpr = "running" if MATH[1] == "float" else "tile"
    fresh = fresh_state(nothing, VALUES[1], BLOCK_M, VALUES[4])
    if MATH[2]:
        bound = upper_bound(bounds, stride, span, query[4], extras, OPTIONS[2], BLOCK_M)
        bounded = fresh_state(bound, VALUES[1], BLOCK_M, VALUES[4])
        state = add_pages(
            bounded, span, query, view, row, extras, "fixed", CLEAN, KEYS, VALUES, PAGES, MATH,
            OPTIONS, P_TYPE, STAGES,
        )  # fmt: skip
        total, seen = state[1], state[2]
        lost = (seen > float("-inf")) & ((total < _SMALLEST_SUM) | (total > _LARGEST_SUM))
        if tl.max(lost.to(tl.int32), 0) != 0:
            state = add_pages(
                fresh, span, query, view, row, extras, ONLINE, CLEAN, KEYS, VALUES, PAGES, MATH,
                OPTIONS, P_TYPE, STAGES,
            )  # fmt: skip
        else:
            state = renormalised(state, VALUES[1])
        return state
    else:
        return add_pages(
            fresh, span, query, view, row, extras, ONLINE, CLEAN, KEYS, VALUES, PAGES, MATH,
            OPTIONS, P_TYPE, STAGES,
        )  # fmt: skip


@triton.jit
def _float_part(
    state,
    base,
    part,
    sequence,
    kv_head,
    start,
    count,
    mine,
    reach,
    factor,
    row,
    extras,
    VALUES: tl.constexpr,
    PAGES: tl.constexpr,
    MATH: tl.constexpr,
    OPTIONS: tl.constexpr,
    P_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The state after a float part, if it is this program's and some row may read it.

    part: (keys, values, lengths, strides of keys, strides of values). reach: positions of the
    first and the last row.
    """
    mine = mine & (count > 0)
    if OPTIONS[0]:
        mine = mine & (start <= reach[1])
    if OPTIONS[1] > 0:
        mine = mine & (start + count > reach[0] - extras[0] + 1)
    if mine:
        q = _load_rows(base, row, BLOCK, PAGES)
        wide = sequence.to(tl.int64)
        keys = part[0] + wide * part[3] + kv_head * part[4]
        values = part[1] + wide * part[6] + kv_head * part[7]
        state = add_floats(
            state, q, keys, values, part[5], part[8], start, count, factor, row, extras, VALUES,
            PAGES, MATH, OPTIONS, P_TYPE,
        )  # fmt: skip
    return state


@triton.jit
def attend_kernel(
    q,
    prepared,
    records,
    lists,
    lengths,
    first_part,
    last_part,
    mask,
    bias,
    alibi,
    sink,
    tree,
    output,
    heads,
    kv_heads,
    table_width,
    padded_rows,
    first_token,
    pieces,
    window,
    factor,
    cap,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    PAGES: tl.constexpr,
    MATH: tl.constexpr,
    OPTIONS: tl.constexpr,
    PARTS: tl.constexpr,
    LISTS: tl.constexpr,
    SINK: tl.constexpr,
    PACKED: tl.constexpr,
    PARTIAL: tl.constexpr,
    BOUNDED: tl.constexpr,
    CLEAN: tl.constexpr,
    P_TYPE: tl.constexpr,
    FLOAT_BLOCK: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: tiles, heads / PACK, sequences * pieces. Tuples of pointers, strides and sizes:

    q: [B, Hq, L, D] and three strides. prepared: codes, scales, corrections, bounds, of
    `prepare_kernel`, for the rows from token first_token on. records: through pointers for keys,
    values, fp32. lists: of `page_lists`, LISTS: of `list_mode`. lengths: of keys, of queries,
    offsets of queries. first_part, last_part: keys, values, lengths, strides of each; PARTS says
    whether they are there. mask, bias: [S, Hq, Lq, Lk] and four strides; tree: and two.
    output: o [pieces, B, Hq, L, E], lse [pieces, B, Hq, L], B, L; in units of log 2 where PARTIAL.
    factor: scale * log2(e), or with a softcap 2 scale * log2(e) / softcap and cap = softcap *
    log2(e). FLOAT_BLOCK: channels of a row of q, padded. PACKED: B is 1. BOUNDED: some pages may be
    out of reach of all rows.
    """
    tile, block = tl.program_id(0), tl.program_id(1)
    if OPTIONS[0]:  # the longest first: they would otherwise be what all wait for
        tile = tl.num_programs(0) - 1 - tile
    sequence, piece = tl.program_id(2) // pieces, tl.program_id(2) % pieces
    length, rows = tl.load(lengths[0] + sequence), tl.load(lengths[1] + sequence)
    offset, batch_row = sequence * 0, sequence
    if PACKED:
        offset, batch_row = tl.load(lengths[2] + sequence), sequence * 0
    lane = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = first_token + lane // PACK, block * PACK + lane % PACK
    ahead = length - rows  # position of the first query
    row = (token + ahead, token, head, token < rows)
    low = first_token + tile * BLOCK_M // PACK
    high = tl.minimum(first_token + (tile * BLOCK_M + BLOCK_M - 1) // PACK, rows - 1)
    some = low < rows
    reach = (low + ahead, high + ahead)
    wide = sequence.to(tl.int64)
    kv_head = block * PACK // (heads // kv_heads)
    entry, count_at = place_of_list(lists, wide, kv_head, block, LISTS)
    starts, counts = lists[1] + entry, lists[2] + entry
    view = (
        records[0], records[1], records[2], lists[0] + entry, starts, counts, kv_heads, kv_head,
        lists[3] + entry,
    )  # fmt: skip
    extras = (
        window, cap, mask[0] + wide * mask[1], mask[2], mask[3], mask[4],
        bias[0] + wide * bias[1], bias[2], bias[3], bias[4], alibi, tree[0] + wide * tree[1],
        tree[2], ahead,
    )  # fmt: skip
    base = q[0] + batch_row.to(tl.int64) * q[1] + offset.to(tl.int64) * q[3]
    base = (base, q[2], q[3])
    own = wide * (heads // PACK) + block
    at = own * padded_rows + tile * BLOCK_M
    codes = (prepared[0] + at * (KEYS[3] * KEYS[1]), prepared[1] + at)
    tiles, scale = load_query(base, codes, row, KEYS, PAGES, MATH[0])
    at = own * table_width * padded_rows + tile * BLOCK_M
    query = (tiles, scale * factor, prepared[2] + at, padded_rows, factor)

    pages = tl.where(some, tl.load(lists[4] + count_at), 0)
    span = span_of_pages(
        starts, counts, pages, piece, pieces, reach, length, rows, window, BOUNDED, CLEAN, OPTIONS
    )
    state = _all_pages(
        prepared[3] + at, padded_rows, span, query, view, row, extras, CLEAN, KEYS, VALUES, PAGES,
        MATH, OPTIONS, P_TYPE, BLOCK_M, STAGES,
    )  # fmt: skip
    if PARTS[0]:
        count = tl.load(first_part[2] + sequence)
        state = _float_part(
            state, base, first_part, sequence, kv_head, count * 0, count, some & (piece == 0),
            reach, factor, row, extras, VALUES, PAGES, MATH, OPTIONS, P_TYPE, FLOAT_BLOCK,
        )  # fmt: skip
    if PARTS[1]:
        count = tl.load(last_part[2] + sequence)
        state = _float_part(
            state, base, last_part, sequence, kv_head, length - count, count,
            some & (piece == pieces - 1), reach, factor, row, extras, VALUES, PAGES, MATH,
            OPTIONS, P_TYPE, FLOAT_BLOCK,
        )  # fmt: skip
    if SINK:
        score = tl.load(sink + head, mask=row[3], other=0.0).to(tl.float32) * _LOG2E
        state = with_sink(state, tl.where(piece == 0, score, float("-inf")), VALUES[1])
    at = ((piece * output[2] + batch_row) * heads + head).to(tl.int64) * output[3] + offset + token
    stored = row[3]
    if not PACKED:  # rows of no sequence are written too; what follows packed ones is another's
        stored = token < output[3]
    _store(state, output, at, row[3], stored, VALUES, PAGES, PARTIAL)
