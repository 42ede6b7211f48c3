"""`linear` of outliers on a CPU: x in fp32, fp32 sums, rows shared among torch's threads."""

from __future__ import annotations

import functools
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lath.formats.activations import ActivationFormat
from lath.formats.outliers import OutlierCodec, Outliers
from lath.formats.plan import Plan
from lath.kernels.outliers.plan import GATHER_TOKENS

try:
    import numba  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the compiled CPU kernels need numba: pip install 'lath[cpu]'", name=error.name
    ) from error

from lath.kernels.outliers.cpu_kernels import FIELDS, INDEX, emit_gather, emit_tokens
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import LANES
from lath.kernels.simd.isa import host_isa
from lath.kernels.simd.workers import Slots, run_units

_SLOTS = Slots(INDEX["task"], INDEX["thread_number"], INDEX["thread_count"])
# Registers of tokens that share an entry, of many tokens: as many sums do not wait for each other.
_VECTORS = 4
# Fewer products than this are done before a second thread has begun.
_PARALLEL_PRODUCTS = 1 << 16


@dataclass(frozen=True)
class _View:
    """Columns and values with a vector's length of padding, which a last vector reads over."""

    columns: Tensor
    values: Tensor
    offsets: Tensor

    @property
    def nbytes(self) -> int:
        return self.columns.nbytes + self.values.nbytes + self.offsets.nbytes


def linear(
    x: Tensor,
    weight: Outliers,
    bias: Tensor | None,
    activations: ActivationFormat,
    plan: Plan | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [M, K] times the outliers of [N, K], plus bias [N]: [M, N] of x's dtype, or `out` (fp32).

    activations: "float", as the plan requires. Every sum is fp32.
    """
    if weight.device.type != "cpu":
        raise ValueError(f"weight must be on the CPU, got {weight.device}")
    view = weight.view("cpu-outliers", lambda: _view(weight))
    y = torch.empty((x.shape[0], weight.shape[0])) if out is None else out
    if y.numel():
        _checked(view.columns.dtype == torch.int16, _vectors(x.shape[0]))
        _run(x, view, bias, y)
    return y if out is not None else y.to(x.dtype)


def prepare(
    weight: Outliers, bias: Tensor | None = None, activations: ActivationFormat | None = None
) -> Any:
    """A call x [M, K] → y [M, N] of x's dtype."""
    return lambda x: linear(x, weight, bias, activations or ActivationFormat())


def _view(weight: Outliers) -> _View:
    columns, values = (
        torch.nn.functional.pad(t, (0, LANES)) for t in (weight.codes, weight.values)
    )
    return _View(columns, values, weight.offsets.clone())


def _vectors(tokens: int) -> int:
    """Registers of tokens that an entry is multiplied by; 0: of one token, entries side by side."""
    if tokens <= GATHER_TOKENS:
        return 0
    return 1 if tokens <= LANES else _VECTORS


def _run(x: Tensor, view: _View, bias: Tensor | None, y: Tensor) -> None:
    """y fp32 [M, N], contiguous; x of any float type and strides."""
    tokens, rows = y.shape
    short, vectors = view.columns.dtype == torch.int16, _vectors(tokens)
    if vectors == 0:
        numbers, kernel = x.float().contiguous(), compile_kernel(emit_gather, short)
    else:
        tile = vectors * LANES
        numbers = torch.zeros((x.shape[1], -(-tokens // tile) * tile))
        numbers[:, :tokens] = x.t()
        kernel = compile_kernel(emit_tokens, short, vectors)
    offsets = torch.zeros(rows) if bias is None else bias.detach().float().contiguous()
    block = array("q", [0] * len(FIELDS))
    for name, value in (
        ("x", numbers.data_ptr()), ("stride", 4 * numbers.shape[1]),
        ("columns", view.columns.data_ptr()), ("values", view.values.data_ptr()),
        ("offsets", view.offsets.data_ptr()), ("bias", offsets.data_ptr()), ("y", y.data_ptr()),
        ("rows", rows), ("tokens", tokens),
    ):  # fmt: skip
        block[INDEX[name]] = value
    products = tokens * (view.values.numel() - LANES)
    units = 1 if products < _PARALLEL_PRODUCTS else rows
    run_units(kernel, block, block.buffer_info()[0], units, _SLOTS)


@functools.cache
def _checked(short: bool, vectors: int) -> None:
    """Small integers through a kernel before its first use: each sum must be exact."""
    rng = np.random.default_rng(0)
    dense = rng.integers(-9, 10, (37, 70)) * (rng.random((37, 70)) < 0.4)
    dense[3], dense[5] = 0, 7
    places = torch.from_numpy(np.flatnonzero(dense))
    codec = OutlierCodec(100 * len(places) / dense.size)
    weight = Outliers.from_places(
        codec, (37, 70), places, torch.from_numpy(dense.reshape(-1)[places]).float()
    )
    view = _view(weight)
    if not short:
        view = _View(view.columns.int(), view.values, view.offsets)
    tokens = {0: GATHER_TOKENS, 1: LANES - 1}.get(vectors, _VECTORS * LANES + 3)
    x = torch.from_numpy(rng.integers(-9, 10, (tokens, 70))).float()
    y = torch.full((tokens, 37), torch.nan)
    _run(x, view, torch.arange(37), y)
    expected = x.double().numpy() @ dense.T + np.arange(37)
    if not np.array_equal(y.double().numpy(), expected):
        raise RuntimeError(
            f"the compiled CPU kernel of outliers gave wrong numbers for instruction set "
            f"{host_isa()!r}; LATH_ISA=portable selects plain code, and a report would help"
        )
