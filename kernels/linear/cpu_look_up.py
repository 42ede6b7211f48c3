"""Ternary weights by look-up (Vec-LUT, 2512.06443): where no instruction adds four products.

Four weights of a row are an index into the 81 sums that four activations can make. An entry holds
those sums for all tokens of a tile side by side, so that an index is read once and adds a vector.

    indices     uint8 [K'/32, panels, 16 rows, 8]: 27 t0 + 9 t1 + 3 t2 + t3, each of 0 .. 2
    tables      int16 [8, 81, 16 tokens] or [4, 81, 32 tokens]: first-level cache holds them
    sums        int16 [rows, tokens] over 64 indices, then int32

An entry is at most 4 * 127, and 64 of them are added before the sums are widened: 32512 < 2**15, so
that int16 cannot overflow whatever the numbers are. The integers are those of the products.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from lath.formats.activations import LARGEST_CODE
from lath.formats.packing import PANEL, round_up
from lath.kernels.linear.cpu_arguments import Arguments
from lath.kernels.linear.cpu_record import VECTOR_BYTES, Output, Record
from lath.kernels.linear.cpu_view import CpuView
from lath.kernels.simd import lanes
from lath.kernels.simd.emitter import F32, I16, I32, I64, LANES, SHORTS, Emitter

WEIGHTS = 4  # of an index
ENTRIES = 3**WEIGHTS
GROUPS = 8  # indices of a row that lie together
STEP_COLUMNS = WEIGHTS * GROUPS
FULL = (2**15 - 1) // (WEIGHTS * LARGEST_CODE)  # indices until int16 sums are full
_NOTHING = ENTRIES // 2  # the index of four zeros
# Tokens of all tables that lie side by side, and of all sums of a chunk of rows, which tables are
# made anew for: 21 KB, and 393 KB on the stack.
_TABLES, _CHUNK = 8 * 16, 256 * 16


@dataclass(frozen=True)
class LookUp:
    """indices: see above. scales: fp32 [16 * panels]."""

    rows: int
    columns: int
    indices: Tensor
    scales: Tensor

    @property
    def panels(self) -> int:
        return self.indices.shape[1]

    @property
    def group(self) -> int:
        """Columns with all padding, K'."""
        return self.indices.shape[0] * STEP_COLUMNS

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.scales.nbytes


def can_look_up(record: Record, groups: int) -> bool:
    """Whether `look_up_of` takes a view: 2-bit codes with one scale for a row."""
    return record.width == 2 and record.stored == "integer" and groups == 1


def look_up_of(view: CpuView) -> LookUp:
    """The indices of a view of ternary codes (`can_look_up`)."""
    codes = view.records[:, 0].numpy()
    size = codes.shape[1] - view.record.side_bytes
    words = codes[:, :size].reshape(view.panels, -1, PANEL, 4).astype(np.int16)
    # Four bytes of a field are four columns in a row; -1, 0, 1 are stored as 1, 2, 3.
    powers = 3 ** np.arange(WEIGHTS - 1, -1, -1)
    fields = [((words >> 2 * j & 3) - 1) @ powers for j in range(4)]
    indices = np.stack(fields, axis=2).reshape(view.panels, -1, PANEL)
    steps = round_up(view.group, STEP_COLUMNS) // STEP_COLUMNS
    padded = np.full((view.panels, steps * GROUPS, PANEL), _NOTHING, np.uint8)
    padded[:, : indices.shape[1]] = indices
    ordered = padded.reshape(view.panels, steps, GROUPS, PANEL).transpose(1, 0, 3, 2)
    kind = np.float16 if view.record.half else np.float32
    scales = np.ascontiguousarray(codes[:, size:]).view(kind).astype(np.float32).reshape(-1)
    return LookUp(
        view.rows, view.columns, torch.from_numpy(np.ascontiguousarray(ordered)),
        torch.from_numpy(scales),
    )  # fmt: skip


def emit_look_up(e: Emitter, begin: Any, end: Any, arguments: Any, tokens: int) -> None:
    """All tokens in tiles of `tokens`, 16 or 32, panels [begin, end) in chunks."""
    a = Arguments(e, arguments)
    loop = _LookUps(e, a, tokens)
    steps = e.divide(a["group"], WEIGHTS * loop.groups)
    panels, room = e.subtract(end, begin), _CHUNK // tokens
    long = FULL // loop.groups
    with e.loop(e.divide(e.add(panels, room - 1), room)) as chunk:
        first = e.add(begin, e.multiply(chunk, room))
        count = e.smaller_of(e.subtract(end, first), room)
        with e.loop(e.divide(e.add(a["tokens"], tokens - 1), tokens)) as tile:
            loop.clear(count)
            with e.loop(e.divide(e.add(steps, long - 1), long)) as run:
                start = e.multiply(run, long)
                with e.loop(e.smaller_of(e.subtract(steps, start), long)) as i:
                    loop.make_tables(tile, e.add(start, i))
                    loop.add_entries(first, count, e.add(start, i))
                loop.widen(count)
            loop.finish(first, count, tile)


class _LookUps:
    """Tables and sums of one chunk of rows and one tile of tokens, on the stack."""

    def __init__(self, e: Emitter, a: Arguments, tokens: int) -> None:
        self.e, self.a, self.tokens = e, a, tokens
        self.groups = _TABLES // tokens  # indices of a step, whose tables there are at once
        self.entry = 2 * tokens  # bytes
        self.shorts_of, self.wide = ir.VectorType(I16, tokens), ir.VectorType(I32, tokens)
        self.nothing = ir.Constant(self.shorts_of, [0] * tokens)
        self.tables = e.buffer(_TABLES * ENTRIES * 2 // VECTOR_BYTES)
        self.shorts = e.buffer(_CHUNK * PANEL * 2 // VECTOR_BYTES)
        self.sums = e.buffer(_CHUNK * PANEL * 4 // VECTOR_BYTES)
        self.values = e.buffer(LANES)
        self.output = Output(e, a)

    def clear(self, panels: Any) -> None:
        e = self.e
        with e.loop(e.multiply(panels, PANEL)) as row:
            place = e.offset(self.sums, row, 2 * self.entry)
            e.store(place, ir.Constant(self.wide, [0] * self.tokens))
            e.store(e.offset(self.shorts, row, self.entry), self.nothing)

    def make_tables(self, tile: Any, step: Any) -> None:
        """The tables of the groups of a step: each pair of columns first, then all four."""
        e = self.e
        column = e.multiply(step, WEIGHTS * self.groups)
        column = e.add(e.multiply(tile, self.a["group"]), column)
        words = e.offset(self.a["codes"], column, self.tokens)
        with e.loop(e.integer(self.groups)) as group:
            table = e.offset(self.tables, group, ENTRIES * self.entry)
            start = e.offset(words, group, WEIGHTS * self.tokens)
            parts = range(0, WEIGHTS * self.tokens, VECTOR_BYTES)
            own = [e.load(e.add(start, part)) for part in parts]
            columns = [self._column(own, byte) for byte in range(WEIGHTS)]
            left, right = self._pair(*columns[:2]), self._pair(*columns[2:])
            for index in range(ENTRIES):
                value = e.builder.add(left[index // 9], right[index % 9])
                e.store(e.add(table, index * self.entry), value)

    def _column(self, words: list[Any], byte: int) -> Any:
        """One byte of every word, of sixteen tokens each, as int16."""
        e = self.e
        moved = [e.shift_left(word, 24 - 8 * byte) for word in words]
        parts = [e.builder.trunc(e.shift_right_signed(word, 24), SHORTS) for word in moved]
        return functools.reduce(e.concatenate, parts)

    def _pair(self, first: Any, second: Any) -> list[Any]:
        """first * w0 + second * w1 of the nine pairs of weights."""
        builder, zero = self.e.builder, self.nothing
        rows = [builder.sub(zero, first), zero, first]
        return [op for row in rows for op in (builder.sub(row, second), row,
                                              builder.add(row, second))]  # fmt: skip

    def add_entries(self, first: Any, panels: Any, step: Any) -> None:
        """Sums of every row plus the entries that its indices of a step name."""
        e = self.e
        steps = GROUPS // self.groups  # whose indices lie together
        together = e.divide(step, steps)
        before = e.add(e.multiply(together, self.a["panels"]), first)
        indices = e.add(self.a["records"], e.multiply(before, PANEL * GROUPS))
        own = e.subtract(step, e.multiply(together, steps))
        indices = e.add(indices, e.multiply(own, self.groups))
        kind, bits = ir.IntType(8 * self.groups), self.entry.bit_length() - 1
        with e.loop(e.multiply(panels, PANEL)) as row:
            word = e.load(e.offset(indices, row, GROUPS), kind)
            word = word if kind == I64 else e.builder.zext(word, I64)
            place = e.offset(self.shorts, row, self.entry)
            total = e.load(place, self.shorts_of)
            for group in range(self.groups):
                # The index where an entry's bytes are counted: one rotation and one mask.
                start = e.rotate_right(word, 8 * group - bits)
                start = e.builder.and_(start, e.integer(0xFF << bits))
                table = e.add(self.tables, group * ENTRIES * self.entry)
                total = e.builder.add(total, e.load(e.add(table, start), self.shorts_of))
            e.store(place, total)

    def widen(self, panels: Any) -> None:
        """Add the int16 sums to the int32 ones and begin them anew."""
        e = self.e
        with e.loop(e.multiply(panels, PANEL)) as row:
            short = e.offset(self.shorts, row, self.entry)
            place = e.offset(self.sums, row, 2 * self.entry)
            wide = e.builder.sext(e.load(short, self.shorts_of), self.wide)
            e.store(place, e.builder.add(e.load(place, self.wide), wide))
            e.store(short, self.nothing)

    def finish(self, first: Any, panels: Any, tile: Any) -> None:
        """Scale the integers and store y: rows become lanes, sixteen tokens at a time."""
        e, a = self.e, self.a
        with e.loop(panels) as i, e.loop(e.integer(self.tokens // LANES)) as part:
            panel = e.add(first, i)
            token = e.add(e.multiply(tile, self.tokens), e.multiply(part, LANES))
            left = e.clip(e.subtract(a["tokens"], token), e.integer(LANES))
            scales = e.load(e.offset(a["row_scales"], panel, VECTOR_BYTES), e.floats(0.0).type)
            start = e.offset(self.sums, i, PANEL * 2 * self.entry)
            start = e.offset(start, part, VECTOR_BYTES)
            rows = [e.load(e.add(start, 2 * self.entry * row)) for row in range(PANEL)]
            for m, exact in enumerate(lanes.transpose(e, rows)):
                own = e.broadcast(e.offset(a["scales"], e.add(token, m), 4), F32)
                value = e.builder.fmul(e.to_floats(exact), e.builder.fmul(scales, own))
                e.store(e.add(self.values, VECTOR_BYTES * m), value)
            with e.loop(left) as m:
                value = e.load(e.offset(self.values, m, VECTOR_BYTES), scales.type)
                self.output.store(e.add(token, m), panel, value)
