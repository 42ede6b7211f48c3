"""The CPU's view of a sparse weight: records without the codes that stand for 0, one panel after
the other (cpu_streams.py).

Kept numbers of 4 bits are widened to 8: expanding halves of bytes would cost more than their bytes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numba import types
from numpy.typing import NDArray
from torch import Tensor

from lath.formats import packing
from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.qtensor import QTensor
from lath.formats.sparse import SparseCodec, SparseTensor, pack
from lath.kernels.linear.cpu_record import VECTOR_BYTES, Record
from lath.kernels.linear.cpu_view import CpuView, build_view, record_of, view_group
from lath.kernels.simd.compile import driver


@dataclass(frozen=True)
class SparseView(CpuView):
    """records: uint8, 1-D, and a vector more than is used. starts: int64 [panels], the byte where
    each begins."""

    starts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def panels(self) -> int:
        return len(self.starts)

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group)

    @property
    def nbytes(self) -> int:
        return self.records.nbytes + self.starts.nbytes

    @property
    def panel_bytes(self) -> int:
        """Of a panel when it is expanded."""
        return self.groups * self.record.nbytes(self.group)


def sparse_record(codec: SparseCodec) -> Record:
    """The kind of record of a codec."""
    if codec.is_table:
        return Record(16, "none", False, codec.values, sparse=True)  # type: ignore[arg-type]
    return replace(record_of(_widened(codec), "int8"), sparse=True)


def sparse_view(weight: SparseTensor, activations: ActivationFormat) -> SparseView:
    """The view of a weight for an activation format, made on first use and kept with it."""
    group = view_group(weight.shape[1], weight.codec, activations)
    return weight.view(f"cpu-g{group}", functools.partial(build_sparse, weight, group))


def build_sparse(weight: SparseTensor, group: int) -> SparseView:
    """Repack a weight into records of `group` columns."""
    record = sparse_record(weight.codec)
    if weight.codec.is_table:
        dense = _columns(weight.numbers(), group)
    else:
        dense = build_view(_dense(weight), group, replace(record, sparse=False)).records.numpy()
    records, starts = _compress(dense, group // record.columns, record)
    return SparseView(
        record, weight.shape[0], weight.shape[1], group, torch.from_numpy(records),
        starts=torch.from_numpy(starts),
    )  # fmt: skip


def check_weight(record: Record) -> tuple[SparseTensor, NDArray[np.float64]]:
    """A weight [40, 140] with half its numbers and power-of-two scales, and its values computed
    here: of eighths up to 30, so that all sums are exact."""
    rng = np.random.default_rng(0)
    shape = (40, 140)
    mask = rng.random(shape) < 0.5
    if record.width == 16:
        eighths = rng.integers(-240, 241, shape) / 8
        codec = SparseCodec(50, record.stored)
        stored = torch.from_numpy(eighths).to(codec.code_dtype)
        return pack(stored, torch.from_numpy(mask), codec), np.where(mask, eighths, 0.0)
    codec = SparseCodec(50, Codec(8, 48, "none", "fp16" if record.half else "fp32"))
    numbers = rng.integers(-128, 128, shape)
    scales = 2.0 ** rng.integers(-2, 3, (codec.num_groups(shape[1]), 48))
    side = torch.from_numpy(scales).to(torch.float16 if record.half else torch.float32)
    packed = pack(torch.from_numpy(numbers.astype(np.int8)), torch.from_numpy(mask), codec, side)
    return packed, np.where(mask, numbers * scales[:, :40].T[:, np.arange(140) // 48], 0.0)


def _widened(codec: SparseCodec) -> Codec:
    """The codec of the kept numbers in 8 bits."""
    assert isinstance(codec.kept, Codec)
    return replace(codec.kept, bits=8)


def _dense(weight: SparseTensor) -> QTensor:
    """Kept numbers and zeros in 8 bits."""
    codec = _widened(weight.codec)
    codes = (weight.numbers().to(torch.int16) + int(codec.zero_code)).to(torch.uint8)
    assert weight.scales is not None
    return QTensor(codec, weight.shape, packing.pack(codes, codec), weight.scales)


def _columns(numbers: Tensor, group: int) -> NDArray[np.uint8]:
    """16-bit numbers [N, K] → uint8 [panels, groups, group * 32]: the rows of a column together."""
    rows, columns = numbers.shape
    padded = torch.nn.functional.pad(numbers, (0, -columns % group, 0, -rows % packing.PANEL))
    panels, groups = padded.shape[0] // packing.PANEL, padded.shape[1] // group
    turned = padded.reshape(panels, packing.PANEL, groups, group).permute(0, 2, 3, 1)
    shorts = turned.contiguous().view(torch.int16).numpy().reshape(-1)
    return shorts.view(np.uint8).reshape(panels, groups, group * packing.PANEL * 2)


def _compress(
    dense: NDArray[np.uint8], steps: int, record: Record
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Dense records [panels, groups, bytes] → sparse ones and where each panel begins."""
    panels, groups, size = dense.shape
    codes, zero = steps * VECTOR_BYTES, record.zero_code
    items = dense[:, :, :codes].view(f"u{record.item}") if size else dense
    kept = int(np.count_nonzero(items != zero)) * record.item
    fixed = steps * record.mask_bytes + size - codes
    # A vector is read as a whole, the last one beyond its end.
    records = np.zeros(kept + panels * groups * fixed + VECTOR_BYTES, np.uint8)
    starts = np.zeros(panels, np.int64)
    _compress_records()(dense, steps, record.item, zero, records, starts)
    return records, starts


@functools.cache
def _compress_records() -> Any:
    """compress(dense records, vectors of a record, bytes of a code, the code to leave out, records
    of zeros, starts)."""
    cube, flat = types.uint8[:, :, ::1], types.uint8[::1]
    signature = types.void(cube, types.int64, types.int64, types.int64, flat, types.int64[::1])
    vector = VECTOR_BYTES

    def compress(dense, steps, item, zero, records, starts):
        panels, groups, size = dense.shape
        masks = vector // item // 8
        at = 0
        for panel in range(panels):
            starts[panel] = at
            for group in range(groups):
                source = dense[panel, group]
                mask = at
                at += steps * masks
                for place in range(steps * vector // item):
                    differs = False
                    for byte in range(item):
                        differs |= source[place * item + byte] != zero
                    if differs:
                        records[mask + place // 8] |= np.uint8(1 << (place % 8))
                        for byte in range(item):
                            records[at + byte] = source[place * item + byte]
                        at += item
                for byte in range(steps * vector, size):
                    records[at] = source[byte]
                    at += 1

    return driver(signature)(compress)
