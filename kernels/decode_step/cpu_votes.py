"""Small kernels between the scores of pages and attention over lists of them, for one sequence."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from lath.kernels.simd import mathematics
from lath.kernels.simd.arguments import ArgumentBlock
from lath.kernels.simd.emitter import F32, FLOATS, I32, I64, LANES, Emitter

FIELDS = (
    "scores",  # fp32 [lists * group, width]
    "votes",  # fp32 [lists, width]
    "scratch",  # fp32 [2, width padded to 16]; the first row is -inf behind `width`
    "width", "group",
    "forced",  # entries at the end that are read in any case
    "indices",  # int32 [lists, k], -1 behind the last
    "k",
    "table", "starts", "counts",  # int32 [width] of the sequence's pages
    "listed_table", "listed_starts", "listed_counts",  # int32 [lists, k]
    "page_counts",  # int32 [lists]
)  # fmt: skip
INDEX = {name: index for index, name in enumerate(FIELDS)}
_VECTOR = 4 * LANES
_LOWEST, _HIGHEST = float("-inf"), float("inf")


class VoteArguments(ArgumentBlock):
    def __init__(self, emitter: Emitter, address: Any) -> None:
        super().__init__(emitter, address, INDEX)


def emit_votes(e: Emitter, begin: Any, end: Any, arguments: Any, alone: bool) -> None:
    """Lists begin .. end - 1: the sum of the softmax of every row that shares the list, or, alone,
    its own row as it is; +inf for what is read in any case."""
    a = VoteArguments(e, arguments)
    row_bytes = e.multiply(a["width"], 4)
    with e.loop(e.subtract(end, begin)) as index:
        number = e.add(begin, index)
        votes = e.add(a["votes"], e.multiply(number, row_bytes))
        first = e.add(a["scores"], e.multiply(e.multiply(number, a["group"]), row_bytes))
        if alone:
            _copy(e, votes, first, a["width"])
        else:
            _vote(e, a, votes, first)
        place = e.add(votes, e.multiply(e.subtract(a["width"], a["forced"]), 4))
        with e.loop(a["forced"]) as i:
            e.store(e.offset(place, i, 4), ir.Constant(F32, _HIGHEST))


def _copy(e: Emitter, target: Any, source: Any, count: Any) -> None:
    with e.loop(count) as i:
        e.store(e.offset(target, i, 4), e.load(e.offset(source, i, 4), F32))


def _vote(e: Emitter, a: VoteArguments, votes: Any, first: Any) -> None:
    b, width = e.builder, a["width"]
    vectors = e.divide(e.add(width, LANES - 1), LANES)
    own, total = a["scratch"], e.offset(a["scratch"], vectors, _VECTOR)
    with e.loop(vectors) as i:
        e.store(e.offset(total, i, _VECTOR), e.floats(0.0))
    largest_lane = e.function("llvm.vector.reduce.fmax.v16f32", F32, [FLOATS])
    with e.loop(a["group"]) as r:
        _copy(e, own, e.add(first, e.multiply(e.multiply(r, width), 4)), width)
        largest = e.variable(e.floats(_LOWEST))
        with e.loop(vectors) as i:
            value = e.load(e.offset(own, i, _VECTOR), FLOATS)
            higher = b.fcmp_ordered(">", value, largest.value)
            largest.value = b.select(higher, value, largest.value)
        top = e.splat(b.call(largest_lane, [largest.value]))

        def power(i: Any, top: Any = top) -> Any:
            below = b.fsub(e.load(e.offset(own, i, _VECTOR), FLOATS), top)
            return mathematics.exp2(e, b.fmul(below, e.floats(mathematics.LOG2E)))

        mass = e.variable(e.floats(0.0))
        with e.loop(vectors) as i:
            mass.value = b.fadd(mass.value, power(i))
        share = b.fdiv(e.floats(1.0), e.splat(e.sum_of_lanes(mass.value)))
        with e.loop(vectors) as i:
            place = e.offset(total, i, _VECTOR)
            e.store(place, e.fma(power(i), share, e.load(place, FLOATS)))
    _copy(e, votes, total, width)


def emit_lists(e: Emitter, begin: Any, end: Any, arguments: Any) -> None:
    """Lists begin .. end - 1: the pages of their indices, where these begin and what they hold."""
    a, b = VoteArguments(e, arguments), e.builder
    with e.loop(e.subtract(end, begin)) as index:
        number = e.add(begin, index)
        start = e.multiply(number, a["k"])
        used = e.variable(e.integer(0))
        with e.loop(a["k"]) as i:
            at = e.add(start, i)
            entry = b.sext(e.load(e.offset(a["indices"], at, 4), I32), I64)
            present = b.icmp_signed(">=", entry, e.integer(0))
            place = b.select(present, entry, e.integer(0))
            for name in ("table", "starts", "counts"):
                value = e.load(e.offset(a[name], place, 4), I32)
                value = b.select(present, value, ir.Constant(I32, 0))
                e.store(e.offset(a[f"listed_{name}"], at, 4), value)
            used.value = e.add(used.value, b.zext(present, I64))
        e.store(e.offset(a["page_counts"], number, 4), b.trunc(used.value, I32))
