"""Elementary functions and float8 of sixteen fp32 lanes."""

from __future__ import annotations

from typing import Any

from lath.kernels.simd.emitter import FLOATS, INTS, Emitter

# 2**f for |f| <= 1/2: Chebyshev interpolation, relative error below 2**-23; exact at 0.
_EXP2 = (
    1.0, 0.6931472067028329, 0.24022650922289554, 0.05550327226669895,
    0.00961805667843204, 0.0013400428177711937, 0.00015461444724808513,
)  # fmt: skip
_ROUND = 1.5 * 2.0**23  # added and taken away, it rounds to an integer
LN2 = 0.6931471805599453
LOG2E = 1.4426950408889634
_E4M3_BIAS = 120  # between the exponents of fp32 and E4M3
# Bits of the mantissa, smallest exponent of a normal number.
_FLOAT8 = {"e4m3": (3, -6), "e5m2": (2, -14)}


def exp2(e: Emitter, x: Any) -> Any:
    """2**x for x <= 0; 0 below 2**-126; NaN stays NaN."""
    b = e.builder
    small = b.fcmp_ordered("<", x, e.floats(-126.0))
    x = b.select(small, e.floats(-126.0), x)
    shifted = b.fadd(x, e.floats(_ROUND))
    fraction = b.fsub(x, b.fsub(shifted, e.floats(_ROUND)))
    value = e.floats(_EXP2[-1])
    for coefficient in _EXP2[-2::-1]:
        value = e.fma(value, fraction, e.floats(coefficient))
    exponent = b.add(b.bitcast(shifted, INTS), e.constant(127))
    power = b.bitcast(e.shift_left(exponent, 23), FLOATS)
    return b.select(small, e.floats(0.0), b.fmul(value, power))


def log2(e: Emitter, x: Any) -> Any:
    """log2(x) for normal x > 0; NaN stays NaN."""
    b = e.builder
    bits = b.bitcast(x, INTS)
    # The exponent is taken so that the mantissa lies in [sqrt(1/2), sqrt(2)).
    exponent = e.shift_right_signed(b.sub(bits, e.constant(0x3F3504F3)), 23)
    mantissa = b.bitcast(b.sub(bits, e.shift_left(exponent, 23)), FLOATS)
    one = e.floats(1.0)
    t = b.fdiv(b.fsub(mantissa, one), b.fadd(mantissa, one))
    square = b.fmul(t, t)
    series = e.floats(1 / 9)
    for denominator in (7, 5, 3, 1):
        series = e.fma(series, square, e.floats(1 / denominator))
    value = e.fma(b.fmul(t, series), e.floats(2 * LOG2E), e.to_floats(exponent))
    return b.select(b.fcmp_unordered("uno", x, x), x, value)


def tanh(e: Emitter, x: Any) -> Any:
    """tanh(x), absolute error below 2**-22."""
    b = e.builder
    sign = b.and_(b.bitcast(x, INTS), e.constant(-0x80000000))
    size = magnitude(e, x)
    t = exp2(e, b.fmul(size, e.floats(-2 * LOG2E)))
    value = b.fdiv(b.fsub(e.floats(1.0), t), b.fadd(e.floats(1.0), t))
    return b.bitcast(b.or_(b.bitcast(value, INTS), sign), FLOATS)


def magnitude(e: Emitter, x: Any) -> Any:
    bits = e.builder.and_(e.builder.bitcast(x, INTS), e.constant(0x7FFFFFFF))
    return e.builder.bitcast(bits, FLOATS)


def greater(e: Emitter, left: Any, right: Any) -> Any:
    """The larger of two; `right` where they do not compare."""
    return e.builder.select(e.builder.fcmp_ordered(">", left, right), left, right)


def round_float8(e: Emitter, x: Any, values: str) -> Any:
    """To the nearest number of "e4m3" or "e5m2", ties to even; |x| up to the largest of them."""
    b, (mantissa, smallest) = e.builder, _FLOAT8[values]
    dropped = 23 - mantissa
    bits = b.bitcast(x, INTS)
    odd = b.and_(e.shift_right(bits, dropped), e.constant(1))
    rounded = b.add(b.add(bits, odd), e.constant((1 << (dropped - 1)) - 1))
    normal = b.bitcast(b.and_(rounded, e.constant(-(1 << dropped))), FLOATS)
    # Below the smallest normal number all are multiples of the same step.
    step = e.floats(1.5 * 2.0 ** (23 + smallest - mantissa))
    subnormal = b.fsub(b.fadd(x, step), step)
    small = b.fcmp_ordered("<", magnitude(e, x), e.floats(2.0**smallest))
    return b.select(small, subnormal, normal)


def round_e4m3(e: Emitter, x: Any) -> Any:
    """To the nearest E4M3 number, ties to even; |x| <= 448."""
    return round_float8(e, x, "e4m3")


def encode_e4m3(e: Emitter, rounded: Any) -> Any:
    """The code of an E4M3 number, in int lanes."""
    b = e.builder
    bits = b.bitcast(rounded, INTS)
    sign = b.and_(e.shift_right(bits, 24), e.constant(0x80))
    size = magnitude(e, rounded)
    normal = b.sub(e.shift_right(b.bitcast(size, INTS), 20), e.constant(_E4M3_BIAS << 3))
    subnormal = e.nearest(b.fmul(size, e.floats(512.0)))
    small = b.fcmp_ordered("<", size, e.floats(2.0**-6))
    return b.or_(b.select(small, subnormal, normal), sign)


def decode_e4m3(e: Emitter, codes: Any) -> Any:
    """The number of an E4M3 code in int lanes; the NaN code, which no page holds, gives 480."""
    b = e.builder
    sign = e.shift_left(b.and_(codes, e.constant(0x80)), 24)
    bits = e.shift_left(b.and_(codes, e.constant(0x7F)), 20)
    value = b.fmul(b.bitcast(bits, FLOATS), e.floats(2.0**_E4M3_BIAS))
    return b.bitcast(b.or_(b.bitcast(value, INTS), sign), FLOATS)
