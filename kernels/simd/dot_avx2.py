"""Dots of four 8-bit pairs on AVX2, which has no instruction for them: `Emitter.dot`, `dots`.

A vector of sixteen lanes is two registers, and one half is done before the other, so that codes
stay in registers while tokens take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llvmlite import ir

if TYPE_CHECKING:
    from lath.kernels.simd.emitter import Emitter

_BYTES = ir.VectorType(ir.IntType(8), 32)
_SHORTS = ir.VectorType(ir.IntType(16), 16)
_INTS = ir.VectorType(ir.IntType(32), 8)
_HALF = 8  # lanes of a register
LARGEST_FACTOR = 127  # of an int8 operand


def fits_in_short(largest: int, count: int) -> bool:
    """Whether `count` sums of two products of codes up to `largest` fit in 16 bits."""
    return 2 * largest * LARGEST_FACTOR * count < 1 << 15


def narrow_dots(
    e: Emitter, totals: Sequence[Any], codes: Sequence[Any], signed: Sequence[Sequence[Any]]
) -> list[Any]:
    """Each total plus the dots of all codes with its own vectors of `signed`. All products of a
    dot `fits_in_short`: they are added in 16 bits, and one multiplication more makes them 32."""
    halves = [
        [
            _narrow_half(e, total, codes, own, half)
            for total, own in zip(totals, signed, strict=True)
        ]
        for half in (0, 1)
    ]
    return [e.concatenate(low, high) for low, high in zip(*halves, strict=True)]


def _narrow_half(
    e: Emitter, total: Any, codes: Sequence[Any], signed: Sequence[Any], half: int
) -> Any:
    multiply = e.function("llvm.x86.avx2.pmadd.ub.sw", _SHORTS, [_BYTES, _BYTES])
    sums: Any = None
    for code, x in zip(codes, signed, strict=True):
        operands = [e.builder.bitcast(_half(e, value, half), _BYTES) for value in (code, x)]
        pairs = e.builder.call(multiply, operands)
        sums = pairs if sums is None else e.builder.add(sums, pairs)
    return e.builder.add(_half(e, total, half), _add_products(e, sums, _constant(1)))


def wide_dot(e: Emitter, total: Any, codes: Any, signed: Any) -> Any:
    """total plus the dots of codes up to 255: bytes of even and of odd places as 16-bit numbers."""
    b, halves = e.builder, []
    for half in (0, 1):
        code, x = (b.bitcast(_half(e, value, half), _SHORTS) for value in (codes, signed))
        eight = _constant(8)
        even = _add_products(e, b.and_(code, _constant(255)), b.ashr(b.shl(x, eight), eight))
        odd = _add_products(e, b.lshr(code, eight), b.ashr(x, eight))
        halves.append(b.add(_half(e, total, half), b.add(even, odd)))
    return e.concatenate(*halves)


def _add_products(e: Emitter, left: Any, right: Any) -> Any:
    """Eight int32 sums of two neighbouring int16 products."""
    function = e.function("llvm.x86.avx2.pmadd.wd", _INTS, [_SHORTS, _SHORTS])
    return e.builder.call(function, [left, right])


def _half(e: Emitter, value: Any, half: int) -> Any:
    return e.part(value, _HALF * half, _HALF)


def _constant(value: int) -> Any:
    return ir.Constant(_SHORTS, [value] * 16)
