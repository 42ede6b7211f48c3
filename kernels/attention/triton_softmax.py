"""One tile's part of a softmax: weights, their rounding, the product with values.

The state of a tile of rows is (m, l, seen, sums): m the largest score so far (or, "fixed", an upper
bound of all that come), l the sum of weights relative to m, seen the largest score met, sums a fp32
[BM, block] per part of the values. A NaN never hides: it reaches l, which only l == 0 is tested of.

MODE   "running"  weights relative to the largest score so far: what unrounded weights need least
       "tile"     weights relative to the tile's own largest, so that their codes depend on nothing
                  else; then weighed themselves
       "fixed"    as "tile", and m stays
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
def fresh_state(m, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """The state before any tile; m: [BM], -inf or the bound of "fixed"."""
    sums = ()
    for _ in tl.static_range(PARTS):
        sums = _append(sums, tl.zeros((BLOCK_M, BLOCK), tl.float32))
    nothing = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    return m, tl.zeros((BLOCK_M,), tl.float32), nothing, sums


@triton.jit
def _finite(x):
    """0 for -inf, only ever used as what is subtracted."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _times_values(p, values, PRECISION: tl.constexpr, P_TYPE: tl.constexpr):
    """fp32 [BM, block] of weights [BM, 64] in 0 .. 1 and values [64, block], times `levels`."""
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
        return tl.dot(p.to(P_TYPE), values.to(P_TYPE), input_precision="ieee")


@triton.jit
def _level(PRECISION: tl.constexpr):
    """What one step of a weight's code stands for."""
    if PRECISION == "int8":
        return 1.0 / 127.0
    elif PRECISION == "int16":
        return 1.0 / 32512.0
    elif PRECISION == "e4m3":
        return 1.0 / 256.0
    else:
        return 1.0


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
    PRECISION: tl.constexpr,
    P_TYPE: tl.constexpr,
):
    """The state after a tile of scores [BM, 64].

    PLAIN: a score is scores * slope + intercept, slope >= 0 and intercept [BM]. MASKED: scores may
    be -inf. planes: the values, as `load_planes` gave them. scales: fp32 [block] per part.
    """
    m, l, seen, sums = state
    largest = tl.max(scores, 1)
    if PLAIN:
        largest = largest * slope + intercept
    if MODE == "fixed":
        new = m
    else:
        new = tl.maximum(m, largest)
    shift = _finite(new)
    if MODE == "running":
        origin = shift
    else:
        origin = _finite(largest)
    if PLAIN:
        p = tl.exp2(scores * slope[:, None] + (intercept - origin)[:, None])
    else:
        p = tl.exp2(scores - origin[:, None])
    total = tl.sum(p, 1)
    weight = tl.exp2(largest - shift)
    if MODE == "running":
        weight = tl.full(weight.shape, 1.0, tl.float32)
    fade = tl.exp2(m - shift)
    if MODE == "fixed":
        l = l + total * weight
        seen = tl.maximum(seen, largest)
    else:
        l = l * fade + total * weight
    weight *= _level(PRECISION)
    added = ()
    for part in tl.static_range(LAYOUT[1]):
        values = operand(planes, LAYOUT, part, True)
        before = sums[part]
        if MODE != "fixed":
            before = before * fade[:, None]
        if LAYOUT[0] == "float" and MODE == "running" and not MASKED:
            after = tl.dot(p.to(P_TYPE), values, before, input_precision="ieee")
        else:
            product = _times_values(p, values, PRECISION, P_TYPE)
            if LAYOUT[0] != "float":
                product = product * scales[part][None, :]
            if MODE != "running":
                product = product * weight[:, None]
            if MASKED:  # 0 * NaN: a row that reads none of these keys must not see their values
                product = tl.where((largest != float("-inf"))[:, None], product, 0.0)
            after = before + product
        added = _append(added, after)
    return new, l, seen, added


@triton.jit
def renormalised(state, PARTS: tl.constexpr):
    """The state with l = 1 where it is not 0: from here on it may be rescaled."""
    m, l, seen, sums = state
    divided = ()
    for part in tl.static_range(PARTS):
        divided = _append(divided, sums[part] / tl.where(l == 0, 1.0, l)[:, None])
    new = tl.where(l == 0, float("-inf"), _finite(m) + tl.log2(l))
    return new, tl.where(l == 0, 0.0, 1.0), seen, divided


@triton.jit
def with_sink(state, sink, PARTS: tl.constexpr):
    """The state after a score `sink` [BM] that has no value."""
    m, l, seen, sums = state
    new = tl.maximum(m, sink)
    shift = _finite(new)
    fade = tl.exp2(m - shift)
    faded = ()
    for part in tl.static_range(PARTS):
        faded = _append(faded, sums[part] * fade[:, None])
    return new, l * fade + tl.exp2(sink - shift), seen, faded
