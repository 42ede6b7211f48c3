"""Ternary weights by look-up (Vec-LUT, 2512.06443): where no instruction adds four products.

Four weights of a row are an index into the 81 sums that four activations can make. An entry holds
those sums for all tokens of a tile side by side, so that an index is read once and adds a vector.

    indices     uint8 [K'/32, panels, 16 rows, 8]: 27 t0 + 9 t1 + 3 t2 + t3, each of 0 .. 2
    tables      int16 [8, 81, 16 tokens], of one step of 32 columns: first-level cache holds them
    sums        int16 [rows, 16 tokens] over eight steps, then int32

An entry is at most 4 * 127, and 64 of them are added before the sums are widened: 32512 < 2**15, so
that int16 cannot overflow whatever the numbers are. The integers are those of the products.
"""

from __future__ import annotations

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
from lath.kernels.linear.plan_cpu import LOOK_UP_TILE
from lath.kernels.simd import lanes
from lath.kernels.simd.emitter import F32, I64, LANES, SHORTS, Emitter

WEIGHTS = 4  # of an index
ENTRIES = 3**WEIGHTS
GROUPS = 8  # indices of a row in a step: they are read as one word
STEPS = (2**15 - 1) // (WEIGHTS * LARGEST_CODE * GROUPS)  # until int16 sums are full
STEP_COLUMNS = WEIGHTS * GROUPS
# Panels whose sums lie on the stack (393 KB): tables are made anew for each such chunk of rows.
CHUNK = 256
# Rows whose indices are read before their turn: instructions that wait for a word just read fill
# the queues in which later rows would run ahead (1.15 times as long). And bytes of indices that
# are asked for before that.
AHEAD, PREFETCHED = 4, 4096
_NOTHING = ENTRIES // 2  # the index of four zeros
_ENTRY = 2 * LOOK_UP_TILE  # bytes
_ENTRY_BITS = _ENTRY.bit_length() - 1


@dataclass(frozen=True)
class LookUp:
    """indices: see above, those of `AHEAD` rows more in memory. scales: fp32 [16 * panels]."""

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
        return self.indices.untyped_storage().nbytes() + self.scales.nbytes


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
    memory = torch.zeros(ordered.size + AHEAD * GROUPS, dtype=torch.uint8)
    own = memory[: ordered.size].view(ordered.shape).copy_(torch.from_numpy(ordered))
    kind = np.float16 if view.record.half else np.float32
    scales = np.ascontiguousarray(codes[:, size:]).view(kind).astype(np.float32).reshape(-1)
    return LookUp(view.rows, view.columns, own, torch.from_numpy(scales))


def emit_look_up(e: Emitter, begin: Any, end: Any, arguments: Any) -> None:
    """All tokens in tiles of sixteen, panels [begin, end) in chunks."""
    a = Arguments(e, arguments)
    loop = _LookUps(e, a)
    steps = e.divide(a["group"], STEP_COLUMNS)
    panels = e.subtract(end, begin)
    with e.loop(e.divide(e.add(panels, CHUNK - 1), CHUNK)) as chunk:
        first = e.add(begin, e.multiply(chunk, CHUNK))
        count = e.smaller_of(e.subtract(end, first), CHUNK)
        with e.loop(e.divide(e.add(a["tokens"], LOOK_UP_TILE - 1), LOOK_UP_TILE)) as tile:
            loop.clear(count)
            with e.loop(e.divide(e.add(steps, STEPS - 1), STEPS)) as run:
                start = e.multiply(run, STEPS)
                with e.loop(e.smaller_of(e.subtract(steps, start), STEPS)) as i:
                    loop.make_tables(tile, e.add(start, i))
                    loop.add_entries(first, count, e.add(start, i))
                loop.widen(count)
            loop.finish(first, count, tile)


class _LookUps:
    """Tables and sums of one chunk of rows and one tile of tokens, on the stack."""

    def __init__(self, e: Emitter, a: Arguments) -> None:
        self.e, self.a = e, a
        self.tables = e.buffer(GROUPS * ENTRIES * _ENTRY // VECTOR_BYTES)
        self.shorts = e.buffer(CHUNK * PANEL * _ENTRY // VECTOR_BYTES)
        self.sums = e.buffer(CHUNK * PANEL)
        self.values = e.buffer(LANES)
        self.output = Output(e, a)

    def clear(self, panels: Any) -> None:
        e = self.e
        with e.loop(e.multiply(panels, PANEL)) as row:
            e.store(e.offset(self.sums, row, VECTOR_BYTES), e.constant(0))
            e.store(e.offset(self.shorts, row, _ENTRY), ir.Constant(SHORTS, [0] * LANES))

    def make_tables(self, tile: Any, step: Any) -> None:
        """The tables of the eight groups of a step: each pair of columns first, then all four."""
        e = self.e
        column = e.add(e.multiply(tile, self.a["group"]), e.multiply(step, STEP_COLUMNS))
        words = e.offset(self.a["codes"], column, LANES)
        with e.loop(e.integer(GROUPS)) as group:
            table = e.offset(self.tables, group, ENTRIES * _ENTRY)
            word = e.load(e.offset(words, group, VECTOR_BYTES))
            columns = [self._column(word, byte) for byte in range(WEIGHTS)]
            left, right = self._pair(*columns[:2]), self._pair(*columns[2:])
            for index in range(ENTRIES):
                value = e.builder.add(left[index // 9], right[index % 9])
                e.store(e.add(table, index * _ENTRY), value)

    def _column(self, words: Any, byte: int) -> Any:
        e = self.e
        value = e.shift_right_signed(e.shift_left(words, 24 - 8 * byte), 24)
        return e.builder.trunc(value, SHORTS)

    def _pair(self, first: Any, second: Any) -> list[Any]:
        """first * w0 + second * w1 of the nine pairs of weights."""
        builder, zero = self.e.builder, ir.Constant(SHORTS, [0] * LANES)
        rows = [builder.sub(zero, first), zero, first]
        return [op for row in rows for op in (builder.sub(row, second), row,
                                              builder.add(row, second))]  # fmt: skip

    def add_entries(self, first: Any, panels: Any, step: Any) -> None:
        """Sums of every row plus the entries that its eight indices name."""
        e = self.e
        before = e.add(e.multiply(step, self.a["panels"]), first)
        indices = e.add(self.a["records"], e.multiply(before, PANEL * GROUPS))
        # Where LLVM knows the mask, it takes the rotation for a shift, which needs a copy first.
        mask = e.opaque(e.integer(0xFF << _ENTRY_BITS))
        words = [e.variable(e.load(e.add(indices, GROUPS * row), I64)) for row in range(AHEAD)]
        with e.loop(e.multiply(panels, PANEL // AHEAD)) as i:
            places = e.offset(self.shorts, i, AHEAD * _ENTRY)
            following = e.offset(e.add(indices, AHEAD * GROUPS), i, AHEAD * GROUPS)
            e.prefetch(e.add(following, PREFETCHED))
            for row, word in enumerate(words):
                place = e.add(places, row * _ENTRY)
                total = e.load(place, SHORTS)
                for group in range(GROUPS):
                    # The index where an entry's bytes are counted: one rotation and one mask.
                    start = e.rotate_right(word.value, 8 * group - _ENTRY_BITS)
                    table = e.add(self.tables, group * ENTRIES * _ENTRY)
                    entry = e.add(table, e.builder.and_(start, mask))
                    total = e.builder.add(total, e.load(entry, SHORTS))
                e.store(place, total)
                word.value = e.load(e.add(following, row * GROUPS), I64)

    def widen(self, panels: Any) -> None:
        """Add the int16 sums to the int32 ones and begin them anew."""
        e = self.e
        with e.loop(e.multiply(panels, PANEL)) as row:
            short = e.offset(self.shorts, row, _ENTRY)
            place = e.offset(self.sums, row, VECTOR_BYTES)
            wide = e.builder.sext(e.load(short, SHORTS), e.constant(0).type)
            e.store(place, e.builder.add(e.load(place), wide))
            e.store(short, ir.Constant(SHORTS, [0] * LANES))

    def finish(self, first: Any, panels: Any, tile: Any) -> None:
        """Scale the integers and store y: rows become lanes."""
        e, a = self.e, self.a
        token = e.multiply(tile, LOOK_UP_TILE)
        left = e.smaller_of(e.subtract(a["tokens"], token), LOOK_UP_TILE)
        with e.loop(panels) as i:
            panel = e.add(first, i)
            scales = e.load(e.offset(a["row_scales"], panel, VECTOR_BYTES), e.floats(0.0).type)
            start = e.offset(self.sums, i, PANEL * VECTOR_BYTES)
            rows = [e.load(e.add(start, VECTOR_BYTES * row)) for row in range(PANEL)]
            for m, exact in enumerate(lanes.transpose(e, rows)):
                own = e.broadcast(e.offset(a["scales"], e.add(token, m), 4), F32)
                value = e.builder.fmul(e.to_floats(exact), e.builder.fmul(scales, own))
                e.store(e.add(self.values, VECTOR_BYTES * m), value)
            with e.loop(left) as m:
                value = e.load(e.offset(self.values, m, VECTOR_BYTES), scales.type)
                self.output.store(e.add(token, m), panel, value)
