"""Rows of floats of one type copied as another, padded with zeros."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from lath.kernels.simd.emitter import (
    BF16,
    FLOATS,
    FP32,
    I16,
    I32,
    ITEM_BYTES,
    LANES,
    SHORTS,
    Emitter,
)


def copy_row(
    e: Emitter, tail: Any, source: Any, source_type: int, count: Any,
    target: Any, target_type: int, padded: Any,
) -> None:  # fmt: skip
    """`count` floats at `source` → `padded` floats at `target`, zeros behind them.

    target_type: FP32, BF16, or source_type. padded: a multiple of 16. tail: a buffer of 1 vector.
    """
    size, step = ITEM_BYTES[source_type], LANES * ITEM_BYTES[target_type]
    raw_kind = FLOATS if target_type == FP32 else SHORTS

    def convert(address: Any) -> Any:
        if source_type == target_type:
            return e.load(address, raw_kind)
        assert target_type in (FP32, BF16)
        return e.round_floats(e.load_floats(address, source_type), target_type)

    whole = e.divide(count, LANES)
    with e.loop(whole) as i:
        e.store(e.offset(target, i, step), convert(e.offset(source, i, LANES * size)))
    rest = e.subtract(count, e.multiply(whole, LANES))
    with e.when(e.less(e.integer(0), rest)):
        # The memory behind a row need not be ours.
        scalar = I32 if size == 4 else I16
        e.store(tail, e.constant(0))
        begin = e.offset(source, whole, LANES * size)
        with e.loop(rest) as i:
            e.store(e.offset(tail, i, size), e.load(e.offset(begin, i, size), scalar))
        e.store(e.offset(target, whole, step), convert(tail))
    done = e.divide(e.add(count, LANES - 1), LANES)
    with e.loop(e.subtract(e.divide(padded, LANES), done)) as i:
        e.store(e.offset(target, e.add(done, i), step), ir.Constant(raw_kind, None))
