"""`linear` on a CPU: compiled kernels over a repacked view of the weight.

Activations of whole codes are multiplied as integers (cpu_dot.py), others with codes that become
fp32 in registers (cpu_float.py): register tiles over the stream of codes, for one token and for
many. Where a table's entries are no whole numbers, whole codes go through the float kernel too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.codec import codec as parse_codec
from lath.formats.plan import Plan
from lath.formats.qtensor import QTensor
from lath.formats.sparse import SparseTensor

try:
    import numba  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the compiled CPU kernels need numba: pip install 'lath[cpu]'", name=error.name
    ) from error

from lath.kernels.linear.cpu_arguments import INDEX
from lath.kernels.linear.cpu_kernels import (
    FLOAT_KINDS,
    linear_block,
    look_up_block,
    tile_of,
)
from lath.kernels.linear.cpu_launch import run_on_team, serial_driver
from lath.kernels.linear.cpu_look_up import LookUp, can_look_up, look_up_of
from lath.kernels.linear.cpu_restore import only_view
from lath.kernels.linear.cpu_sparse import sparse_view
from lath.kernels.linear.cpu_view import CpuView, Kind, kind_of
from lath.kernels.linear.cpu_views import cpu_view
from lath.kernels.linear.plan_cpu import LOOK_UP_TILE, LOOK_UP_TOKENS, looks_up
from lath.kernels.simd.isa import host_isa

__all__ = ["CpuLinear", "linear", "only_view", "prepare", "warmup"]

# What `warmup` compiles when it is not told.
USUAL_CODECS = ("int4-g64", "int4-g32-fzero", "int4-g128-asym", "int8-g64", "int2")
# Multiplications from which two threads were faster than one (M = 1, weights in cache).
PARALLEL_OPERATIONS = 1 << 19


class Gather(NamedTuple):
    """Of x [..., width] the columns that a weight [N, K] multiplies: runs of sixteen that begin at
    `runs`, int32 [ceil(K / 16)]."""

    runs: Tensor
    width: int


class CpuLinear:
    """One weight on a CPU, ready to run: x [..., K] -> [..., N] of x's dtype.

    It holds the weight's view, not the weight: later changes of the tensors it was made from do not
    reach it. May be called from several Python threads at once.
    """

    def __init__(
        self,
        view: CpuView,
        kind: Kind,
        activations: ActivationFormat,
        bias: Tensor | None = None,
        looks_up: bool = False,
        gather: Gather | None = None,
    ) -> None:
        """looks_up: several tokens of ternary weights by look-up, whose indices are made then."""
        if looks_up and not can_look_up(view.record, view.groups):
            raise ValueError(f"a view of {view.record} in {view.groups} groups has no look-ups")
        self.rows, self.columns = view.rows, view.columns if gather is None else gather.width
        self._view, self._gather = view, gather
        self._kind = kind
        padded, group = view.groups * view.group, activations.group
        self._shared = padded if group is None or group >= view.columns else group
        self._largest = 0 if activations.kind == "float" else activations.largest
        self._bias = self._padded(bias)
        self._looks_up = looks_up
        self._look_up: LookUp | None = None
        # By dtypes and tokens (9 stands for all above): the address of a block and the block.
        self._launches: dict[
            tuple[torch.dtype, torch.dtype, int], tuple[int, NDArray[np.int64]]
        ] = {}
        self._serial = serial_driver()

    def __call__(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """y = A(x) Wᵀ + bias. x: [..., K] float32, float16 or bfloat16 on the CPU. bias: [N], in
        place of the one that was prepared. out: contiguous [..., N] fp32, filled and returned in
        place of a new tensor of x's dtype."""
        shape, columns = x.shape, self.columns
        if shape[-1] != columns or not x.is_cpu:
            raise ValueError(f"x must be [..., {columns}] on the CPU, got {[*shape]} on {x.device}")
        offsets = self._bias if bias is None else self._padded(bias)
        tokens = x.numel() // columns if columns else 0
        if tokens == 0 or self.rows == 0:
            y = x.new_empty((*shape[:-1], self.rows)) if out is None else out
            return y.copy_(offsets[: self.rows].expand_as(y))
        if (
            tokens > LOOK_UP_TILE
            and self._looks_up
            and 0 < tokens % LOOK_UP_TILE < LOOK_UP_TOKENS.get(host_isa(), 1)
        ):
            # A tile of look-ups costs the same for few tokens, which products do in less.
            y = x.new_empty((*shape[:-1], self.rows)) if out is None else out
            flat, parts = x.reshape(tokens, columns), y.view(tokens, self.rows)
            whole = tokens - tokens % LOOK_UP_TILE
            for part in (slice(0, whole), slice(whole, tokens)):
                self(flat[part], bias, parts[part])
            return y
        dtype = x.dtype
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty((*shape[:-1], self.rows), dtype=dtype) if out is None else out
        known = self._launches.get((dtype, y.dtype, tokens if tokens < 9 else 9))
        if known is None:
            known = self._launch(dtype, y.dtype, tokens)
        stride = columns * dtype.itemsize
        threads = torch.get_num_threads()
        if threads == 1 or tokens * self.rows * columns < PARALLEL_OPERATIONS:
            self._serial(known[0], x.data_ptr(), stride, offsets.data_ptr(), y.data_ptr(), tokens)
        else:
            run_on_team(
                known[0], x.data_ptr(), stride, offsets.data_ptr(), y.data_ptr(), tokens, threads
            )
        return y

    @property
    def panel_bytes(self) -> int:
        """Bytes that 16 rows of the view take, on average."""
        return max(1, self._view.records.nbytes // max(1, self._view.panels))

    @property
    def nbytes(self) -> int:
        """Bytes of what was made beside the weight's view."""
        return 0 if self._look_up is None else self._look_up.nbytes

    def block_of_one(self, x_type: int) -> NDArray[np.int64]:
        """The argument block that multiplies one token of x of `x_type` (FP32, FP16, BF16), for
        programs; x, y, bias and the prepared activations are still to be entered."""
        return self._block(x_type, x_type, 1)

    @property
    def offsets(self) -> Tensor:
        """The bias as fp32 [16 * panels], zeros where there is none."""
        return self._bias

    def _padded(self, bias: Tensor | None) -> Tensor:
        """The bias as fp32 [16 * panels], zeros where there is none."""
        padded = torch.zeros(16 * self._view.panels)
        if bias is not None:
            padded[: self.rows] = bias.detach()
        return padded

    def _launch(
        self, dtype: torch.dtype, y_dtype: torch.dtype, tokens: int
    ) -> tuple[int, NDArray[np.int64]]:
        if dtype not in FLOAT_KINDS:
            raise TypeError(f"x must be float32, float16 or bfloat16, got {dtype}")
        block = self._block(FLOAT_KINDS[dtype], FLOAT_KINDS[y_dtype], tokens)
        if self._gather is not None:
            block[INDEX["x_runs"]] = self._gather.runs.data_ptr()
        launch = self._launches[dtype, y_dtype, min(tokens, 9)] = (block.ctypes.data, block)
        return launch

    def _block(self, x_type: int, y_type: int, tokens: int) -> NDArray[np.int64]:
        """The argument block of a call with so many tokens."""
        if self._looks_up and tokens >= LOOK_UP_TOKENS.get(host_isa(), 1):
            if self._look_up is None:
                self._look_up = look_up_of(self._view)
            return look_up_block(self._look_up, self._largest, x_type, y_type)
        tile = tile_of(self._view.record, self._kind, tokens, self._view.panel_bytes)
        return linear_block(
            self._view, self._kind, self._shared, self._largest, x_type, tile, y_type,
            tokens > tile[0],
        )  # fmt: skip


def prepare(
    weight: QTensor | SparseTensor,
    bias: Tensor | None = None,
    activations: ActivationFormat | None = None,
    gather: Gather | None = None,
) -> CpuLinear:
    """The layer of a weight [N, K] on the CPU and a bias [N] for one activation format ("float" if
    None). gather: the columns of a wider x that it multiplies; None: x has K.

    The first call for a weight repacks it, the first for a kind of codec compiles (then kept on
    disk). ValueError if the weight is not on the CPU.
    """
    activations = activations or ActivationFormat()
    kind = kind_of(weight.codec, activations)
    by_look_up = looks_up(weight.shape[1], weight.codec, activations, host_isa())
    return CpuLinear(_view(weight, activations), kind, activations, bias, by_look_up, gather)


def linear(
    x: Tensor,
    weight: QTensor | SparseTensor,
    bias: Tensor | None,
    activations: ActivationFormat,
    plan: Plan | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y [M, N] = A(x) Wᵀ + bias of x's dtype; x [M, K], weight [N, K], bias [N] or None.

    plan: only the account of what runs: its tile follows from the same arguments by `cpu_tile`.
    out: fp32 [M, N], contiguous; filled and returned in place of a new tensor.
    """
    layer = weight.view(
        f"cpu-linear-{activations}",
        lambda: prepare(weight, None, activations),
    )
    return layer(x, bias, out)


def _view(weight: QTensor | SparseTensor, activations: ActivationFormat) -> CpuView:
    if weight.device.type != "cpu":
        raise ValueError(f"weight must be on the CPU, got {weight.device}")
    if isinstance(weight, SparseTensor):
        return sparse_view(weight, activations)
    return cpu_view(weight, activations)


def warmup(
    codecs: Iterable[str | Codec] = USUAL_CODECS,
    progress: Callable[[str], None] | None = None,
    activations: Iterable[str] = ("int8-g64", "float"),
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
) -> None:
    """Compile (or load from disk) and check the kernels of some codecs, for one to many tokens.

    progress: called with a line before each step.
    """
    for item in codecs:
        codec = parse_codec(item)
        weight = QTensor.empty(codec, (16, 64), device="cpu")
        for name, tensor in weight.tensors.items():
            # No scale is 0, of the 8-bit ones least of all.
            tensor.fill_(1 if name in ("scales", "outer") else 0)
        for text in activations:
            layer = prepare(weight, None, ActivationFormat.parse(text))
            for dtype in dtypes:
                if progress is not None:
                    progress(f"{codec}, activations {text}, {dtype}")
                for tokens in (1, 2, 4, 8, 16):
                    layer(torch.zeros(tokens, 64, dtype=dtype))
