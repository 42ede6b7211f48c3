"""The tile decoder of whole numbers: words of packed planes to numbers that a dot multiplies.

Codes that stand for the entries of a table have theirs in `triton_tables`. A decoder is put
together from constexpr parameters (WIDTHS: bits of the three planes, 0 for an absent one, then
whether one of them is a 1-bit plane of codes; FORM: what else it must know of the codec, here the
number to subtract) and handed to the loops as a
constexpr function. Its unit is a *run*: 16 columns of a row for floats, 32 for int8. A code is cut
out of a word with a shift by a constant and a mask, for two or four codes at once, and the planes
of a split code are OR-ed; no code moves between lanes. Runs are then put side by side, which only
renames registers, so that a dot meets x in one piece.

What comes out is not the code q but a number D with q = unit * D + base (`encoding`), whichever is
the cheapest to build:

    fp16, bf16   D = q / 2**e              exact, from the field where it stands in its word
    fp32         D = 1 + q / 2**bits       exact (bf16 on AMD likewise; 8 bits: D = q - 128)
    int8         D = q                     (8 bits: D = q - 128)

A symmetric codec may subtract its constant zero here (FORM), exactly; any other zero point, and
that one where subtracting is dear, is folded into the fp32 sums through sums of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from lath.formats import values as value_tables
from lath.formats.codec import PlanesCodec

# Copies of one 16-bit (8-bit) pattern in a word.
HALVES = tl.constexpr(0x00010001)
QUARTERS = tl.constexpr(0x01010101)
# The bit patterns of 1.0, and of 128 and 256 in bf16.
_ONE_FP32 = tl.constexpr(0x3F800000)
_ONE_BF16 = tl.constexpr(0x3F803F80)
_128_BF16 = tl.constexpr(0x43004300)
_256_BF16 = tl.constexpr(0x43804380)


@dataclass(frozen=True)
class Encoding:
    """How a dot type represents a code: q = unit * D + base; then `centre` is subtracted from D.

    exponent: log2 of unit where a code is decoded in place, else None.
    """

    unit: float
    base: int
    centre: float
    exponent: int | None = None


def encoding(codec: PlanesCodec, dot: str, centred: bool = True, in_place: bool = True) -> Encoding:
    """The encoding of `codec` for a dot in "fp16", "bf16", "fp32" or "int8".

    centred: let the decoder subtract the zero of a symmetric codec where D is a float. in_place:
    whether the target has 16-bit arithmetic to decode bf16 with. Of a table D is the entry itself,
    for "int8" the entry in its unit.
    """
    if codec.is_table:
        return Encoding(value_tables.UNITS[codec.values] if dot == "int8" else 1, 0, 0.0)
    if dot == "int8":
        return Encoding(1, 128 if codec.bits == 8 else 0, 0.0)
    zero = codec.zero_code if centred and codec.zero == "none" else None
    if dot == "fp16" or (dot == "bf16" and in_place):
        # The power of two from a plane's subnormals to D should be a number of the type for a plane
        # at bit 0; D itself must be no subnormal, which AMD's matrix cores flush.
        above = codec.bits - codec.plane_widths[-1]
        exponent = min(14, 9 + above) if dot == "fp16" else 6 + above
        unit = 1 << exponent
        return Encoding(unit, 0, 0.0 if zero is None else zero / unit, exponent)
    if codec.bits == 8 and dot == "bf16":
        return Encoding(1, 128, 0.0)
    unit = 1 << codec.bits
    return Encoding(unit, -unit, 0.0 if zero is None else 1.0 + zero / unit)


@triton.jit
def _field(words, WIDTH: tl.constexpr, AT: tl.constexpr, TO: tl.constexpr, LANES: tl.constexpr):
    """The fields of WIDTH bits at bit AT of each lane of a word, moved to bit TO."""
    if TO >= AT:
        moved = words << (TO - AT)
    else:
        moved = words >> (AT - TO)
    return moved & ((((1 << WIDTH) - 1) * LANES) << TO)


@triton.jit
def _side_by_side(left, right):
    """[R, C], [R, C] -> [R, 2C]: the columns of left, then those of right."""
    both = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(both, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def halves(words):
    """uint32 [R, C] -> uint16 [R, 2C]."""
    both = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    return tl.reshape(both, (words.shape[0], 2 * words.shape[1]))


@triton.jit
def quarters(words):
    """uint32 [R, C] -> int8 [R, 4C]."""
    low = tl.join(words.to(tl.uint8), (words >> 8).to(tl.uint8))
    high = tl.join((words >> 16).to(tl.uint8), (words >> 24).to(tl.uint8))
    both = tl.permute(tl.join(low, high), (0, 1, 3, 2))
    return tl.reshape(both, (words.shape[0], 4 * words.shape[1])).to(tl.int8, bitcast=True)


@triton.jit
def _plane(
    plane,
    rows,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    BIT: tl.constexpr,
    TO: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Fields of COUNT words of each row; the first belongs to column pair FIRST of the block.

    Slots of one word are 4 * WIDTH pairs apart. The same words are loaded again for each slot: the
    compiler merges equal loads.
    """
    WORDS: tl.constexpr = 4 * WIDTH
    offsets = rows[:, None] * WORDS + (FIRST % WORDS + tl.arange(0, COUNT))[None, :]
    words = tl.load(plane + offsets).to(tl.uint32, bitcast=True)
    return _field(words, WIDTH, BIT + WIDTH * (FIRST // WORDS), TO, LANES)


@triton.jit
def _planes(
    planes,
    rows,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    BIT: tl.constexpr,
    TO: tl.constexpr,
    LANES: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Codes at bit TO of each lane of COUNT words, all planes together: uint32 [rows, COUNT]."""
    codes = _plane(planes[0], rows, FIRST, COUNT, BIT, TO, LANES, WIDTHS[0])
    if WIDTHS[1] > 0:
        codes |= _plane(planes[1], rows, FIRST, COUNT, BIT, TO + WIDTHS[0], LANES, WIDTHS[1])
    if WIDTHS[2] > 0:
        codes |= _plane(
            planes[2], rows, FIRST, COUNT, BIT, TO + WIDTHS[0] + WIDTHS[1], LANES, WIDTHS[2]
        )
    return codes


@triton.jit
def eight_words(
    planes,
    rows,
    RUN: tl.constexpr,
    HALF: tl.constexpr,
    TO: tl.constexpr,
    LANES: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Codes of a run of 16 columns in eight words, uint32 [rows, 8], ordered by `column_order`.

    LANES 0x10001: both codes of each column pair; 1: the code in half HALF of each.
    """
    FIRST: tl.constexpr = 8 * (RUN // 2)
    BIT: tl.constexpr = 8 * (RUN % 2) + 16 * HALF
    if WIDTHS[3]:
        # A row has four words in a 1-bit plane: two slots of each make up the eight pairs. They
        # stay beside each other, where the thread that loaded the word needs them.
        left = _planes(planes, rows, FIRST, 4, BIT, TO, LANES, WIDTHS)
        right = _planes(planes, rows, FIRST + 4, 4, BIT, TO, LANES, WIDTHS)
        return tl.reshape(tl.join(left, right), (left.shape[0], 8))
    else:
        return _planes(planes, rows, FIRST, 8, BIT, TO, LANES, WIDTHS)


@triton.jit
def quarter_words(planes, rows, RUN: tl.constexpr, WIDTHS: tl.constexpr):
    """Codes of a run of 32 columns, four in each of eight words, ordered as in `decode_int8`."""
    if WIDTHS[3]:
        left = _planes(planes, rows, 8 * RUN, 4, 0, 0, QUARTERS, WIDTHS)
        right = _planes(planes, rows, 8 * RUN + 4, 4, 0, 0, QUARTERS, WIDTHS)
        return _side_by_side(left, right)
    else:
        return _planes(planes, rows, 8 * RUN, 8, 0, 0, QUARTERS, WIDTHS)


@triton.jit
def column_order(COUNT: tl.constexpr, WIDTHS: tl.constexpr):
    """int32 [COUNT]: the column at each position of COUNT 16-bit numbers that were decoded."""
    position = tl.arange(0, COUNT)
    if WIDTHS[3]:
        inside = (position // 2) % 2 * 8 + (position // 4) % 4 * 2 + position % 2
        return position // 16 * 16 + inside
    else:
        return position


@triton.jit
def decode_fp32(
    planes,
    rows,
    RUN: tl.constexpr,
    FORM: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Run RUN (16 columns) of a block: fp32 [rows, 16]."""
    TO: tl.constexpr = 23 - (WIDTHS[0] + WIDTHS[1] + WIDTHS[2])
    low = eight_words(planes, rows, RUN, 0, TO, 1, WIDTHS) | _ONE_FP32
    high = eight_words(planes, rows, RUN, 1, TO, 1, WIDTHS) | _ONE_FP32
    both = tl.reshape(tl.join(low, high), (low.shape[0], 16))
    numbers = both.to(tl.float32, bitcast=True)
    if FORM > 0:
        numbers = numbers - FORM
    return numbers


@triton.jit
def decode_bf16_by_exponent(
    planes,
    rows,
    RUN: tl.constexpr,
    FORM: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """`decode_bf16` for targets without bf16 arithmetic, where a product takes six instructions."""
    if WIDTHS[0] + WIDTHS[1] + WIDTHS[2] == 8:
        # bf16 has 8 bits of precision: 128 + (q mod 128) is exact, and so is its distance to 128
        # or 256, whichever makes it q - 128.
        codes = eight_words(planes, rows, RUN, 0, 0, HALVES, WIDTHS)
        low = halves((codes & 0x007F007F) | _128_BF16).to(tl.bfloat16, bitcast=True)
        return low - halves((codes & 0x00800080) ^ _256_BF16).to(tl.bfloat16, bitcast=True)
    else:
        TO: tl.constexpr = 7 - (WIDTHS[0] + WIDTHS[1] + WIDTHS[2])
        codes = eight_words(planes, rows, RUN, 0, TO, HALVES, WIDTHS)
        numbers = halves(codes | _ONE_BF16).to(tl.bfloat16, bitcast=True)
        if FORM > 0:
            numbers = numbers - tl.full((1, 1), FORM, tl.bfloat16)
        return numbers


@triton.jit
def decode_int8(
    planes,
    rows,
    RUN: tl.constexpr,
    FORM: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Run RUN (32 columns) of a block: int8 [rows, 32], in the order of the int8 row quantiser."""
    codes = quarter_words(planes, rows, RUN, WIDTHS)
    if WIDTHS[0] + WIDTHS[1] + WIDTHS[2] == 8:
        codes = codes ^ 0x80808080
    return quarters(codes)


@triton.jit
def decode_int8_opaque(
    planes,
    rows,
    RUN: tl.constexpr,
    FORM: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """`decode_int8` for NVIDIA: a move that LLVM does not see through.

    It would take each byte out of the loaded word by a shift of its own; ptxas drops the move.
    """
    codes = quarter_words(planes, rows, RUN, WIDTHS)
    if WIDTHS[0] + WIDTHS[1] + WIDTHS[2] == 8:
        codes = codes ^ 0x80808080
    if WIDTHS[0] < 8:
        codes = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [codes], dtype=tl.uint32, is_pure=True, pack=1
        )
    return quarters(codes)


@triton.jit
def decode_tile(
    planes,
    rows,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    DECODE: tl.constexpr,
    FORM: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Runs FIRST .. FIRST + COUNT (a power of two) of a block, side by side."""
    if COUNT == 1:
        return DECODE(planes, rows, FIRST, FORM, WIDTHS)
    else:
        return _side_by_side(
            decode_tile(planes, rows, FIRST, COUNT // 2, DECODE, FORM, WIDTHS),
            decode_tile(planes, rows, FIRST + COUNT // 2, COUNT // 2, DECODE, FORM, WIDTHS),
        )


@triton.jit
def block_planes(weight, block, WIDTHS: tl.constexpr):
    """Where a block begins in each plane of the flat tensor of codes, the table, and what finds the
    scale of a group: (zeros, rows of the weight, groups, block, padded rows).

    weight: (codes, panel, rows, padded rows, blocks, table, (zeros, rows of the weight, groups)),
    the panel that the tile begins with and where its rows begin (`rows_of_tile`).
    """
    # Per bit of plane width: 64 words in a block of 16 rows, 4 * padded_rows * blocks in all.
    before = (weight[1].to(tl.int64) * weight[4] + block) * 64
    size = weight[3].to(tl.int64) * weight[4] * 4
    first = weight[0] + before * WIDTHS[0]
    second = weight[0] + (size * WIDTHS[0] + before * WIDTHS[1])
    third = weight[0] + (size * (WIDTHS[0] + WIDTHS[1]) + before * WIDTHS[2])
    side = (weight[6][0], weight[6][1], weight[6][2], block, weight[3])
    return first, second, third, weight[5], side
