"""The loops of `linear` on a GPU: tile matmul (flat and tiled), its reduction, and plain decoding.

These and the loop without a dot (`triton_gemv`) share the tile decoder and one accounting of scales
and zero points. With D the decoded numbers (`triton_decode.encoding`: q = unit * D + base), a
*span* the longest run of columns that has one weight scale and one activation scale, and r = Σ x
over a span,

    Σ x (q - zero) = unit * Σ x D + (base - zero) * r          y += x_scale * scale * (that)
    Σ x (scale * q + minimum) = scale * (unit * Σ x D + base * r) + minimum * r

in fp32 (int32 where the dot is int8). SPAN 0 means: one span along all of K.

Columns beyond K: x counts as 0 there, codes and scales are read from padding or from the last
group. Rows beyond N read the last panel, tokens beyond M the last token; neither is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lath.kernels.linear.triton_decode import column_order, decode_tile
from lath.kernels.linear.triton_tables import e4m3_to_fp32

# Tiles of y in this many rows of tiles run one after another, so that they share weights in cache.
_TILES_TOGETHER = tl.constexpr(8)


@triton.jit
def by_row(vector, SWAP: tl.constexpr):
    """A value per row of the weight, to be broadcast over a tile of y ([BN, BM] if SWAP)."""
    if SWAP:
        return vector[:, None]
    else:
        return vector[None, :]


@triton.jit
def rows_of_tile(first_row, padded_rows, blocks, BLOCK_N: tl.constexpr):
    """Two int32 [BLOCK_N]: the rows of a tile, and where they begin in its planes (in rows)."""
    lane = tl.arange(0, BLOCK_N)
    panel = tl.minimum(lane // 16, padded_rows // 16 - 1 - first_row // 16)
    return first_row + panel * 16 + lane % 16, panel * (blocks * 16) + lane % 16


@triton.jit
def group_of(column, groups, GROUP: tl.constexpr):
    """The group of a column, int64; a column of the padding counts to the last group."""
    if GROUP == 0:
        return tl.cast(column * 0, tl.int64)
    else:
        return tl.minimum(column // GROUP, groups - 1).to(tl.int64)


@triton.jit
def outer_scale(outer, row, OUTER: tl.constexpr):
    """What every stored scale of a row is multiplied by: fp32 per "row", for "all", or "none"."""
    if OUTER == "row":
        return tl.load(outer + row).to(tl.float32)
    elif OUTER == "all":
        return tl.load(outer)
    else:
        return row


@triton.jit
def scale_and_zero(
    scales, zeros, at, outer, SCALE: tl.constexpr, OUTER: tl.constexpr, ZERO: tl.constexpr
):
    """fp32 scale and stored zero of each row, at offsets `at`. outer: of `outer_scale`.

    SCALE: "number" (fp16, fp32 or uint8), "e8m0" or "e4m3" (bytes): read as they are stored;
    "none": 1. The product with the outer scale is rounded once, as the codec defines it.
    """
    if SCALE == "none":
        one = tl.full(at.shape, 1.0, tl.float32)
        return one, one
    scale = tl.load(scales + at)
    if SCALE == "e8m0":
        # Byte 0 is 2**-127, the subnormal with its highest bit alone.
        scale = tl.maximum(scale.to(tl.uint32) << 23, 1 << 22).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        scale = e4m3_to_fp32(scale)
    else:
        scale = scale.to(tl.float32)
    if OUTER != "none":
        scale = scale * outer
    if ZERO == "none":
        return scale, scale
    else:
        return scale, tl.load(zeros + at)


@triton.jit
def weigh(part, sums, scale, zero, UNIT: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr):
    """Scale and zero point of one span: part Σ x D and sums Σ x to fp32.

    scale, zero, sums: broadcastable to part. OFFSET: base - zero_code if ZERO is "none", base
    otherwise; a whole number where part is int32, but for one bit.
    """
    if ZERO == "none" and OFFSET == 0:
        return part.to(tl.float32) * (scale * UNIT)
    if OFFSET != OFFSET // 1:
        part = part.to(tl.float32)
        sums = sums.to(tl.float32)
    if UNIT != 1:
        part = part * UNIT
    if ZERO == "integer":
        part += sums * (tl.full((1, 1), OFFSET, tl.float32) - zero.to(tl.float32)).to(part.dtype)
    elif OFFSET != 0:
        part += sums * tl.full((1, 1), OFFSET, part.dtype)
    value = part.to(tl.float32) * scale
    if ZERO == "float":
        value += sums.to(tl.float32) * zero.to(tl.float32)
    return value


@triton.jit
def _tile_of(program, tiles_m, tiles_n):
    """Row and column of the tile of a program: down a few rows of tiles, then to the right."""
    group = program // (_TILES_TOGETHER * tiles_n)
    first = group * _TILES_TOGETHER
    height = tl.minimum(tiles_m - first, _TILES_TOGETHER)
    inside = program - group * (_TILES_TOGETHER * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    """A tile of y, fp32."""
    if SWAP:
        return tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        return tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def _multiply(
    part,
    x,
    weight,
    column,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    LOCATE: tl.constexpr,
    DECODE: tl.constexpr,
    FORM: tl.constexpr,
    WIDTHS: tl.constexpr,
    MASKED: tl.constexpr,
    SWAP: tl.constexpr,
):
    """part + x times the weights in COUNT columns from column + FIRST, DEPTH columns a dot.

    x: (pointer, offsets of a tile, its column order, K). weight: as `block_planes` takes it, which
    LOCATE is, or what takes its place for other layouts.
    column: the first of this step. BLOCK, RUN: columns of a block of the weight, of a
    run of the decoder.
    """
    for i in tl.static_range(COUNT // DEPTH):
        # The last step may reach into a block that is not there; x is 0 in it.
        block = tl.minimum(column // BLOCK + (FIRST + i * DEPTH) // BLOCK, weight[4] - 1)
        planes = LOCATE(weight, block, WIDTHS)
        numbers = decode_tile(
            planes,
            weight[2],
            (FIRST + i * DEPTH) % BLOCK // RUN,
            DEPTH // RUN,
            DECODE,
            FORM,
            WIDTHS,
        )
        pointers = x[0] + (column + (FIRST + i * DEPTH)) + x[1]
        if MASKED:
            inside = column + (FIRST + i * DEPTH) + x[2] < x[3]
            values = tl.load(pointers, mask=by_row(inside, SWAP), other=0)
        else:
            values = tl.load(pointers)
        left, right = (numbers, values) if SWAP else (values, tl.trans(numbers))
        if x[0].dtype.element_ty == tl.float8e4nv:
            # sm_90's tensor core adds such products with fewer bits than fp32 has: no further than
            # the columns of one dot.
            part += tl.dot(left, right)
        else:
            part = tl.dot(left, right, part, input_precision="ieee")
    return part


@triton.jit
def matmul_kernel(
    x,
    codes,
    scales,
    zeros,
    outer,
    table,
    x_scales,
    x_sums,
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
    RUN: tl.constexpr,
    DEPTH: tl.constexpr,
    SUMS: tl.constexpr,
    MASKED: tl.constexpr,
    BIAS: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of y, or of one piece of K (program axis 1) of the fp32 workspace y [pieces, M, N].

    x: [M, >= K] with stride stride_x. codes, scales, zeros, outer: of a QTensor; GROUP 0: a scale
    per row. table: what a decoder looks codes up in (`triton_tables`). Of a SparseTensor codes is
    the bitmap, table the kept numbers and zeros the offsets of tiles (`triton_sparse`).
    x_scales: fp32 [x_groups, padded_tokens] (X_GROUP 0: per token, -1: none). x_sums: where SUMS,
    [spans, padded_tokens] sums of x over SPAN columns (BLOCK_K if SPAN is 0).
    """
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    token = first_m + tl.arange(0, BLOCK_M)
    row, plane_rows = rows_of_tile(first_n, padded_rows, blocks, BLOCK_N)
    weight = (codes, first_n // 16, plane_rows, padded_rows, blocks, table, (zeros, row, groups))
    outer = outer_scale(outer, row, OUTER)
    order = column_order(DEPTH, WIDTHS) if RUN == 16 else tl.arange(0, DEPTH)
    present = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_m)
    x_offsets = by_row(present * stride_x, not SWAP) + by_row(order, SWAP)
    x_tile = (x + first_m.to(tl.int64) * stride_x, x_offsets, order, K)
    total = _zeros(BLOCK_M, BLOCK_N, SWAP)
    nothing = total
    if x.dtype.element_ty == tl.int8:
        nothing = total.to(tl.int32)
    part = nothing
    sums = tl.zeros((BLOCK_M,), x_sums.dtype.element_ty)
    steps = tl.cdiv(blocks * BLOCK, BLOCK_K)
    steps_each = tl.cdiv(steps, tl.num_programs(1))
    first_step = tl.program_id(1) * steps_each
    last_step = tl.minimum(first_step + steps_each, steps)
    # A stage count here, and not only in the launch, prefetches scales and sums as well.
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        column = step * BLOCK_K
        if SPAN == 0:
            part = _multiply(
                part, x_tile, weight, column, 0, BLOCK_K, DEPTH, BLOCK, RUN, LOCATE, DECODE,
                FORM, WIDTHS,
                MASKED, SWAP,
            )  # fmt: skip
            if SUMS:
                sums += tl.load(x_sums + tl.cast(step, tl.int64) * padded_tokens + token)
        else:
            for i in tl.static_range(BLOCK_K // SPAN):
                partial = _multiply(
                    nothing, x_tile, weight, column, i * SPAN, SPAN, DEPTH, BLOCK, RUN, LOCATE,
                    DECODE,
                    FORM, WIDTHS, MASKED, SWAP,
                )  # fmt: skip
                at = group_of(column + i * SPAN, groups, GROUP) * padded_rows + row
                scale, zero = scale_and_zero(scales, zeros, at, outer, SCALE, OUTER, ZERO)
                span_sums = sums
                if SUMS:
                    span = tl.cast(column // SPAN + i, tl.int64)
                    span_sums = tl.load(x_sums + span * padded_tokens + token)
                value = weigh(
                    partial, by_row(span_sums, not SWAP), by_row(scale, SWAP), by_row(zero, SWAP),
                    UNIT, OFFSET, ZERO,
                )  # fmt: skip
                if X_GROUP > 0:
                    x_group = group_of(column + i * SPAN, x_groups, X_GROUP)
                    x_scale = tl.load(x_scales + x_group * padded_tokens + token)
                    value *= by_row(x_scale, not SWAP)
                total += value
    if SPAN == 0:
        scale, zero = scale_and_zero(scales, zeros, row, outer, SCALE, OUTER, ZERO)
        total = weigh(
            part, by_row(sums, not SWAP), by_row(scale, SWAP), by_row(zero, SWAP),
            UNIT, OFFSET, ZERO,
        )  # fmt: skip
    if X_GROUP == 0:
        total *= by_row(tl.load(x_scales + token), not SWAP)
    row = first_n + tl.arange(0, BLOCK_N)
    if BIAS:
        total += by_row(tl.load(bias + row, mask=row < N, other=0).to(tl.float32), SWAP)
    tile = y + (tl.program_id(1).to(tl.int64) * M + first_m) * N
    offsets = by_row(tl.arange(0, BLOCK_M) * N, not SWAP) + by_row(row, SWAP)
    stored = by_row(token < M, not SWAP) & by_row(row < N, SWAP)
    tl.store(tile + offsets, total.to(y.dtype.element_ty), mask=stored)


@triton.jit
def reduce_kernel(
    pieces, bias, y, elements, N, PIECES: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """y = the sum of fp32 pieces [PIECES, elements], first to last, plus bias [N], rounded once."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(PIECES):
        total += tl.load(pieces + offset, mask=inside, other=0)
        pieces += elements
    if BIAS:
        total += tl.load(bias + offset % N, mask=inside, other=0).to(tl.float32)
    tl.store(y + offset, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def decode_kernel(
    codes,
    scales,
    zeros,
    outer,
    table,
    dense,
    N,
    K,
    padded_rows,
    blocks,
    groups,
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
    BLOCK_N: tl.constexpr,
):
    """dense [N, K] = the decoded weight: fp32 inside, rounded once. A program per block of K."""
    first_n, block = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    row, plane_rows = rows_of_tile(first_n, padded_rows, blocks, BLOCK_N)
    weight = (codes, first_n // 16, plane_rows, padded_rows, blocks, table, (zeros, row, groups))
    planes = LOCATE(weight, block, WIDTHS)
    outer = outer_scale(outer, row, OUTER)
    order = column_order(16, WIDTHS)
    lane = tl.arange(0, BLOCK_N)
    one = tl.full((1, 1), 1.0, tl.float32)
    for run in tl.static_range(BLOCK // 16):
        numbers = DECODE(planes, plane_rows, run, FORM, WIDTHS)
        column = block * BLOCK + run * 16
        at = group_of(column, groups, GROUP) * padded_rows + row
        scale, zero = scale_and_zero(scales, zeros, at, outer, SCALE, OUTER, ZERO)
        value = weigh(numbers, one, scale[:, None], zero[:, None], UNIT, OFFSET, ZERO)
        pointers = dense + first_n.to(tl.int64) * K + lane[:, None] * K + (column + order)[None, :]
        stored = (first_n + lane < N)[:, None] & (column + order < K)[None, :]
        tl.store(pointers, value.to(dense.dtype.element_ty), mask=stored)
