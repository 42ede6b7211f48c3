"""One tile's part of a softmax: weights, their rounding, the product with values.

The state of a tile of rows is (top, total, seen, sums): top the largest score so far (or, "fixed",
an upper bound of all that come), total the sum of weights relative to it, seen the largest score
met, sums a fp32 [BM, block] per part of the values. A NaN never hides: it reaches `total`, of which
only total == 0 is asked.

MODE   "running"  weights relative to the largest score so far: what unrounded weights need least
       "tile"     weights relative to the tile's own largest, so that their codes depend on nothing
                  else; then weighed themselves
       "fixed"    as "tile", and top stays
"""

from __future__ import annotations

import triton
import triton.language as tl

from lath.kernels.attention.triton_tiles import operand
from lath.kernels.pages.triton_numbers import rint_bits, round_e4m3


@triton.jit
def _append(values, value):
    return values + (value,)  # noqa: RUF005 (Triton has no starred expressions)


@triton.jit
def fresh_state(top, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """The state before any tile; top: [BM], -inf or the bound of "fixed"."""
    sums = ()
    for _ in tl.static_range(PARTS):
        sums = _append(sums, tl.zeros((BLOCK_M, BLOCK), tl.float32))
    nothing = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    return top, tl.zeros((BLOCK_M,), tl.float32), nothing, sums


@triton.jit
def _finite(x):
    """0 for -inf, only ever used as what is subtracted."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _times_values(p, values, MATH: tl.constexpr, P_TYPE: tl.constexpr):
    """fp32 [BM, block] of weights [BM, 64] in 0 .. 1 and values [64, block], times `levels`."""
    PRECISION: tl.constexpr = MATH[1]
    if PRECISION == "int8":
        codes = rint_bits(p * 127.0).to(tl.int8)
        return tl.dot(codes, values).to(tl.float32)
    elif PRECISION == "int16":
        bits = rint_bits(p * 32512.0)
        high, low = ((bits + 128) >> 8).to(tl.int8), bits.to(tl.int8)
        return tl.dot(low, values, tl.dot(high, values) * 256).to(tl.float32)
    elif PRECISION == "e4m3":
        if values.dtype == tl.float16:  # decoded, for want of an instruction
            return tl.dot(round_e4m3(p * 256.0).to(tl.float16), values)
        else:
            return tl.dot((p * 256.0).to(tl.float8e4nv), values)
    else:
        return tl.dot(p.to(P_TYPE), values.to(P_TYPE), input_precision=MATH[3])


@triton.jit
def _level(PRECISION: tl.constexpr):
    """What one step of a weight's code stands for."""
    wide: tl.constexpr = 1.0 / 32512.0 if PRECISION == "int16" else 1.0
    narrow: tl.constexpr = 1.0 / 256.0 if PRECISION == "e4m3" else wide
    return 1.0 / 127.0 if PRECISION == "int8" else narrow


@triton.jit
def add_tile(
    state,
    scores,
    slope,
    intercept,
    planes,
    scales,
    MODE: tl.constexpr,
    PLAIN: tl.constexpr,
    MASKED: tl.constexpr,
    LAYOUT: tl.constexpr,
    MATH: tl.constexpr,
    P_TYPE: tl.constexpr,
):
    """The state after a tile of scores [BM, 64].

    PLAIN: a score is scores * slope + intercept, slope >= 0 and intercept [BM]. MASKED: scores may
    be -inf. planes: the values, as `load_planes` gave them. scales: fp32 [block] per part.
    """
    top, total, seen, sums = state
    largest = tl.max(scores, 1)
    if PLAIN:
        largest = largest * slope + intercept
    if MODE == "fixed":
        new = top
    else:
        new = tl.maximum(top, largest)
    shift = _finite(new)
    if MODE == "running":
        origin = shift
    else:
        origin = _finite(largest)
    if PLAIN:
        p = tl.exp2(scores * slope[:, None] + (intercept - origin)[:, None])
    else:
        p = tl.exp2(scores - origin[:, None])
    added_weight = tl.sum(p, 1)
    weight = tl.exp2(largest - shift)
    if MODE == "running":
        weight = tl.full(weight.shape, 1.0, tl.float32)
    fade = tl.exp2(top - shift)
    if MODE == "fixed":
        total = total + added_weight * weight
        seen = tl.maximum(seen, largest)
    else:
        total = total * fade + added_weight * weight
    weight *= _level(MATH[1])
    added = ()
    for part in tl.static_range(LAYOUT[1]):
        values = operand(planes, LAYOUT, part, True)
        before = sums[part]
        if MODE != "fixed":
            before = before * fade[:, None]
        if LAYOUT[0] == "float" and MODE == "running" and not MASKED:
            after = tl.dot(p.to(P_TYPE), values, before, input_precision=MATH[3])
        else:
            product = _times_values(p, values, MATH, P_TYPE)
            if LAYOUT[0] != "float":
                product = product * scales[part][None, :]
            if MODE != "running":
                product = product * weight[:, None]
            if MASKED:  # 0 * NaN: a row that reads none of these keys must not see their values
                product = tl.where((largest != float("-inf"))[:, None], product, 0.0)
            after = before + product
        added = _append(added, after)
    return new, total, seen, added


@triton.jit
def renormalised(state, PARTS: tl.constexpr):
    """The state with total = 1 where it is not 0: from here on it may be rescaled."""
    top, total, seen, sums = state
    divided = ()
    for part in tl.static_range(PARTS):
        divided = _append(divided, sums[part] / tl.where(total == 0, 1.0, total)[:, None])
    new = tl.where(total == 0, float("-inf"), _finite(top) + tl.log2(total))
    return new, tl.where(total == 0, 0.0, 1.0), seen, divided


@triton.jit
def with_sink(state, sink, PARTS: tl.constexpr):
    """The state after a score `sink` [BM] that has no value."""
    top, total, seen, sums = state
    new = tl.maximum(top, sink)
    shift = _finite(new)
    fade = tl.exp2(top - shift)
    faded = ()
    for part in tl.static_range(PARTS):
        faded = _append(faded, sums[part] * fade[:, None])
    return new, total * fade + tl.exp2(sink - shift), seen, faded
