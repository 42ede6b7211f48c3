"""Records: how the CPU's view of a weight lies in memory, and how a kernel reads one.

Per panel of 16 rows, per group, one record: codes as 64-byte vectors (lane = row; byte b of a lane
holds, at bit width*j, the code of column 4*j + b of the vector's 32/width columns), then 16 scales,
then 16 zero points (uint8) or minima (like the scales). Ternary codes may lie five in a byte, that
of column 4*j + b times 3**j: 20 columns in a vector. Where a byte is a code of its own that only
the float kernel reads, the 16 bytes of a column lie together; so do 16-bit numbers. A panel is read
as one stream. Of a sparse weight a record has the vectors' masks, then the numbers under their
bits, then its scales (cpu_streams.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lath.formats import values as value_tables
from lath.formats.codec import Zero
from lath.formats.packing import TRITS
from lath.kernels.linear.cpu_arguments import Arguments
from lath.kernels.simd import tables
from lath.kernels.simd.emitter import BF16, F32, FP16, FP32, I8, LANES, NARROW, Emitter

VECTOR_BYTES = 64

# What a stored code stands for: code - zero (of "trits" and "triplets" too), the same half a step
# beside whole numbers, a whole number of a unit (`formats/values.py`), an entry of a table in
# memory, an 8-bit float, or a 16-bit one that has no scale. "triplets" have a view of their own.
Stored = Literal[
    "integer", "nested", "trits", "triplets", "fp4", "e2m3", "table", "e4m3", "e5m2", "fp16", "bf16"
]  # fmt: skip
# "int8": a scale of the row above them; activations have one scale a token, and sums are integers.
ByteScale = Literal["", "int8", "e8m0", "e4m3"]


def whole_entries(values: Literal["fp4", "e2m3"]) -> list[int]:
    """The entries of a table over its unit, as whole numbers that are not negative: `Record`'s
    zero_code stands for 0."""
    unit = value_tables.UNITS[values]
    entries = [round(entry / unit) for entry in value_tables.table(values)]
    return [entry - min(entries) for entry in entries]


@dataclass(frozen=True)
class Record:
    """width: bits of a stored code, 2, 4, 8 or 16. zero: as in the codec. half: scales are fp16.

    stored: what codes stand for. byte_scale: scales are bytes of this kind, `half` is False.
    sparse: codes that stand for 0 are left out.
    """

    width: int
    zero: Zero
    half: bool
    stored: Stored = "integer"
    byte_scale: ByteScale = ""
    sparse: bool = False

    @property
    def options(self) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
        """What a kernel's emission takes before and behind its tile."""
        rest = (self.stored, self.byte_scale)
        if self.sparse:
            return (self.width, self.zero, self.half), (*rest, True)
        return (self.width, self.zero, self.half), () if rest == ("integer", "") else rest

    @property
    def columns(self) -> int:
        """Columns of one 64-byte vector of codes."""
        return VECTOR_BYTES * 8 // (LANES * self.width) if self.width > 8 else 4 * self.fields

    @property
    def fields(self) -> int:
        """Codes of a byte."""
        return TRITS if self.stored == "trits" else 8 // self.width

    @property
    def zero_code(self) -> int:
        """The number in the int8 kernel that stands for 0 in a symmetric codec, whatever its bits
        ("nested": that for ½); 0 for what only the float kernel reads."""
        if self.stored in ("integer", "nested"):
            return 1 << (self.width - 1)
        if self.stored in ("trits", "triplets"):
            return 1
        return whole_entries(self.stored)[0] if self.stored in ("fp4", "e2m3") else 0

    @property
    def unit(self) -> float:
        """What the whole numbers of the int8 kernel count."""
        return 0.5 if self.stored == "nested" else value_tables.UNITS.get(self.stored, 1.0)

    @property
    def is_narrow(self) -> bool:
        """Whether the numbers of the int8 kernel are at most 127."""
        return self.largest <= NARROW

    @property
    def largest(self) -> int:
        """The largest number of the int8 kernel; 0 for what only the float kernel reads."""
        if self.stored in ("integer", "nested"):
            return (1 << self.width) - 1
        if self.stored in ("trits", "triplets"):
            return 2
        return max(whole_entries(self.stored)) if self.stored in ("fp4", "e2m3") else 0

    @property
    def by_column(self) -> bool:
        """Whether the sixteen bytes of a column lie together."""
        return self.width == 8 and self.stored in ("table", "e4m3", "e5m2")

    @property
    def is_folded(self) -> bool:
        """Whether the scales of groups are whole numbers, so that a row is summed as integers."""
        return self.byte_scale == "int8"

    @property
    def item(self) -> int:
        """Bytes that the mask of a sparse record keeps or leaves out together."""
        return max(1, self.width // 8)

    @property
    def mask_bytes(self) -> int:
        """Of one vector of a sparse record."""
        return VECTOR_BYTES // self.item // 8

    @property
    def scale_bytes(self) -> int:
        if self.stored in ("fp16", "bf16"):
            return 0
        return LANES * (1 if self.byte_scale else 2 if self.half else 4)

    @property
    def zero_bytes(self) -> int:
        return {"none": 0, "integer": LANES, "float": self.scale_bytes}[self.zero]

    @property
    def side_bytes(self) -> int:
        return self.scale_bytes + self.zero_bytes

    def nbytes(self, group: int) -> int:
        return group // self.columns * VECTOR_BYTES + self.side_bytes


class RecordReader:
    """Emits the reads of records of one kind."""

    def __init__(self, e: Emitter, arguments: Arguments, record: Record) -> None:
        self.e, self.a, self.record = e, arguments, record
        self.steps = e.divide(arguments["group"], record.columns)
        self.nbytes = e.add(e.multiply(self.steps, VECTOR_BYTES), record.side_bytes)
        self.panel_bytes = e.multiply(self.nbytes, arguments["groups"])
        self.table = arguments["table"]
        self._kind = FP16 if record.half else FP32
        if record.byte_scale == "e4m3":
            outer = e.broadcast(arguments["outer"], F32)
            self._outer = e.builder.fmul(outer, e.floats(tables.E4M3_FACTOR))

    def scale(self, side: Any) -> Any:
        """The scales at the address behind the codes."""
        if self.record.scale_bytes == 0:
            return self.e.floats(1.0)
        if self.record.byte_scale == "e8m0":
            return tables.load_powers(self.e, side)
        if self.record.byte_scale == "e4m3":
            return self.e.builder.fmul(tables.load_e4m3(self.e, side), self._outer)
        return self.e.load_floats(side, self._kind)

    def whole_scale(self, side: Any) -> Any:
        """The scales of a folded record, as int lanes."""
        return self.e.load_bytes(side)

    def zero_point(self, side: Any) -> Any:
        """Integer zero points as int lanes."""
        return self.e.load_bytes(self.e.add(side, self.record.scale_bytes))

    def minimum(self, side: Any) -> Any:
        return self.e.load_floats(self.e.add(side, self.record.scale_bytes), self._kind)


class Output:
    """Emits the end of a kernel: bias, one rounding to y's type, rows beyond N left out."""

    def __init__(self, e: Emitter, arguments: Arguments) -> None:
        self.e, self.a = e, arguments
        self._partial = e.buffer(1)
        kind = arguments["y_type"]
        wide = e.builder.icmp_signed("==", kind, e.integer(FP32))
        self._wide = wide
        self._half = e.builder.icmp_signed("==", kind, e.integer(FP16))
        self._item = e.builder.select(wide, e.integer(4), e.integer(2))

    def store(self, token: Any, panel: Any, value: Any) -> None:
        """y[token, 16*panel : 16*panel + 16] = value + bias."""
        e = self.e
        first = e.multiply(panel, LANES)
        bias = e.load(e.offset(self.a["bias"], first, 4), value.type)
        value = e.builder.fadd(value, bias)
        element = e.add(e.multiply(token, self.a["rows"]), first)
        address = e.add(self.a["y"], e.multiply(element, self._item))
        left = e.subtract(self.a["rows"], first)
        whole = e.builder.icmp_signed(">=", left, e.integer(LANES))
        target = e.builder.select(whole, address, self._partial)
        with e.choice(self._wide) as (then, otherwise):
            with then:
                e.store(target, value)
            with otherwise, e.choice(self._half) as (half, brain):
                with half:
                    e.store(target, e.round_floats(value, FP16))
                with brain:
                    e.store(target, e.round_floats(value, BF16))
        with e.when(e.builder.not_(whole)):
            count = e.multiply(e.clip(left, e.integer(LANES)), self._item)
            with e.loop(count) as i:
                e.store(e.add(address, i), e.load(e.add(self._partial, i), I8))
