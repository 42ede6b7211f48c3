"""The attend loop: one for prefill and decode, every codec of a page and every option.

A program has BLOCK_M rows: the queries of PACK heads that share a KV head, the heads of one query
side by side. It takes one piece of the list of pages, each page a tile of 64 keys, and then the
float parts of the sequence, if they are its piece's. Pages that no row can read are not visited;
full ones that every row reads whole go first, through a loop without masks (CLEAN).

Constexpr tuples:
    KEYS, VALUES   layouts of `triton_tiles`
    PAGES          elements of a record seen through the pointer of keys, of values and of fp32;
                   where fp32 scales of values, keys and tokens begin; head dims of keys, of values
    MATH           (query, precision, unified): "int8", "e4m3", "e4m3-fp16" or "float" queries
    OPTIONS        of `triton_scores`
"""

from __future__ import annotations

import triton
import triton.language as tl

from lath.kernels.attention.triton_scores import (
    adjust,
    clean_pages,
    readable,
    readable_pages,
    soft,
)
from lath.kernels.attention.triton_softmax import (
    add_tile,
    fresh_state,
    renormalised,
    with_sink,
)
from lath.kernels.attention.triton_tiles import float_keys, float_values, load_planes, operand

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Sums of weights relative to a bound: outside these the bound was too far off to have kept them.
_SMALLEST_SUM, _LARGEST_SUM = tl.constexpr(2.0**-100), tl.constexpr(2.0**100)
_EVERYWHERE = tl.constexpr(1 << 30)


@triton.jit
def _append(values, value):
    return values + (value,)  # noqa: RUF005 (Triton has no starred expressions)


@triton.jit
def _products(query, keys, KEYS: tl.constexpr, QUERY: tl.constexpr):
    """fp32 [BM, 64]: the rows' codes times the keys'. query: a tile [BM, block] per part."""
    if QUERY == "int8":
        total = tl.dot(query[0], operand(keys, KEYS, 0, False))
        for part in tl.static_range(1, KEYS[1]):
            total = tl.dot(query[part], operand(keys, KEYS, part, False), total)
        return total.to(tl.float32)
    else:
        total = tl.zeros((query[0].shape[0], 64), tl.float32)
        for part in tl.static_range(KEYS[1]):
            codes = operand(keys, KEYS, part, False)
            if KEYS[0] == "narrow":  # four significant bits: exact in every float
                codes = codes.to(tl.float16).to(query[0].dtype)
            total = tl.dot(query[part], codes, total, input_precision="ieee")
        return total


@triton.jit
def _add_page(
    state,
    page,
    query,
    view,
    row,
    extras,
    MODE: tl.constexpr,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    PAGES: tl.constexpr,
    MATH: tl.constexpr,
    OPTIONS: tl.constexpr,
    P_TYPE: tl.constexpr,
):
    """The state after page `page` of the sequence's list.

    query: (tiles, scale [BM], corrections, its stride, factor). view: (keys, values, numbers,
    table, starts, counts, kv_heads, kv_head); the lists already at the sequence.
    """
    record = tl.load(view[3] + page).to(tl.int64) * view[6] + view[7]
    start = tl.load(view[4] + page)
    count = 64
    if MASKED:
        count = tl.load(view[5] + page)
    numbers = view[2] + record * PAGES[2]
    PLAIN: tl.constexpr = not (
        MASKED or KEYS[0] == "float" or PAGES[5] >= 0 or OPTIONS[2] or OPTIONS[4] or OPTIONS[5]
    )
    slope, intercept = query[1], query[1]
    if KEYS[0] == "float":
        pointer = view[0] + record * PAGES[0] + KEYS[5]
        keys = float_keys(pointer, KEYS[3], PAGES[6], count, KEYS[4])
        scores = tl.dot(query[0][0], keys, input_precision="ieee") * query[4]
    else:
        keys = load_planes(view[0] + record * PAGES[0], KEYS, False)
        scores = _products(query[0], keys, KEYS, MATH[0])
        slope = query[1] * tl.load(numbers + PAGES[4])
        at = tl.cast(page, tl.int64) * query[3] + tl.arange(0, row[0].shape[0])
        intercept = tl.load(query[2] + at) * query[4]
        if PAGES[5] >= 0:
            scores *= tl.load(numbers + PAGES[5] + tl.arange(0, 64))[None, :]
        if not PLAIN:
            scores = scores * slope[:, None] + intercept[:, None]
    if not PLAIN:
        scores = adjust(scores, start, count, row, extras, OPTIONS)
    if MASKED:
        allowed = readable(start, count, row, extras, OPTIONS)
        scores = tl.where(allowed, scores, float("-inf"))
    scales = ()
    if VALUES[0] == "float":
        pointer = view[1] + record * PAGES[1] + VALUES[5]
        values = float_values(pointer, VALUES[3], PAGES[7], count, VALUES[4])
        planes = (values, values)
    else:
        planes = load_planes(view[1] + record * PAGES[1], VALUES, True)
        channel = tl.arange(0, VALUES[4])
        for part in tl.static_range(VALUES[1]):
            pointers = numbers + (PAGES[3] + part * VALUES[3]) + channel
            if VALUES[3] != VALUES[4]:
                scale = tl.load(pointers, mask=channel < VALUES[3], other=0.0)
            else:
                scale = tl.load(pointers)
            scales = _append(scales, scale)
    return add_tile(
        state, scores, slope, intercept, planes, scales, MODE, PLAIN, MASKED, VALUES, MATH[1],
        P_TYPE,
    )  # fmt: skip


@triton.jit
def _add_pages(
    state,
    span,
    query,
    view,
    row,
    extras,
    MODE: tl.constexpr,
    CLEAN: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    PAGES: tl.constexpr,
    MATH: tl.constexpr,
    OPTIONS: tl.constexpr,
    P_TYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The state after a span (first, first clean, end of clean, last) of the list of pages."""
    first, clean, dirty, last = span
    if CLEAN:
        for page in tl.range(clean, dirty, num_stages=STAGES):
            state = _add_page(
                state, page, query, view, row, extras, MODE, False, KEYS, VALUES, PAGES, MATH,
                OPTIONS, P_TYPE,
            )  # fmt: skip
    left = clean - first
    for i in tl.range(0, left + last - dirty, num_stages=STAGES):
        page = first + i + tl.where(i >= left, dirty - clean, 0)
        state = _add_page(
            state, page, query, view, row, extras, MODE, True, KEYS, VALUES, PAGES, MATH, OPTIONS,
            P_TYPE,
        )  # fmt: skip
    return state


@triton.jit
def _add_floats(
    state,
    q,
    keys,
    values,
    key_stride,
    value_stride,
    start,
    count,
    factor,
    row,
    extras,
    VALUES: tl.constexpr,
    PAGES: tl.constexpr,
    OPTIONS: tl.constexpr,
    P_TYPE: tl.constexpr,
):
    """The state after a float part: keys and values [64, D or E], positions start onwards."""
    tile = float_keys(keys, key_stride, PAGES[6], count, q.shape[1])
    scores = tl.dot(q, tile, input_precision="ieee") * factor
    scores = adjust(scores, start, count, row, extras, OPTIONS)
    allowed = readable(start, count, row, extras, OPTIONS)
    scores = tl.where(allowed, scores, float("-inf"))
    m, l, seen, sums = state
    largest = tl.max(scores, 1)
    new = tl.maximum(m, largest)
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(m - shift)
    l = l * fade + tl.sum(p, 1)
    added = ()
    # Parts of the sums are the channels of one slot of a byte of the pages' values.
    for part in tl.static_range(VALUES[1]):
        tile = float_values(
            values + part * VALUES[3], value_stride, PAGES[7] - part * VALUES[3], count, VALUES[4]
        )
        product = tl.dot(p.to(P_TYPE), tile, input_precision="ieee")
        product = tl.where((largest != float("-inf"))[:, None], product, 0.0)
        added = _append(added, sums[part] * fade[:, None] + product)
    return new, l, seen, added


@triton.jit
def _bound(bounds, stride, span, factor, extras, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr):
    """An upper bound of the scores of a span of pages, fp32 [BM]; -inf where there is none."""
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for page in tl.range(span[0], span[3]):
        at = tl.cast(page, tl.int64) * stride + tl.arange(0, BLOCK_M)
        largest = tl.maximum(largest, tl.load(bounds + at) * factor)
    if SOFTCAP:
        largest = soft(largest, extras[1])
    return largest


@triton.jit
def _span_of_pages(
    starts,
    counts,
    pages,
    piece,
    pieces,
    low,
    high,
    length,
    rows,
    window,
    BOUNDED: tl.constexpr,
    CLEAN: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """(first, first clean, end of clean, last) of this piece. low, high: positions of the first
    and the last row; rows: queries of the sequence."""
    first, last = pages * 0, pages
    if BOUNDED:
        from_key, to_key = low * 0, low * 0 + _EVERYWHERE
        if OPTIONS[0]:
            to_key = high
        if OPTIONS[1] > 0:
            from_key = low - window + 1
        if OPTIONS[1] == 2:
            to_key = tl.minimum(to_key, high + window - 1)
        first, last = readable_pages(starts, counts, pages, from_key, to_key)
    each = tl.cdiv(tl.maximum(last - first, 0), pieces)
    first = tl.minimum(first + piece * each, last)
    last = tl.minimum(first + each, last)
    clean, dirty = last, last
    if CLEAN:
        from_key, to_key = low * 0, low * 0 + _EVERYWHERE
        if OPTIONS[0]:
            to_key = low
        if OPTIONS[1] > 0:
            from_key = high - window + 1
        if OPTIONS[1] == 2:
            to_key = tl.minimum(to_key, low + window - 1)
        if OPTIONS[6]:
            to_key = tl.minimum(to_key, length - rows - 1)
        clean, dirty = clean_pages(starts, counts, pages, from_key, to_key)
        clean = tl.minimum(tl.maximum(clean, first), last)
        dirty = tl.minimum(tl.maximum(dirty, clean), last)
    return first, clean, dirty, last


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
    o,
    lse,
    at,
    row,
    offset,
    output_rows,
    VALUES: tl.constexpr,
    PAGES: tl.constexpr,
    PACKED: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Write the rows' outputs and logarithms. at: [BM], which of the [.., L] rows are a row's."""
    m, l, seen, sums = state
    empty = (l == 0) | (row[3] == 0)  # l is not compared with >: a NaN must come out
    divisor = tl.where(empty, 1.0, l)
    logarithm = tl.where(empty, float("-inf"), m + tl.log2(divisor))
    if not PARTIAL:
        logarithm *= _LN2
    at = at * output_rows + offset + row[1]
    stored = row[1] < output_rows
    if PACKED:  # what follows belongs to the next sequence
        stored = row[3]
    tl.store(lse + at, logarithm, mask=stored)
    channel = tl.arange(0, VALUES[4])[None, :]
    for part in tl.static_range(VALUES[1]):
        values = tl.where(empty[:, None], 0.0, sums[part] / divisor[:, None])
        own = part * VALUES[3] + channel
        pointers = o + at[:, None] * PAGES[7] + own
        inside = (channel < VALUES[3]) & (own < PAGES[7])
        tl.store(pointers, values.to(o.dtype.element_ty), mask=stored[:, None] & inside)


@triton.jit
def _load_query(base, query, row, KEYS: tl.constexpr, PAGES: tl.constexpr, QUERY: tl.constexpr):
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
def attend_kernel(
    q,
    codes,
    scales,
    corrections,
    bounds,
    key_pages,
    value_pages,
    numbers,
    table,
    starts,
    counts,
    page_counts,
    lengths,
    query_lengths,
    query_offsets,
    first_keys,
    first_values,
    first_lengths,
    last_keys,
    last_values,
    last_lengths,
    mask,
    bias,
    alibi,
    sink,
    tree,
    o,
    lse,
    q_stride_b,
    q_stride_h,
    q_stride_l,
    first_strides,
    last_strides,
    mask_strides,
    bias_strides,
    tree_strides,
    heads,
    kv_heads,
    table_width,
    padded_rows,
    output_rows,
    batch,
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
    """A tile of rows over one piece of the keys. Grid: tiles, heads / PACK, sequences * pieces.

    q [B, Hq, L, D] with strides; codes, scales, corrections, bounds: of `prepare_kernel`, for the
    rows from token first_token on. key_pages, value_pages, numbers: the records through pointers of
    three types. table, starts, counts: [S, table_width]. o [pieces, B, Hq, L, E], lse [pieces, B,
    Hq, L]: fp32 and in units of log 2 where PARTIAL. factor: scale * log2(e), or with a softcap
    2 scale * log2(e) / softcap and cap = softcap * log2(e). PARTS: whether there is a first and a
    last float part; FLOAT_BLOCK: channels of a row of q, padded. PACKED: B is 1.
    """
    tile = tl.program_id(0)
    if OPTIONS[0]:  # the longest first: they would otherwise be what all wait for
        tile = tl.num_programs(0) - 1 - tile
    block = tl.program_id(1)
    sequence, piece = tl.program_id(2) // pieces, tl.program_id(2) % pieces
    rows = tl.load(query_lengths + sequence)
    length = tl.load(lengths + sequence)
    pages = tl.load(page_counts + sequence)
    offset, batch_row = sequence * 0, sequence
    if PACKED:
        offset, batch_row = tl.load(query_offsets + sequence), sequence * 0

    lane = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = first_token + lane // PACK, block * PACK + lane % PACK
    row = (token + (length - rows), token, head, token < rows)
    low_token = first_token + tile * BLOCK_M // PACK
    high_token = tl.minimum(first_token + (tile * BLOCK_M + BLOCK_M - 1) // PACK, rows - 1)
    low, high = low_token + (length - rows), high_token + (length - rows)
    pages = tl.where(low_token < rows, pages, 0)

    wide = sequence.to(tl.int64)
    lists = wide * table_width
    kv_head = block * PACK // (heads // kv_heads)
    view = (
        key_pages, value_pages, numbers, table + lists, starts + lists, counts + lists, kv_heads,
        kv_head,
    )  # fmt: skip
    extras = (
        window, cap, mask + wide * mask_strides[0], mask_strides[1], mask_strides[2],
        mask_strides[3], bias + wide * bias_strides[0], bias_strides[1], bias_strides[2],
        bias_strides[3], alibi, tree + wide * tree_strides[0], tree_strides[1], length - rows,
    )  # fmt: skip
    base = q + batch_row.to(tl.int64) * q_stride_b + offset.to(tl.int64) * q_stride_l
    base = (base, q_stride_h, q_stride_l)
    prepared = wide * (heads // PACK) + block
    at = prepared * padded_rows + tile * BLOCK_M
    CHANNELS: tl.constexpr = KEYS[3] * KEYS[1]
    tiles, scale = _load_query(
        base, (codes + at * CHANNELS, scales + at), row, KEYS, PAGES, MATH[0]
    )  # fmt: skip
    pages_at = prepared * table_width * padded_rows + tile * BLOCK_M
    query = (tiles, scale * factor, corrections + pages_at, padded_rows, factor)

    span = _span_of_pages(
        starts + lists, counts + lists, pages, piece, pieces, low, high, length, rows, window,
        BOUNDED, CLEAN, OPTIONS,
    )  # fmt: skip
    nothing = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    ONLINE: tl.constexpr = "running" if MATH[1] == "float" else "tile"
    if MATH[2]:
        bound = _bound(bounds + pages_at, padded_rows, span, factor, extras, OPTIONS[2], BLOCK_M)
        state = _add_pages(
            fresh_state(bound, VALUES[1], BLOCK_M, VALUES[4]), span, query, view, row, extras,
            "fixed", CLEAN, KEYS, VALUES, PAGES, MATH, OPTIONS, P_TYPE, STAGES,
        )  # fmt: skip
        total, seen = state[1], state[2]
        lost = (seen > float("-inf")) & ((total < _SMALLEST_SUM) | (total > _LARGEST_SUM))
        if tl.max(lost.to(tl.int32), 0) != 0:
            state = _add_pages(
                fresh_state(nothing, VALUES[1], BLOCK_M, VALUES[4]), span, query, view, row, extras,
                ONLINE, CLEAN, KEYS, VALUES, PAGES, MATH, OPTIONS, P_TYPE, STAGES,
            )  # fmt: skip
        else:
            state = renormalised(state, VALUES[1])
    else:
        state = _add_pages(
            fresh_state(nothing, VALUES[1], BLOCK_M, VALUES[4]), span, query, view, row, extras,
            ONLINE, CLEAN, KEYS, VALUES, PAGES, MATH, OPTIONS, P_TYPE, STAGES,
        )  # fmt: skip

    for side in tl.static_range(2):
        if PARTS[side]:
            if side == 0:
                part_keys, part_values, strides = first_keys, first_values, first_strides
                count = tl.load(first_lengths + sequence)
                start = count * 0
                mine = piece == 0
            else:
                part_keys, part_values, strides = last_keys, last_values, last_strides
                count = tl.load(last_lengths + sequence)
                start = length - count
                mine = piece == pieces - 1
            mine = mine & (count > 0) & (low_token < rows)
            if OPTIONS[0]:
                mine = mine & (start <= high)
            if OPTIONS[1] > 0:
                mine = mine & (start + count > low - window + 1)
            if mine:
                floats = _load_rows(base, row, FLOAT_BLOCK, PAGES)
                state = _add_floats(
                    state, floats,
                    part_keys + wide * strides[0] + kv_head * strides[1],
                    part_values + wide * strides[3] + kv_head * strides[4],
                    strides[2], strides[5], start, count, factor, row, extras, VALUES, PAGES,
                    OPTIONS, P_TYPE,
                )  # fmt: skip
    if SINK:
        own = tl.load(sink + head, mask=row[3], other=0.0).to(tl.float32) * _LOG2E
        state = with_sink(state, tl.where(piece == 0, own, float("-inf")), VALUES[1])
    _store(
        state, o, lse, ((piece * batch + batch_row) * heads + head).to(tl.int64), row, offset,
        output_rows, VALUES, PAGES, PACKED, PARTIAL,
    )  # fmt: skip
