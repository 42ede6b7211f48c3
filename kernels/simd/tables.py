"""Codes that stand for entries of a table: look-ups in registers, narrow floats by their bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from lath.kernels.simd import half
from lath.kernels.simd.emitter import (
    BYTES,
    F32,
    FLOATS,
    HALVES,
    I8,
    I32,
    INTS,
    LANES,
    SHORTS,
    Emitter,
)

ENTRIES = 16  # of a table that a register holds, whatever the bits of its codes
# What an E4M3 number is too small by when its bits are read as fp16's: the exponents' biases.
E4M3_FACTOR = 2.0**8
# t0 + 4 t1 + 16 t2 + 64 t3 of t0 + 3 t1 + 9 t2 + 27 t3, in two registers.
_FOUR_TRITS = [sum(number // 3**j % 3 << 2 * j for j in range(4)) for number in range(81)]
_FOUR_TRITS += [0] * (128 - len(_FOUR_TRITS))
_BYTES64, _BYTES32 = ir.VectorType(I8, 64), ir.VectorType(I8, 32)
_HALF_FLOATS, _HALF_INTS = ir.VectorType(F32, 8), ir.VectorType(I32, 8)


def look_up_bytes(e: Emitter, codes: Any, table: Sequence[int]) -> Any:
    """Each byte of int lanes, a code from 0 to 15, becomes its entry (0 to 255) of `table`."""
    assert len(table) == ENTRIES
    codes = e.builder.bitcast(codes, _BYTES64)
    if e.isa == "avx512_vnni":
        function = e.function("llvm.x86.avx512.pshuf.b.512", _BYTES64, [_BYTES64] * 2)
        found = e.builder.call(function, [ir.Constant(_BYTES64, [*table] * 4), codes])
    elif e.isa == "avx2":
        function = e.function("llvm.x86.avx2.pshuf.b", _BYTES32, [_BYTES32] * 2)
        entries = ir.Constant(_BYTES32, [*table] * 2)
        low, high = (
            e.builder.call(function, [entries, _part(e, codes, start, 32)]) for start in (0, 32)
        )
        found = e.shuffle(low, high, list(range(64)))
    else:
        found = _chosen(e, codes, table)
    return e.builder.bitcast(found, INTS)


def _chosen(e: Emitter, codes: Any, table: Sequence[int]) -> Any:
    """`look_up_bytes` without a shuffle that takes its order from a register: bit after bit."""
    found = [ir.Constant(_BYTES64, [entry] * 64) for entry in table]
    zero = ir.Constant(_BYTES64, [0] * 64)
    for bit in range(4):
        mask = ir.Constant(_BYTES64, [1 << bit] * 64)
        is_set = e.builder.icmp_unsigned("!=", e.builder.and_(codes, mask), zero)
        pairs = zip(found[::2], found[1::2], strict=True)
        found = [e.builder.select(is_set, high, low) for low, high in pairs]
    return found[0]


def split_trits(e: Emitter, word: Any) -> tuple[Any, Any]:
    """Each byte of int lanes, t0 + 3 t1 + 9 t2 + 27 t3 + 81 t4 → t0 + 4 t1 + 16 t2 + 64 t3, and a
    byte whose two upper bits are t4."""
    number = e.builder.bitcast(word, _BYTES64)
    rest = _less_where_it_can(e, _less_where_it_can(e, number, 81), 81)
    # 81 and 162 begin with the bits 01 and 10.
    last = e.builder.sub(number, rest)
    if e.wide_look_up:
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        halves = [ir.Constant(_BYTES64, _FOUR_TRITS[start : start + 64]) for start in (0, 64)]
        function = e.function(name, _BYTES64, [_BYTES64] * 3)
        four = e.builder.call(function, [halves[0], rest, halves[1]])
    else:
        four = ir.Constant(_BYTES64, [0] * 64)
        for slot in (3, 2, 1):
            for _ in range(2):
                less = _less_where_it_can(e, rest, 3**slot)
                fits = e.builder.icmp_unsigned("!=", less, rest)
                one = ir.Constant(_BYTES64, [1 << (2 * slot)] * 64)
                four = e.builder.select(fits, e.builder.add(four, one), four)
                rest = less
        four = e.builder.add(four, rest)
    return e.builder.bitcast(four, INTS), e.builder.bitcast(last, INTS)


def _less_where_it_can(e: Emitter, number: Any, part: int) -> Any:
    """number - part, or number where that is below 0: unsigned, the smaller of both."""
    less = e.builder.sub(number, ir.Constant(_BYTES64, [part] * 64))
    smaller = e.builder.icmp_unsigned("<", less, number)
    return e.builder.select(smaller, less, number)


def look_up(e: Emitter, address: Any, indices: Any) -> Any:
    """fp32 entries of the table of sixteen at an address, by the low four bits of int lanes."""
    if e.isa == "avx512_vnni":
        function = e.function("llvm.x86.avx512.permvar.sf.512", FLOATS, [FLOATS, INTS])
        return e.builder.call(function, [e.load(address, FLOATS), indices])
    if e.isa == "avx2":
        kinds = [_HALF_FLOATS, _HALF_INTS]
        function = e.function("llvm.x86.avx2.permps", _HALF_FLOATS, kinds)
        sides = [e.load(e.add(address, start), _HALF_FLOATS) for start in (0, 32)]
        # An index's fourth bit, moved to the sign, says which half of the table is meant.
        upper = e.builder.icmp_signed("<", e.shift_left(indices, 28), e.constant(0))
        first, second = _part(e, indices, 0, 8), _part(e, indices, 8, 8)
        low, high = (
            e.shuffle(
                e.builder.call(function, [side, first]),
                e.builder.call(function, [side, second]),
                list(range(LANES)),
            )
            for side in sides
        )
        return e.builder.select(upper, high, low)
    indices = e.builder.and_(indices, e.constant(ENTRIES - 1))
    return _gathered(
        e, address, [e.builder.extract_element(indices, ir.Constant(I32, n)) for n in range(LANES)]
    )


def gather(e: Emitter, table: Any, address: Any) -> Any:
    """fp32 entries of the table of 256 at `table`, by sixteen bytes at an address."""
    # Indices that come from memory need no extraction; a gather instruction does no less work.
    return _gathered(e, table, [e.load(e.add(address, n), I8) for n in range(LANES)])


def _gathered(e: Emitter, table: Any, indices: list[Any]) -> Any:
    found = ir.Constant(FLOATS, ir.Undefined)
    for n, index in enumerate(indices):
        entry = e.load(e.offset(table, e.builder.zext(index, table.type), 4), F32)
        found = e.builder.insert_element(found, entry, ir.Constant(I32, n))
    return found


def load_e4m3(e: Emitter, address: Any) -> Any:
    """Sixteen E4M3 numbers in memory, over E4M3_FACTOR; the code of NaN gives 480."""
    signed = e.builder.sext(e.load(address, BYTES), SHORTS)
    shifted = e.builder.shl(signed, ir.Constant(SHORTS, [7] * LANES))
    # Of the copies of the sign, the one that fell on the highest exponent bit goes.
    return widen_halves(e, e.builder.and_(shifted, ir.Constant(SHORTS, [0xBFFF] * LANES)))


def load_e5m2(e: Emitter, address: Any) -> Any:
    """Sixteen E5M2 numbers in memory: the upper bytes of fp16, infinities and NaN too."""
    wide = e.builder.zext(e.load(address, BYTES), SHORTS)
    return widen_halves(e, e.builder.shl(wide, ir.Constant(SHORTS, [8] * LANES)))


def load_powers(e: Emitter, address: Any) -> Any:
    """Sixteen powers of two, 2**(byte - 127), of bytes from 1 to 254."""
    return e.builder.bitcast(e.shift_left(e.load_bytes(address), 23), FLOATS)


def halves_of(e: Emitter, word: Any, brain: bool) -> list[Any]:
    """A vector of 32 fp16 numbers, or bf16 ones: the first sixteen as fp32, and the last."""
    shorts = e.builder.bitcast(word, ir.VectorType(SHORTS.element, 2 * LANES))
    parts = [_part(e, shorts, start, LANES) for start in (0, LANES)]
    if not brain:
        return [widen_halves(e, part) for part in parts]
    wide = [e.shift_left(e.builder.zext(part, INTS), 16) for part in parts]
    return [e.builder.bitcast(bits, FLOATS) for bits in wide]


def widen_halves(e: Emitter, halves: Any) -> Any:
    """Sixteen fp16 bit patterns to fp32: the conversion takes subnormals as they are, which an
    fp32 product under `torch.set_flush_denormal` would not."""
    if e.native_half:
        return e.builder.fpext(e.builder.bitcast(halves, HALVES), FLOATS)
    return half.widen(e, e.builder.zext(halves, INTS))


def _part(e: Emitter, value: Any, start: int, count: int) -> Any:
    return e.shuffle(value, value, list(range(start, start + count)))
