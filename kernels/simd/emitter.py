"""Emitter: the vector operations that kernels are written in, over llvmlite's IR builder.

A vector is sixteen 32-bit lanes, integers or floats; lane = output row. Kernels are Python
functions that call these methods; plain Python loops unroll a register tile, `loop` makes a loop at
run time. Addresses are 64-bit integers. LLVM keeps a `Variable` in a register and splits a vector
where the machine's are narrower, so that one kernel serves every instruction set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from lath.kernels.simd import dot_avx2, half
from lath.kernels.simd.isa import Isa

LANES = 16
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
INTS = ir.VectorType(I32, LANES)
FLOATS = ir.VectorType(F32, LANES)
HALVES = ir.VectorType(ir.HalfType(), LANES)
SHORTS = ir.VectorType(I16, LANES)
BYTES = ir.VectorType(I8, LANES)
_BYTES64 = ir.VectorType(I8, 64)
_SHORTS64 = ir.VectorType(I16, 64)

# The largest code of which two products with int8 numbers fit in 16 bits.
NARROW = 127

# Float types in memory, as kernels name them.
FP32, FP16, BF16 = 0, 1, 2
ITEM_BYTES = {FP32: 4, FP16: 2, BF16: 2}


class Variable:
    """A value that changes in a loop."""

    def __init__(self, builder: Any, start: Any) -> None:
        self._builder = builder
        self._slot = cgutils.alloca_once(builder, start.type)
        builder.store(start, self._slot)

    @property
    def value(self) -> Any:
        return self._builder.load(self._slot)

    @value.setter
    def value(self, value: Any) -> None:
        self._builder.store(value, self._slot)


class Emitter:
    """builder: llvmlite's IRBuilder inside the function to extend. isa: how `dot` is lowered.

    native_half: the machine converts fp16 itself. native_brain: it multiplies bf16 (brain.py).
    native_expand: it spreads bytes over the bits of a mask (expand.py); wide_look_up: it looks
    bytes up in 128 others (tables.py).
    """

    def __init__(
        self,
        builder: Any,
        isa: Isa,
        native_half: bool,
        native_brain: bool = False,
        native_expand: bool = False,
        wide_look_up: bool = False,
    ) -> None:
        self.builder = builder
        self.isa = isa
        self.native_half = native_half
        self.native_brain = native_brain
        self.native_expand = native_expand
        self.wide_look_up = wide_look_up

    # Scalars and control

    def integer(self, value: int) -> Any:
        return ir.Constant(I64, value)

    def add(self, left: Any, right: Any) -> Any:
        """left + right; an int stands for a constant of the other's type."""
        return self.builder.add(left, self._like(left, right))

    def multiply(self, left: Any, right: Any) -> Any:
        return self.builder.mul(left, self._like(left, right))

    def subtract(self, left: Any, right: Any) -> Any:
        return self.builder.sub(left, self._like(left, right))

    def clip(self, value: Any, high: Any) -> Any:
        """value, but at least 0 and at most `high`."""
        low = self.builder.icmp_signed("<", value, self._like(value, 0))
        value = self.builder.select(low, self._like(value, 0), value)
        return self.builder.select(self.builder.icmp_signed("<", value, high), value, high)

    def less(self, left: Any, right: Any) -> Any:
        return self.builder.icmp_signed("<", left, self._like(left, right))

    def smaller_of(self, left: Any, right: Any) -> Any:
        right = self._like(left, right)
        return self.builder.select(self.builder.icmp_signed("<", left, right), left, right)

    def remainder(self, left: Any, right: Any) -> Any:
        """left % right for a left that is not negative."""
        return self.builder.urem(left, self._like(left, right))

    def divide(self, left: Any, right: Any) -> Any:
        """left // right for a left that is not negative."""
        return self.builder.udiv(left, self._like(left, right))

    def rotate_right(self, value: Any, count: int) -> Any:
        """An int64 with its bits moved down by `count`, those below the lowest put on top."""
        function = self.function("llvm.fshr.i64", I64, [I64] * 3)
        return self.builder.call(function, [value, value, self.integer(count % 64)])

    def opaque(self, value: Any) -> Any:
        """The same number, which LLVM does not know."""
        kind = ir.FunctionType(value.type, [value.type])
        return self.builder.asm(kind, "", "=r,0", [value], False)

    def offset(self, address: Any, index: Any, scale: int) -> Any:
        return self.add(address, self.multiply(index, scale))

    def variable(self, start: Any) -> Variable:
        return Variable(self.builder, start)

    @contextlib.contextmanager
    def loop(self, count: Any) -> Iterator[Any]:
        """A loop at run time; yields its index, 0 to count - 1."""
        with cgutils.for_range(self.builder, count) as loop:
            yield loop.index

    @contextlib.contextmanager
    def when(self, condition: Any) -> Iterator[None]:
        with self.builder.if_then(condition):
            yield

    @contextlib.contextmanager
    def choice(self, condition: Any) -> Iterator[Any]:
        """Yields two context managers: the branch where the condition holds, and the other."""
        with self.builder.if_else(condition) as branches:
            yield branches

    def buffer(self, vectors: int) -> Any:
        """The address of scratch for some vectors of floats, on the stack."""
        slot = cgutils.alloca_once(self.builder, ir.ArrayType(FLOATS, vectors))
        return self.builder.ptrtoint(slot, I64)

    # Memory

    def load(self, address: Any, kind: Any = INTS) -> Any:
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = 1
        return value

    def prefetch(self, address: Any, near: bool = False) -> None:
        """Ask for the line at an address, which need not be ours, in the second-level cache, or in
        the first where it is `near`: in the second already."""
        pointer = self.builder.inttoptr(address, I8.as_pointer())
        function = self.function(
            "llvm.prefetch.p0", ir.VoidType(), [I8.as_pointer(), I32, I32, I32]
        )
        # Asked for in the first-level cache, lines wait for its few miss buffers: 1.6 times slower.
        read, level, data = (ir.Constant(I32, number) for number in (0, 3 if near else 2, 1))
        self.builder.call(function, [pointer, read, level, data])

    def store(self, address: Any, value: Any) -> None:
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, pointer).align = 1

    def load_floats(self, address: Any, kind: int) -> Any:
        """Sixteen floats of type `kind` in memory, as fp32."""
        if kind == FP32:
            return self.load(address, FLOATS)
        if kind == FP16:
            if self.native_half:
                return self.builder.fpext(self.load(address, HALVES), FLOATS)
            return half.widen(self, self.builder.zext(self.load(address, SHORTS), INTS))
        wide = self.builder.zext(self.load(address, SHORTS), INTS)
        return self.builder.bitcast(self.shift_left(wide, 16), FLOATS)

    def load_bytes(self, address: Any) -> Any:
        """Sixteen uint8 as integers."""
        return self.builder.zext(self.load(address, BYTES), INTS)

    def round_floats(self, value: Any, kind: int) -> Any:
        """fp32 lanes rounded once (to nearest, ties to even) to the type `kind`."""
        if kind == FP32:
            return value
        if kind == FP16:
            if self.native_half:
                return self.builder.fptrunc(value, HALVES)
            return self.builder.trunc(half.narrow(self, value), SHORTS)
        bits = self.builder.bitcast(value, INTS)
        odd = self.builder.and_(self.shift_right(bits, 16), self.constant(1))
        rounded = self.builder.add(self.builder.add(bits, odd), self.constant(0x7FFF))
        nan = self.builder.fcmp_unordered("uno", value, value)
        kept = self.builder.select(nan, self.constant(0x7FC00000), rounded)
        return self.builder.trunc(self.shift_right(kept, 16), SHORTS)

    # Lanes

    def constant(self, value: int) -> Any:
        return ir.Constant(INTS, [value] * LANES)

    def floats(self, value: float) -> Any:
        return ir.Constant(FLOATS, [value] * LANES)

    def splat(self, scalar: Any) -> Any:
        """A scalar in every lane."""
        kind = ir.VectorType(scalar.type, LANES)
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(INTS, [0] * LANES))

    def broadcast(self, address: Any, kind: Any = I32) -> Any:
        """The scalar in memory in every lane."""
        return self.splat(self.load(address, kind))

    def shift_right(self, value: Any, count: int) -> Any:
        return value if count == 0 else self.builder.lshr(value, self.constant(count))

    def shift_left(self, value: Any, count: int) -> Any:
        return value if count == 0 else self.builder.shl(value, self.constant(count))

    def shift_right_signed(self, value: Any, count: int) -> Any:
        return value if count == 0 else self.builder.ashr(value, self.constant(count))

    def to_floats(self, value: Any) -> Any:
        return self.builder.sitofp(value, FLOATS)

    def fma(self, left: Any, right: Any, addend: Any) -> Any:
        """left * right + addend, fused where the machine has it."""
        function = self.function("llvm.fmuladd.v16f32", FLOATS, [FLOATS] * 3)
        return self.builder.call(function, [left, right, addend])

    def nearest(self, value: Any) -> Any:
        """Rounded to an integer, ties to even; float lanes to int lanes."""
        rounded = self.builder.call(self.function("llvm.rint.v16f32", FLOATS, [FLOATS]), [value])
        return self.builder.fptosi(rounded, INTS)

    def larger(self, left: Any, right: Any) -> Any:
        return self.builder.select(self.builder.icmp_unsigned(">", left, right), left, right)

    def largest_lane(self, value: Any) -> Any:
        function = self.function("llvm.vector.reduce.umax.v16i32", I32, [INTS])
        return self.builder.call(function, [value])

    def sum_of_lanes(self, value: Any) -> Any:
        if value.type == INTS:
            function = self.function("llvm.vector.reduce.add.v16i32", I32, [INTS])
            return self.builder.call(function, [value])
        function = self.function("llvm.vector.reduce.fadd.v16f32", F32, [F32, FLOATS])
        start = ir.Constant(F32, 0.0)
        return self.builder.call(function, [start, value], fastmath=("reassoc",))

    # Codes

    def fields(self, word: Any, width: int) -> list[Any]:
        """The codes of `width` bits in each byte, low bits first, each alone in its byte."""
        mask = self.constant(((1 << width) - 1) * 0x01010101 & 0xFFFFFFFF)
        if width == 8:
            return [word]
        return [
            self.builder.and_(self.shift_right(word, shift), mask) for shift in range(0, 8, width)
        ]

    def fields_in_place(self, word: Any, width: int) -> list[Any]:
        """As `fields`, but field j stays 2**(width*j) times too large: no shift was spent on it."""
        if width == 8:
            return [word]
        mask = ((1 << width) - 1) * 0x01010101
        return [
            self.builder.and_(word, self.constant(mask << shift)) for shift in range(0, 8, width)
        ]

    def dot(self, total: Any, codes: Any, signed: Any, narrow: bool) -> Any:
        """total + Σ of four products in each lane: uint8 codes times int8, |int8| <= 127.

        narrow: codes are at most 127, so that a sum of two products fits in 16 bits.
        """
        if self.isa == "avx512_vnni":
            function = self.function("llvm.x86.avx512.vpdpbusd.512", INTS, [INTS] * 3)
            return self.builder.call(function, [total, codes, signed])
        if self.isa == "avx2":
            if narrow:
                return dot_avx2.narrow_dots(self, [total], [codes], [[signed]])[0]
            return dot_avx2.wide_dot(self, total, codes, signed)
        products = self._products(*(self.builder.bitcast(v, _BYTES64) for v in (codes, signed)))
        return self.builder.add(total, self._add_quads(products))

    def dots(
        self,
        totals: Sequence[Any],
        codes: Sequence[Any],
        signed: Sequence[Sequence[Any]],
        largest: int,
    ) -> list[Any]:
        """Each total plus the `dot`s of all `codes` with its own vectors of `signed`; codes are at
        most `largest`. AVX2 adds products of narrow ones in 16 bits: one multiplication less."""
        if self.isa == "avx2" and dot_avx2.fits_in_short(largest, len(codes)):
            return dot_avx2.narrow_dots(self, totals, codes, signed)
        sums = []
        for total, own in zip(totals, signed, strict=True):
            for code, x in zip(codes, own, strict=True):
                total = self.dot(total, code, x, narrow=largest <= NARROW)
            sums.append(total)
        return sums

    def _products(self, codes: Any, signed: Any) -> Any:
        """64 products as int16: 255 * 127 still fits."""
        wide = self.builder.zext(codes, _SHORTS64), self.builder.sext(signed, _SHORTS64)
        return self.builder.mul(*wide)

    def _add_quads(self, products: Any) -> Any:
        wide = self.builder.sext(products, ir.VectorType(I32, 64))
        return self._add_neighbours(self._add_neighbours(wide))

    def _add_neighbours(self, value: Any) -> Any:
        count = value.type.count // 2
        even, odd = (
            self.shuffle(value, value, [2 * lane + start for lane in range(count)])
            for start in (0, 1)
        )
        return self.builder.add(even, odd)

    def part(self, value: Any, start: int, count: int) -> Any:
        """`count` lanes from `start` on."""
        return self.shuffle(value, value, list(range(start, start + count)))

    def concatenate(self, low: Any, high: Any) -> Any:
        return self.shuffle(low, high, list(range(2 * low.type.count)))

    def shuffle(self, left: Any, right: Any, lanes: list[int]) -> Any:
        """Lanes by number: those of `left`, then those of `right`."""
        order = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
        return self.builder.shuffle_vector(left, right, order)

    def function(self, name: str, result: Any, arguments: list[Any]) -> Any:
        """An LLVM intrinsic."""
        kind = ir.FunctionType(result, arguments)
        return cgutils.get_or_insert_function(self.builder.module, kind, name)

    @staticmethod
    def _like(value: Any, other: Any) -> Any:
        return ir.Constant(value.type, other) if isinstance(other, int) else other
