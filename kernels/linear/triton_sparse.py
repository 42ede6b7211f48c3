"""The tile decoder of sparse weights: a bitmap and the kept numbers to a dense tile.

It stands in the loops where the decoder of packed planes does: `locate_kept` finds a block of 128
columns, the others decode runs of 16 columns of it (32 for an int8 dot). The place of a kept number
is the tile's offset, plus the bits of the tile's rows before its own, an exclusive sum over sixteen
counts once a block, plus the bits before its column: counts of whole words, and of the bits of its
word below it. Numbers are gathered; where there is no bit nothing is read and the number is 0. So
memory is read sparse and the tensor core multiplies a dense tile, as in Flash-LLM, but no thread
writes a tile of its own to shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def popcount(words):
    """How many bits of each uint32 are set; in the form that compilers know for one instruction."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    # The product wraps around: its highest byte is the sum of four.
    return tl.mul((words + (words >> 4)) & 0x0F0F0F0F, 0x01010101, sanitize_overflow=False) >> 24


@triton.jit
def _word(bitmap, rows, WORD: tl.constexpr):
    return tl.load(bitmap + rows * 4 + WORD).to(tl.uint32, bitcast=True)


@triton.jit
def locate_kept(weight, block, WIDTHS: tl.constexpr):
    """Of a block: its bitmap, a pointer to the first kept number of each row's tile, and how many
    kept numbers stand between that and the first of the row, int32.

    weight: as in `block_planes`; codes is the bitmap, table the kept numbers, zeros (the first of
    its last part) the offsets.
    """
    rows = weight[2]
    tile = weight[1].to(tl.int64) * weight[4] + block
    bitmap = weight[0] + tile * 64
    counts = tl.zeros(rows.shape, tl.uint32)
    for word in tl.static_range(4):
        counts += popcount(_word(bitmap, rows, word))
    by_panel = tl.reshape(counts.to(tl.int32), (rows.shape[0] // 16, 16))
    before = tl.reshape(tl.cumsum(by_panel, 1) - by_panel, (rows.shape[0],))
    first = tl.load(weight[6][0] + tile + rows // 16)
    if WIDTHS[0] == 4:
        return bitmap, weight[5] + (first >> 1), before + (first & 1).to(tl.int32)
    else:
        return bitmap, weight[5] + first, before


@triton.jit
def _kept(planes, rows, RUN: tl.constexpr, COUNT: tl.constexpr, WIDTHS: tl.constexpr):
    """COUNT columns of a block, run RUN of them: [rows, COUNT] int8, or the 16-bit numbers."""
    WORD: tl.constexpr = RUN * COUNT // 32
    before = planes[2]
    for passed in tl.static_range(WORD):
        before += popcount(_word(planes[0], rows, passed)).to(tl.int32)
    word = _word(planes[0], rows, WORD)
    if RUN * COUNT % 32 != 0:
        before += popcount(word & 0xFFFF).to(tl.int32)
        word = word >> 16
    column = tl.arange(0, COUNT).to(tl.uint32)[None, :]
    below = popcount(word[:, None] & ((tl.full((1, 1), 1, tl.uint32) << column) - 1))
    place = before[:, None] + below.to(tl.int32)
    is_kept = ((word[:, None] >> column) & 1) != 0
    if WIDTHS[0] == 4:
        halves = tl.load(planes[1][:, None] + (place >> 1), mask=is_kept, other=0)
        # The half byte moved to the top, and down again with its sign.
        top = (halves << (4 - (place & 1) * 4).to(tl.uint8)).to(tl.int8, bitcast=True)
        return top >> 4
    else:
        return tl.load(planes[1][:, None] + place, mask=is_kept, other=0)


@triton.jit
def kept_fp16(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: fp16 [rows, 16]; bf16 numbers rounded, beyond 65504 inf."""
    return _kept(planes, rows, RUN, 16, WIDTHS).to(tl.float16)


@triton.jit
def kept_bf16(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: bf16 [rows, 16]; fp16 numbers are rounded."""
    return _kept(planes, rows, RUN, 16, WIDTHS).to(tl.bfloat16)


@triton.jit
def kept_fp32(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: fp32 [rows, 16]."""
    return _kept(planes, rows, RUN, 16, WIDTHS).to(tl.float32)


@triton.jit
def kept_int8(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (32 columns) of a block: int8 [rows, 32]."""
    return _kept(planes, rows, RUN, 32, WIDTHS)
