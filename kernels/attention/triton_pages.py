"""The attend loop: one for prefill and decode, every codec of a page and every option.

A piece of a sequence's list of pages is a *span* (first, first clean, end of clean, last). Pages
that no row of the tile can read lie outside it; the clean ones, full and read whole by every row,
go first, through a loop without masks. The order of tiles does not matter to a softmax.

Constexpr tuples:
    KEYS, VALUES   layouts of `triton_tiles`
    PAGES          elements of a record seen through the pointer of keys, of values and of fp32;
                   where fp32 scales of values, keys and tokens begin; head dims of keys, of values
    MATH           (query, precision, unified, fp32): "int8", "e4m3", "e4m3-fp16" or "float"
                   queries; how Triton multiplies fp32 numbers
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
    selected,
    soft,
)
from lath.kernels.attention.triton_softmax import add_tile
from lath.kernels.attention.triton_tiles import (
    float_keys,
    float_values,
    load_planes,
    operand,
    read_subpages,
)

_EVERYWHERE = tl.constexpr(1 << 30)


@triton.jit
def _append(values, value):
    return values + (value,)  # noqa: RUF005 (Triton has no starred expressions)


@triton.jit
def score_products(query, keys, KEYS: tl.constexpr, MATH: tl.constexpr):
    """fp32 [BM, 64]: the rows' codes times the keys'. query: a tile [BM, block] per part."""
    if MATH[0] == "int8":
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
            total = tl.dot(query[part], codes, total, input_precision=MATH[3])
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
    """The state after page `page` of the list.

    query: (tiles, scale [BM], corrections, its stride, factor). view: (keys, values, numbers,
    table, starts, counts, kv_heads, kv_head, tokens); the lists already at their own.
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
    SOME: tl.constexpr = MASKED and OPTIONS[7]
    tokens, subpages = record, 15
    if SOME:
        tokens = tl.load(view[8] + page)
        subpages = read_subpages(tokens)
    slope, intercept = query[1], query[1]
    if KEYS[0] == "float":
        pointer = view[0] + record * PAGES[0] + KEYS[5]
        keys = float_keys(pointer, KEYS[3], PAGES[6], count, KEYS[4], subpages, SOME)
        scores = tl.dot(query[0][0], keys, input_precision=MATH[3]) * query[4]
    else:
        keys = load_planes(view[0] + record * PAGES[0], KEYS, False, subpages, SOME)
        scores = score_products(query[0], keys, KEYS, MATH)
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
        if SOME:
            allowed &= selected(tokens)[None, :]
        scores = tl.where(allowed, scores, float("-inf"))
    scales = ()
    if VALUES[0] == "float":
        pointer = view[1] + record * PAGES[1] + VALUES[5]
        values = float_values(pointer, VALUES[3], PAGES[7], count, VALUES[4], subpages, SOME)
        planes = (values, values)
    else:
        planes = load_planes(view[1] + record * PAGES[1], VALUES, True, subpages, SOME)
        channel = tl.arange(0, VALUES[4])
        for part in tl.static_range(VALUES[1]):
            pointers = numbers + (PAGES[3] + part * VALUES[3]) + channel
            if VALUES[3] != VALUES[4]:
                scale = tl.load(pointers, mask=channel < VALUES[3], other=0.0)
            else:
                scale = tl.load(pointers)
            scales = _append(scales, scale)
    return add_tile(
        state, scores, slope, intercept, planes, scales, MODE, PLAIN, MASKED, VALUES, MATH,
        P_TYPE,
    )  # fmt: skip


@triton.jit
def add_pages(
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
    # Pages that need a mask are few beside clean ones: tiles in flight would only take registers.
    for i in tl.range(0, left + last - dirty, num_stages=1 if CLEAN else STAGES):
        page = first + i + tl.where(i >= left, dirty - clean, 0)
        state = _add_page(
            state, page, query, view, row, extras, MODE, True, KEYS, VALUES, PAGES, MATH, OPTIONS,
            P_TYPE,
        )  # fmt: skip
    return state


@triton.jit
def add_floats(
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
    MATH: tl.constexpr,
    OPTIONS: tl.constexpr,
    P_TYPE: tl.constexpr,
):
    """The state after a float part: keys and values [64, D or E], positions start onwards."""
    tile = float_keys(keys, key_stride, PAGES[6], count, q.shape[1])
    scores = tl.dot(q, tile, input_precision=MATH[3]) * factor
    scores = adjust(scores, start, count, row, extras, OPTIONS)
    allowed = readable(start, count, row, extras, OPTIONS)
    scores = tl.where(allowed, scores, float("-inf"))
    top, total, seen, sums = state
    largest = tl.max(scores, 1)
    new = tl.maximum(top, largest)
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(p, 1)
    added = ()
    # Parts of the sums are the channels of one slot of a byte of the pages' values.
    for part in tl.static_range(VALUES[1]):
        tile = float_values(
            values + part * VALUES[3], value_stride, PAGES[7] - part * VALUES[3], count, VALUES[4]
        )
        product = tl.dot(p.to(P_TYPE), tile, input_precision=MATH[3])
        product = tl.where((largest != float("-inf"))[:, None], product, 0.0)
        added = _append(added, sums[part] * fade[:, None] + product)
    return new, total, seen, added


@triton.jit
def upper_bound(bounds, stride, span, factor, extras, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr):
    """An upper bound of the scores of a span of pages, fp32 [BM]; -inf where there is none."""
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for page in tl.range(span[0], span[3]):
        at = tl.cast(page, tl.int64) * stride + tl.arange(0, BLOCK_M)
        largest = tl.maximum(largest, tl.load(bounds + at) * factor)
    if SOFTCAP:
        largest = soft(largest, extras[1])
    return largest


@triton.jit
def place_of_list(lists, sequence, kv_head, query_head, LISTS: tl.constexpr):
    """Where the list of a program begins, and its count. lists: of `page_lists`; sequence: int64.

    A head whose list is that of all adds nothing to the address: not even a product with 0, which
    costs registers that the fullest tiles do not have.
    """
    entry, count = sequence * lists[5], sequence * lists[7]
    if LISTS == 1:
        entry, count = entry + kv_head * lists[6], count + kv_head * lists[8]
    elif LISTS == 2:  # tiles of one head
        entry, count = entry + query_head * lists[6], count + query_head * lists[8]
    return entry, count


@triton.jit
def span_of_pages(
    starts,
    counts,
    pages,
    piece,
    pieces,
    reach,
    length,
    rows,
    window,
    BOUNDED: tl.constexpr,
    CLEAN: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """The span of this piece. reach: positions of the first and the last row; rows: queries of
    the sequence. BOUNDED: look for pages out of reach. CLEAN: and for those that need no mask."""
    low, high = reach
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
