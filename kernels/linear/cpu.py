"""`linear` on a CPU: compiled kernels over a repacked view of the weight.

int8 activations are multiplied as integers (cpu_dot.py), float ones with codes that become fp32 in
registers (cpu_float.py): register tiles over the stream of codes, for one token and for many. Where
a table's entries are no whole numbers, rounded activations go through the float kernel too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.codec import codec as parse_codec
from lath.formats.plan import Plan
from lath.formats.qtensor import QTensor

try:
    import numba  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the compiled CPU kernels need numba: pip install 'lath[cpu]'", name=error.name
    ) from error

from lath.kernels.linear.cpu_kernels import (
    FLOAT_KINDS,
    linear_block,
    tile_of,
)
from lath.kernels.linear.cpu_launch import run_on_team, serial_driver
from lath.kernels.linear.cpu_view import CpuView, Kind, cpu_view, kind_of

# What `warmup` compiles when it is not told.
USUAL_CODECS = ("int4-g64", "int4-g32-fzero", "int4-g128-asym", "int8-g64", "int2")
# Multiplications from which two threads were faster than one (M = 1, weights in cache).
PARALLEL_OPERATIONS = 1 << 19


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
    ) -> None:
        self.rows, self.columns = view.rows, view.columns
        self._view = view
        self._kind = kind
        padded, group = view.groups * view.group, activations.group
        self._shared = padded if group is None or group >= self.columns else group
        self._bias = self._padded(bias)
        # By dtype and tokens (8 stands for all above): the address of a block and the block.
        self._launches: dict[tuple[torch.dtype, int], tuple[int, NDArray[np.int64]]] = {}
        self._serial = serial_driver()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = A(x) Wᵀ + bias. x: [..., K] float32, float16 or bfloat16 on the CPU. bias: [N], in
        place of the one that was prepared."""
        shape, columns = x.shape, self.columns
        if shape[-1] != columns or not x.is_cpu:
            raise ValueError(f"x must be [..., {columns}] on the CPU, got {[*shape]} on {x.device}")
        offsets = self._bias if bias is None else self._padded(bias)
        tokens = x.numel() // columns if columns else 0
        if tokens == 0 or self.rows == 0:
            return offsets[: self.rows].to(x.dtype).expand(*shape[:-1], self.rows).clone()
        dtype = x.dtype
        if not x.is_contiguous():
            x = x.contiguous()
        known = self._launches.get((dtype, tokens if tokens < 8 else 8))
        if known is None:
            known = self._launch(dtype, tokens)
        y = torch.empty((*shape[:-1], self.rows), dtype=dtype)
        stride = columns * dtype.itemsize
        threads = torch.get_num_threads()
        if threads == 1 or tokens * self.rows * columns < PARALLEL_OPERATIONS:
            self._serial(known[0], x.data_ptr(), stride, offsets.data_ptr(), y.data_ptr(), tokens)
        else:
            run_on_team(
                known[0], x.data_ptr(), stride, offsets.data_ptr(), y.data_ptr(), tokens, threads
            )
        return y

    def block_of_one(self, x_type: int) -> NDArray[np.int64]:
        """The argument block that multiplies one token of x of `x_type` (FP32, FP16, BF16), for
        programs; x, y, bias and the prepared activations are still to be entered."""
        tile = tile_of(self._kind, 1, self._view.panel_bytes)
        return linear_block(self._view, self._kind, self._shared, x_type, tile)

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

    def _launch(self, dtype: torch.dtype, tokens: int) -> tuple[int, NDArray[np.int64]]:
        if dtype not in FLOAT_KINDS:
            raise TypeError(f"x must be float32, float16 or bfloat16, got {dtype}")
        tile = tile_of(self._kind, tokens, self._view.panel_bytes)
        block = linear_block(self._view, self._kind, self._shared, FLOAT_KINDS[dtype], tile)
        launch = self._launches[dtype, min(tokens, 8)] = (block.ctypes.data, block)
        return launch


def prepare(
    weight: QTensor, bias: Tensor | None = None, activations: ActivationFormat | None = None
) -> CpuLinear:
    """The layer of a weight [N, K] on the CPU and a bias [N] for one activation format ("float" if
    None).

    The first call for a weight repacks it, the first for a kind of codec compiles (then kept on
    disk). ValueError if the weight is not on the CPU.
    """
    activations = activations or ActivationFormat()
    kind = kind_of(weight.codec, activations)
    return CpuLinear(_view(weight, activations), kind, activations, bias)


def linear(
    x: Tensor,
    weight: QTensor,
    bias: Tensor | None,
    activations: ActivationFormat,
    plan: Plan | None = None,
) -> Tensor:
    """y [M, N] = A(x) Wᵀ + bias of x's dtype; x [M, K], weight [N, K], bias [N] or None.

    plan: only the account of what runs: its tile follows from the same arguments by `cpu_tile`.
    """
    layer = weight.view(
        f"cpu-linear-{activations.kind}-{activations.group}",
        lambda: prepare(weight, None, activations),
    )
    return layer(x, bias)


def _view(weight: QTensor, activations: ActivationFormat) -> CpuView:
    if weight.device.type != "cpu":
        raise ValueError(f"weight must be on the CPU, got {weight.device}")
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
