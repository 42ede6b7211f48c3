"""Tile decoders of five ternary codes a byte ("base3", `lath.formats.packing`).

A byte c is a fraction c / 256 whose digits in base 3 are its codes. In a 16-bit lane, three times
what stands behind the point of slot j,

    rest = c * 3**j mod 256        3 * rest = 256 * code + next rest

has the code in its upper byte, next to where fp16 and bf16 want it: two multiplications for two
codes. The words are those of a 2-bit plane but for the slots, so that runs, their order and the
order of x are the same (`triton_decode`). What comes out is D = 1 + q / 4, or q - 1 for int8: the 1
is taken off as the multiplication's addend. It borrows from the lane above, of which what stands
behind the point is never 0, so that the code there does not notice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lath.kernels.linear.triton_decode import Encoding, halves, quarters

# The bit patterns of 1.0.
_ONE_FP32 = tl.constexpr(0x3F800000)
_ONE_FP16 = tl.constexpr(0x3C003C00)
_ONE_BF16 = tl.constexpr(0x3F803F80)
# The lower byte of both 16-bit lanes of a word.
_LOW = tl.constexpr(0x00FF00FF)
_ONES = tl.constexpr(0x01000100)  # 1 in the upper byte of both


def encoding(dot: str, centred: bool) -> Encoding:
    """q = unit * D + base of a dot in "fp16", "bf16", "fp32" or "int8"; centred: D less its 0."""
    if dot == "int8":
        return Encoding(1, 1, 0.0)
    return Encoding(4, -4, 1.25 if centred else 0.0)


@triton.jit
def _words(planes, rows):
    """The eight words of each row of a block: uint32 [rows, 8]."""
    offsets = rows[:, None] * 8 + tl.arange(0, 8)[None, :]
    return tl.load(planes[0] + offsets).to(tl.uint32, bitcast=True)


@triton.jit
def _tripled(lanes, SLOT: tl.constexpr, LESS: tl.constexpr):
    """Bytes in 16-bit lanes → the codes of a slot in the upper bytes, less LESS, over a rest."""
    lanes = lanes.to(tl.int32, bitcast=True)  # below 2**31 / 81, and below 0 when LESS is off
    if SLOT > 0:
        lanes = (lanes * (3**SLOT)) & _LOW
    return (lanes * 3 - LESS).to(tl.uint32, bitcast=True)


@triton.jit
def _half_run(planes, rows, RUN: tl.constexpr):
    """Run RUN (16 columns): its codes in the upper bytes of both 16-bit lanes of eight words."""
    return _tripled((_words(planes, rows) >> (8 * (RUN % 2))) & _LOW, RUN // 2, 0)


@triton.jit
def trits_fp16(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: fp16 [rows, 16], 1 + q / 4 less FORM."""
    codes = _half_run(planes, rows, RUN) & 0x03000300
    numbers = halves(codes | _ONE_FP16).to(tl.float16, bitcast=True)
    if FORM > 0:
        numbers = numbers - tl.full((1, 1), FORM, tl.float16)
    return numbers


@triton.jit
def trits_bf16(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: bf16 [rows, 16], 1 + q / 4 less FORM."""
    codes = (_half_run(planes, rows, RUN) >> 3) & 0x00600060
    numbers = halves(codes | _ONE_BF16).to(tl.bfloat16, bitcast=True)
    if FORM > 0:
        numbers = numbers - tl.full((1, 1), FORM, tl.bfloat16)
    return numbers


@triton.jit
def trits_fp32(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: fp32 [rows, 16], 1 + q / 4 less FORM."""
    codes = _half_run(planes, rows, RUN)
    low, high = (codes & 0x0300) << 13, (codes & 0x03000000) >> 3
    both = tl.reshape(tl.join(low | _ONE_FP32, high | _ONE_FP32), (low.shape[0], 16))
    numbers = both.to(tl.float32, bitcast=True)
    if FORM > 0:
        numbers = numbers - FORM
    return numbers


@triton.jit
def trits_int8(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (32 columns) of a block: q - 1 as int8 [rows, 32], in the order of `decode_int8`."""
    words = _words(planes, rows)
    even = _tripled(words & _LOW, RUN, _ONES)
    odd = _tripled((words >> 8) & _LOW, RUN, _ONES)
    return quarters(((even >> 8) & _LOW) | (odd & 0xFF00FF00))
