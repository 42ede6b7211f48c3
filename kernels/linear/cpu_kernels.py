"""Which kernels run a layer on a CPU, compiled and checked once per process.

Before a kernel's first use it multiplies small integers, and the answer must be exact: an
instruction that a lowering misjudged shows there and not in a model. There is no other kernel to
fall back on silently.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lath.formats import values as value_tables
from lath.formats.activations import LARGEST_CODE
from lath.formats.codec import Codec, ScaleDtype
from lath.formats.packing import PANEL, pack, round_up
from lath.formats.qtensor import SCALE_DTYPES, QTensor
from lath.formats.values import Values
from lath.kernels.linear.cpu_activations import emit_quantize, emit_round, emit_widen
from lath.kernels.linear.cpu_dot import emit_tile
from lath.kernels.linear.cpu_float import emit_float
from lath.kernels.linear.cpu_launch import argument_block, serial_driver
from lath.kernels.linear.cpu_look_up import LookUp, emit_look_up, look_up_of
from lath.kernels.linear.cpu_record import Record
from lath.kernels.linear.cpu_sparse import SparseView, build_sparse
from lath.kernels.linear.cpu_sparse import check_weight as sparse_check_weight
from lath.kernels.linear.cpu_triplet_view import TripletView, build_triplets
from lath.kernels.linear.cpu_triplets import emit_triplets
from lath.kernels.linear.cpu_view import CpuView, Kind, build_view
from lath.kernels.linear.plan_cpu import LOOK_UP_TILE, TRIT_GROUP, cpu_tile
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import BF16, FP16, FP32
from lath.kernels.simd.isa import host_isa

# What prepares x, and options of its emission behind the type of x.
PREPARATION: dict[Kind, tuple[Any, tuple[str, ...]]] = {
    "int8": (emit_quantize, ()), "float": (emit_widen, ()), "rounded": (emit_round, ()),
    "e4m3": (emit_round, ("e4m3",)), "e5m2": (emit_round, ("e5m2",)),
}  # fmt: skip
FLOAT_KINDS = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}


def tile_of(record: Record, kind: Kind, tokens: int, panel_bytes: int) -> tuple[int, int]:
    """(tokens, panels) of the register tile on this machine, as the plan says."""
    multiplied = "int8" if kind == "int8" else "float"
    which = "triplets" if record.stored == "triplets" else multiplied
    return cpu_tile(which, record.width, tokens, panel_bytes, host_isa())


def linear_block(
    view: CpuView,
    kind: Kind,
    shared: int,
    largest: int,
    x_type: int,
    tile: tuple[int, int],
    y_type: int,
    tiles: bool,
) -> NDArray[np.int64]:
    """The argument block that multiplies x of `x_type` by a view into y of `y_type`.

    shared: columns that share one scale of the activations. largest: code of the largest of them.
    tiles: there are more tokens than the tile has. Raises RuntimeError if the kernels do not pass
    their check.
    """
    # Read many times, a sparse panel is expanded in memory once and not in registers every time.
    expand = tiles and kind == "int8" and view.record.sparse
    _check(kind, view.record, x_type, tile, expand)
    return _block(view, kind, shared, largest, x_type, tile, y_type, expand)


def look_up_block(look_up: LookUp, largest: int, x_type: int, y_type: int) -> NDArray[np.int64]:
    """As `linear_block`, by look-up; y is of `y_type`."""
    _check_look_up(x_type)
    return _look_up_block(look_up, largest, x_type, y_type)


def _look_up_block(look_up: LookUp, largest: int, x_type: int, y_type: int) -> NDArray[np.int64]:
    return argument_block(
        prepare=compile_kernel(emit_quantize, x_type).address,
        kernel=compile_kernel(emit_look_up).address,
        records=look_up.indices.data_ptr(),
        row_scales=look_up.scales.data_ptr(),
        rows=look_up.rows,
        columns=look_up.columns,
        panels=look_up.panels,
        groups=1,
        group=look_up.group,
        shared=look_up.group,
        largest=largest,
        tile=LOOK_UP_TILE,
        unit=1,
        item=1,
        y_type=y_type,
    )


def _block(
    view: CpuView,
    kind: Kind,
    shared: int,
    largest: int,
    x_type: int,
    tile: tuple[int, int],
    y_type: int,
    expand: bool,
) -> NDArray[np.int64]:
    options, rest = view.record.options
    emission, how = PREPARATION[kind]
    prepare = compile_kernel(emission, x_type, *how)
    triplets = view.record.stored == "triplets"
    if triplets:
        kernel = compile_kernel(emit_triplets, tile[0])
    elif kind == "int8":
        kernel = compile_kernel(emit_tile, *options, *tile, *rest, *([True] if expand else []))
    else:
        kernel = compile_kernel(emit_float, *options, tile[0], *rest)
    return argument_block(
        prepare=prepare.address,
        kernel=kernel.address,
        records=view.records.data_ptr(),
        rows=view.rows,
        columns=view.columns,
        panels=view.panels,
        groups=view.groups,
        group=view.group,
        shared=shared,
        largest=largest,
        tile=1 if triplets else tile[0],  # sums of columns in a row are made
        unit=tile[1],
        item=1 if kind == "int8" else 4,
        y_type=y_type,
        table=0 if view.table is None else view.table.data_ptr(),
        outer=0 if view.outer is None else view.outer.data_ptr(),
        starts=view.starts.data_ptr() if isinstance(view, SparseView) else 0,
        row_scales=view.scales.data_ptr() if isinstance(view, TripletView) else 0,
        expanded=round_up(tile[1] * view.panel_bytes, 64) if expand else 0,
    )


@functools.cache
def _check(
    kind: Kind, record: Record, x_type: int, tile: tuple[int, int], expand: bool = False
) -> None:
    """Small integers through the kernels of one specialisation: each sum must be exact."""
    if record.sparse:
        sparse, decoded = sparse_check_weight(record)
        size = sparse.codec.group or 48
        view: CpuView = build_sparse(sparse, size)
    else:
        weight, decoded = _check_weight(record)
        triplets = record.stored == "triplets"
        size = 0 if triplets else weight.codec.group_size(weight.shape[1])
        view = build_triplets(weight, record) if triplets else build_view(weight, size, record)
        size = view.group if triplets else size
    rows, columns = view.rows, view.columns
    tokens = 1 if tile[0] == 1 else tile[0] + 1
    rng = np.random.default_rng(1)
    # The largest magnitude of every group has the largest code, or 7 where all of 8-bit floats up
    # to that are whole: its scale is 1.
    largest = 7 if kind in ("e4m3", "e5m2") else LARGEST_CODE
    x = rng.integers(-7, 8, (tokens, columns)).astype(np.float32)
    x[:, ::size] = largest
    dtype = next(dtype for dtype, number in FLOAT_KINDS.items() if number == x_type)
    values = torch.from_numpy(x).to(dtype)
    bias = torch.arange(16 * view.panels, dtype=torch.float32)
    y = torch.full((tokens, rows), torch.nan)
    block = _block(view, kind, size, largest, x_type, tile, FP32, expand)
    _run(block, values, bias, y)
    expected = x.astype(np.float64) @ decoded.T + np.arange(rows)
    _require(np.array_equal(y.double().numpy(), expected), f"{kind} {record} tile={tile}")


@functools.cache
def _check_look_up(x_type: int) -> None:
    """As `_check`, for the look-ups: ternary rows over more columns than int16 sums last for."""
    rows, columns, tokens = 40, 300, LOOK_UP_TILE + 1
    rng = np.random.default_rng(0)
    trits = rng.integers(-1, 2, (rows, columns))
    trits[7] = 1
    codec = Codec(2, None, "none", "fp32", "ternary")
    scales = 2.0 ** rng.integers(-2, 3, (1, rows))
    packed = pack(torch.from_numpy((trits + 1).astype(np.uint8)), codec)
    weight = QTensor(codec, (rows, columns), packed, _side(scales, "fp32"))
    look_up = look_up_of(build_view(weight, round_up(columns, PANEL), Record(2, "none", False)))
    x = rng.integers(-9, 10, (tokens, columns)).astype(np.float32)
    x[1] = x[:, 0] = LARGEST_CODE
    dtype = next(dtype for dtype, number in FLOAT_KINDS.items() if number == x_type)
    y = torch.full((tokens, rows), torch.nan)
    bias = torch.arange(PANEL * look_up.panels, dtype=torch.float32)
    block = _look_up_block(look_up, LARGEST_CODE, x_type, FP32)
    _run(block, torch.from_numpy(x).to(dtype), bias, y)
    expected = x.astype(np.float64) @ (scales.T * trits).T + np.arange(rows)
    _require(np.array_equal(y.double().numpy(), expected), "look-up")


def _run(block: NDArray[np.int64], x: Tensor, bias: Tensor, y: Tensor) -> None:
    stride = x.shape[1] * x.element_size()
    serial_driver()(
        block.ctypes.data, x.data_ptr(), stride, bias.data_ptr(), y.data_ptr(), x.shape[0]
    )


def _check_weight(record: Record) -> tuple[QTensor, NDArray[np.float64]]:
    """A weight [40, 140] with power-of-two scales, and its values computed here."""
    if record.stored not in ("integer", "nested", "trits", "triplets"):
        return _check_table(record)
    rows, columns, group = 40, 140, 48
    if record.stored == "triplets":
        columns = group = 1200  # several runs and a part of one
    rng = np.random.default_rng(0)
    scale_dtype: ScaleDtype = "fp16" if record.half else "fp32"
    scale_dtype = "int8" if record.is_folded else scale_dtype
    values: Values = "nested" if record.stored == "nested" else "integer"
    codec = Codec(record.width, group, record.zero, scale_dtype, values)
    if record.stored == "trits":
        codec = replace(codec, bits=2, group=TRIT_GROUP, values="ternary", packing="base3")
        group = TRIT_GROUP
    if record.stored == "triplets":
        codec = replace(codec, group=None, values="ternary")
    codes = rng.integers(0, codec.levels, (rows, columns)).astype(np.uint8)
    shape = (codec.num_groups(columns), rows)
    scales: NDArray[Any] = 2.0 ** rng.integers(-2, 3, shape)
    outer = None
    if record.is_folded:
        scales = rng.integers(1, codec.largest_inner_scale + 1, shape)
        outer = 2.0 ** rng.integers(-2, 3, rows)
    zeros: NDArray[Any] = np.full(shape, codec.zero_code)
    if record.zero != "none":
        zeros = rng.integers(0, codec.levels, shape)
    of_column = np.arange(columns) // group
    if record.zero == "float":
        decoded = scales.T[:, of_column] * codes - zeros.T[:, of_column]
        stored: Tensor | None = _side(-zeros, "fp16" if record.half else "fp32")
    else:
        decoded = scales.T[:, of_column] * (codes - zeros.T[:, of_column].astype(np.float64))
        stored = _side(zeros, "uint8") if record.zero == "integer" else None
    packed = pack(torch.from_numpy(codes), codec)
    above = None
    if outer is not None:
        decoded = decoded * outer[:, None]
        above = _side(outer[None], "fp16")[0]
    scales_stored = _side(scales, codec.scale_dtype)
    return QTensor(codec, (rows, columns), packed, scales_stored, stored, above), decoded


def _check_table(record: Record) -> tuple[QTensor, NDArray[np.float64]]:
    """As `_check_weight`, of a table: of eighths up to 30, so that all sums are exact."""
    rows, columns = 40, 140
    rng = np.random.default_rng(0)
    codec = _check_codec(record)
    if codec.values == "learned":
        entries = np.sort(rng.permutation(481)[: codec.levels] - 240.0) / 8
    else:
        entries = np.array(value_tables.table(codec.values))
    usable = [code for code, entry in enumerate(entries) if abs(entry) <= 30 and entry * 8 % 1 == 0]
    codes = rng.choice(usable, (rows, columns)).astype(np.uint8)
    shape = (codec.num_groups(columns), rows)
    power = rng.integers(-2, 3, shape)
    stored = {"e8m0": power + 127, "e4m3": (power + 7) << 3}.get(codec.scale_dtype, 2.0**power)
    outer = torch.full((1,), 0.25) if codec.scale_dtype == "e4m3" else None
    factor = 1.0 if outer is None else 0.25
    decoded = factor * 2.0 ** power.T[:, np.arange(columns) // codec.group_size(columns)]
    decoded = decoded * entries[codes]
    weight = QTensor(
        codec,
        (rows, columns),
        pack(torch.from_numpy(codes), codec),
        _side(stored, codec.scale_dtype),
        outer=outer,
        table=torch.from_numpy(entries).float() if codec.values == "learned" else None,
    )
    return weight, decoded


def _check_codec(record: Record) -> Codec:
    """A codec whose records are of this kind, or would be if its scales fitted bytes."""
    scale: ScaleDtype = record.byte_scale or ("fp16" if record.half else "fp32")
    if record.stored == "e2m3":
        return Codec.parse("mxfp6")
    if record.stored == "table":
        return Codec(record.width, 48, "none", scale, "learned")
    group = {"e8m0": 32, "e4m3": 16}.get(record.byte_scale, 48)
    return Codec(record.width, group, "none", scale, record.stored)  # type: ignore[arg-type]


def _side(values: NDArray[Any], dtype: str) -> Tensor:
    kinds = {**SCALE_DTYPES, "uint8": torch.uint8}
    groups, rows = values.shape
    padded = np.zeros((groups, round_up(rows, PANEL)))
    padded[:, :rows] = values
    return torch.from_numpy(padded).to(kinds[dtype])


def _require(passed: bool, what: str) -> None:
    if not passed:
        raise RuntimeError(
            f"the compiled CPU kernel {what} gave wrong numbers for instruction set "
            f"{host_isa()!r}; LATH_ISA=portable selects plain code, and a report would help"
        )
