"""The int8 kernel of `linear` on a CPU: register tiles of tokens and panels, one token included.

It adds `code * activation` in int32 over one group (a view's group is short enough for that,
`cpu_view.py`), takes the zero point out as `zero * Σ activation`, and scales the exact integer: in
fp32, or where the scales of groups are whole numbers in int32, and then a row once at the end. The
4-bit codes of a table of whole numbers become its entries by a look-up in a register.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lath.formats.codec import Zero
from lath.kernels.linear.cpu_arguments import Arguments
from lath.kernels.linear.cpu_record import (
    VECTOR_BYTES,
    ByteScale,
    Output,
    Record,
    RecordReader,
    Stored,
    whole_entries,
)
from lath.kernels.linear.cpu_streams import Scratch, Streams, streams_of
from lath.kernels.simd import tables
from lath.kernels.simd.emitter import F32, Emitter

# Bytes that one token asks for ahead of use, of codes of 2 bits and fewer: the hardware's own
# prefetching stops at every 4 KB, and their products are done sooner than the next page comes.
# 6 to 8 KB were the fastest (2560 x 6912: 150 to 121 us); wider codes took longer with it.
_AHEAD = 6144
# And of wider codes, where panels are so long that four are read at a time: 2 KB and more took up
# to 1.3 times as long, and single panels gained nothing from any distance.
_AHEAD_LONG = 1024
# With up to this many accumulators, registers last for one per field of a byte.
_APART = 16


def emit_tile(
    e: Emitter,
    begin: Any,
    end: Any,
    arguments: Any,
    width: int,
    zero: Zero,
    half: bool,
    tokens: int,
    panels: int,
    stored: Stored = "integer",
    byte_scale: ByteScale = "",
    sparse: bool = False,
    expand: bool = False,
) -> None:
    """All tokens, panels [begin, end): register tiles of `tokens` times `panels` vectors.

    sparse: records are. expand: into memory, the panels of a tile once for all tokens.
    """
    a, record = Arguments(e, arguments), Record(width, zero, half, stored, byte_scale, sparse)
    tile = _Tile(e, a, record, tokens, panels)
    scratch = Scratch(e, a, tile.reader) if expand else None
    ahead = 0
    if tokens == 1:
        ahead = _AHEAD if record.fields >= 4 else _AHEAD_LONG if panels > 1 else 0
    count = e.divide(e.add(e.subtract(end, begin), panels - 1), panels)
    token_tiles = e.divide(e.add(a["tokens"], tokens - 1), tokens)
    last = e.subtract(end, 1)
    with e.loop(count) as index:
        first = e.add(begin, e.multiply(index, panels))
        # A tile over the end computes the last panel again, which is harmless.
        columns = [e.smaller_of(e.add(first, n), last) for n in range(panels)]
        if scratch is not None:
            scratch.fill(columns)
        with e.loop(token_tiles) as token_tile:
            streams = scratch.streams() if scratch else streams_of(tile.reader, columns, ahead)
            tile.emit(columns, streams, token_tile)


class _Tile:
    """The register tile: `tokens` x `panels` int32 accumulators, fp32 sums in a stack buffer."""

    def __init__(self, e: Emitter, a: Arguments, record: Record, tokens: int, panels: int) -> None:
        self.e, self.a, self.tokens, self.panels = e, a, tokens, panels
        self.reader, self.output = RecordReader(e, a, record), Output(e, a)
        self.totals = e.buffer(tokens * panels)
        self.places = [(m, n) for m in range(tokens) for n in range(panels)]
        self.fields = record.fields
        # Fields have accumulators to themselves where registers last. Then a code may stay where it
        # is in its byte, and the sum is shifted once: products need the room, which vpmaddubsw's 16
        # bits have not, and a look-up needs the code alone. The fifth trit of a byte lies where the
        # fourth does.
        self.parts = 8 // record.width
        self.apart = tokens * panels * self.parts <= _APART and e.isa != "avx2"
        self.in_place = self.apart and record.stored != "fp4"
        # fp32 is multiplied where dots are (Zen 4), and stores of totals hold dots up: tokens are
        # scaled one by one among the dots of a group's last field, which do not wait for them.
        self.mixes = tokens > 1 and e.isa == "avx512_vnni"

    def emit(self, columns: list[Any], streams: Streams, token_tile: Any) -> None:
        """One tile: the panels `columns`, which `streams` are the records of, for the tokens of
        `token_tile`, stored into y."""
        e, a = self.e, self.a
        groups_before = e.multiply(token_tile, a["groups"])
        x = e.variable(
            e.add(a["codes"], e.multiply(e.multiply(groups_before, a["group"]), self.tokens))
        )
        nothing = e.constant(0) if self.reader.record.is_folded else e.floats(0.0)
        for place in self.places:
            e.store(self._total(place), nothing)
        with e.loop(a["groups"]) as group:
            entry = e.multiply(e.add(groups_before, group), 4 * self.tokens)
            scales, sums = e.add(a["scales"], entry), e.add(a["sums"], entry)
            accumulators = self._accumulators(sums)
            streams.begin_group()
            with e.loop(e.subtract(self.reader.steps, int(self.mixes))):
                self._add(*self._next(streams, x), accumulators)
            last = self._next(streams, x) if self.mixes else None
            if last is not None:
                self._add_each(*last, accumulators, range(self.fields - 1), range(self.tokens))
            sides = self._sides(streams.sides())
            for m in range(self.tokens):
                if last is not None:
                    self._add_each(*last, accumulators, [self.fields - 1], [m])
                if self.reader.record.is_folded:
                    self._fold(m, *sides, sums, accumulators)
                else:
                    self._scale(m, *sides, scales, sums, accumulators)
            streams.end_group()
        self._store(columns, token_tile)

    def _total(self, place: tuple[int, int]) -> Any:
        return self.e.add(self.totals, VECTOR_BYTES * (place[0] * self.panels + place[1]))

    def _accumulators(self, sums: Any) -> dict[tuple[int, int], list[Any]]:
        """A symmetric zero point is the accumulators' start: -zero * Σ activation."""
        e = self.e
        starts = [e.constant(0)] * self.tokens
        if self.reader.record.zero == "none":
            factor = e.constant(-self.reader.record.zero_code)
            starts = [
                e.builder.mul(e.broadcast(e.add(sums, 4 * m)), factor) for m in range(self.tokens)
            ]
        others = self.parts - 1 if self.apart else 0
        return {
            (m, n): [e.variable(starts[m])] + [e.variable(e.constant(0)) for _ in range(others)]
            for m, n in self.places
        }

    def _next(self, streams: Streams, x: Any) -> tuple[list[list[Any]], Any]:
        """The numbers of a step, of each panel by field, and the address of its activations."""
        e, place = self.e, x.value
        codes = [self._numbers(word) for word in streams.vectors()]
        streams.advance()
        x.value = e.add(place, self.reader.record.columns * self.tokens)
        return codes, place

    def _add(self, codes: list[list[Any]], x: Any, accumulators: Any) -> None:
        if self.e.isa == "avx2":
            self._add_fields(codes, x, accumulators)
        else:
            self._add_each(codes, x, accumulators, range(self.fields), range(self.tokens))

    def _add_each(
        self,
        codes: list[list[Any]],
        x: Any,
        accumulators: Any,
        fields: Iterable[int],
        tokens: Iterable[int],
    ) -> None:
        """A dot for each field, token and panel; an activation is loaded once for all panels."""
        e, narrow = self.e, self.reader.record.is_narrow
        for j in fields:
            for m in tokens:
                activations = self._activations(x, j, m)
                for n in range(self.panels):
                    part = accumulators[m, n][min(j, self.parts - 1) if self.apart else 0]
                    part.value = e.dot(part.value, codes[n][j], activations, narrow)

    def _add_fields(self, codes: list[list[Any]], x: Any, accumulators: Any) -> None:
        """The dots of all fields at once."""
        activations = [
            [self._activations(x, j, m) for j in range(self.fields)] for m in range(self.tokens)
        ]
        for n in range(self.panels):
            parts = [accumulators[m, n][0] for m in range(self.tokens)]
            largest = self.reader.record.largest
            sums = self.e.dots([part.value for part in parts], codes[n], activations, largest)
            for part, total in zip(parts, sums, strict=True):
                part.value = total

    def _activations(self, x: Any, field: int, token: int) -> Any:
        return self.e.broadcast(self.e.add(x, 4 * (field * self.tokens + token)))

    def _numbers(self, word: Any) -> list[Any]:
        """The numbers in a vector of codes, a field after the other, as uint8."""
        e, record = self.e, self.reader.record
        fields_of = e.fields_in_place if self.in_place else e.fields
        if record.stored == "trits":
            four, fifth = tables.split_trits(e, word)
            return [*fields_of(four, 2), fields_of(fifth, 2)[3]]
        fields = fields_of(word, record.width)
        if record.stored != "fp4":
            return fields
        return [tables.look_up_bytes(e, field, whole_entries("fp4")) for field in fields]

    def _dot(self, parts: list[Any]) -> Any:
        """The integer of one place; fields that were left where they lay are shifted down."""
        e, dot = self.e, parts[0].value
        for j, part in enumerate(parts[1:], 1):
            shift = self.reader.record.width * j if self.in_place else 0
            dot = e.builder.add(dot, e.shift_right_signed(part.value, shift))
        return dot

    def _sides(self, sides: list[Any]) -> tuple[list[Any], list[Any]]:
        """The scales of a group, a vector for each panel, and its zero points or minima if any."""
        reader, zero = self.reader, self.reader.record.zero
        scale = reader.whole_scale if reader.record.is_folded else reader.scale
        factors, offsets = [scale(side) for side in sides], []
        if zero != "none":
            offset = reader.zero_point if zero == "integer" else reader.minimum
            offsets = [offset(side) for side in sides]
        return factors, offsets

    def _scale(
        self,
        m: int,
        factors: list[Any],
        offsets: list[Any],
        scales: Any,
        sums: Any,
        accumulators: Any,
    ) -> None:
        """Add a token's finished integers of a group, scaled, to its fp32 totals."""
        e, record = self.e, self.reader.record
        scale = e.broadcast(e.add(scales, 4 * m), F32)
        if record.unit != 1:
            scale = e.builder.fmul(scale, e.floats(record.unit))
        nested = record.stored == "nested"
        total_code = e.broadcast(e.add(sums, 4 * m)) if offsets or nested else None
        for n in range(self.panels):
            exact = self._dot(accumulators[m, n])
            if nested:  # in halves: a group of 65536 still fits
                exact = e.builder.add(e.builder.add(exact, exact), total_code)
            place = self._total((m, n))
            total = e.load(place, scale.type)
            if record.zero == "integer":
                exact = e.builder.sub(exact, e.builder.mul(offsets[n], total_code))
            elif record.zero == "float":
                shift = e.builder.fmul(e.to_floats(total_code), scale)
                total = e.fma(shift, offsets[n], total)
            factor = e.builder.fmul(factors[n], scale)
            e.store(place, e.fma(e.to_floats(exact), factor, total))

    def _fold(
        self, m: int, factors: list[Any], offsets: list[Any], sums: Any, accumulators: Any
    ) -> None:
        """Add a token's finished integers of a group, times whole scales, to its int32 totals."""
        e = self.e
        total_code = e.broadcast(e.add(sums, 4 * m)) if offsets else None
        for n in range(self.panels):
            exact = self._dot(accumulators[m, n])
            if offsets:
                exact = e.builder.sub(exact, e.builder.mul(offsets[n], total_code))
            place = self._total((m, n))
            e.store(place, e.builder.add(e.load(place), e.builder.mul(exact, factors[n])))

    def _scaled(self, total: Any, panel: Any, scale: Any) -> Any:
        """A folded total in fp32: times the scales of its rows and of its token (an address)."""
        e = self.e
        outer = e.load(e.offset(self.a["outer"], panel, VECTOR_BYTES), e.floats(0.0).type)
        factor = e.builder.fmul(outer, e.broadcast(scale, F32))
        return e.builder.fmul(e.to_floats(total), factor)

    def _store(self, columns: list[Any], token_tile: Any) -> None:
        e, folded = self.e, self.reader.record.is_folded
        groups_before = e.multiply(token_tile, self.a["groups"])
        scales = e.add(self.a["scales"], e.multiply(groups_before, 4 * self.tokens))
        first = e.multiply(token_tile, self.tokens)
        left = e.clip(e.subtract(self.a["tokens"], first), e.integer(self.tokens))
        with e.loop(left) as m:
            row = e.offset(self.totals, m, VECTOR_BYTES * self.panels)
            for n, panel in enumerate(columns):
                total = e.add(row, VECTOR_BYTES * n)
                if folded:
                    value = self._scaled(e.load(total), panel, e.offset(scales, m, 4))
                else:
                    value = e.load(total, e.floats(0.0).type)
                self.output.store(e.add(first, m), panel, value)
