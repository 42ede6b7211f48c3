"""The largest k of a row of scores, ascending by index: a threshold, then one prefix sum.

Nothing is sorted. Scores are taken as unsigned keys in their own order (NaN the largest, -inf 0,
which is never taken); the k-th largest key is found, and the indices above it, and as many of its
equals as are wanted, are written to the places that a prefix sum gives them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ordered(x):
    """uint32 keys in the order of fp32 scores: 0 for -inf, the largest of all for NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.where(x == 0, 0, bits)  # both zeros are one number
    keys = bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    keys = tl.where(x == float("-inf"), 0, keys)
    return tl.where(x != x, 0xFFFFFFFF, keys).to(tl.uint32)


@triton.jit
def _place(out, column, keys, threshold, wanted, above_before, equal_before):
    """Write the columns whose key is above the threshold, and `wanted` of those that equal it.

    above_before, equal_before: how many of either lie in front of these columns; returned with
    these columns' own.
    """
    above, equal = keys > threshold, (keys == threshold) & (keys != 0)
    aboves, equals = above.to(tl.int32), equal.to(tl.int32)
    ahead = above_before + tl.cumsum(aboves, 0) - aboves
    level = equal_before + tl.cumsum(equals, 0) - equals
    taken = above | (equal & (level < wanted))
    tl.store(out + ahead + tl.minimum(level, wanted), column, mask=taken)
    return above_before + tl.sum(aboves, 0), equal_before + tl.sum(equals, 0)


@triton.jit
def _blank(out, taken, k, BLOCK: tl.constexpr):
    """-1 behind the last of k places."""
    for first in tl.range(taken // BLOCK * BLOCK, k, BLOCK):
        place = first + tl.arange(0, BLOCK)
        empty = tl.full((BLOCK,), -1, tl.int32)
        tl.store(out + place, empty, mask=(place >= taken) & (place < k))


@triton.jit
def top_k_kernel(scores, out, width, k, BLOCK: tl.constexpr):
    """Grid: rows. scores: fp32 [rows, width], width <= BLOCK, all of it in registers. out: int32
    [rows, k], 1 <= k <= width. The threshold is found bit by bit, the highest first."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(scores + row * width + column, mask=column < width, other=float("-inf"))
    keys = _ordered(x)
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    nothing = tl.zeros((), tl.int32)
    found = nothing + BLOCK  # how many keys reach the threshold
    while (bit != 0) & (found != k):
        higher = threshold | bit
        reached = tl.sum((keys >= higher).to(tl.int32), 0)
        threshold = tl.where(reached >= k, higher, threshold)
        found = tl.where(reached >= k, reached, found)
        bit = bit >> 1
    wanted = k - tl.sum((keys > threshold).to(tl.int32), 0)
    above, equal = _place(out + row * k, column, keys, threshold, wanted, nothing, nothing)
    _blank(out + row * k, above + tl.minimum(equal, wanted), k, BLOCK)


@triton.jit
def _next_digit(source, width, threshold, wanted, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """(threshold, wanted) with the eight bits at SHIFT of the `wanted`-th largest of the keys that
    agree with the threshold so far; then wanted is counted among those that still agree."""
    digit, counts = tl.arange(0, 256), tl.zeros((256,), tl.int32)
    for first in tl.range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        keys = _ordered(tl.load(source + column, mask=column < width, other=float("-inf")))
        same = column < width
        if SHIFT < 24:
            same &= (keys >> (SHIFT + 8)) == (threshold >> (SHIFT + 8))
        counts += tl.histogram(((keys >> SHIFT) & 255).to(tl.int32), 256, mask=same)
    from_here = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # this digit or a higher one
    chosen = tl.max(tl.where(from_here >= wanted, digit, 0), 0)
    higher = tl.sum(tl.where(digit > chosen, counts, 0), 0)
    return threshold | (chosen.to(tl.uint32) << SHIFT), wanted - higher


@triton.jit
def radix_top_k_kernel(scores, out, width, k, BLOCK: tl.constexpr):
    """Grid: rows. As `top_k_kernel` for any width: the threshold is found by four passes over the
    row, each a histogram of the next eight bits of the keys that agree with it so far."""
    row = tl.program_id(0).to(tl.int64)
    source = scores + row * width
    nothing, threshold = tl.zeros((), tl.int32), tl.full((), 0, tl.uint32)
    wanted = nothing + k
    for part in tl.static_range(4):
        threshold, wanted = _next_digit(source, width, threshold, wanted, 24 - 8 * part, BLOCK)
    above, equal = nothing, nothing
    for first in tl.range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(source + column, mask=column < width, other=float("-inf"))
        above, equal = _place(out + row * k, column, _ordered(x), threshold, wanted, above, equal)
    _blank(out + row * k, above + tl.minimum(equal, wanted), k, BLOCK)
