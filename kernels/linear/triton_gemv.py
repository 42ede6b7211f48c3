"""The loop of `linear` without a dot: for few tokens where no tensor unit takes the dot.

A program keeps a fp32 [rows, 16] of partial sums per token and adds products into it run by run;
lanes are summed once, at the end. It makes the sums of x itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lath.kernels.linear.triton_decode import column_order
from lath.kernels.linear.triton_loops import (
    group_of,
    outer_scale,
    rows_of_tile,
    scale_and_zero,
    weigh,
)


@triton.jit
def _append(values, value):
    return values + (value,)  # noqa: RUF005 (Triton has no starred expressions)


@triton.jit
def _multiply_without_dot(
    parts,
    sums,
    x,
    weight,
    block,
    column,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    LOCATE: tl.constexpr,
    DECODE: tl.constexpr,
    FORM: tl.constexpr,
    WIDTHS: tl.constexpr,
    MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Add COUNT columns to `parts`, a fp32 [BN, 16] per token, and x to `sums`, a [1, 16] each.

    x: (a pointer per token, K). block: of the weight, which begins at `column`. weight, FIRST: as
    in the tile matmul.
    """
    planes = LOCATE(weight, block, WIDTHS)
    order = column_order(16, WIDTHS)
    for i in tl.static_range(COUNT // 16):
        numbers = DECODE(planes, weight[2], FIRST // 16 + i, FORM, WIDTHS)
        added, added_sums = (), ()
        for m in tl.static_range(TOKENS):
            pointers = x[0][m] + (column + (FIRST + i * 16)) + order
            if MASKED:
                inside = column + (FIRST + i * 16) + order < x[1]
                values = tl.load(pointers, mask=inside, other=0)
            else:
                values = tl.load(pointers)
            values = values.to(tl.float32)[None, :]
            added = _append(added, parts[m] + numbers * values)
            added_sums = _append(added_sums, sums[m] + values)
        parts, sums = added, added_sums
    return parts, sums


@triton.jit
def gemv_kernel(
    x,
    codes,
    scales,
    zeros,
    outer,
    table,
    x_scales,
    bias,
    y,
    M,
    N,
    K,
    stride_x,
    padded_rows,
    padded_tokens,
    blocks,
    groups,
    x_groups,
    LOCATE: tl.constexpr,
    DECODE: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK: tl.constexpr,
    FORM: tl.constexpr,
    UNIT: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    OUTER: tl.constexpr,
    GROUP: tl.constexpr,
    X_GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    MASKED: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_N columns of y for all M <= TOKENS tokens, without a dot: fp32 products and sums.

    Arguments as in `matmul_kernel`; x in its own column order, and its sums are made here.
    """
    first_n = tl.program_id(0) * BLOCK_N
    piece = tl.program_id(1)
    blocks_each = tl.cdiv(blocks, tl.num_programs(1))
    first_block = piece * blocks_each
    last_block = tl.minimum(first_block + blocks_each, blocks)
    row, plane_rows = rows_of_tile(first_n, padded_rows, blocks, BLOCK_N)
    weight = (codes, first_n // 16, plane_rows, padded_rows, blocks, table, (zeros, row, groups))
    outer = outer_scale(outer, row, OUTER)
    pointers, totals, no_sums = (), (), ()
    for m in tl.static_range(TOKENS):
        present = tl.minimum(piece * 0 + m, M - 1)
        pointers = _append(pointers, x + present.to(tl.int64) * stride_x)
        totals = _append(totals, tl.zeros((BLOCK_N, 16), tl.float32))
        no_sums = _append(no_sums, tl.zeros((1, 16), tl.float32))
    x_tile = (pointers, K)
    nothing, parts, sums = totals, totals, no_sums
    for block in tl.range(first_block, last_block, num_stages=STAGES):
        column = block * BLOCK
        if SPAN == 0:
            parts, sums = _multiply_without_dot(
                parts, sums, x_tile, weight, block, column, 0, BLOCK, LOCATE, DECODE, FORM, WIDTHS,
                MASKED,
                TOKENS,
            )  # fmt: skip
        else:
            for i in tl.static_range(BLOCK // SPAN):
                partial, partial_sums = _multiply_without_dot(
                    nothing, no_sums, x_tile, weight, block, column, i * SPAN, SPAN, LOCATE,
                    DECODE, FORM,
                    WIDTHS, MASKED, TOKENS,
                )  # fmt: skip
                at = group_of(column + i * SPAN, groups, GROUP) * padded_rows + row
                scale, zero = scale_and_zero(scales, zeros, at, outer, SCALE, OUTER, ZERO)
                added = ()
                for m in tl.static_range(TOKENS):
                    value = weigh(
                        partial[m], partial_sums[m], scale[:, None], zero[:, None],
                        UNIT, OFFSET, ZERO,
                    )  # fmt: skip
                    if X_GROUP > 0:
                        x_group = group_of(column + i * SPAN, x_groups, X_GROUP)
                        value *= tl.load(x_scales + x_group * padded_tokens + m)
                    added = _append(added, totals[m] + value)
                totals = added
    if SPAN == 0:
        scale, zero = scale_and_zero(scales, zeros, row, outer, SCALE, OUTER, ZERO)
    row = first_n + tl.arange(0, BLOCK_N)
    for m in tl.static_range(TOKENS):
        if SPAN == 0:
            total = weigh(parts[m], sums[m], scale[:, None], zero[:, None], UNIT, OFFSET, ZERO)
            result = tl.sum(total, axis=1)
        else:
            result = tl.sum(totals[m], axis=1)
        if X_GROUP == 0:
            result *= tl.load(x_scales + m)
        if BIAS:
            result += tl.load(bias + row, mask=row < N, other=0).to(tl.float32)
        stored = (row < N) & (row * 0 + m < M)
        tile = y + (piece.to(tl.int64) * M + m) * N
        tl.store(tile + row, result.to(y.dtype.element_ty), mask=stored)
