"""The float kernel of `linear` on a CPU: codes decoded to fp32 in registers, fp32 sums.

Whole numbers are converted, up to 4 bits of a table permute the register that holds its entries, 8
bits of one are looked up in memory, 8-bit floats are fp16 bits but for a shift.

The zero point is taken out per group as `zero * Σ x`, so that a code costs a shift, a mask, a
conversion and one multiply-add per token. Eight tokens hide the first three: at every M this was
faster than to decode into memory and multiply there with torch's fp32 matmul (1.2 to 3 times).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lath.formats.codec import Zero
from lath.kernels.linear.cpu_arguments import Arguments
from lath.kernels.linear.cpu_record import (
    ByteScale,
    Output,
    Record,
    RecordReader,
    Stored,
)
from lath.kernels.linear.cpu_streams import Streams, streams_of
from lath.kernels.simd import tables
from lath.kernels.simd.emitter import F32, LANES, Emitter

# Sums of one token that do not wait for each other, to cover the latency of a multiply-add.
_CHAINS = 4


def emit_float(
    e: Emitter,
    begin: Any,
    end: Any,
    arguments: Any,
    width: int,
    zero: Zero,
    half: bool,
    tokens: int,
    stored: Stored = "integer",
    byte_scale: ByteScale = "",
    sparse: bool = False,
) -> None:
    """All tokens, `tokens` at a time, panels [begin, end). sparse: records are."""
    a, record = Arguments(e, arguments), Record(width, zero, half, stored, byte_scale, sparse)
    reader, output = RecordReader(e, a, record), Output(e, a)
    token_tiles = e.divide(e.add(a["tokens"], tokens - 1), tokens)
    with e.loop(e.subtract(end, begin)) as index:
        panel = e.add(begin, index)
        with e.loop(token_tiles) as token_tile:
            streams = streams_of(reader, [panel])
            totals = _multiply(e, a, reader, streams, token_tile, tokens)
            first = e.multiply(token_tile, tokens)
            for m, total in enumerate(totals):
                token = e.add(first, m)
                with e.when(e.builder.icmp_signed("<", token, a["tokens"])):
                    output.store(token, panel, total.value)


def _multiply(
    e: Emitter,
    a: Arguments,
    reader: RecordReader,
    streams: Streams,
    token_tile: Any,
    tokens: int,
) -> list[Any]:
    """fp32 sums of one panel for a tile of tokens, as variables."""
    record = reader.record
    groups_before = e.multiply(token_tile, a["groups"])
    columns_before = e.multiply(groups_before, a["group"])
    x = e.variable(e.add(a["codes"], e.multiply(columns_before, 4 * tokens)))
    totals = [e.variable(e.floats(0.0)) for _ in range(tokens)]
    chains = max(1, _CHAINS // tokens)
    with e.loop(a["groups"]) as group:
        parts = [[e.variable(e.floats(0.0)) for _ in range(chains)] for _ in range(tokens)]
        streams.begin_group()
        with e.loop(reader.steps):
            for column, decoded in enumerate(_numbers(e, reader, streams)):
                for m in range(tokens):
                    value = e.broadcast(e.add(x.value, 4 * (column * tokens + m)), F32)
                    part = parts[m][column % chains]
                    part.value = e.fma(decoded, value, part.value)
            streams.advance()
            x.value = e.add(x.value, 4 * record.columns * tokens)
        entry = e.multiply(e.add(groups_before, group), 4 * tokens)
        (side,) = streams.sides()
        for m in range(tokens):
            dot = _sum(e, [part.value for part in parts[m]])
            total = e.broadcast(e.add(e.add(a["sums"], entry), 4 * m), F32)
            totals[m].value = _scaled(e, reader, dot, side, total, totals[m].value)
        streams.end_group()
    return totals


def _numbers(e: Emitter, reader: RecordReader, streams: Streams) -> Iterator[Any]:
    """The numbers of the codes of a 64-byte vector, sixteen rows at a time, column after column."""
    record = reader.record
    if record.by_column:
        (at,) = streams.addresses()
        for column in range(record.columns):
            address = e.add(at, LANES * column)
            if record.stored == "e4m3":
                yield tables.load_e4m3(e, address)
            elif record.stored == "e5m2":
                yield tables.load_e5m2(e, address)
            else:
                yield tables.gather(e, reader.table, address)
        return
    (word,) = streams.vectors()
    if record.width == 16:
        yield from tables.halves_of(e, word, record.stored == "bf16")
        return
    mask = e.constant((1 << record.width) - 1)
    for shift in range(0, 8, record.width):
        for byte in range(4):
            code = e.shift_right(word, 8 * byte + shift)
            if record.stored in ("integer", "nested"):
                yield e.to_floats(e.builder.and_(code, mask))
            else:
                # The bits above the code's own do not matter: sixteen entries repeat the table.
                yield tables.look_up(e, reader.table, code)


def _sum(e: Emitter, values: list[Any]) -> Any:
    while len(values) > 1:
        values = [e.builder.fadd(*pair) for pair in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _scaled(
    e: Emitter, reader: RecordReader, dot: Any, side: Any, sum_of_x: Any, total: Any
) -> Any:
    """total + scales * (dot - zero * Σ x), or total + scales * dot + minimum * Σ x; tables have no
    zero."""
    if reader.record.zero == "float":
        total = e.fma(reader.minimum(side), sum_of_x, total)
    elif reader.record.zero == "integer":
        zero = e.to_floats(reader.zero_point(side))
        dot = e.fma(e.builder.fneg(zero), sum_of_x, dot)
    elif reader.record.stored in ("integer", "nested"):
        zero_code = reader.record.zero_code - (0.5 if reader.record.stored == "nested" else 0)
        dot = e.fma(e.floats(-zero_code), sum_of_x, dot)
    elif reader.record.stored == "e4m3":
        # Here and not in the scale, which may be 2**127.
        dot = e.builder.fmul(dot, e.floats(tables.E4M3_FACTOR))
    return e.fma(reader.scale(side), dot, total)
