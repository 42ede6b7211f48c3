"""Scores of tokens from labels: a few channels of each key, one row of q at a time.

Every query head reads rows of labels of its own, so that rows share nothing but the page.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from lath.formats.pages import PAGE
from lath.kernels.select.cpu_arguments import VECTOR, Arguments, Context
from lath.kernels.select.cpu_units import (
    Unit,
    prepare_pages,
    prepare_rows,
    share,
)
from lath.kernels.simd.arguments import load_index
from lath.kernels.simd.emitter import BYTES, F32, FLOATS, I16, I32, I64, INTS, LANES, Emitter

_GROUPS = PAGE // LANES


def emit_label_scores(
    e: Emitter, thread: Any, threads: Any, arguments: Any, packed: bool, centred: bool, dtype: int
) -> None:
    """The units thread, thread + threads, … of all. packed: labels of 4 bits. centred: of keys
    that a mean was taken from."""
    a = Arguments(e, arguments)
    c = Context(e, a, dtype)
    with e.loop(share(c, thread, threads)) as i:
        unit = Unit(c, thread, e.add(thread, e.multiply(i, threads)))
        with e.when(c.b.not_(unit.empty)):
            prepare_rows(c, unit, squares=False)
            prepare_pages(c, unit, logs=False)
            _pick(c, unit)
            with e.loop(unit.entries) as entry, e.loop(unit.heads) as h, e.loop(unit.rows) as n:
                _score(c, unit, entry, h, n, packed, centred)


def _chosen(c: Context, unit: Unit, head: Any) -> Any:
    """The address of the rows of labels that a query head reads."""
    e, a = c.e, c.a
    heads = e.multiply(a["kv_heads"], a["group"])
    number = e.add(e.multiply(unit.sequence, heads), head)
    return e.add(a["rows_of"], e.multiply(e.multiply(number, a["chosen"]), 4))


def _pick(c: Context, unit: Unit) -> None:
    """The channels that a row reads, and q there."""
    e, a = c.e, c.a
    with e.loop(unit.heads) as h, e.loop(unit.rows) as n:
        head, _ = unit.head_and_token(h, n)
        chosen = _chosen(c, unit, head)
        channels = e.multiply(e.add(unit.first_head, h), e.multiply(a["label_rows"], 4))
        channels = e.add(a["label_channels"], channels)
        q = unit.row_of("q", h, n, e.multiply(a["stored_keys"], 4))
        row_bytes = e.multiply(a["chosen"], 4)
        with e.loop(a["chosen"]) as r:
            row = load_index(e, e.offset(chosen, r, 4))
            channel = load_index(e, e.offset(channels, row, 4))
            number = e.load(e.offset(q, channel, 4), F32)
            e.store(e.offset(unit.row_of("picked", h, n, row_bytes), r, 4), number)
            channel = c.b.trunc(channel, I32)
            e.store(e.offset(unit.row_of("channels", h, n, row_bytes), r, 4), channel)


def _score(c: Context, unit: Unit, entry: Any, h: Any, n: Any, packed: bool, centred: bool) -> None:
    """The 64 tokens of an entry for one row."""
    e, a, b = c.e, c.a, c.b
    head, token = unit.head_and_token(h, n)
    kv_head = e.add(unit.first_head, h)
    page = load_index(e, e.offset(unit.piece("places"), entry, 4))
    labels = e.add(a["labels"], e.multiply(page, a["labels_page"]))
    labels = e.add(labels, e.multiply(kv_head, a["labels_head"]))
    index = e.load(e.offset(unit.piece("pages"), entry, 8), I64)
    index = e.add(index, e.multiply(kv_head, a["index_head"]))
    means = e.add(index, a["mean"])
    row_bytes = e.multiply(a["chosen"], 4)
    picked = unit.row_of("picked", h, n, row_bytes)
    channels = unit.row_of("channels", h, n, row_bytes)
    chosen = _chosen(c, unit, head)
    sums = [e.variable(e.floats(0.0)) for _ in range(_GROUPS)]
    middle = e.variable(ir.Constant(F32, 0.0))
    with e.loop(a["chosen"]) as r:
        row = load_index(e, e.offset(chosen, r, 4))
        number = e.load(e.offset(picked, r, 4), F32)
        if centred:
            channel = load_index(e, e.offset(channels, r, 4))
            product = b.fmul(number, _mean(c, e.offset(means, channel, 2)))
            middle.value = b.fadd(middle.value, product)
        wide = e.splat(number)
        for total, codes in zip(sums, _codes(c, labels, row, packed), strict=True):
            total.value = e.fma(wide, e.to_floats(codes), total.value)
    scale = e.splat(a.real("scale"))
    at = e.add(a["label_scales"], e.multiply(page, a["label_scales_page"]))
    factor = e.broadcast(e.offset(at, kv_head, 4), F32)
    shift = e.splat(middle.value)
    scores = [b.fmul(scale, e.fma(total.value, factor, shift)) for total in sums]
    target = e.multiply(unit.flat_row(head, token), e.multiply(a["width"], 4 * PAGE))
    place = e.multiply(e.add(unit.begin, entry), 4 * PAGE)
    count = load_index(e, e.offset(unit.piece("counted"), entry, 4))
    _store(c, unit, e.add(e.add(a["out"], target), place), scores, count)


def _mean(c: Context, address: Any) -> Any:
    """The bfloat16 in memory, as fp32."""
    wide = c.b.zext(c.e.load(address, I16), I32)
    return c.b.bitcast(c.b.shl(wide, ir.Constant(I32, 16)), F32)


def _codes(c: Context, labels: Any, row: Any, packed: bool) -> list[Any]:
    """A row of labels as integers, 16 tokens in each vector."""
    e, b = c.e, c.b
    if not packed:
        base = e.add(labels, e.multiply(row, PAGE))
        return [b.sext(e.load(e.add(base, LANES * g), BYTES), INTS) for g in range(_GROUPS)]
    base = e.add(labels, e.multiply(row, PAGE // 2))
    halves = [e.load_bytes(e.add(base, LANES * g)) for g in range(_GROUPS // 2)]
    return [
        e.shift_right_signed(e.shift_left(half, shift), 28) for shift in (28, 24) for half in halves
    ]


def _store(c: Context, unit: Unit, target: Any, scores: list[Any], count: Any) -> None:
    e = c.e
    with e.choice(e.less(count, PAGE)) as (part, whole):
        with whole:
            for g, values in enumerate(scores):
                e.store(e.add(target, VECTOR * g), values)
        with part:
            dots = unit.piece("dots")
            for g, values in enumerate(scores):
                e.store(e.add(dots, VECTOR * g), values)
            with e.loop(count) as i:
                e.store(e.offset(target, i, 4), e.load(e.offset(dots, i, 4), FLOATS.element))
