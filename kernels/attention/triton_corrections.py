"""What the attend loop needs of q beforehand: its codes, and q·mean of every row and page.

The correction is one number per row and page instead of one per score, from a product that is 1/64
of q·k. Rows are those of the attend loop's tiles, so that it reads all of this without a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lath.kernels.attention.triton_pages import place_of_list
from lath.kernels.pages.triton_numbers import rint, round_e4m3


@triton.jit
def _rounded(x, QUERY: tl.constexpr, SMALLEST: tl.constexpr):
    """fp32 rows [R, D] -> codes as fp32, scales [R]: the definition of activations, per row."""
    LARGEST: tl.constexpr = 127.0 if QUERY == "int8" else 448.0
    size = tl.abs(x)
    finite = size < float("inf")  # false for NaN too
    absmax = tl.max(tl.where(finite, size, 0.0), 1)
    broken = tl.max(tl.where(finite, 0, 1), 1) != 0
    usable = (absmax >= SMALLEST) & (broken == 0)
    safe = tl.where(usable, absmax, 1.0)
    largest = tl.full(safe.shape, LARGEST, tl.float32)
    inverse = tl.div_rn(largest, safe)
    scaled = tl.where(usable[:, None], x, 0.0) * inverse[:, None]
    if QUERY == "int8":
        codes = rint(scaled).to(tl.float32)
    else:
        codes = round_e4m3(scaled)
    scale = tl.where(usable, tl.div_rn(safe, largest), 1.0)
    return codes, tl.where(broken, float("nan"), scale)


@triton.jit
def _times_mean(x, mean):
    """x [R, D] times mean bf16 [D, P], exact products: x is the sum of one to three bf16."""
    if x.dtype == tl.bfloat16:
        return tl.dot(x, mean)
    else:
        first = x.to(tl.bfloat16)
        rest = x.to(tl.float32) - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        total = tl.dot(second, mean)
        if x.dtype == tl.float32:
            third = (rest - second.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(second, mean, tl.dot(third, mean))
        return tl.dot(first, mean, total)


@triton.jit
def prepare_kernel(
    q,
    query_lengths,
    query_offsets,
    means,
    extremes,
    numbers,
    lists,
    codes,
    scales,
    corrections,
    bounds,
    q_stride_b,
    q_stride_h,
    q_stride_l,
    heads,
    kv_heads,
    table_width,
    padded_rows,
    first_token,
    QUERY: tl.constexpr,
    INDEX: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BOUNDS: tl.constexpr,
    LISTS: tl.constexpr,
    PACKED: tl.constexpr,
    PACK: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Grid: tiles of rows, heads / PACK, sequences * tiles of pages. Without fused multiply-add.

    q [B, Hq, L, DIM] with strides. lists: of `page_lists`. means bf16*, extremes int8*,
    numbers fp32*: the index. INDEX: elements of an index row through the first two, where max and
    min begin, fp32 of a row, where its unit is. codes [S, Hq/PACK, padded_rows, PADDED], scales [S,
    Hq/PACK, padded_rows] (where q is rounded: QUERY "int8", "e4m3" or "e4m3-fp16"). corrections:
    q·mean, fp32 [S, Hq/PACK, table_width, padded_rows]. bounds: where BOUNDS, likewise, upper
    bounds of q·k; -inf for pages that have none.
    """
    block = tl.program_id(1)
    page_tiles = tl.cdiv(table_width, BLOCK_P)
    sequence, page_tile = tl.program_id(2) // page_tiles, tl.program_id(2) % page_tiles
    wide, kv_head = sequence.to(tl.int64), block * PACK // (heads // kv_heads)
    entry, count_at = place_of_list(lists, wide, kv_head, block, LISTS)
    rows, pages = tl.load(query_lengths + sequence), tl.load(lists[4] + count_at)
    offset, batch_row = sequence * 0, sequence
    if PACKED:
        offset, batch_row = tl.load(query_offsets + sequence), sequence * 0
    lane = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    token, head = first_token + lane // PACK, block * PACK + lane % PACK
    channel = tl.arange(0, BLOCK_D)
    base = q + batch_row.to(tl.int64) * q_stride_b + offset.to(tl.int64) * q_stride_l
    at = head.to(tl.int64) * q_stride_h + token.to(tl.int64) * q_stride_l
    inside = (token < rows)[:, None] & (channel < DIM)[None, :]
    x = tl.load(base + at[:, None] + channel[None, :], mask=inside, other=0.0)
    prepared = wide * (heads // PACK) + block
    lane = lane.to(tl.int64)
    rounded, scale = x.to(tl.float32), tl.full((BLOCK_R,), 1.0, tl.float32)
    if QUERY != "float":
        rounded, scale = _rounded(rounded, QUERY, SMALLEST)
        if page_tile == 0:
            own = prepared * padded_rows + lane
            pointers = codes + own[:, None] * PADDED + channel[None, :]
            fits = (lane < padded_rows)[:, None] & (channel < PADDED)[None, :]
            tl.store(pointers, rounded.to(codes.dtype.element_ty), mask=fits)
            tl.store(scales + own, scale, mask=lane < padded_rows)

    page = page_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    number = tl.load(lists[0] + entry + page, mask=page < pages, other=0)
    record = number.to(tl.int64) * kv_heads + kv_head
    there = (page < pages)[None, :] & (channel < DIM)[:, None]
    pointers = means + record[None, :] * INDEX[0] + channel[:, None]
    product = _times_mean(x, tl.load(pointers, mask=there, other=0.0))
    to = (prepared * table_width + page)[None, :] * padded_rows + lane[:, None]
    stored = (page < pages)[None, :] & (lane < padded_rows)[:, None]
    if QUERY != "float":
        tl.store(corrections + to, product, mask=stored)
    if BOUNDS:
        pointers = extremes + record[None, :] * INDEX[1] + channel[:, None]
        # All codes are exact in bf16; floats are rounded, and the bound is one to 2**-8 of itself.
        most = tl.load(pointers + INDEX[2], mask=there, other=0).to(tl.bfloat16)
        least = tl.load(pointers + INDEX[3], mask=there, other=0).to(tl.bfloat16)
        reach = tl.dot(tl.maximum(rounded, 0.0).to(tl.bfloat16), most)
        reach = tl.dot(tl.minimum(rounded, 0.0).to(tl.bfloat16), least, reach)
        unit = tl.load(numbers + record * INDEX[4] + INDEX[5], mask=page < pages, other=0.0)
        bound = product + unit[None, :] * scale[:, None] * reach
        tl.store(bounds + to, tl.where(bound == bound, bound, float("-inf")), mask=stored)


@triton.jit
def merge_kernel(
    outputs,
    logarithms,
    o,
    lse,
    rows,
    pieces,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Outputs fp32 [pieces, rows, DIM] of disjoint keys and their logarithms to base 2 [pieces,
    rows] -> o [rows, DIM], lse [rows] in natural units; the first piece first. A piece that read
    nothing has -inf, and its output is not taken."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < rows)[:, None] & (channel < DIM)
    largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    for piece in tl.range(0, pieces):
        at = row + tl.cast(piece, tl.int64) * rows
        own = tl.load(logarithms + at, mask=row < rows, other=float("-inf"))
        largest = tl.maximum(largest, own)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros((BLOCK_R,), tl.float32)
    summed = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for piece in tl.range(0, pieces):
        at = row + tl.cast(piece, tl.int64) * rows
        own = tl.load(logarithms + at, mask=row < rows, other=float("-inf"))
        weight = tl.exp2(own - shift)
        pointers = outputs + at[:, None] * DIM + channel
        part = tl.load(pointers, mask=inside & (own != float("-inf"))[:, None], other=0.0)
        total += weight
        summed += part * weight[:, None]
    divisor = tl.where(total == 0, 1.0, total)
    logarithm = tl.where(total == 0, float("-inf"), shift + tl.log2(divisor))
    tl.store(lse + row, logarithm * 0.6931471805599453, mask=row < rows)
    values = (summed / divisor[:, None]).to(o.dtype.element_ty)
    tl.store(o + row[:, None] * DIM + channel, values, mask=inside)
