"""Scores of single tokens: from the keys' codes as attention multiplies them, or from labels."""

from __future__ import annotations

import triton
import triton.language as tl

from lath.kernels.attention.triton_attend import load_query
from lath.kernels.attention.triton_pages import score_products
from lath.kernels.attention.triton_tiles import float_keys, load_planes
from lath.kernels.select.triton_pages import times


@triton.jit
def _store_blank(scores, first, last, stored):
    """-inf for the tokens of pages that a sequence has not got. scores: pointers [R]."""
    blank = tl.full((scores.shape[0], 64), float("-inf"), tl.float32)
    for page in tl.range(first, last):
        at = page * 64 + tl.arange(0, 64)
        tl.store(scores[:, None] + at[None, :], blank, mask=stored[:, None])


@triton.jit
def _page_of_scores(
    record, page, query, records, count, KEYS: tl.constexpr, PAGES: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Scores [BM, 64] of one page, in real units; tuples as in `triton_pages` of attention.

    query: (tiles, scale [BM], corrections, its stride, factor).
    """
    numbers = records[2] + record * PAGES[2]
    if KEYS[0] == "float":
        pointer = records[0] + record * PAGES[0] + KEYS[5]
        keys = float_keys(pointer, KEYS[3], PAGES[6], count, KEYS[4])
        return tl.dot(query[0][0], keys, input_precision=MATH[3]) * query[4]
    else:
        keys = load_planes(records[0] + record * PAGES[0], KEYS, False)
        products = score_products(query[0], keys, KEYS, MATH)
        slope = query[1] * tl.load(numbers + PAGES[4])
        if PAGES[5] >= 0:
            products *= tl.load(numbers + PAGES[5] + tl.arange(0, 64))[None, :]
        at = tl.cast(page, tl.int64) * query[3] + tl.arange(0, slope.shape[0])
        intercept = tl.load(query[2] + at) * query[4]
        return products * slope[:, None] + intercept[:, None]


@triton.jit
def token_scores_kernel(
    q,
    prepared,
    records,
    lengths,
    lists,
    scores,
    heads,
    kv_heads,
    rows,
    width,
    padded_rows,
    pieces,
    scale,
    KEYS: tl.constexpr,
    PAGES: tl.constexpr,
    MATH: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: tiles of rows, heads / PACK, sequences * pieces of the pages.

    q: ([S, Hq, rows, D], its first three strides). prepared: codes, scales, corrections of
    `prepare_kernel`. records: through pointers for keys, values, fp32. lengths, lists: as of
    `page_scores_kernel`. scores: fp32 [S, Hq, rows, 64 width], all of it written.
    """
    tile, block = tl.program_id(0), tl.program_id(1)
    sequence, piece = tl.program_id(2) // pieces, tl.program_id(2) % pieces
    wide, kv_head = sequence.to(tl.int64), block * PACK // (heads // kv_heads)
    lane = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = lane // PACK, block * PACK + lane % PACK
    present = token < tl.load(lengths + sequence)
    own = wide * (heads // PACK) + block
    at = own * padded_rows + tile * BLOCK_M
    base = (q[0] + wide * q[1], q[2], q[3])
    codes = (prepared[0] + at * (KEYS[3] * KEYS[1]), prepared[1] + at)
    tiles, row_scale = load_query(base, codes, (token, token, head, present), KEYS, PAGES, MATH[0])
    at = own * width * padded_rows + tile * BLOCK_M
    query = (tiles, row_scale * scale, prepared[2] + at, padded_rows, scale)
    to = scores + ((wide * heads + head) * rows + token) * width * 64
    each = tl.cdiv(width, pieces)
    first, last = piece * each, tl.minimum((piece + 1) * each, width)
    end = tl.minimum(tl.load(lists[2] + sequence), last)
    slot, stored = tl.arange(0, 64), token < rows
    for page in tl.range(first, end, num_stages=STAGES):
        number = tl.load(lists[0] + wide * width + page)
        count = tl.load(lists[1] + wide * width + page)
        record = number.to(tl.int64) * kv_heads + kv_head
        found = _page_of_scores(record, page, query, records, count, KEYS, PAGES, MATH)
        allowed = present[:, None] & (slot < count)[None, :]
        found = tl.where(allowed, found, float("-inf"))
        tl.store(to[:, None] + (page * 64 + slot)[None, :], found, mask=stored[:, None])
    _store_blank(to, tl.maximum(first, end), last, stored)


@triton.jit
def _halves(bytes_):
    """int8 codes of the low and of the high four bits of uint8."""
    low = (bytes_ << 4).to(tl.int8, bitcast=True) >> 4
    return low, bytes_.to(tl.int8, bitcast=True) >> 4


@triton.jit
def label_scores_kernel(
    q,
    lengths,
    lists,
    means,
    labels,
    label_scales,
    label_channels,
    rows_of,
    scores,
    heads,
    kv_heads,
    rows,
    width,
    pieces,
    scale,
    LABELS: tl.constexpr,
    CENTRED: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: tiles of rows, query heads, sequences * pieces of the pages.

    q, lengths, lists: as of `page_scores_kernel`. means: the index as bf16*, STRIDE of them a row;
    CENTRED: the labels are of keys without that mean. labels: int8 [N, Hkv, C, 64], or uint8 [N,
    Hkv, C, 32] of 4 bits; label_scales fp32 [N, Hkv]; label_channels int32 [Hkv, C]; rows_of int32
    [S, Hq, R]. LABELS: (C, R, R as a power of two, bits). scores: fp32 [S, Hq, rows, 64 width], all
    of it written.
    """
    head = tl.program_id(1)
    sequence, piece = tl.program_id(2) // pieces, tl.program_id(2) % pieces
    wide, kv_head = sequence.to(tl.int64), head // (heads // kv_heads)
    token, part = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, LABELS[2])
    present, used = token < tl.load(lengths + sequence), part < LABELS[1]
    chosen = tl.load(rows_of + (wide * heads + head) * LABELS[1] + part, mask=used, other=0)
    channel = tl.load(label_channels + kv_head * LABELS[0] + chosen, mask=used, other=0)
    base = q[0] + wide * q[1] + head.to(tl.int64) * q[2]
    pointers = base + token.to(tl.int64)[:, None] * q[3] + channel[None, :]
    x = tl.load(pointers, mask=present[:, None] & used[None, :], other=0.0)
    to = scores + ((wide * heads + head) * rows + token) * width * 64
    each = tl.cdiv(width, pieces)
    first, last = piece * each, tl.minimum((piece + 1) * each, width)
    end = tl.minimum(tl.load(lists[2] + sequence), last)
    TOKENS: tl.constexpr = 64 if LABELS[3] == 8 else 32  # bytes of a row of labels
    slot, stored = tl.arange(0, TOKENS), (token < rows)[:, None]
    for page in tl.range(first, end, num_stages=STAGES):
        number = tl.load(lists[0] + wide * width + page)
        count = tl.load(lists[1] + wide * width + page)
        record = number.to(tl.int64) * kv_heads + kv_head
        own = (record * LABELS[0] + chosen)[:, None] * TOKENS + slot[None, :]
        codes = tl.load(labels + own, mask=used[:, None] & (slot < TOKENS)[None, :], other=0)
        unit = tl.load(label_scales + record)
        middle = tl.zeros((BLOCK_M,), tl.float32)
        if CENTRED:
            mean = tl.load(means + record * STRIDE + channel, mask=used, other=0.0).to(tl.float32)
            middle = tl.sum(x.to(tl.float32) * mean[None, :], 1)
        operands = (codes,)
        if LABELS[3] == 4:
            operands = _halves(codes)
        for half in tl.static_range(64 // TOKENS):
            products = times(x, operands[half].to(tl.bfloat16))
            found = (products * unit + middle[:, None]) * scale
            own_slot = half * TOKENS + slot
            allowed = present[:, None] & (own_slot < count)[None, :]
            found = tl.where(allowed, found, float("-inf"))
            tl.store(to[:, None] + (page * 64 + own_slot)[None, :], found, mask=stored)
    _store_blank(to, tl.maximum(first, end), last, token < rows)
