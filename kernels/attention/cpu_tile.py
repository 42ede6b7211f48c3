"""A tile of keys as the CPU kernels see it, and what is fetched of it: numbers to multiply.

A page whose codes are not multiplied as integers, and every float part, is turned into floats in
scratch: keys [64, staged keys]; values [32, values, 2] of bf16 pairs or [64, values] of fp32 where
they come token by token, [values, 64] where they come channel by channel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from lath.formats.pages import PAGE, SUBPAGE, SUBPAGES, UNIT
from lath.kernels.attention.cpu_arguments import Context, fields_of
from lath.kernels.attention.cpu_rows import RowTile, copy_floats, piece
from lath.kernels.simd import lanes, mathematics
from lath.kernels.simd.emitter import BYTES, F32, FP32, I16, LANES, SHORTS

VECTOR = 64
# Between a row of a float part's keys and the one that is asked for: behind the last of a head lies
# the next one's first.
_ROWS_AHEAD = 16


@dataclass(frozen=True)
class KeyTile:
    """Keys of a page or float part.

    start: position of the first. count: how many. tokens: bits of those that are read, missing: of
    the others that count; None where a list has no masks. record, mean: addresses (of a page).
    upcoming: the record of a page that will be read soon; asked: what of it where lists have masks,
    of `cpu_ask`. following, next_mean: the record and the mean that are read next. page: whether it
    is one.
    """

    page: bool
    start: Any
    count: Any
    tokens: Any = None
    missing: Any = None
    record: Any = None
    mean: Any = None
    upcoming: Any = None
    following: Any = None
    next_mean: Any = None
    asked: Any = None


def subpage_is_read(c: Context, tokens: Any, subpage: Any) -> Any:
    """Whether any of 16 tokens is. tokens: bits; subpage: a number, known beforehand or not."""
    known = isinstance(subpage, int)
    shift = c.e.integer(SUBPAGE * subpage) if known else c.e.multiply(subpage, SUBPAGE)
    return c.b.icmp_signed("!=", c.b.trunc(c.b.lshr(tokens, shift), I16), ir.Constant(I16, 0))


@contextlib.contextmanager
def when_read(c: Context, keys: KeyTile | None, subpage: Any) -> Iterator[None]:
    """What is done for a sub-page only if a token of it is read. What is added in others would be
    0 times something."""
    if keys is None or keys.tokens is None:
        yield
        return
    with c.e.when(subpage_is_read(c, keys.tokens, subpage)):
        yield


def offset_code(c: Context, stored: Any, low: Any, codec: str, part: int) -> Any:
    """Codes + 128 as bytes, of part `part` of the channels. stored, low: bytes of the planes."""
    return c.b.xor(signed_code(c, stored, low, codec, part), c.e.constant(-0x7F7F7F80))


def signed_code(c: Context, stored: Any, low: Any, codec: str, part: int) -> Any:
    """int8 codes of part `part` of the channels as bytes."""
    e, b = c.e, c.b
    if codec in ("int8", "e4m3"):
        return stored
    bits = 8 // fields_of(codec)
    mask = (256 - (1 << (8 - bits))) * 0x01010101
    shifted = e.shift_left(stored, 8 - bits * (part + 1))
    upper = b.and_(shifted, e.constant(mask - (1 << 32)))
    if codec == "int8-planes":
        lower = b.and_(e.shift_right(low, 4 * part), e.constant(0x0F0F0F0F))
        return b.or_(upper, lower)
    return b.or_(upper, e.constant((1 << (7 - bits)) * 0x01010101))


def byte_floats(c: Context, code: Any, codec: str) -> Any:
    """Sixteen code bytes as fp32 numbers."""
    if codec == "e4m3":
        return mathematics.decode_e4m3(c.e, c.b.zext(code, c.e.constant(0).type))
    return c.e.to_floats(c.b.sext(code, c.e.constant(0).type))


def stage_page_keys(c: Context, tile: RowTile, keys: KeyTile) -> None:
    """The keys of a page that are not multiplied as integers."""
    e, a, kind = c.e, c.a, c.kind
    target = piece(c, tile, "key_rows")
    row_bytes = e.multiply(a["staged_keys"], kind.item)
    source = e.add(keys.record, a["keys"])
    if kind.key == "float":
        stride = e.multiply(a["stored_keys"], kind.dtype_bytes)
        _stage_rows(
            c, source, stride, keys.count, a["stored_keys"], a["staged_keys"], target, row_bytes,
            keys,
        )  # fmt: skip
        return
    parts = fields_of(kind.key)
    width = e.divide(a["stored_keys"], parts)
    blocks = e.divide(width, UNIT)
    with e.loop(keys.count) as token, when_read(c, keys, e.divide(token, SUBPAGE)):
        subpage = e.divide(token, SUBPAGE)
        within = e.subtract(token, e.multiply(subpage, SUBPAGE))
        start = e.add(e.multiply(subpage, e.multiply(width, SUBPAGE)), e.multiply(within, UNIT))
        row = e.add(target, e.multiply(token, row_bytes))
        with e.loop(blocks) as block:
            at = e.add(start, e.multiply(block, SUBPAGE * UNIT))
            units = _units(c, keys.record, "keys", at, kind.key)
            for part in range(parts):
                code = _unit_code(c, units, kind.key, part)
                value = e.round_floats(byte_floats(c, code, kind.key), kind.item_type)
                channel = e.add(e.multiply(width, part), e.multiply(block, UNIT))
                e.store(e.offset(row, channel, kind.item), value)
        with e.loop(e.divide(e.subtract(a["staged_keys"], a["stored_keys"]), LANES)) as i:
            channel = e.add(a["stored_keys"], e.multiply(i, LANES))
            blank = e.round_floats(e.floats(0.0), kind.item_type)
            e.store(e.offset(row, channel, kind.item), blank)


def _units(c: Context, record: Any, side: str, at: Any, codec: str) -> tuple[Any, Any]:
    """The 16 bytes at an offset of the planes of a side, in int lanes of four bytes each."""
    e = c.e
    planes = [side, f"{side}_low"] if codec == "int8-planes" else [side]
    found = [lanes.broadcast_unit(e, e.add(e.add(record, c.a[plane]), at)) for plane in planes]
    return found[0], found[-1]


def _unit_code(c: Context, units: tuple[Any, Any], codec: str, part: int) -> Any:
    """Sixteen code bytes of one part."""
    codes = c.b.bitcast(signed_code(c, *units, codec, part), ir.VectorType(BYTES.element, VECTOR))
    return c.e.shuffle(codes, codes, list(range(LANES)))


def stage_page_values(c: Context, tile: RowTile, keys: KeyTile) -> None:
    """The values of a page that are not multiplied as integers."""
    e, a, kind = c.e, c.a, c.kind
    target = piece(c, tile, "value_rows")
    if kind.value == "float":
        source = e.add(keys.record, a["values"])
        stride = e.multiply(a["stored_values"], kind.dtype_bytes)
        stage_tokens(c, source, stride, keys.count, a["stored_values"], target, keys)
        return
    parts = fields_of(kind.value)
    width = e.divide(a["stored_values"], parts)
    blank = e.round_floats(e.floats(0.0), kind.item_type)
    with e.loop(width) as stored, e.loop(e.integer(SUBPAGES)) as subpage:
        places = []
        for part in range(parts):
            channel = e.add(e.multiply(width, part), stored)
            row = e.add(target, e.multiply(channel, PAGE * kind.item))
            places.append(e.offset(row, subpage, SUBPAGE * kind.item))
            if keys.tokens is not None:  # else what a page before left there
                e.store(places[part], blank)
        with when_read(c, keys, subpage):
            at = e.multiply(e.add(e.multiply(subpage, width), stored), SUBPAGE)
            units = _units(c, keys.record, "values", at, kind.value)
            for part in range(parts):
                code = _unit_code(c, units, kind.value, part)
                value = e.round_floats(byte_floats(c, code, kind.value), kind.item_type)
                e.store(places[part], value)


def _stage_rows(
    c: Context,
    source: Any,
    stride: Any,
    count: Any,
    channels: Any,
    padded: Any,
    target: Any,
    step: Any,
    keys: KeyTile | None = None,
    beside: Callable[[Any], None] | None = None,
) -> None:
    """beside: what to do besides for each token."""
    with c.e.loop(count) as token, when_read(c, keys, c.e.divide(token, SUBPAGE)):
        if beside is not None:
            beside(token)
        copy_floats(
            c, c.e.add(source, c.e.multiply(token, stride)), channels, padded,
            c.e.add(target, c.e.multiply(token, step)), c.kind.item_type,
        )  # fmt: skip


def stage_part_keys(
    c: Context, tile: RowTile, source: Any, stride: Any, count: Any, values: tuple[Any, Any]
) -> None:
    """The keys of a float part. values: address and stride of its values, which come next."""
    e, a = c.e, c.a

    def ask(token: Any) -> None:
        for row, channels in (
            (e.add(source, e.multiply(stride, e.add(token, _ROWS_AHEAD))), a["key_dim"]),
            (e.add(values[0], e.multiply(values[1], token)), a["value_dim"]),
        ):
            nbytes = e.multiply(channels, c.kind.dtype_bytes)
            with e.loop(e.divide(e.add(nbytes, VECTOR - 1), VECTOR)) as i:
                e.prefetch(e.offset(row, i, VECTOR))

    step = e.multiply(a["staged_keys"], c.kind.item)
    target = piece(c, tile, "key_rows")
    _stage_rows(
        c, source, stride, count, a["key_dim"], a["staged_keys"], target, step,
        beside=ask if c.kind.few else None,
    )  # fmt: skip


def stage_tokens(
    c: Context,
    source: Any,
    stride: Any,
    count: Any,
    channels: Any,
    target: Any,
    keys: KeyTile | None = None,
) -> None:
    """Values that come token by token: [64, values] of fp32, or pairs of tokens of bf16. keys: the
    page that they are of."""
    e, b, kind = c.e, c.b, c.kind
    padded = c.a["stored_values"]
    if not kind.brain:
        step = e.multiply(padded, 4)
        _stage_rows(c, source, stride, count, channels, padded, target, step, keys)
        return
    whole = e.divide(channels, LANES)
    rest = e.subtract(channels, e.multiply(whole, LANES))
    order = [half + lane for lane in range(LANES) for half in (0, LANES)]
    blank = ir.Constant(SHORTS, None)

    def tail(address: Any) -> Any:
        e.store(c.tail, e.constant(0))
        with e.loop(rest) as i:
            e.store(e.offset(c.tail, i, 2), e.load(e.offset(address, i, 2), SHORTS.element))
        return e.load(c.tail, SHORTS)

    with (
        e.loop(e.divide(e.add(count, 1), 2)) as pair,
        when_read(c, keys, e.divide(pair, SUBPAGE // 2)),
    ):
        first = e.add(source, e.multiply(e.multiply(pair, 2), stride))
        second = e.add(first, stride)
        exists = e.less(e.add(e.multiply(pair, 2), 1), count)
        # The slot behind the last token may hold NaN: its row is read from the first instead.
        safe = b.select(exists, second, first)
        row = e.add(target, e.multiply(e.multiply(pair, padded), 4))
        with e.loop(whole) as i:
            left = e.load(e.offset(first, i, 32), SHORTS)
            right = b.select(exists, e.load(e.offset(safe, i, 32), SHORTS), blank)
            e.store(e.offset(row, i, VECTOR), e.shuffle(left, right, order))
        with e.when(e.less(e.integer(0), rest)):
            left = tail(e.offset(first, whole, 32))
            right = b.select(exists, tail(e.offset(safe, whole, 32)), blank)
            e.store(e.offset(row, whole, VECTOR), e.shuffle(left, right, order))


def token_scale(c: Context, keys: KeyTile, subpage: Any) -> Any:
    """fp32 scales of the 16 tokens of a subpage."""
    address = c.e.add(keys.record, c.a["token_scales"])
    return c.e.load_floats(c.e.offset(address, subpage, VECTOR), FP32)


def page_scale(c: Context, keys: KeyTile) -> Any:
    return c.e.broadcast(c.e.add(keys.record, c.a["key_scales"]), F32)
