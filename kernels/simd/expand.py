"""Numbers spread over the bits of a mask: the opposite of leaving out zeros."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from lath.kernels.simd.emitter import I1, INTS, Emitter


def count_bits(e: Emitter, mask: Any) -> Any:
    """How many bits of an integer are set, in its type."""
    return e.builder.call(e.function(f"llvm.ctpop.{mask.type}", mask.type, [mask.type]), [mask])


def expand(e: Emitter, mask: Any, source: Any, filler: Any) -> Any:
    """A vector of int lanes made of bytes (mask: 64 bits) or shorts (32): those at the address
    `source` in order where the mask has bits, those of `filler` elsewhere.

    Up to 64 bytes from `source` may be read. filler: int lanes.
    """
    items = mask.type.width
    item = ir.IntType(512 // items)
    kind = ir.VectorType(item, items)
    if e.native_expand:
        flags = ir.VectorType(I1, items)
        name = f"llvm.x86.avx512.mask.expand.v{items}i{item.width}"
        whole, rest = e.load(source, kind), e.builder.bitcast(filler, kind)
        # No instruction, but LLVM cannot see through it and make the load a part of the expansion,
        # which then takes up to twice as long (Zen 5: 5.1 ns, not 2.6, for 32 shorts).
        whole = e.builder.asm(ir.FunctionType(kind, [kind]), "", "=v,0", [whole], False)
        function = e.function(name, kind, [kind, kind, flags])
        spread = e.builder.call(function, [whole, rest, e.builder.bitcast(mask, flags)])
        return e.builder.bitcast(spread, INTS)
    place = e.buffer(1)
    e.store(place, filler)
    left, at = e.variable(mask), e.variable(source)
    lowest = e.function(f"llvm.cttz.{mask.type}", mask.type, [mask.type, I1])
    size = item.width // 8
    with e.loop(count_bits(e, mask)):
        position = e.builder.call(lowest, [left.value, ir.Constant(I1, 1)])
        target = e.offset(place, e.builder.zext(position, source.type), size)
        e.store(target, e.load(at.value, item))
        left.value = e.builder.and_(left.value, e.subtract(left.value, 1))
        at.value = e.add(at.value, size)
    return e.load(place)
