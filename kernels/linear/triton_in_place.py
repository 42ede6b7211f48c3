"""16-bit numbers of codes that are decoded where they stand in their words.

A field of up to 8 bits at the lower end of a 16-bit lane is, read as fp16, that whole number of the
smallest subnormals, and so it is in bf16, where the eighth bit is the lowest of the exponent and
the spacing still the same. So a mask and one multiply-add by a power of two, which takes off the
zero as well, make a number of a code: no shift but one of 8 bits for the upper half of a lane, no
exponent to be put in place. Every step is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lath.kernels.linear.triton_decode import HALVES, halves


@triton.jit
def _multiply_add(words, EXPONENT: tl.constexpr, addend, TYPE: tl.constexpr, PACKED: tl.constexpr):
    """The 16-bit numbers in `words` times 2**EXPONENT, plus addend.

    PACKED: both numbers of a word by one instruction, and words are returned. Triton 3.9 does not
    pair 16-bit operations on sm_80 itself, nor the sums of three planes anywhere; each of them then
    costs a conversion.
    """
    if PACKED and tl.float16 == TYPE:
        factor = tl.full(words.shape, ((EXPONENT + 15) << 10) * HALVES, tl.uint32)
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [words, factor, addend],
            dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    elif PACKED:
        factor = tl.full(words.shape, ((EXPONENT + 127) << 7) * HALVES, tl.uint32)
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [words, factor, addend],
            dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        numbers = halves(words).to(TYPE, bitcast=True)
        return numbers * tl.full((1, 1), 2.0**EXPONENT, TYPE) + addend


@triton.jit
def _fields(
    plane, rows, FIRST: tl.constexpr, COUNT: tl.constexpr, UPPER: tl.constexpr, WIDTH: tl.constexpr
):
    """Fields of COUNT words where they stand in the lower byte of both lanes: uint32 [rows, COUNT].

    FIRST: as in `triton_decode._plane`. UPPER: of the upper byte, which is moved down. Of a 1-bit
    plane the two halves of a run are brought to one bit.
    """
    WORDS: tl.constexpr = 4 * WIDTH
    SLOT: tl.constexpr = WIDTH * (FIRST // WORDS)
    AT: tl.constexpr = SLOT // 2 * 2 if WIDTH == 1 else SLOT
    SHIFT: tl.constexpr = (8 if UPPER else 0) + SLOT - AT
    offsets = rows[:, None] * WORDS + (FIRST % WORDS + tl.arange(0, COUNT))[None, :]
    words = tl.load(plane + offsets).to(tl.uint32, bitcast=True)
    if SHIFT > 0:
        words >>= SHIFT
    return words & ((((1 << WIDTH) - 1) * HALVES) << AT)


@triton.jit
def _add_plane(
    numbers,
    plane,
    rows,
    RUN: tl.constexpr,
    UP: tl.constexpr,
    WIDTH: tl.constexpr,
    IN_HALVES: tl.constexpr,
    TYPE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """numbers plus the codes of a run in a plane times 2**UP of its type's smallest subnormal.

    IN_HALVES: in the order of `triton_decode.eight_words` where there is a 1-bit plane.
    """
    FIRST: tl.constexpr = 8 * (RUN // 2)
    if IN_HALVES:
        left = _fields(plane, rows, FIRST, 4, RUN % 2, WIDTH)
        right = _fields(plane, rows, FIRST + 4, 4, RUN % 2, WIDTH)
        words = tl.reshape(tl.join(left, right), (left.shape[0], 8))
    else:
        words = _fields(plane, rows, FIRST, 8, RUN % 2, WIDTH)
    SLOT: tl.constexpr = WIDTH * (FIRST // (4 * WIDTH))
    # The largest power of two of fp16 is 2**15.
    LIFT: tl.constexpr = max(UP - SLOT - 15, 0) if tl.float16 == TYPE else 0
    return _multiply_add(words << LIFT, UP - SLOT - LIFT, numbers, TYPE, PACKED)


@triton.jit
def _numbers_in_place(
    planes,
    rows,
    RUN: tl.constexpr,
    FORM: tl.constexpr,
    WIDTHS: tl.constexpr,
    TYPE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Run RUN (16 columns) of a block: q / 2**FORM[1] - FORM[0], TYPE [rows, 16], ordered by
    `column_order`."""
    UP: tl.constexpr = (24 if tl.float16 == TYPE else 133) - FORM[1]
    numbers = tl.full((1, 1), -FORM[0], TYPE)
    if PACKED:
        pair = numbers.to(tl.uint16, bitcast=True).to(tl.uint32) * HALVES
        numbers = tl.broadcast_to(pair, (rows.shape[0], 8))
    numbers = _add_plane(
        numbers, planes[0], rows, RUN, UP, WIDTHS[0], WIDTHS[3], TYPE, PACKED
    )  # fmt: skip
    if WIDTHS[1] > 0:
        numbers = _add_plane(
            numbers, planes[1], rows, RUN, UP + WIDTHS[0], WIDTHS[1], WIDTHS[3], TYPE, PACKED
        )  # fmt: skip
    if WIDTHS[2] > 0:
        numbers = _add_plane(
            numbers, planes[2], rows, RUN, UP + WIDTHS[0] + WIDTHS[1], WIDTHS[2], WIDTHS[3], TYPE,
            PACKED,
        )  # fmt: skip
    return halves(numbers).to(TYPE, bitcast=True) if PACKED else numbers


@triton.jit
def decode_fp16(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: fp16 [rows, 16]."""
    return _numbers_in_place(planes, rows, RUN, FORM, WIDTHS, tl.float16, False)


@triton.jit
def decode_fp16_packed(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """`decode_fp16` in instructions for two numbers at once."""
    return _numbers_in_place(planes, rows, RUN, FORM, WIDTHS, tl.float16, True)


@triton.jit
def decode_bf16_packed(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """`decode_bf16` in instructions for two numbers at once."""
    return _numbers_in_place(planes, rows, RUN, FORM, WIDTHS, tl.bfloat16, True)


@triton.jit
def decode_bf16(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: bf16 [rows, 16]."""
    return _numbers_in_place(planes, rows, RUN, FORM, WIDTHS, tl.bfloat16, False)
