"""Tile decoders that multiply codes by the scale of their group, where scales have 8 bits and the
product fits the type of the dot: then no scale changes along a row, and one dot sums all of K.

    "int8" scales (DGQ)    scale * (code - zero) in int8, summed in int32 across groups
    "fp8" scales (FireQ)   scale * (code - zero) rounded to E4M3, in E4M3 or a type that holds it

What is left, the scale of the row, is the loop's as for a codec without groups. The table that
`block_planes` hands on is the tensor of the groups' scales.

FORM: (number that is subtracted from a code, columns of a group or 0 for one, the longest run of
columns in a block with one scale), and for "fp8" the type of the dot.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from lath.formats import packing
from lath.formats.codec import PlanesCodec
from lath.kernels.linear.triton_decode import (
    HALVES,
    QUARTERS,
    halves,
    quarter_words,
    quarters,
)
from lath.kernels.linear.triton_in_place import decode_fp16
from lath.kernels.linear.triton_loops import group_of
from lath.kernels.linear.triton_tables import e4m3_to_fp32

Form = tuple[int | str, ...]


def form_of(codec: PlanesCodec, dot: str, columns: int) -> Form:
    """FORM of the decoder of a codec for a dot; -1 stands for zero points of the groups."""
    group = 0 if codec.group is None or codec.group >= columns else codec.group
    zero = -1 if codec.zero == "integer" else int(codec.zero_code)
    form = (zero, group, math.gcd(packing.BLOCK, group))
    return (*form, dot) if codec.scale_dtype == "fp8" else form


@triton.jit
def _places(side, COLUMN: tl.constexpr, FORM: tl.constexpr):
    """Where the scales of the rows stand, for column COLUMN of a block."""
    first: tl.constexpr = COLUMN // FORM[2] * FORM[2]
    return group_of(side[3] * 128 + first, side[2], FORM[1]) * side[4] + side[1]


@triton.jit
def scaled_int8(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (32 columns) of a block: scale * (code - zero), int8 [rows, 32], as `decode_int8`.

    Four products at once: each byte holds at most 225, and with 128 - scale * zero (not negative)
    added it lies in 1 .. 255, so that nothing is carried from a byte to the next.
    """
    codes = quarter_words(planes, rows, RUN, WIDTHS)
    at = _places(planes[4], RUN * 32, FORM)
    scale = tl.load(planes[3] + at).to(tl.uint32)
    if FORM[0] < 0:
        zero = tl.load(planes[4][0] + at).to(tl.uint32)
    else:
        zero = tl.full((1,), FORM[0], tl.uint32)
    offset = (128 - scale * zero) * QUARTERS
    return quarters((codes * scale[:, None] + offset[:, None]) ^ 0x80808080)


@triton.jit
def scaled_e4m3(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: E4M3(scale * (code - zero)) in the type of the dot.

    The product has at most 8 bits: exact in fp16. It is a multiple of the least E4M3 number, as the
    scale is, so that only its mantissa can need rounding.
    """
    UNIT: tl.constexpr = 1 << (WIDTHS[0] + WIDTHS[1] + WIDTHS[2])
    # The exponents of `triton_decode.encoding`; scale * UNIT is what fp16 holds of every scale.
    EXPONENT: tl.constexpr = 9 + (WIDTHS[0] if WIDTHS[1] > 0 else 0)
    codes = decode_fp16(planes, rows, RUN, (FORM[0] / 2**EXPONENT, EXPONENT), WIDTHS)
    codes = codes * tl.full((1, 1), 2**EXPONENT / UNIT, tl.float16)
    at = _places(planes[4], RUN * 16, FORM)
    scale = (e4m3_to_fp32(tl.load(planes[3] + at)) * UNIT).to(tl.float16)
    numbers = codes * scale[:, None]
    if FORM[3] == "e4m3":
        return numbers.to(tl.float8e4nv)
    else:
        # Two at once: neither rounds up beyond its 16 bits.
        low, high = tl.split(tl.reshape(numbers.to(tl.uint16, bitcast=True), (rows.shape[0], 8, 2)))
        words = low.to(tl.uint32) | (high.to(tl.uint32) << 16)
        words = (words + 0x003F003F + ((words >> 7) & HALVES)) & 0xFF80FF80
        rounded = halves(words).to(tl.float16, bitcast=True)
        if FORM[3] == "bf16":
            return rounded.to(tl.bfloat16)
        elif FORM[3] == "fp32":
            return rounded.to(tl.float32)
        else:
            return rounded


@triton.jit
def bytes_e4m3(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (32 columns) of a block of E4M3 codes, as they are, ordered as `decode_int8`."""
    return quarters(quarter_words(planes, rows, RUN, WIDTHS)).to(tl.float8e4nv, bitcast=True)
