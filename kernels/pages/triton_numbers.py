"""Rounding that is the definition's bit for bit on every architecture, and codes in words.

Nothing here needs an instruction that some GPU lacks: E4M3 is rounded with integer arithmetic. What
rounds (`rint`, `round_e4m3`) must be compiled without fused multiply-add where its argument is a
product.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding 1.5 * 2**23 to a fp32 number below 2**22 rounds it to an integer, half to even, and leaves
# that integer in the low bits: no conversion instruction.
_ROUND = tl.constexpr(12582912.0)
_ROUND_BITS = tl.constexpr(0x4B400000)
_SMALLEST_NORMAL = tl.constexpr(0.015625)  # of E4M3


@triton.jit
def rint_bits(x):
    """int32 whose low 22 bits are x rounded to an integer, half to even; |x| < 2**21."""
    return (x + _ROUND).to(tl.int32, bitcast=True)


@triton.jit
def rint(x):
    """int32: x rounded to an integer, half to even; |x| < 2**21, and finite."""
    return rint_bits(x) - _ROUND_BITS


@triton.jit
def round_float8(x, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr):
    """fp32 x rounded to a float of MANTISSA bits, half to even, as fp32; x is finite and rounds to
    no more than the largest. SMALLEST: the smallest normal number."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.int32, bitcast=True)
    odd = (bits >> DROPPED) & 1
    half: tl.constexpr = (1 << (DROPPED - 1)) - 1
    normal = ((bits + half + odd) & -(1 << DROPPED)).to(tl.float32, bitcast=True)
    # Adding this rounds to the step of the subnormal numbers.
    ROUND: tl.constexpr = 12582912.0 * SMALLEST / (1 << MANTISSA)
    subnormal = (x + ROUND) - ROUND
    return tl.where(tl.abs(x) >= SMALLEST, normal, subnormal)


@triton.jit
def round_e4m3(x):
    """fp32 x rounded to E4M3, half to even, as fp32; |x| below 464, and finite."""
    return round_float8(x, 3, _SMALLEST_NORMAL)


@triton.jit
def round_e5m2(x):
    """fp32 x rounded to E5M2, half to even, as fp32; |x| below 61440, and finite."""
    return round_float8(x, 2, 6.103515625e-05)


@triton.jit
def encode_e4m3(x):
    """int32 in 0 .. 255: the E4M3 code of x, rounded; |x| below 464, and finite."""
    rounded = tl.abs(round_e4m3(x))
    normal = (rounded.to(tl.int32, bitcast=True) >> 20) - 960  # the exponent's bias: 127 - 7
    code = tl.where(rounded >= _SMALLEST_NORMAL, normal, rint(rounded * 512.0))
    return code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def decode_e4m3(codes):
    """uint8 E4M3 codes as fp16, exact; a NaN code comes out as a number above 448."""
    wide = codes.to(tl.uint16)
    # The fields in their places in fp16; the exponents' biases differ by 8.
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def bytes_of(words):
    """uint32 [R, C] -> int8 [R, 4C], the low byte of each word first."""
    low = tl.join(words.to(tl.uint8), (words >> 8).to(tl.uint8))
    high = tl.join((words >> 16).to(tl.uint8), (words >> 24).to(tl.uint8))
    both = tl.permute(tl.join(low, high), (0, 1, 3, 2))
    return tl.reshape(both, (words.shape[0], 4 * words.shape[1])).to(tl.int8, bitcast=True)
