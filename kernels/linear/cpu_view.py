"""The CPU's view of a packed weight: records (cpu_record.py), made once per QTensor.

Codes are widened to 2, 4 or 8 bits and moved so that the stored code of a symmetric zero is
2**(width - 1) whatever the codec's bits: one kernel serves several codecs. 6-bit floats become the
8-bit ones that hold them, or whole numbers, and codes whose products with a scale are E4M3 numbers
become those. A group of the view is the longest run of columns that has one scale of the weight and
one of the activations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numba import types
from numpy.typing import NDArray
from torch import Tensor

from lath.formats import packing
from lath.formats import values as value_tables
from lath.formats.activations import ActivationFormat
from lath.formats.codec import GROUP_MULTIPLE, Codec, PlanesCodec
from lath.formats.memory import WEIGHTS
from lath.formats.qtensor import QTensor
from lath.formats.sparse import SparseCodec
from lath.kernels.linear.cpu_record import (
    VECTOR_BYTES,
    ByteScale,
    Record,
    Stored,
    whole_entries,
)
from lath.kernels.linear.plan_cpu import LONGEST_GROUP
from lath.kernels.linear.plan_facts import holds_integers
from lath.kernels.simd.compile import driver
from lath.kernels.simd.tables import ENTRIES

# What multiplies a layer: whole codes of x; x itself; or, in the float kernel, the numbers that the
# codes of x stand for: whole ones where the weight's numbers are not, and 8-bit floats.
Kind = Literal["int8", "float", "rounded", "e4m3", "e5m2"]
# The 8-bit float that holds all numbers of a 6-bit one.
_WIDER: dict[str, Literal["e4m3", "e5m2"]] = {"e2m3": "e4m3", "e3m2": "e5m2"}
_E4M3_NAN = 0x7F
# Weights that are unpacked at once where that takes many bytes each.
_CHUNK_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class CpuView:
    """records: uint8 [panels, groups, record bytes], C order. group: columns of one record.

    table: fp32 [16] or [256], of codes that stand for its entries. outer: fp32 [1], the scale of
    E4M3 scales, or [16 * panels], those of the rows above whole ones.
    """

    record: Record
    rows: int
    columns: int
    group: int
    records: Tensor
    table: Tensor | None = None
    outer: Tensor | None = None

    @property
    def panels(self) -> int:
        return self.records.shape[0]

    @property
    def groups(self) -> int:
        return self.records.shape[1]

    @property
    def nbytes(self) -> int:
        extra = [tensor.nbytes for tensor in (self.table, self.outer) if tensor is not None]
        return self.records.numel() + sum(extra)

    @property
    def panel_bytes(self) -> int:
        return self.groups * self.records.shape[2]


def stored_codec(codec: Codec) -> Codec:
    """The codec that the view repacks: E4M3 numbers where products of codes are rounded to them."""
    if codec.scale_dtype == "fp8":
        return Codec(8, None, "none", "fp32", "e4m3")
    return codec


def multiplied_out(weight: QTensor) -> QTensor:
    """A weight as its `stored_codec`: the E4M3 numbers of its codes and the scales of the rows."""
    codec = stored_codec(weight.codec)
    if codec == weight.codec:
        return weight
    assert weight.outer is not None
    ones = QTensor(weight.codec, weight.shape, weight.codes, weight.scales, None,
                   torch.ones_like(weight.outer))  # fmt: skip
    numbers = ones.dequantize().to(torch.float8_e4m3fn).view(torch.uint8)
    scales = weight.outer[None][: codec.num_groups(weight.shape[1])]  # none where K is 0
    return QTensor(codec, weight.shape, packing.pack(numbers, codec), scales)


def view_group(
    columns: int,
    codec: PlanesCodec | SparseCodec,
    activations: ActivationFormat,
    multiple: int = GROUP_MULTIPLE,
) -> int:
    """Columns of one record: a multiple of 16 (or `multiple`) that divides both groups, short of
    overflow."""
    groups = [g for g in (codec.group, activations.group) if g is not None and g < columns]
    if groups:
        group = math.gcd(*groups)
        longest = LONGEST_GROUP // multiple * multiple
        return group if group <= longest else math.gcd(group, longest)
    pieces = max(1, -(-columns // LONGEST_GROUP))
    return packing.round_up(max(1, -(-columns // pieces)), multiple)


def kind_of(codec: PlanesCodec | SparseCodec, activations: ActivationFormat) -> Kind:
    """What multiplies a weight of a codec with x in an activation format."""
    if activations.kind == "float":
        return "float"
    if not activations.is_integer:
        return "e5m2" if activations.values == "e5m2" else "e4m3"
    return "int8" if holds_integers(codec) else "rounded"


def record_of(
    codec: Codec, kind: Kind, folded: bool = False, ternary: Stored = "integer"
) -> Record:
    """The kind of record of a codec. One bit keeps half its scale, in fp32, where that is exact.

    folded: keep the whole scales of groups, for sums that stay integers. ternary: how codes of
    three values are kept.
    """
    width = next(bits for bits in (2, 4, 8) if bits >= codec.bits)
    one_bit = codec.bits == 1 and codec.zero == "none" and not codec.is_table
    half = codec.scale_dtype == "fp16" and not one_bit
    byte_scale: ByteScale = "int8" if folded else ""
    if codec.scale_dtype in ("e8m0", "e4m3"):
        byte_scale = codec.scale_dtype
    if not codec.is_table:
        stored: Stored = "nested" if codec.values == "nested" else "integer"
        stored = ternary if codec.values == "ternary" else stored
        return Record(width, codec.zero, half, stored, byte_scale)
    if codec.values == "fp4" or (codec.values == "e2m3" and kind == "int8"):
        return Record(width, "none", half, codec.values, byte_scale)
    if codec.values in ("nf4", "learned"):
        return Record(width, "none", half, "table", byte_scale)
    return Record(width, "none", half, _WIDER.get(codec.values, codec.values), byte_scale)  # type: ignore[arg-type]


def build_view(weight: QTensor, group: int, record: Record) -> CpuView:
    """Repack a weight into records of `group` columns, of the kind that `record_of` says but for
    scales that do not fit its bytes."""
    codec, (rows, columns) = weight.codec, weight.shape
    scales, record = _scales_of(weight, record)
    panels, groups = -(-rows // packing.PANEL), -(-columns // group)
    # In huge pages: SmolLM2's products take 1.17 times as long in pages of 4 KB (2.80, 2.40 ms).
    records = WEIGHTS.room((panels, groups, record.nbytes(group)))
    out = records.numpy()
    if record.stored == "trits":
        _put_trits(out, weight, group, record)
    else:
        widths = np.array(codec.plane_widths)
        words, blocks = _plane_words(weight), -(-columns // packing.BLOCK)
        stored = stored_codes(codec, record)
        _pack_codes()(words, widths, blocks, out.view(np.uint32), record.width, group, stored)
    start = group // record.columns * VECTOR_BYTES
    if record.by_column:
        _turn(out[:, :, :start])
    source = np.arange(groups) * group // codec.group_size(columns)
    _put_side(out, start, scales, source)
    if weight.zeros is not None:
        _put_side(out, start + record.scale_bytes, weight.zeros.detach().numpy(), source)
    outer = None
    if record.byte_scale in ("e4m3", "int8"):
        outer = weight.outer.detach().float().clone()  # type: ignore[union-attr]
    return CpuView(record, rows, columns, group, records, _table_of(weight, record), outer)


def _plane_words(weight: QTensor) -> NDArray[np.int32]:
    """The packed codes, those of "base3" as a plane of two bits."""
    if weight.codec.packing == "planes":
        words: NDArray[np.int32] = weight.codes.detach().numpy()
        return words
    planes = replace(weight.codec, packing="planes")
    plain: NDArray[np.int32] = packing.pack(weight.unpack_codes(), planes).numpy()
    return plain


def _put_trits(out: NDArray[np.uint8], weight: QTensor, group: int, record: Record) -> None:
    """Ternary codes into the records, five a byte; what pads them is code 0."""
    groups, size = out.shape[1:]
    columns = weight.shape[1]
    powers = (3 ** np.arange(record.fields)).astype(np.uint8)
    for first, last, codes in unpacked_panels(weight):
        padded = np.pad(codes, ((0, 0), (0, groups * group - columns)))
        shape = (last - first, packing.PANEL, groups, group // record.columns, record.fields, 4)
        numbers = np.einsum("plgsfb,f->pgslb", padded.reshape(shape), powers)
        out[first:last, :, : size - record.side_bytes] = numbers.reshape(last - first, groups, -1)


def unpacked_panels(
    weight: QTensor, multiple: int = 1
) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """(first, last, uint8 [16 * (last - first), K]): the codes of panels first .. last - 1, as many
    at once as memory for them is small, in whole `multiple`s but for the end."""
    columns = weight.shape[1]
    panels = -(-weight.shape[0] // packing.PANEL)
    some = packing.round_up(max(1, _CHUNK_WEIGHTS // max(packing.PANEL * columns, 1)), multiple)
    for first in range(0, panels, some):
        last = min(first + some, panels)
        words = torch.cat([plane[first:last].reshape(-1) for plane in weight.planes])
        rows = (last - first) * packing.PANEL
        yield first, last, packing.unpack(words, weight.codec, (rows, columns)).numpy()


def stored_codes(codec: Codec, record: Record) -> NDArray[np.uint8]:
    """The code in a record of each code of the weight, [256]."""
    codes = np.arange(256)
    if record.stored == "integer":
        # One bit: code - 1/2 = (2*code + 1 - 2) / 2.
        factor = 2 if codec.bits == 1 and codec.zero == "none" else 1
        offset = record.zero_code - int(factor * codec.zero_code) if codec.zero == "none" else 0
        codes = factor * codes + offset
    elif record.stored == "e2m3":
        codes = np.resize(whole_entries("e2m3"), 256)
    elif codec.values in _WIDER:
        wide = value_tables.table(_WIDER[codec.values])
        entries = value_tables.table(codec.values)
        # 0 and -0 are equal: the sign of nothing is lost, and no sum can tell.
        codes = np.resize([wide.index(entry) for entry in entries], 256)
    return codes.astype(np.uint8)


def _scales_of(weight: QTensor, record: Record) -> tuple[NDArray[Any], Record]:
    """The scales of a record, [G, N16]: as the weight stores them or, of two levels, their fp32
    product; and the record, with fp32 scales where bytes cannot say them."""
    codec = weight.codec
    if record.byte_scale == "int8":
        return weight.scales.detach().numpy(), record
    if record.byte_scale == "e8m0":
        # Their bits moved into an exponent are neither 2**-127 nor the infinity of byte 255.
        outside = (weight.scales == 0) | (weight.scales == 255)
        # Rows that only pad have scale 0 and may have any.
        plain = not bool(outside[:, : weight.shape[0]].any())
    else:
        plain = not record.byte_scale or not bool((weight.scales & _E4M3_NAN == _E4M3_NAN).any())
    broken = _broken_groups(weight) if record.stored == "e4m3" and codec.bits == 8 else None
    if not plain or broken is not None:
        record = replace(record, half=False, byte_scale="")
    if record.half or record.byte_scale:
        return weight.scales.detach().numpy(), record
    scales = weight.effective_scales().detach().numpy()
    if codec.bits == 1 and codec.zero == "none" and record.stored == "integer":
        scales = scales.astype(np.float32) / 2
    return (scales if broken is None else np.where(broken, np.float32("nan"), scales)), record


def _broken_groups(weight: QTensor) -> NDArray[np.bool_] | None:
    """[G, N16]: where an E4M3 code is NaN, or None. The kernel reads 480 there, so that the scale
    must carry the NaN."""
    if not bool((weight.codes.detach().view(torch.uint8) & _E4M3_NAN == _E4M3_NAN).any()):
        return None
    columns = weight.shape[1]
    broken = np.zeros(tuple(weight.scales.shape), np.bool_)
    n, k = np.nonzero(weight.unpack_codes().numpy() & _E4M3_NAN == _E4M3_NAN)
    broken[k // weight.codec.group_size(columns), n] = True
    return broken


def _table_of(weight: QTensor, record: Record) -> Tensor | None:
    """The table in memory that a float kernel reads: a register's sixteen entries, or 256."""
    if record.stored not in ("table", "fp4"):
        return None
    entries = weight.entries().detach()
    size = ENTRIES if record.width <= 4 else 256
    return entries.repeat(-(-size // len(entries)))[:size].contiguous()


def _turn(codes: NDArray[np.uint8]) -> None:
    """[panels, groups, bytes]: vectors of 16 rows of 4 bytes → of 4 columns of 16 bytes."""
    for panel in codes:
        groups, size = panel.shape
        vectors = panel.reshape(groups, size // VECTOR_BYTES, packing.PANEL, 4)
        panel[:] = vectors.swapaxes(2, 3).reshape(groups, size)


def _put_side(
    out: NDArray[np.uint8], start: int, side: NDArray[Any], source: NDArray[np.intp]
) -> None:
    """side [weight groups, 16 * panels] → 16 values in each record, repeated where it is finer."""
    panels = side.shape[1] // packing.PANEL
    values = side[source].reshape(len(source), panels, packing.PANEL).transpose(1, 0, 2)
    raw = np.ascontiguousarray(values).view(np.uint8)
    out[:, :, start : start + raw.shape[2]] = raw


@functools.cache
def _pack_codes() -> Any:
    """pack(words, plane widths, blocks, records as uint32, width, group, stored code of each code).

    Four columns of a row at a time, one in each byte: a pair of words of the packed layout holds
    columns k .. k+3 in its even bytes and k+16 .. k+19 in its odd ones (`lath.formats.packing`).
    Columns and rows beyond the weight hold any code: no activation or no scale meets them.
    """
    flat, cube = types.int32[::1], types.uint32[:, :, ::1]
    sizes = [types.int64] * 2
    signature = types.void(flat, types.int64[::1], types.int64, cube, *sizes, types.uint8[::1])
    panel_rows, block_columns = packing.PANEL, packing.BLOCK

    def pack(words, widths, blocks, records, width, group, stored):
        panels, groups = records.shape[0], records.shape[1]
        ones, even = 0x01010101, 0x00FF00FF
        quads = np.empty(max(groups * group, blocks * block_columns) // 4, np.int64)
        steps, fields = group * width // 32, 8 // width
        for panel in range(panels):
            for lane in range(panel_rows):
                quads[:] = 0
                plane, low = 0, 0
                for bits in widths:
                    mask, row_words = ((1 << bits) - 1) * ones, 4 * bits
                    for block in range(blocks):
                        row = ((panel * blocks + block) * panel_rows + lane) * row_words + plane
                        for unit in range(0, 32, 2):
                            at, shift = row + unit % row_words, bits * (unit // row_words)
                            first = ((np.int64(words[at]) & 0xFFFFFFFF) >> shift) & mask
                            second = ((np.int64(words[at + 1]) & 0xFFFFFFFF) >> shift) & mask
                            quad = block * block_columns // 4 + unit // 8 * 8 + unit % 8 // 2
                            for odd in range(2):
                                a, b = (first >> (8 * odd)) & even, (second >> (8 * odd)) & even
                                a, b = (a | (a >> 8)) & 0xFFFF, (b | (b >> 8)) & 0xFFFF
                                quads[quad + 4 * odd] |= (a | (b << 16)) << low
                    plane += panels * blocks * panel_rows * row_words
                    low += bits
                for g in range(groups):
                    for step in range(steps):
                        first = (g * steps + step) * fields
                        value = 0
                        for field in range(fields):
                            quad = quads[first + field]
                            for byte in range(4):
                                code = np.int64(stored[(quad >> (8 * byte)) & 0xFF])
                                value |= code << (8 * byte + width * field)
                        records[panel, g, panel_rows * step + lane] = value

    return driver(signature)(pack)
