"""Reading the records of several panels side by side: vectors of codes, then their scales.

A dense record has its vectors at places that follow from their number. A sparse one has, for each
group, the masks of all its vectors, a bit for each code that is not 0, then those codes, then the
scales: a stream's next vector begins where the codes of the last one ended. The masks lie apart so
that they are known early: the only chain from vector to vector is one addition.
"""

from __future__ import annotations

from typing import Any, Protocol

from llvmlite import ir

from lath.kernels.linear.cpu_arguments import Arguments
from lath.kernels.linear.cpu_record import VECTOR_BYTES, RecordReader
from lath.kernels.simd.emitter import I32, I64, Emitter
from lath.kernels.simd.expand import count_bits, expand

# Bytes that codes of sparse records are asked for ahead of use: loads that begin at any byte do not
# set off the hardware's own prefetching. Without: twice the time from cold memory; 512 to 2048
# were equal within noise.
_AHEAD = 1024


class Streams(Protocol):
    """The records of some panels, read group after group, vector after vector."""

    def begin_group(self) -> None: ...

    def vectors(self) -> list[Any]:
        """The next vector of each panel, as int lanes; once before `advance`."""

    def addresses(self) -> list[Any]:
        """Where it lies, of dense records."""

    def advance(self) -> None: ...

    def sides(self) -> list[Any]:
        """Addresses of the scales behind the vectors of a group."""

    def end_group(self) -> None: ...


def streams_of(reader: RecordReader, panels: list[Any], ahead: int = 0) -> Streams:
    """The streams of panels by their number, from the records of the weight.

    ahead: bytes that dense records are asked for before they are read, 0: they are not.
    """
    e, a = reader.e, reader.a
    if reader.record.sparse:
        starts = [e.load(e.offset(a["starts"], panel, 8), I64) for panel in panels]
        return _SparseStreams(reader, [e.add(a["records"], start) for start in starts])
    sizes = [e.multiply(panel, reader.panel_bytes) for panel in panels]
    return _DenseStreams(reader, [e.add(a["records"], size) for size in sizes], ahead)


class _DenseStreams:
    """All panels move together."""

    def __init__(self, reader: RecordReader, starts: list[Any], ahead: int = 0) -> None:
        self.e, self.record, self.starts, self.ahead = reader.e, reader.record, starts, ahead
        self.moved = self.e.variable(self.e.integer(0))

    def begin_group(self) -> None:
        pass

    def vectors(self) -> list[Any]:
        addresses = self.addresses()
        if self.ahead:
            for address in addresses:
                self.e.prefetch(self.e.add(address, self.ahead))
        return [self.e.load(address) for address in addresses]

    def addresses(self) -> list[Any]:
        return [self.e.add(start, self.moved.value) for start in self.starts]

    def advance(self) -> None:
        self.moved.value = self.e.add(self.moved.value, VECTOR_BYTES)

    def sides(self) -> list[Any]:
        return self.addresses()

    def end_group(self) -> None:
        self.moved.value = self.e.add(self.moved.value, self.record.side_bytes)


class _SparseStreams:
    """Each panel has a place of its own."""

    def __init__(self, reader: RecordReader, starts: list[Any]) -> None:
        self.e, self.record, self.steps = reader.e, reader.record, reader.steps
        self.masks = [self.e.variable(start) for start in starts]
        self.codes = [self.e.variable(start) for start in starts]
        # What is left out stands for 0, which codes of 8 bits say as 128 (`Record.zero_code`).
        self.filler = self.e.constant(0x80808080 - (1 << 32) if self.record.width == 8 else 0)

    def begin_group(self) -> None:
        e, size = self.e, self.record.mask_bytes
        for masks, codes in zip(self.masks, self.codes, strict=True):
            masks.value = codes.value
            codes.value = e.add(masks.value, e.multiply(self.steps, size))

    def vectors(self) -> list[Any]:
        e, record, found = self.e, self.record, []
        for masks, codes in zip(self.masks, self.codes, strict=True):
            mask = e.load(masks.value, ir.IntType(8 * record.mask_bytes))
            found.append(expand(e, mask, codes.value, self.filler))
            e.prefetch(e.add(codes.value, _AHEAD))
            count = count_bits(e, mask)
            count = count if count.type == I64 else e.builder.zext(count, I64)
            codes.value = e.add(codes.value, e.multiply(count, record.item))
            masks.value = e.add(masks.value, record.mask_bytes)
        return found

    def addresses(self) -> list[Any]:
        raise NotImplementedError("vectors of a sparse record lie nowhere")

    def advance(self) -> None:
        pass  # `vectors` knows by how much

    def sides(self) -> list[Any]:
        return [codes.value for codes in self.codes]

    def end_group(self) -> None:
        for codes in self.codes:
            codes.value = self.e.add(codes.value, self.record.side_bytes)


class Scratch:
    """Memory of a thread's own where the panels of a tile are expanded, for many tokens at once."""

    def __init__(self, e: Emitter, a: Arguments, reader: RecordReader) -> None:
        self.e, self.a, self.reader = e, a, reader
        thread = e.variable(e.integer(0))
        number = a["thread_number"]
        # 0: this is the one thread there is.
        with e.when(e.builder.icmp_signed("!=", number, e.integer(0))):
            kind = ir.FunctionType(I32, [])
            own = e.builder.call(e.builder.inttoptr(number, kind.as_pointer()), [])
            thread.value = e.builder.sext(own, I64)
        self.start = e.add(a["scratch"], e.multiply(thread.value, a["expanded"]))
        self.panels = 0

    def fill(self, panels: list[Any]) -> None:
        """Expand panels by their number, one behind the other."""
        e, reader = self.e, self.reader
        self.panels = len(panels)
        for panel, start in zip(panels, self._starts(), strict=True):
            streams, target = streams_of(reader, [panel]), e.variable(start)
            with e.loop(self.a["groups"]):
                streams.begin_group()
                with e.loop(reader.steps):
                    e.store(target.value, streams.vectors()[0])
                    streams.advance()
                    target.value = e.add(target.value, VECTOR_BYTES)
                (side,) = streams.sides()
                for place in range(0, reader.record.side_bytes, 16):
                    quad = e.load(e.add(side, place), ir.VectorType(I32, 4))
                    e.store(e.add(target.value, place), quad)
                streams.end_group()
                target.value = e.add(target.value, reader.record.side_bytes)

    def streams(self) -> Streams:
        """The panels as they were expanded."""
        return _DenseStreams(self.reader, self._starts())

    def _starts(self) -> list[Any]:
        e, size = self.e, self.reader.panel_bytes
        return [e.add(self.start, e.multiply(size, n)) for n in range(self.panels)]
