"""fp16 conversions in integer arithmetic, for machines that have no instruction for them.

Without one LLVM calls a support function that a compiled kernel cannot reach.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir

if TYPE_CHECKING:
    from lath.kernels.simd.emitter import Emitter

_INFINITY = 0x7F800000


def widen(e: Emitter, halves: Any) -> Any:
    """fp16 bits, zero-extended to int lanes → fp32 lanes; subnormals, infinities and NaN too."""
    magnitude = e.shift_left(e.builder.and_(halves, e.constant(0x7FFF)), 13)
    sign = e.shift_left(e.builder.and_(halves, e.constant(0x8000)), 16)
    # The exponent's bias differs by 112; a product with a power of two is exact.
    scaled = e.builder.fmul(_floats(e, magnitude), e.floats(2.0**112))
    special = e.builder.icmp_unsigned(">=", magnitude, e.constant(0x7C00 << 13))
    huge = e.builder.or_(magnitude, e.constant(_INFINITY))
    bits = e.builder.select(special, huge, _bits(e, scaled))
    return _floats(e, e.builder.or_(bits, sign))


def narrow(e: Emitter, floats: Any) -> Any:
    """fp32 lanes → fp16 bits in int lanes, rounded to nearest, ties to even."""
    bits = _bits(e, floats)
    sign = e.builder.and_(e.shift_right(bits, 16), e.constant(0x8000))
    magnitude = e.builder.and_(bits, e.constant(0x7FFFFFFF))
    odd = e.builder.and_(e.shift_right(magnitude, 13), e.constant(1))
    rebias = e.constant((0xFFF - (112 << 23)) & 0xFFFFFFFF)
    normal = e.shift_right(e.builder.add(e.builder.add(magnitude, odd), rebias), 13)
    # Below 2**-14 the sum with 1/2 leaves exactly the bits that a subnormal keeps.
    shifted = e.builder.fadd(_floats(e, magnitude), e.floats(0.5))
    subnormal = e.builder.sub(_bits(e, shifted), e.constant(0x3F000000))
    small = e.builder.icmp_unsigned("<", magnitude, e.constant(113 << 23))
    result = e.builder.select(small, subnormal, normal)
    overflow = e.builder.icmp_unsigned(">=", magnitude, e.constant(143 << 23))
    result = e.builder.select(overflow, e.constant(0x7C00), result)
    nan = e.builder.icmp_unsigned(">", magnitude, e.constant(_INFINITY))
    result = e.builder.select(nan, e.constant(0x7E00), result)
    return e.builder.or_(result, sign)


def _bits(e: Emitter, value: Any) -> Any:
    return e.builder.bitcast(value, ir.VectorType(ir.IntType(32), value.type.count))


def _floats(e: Emitter, value: Any) -> Any:
    return e.builder.bitcast(value, ir.VectorType(ir.FloatType(), value.type.count))
