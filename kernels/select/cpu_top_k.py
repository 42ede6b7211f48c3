"""The largest k of each row of scores: a threshold by halving, then one pass over the row.

Scores become unsigned keys in the same order: 0 for -inf, which is never taken, and the largest for
NaN. Bit by bit from the highest, the threshold is the largest key that at least k keys reach.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from lath.kernels.simd.emitter import I16, I32, I64, INTS, LANES, Emitter

FIELDS = (
    "scores", "keys", "indices",  # fp32 [rows, width], scratch of a thread, int32 [rows, k]
    "rows", "width", "k",
    "slot",  # bytes of scratch of a thread
    "task", "thread_number", "thread_count",
)  # fmt: skip
INDEX = {name: index for index, name in enumerate(FIELDS)}
_VECTOR = 64
_LOWEST = 0x00800000  # the ordered bits of -inf


def emit_top_k(e: Emitter, thread: Any, threads: Any, arguments: Any) -> None:
    """The rows thread, thread + threads, …"""
    a = {name: e.load(e.add(arguments, 8 * index), I64) for name, index in INDEX.items()}
    row = _Row(e, a, thread)
    count = e.divide(e.add(e.subtract(a["rows"], thread), e.subtract(threads, 1)), threads)
    with e.loop(count) as i:
        number = e.add(thread, e.multiply(i, threads))
        row.take(number)


class _Row:
    def __init__(self, e: Emitter, a: dict[str, Any], thread: Any) -> None:
        self.e, self.b, self.a = e, e.builder, a
        self.keys = e.add(a["keys"], e.multiply(thread, a["slot"]))
        self.vectors = e.divide(e.add(a["width"], LANES - 1), LANES)
        self.tail = e.buffer(1)

    def take(self, number: Any) -> None:
        e, a = self.e, self.a
        self._make_keys(e.add(a["scores"], e.multiply(e.multiply(number, a["width"]), 4)))
        threshold, above = self._threshold()
        target = e.add(a["indices"], e.multiply(e.multiply(number, a["k"]), 4))
        taken = self._write(target, threshold, e.subtract(a["k"], above))
        with e.loop(e.subtract(a["k"], taken)) as i:
            e.store(e.offset(target, e.add(taken, i), 4), ir.Constant(I32, -1))

    def _make_keys(self, scores: Any) -> None:
        e = self.e
        whole = e.divide(self.a["width"], LANES)
        with e.loop(whole) as i:
            e.store(e.offset(self.keys, i, _VECTOR), self._key(e.offset(scores, i, _VECTOR)))
        rest = e.subtract(self.a["width"], e.multiply(whole, LANES))
        with e.when(e.less(e.integer(0), rest)):
            e.store(self.tail, e.floats(float("-inf")))
            begin = e.offset(scores, whole, _VECTOR)
            with e.loop(rest) as i:
                e.store(e.offset(self.tail, i, 4), e.load(e.offset(begin, i, 4), I32))
            e.store(e.offset(self.keys, whole, _VECTOR), self._key(self.tail))

    def _key(self, address: Any) -> Any:
        e, b = self.e, self.b
        bits = e.load(address)
        size = b.and_(bits, e.constant(0x7FFFFFFF))
        # Negative numbers downwards, others upwards; both zeros are one.
        negative = b.icmp_signed("<", bits, e.constant(0))
        ordered = b.select(
            negative, b.sub(e.constant(-0x80000000), size), b.add(size, e.constant(-0x80000000))
        )
        ordered = b.sub(ordered, e.constant(_LOWEST))
        nan = b.icmp_unsigned(">", size, e.constant(0x7F800000))
        return b.select(nan, e.constant(-1), ordered)

    def _count(self, least: Any) -> Any:
        """How many keys are at least `least`."""
        e, b = self.e, self.b
        wide = e.splat(least)
        total = e.variable(e.constant(0))
        with e.loop(self.vectors) as i:
            reach = b.icmp_unsigned(">=", e.load(e.offset(self.keys, i, _VECTOR)), wide)
            total.value = b.sub(total.value, b.sext(reach, INTS))
        return b.zext(e.sum_of_lanes(total.value), I64)

    def _threshold(self) -> tuple[Any, Any]:
        """The largest key above 0 that at least k keys reach, or 1; how many lie above it (0 where
        just k reach it: none of them is left out)."""
        e, b, k = self.e, self.b, self.a["k"]
        found = e.variable(ir.Constant(I32, 0))
        exact = e.variable(ir.Constant(ir.IntType(1), 0))
        with e.loop(e.integer(32)) as i, e.when(b.not_(exact.value)):
            bit = b.shl(ir.Constant(I32, 1), b.trunc(e.subtract(e.integer(31), i), I32))
            trial = b.or_(found.value, bit)
            count = self._count(trial)
            enough = b.icmp_signed(">=", count, k)
            found.value = b.select(enough, trial, found.value)
            exact.value = b.icmp_signed("==", count, k)
        zero = b.icmp_unsigned("==", found.value, ir.Constant(I32, 0))
        threshold = b.select(zero, ir.Constant(I32, 1), found.value)
        above = e.variable(e.integer(0))
        with e.when(b.not_(exact.value)):
            last = b.icmp_unsigned("==", threshold, ir.Constant(I32, -1))
            with e.when(b.not_(last)):
                above.value = self._count(b.add(threshold, ir.Constant(I32, 1)))
        return threshold, above.value

    def _write(self, target: Any, threshold: Any, ties: Any) -> Any:
        """Indices of the keys above the threshold and of the first `ties` at it; how many."""
        e, b = self.e, self.b
        wide = e.splat(threshold)
        taken, left = e.variable(e.integer(0)), e.variable(ties)
        with e.loop(self.vectors) as i:
            keys = e.load(e.offset(self.keys, i, _VECTOR))
            equal = b.bitcast(b.icmp_unsigned("==", keys, wide), I16)
            both = e.variable(b.bitcast(b.icmp_unsigned(">=", keys, wide), I16))
            first = e.multiply(i, LANES)
            with e.loop(self._ones(both.value)):
                lane = self._lowest(both.value)
                both.value = b.and_(both.value, b.sub(both.value, ir.Constant(I16, 1)))
                tie = b.trunc(b.lshr(equal, lane), ir.IntType(1))
                spare = e.less(e.integer(0), left.value)
                with e.when(b.or_(b.not_(tie), spare)):
                    index = b.trunc(e.add(first, b.zext(lane, I64)), I32)
                    e.store(e.offset(target, taken.value, 4), index)
                    taken.value = e.add(taken.value, 1)
                left.value = e.subtract(left.value, b.zext(tie, I64))
        return taken.value

    def _ones(self, bits: Any) -> Any:
        count = self.e.function("llvm.ctpop.i16", I16, [I16])
        return self.b.zext(self.b.call(count, [bits]), I64)

    def _lowest(self, bits: Any) -> Any:
        flag = ir.IntType(1)
        count = self.e.function("llvm.cttz.i16", I16, [I16, flag])
        return self.b.call(count, [bits, ir.Constant(flag, 0)])
