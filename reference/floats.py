"""bfloat16 and 8-bit floats in NumPy, rounded to nearest, ties to even."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

E4M3_LARGEST = 448.0
# Largest number, smallest exponent (below it numbers are subnormal), bits of the mantissa.
_FLOATS = {"e4m3": (E4M3_LARGEST, -6, 3), "e5m2": (57344.0, -14, 2)}


def round_bfloat16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """x rounded to bfloat16, as fp32. NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(
        0xFFFF0000
    )
    return np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32))


def bfloat16_bits(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of x in bfloat16; x is rounded."""
    bits: NDArray[np.uint32] = np.ascontiguousarray(round_bfloat16(x)).view(np.uint32)
    return (bits >> np.uint32(16)).astype(np.uint16)


def from_bfloat16_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    wide = np.ascontiguousarray(bits.astype(np.uint32) << np.uint32(16))
    return wide.view(np.float32)


def round_float8(x: NDArray[np.floating], values: str) -> NDArray[np.float64]:
    """x rounded to "e4m3" or "e5m2" and saturated at ±448 or ±57344, as float64. x must be
    finite."""
    largest, smallest, mantissa = _FLOATS[values]
    x64 = np.asarray(x, np.float64)
    exponent = np.frexp(x64)[1] - 1  # |x| = 1.f * 2**exponent
    step = np.ldexp(1.0, np.maximum(exponent, smallest) - mantissa)
    rounded: NDArray[np.float64] = np.clip(np.rint(x64 / step) * step, -largest, largest)
    return rounded


def round_e4m3(x: NDArray[np.floating]) -> NDArray[np.float64]:
    """x rounded to E4M3 and saturated at ±448, as float64. x must be finite."""
    return round_float8(x, "e4m3")


def e4m3_values() -> NDArray[np.float64]:
    """The value of each of the 256 codes; 0x7F and 0xFF are NaN."""
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    subnormal = np.ldexp(mantissa.astype(np.float64), -9)
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = sign * np.where(exponent == 0, subnormal, normal)
    values[[0x7F, 0xFF]] = np.nan
    return values


def encode_e4m3(x: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The codes of x, rounded; zeros get the sign of x."""
    positive = e4m3_values()[:0x7F]
    magnitude = np.searchsorted(positive, np.abs(round_e4m3(x))).astype(np.uint8)
    sign: NDArray[np.uint8] = np.where(np.signbit(x), np.uint8(0x80), np.uint8(0)).astype(np.uint8)
    return magnitude | sign


def decode_e4m3(codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    return e4m3_values()[codes]
