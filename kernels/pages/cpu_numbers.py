"""Scales and codes of sixteen lanes, as `lath.formats.pages` and the definition have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from lath.formats.activations import SMALLEST_ABSMAX
from lath.formats.pages import PageCodec
from lath.kernels.simd import mathematics
from lath.kernels.simd.emitter import FLOATS, INTS, Emitter

_INFINITY_BITS = 0x7F800000


@dataclass(frozen=True)
class Scaling:
    """Of each lane's group: scale, what a number is multiplied by to become a code (0 where the
    group is not usable), and whether all of the group is finite."""

    scale: Any
    inverse: Any
    finite: Any


def magnitude_bits(e: Emitter, value: Any) -> Any:
    """|value| as bits: ordered as the numbers are, NaN above infinity."""
    return e.builder.and_(e.builder.bitcast(value, INTS), e.constant(0x7FFFFFFF))


def is_midrise(codec: PageCodec) -> bool:
    return codec.name in ("int4", "int2")


def scaling(e: Emitter, bits: Any, codec: PageCodec) -> Scaling:
    """bits: the largest `magnitude_bits` of each lane's group."""
    b = e.builder
    absmax = b.bitcast(bits, FLOATS)
    finite = b.icmp_unsigned("<", bits, e.constant(_INFINITY_BITS))
    small = b.fcmp_ordered("<", absmax, e.floats(SMALLEST_ABSMAX))
    largest = e.floats(codec.largest)
    steps = e.floats(2.0 ** (codec.bits - 1)) if is_midrise(codec) else largest
    blank = e.floats(0.0 if is_midrise(codec) else 1.0)
    scale = b.select(small, blank, b.fdiv(absmax, largest))
    usable = b.and_(finite, b.not_(small))
    inverse = b.select(usable, b.fdiv(steps, absmax), e.floats(0.0))
    scale = b.select(finite, scale, e.floats(float("nan")))
    return Scaling(scale, inverse, finite)


def index_unit(e: Emitter, bits: Any, codec: PageCodec) -> Any:
    """What a step of max and min stands for; bits: of the page, in every lane."""
    from_scale = codec.name in ("int8", "int8-planes")
    b, absmax = e.builder, e.builder.bitcast(bits, FLOATS)
    if from_scale:
        return scaling(e, bits, codec).scale
    small = b.fcmp_ordered("<", absmax, e.floats(SMALLEST_ABSMAX))
    unit = b.select(small, e.floats(1.0), b.fdiv(absmax, e.floats(120.0)))
    finite = b.icmp_unsigned("<", bits, e.constant(_INFINITY_BITS))
    return b.select(finite, unit, e.floats(float("nan")))


def encode(e: Emitter, value: Any, by: Scaling, codec: PageCodec) -> tuple[Any, Any]:
    """What is stored (in the low bits of int lanes) and the number that is multiplied, as fp32."""
    b = e.builder
    scaled = b.fmul(b.select(by.finite, value, e.floats(0.0)), by.inverse)
    if codec.map == "e4m3":
        rounded = mathematics.round_e4m3(e, scaled)
        return mathematics.encode_e4m3(e, rounded), rounded
    if not is_midrise(codec):
        code = e.nearest(scaled)
        return code, e.to_floats(code)
    half = 2.0 ** (codec.bits - 1)
    floor = e.function("llvm.floor.v16f32", FLOATS, [FLOATS])
    step = b.call(floor, [scaled])
    step = b.select(b.fcmp_ordered(">", step, e.floats(half - 1)), e.floats(half - 1), step)
    step = b.select(b.fcmp_ordered("<", step, e.floats(-half)), e.floats(-half), step)
    spread, middle = 2.0 ** (8 - codec.bits), 2.0 ** (7 - codec.bits)
    decoded = e.fma(step, e.floats(spread), e.floats(middle))
    return b.fptosi(step, INTS), decoded


def planes(e: Emitter, stored: list[Any], codec: PageCodec) -> list[Any]:
    """The bytes of each plane, in int lanes, of the parts of the channels that share them."""
    b = e.builder
    if codec.name == "int8-planes":
        shifted = [e.shift_right_signed(code, 4) for code in stored]
        return [_join(e, shifted, 4), _join(e, stored, 4)]
    if codec.bits == 8:
        return [b.and_(stored[0], e.constant(0xFF))]
    return [_join(e, stored, codec.bits)]


def _join(e: Emitter, parts: list[Any], bits: int) -> Any:
    b, mask = e.builder, e.constant((1 << bits) - 1)
    joined = e.constant(0)
    for number, part in enumerate(parts):
        joined = b.or_(joined, e.shift_left(b.and_(part, mask), bits * number))
    return joined


def finite_or_zero(e: Emitter, value: Any) -> Any:
    finite = e.builder.icmp_unsigned("<", magnitude_bits(e, value), e.constant(_INFINITY_BITS))
    return e.builder.select(finite, value, ir.Constant(FLOATS, None))
