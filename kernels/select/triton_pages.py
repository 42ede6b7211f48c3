"""Scores of pages from their index rows, and the repair that rests on them.

Every field of an index row is exact in bfloat16, and a row of q is the sum of one to three bf16:
their products on tensor cores are exact, and only the sums are rounded, in fp32. With the middle
and the half width of a page's extremes, relu(q)·max - relu(-q)·min is q·middle + |q|·half, so that
q and |q| are all that is kept of a row.

A program takes the rows of one KV head (heads of a query side by side) and a run of the pages.
Constexpr tuples:
    INDEX   elements of an index row seen through bf16*, through int8* and through fp32*; where max,
            min and deviation (bytes), numbers (fp32) and value_mean (bf16) begin
    DIMS    channels of q and of values; the same as powers of two
"""

from __future__ import annotations

import triton
import triton.language as tl

from lath.formats.selection import FREEZING, LOGISTIC
from lath.kernels.select.plan import MOST_KEPT

_FREEZING = tl.constexpr(FREEZING)
_LOGISTIC = tl.constexpr(LOGISTIC)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_MOST_KEPT = tl.constexpr(MOST_KEPT)
# How far a mean that was rounded to bfloat16 lies from the true one, relatively.
_MEAN_ROUNDING = tl.constexpr(2.0**-8)


@triton.jit
def _rest(x, part):
    """What is left of fp32 x without a bf16 part of it. What is not finite is so in its first part;
    its rest would turn infinity into NaN."""
    wide = part.to(tl.float32)
    return tl.where(tl.abs(wide) < float("inf"), x - wide, 0.0)


@triton.jit
def _times_parts(x, tile, PARTS: tl.constexpr):
    """fp32 x [R, K], the sum of so many bf16, times bf16 [K, C]: exact products, fp32 [R, C]."""
    first = x.to(tl.bfloat16)
    if PARTS == 1:
        return tl.dot(first, tile)
    elif PARTS * x.shape[1] > _MOST_KEPT:  # one part at a time is in registers
        total = tl.zeros((x.shape[0], tile.shape[1]), tl.float32)
        for _ in tl.range(0, PARTS):
            part = x.to(tl.bfloat16)
            total = tl.dot(part, tile, total)
            x = _rest(x, part)
        return total
    else:
        rest = _rest(x, first)
        second = rest.to(tl.bfloat16)
        if PARTS == 3:
            third = _rest(rest, second).to(tl.bfloat16)
            total = tl.dot(second, tile, tl.dot(third, tile))
        else:
            total = tl.dot(second, tile)
        return tl.dot(first, tile, total)


@triton.jit
def times(x, tile):
    """x [R, K], bf16, fp16 or fp32, times bf16 [K, C] with exact products, fp32 [R, C]."""
    NARROW: tl.constexpr = 1 if x.dtype == tl.bfloat16 else 2
    return _times_parts(x.to(tl.float32), tile, 3 if x.dtype == tl.float32 else NARROW)


@triton.jit
def _load_rows(q, head, token, present, RELOAD: tl.constexpr, DIMS: tl.constexpr):
    """[R, block] of q at its sequence; rows that are not present are 0.

    q: (pointer, strides of sequence, head and token). RELOAD: never kept over a loop.
    """
    channel = tl.arange(0, DIMS[2])
    at = head.to(tl.int64) * q[2] + token.to(tl.int64) * q[3]
    inside = present[:, None] & (channel < DIMS[0])[None, :]
    pointers = q[0] + at[:, None] + channel[None, :]
    return tl.load(pointers, mask=inside, other=0.0, volatile=RELOAD)


@triton.jit
def _load_bytes(pointer, record, there, STRIDE: tl.constexpr, DIMS: tl.constexpr):
    """[block, P]: a byte per channel of an index row, as it is."""
    channel = tl.arange(0, DIMS[2])
    inside = (channel < DIMS[0])[:, None] & there[None, :]
    return tl.load(pointer + record[None, :] * STRIDE + channel[:, None], mask=inside, other=0)


@triton.jit
def _load_means(index, record, there, INDEX: tl.constexpr, DIMS: tl.constexpr):
    channel = tl.arange(0, DIMS[2])
    inside = (channel < DIMS[0])[:, None] & there[None, :]
    pointers = index[0] + record[None, :] * INDEX[0] + channel[:, None]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _spread(x, index, record, there, unit, INDEX: tl.constexpr, DIMS: tl.constexpr):
    """Spread [R, P] of the products of rows x with a page's keys."""
    steps = _load_bytes(index[1] + INDEX[5], record, there, INDEX[1], DIMS)
    steps = steps.to(tl.uint8, bitcast=True).to(tl.int32)
    # A square of eight bits is two numbers of eight bits, that of a bf16 the sum of two of them.
    high = (steps * steps >> 8).to(tl.float32).to(tl.bfloat16)
    low = (steps * steps & 255).to(tl.float32).to(tl.bfloat16)
    PARTS: tl.constexpr = 2 if x.dtype == tl.bfloat16 else 3
    wide = x.to(tl.float32)
    squares = wide * wide
    variance = _times_parts(squares, high, PARTS) * 256.0 + _times_parts(squares, low, PARTS)
    return tl.sqrt(variance) * (unit * 0.5)[None, :]


@triton.jit
def _log_mean(sigma):
    """log of the mean of exp over scores of spread sigma, relative to their mean."""
    frozen = sigma * _FREEZING - _FREEZING * _FREEZING * 0.5
    return tl.where(sigma <= _FREEZING, sigma * sigma * 0.5, frozen)


@triton.jit
def _reach(x, sign, most, least):
    """The largest products [R, P] of rows sign * x with any key between `least` and `most`."""
    middle = (most.to(tl.int32) + least.to(tl.int32)).to(tl.float32).to(tl.bfloat16)
    half = (most.to(tl.int32) - least.to(tl.int32)).to(tl.float32).to(tl.bfloat16)
    return (times(x, middle) * sign + times(tl.abs(x), half)) * 0.5


@triton.jit
def _slack(x, mean, index, record, there, count, unit, INDEX: tl.constexpr, DIMS: tl.constexpr):
    """How far the mean product [R, P] of the tokens that count may lie below q·mean.

    The mean's own rounding and that of the keys, where it is the mean of just those tokens; else no
    more is known than that none of them lies below the least product.
    """
    written = tl.load(index[2] + record * INDEX[2] + (INDEX[6] + 1), mask=there, other=0.0)
    whole = written == count.to(tl.float32)
    size = tl.sum(tl.abs(x.to(tl.float32)), 1)[:, None] * (unit * 0.5)[None, :]
    slack = size + times(tl.abs(x), tl.abs(mean)) * _MEAN_ROUNDING
    if tl.max((there & ~whole).to(tl.int32), 0) != 0:
        most = _load_bytes(index[1] + INDEX[3], record, there, INDEX[1], DIMS)
        least = _load_bytes(index[1] + INDEX[4], record, there, INDEX[1], DIMS)
        widest = _reach(x, -1.0, most, least) * unit[None, :]
        slack = tl.where(whole[None, :], slack, widest)
    return slack


@triton.jit
def _load_unit(index, record, there, INDEX: tl.constexpr):
    return tl.load(index[2] + record * INDEX[2] + INDEX[6], mask=there, other=0.0)


@triton.jit
def _score(
    x,
    index,
    record,
    there,
    count,
    scale,
    KIND: tl.constexpr,
    INDEX: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Scores [R, P] of pages; `there`: which of them a sequence has got."""
    mean = _load_means(index, record, there, INDEX, DIMS)
    centre = times(x, mean)
    if KIND == "mean":
        return centre * scale
    else:
        unit = _load_unit(index, record, there, INDEX)
        if KIND == "bound":
            most = _load_bytes(index[1] + INDEX[3], record, there, INDEX[1], DIMS)
            least = _load_bytes(index[1] + INDEX[4], record, there, INDEX[1], DIMS)
            reach = _reach(x, 1.0, most, least)
            return (centre + unit[None, :] * reach) * scale
        else:
            tokens = tl.log(count.to(tl.float32))[None, :]
            if KIND == "mass":
                sigma = _spread(x, index, record, there, unit, INDEX, DIMS) * scale
                return centre * scale + _log_mean(sigma) + tokens
            else:
                slack = _slack(x, mean, index, record, there, count, unit, INDEX, DIMS)
                return (centre - slack) * scale + tokens


@triton.jit
def _rows_of_tile(length, group, kv_head, BLOCK_R: tl.constexpr):
    """Token, query head and presence [R] of the rows of a program's tile. length: a pointer."""
    lane = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    token, head = lane // group, kv_head * group + lane % group
    return token, head, token < tl.load(length)


@triton.jit
def page_scores_kernel(
    q,
    lengths,
    lists,
    index,
    scores,
    heads,
    kv_heads,
    rows,
    width,
    pieces,
    scale,
    KIND: tl.constexpr,
    INDEX: tl.constexpr,
    DIMS: tl.constexpr,
    RELOAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: tiles of rows, KV heads, sequences * pieces of the pages.

    q: ([S, Hq, rows, D], its first three strides). lengths: int32 [S], rows of each sequence.
    lists: (table, counts, int32 [S, width], page_counts int32 [S]). index: the index as bf16*,
    int8* and fp32*. scores: fp32 [S, Hq, rows,
    width], all of it written. RELOAD: rows of q that registers cannot keep.
    """
    kv_head, piece = tl.program_id(1), tl.program_id(2) % pieces
    sequence = tl.program_id(2) // pieces
    wide, group = sequence.to(tl.int64), heads // kv_heads
    token, head, present = _rows_of_tile(lengths + sequence, group, kv_head, BLOCK_R)
    own_rows = (q[0] + wide * q[1], q[1], q[2], q[3])
    if not RELOAD:
        x = _load_rows(own_rows, head, token, present, RELOAD, DIMS)
    pages = tl.load(lists[2] + sequence)
    to = scores + ((wide * heads + head) * rows + token) * width
    each = tl.cdiv(width, pieces * BLOCK_P) * BLOCK_P
    last = tl.minimum((piece + 1) * each, width)
    for first in tl.range(piece * each, last, BLOCK_P, num_stages=STAGES):
        page = first + tl.arange(0, BLOCK_P)
        there = page < pages
        number = tl.load(lists[0] + wide * width + page, mask=there, other=0)
        count = tl.load(lists[1] + wide * width + page, mask=there, other=1)
        record = number.to(tl.int64) * kv_heads + kv_head
        if RELOAD:
            x = _load_rows(own_rows, head, token, present, RELOAD, DIMS)
        found = _score(x, index, record, there, count, scale, KIND, INDEX, DIMS)
        found = tl.where(present[:, None] & there[None, :], found, float("-inf"))
        stored = (token < rows)[:, None] & (page < last)[None, :]
        tl.store(to[:, None] + page[None, :], found, mask=stored)


@triton.jit
def _log_rest(x):
    """log of the logistic function of LOGISTIC * x, 0 at +inf."""
    y = x * _LOGISTIC
    return tl.minimum(y, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(y)))


@triton.jit
def _load_value_means(index, record, there, INDEX: tl.constexpr, DIMS: tl.constexpr):
    channel = tl.arange(0, DIMS[3])
    inside = there[:, None] & (channel < DIMS[1])[None, :]
    pointers = index[0] + record[:, None] * INDEX[0] + (INDEX[7] + channel)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _weighted(p, taken, means, OWN_LISTS: tl.constexpr):
    """p [R, P] times the values' means [P, E], fp32; what is not taken adds nothing, NaN or not.

    taken: [P]; where OWN_LISTS [R, P], and a mean that is not finite reaches those rows alone that
    take its page.
    """
    if OWN_LISTS:
        finite = tl.abs(means.to(tl.float32)) < float("inf")
        product = times(p, tl.where(finite, means, 0.0))
        broken = tl.where(finite, 0.0, 1.0)
        if tl.max(tl.max(broken, 1), 0) != 0:
            met = tl.dot(taken.to(tl.bfloat16), broken.to(tl.bfloat16)) > 0
            product = tl.where(met, float("nan"), product)
        return product
    else:
        return times(p, tl.where(taken[:, None], means, 0.0))


@triton.jit
def repair_kernel(
    q,
    lengths,
    lists,
    index,
    unread,
    output,
    heads,
    kv_heads,
    rows,
    width,
    pieces,
    scale,
    SPREADS: tl.constexpr,
    OWN_LISTS: tl.constexpr,
    PARTIAL: tl.constexpr,
    INDEX: tl.constexpr,
    DIMS: tl.constexpr,
    RELOAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid and arguments as of `page_scores_kernel`.

    unread: (fp32 [S, H, width], H). SPREADS: of scores of a page, else they are all that of its
    centre. OWN_LISTS: H is Hq and not Hkv. output: o fp32 [pieces, S, Hq,
    rows, E] and lse fp32 [pieces, S, Hq, rows], all of both written; in units of log 2 where
    PARTIAL.
    """
    kv_head, piece = tl.program_id(1), tl.program_id(2) % pieces
    sequence = tl.program_id(2) // pieces
    wide, group = sequence.to(tl.int64), heads // kv_heads
    token, head, present = _rows_of_tile(lengths + sequence, group, kv_head, BLOCK_R)
    own_rows = (q[0] + wide * q[1], q[1], q[2], q[3])
    if not RELOAD:
        x = _load_rows(own_rows, head, token, present, RELOAD, DIMS)
    pages = tl.load(lists[2] + sequence)
    own_list = (wide * unread[1] + kv_head * unread[1] // kv_heads) * width
    own_lists = (wide * heads + head) * width
    each = tl.cdiv(width, pieces * BLOCK_P) * BLOCK_P
    last = tl.minimum((piece + 1) * each, pages)
    top, total = tl.full((BLOCK_R,), float("-inf"), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    summed = tl.zeros((BLOCK_R, DIMS[3]), tl.float32)
    for first in tl.range(piece * each, last, BLOCK_P, num_stages=STAGES):
        page = first + tl.arange(0, BLOCK_P)
        there = page < pages
        number = tl.load(lists[0] + wide * width + page, mask=there, other=0)
        count = tl.load(lists[1] + wide * width + page, mask=there, other=1)
        record = number.to(tl.int64) * kv_heads + kv_head
        if RELOAD:
            x = _load_rows(own_rows, head, token, present, RELOAD, DIMS)
        if OWN_LISTS:
            inside = present[:, None] & there[None, :]
            pointers = unread[0] + own_lists[:, None] + page[None, :]
            quantile = tl.load(pointers, mask=inside, other=float("-inf"))
            taken = quantile != float("-inf")
        else:
            of_page = tl.load(unread[0] + own_list + page, mask=there, other=float("-inf"))
            quantile, taken = of_page[None, :], of_page != float("-inf")
        mean = _load_means(index, record, there, INDEX, DIMS)
        score = times(x, mean) * scale + tl.log(count.to(tl.float32))[None, :]
        if SPREADS:
            unit = _load_unit(index, record, there, INDEX)
            sigma = _spread(x, index, record, there, unit, INDEX, DIMS) * scale
            score += _log_mean(sigma) + _log_rest(quantile - sigma)
        else:
            score += _log_rest(quantile)
        score = tl.where(quantile == float("-inf"), float("-inf"), score)
        new = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2((score - shift[:, None]) * _LOG2E)
        fade = tl.exp2((top - shift) * _LOG2E)
        total = total * fade + tl.sum(p, 1)
        means = _load_value_means(index, record, there, INDEX, DIMS)
        summed = summed * fade[:, None] + _weighted(p, taken, means, OWN_LISTS)
        top = new
    empty = (total == 0) | (present == 0)  # not total > 0: a NaN must come out
    divisor = tl.where(empty, 1.0, total)
    if PARTIAL:
        logarithm = top * _LOG2E + tl.log2(divisor)
    else:
        logarithm = top + tl.log2(divisor) * _LN2
    at = ((piece * (tl.num_programs(2) // pieces) + wide) * heads + head) * rows + token
    tl.store(output[1] + at, tl.where(empty, float("-inf"), logarithm), mask=token < rows)
    channel = tl.arange(0, DIMS[3])[None, :]
    found = tl.where(empty[:, None], 0.0, summed / divisor[:, None])
    stored = (token < rows)[:, None] & (channel < DIMS[1])
    tl.store(output[0] + at[:, None] * DIMS[1] + channel, found, mask=stored)
