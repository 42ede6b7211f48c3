"""The CPU kernels of outliers: sixteen entries of a row, or sixteen tokens, at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from lath.kernels.simd.arguments import ArgumentBlock
from lath.kernels.simd.emitter import F32, FLOATS, FP16, I16, I32, INTS, LANES, Emitter

FIELDS = (
    "x",  # address of fp32 [tokens, columns], or [columns, padded tokens]
    "stride",  # bytes from a row of it to the next
    "columns",  # address of int16 or int32 [entries + LANES]
    "values",  # address of fp16 [entries + LANES]
    "offsets",  # address of int32 [rows + 1]
    "bias",  # address of fp32 [rows]
    "y",  # address of fp32 [tokens, rows]
    "rows",
    "tokens",
    "task", "thread_number", "thread_count",
)  # fmt: skip
INDEX = {name: index for index, name in enumerate(FIELDS)}


def emit_gather(e: Emitter, thread: Any, threads: Any, arguments: Any, short: bool) -> None:
    """x as it lies: sixteen entries of a row at a time, each with its own column of x. This
    thread's rows, of each token."""
    a, b = ArgumentBlock(e, arguments, INDEX), e.builder
    lanes = ir.Constant(INTS, list(range(LANES)))
    with _rows(e, a, thread, threads) as row:
        begin = a.integer("offsets", row)
        count = e.subtract(a.integer("offsets", e.add(row, 1)), begin)
        vectors = e.divide(e.add(count, LANES - 1), LANES)
        with e.loop(a["tokens"]) as token:
            x = e.add(a["x"], e.multiply(token, a["stride"]))
            total = e.variable(e.floats(0.0))
            with e.loop(vectors) as index:
                first = e.multiply(index, LANES)
                rest = b.trunc(e.subtract(count, first), I32)
                inside = b.icmp_signed("<", lanes, e.splat(rest))
                entry = e.add(begin, first)
                values = e.load_floats(e.offset(a["values"], entry, 2), FP16)
                # Lanes beyond the row's end hold another row's entries: a NaN there is not ours.
                numbers = b.select(inside, _gather(e, a, x, entry, short), e.floats(0.0))
                values = b.select(inside, values, e.floats(0.0))
                total.value = e.fma(values, numbers, total.value)
            bias = e.load(e.offset(a["bias"], row, 4), F32)
            at = e.add(e.multiply(token, a["rows"]), row)
            e.store(e.offset(a["y"], at, 4), b.fadd(e.sum_of_lanes(total.value), bias))


def emit_tokens(
    e: Emitter, thread: Any, threads: Any, arguments: Any, short: bool, vectors: int
) -> None:
    """x transposed, its tokens padded to whole tiles of `vectors` registers: each entry times as
    many tokens at once. All rows for a tile before the next one: its part of x stays in cache."""
    a, b = ArgumentBlock(e, arguments, INDEX), e.builder
    tile, scratch = vectors * LANES, e.buffer(1)
    with e.loop(e.divide(e.add(a["tokens"], tile - 1), tile)) as number:
        x, first_token = e.offset(a["x"], number, 4 * tile), e.multiply(number, tile)
        with _rows(e, a, thread, threads) as row:
            totals = _row_of_tokens(e, a, x, row, scratch, short, vectors)
            bias = e.broadcast(e.offset(a["bias"], row, 4), F32)
            for n, total in enumerate(totals):
                e.store(scratch, b.fadd(total, bias))
                token = e.add(first_token, LANES * n)
                left = e.clip(e.subtract(a["tokens"], token), e.integer(LANES))
                with e.loop(left) as lane:
                    at = e.add(e.multiply(e.add(token, lane), a["rows"]), row)
                    e.store(e.offset(a["y"], at, 4), e.load(e.offset(scratch, lane, 4), F32))


def _row_of_tokens(
    e: Emitter, a: ArgumentBlock, x: Any, row: Any, scratch: Any, short: bool, vectors: int
) -> list[Any]:
    """The sums of a row for a tile of tokens. scratch: the address of a vector of floats."""
    begin = a.integer("offsets", row)
    count = e.subtract(a.integer("offsets", e.add(row, 1)), begin)
    totals = [e.variable(e.floats(0.0)) for _ in range(vectors)]
    with e.loop(e.divide(e.add(count, LANES - 1), LANES)) as index:
        first = e.multiply(index, LANES)
        entry = e.add(begin, first)
        # Sixteen values are widened together, where a machine may have no scalar fp16.
        e.store(scratch, e.load_floats(e.offset(a["values"], entry, 2), FP16))
        with e.loop(e.smaller_of(e.subtract(count, first), LANES)) as lane:
            column = _column(e, a, e.add(entry, lane), short)
            value = e.broadcast(e.offset(scratch, lane, 4), F32)
            at = e.add(x, e.multiply(column, a["stride"]))
            for n, total in enumerate(totals):
                numbers = e.load(e.add(at, 64 * n), FLOATS)
                total.value = e.fma(value, numbers, total.value)
    return [total.value for total in totals]


@contextlib.contextmanager
def _rows(e: Emitter, a: ArgumentBlock, thread: Any, threads: Any) -> Iterator[Any]:
    """A loop over the rows of this thread, which lie together; yields their numbers."""
    first = e.divide(e.multiply(a["rows"], thread), threads)
    last = e.divide(e.multiply(a["rows"], e.add(thread, 1)), threads)
    with e.loop(e.subtract(last, first)) as index:
        yield e.add(first, index)


def _column(e: Emitter, a: ArgumentBlock, entry: Any, short: bool) -> Any:
    kind, size = (I16, 2) if short else (I32, 4)
    return e.builder.zext(e.load(e.offset(a["columns"], entry, size), kind), a["rows"].type)


def _gather(e: Emitter, a: ArgumentBlock, x: Any, entry: Any, short: bool) -> Any:
    """fp32 of x at the columns of sixteen entries. One by one: a gather instruction took longer."""
    found = ir.Constant(FLOATS, ir.Undefined)
    for lane in range(LANES):
        column = _column(e, a, e.add(entry, lane), short)
        number = e.load(e.offset(x, column, 4), F32)
        found = e.builder.insert_element(found, number, ir.Constant(I32, lane))
    return found
