"""`linear` on a CPU over vector codebooks: the view of a weight, its layer, its kernels' check.

x is prepared as for the float kernel, one token after the other; activations rounded to int8 come
as the fp32 numbers that they stand for. The loops are in cpu_vector_loops.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lath.formats import packing
from lath.formats.activations import ActivationFormat
from lath.formats.plan import Plan
from lath.formats.vectors import VectorTensor
from lath.kernels.linear.cpu import CpuLinear
from lath.kernels.linear.cpu_kernels import FLOAT_KINDS, PREPARATION
from lath.kernels.linear.cpu_launch import argument_block, serial_driver
from lath.kernels.linear.cpu_vector_loops import emit_staged, emit_vectors
from lath.kernels.linear.cpu_view import Kind, kind_of, view_group
from lath.kernels.linear.plan_cpu import CPU_VECTOR_STAGED, cpu_vector_tokens
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import FP32
from lath.kernels.simd.isa import host_isa


class _Shape(NamedTuple):
    """What a kernel is compiled for: of each book the numbers of an entry and bytes of an index; 0
    of a residual book that is not there."""

    main_vector: int
    main_bytes: int
    residual_vector: int = 0
    residual_bytes: int = 0


@dataclass(frozen=True)
class VectorView:
    """indices: for each book uint8 or int16 (as bits) [16 * panels, groups * group / v], rows one
    after another. scales: fp32 [16 * panels, groups]. books: fp16 [entries, v], each with its v.

    A group is the longest run of columns that has one scale of the weight and one of x.
    """

    rows: int
    columns: int
    group: int
    indices: tuple[Tensor, ...]
    scales: Tensor
    books: tuple[Tensor, ...]

    @property
    def panels(self) -> int:
        return self.scales.shape[0] // packing.PANEL

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.indices, self.scales, *self.books))

    @property
    def shape(self) -> _Shape:
        pairs = zip(self.books, self.indices, strict=True)
        return _Shape(*[n for book, index in pairs for n in (book.shape[1], index.element_size())])


class VectorLinear(CpuLinear):
    """A `CpuLinear` over a `VectorView`."""

    _view: VectorView  # type: ignore[assignment]

    def _block(self, x_type: int, y_type: int, tokens: int) -> NDArray[np.int64]:
        tile = cpu_vector_tokens(tokens, host_isa())
        staged = tokens >= CPU_VECTOR_STAGED
        _check(self._view.shape, self._kind, x_type, tile, staged)
        return _block(
            self._view, self._kind, self._shared, self._largest, x_type, tile, staged, y_type
        )


def prepare(
    weight: VectorTensor, bias: Tensor | None = None, activations: ActivationFormat | None = None
) -> VectorLinear:
    """The layer of a weight [N, K] on the CPU and a bias [N] for one activation format ("float" if
    None). ValueError if the weight is not on the CPU."""
    if weight.device.type != "cpu":
        raise ValueError(f"weight must be on the CPU, got {weight.device}")
    activations = activations or ActivationFormat()
    group = view_group(weight.shape[1], weight.codec, activations)
    view = weight.view(f"cpu-vectors-{group}", lambda: build_view(weight, group))
    return VectorLinear(view, kind_of(weight.codec, activations), activations, bias)  # type: ignore[arg-type]


def linear(
    x: Tensor,
    weight: VectorTensor,
    bias: Tensor | None,
    activations: ActivationFormat,
    plan: Plan | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y [M, N] = A(x) Wᵀ + bias of x's dtype; x [M, K], weight [N, K], bias [N] or None.

    plan: only the account of what runs. out: fp32 [M, N], contiguous; filled and returned in place
    of a new tensor.
    """
    layer = weight.view(
        f"cpu-linear-{activations}",
        lambda: prepare(weight, None, activations),
    )
    return layer(x, bias, out)


def build_view(weight: VectorTensor, group: int) -> VectorView:
    """The indices row by row, scales for each group of the view. Two indices of 4 bits are one of
    8, into a book of all pairs."""
    codec, (rows, columns) = weight.codec, weight.shape
    padded, groups = packing.round_up(rows, packing.PANEL), -(-columns // group)
    vectors = groups * group // codec.vector
    indices, books, first = [], [], 0
    found = zip(codec.books, codec.index_bits, weight.unpack_indices(), strict=True)
    for entries, bits, index in found:
        pad = (0, vectors - index.shape[1], 0, padded - rows)
        wide = torch.nn.functional.pad(index, pad)
        indices.append(_stored(wide, bits))
        book = weight.books[first : first + entries]
        if bits == 4:
            low, high = book.repeat(entries, 1), book.repeat_interleave(entries, dim=0)
            book = torch.cat([low, high], dim=1)
        books.append(book.clone())
        first += entries
    source = torch.arange(groups) * group // codec.group_size(columns)
    scales = weight.scales[source].float().T.contiguous()
    return VectorView(rows, columns, group, tuple(indices), scales, tuple(books))


def _stored(index: Tensor, bits: int) -> Tensor:
    """Two indices of 4 bits, or one of 8, as uint8; one of 16 as int16 with the bits of uint16, of
    which torch has few operators."""
    if bits == 4:
        index = index[:, 0::2] | index[:, 1::2] << 4
    if bits <= 8:
        return index.to(torch.uint8)
    return (index - (index > 32767).long() * 65536).to(torch.int16)


def _block(
    view: VectorView,
    kind: Kind,
    shared: int,
    largest: int,
    x_type: int,
    tokens: int,
    staged: bool,
    y_type: int,
) -> NDArray[np.int64]:
    emission, how = PREPARATION[kind]
    prepare_x = compile_kernel(emission, x_type, *how)
    kernel = compile_kernel(emit_staged if staged else emit_vectors, tokens, *view.shape)
    has_residual = len(view.books) > 1
    return argument_block(
        prepare=prepare_x.address,
        kernel=kernel.address,
        records=view.indices[0].data_ptr(),
        residual_records=view.indices[1].data_ptr() if has_residual else 0,
        rows=view.rows,
        columns=view.columns,
        panels=view.panels,
        groups=view.groups,
        group=view.group,
        shared=shared,
        largest=largest,
        tile=1,
        unit=1,
        item=4,
        y_type=y_type,
        table=view.books[0].data_ptr(),
        residual_table=view.books[1].data_ptr() if has_residual else 0,
        outer=view.scales.data_ptr(),
    )


@functools.cache
def _check(shape: _Shape, kind: Kind, x_type: int, tile: int, staged: bool) -> None:
    """Small integers through the kernels of one specialisation: each sum must be exact."""
    view, decoded = _check_view(shape)
    rows, columns = decoded.shape
    rng = np.random.default_rng(1)
    tokens = 1 if tile == 1 else tile + 1
    # As in `cpu_kernels`: the largest magnitude of every group has the code of all of it.
    largest = 7 if kind in ("e4m3", "e5m2") else 127
    x = rng.integers(-7, 8, (tokens, columns)).astype(np.float32)
    x[:, :: view.group] = largest
    dtype = next(dtype for dtype, number in FLOAT_KINDS.items() if number == x_type)
    values = torch.from_numpy(x).to(dtype)
    bias, y = torch.arange(16.0 * view.panels), torch.full((tokens, rows), torch.nan)
    block = _block(view, kind, view.group, largest, x_type, tile, staged, FP32)
    stride = columns * values.element_size()
    serial_driver()(
        block.ctypes.data, values.data_ptr(), stride, bias.data_ptr(), y.data_ptr(), tokens
    )
    expected = x.astype(np.float64) @ decoded.T + np.arange(rows)
    if not np.array_equal(y.double().numpy(), expected):
        raise RuntimeError(
            f"the compiled CPU kernel of {shape} {kind} tile={tile} staged={staged} gave wrong "
            f"numbers for instruction set {host_isa()!r}; LATH_ISA=portable selects plain code, "
            "and a report would help"
        )


def _check_view(shape: _Shape) -> tuple[VectorView, NDArray[np.float64]]:
    """A view [21, 52] of whole numbers, and its values computed here."""
    rows, columns, group, padded, groups = 21, 52, 32, 32, 2
    rng = np.random.default_rng(0)
    indices, books, decoded = [], [], np.zeros((rows, groups * group))
    for vector, size in (shape[:2], shape[2:]) if shape.residual_vector else (shape[:2],):
        count = 1 << (8 * size)
        book = rng.integers(-8, 9, (count, vector))
        index = np.zeros((padded, groups * group // vector), np.int64)
        index[:rows] = rng.integers(0, count, (rows, index.shape[1]))
        index[0, :2] = 0, count - 1
        indices.append(_stored(torch.from_numpy(index), 8 * size))
        books.append(torch.from_numpy(book).half())
        decoded += book[index[:rows]].reshape(rows, -1)
    scales = 2.0 ** rng.integers(-1, 2, (padded, groups))
    decoded = decoded[:, :columns] * scales[:rows, np.arange(columns) // group]
    stored = torch.from_numpy(scales).float()
    return VectorView(rows, columns, group, tuple(indices), stored, tuple(books)), decoded
