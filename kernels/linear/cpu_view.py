"""The CPU's view of a packed weight: records (cpu_record.py), made once per QTensor.

Codes are widened to 2, 4 or 8 bits and moved so that the stored code of a symmetric zero is
2**(width - 1) whatever the codec's bits: one kernel serves several codecs. A group of the view is
the longest run of columns that has one scale of the weight and one of the activations.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import types
from numpy.typing import NDArray
from torch import Tensor

from lath.formats import packing
from lath.formats.activations import ActivationFormat
from lath.formats.codec import GROUP_MULTIPLE, Codec
from lath.formats.qtensor import QTensor
from lath.kernels.linear.cpu_record import VECTOR_BYTES, Record
from lath.kernels.simd.compile import driver

# 255 * 127 * LONGEST_GROUP < 2**31: the int32 sums of a group cannot overflow.
LONGEST_GROUP = 65536


@dataclass(frozen=True)
class CpuView:
    """records: uint8 [panels, groups, record bytes], C order. group: columns of one record."""

    record: Record
    rows: int
    columns: int
    group: int
    records: Tensor

    @property
    def panels(self) -> int:
        return self.records.shape[0]

    @property
    def groups(self) -> int:
        return self.records.shape[1]

    @property
    def nbytes(self) -> int:
        return self.records.numel()

    @property
    def panel_bytes(self) -> int:
        return self.groups * self.records.shape[2]


def view_group(columns: int, codec: Codec, activations: ActivationFormat) -> int:
    """Columns of one record: a multiple of 16 that divides both groups, short of overflow."""
    groups = [g for g in (codec.group, activations.group) if g is not None and g < columns]
    if groups:
        group = math.gcd(*groups)
        return group if group <= LONGEST_GROUP else math.gcd(group, LONGEST_GROUP)
    pieces = max(1, -(-columns // LONGEST_GROUP))
    return packing.round_up(max(1, -(-columns // pieces)), GROUP_MULTIPLE)


def record_of(codec: Codec) -> Record:
    """The kind of record of a codec. One bit keeps half its scale, in fp32, where that is exact."""
    width = next(bits for bits in (2, 4, 8) if bits >= codec.bits)
    one_bit = codec.bits == 1 and codec.zero == "none"
    if codec.is_table:
        raise NotImplementedError(f"the CPU kernels of lath.linear do not read {codec} yet")
    return Record(width, codec.zero, codec.scale_dtype == "fp16" and not one_bit)


def cpu_view(weight: QTensor, activations: ActivationFormat) -> CpuView:
    """The view of a weight for an activation format, made on first use and kept with it."""
    group = view_group(weight.shape[1], weight.codec, activations)
    return weight.view(f"cpu-g{group}", functools.partial(build_view, weight, group))


def build_view(weight: QTensor, group: int) -> CpuView:
    """Repack a weight into records of `group` columns."""
    codec, (rows, columns) = weight.codec, weight.shape
    record = record_of(codec)
    panels, groups = -(-rows // packing.PANEL), -(-columns // group)
    records = torch.empty((panels, groups, record.nbytes(group)), dtype=torch.uint8)
    out = records.numpy()
    factor = 2 if codec.bits == 1 and codec.zero == "none" else 1
    # One bit: code - 1/2 = (2*code + 1 - 2) / 2.
    offset = record.zero_code - int(factor * codec.zero_code) if codec.zero == "none" else 0
    widths = np.array(codec.plane_widths)
    words, blocks = weight.codes.detach().numpy(), -(-columns // packing.BLOCK)
    _pack_codes()(words, widths, blocks, out.view(np.uint32), record.width, group, factor, offset)
    start = group // record.columns * VECTOR_BYTES
    source = np.arange(groups) * group // codec.group_size(columns)
    # Two levels of scales are one product here, in fp32.
    stored = weight.scales if codec.scale_dtype == "fp16" else weight.effective_scales()
    scales = stored.detach().numpy()
    if factor == 2:
        scales = scales.astype(np.float32) / 2
    _put_side(out, start, scales, source)
    if weight.zeros is not None:
        _put_side(out, start + record.scale_bytes, weight.zeros.detach().numpy(), source)
    return CpuView(record, rows, columns, group, records)


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
    """pack(words, plane widths, blocks, records as uint32, width, group, factor, offset).

    Four columns of a row at a time, one in each byte: a pair of words of the packed layout holds
    columns k .. k+3 in its even bytes and k+16 .. k+19 in its odd ones (`lath.formats.packing`).
    Columns and rows beyond the weight hold any code: no activation or no scale meets them.
    """
    flat, cube = types.int32[::1], types.uint32[:, :, ::1]
    signature = types.void(flat, types.int64[::1], types.int64, cube, *[types.int64] * 4)
    panel_rows, block_columns = packing.PANEL, packing.BLOCK

    def pack(words, widths, blocks, records, width, group, factor, offset):
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
                            code = quads[first + field] * factor + offset * ones
                            value |= code << (width * field)
                        records[panel, g, panel_rows * step + lane] = value

    return driver(signature)(pack)
