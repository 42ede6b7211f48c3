"""The way back from the CPU's view of a weight to its packed tensors, bit for bit.

Most views hold every number of the weight: codes moved by a constant, scales and zeros as they are.
`only_view` keeps such a view in the place of the weight. It compares before it lets anything go, so
that a view which lost something (the sign of a zero, an fp8 product) is never relied upon.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lath.formats import packing
from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.qtensor import SCALE_DTYPES, QTensor
from lath.formats.viewed import ViewedTensor
from lath.kernels.linear.cpu_record import VECTOR_BYTES
from lath.kernels.linear.cpu_triplet_view import TripletView, codes_of
from lath.kernels.linear.cpu_view import CpuView, stored_codes
from lath.kernels.linear.cpu_views import cpu_view, view_key

# Weights that are unpacked at once, a few bytes each.
_CHUNK_WEIGHTS = 1 << 20


def only_view(weight: QTensor, activations: ActivationFormat) -> ViewedTensor | None:
    """The weight as its view for an activation format alone; None where the view is not the same
    numbers. The weight itself stays as it is."""
    if isinstance(weight, ViewedTensor):
        return weight
    view, codec, shape = cpu_view(weight, activations), weight.codec, weight.shape
    side = _side_of(view, codec)
    if side is None or not _holds_codes(view, weight):
        return None
    small = {name: t for name, t in weight.tensors.items() if name in ("outer", "table")}
    if any(not torch.equal(tensor, weight.tensors[name]) for name, tensor in side.items()):
        return None
    kept = {name: tensor.detach().clone() for name, tensor in small.items()}
    restore = functools.partial(_restore, view, codec, shape, kept)
    return ViewedTensor(
        codec, shape, view_key(weight.shape[1], codec, activations)[0], view, restore
    )


def _restore(
    view: CpuView, codec: Codec, shape: tuple[int, int], kept: dict[str, Tensor]
) -> dict[str, Tensor]:
    weight = QTensor.empty(codec, shape, "cpu")
    planes = weight.planes
    for first, last, own in _packed_panels(view, codec):
        for plane, part in zip(planes, own, strict=True):
            plane[first:last] = part
    side = _side_of(view, codec)
    assert side is not None
    made = {"codes": weight.codes, **side, **kept}
    return {name: made[name] for name in QTensor.tensor_names(codec)}


def _holds_codes(view: CpuView, weight: QTensor) -> bool:
    stored = stored_codes(weight.codec, view.record)[: weight.codec.levels]
    if len(set(stored.tolist())) < len(stored):
        return False
    planes = weight.planes
    return all(
        torch.equal(plane[first:last], part)
        for first, last, own in _packed_panels(view, weight.codec)
        for plane, part in zip(planes, own, strict=True)
    )


def _packed_panels(view: CpuView, codec: Codec) -> Iterator[tuple[int, int, list[Tensor]]]:
    """Panels first .. last - 1 and their planes, as many at once as memory for them is small."""
    some = max(1, _CHUNK_WEIGHTS // max(packing.PANEL * view.columns, 1))
    for first in range(0, view.panels, some):
        last = min(first + some, view.panels)
        codes = torch.from_numpy(_codes(view, codec, first, last))
        size = (len(codes), view.columns)
        yield first, last, packing.split_planes(packing.pack(codes, codec), codec, size)


def _codes(view: CpuView, codec: Codec, first: int, last: int) -> NDArray[np.uint8]:
    """uint8 [16 * (last - first), K]: the weight's codes in these panels."""
    if isinstance(view, TripletView):
        return codes_of(view, first, last)
    record, panels = view.record, last - first
    steps = view.group // record.columns
    raw = view.records.numpy()[first:last, :, : steps * VECTOR_BYTES]
    vectors: NDArray[np.uint8]
    if record.by_column:
        vectors = raw.reshape(panels, view.groups, steps, 4, packing.PANEL).swapaxes(3, 4)
    else:
        vectors = raw.reshape(panels, view.groups, steps, packing.PANEL, 4)
    fields = []
    for field in range(record.fields):
        if record.stored == "trits":
            fields.append(vectors // np.uint8(3**field) % np.uint8(3))
        else:
            mask = np.uint8((1 << record.width) - 1)
            fields.append(vectors >> np.uint8(record.width * field) & mask)
    # panel, group, step, row, field, byte → panel, row, columns
    codes = np.stack(fields, axis=4).transpose(0, 3, 1, 2, 4, 5)
    flat = codes.reshape(panels * packing.PANEL, -1)[:, : view.columns]
    back = np.zeros(256, np.uint8)
    own = stored_codes(codec, record)[: codec.levels]
    back[own] = np.arange(len(own), dtype=np.uint8)
    return np.ascontiguousarray(back[flat])


def _side_of(view: CpuView, codec: Codec) -> dict[str, Tensor] | None:
    """Scales and zeros [G, N16] of the weight; None where the records hold others."""
    if isinstance(view, TripletView):
        return {"scales": view.scales[None].to(SCALE_DTYPES[codec.scale_dtype])}
    record = view.record
    start = view.group // record.columns * VECTOR_BYTES
    scale_dtype = SCALE_DTYPES[codec.scale_dtype]
    stored = torch.uint8 if record.byte_scale else torch.float16 if record.half else torch.float32
    halved = codec.bits == 1 and codec.zero == "none" and record.stored == "integer"
    if stored != scale_dtype and not halved:
        return None
    scales = _side(view, codec, start, stored)
    side = {"scales": (2 * scales.float()).to(scale_dtype) if halved else scales}
    if codec.zero != "none":
        dtype = torch.uint8 if codec.zero == "integer" else scale_dtype
        if codec.zero == "float" and stored != scale_dtype:
            return None
        side["zeros"] = _side(view, codec, start + record.scale_bytes, dtype)
    return side


def _side(view: CpuView, codec: Codec, start: int, dtype: torch.dtype) -> Tensor:
    """Sixteen values of each record from a byte on, as [G, N16]: the first record of a group."""
    size, count = codec.group_size(view.columns), codec.num_groups(view.columns)
    which = np.arange(count) * size // view.group
    raw = view.records.numpy()[:, which, start : start + packing.PANEL * dtype.itemsize]
    values = torch.from_numpy(np.ascontiguousarray(raw)).view(dtype)  # [panels, G, 16]
    return values.permute(1, 0, 2).reshape(count, view.panels * packing.PANEL).contiguous()
