"""`linear` on a CPU over vector codebooks: entries fetched by their indices, widened, multiplied.

A lane is a column here and not a row: sixteen columns of a row are one or more entries side by
side, widened to fp32 and multiplied with the same sixteen columns of x, four rows at a time. x is
prepared as for the float kernel, one token after the other; activations rounded to int8 come as the
fp32 numbers that they stand for. Fetching is the price, and the books stay in fp16: one of 256
lives in the first-level cache, one of 65536 in the second. For many tokens a piece of sixteen rows
is decoded into memory first ("staged").
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numpy.typing import NDArray
from torch import Tensor

from lath.formats import packing
from lath.formats.activations import LARGEST_CODE, ActivationFormat
from lath.formats.plan import Plan
from lath.formats.vectors import VectorTensor
from lath.kernels.linear.cpu import CpuLinear
from lath.kernels.linear.cpu_activations import emit_round, emit_widen
from lath.kernels.linear.cpu_arguments import Arguments
from lath.kernels.linear.cpu_kernels import FLOAT_KINDS
from lath.kernels.linear.cpu_launch import argument_block, serial_driver
from lath.kernels.linear.cpu_record import Output
from lath.kernels.linear.cpu_view import Kind, view_group
from lath.kernels.linear.plan import CPU_VECTOR_STAGED, cpu_vector_tokens
from lath.kernels.simd import half, lanes
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import (
    F32,
    FLOATS,
    FP32,
    HALVES,
    I8,
    I16,
    I64,
    INTS,
    LANES,
    Emitter,
)
from lath.kernels.simd.isa import host_isa

_ROWS = 4  # whose accumulators and decoded weights fit the registers beside those of the tokens
# Sixteens of columns of a panel that are decoded at once, 32 KB: they and a tile of tokens stay in
# the first-level cache. And the tokens that they serve.
_PIECE = 32
_SPAN = 256


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
        return _block(self._view, self._kind, self._shared, x_type, tile, staged, y_type)


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
    kind: Kind = "float" if activations.kind == "float" else "rounded"
    return VectorLinear(view, kind, activations, bias)  # type: ignore[arg-type]


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
        f"cpu-linear-{activations.kind}-{activations.group}",
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
    """Two indices of 4 bits or one of 8 as uint8; of 16 as int16 with the bits of a uint16, of which
    torch has few operators."""
    if bits == 4:
        index = index[:, 0::2] | index[:, 1::2] << 4
    if bits <= 8:
        return index.to(torch.uint8)
    return (index - (index > 32767).long() * 65536).to(torch.int16)


def _block(
    view: VectorView,
    kind: Kind,
    shared: int,
    x_type: int,
    tokens: int,
    staged: bool,
    y_type: int,
) -> NDArray[np.int64]:
    prepare_x = compile_kernel(emit_widen if kind == "float" else emit_round, x_type)
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
        tile=1,
        unit=1,
        item=4,
        y_type=y_type,
        table=view.books[0].data_ptr(),
        residual_table=view.books[1].data_ptr() if has_residual else 0,
        outer=view.scales.data_ptr(),
    )


def emit_vectors(
    e: Emitter, begin: Any, end: Any, arguments: Any, tokens: int, *shape: int
) -> None:
    """All tokens, `tokens` at a time, panels [begin, end); shape: of `_Shape`."""
    a = Arguments(e, arguments)
    rows, output, sums = _Rows(e, a, shape), Output(e, a), e.buffer(tokens)
    with e.loop(e.subtract(end, begin)) as index:
        panel = e.add(begin, index)
        with e.loop(_tiles(e, a, tokens)) as tile:
            first = e.multiply(tile, tokens)
            with e.loop(e.integer(LANES // _ROWS)) as quad:
                rows.start(e.add(e.multiply(panel, LANES), e.multiply(quad, _ROWS)))
                totals = _multiply(e, a, rows, first, tokens)
                _put_sums(e, sums, quad, totals)
            _store(e, a, output, sums, panel, first, tokens)


def emit_staged(e: Emitter, begin: Any, end: Any, arguments: Any, tokens: int, *shape: int) -> None:
    """As `emit_vectors`, for many tokens: a piece of a panel is decoded once for _SPAN of them."""
    a = Arguments(e, arguments)
    rows, output, sums = _Rows(e, a, shape), Output(e, a), e.buffer(_SPAN)
    stage = e.buffer(LANES * _PIECE)
    length = e.divide(e.multiply(a["groups"], a["group"]), LANES)
    pieces = e.divide(e.add(length, _PIECE - 1), _PIECE)
    spans = e.divide(e.add(a["tokens"], _SPAN - 1), _SPAN)
    with e.loop(e.subtract(end, begin)) as index, e.loop(spans) as span:
        panel, start = e.add(begin, index), e.multiply(span, _SPAN)
        count = e.smaller_of(e.subtract(a["tokens"], start), _SPAN)
        tiles = e.divide(e.add(count, tokens - 1), tokens)
        with e.loop(e.integer(_SPAN)) as m:
            e.store(e.offset(sums, m, 64), e.floats(0.0))
        with e.loop(pieces) as piece:
            step = e.multiply(piece, _PIECE)
            steps = e.smaller_of(e.subtract(length, step), _PIECE)
            with e.loop(e.integer(LANES // _ROWS)) as quad:
                rows.start(e.add(e.multiply(panel, LANES), e.multiply(quad, _ROWS)))
                _decode(e, a, rows, _stage_of(e, stage, quad), step, steps)
            with e.loop(tiles) as tile, e.loop(e.integer(LANES // _ROWS)) as quad:
                inside = e.multiply(tile, tokens)
                x = _tokens_of_x(e, a, e.add(start, inside), tokens)
                x = [e.offset(own, step, 4 * LANES) for own in x]
                totals = _multiply_staged(e, _stage_of(e, stage, quad), x, steps)
                _put_sums(e, e.offset(sums, inside, 64), quad, totals, added=True)
        with e.loop(tiles) as tile:
            inside = e.multiply(tile, tokens)
            first = e.add(start, inside)
            _store(e, a, output, e.offset(sums, inside, 64), panel, first, tokens)


def _stage_of(e: Emitter, stage: Any, quad: Any) -> Any:
    """Where four rows of a piece begin."""
    return e.offset(stage, quad, 64 * _ROWS * _PIECE)


def _tiles(e: Emitter, a: Arguments, tokens: int) -> Any:
    return e.divide(e.add(a["tokens"], tokens - 1), tokens)


def _put_sums(
    e: Emitter, sums: Any, quad: Any, totals: list[list[Any]], added: bool = False
) -> None:
    """Sums of four rows over their columns, for each token, to their place among sixteen; or added
    to what is there."""
    for m, own in enumerate(totals):
        summed = lanes.rows(e, own, e.builder.fadd)
        place = e.add(sums, e.add(e.multiply(quad, 4 * _ROWS), 64 * m))
        if added:
            summed = e.builder.fadd(summed, lanes.load_quad(e, place))
        lanes.store_quad(e, place, summed)


def _store(
    e: Emitter, a: Arguments, output: Output, sums: Any, panel: Any, first: Any, tokens: int
) -> None:
    for m in range(tokens):
        token = e.add(first, m)
        with e.when(e.less(token, a["tokens"])):
            output.store(token, panel, e.load(e.add(sums, 64 * m), FLOATS))


def _tokens_of_x(e: Emitter, a: Arguments, first: Any, tokens: int) -> list[Any]:
    """Where the prepared x of each token of a tile begins."""
    length = e.multiply(a["groups"], a["group"])
    last = e.subtract(a["tokens"], 1)
    # A tile over the end computes the last token again, which is harmless.
    places = [e.smaller_of(e.add(first, m), last) for m in range(tokens)]
    return [e.add(a["codes"], e.multiply(e.multiply(place, length), 4)) for place in places]


def _multiply(e: Emitter, a: Arguments, rows: _Rows, first: Any, tokens: int) -> list[list[Any]]:
    """For each token the sums of four rows, apart by column modulo sixteen."""
    x = _tokens_of_x(e, a, first, tokens)
    totals = _zeros(e, tokens)
    with e.loop(a["groups"]) as group:
        parts = _zeros(e, tokens)
        with rows.steps(group) as step:
            values = [e.load(e.offset(start, step, 4 * LANES), FLOATS) for start in x]
            for r in range(_ROWS):
                decoded = rows.numbers(r, step)
                for m in range(tokens):
                    parts[m][r].value = e.fma(decoded, values[m], parts[m][r].value)
        for r in range(_ROWS):
            scale = rows.scale(r, group)
            for m in range(tokens):
                totals[m][r].value = e.fma(parts[m][r].value, scale, totals[m][r].value)
    return [[total.value for total in own] for own in totals]


def _decode(e: Emitter, a: Arguments, rows: _Rows, stage: Any, first: Any, count: Any) -> None:
    """`count` sixteens of columns of four rows, from number `first`, as fp32 in memory."""
    each = e.divide(a["group"], LANES)
    with e.loop(count) as i:
        step = e.add(first, i)
        group = e.divide(step, each)
        for r in range(_ROWS):
            value = e.builder.fmul(rows.numbers(r, step), rows.scale(r, group))
            e.store(e.add(e.offset(stage, i, 64 * _ROWS), 64 * r), value)


def _multiply_staged(e: Emitter, stage: Any, x: list[Any], count: Any) -> list[list[Any]]:
    """As `_multiply`, of `count` sixteens of decoded columns; x: where each token's begin."""
    totals = _zeros(e, len(x))
    with e.loop(count) as i:
        place = e.offset(stage, i, 64 * _ROWS)
        decoded = [e.load(e.add(place, 64 * r), FLOATS) for r in range(_ROWS)]
        for m, own in enumerate(x):
            value = e.load(e.offset(own, i, 64), FLOATS)
            for r in range(_ROWS):
                totals[m][r].value = e.fma(decoded[r], value, totals[m][r].value)
    return [[total.value for total in own] for own in totals]


def _zeros(e: Emitter, tokens: int) -> list[list[Any]]:
    return [[e.variable(e.floats(0.0)) for _ in range(_ROWS)] for _ in range(tokens)]


class _Rows:
    """Reads four rows of a view: scales, and the sum of the entries of its books."""

    def __init__(self, e: Emitter, a: Arguments, shape: tuple[int, ...]) -> None:
        self.e, self.a = e, a
        self._length = e.multiply(a["groups"], a["group"])
        self._books = [_Book(e, a["records"], a["table"], *shape[:2])]
        if shape[2]:
            residual = (a["residual_records"], a["residual_table"])
            self._books.append(_Book(e, *residual, *shape[2:]))
        self._scales: Any = None

    def start(self, row: Any) -> None:
        """Go to the four rows from `row`."""
        e, groups = self.e, self.a["groups"]
        for book in self._books:
            book.start(row, self._length)
        self._scales = e.add(self.a["outer"], e.multiply(e.multiply(row, groups), 4))

    @contextlib.contextmanager
    def steps(self, group: Any) -> Iterator[Any]:
        """A loop over the sixteens of columns of a group; yields their number in the row."""
        e, each = self.e, self.e.divide(self.a["group"], LANES)
        before = e.multiply(group, each)
        with e.loop(each) as i:
            yield e.add(before, i)

    def scale(self, r: int, group: Any) -> Any:
        e = self.e
        own = e.add(self._scales, e.multiply(self.a["groups"], 4 * r))
        return e.broadcast(e.add(own, e.multiply(group, 4)), F32)

    def numbers(self, r: int, step: Any) -> Any:
        """Columns 16 * step .. 16 * step + 15 of row r, fp32, before the scale."""
        total = self._books[0].numbers(r, step)
        for book in self._books[1:]:
            total = self.e.builder.fadd(total, book.numbers(r, step))
        return total


class _Book:
    """Reads one book's entries by the indices of four rows."""

    def __init__(self, e: Emitter, indices: Any, table: Any, vector: int, size: int) -> None:
        self.e, self.vector, self.size = e, vector, size
        self._indices, self._table = indices, table
        self._rows: list[Any] = []

    def start(self, row: Any, length: Any) -> None:
        """Go to four rows; length: columns of a row."""
        e = self.e
        stride = e.multiply(e.divide(length, self.vector), self.size)
        first = e.add(self._indices, e.multiply(row, stride))
        self._rows = [e.add(first, e.multiply(stride, r)) for r in range(_ROWS)]

    def numbers(self, r: int, step: Any) -> Any:
        """Columns 16 * step .. 16 * step + 15 of row r, fp32."""
        e = self.e
        count = LANES // self.vector
        place = e.offset(self._rows[r], step, count * self.size)
        entries = [self._entry(e.add(place, self.size * i)) for i in range(count)]
        while len(entries) > 1:
            entries = [
                e.shuffle(a, b, list(range(2 * a.type.count)))
                for a, b in zip(entries[::2], entries[1::2], strict=True)
            ]
        if e.native_half:
            return e.builder.fpext(e.builder.bitcast(entries[0], HALVES), FLOATS)
        return half.widen(e, e.builder.zext(entries[0], INTS))

    def _entry(self, address: Any) -> Any:
        """The bits of the v numbers of one entry."""
        e = self.e
        index = e.builder.zext(e.load(address, I8 if self.size == 1 else I16), I64)
        return e.load(
            e.offset(self._table, index, 2 * self.vector), ir.VectorType(I16, self.vector)
        )


@functools.cache
def _check(shape: _Shape, kind: Kind, x_type: int, tile: int, staged: bool) -> None:
    """Small integers through the kernels of one specialisation: each sum must be exact."""
    view, decoded = _check_view(shape)
    rows, columns = decoded.shape
    rng = np.random.default_rng(1)
    tokens = 1 if tile == 1 else tile + 1
    x = rng.integers(-9, 10, (tokens, columns)).astype(np.float32)
    x[:, :: view.group] = LARGEST_CODE  # the largest magnitude of every group: its scale is 1
    dtype = next(dtype for dtype, number in FLOAT_KINDS.items() if number == x_type)
    values = torch.from_numpy(x).to(dtype)
    bias, y = torch.arange(16.0 * view.panels), torch.full((tokens, rows), torch.nan)
    block = _block(view, kind, view.group, x_type, tile, staged, FP32)
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
