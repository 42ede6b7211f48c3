"""Row kernels over x: the quantiser of `lath.formats.activations`, and sums of x over spans.

The quantiser also writes the sums of its codes over spans, exact where they are integers, which the
matmul needs for zero points. It writes the codes in the order in which the int8 decoder delivers
the weights: inside each 32 columns the two halves of 16 alternate. NATURAL order serves the other
loops.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lath.kernels.pages.triton_numbers import rint_bits, round_e4m3, round_e5m2


@triton.jit
def _columns(first, WIDTH: tl.constexpr, NATURAL: tl.constexpr):
    """The columns of x that go to positions first .. first + WIDTH of the codes."""
    position = tl.arange(0, WIDTH)
    if NATURAL:
        return first + position
    else:
        return first + position // 32 * 32 + position % 2 * 16 + position % 32 // 2


@triton.jit
def _load(row, order, column, inside, ORDER: tl.constexpr):
    """Columns of a row of x in fp32, 0 outside."""
    if ORDER:
        column = tl.load(order + column, mask=inside, other=0)
    return tl.load(row + column, mask=inside, other=0).to(tl.float32)


@triton.jit
def quantize_rows_kernel(
    x,
    order,
    codes,
    scales,
    sums,
    K,
    M,
    stride_x,
    padded_columns,
    padded_tokens,
    groups,
    group_size,
    SPAN: tl.constexpr,
    NATURAL: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    LIMIT: tl.constexpr,
    SMALLEST: tl.constexpr,
    VALUES: tl.constexpr,
    ORDER: tl.constexpr,
):
    """GROUPS groups of one token of x [M, K] to codes, scales and sums of codes. With ORDER column
    k is that of number order[k], int32 [K], of a wider x.

    codes: [M, padded_columns], whole numbers in int8 or fp16, or where VALUES is "e4m3" or "e5m2"
    such floats, in that type or fp16; columns beyond K hold 0. scales: fp32 [groups,
    padded_tokens], 1 beyond M. sums: int32 or fp32 [spans, padded_tokens], SPAN columns each, 0
    beyond M. LIMIT: the largest code. Groups longer than CHUNK columns are read twice in
    pieces, and then GROUPS is 1. Must run without fused multiply-add.
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    first = (group * group_size)[:, None]
    last = tl.minimum(first + group_size, tl.where(token < M, K, 0))
    row = x + token * stride_x
    absmax = tl.zeros((GROUPS,), tl.float32)
    broken = tl.zeros((GROUPS,), tl.int32)
    for start in range(0, group_size, CHUNK):
        column = first + start + tl.arange(0, CHUNK)[None, :]
        values = _load(row, order, column, column < last, ORDER)
        size = tl.abs(values)
        finite = size < float("inf")  # false for NaN too
        absmax = tl.maximum(absmax, tl.max(tl.where(finite, size, 0.0), axis=1))
        broken = tl.maximum(broken, tl.max(tl.where(finite, 0, 1), axis=1))
    usable = (broken == 0) & (absmax >= SMALLEST)
    safe = tl.where(usable, absmax, 1.0)
    limit = tl.full((GROUPS,), LIMIT, tl.float32)
    inverse = tl.where(usable, tl.div_rn(limit, safe), 0.0)
    scale = tl.where(usable, tl.div_rn(safe, limit), 1.0)
    scale = tl.where(broken != 0, float("nan"), scale)
    tl.store(scales + group.to(tl.int64) * padded_tokens + token, scale, mask=group < groups)

    end = tl.minimum(first + group_size, padded_columns)
    for start in range(0, group_size, CHUNK):
        column = _columns(first + start, CHUNK, NATURAL)
        inside = (column < last) & (broken == 0)[:, None]
        values = _load(row, order, column, inside, ORDER)
        scaled = values * inverse[:, None]
        scaled = tl.where(inside, scaled, 0.0)
        if VALUES == "e4m3":
            rounded = round_e4m3(scaled)
        elif VALUES == "e5m2":
            rounded = round_e5m2(scaled)
        else:
            rounded = rint_bits(scaled).to(tl.int8)
        position = first + start + tl.arange(0, CHUNK)[None, :]
        target = codes + token * padded_columns + position
        stored = position < tl.where(token < M, end, 0)
        tl.store(target, rounded.to(codes.dtype.element_ty), mask=stored)
        parts = tl.reshape(rounded.to(sums.dtype.element_ty), (GROUPS, CHUNK // SPAN, SPAN))
        span = (first + start) // SPAN + tl.arange(0, CHUNK // SPAN)[None, :]
        at = span.to(tl.int64) * padded_tokens + token
        tl.store(sums + at, tl.sum(parts, axis=2), mask=span * SPAN < end)


@triton.jit
def sum_rows_kernel(
    x,
    sums,
    M,
    K,
    stride_x,
    padded_tokens,
    spans,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
):
    """SPANS sums of SPAN columns of one token of x [M, K]: fp32 [spans, padded_tokens]."""
    token = tl.program_id(0).to(tl.int64)
    span = tl.program_id(1) * SPANS + tl.arange(0, SPANS)
    column = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    inside = column < tl.where(token < M, K, 0)
    values = tl.load(x + token * stride_x + column, mask=inside, other=0).to(tl.float32)
    at = span.to(tl.int64) * padded_tokens + token
    tl.store(sums + at, tl.sum(values, axis=1), mask=span < spans)
