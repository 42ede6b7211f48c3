"""`linear` on a CPU: compiled kernels over a repacked view of the weight.

One token streams the weight once; more share a register tile (int8), or codes are decoded to fp32 in
registers (float, few tokens) or into memory for a matmul of torch (float, many tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.plan import Plan
from lath.formats.qtensor import QTensor
from lath.kernels.linear.plan import CPU_GEMV_TOKENS

try:
    import numba  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the compiled CPU kernels need numba: pip install 'lath[cpu]'", name=error.name
    ) from error

from lath.kernels.linear.cpu_kernels import (
    FLOAT_KINDS,
    Kind,
    decode_blocks,
    linear_block,
    tile_of,
)
from lath.kernels.linear.cpu_launch import parallel_driver, serial_driver
from lath.kernels.linear.cpu_view import cpu_view

# Waking other threads costs about as much as this many multiplications on one.
PARALLEL_OPERATIONS = 1 << 20
# Panels that are decoded at a time for a matmul: 512 columns of it.
DECODED_PANELS = 32


class CpuLinear:
    """One layer on a CPU, ready to run: x [..., K] -> [..., N] of x's dtype.

    It holds the weight's view and its bias in fp32; nothing follows later changes of the tensors it
    was made from. May be called from several Python threads at once.
    """

    def __init__(
        self, weight: QTensor, bias: Tensor | None, activations: ActivationFormat
    ) -> None:
        self.rows, self.columns = weight.shape
        self.activations = activations
        self._kind: Kind = "float" if activations.kind == "float" else "int8"
        self._view = view = cpu_view(weight, activations)
        group = activations.group
        padded = view.groups * view.group
        self._shared = padded if group is None or group >= self.columns else group
        self._bias = torch.zeros(16 * view.panels)
        if bias is not None:
            self._bias[: self.rows] = bias.detach()
        self._bias_address = self._bias.data_ptr()
        # By dtype and tokens (those above the largest tile share one block): address and block.
        self._launches: dict[tuple[torch.dtype, int], tuple[int, NDArray[np.int64]]] = {}
        self._decode: list[NDArray[np.int64]] | None = None
        self._serial = serial_driver()

    def __call__(self, x: Tensor) -> Tensor:
        shape, columns = x.shape, self.columns
        tokens = x.numel() // columns if columns else math.prod(shape[:-1])
        if tokens == 0 or self.rows == 0 or columns == 0:
            return self._empty(x)
        if self._kind == "float" and tokens > CPU_GEMV_TOKENS:
            return self._matmul(x, tokens)
        dtype = x.dtype
        if not x.is_contiguous():
            x = x.contiguous()
        known = self._launches.get((dtype, min(tokens, 8))) or self._launch(dtype, tokens)
        y = torch.empty((*shape[:-1], self.rows), dtype=dtype)
        stride = columns * x.element_size()
        threads = torch.get_num_threads()
        if threads == 1 or tokens * self.rows * columns < PARALLEL_OPERATIONS:
            self._serial(
                known[0], x.data_ptr(), stride, self._bias_address, y.data_ptr(), tokens, 1
            )
        else:
            _run_parallel(
                known[0], x.data_ptr(), stride, self._bias_address, y.data_ptr(), tokens, threads
            )
        return y

    def _launch(self, dtype: torch.dtype, tokens: int) -> tuple[int, NDArray[np.int64]]:
        if dtype not in FLOAT_KINDS:
            raise TypeError(f"x must be float32, float16 or bfloat16, got {dtype}")
        tile = tile_of(self._kind, tokens, self._view.panel_bytes)
        block = linear_block(self._view, self._kind, self._shared, FLOAT_KINDS[dtype], tile)
        launch = self._launches[dtype, min(tokens, 8)] = (block.ctypes.data, block)
        return launch

    def _empty(self, x: Tensor) -> Tensor:
        """Nothing to multiply: the bias, if there is a row at all."""
        bias = self._bias[: self.rows].to(x.dtype)
        return bias.expand(*x.shape[:-1], self.rows).clone()

    def _matmul(self, x: Tensor, tokens: int) -> Tensor:
        """Decode a block of rows, multiply with it, go on."""
        if self._decode is None:
            self._decode = decode_blocks(self._view, DECODED_PANELS)
        view = self._view
        values = x.reshape(tokens, self.columns).float()
        y = torch.empty(tokens, 16 * view.panels)
        threads = torch.get_num_threads()
        buffer = torch.empty(view.groups * view.group * 16 * min(DECODED_PANELS, view.panels))
        for index, block in enumerate(self._decode):
            first = index * DECODED_PANELS
            panels = min(DECODED_PANELS, view.panels - first)
            arguments = (block.ctypes.data, 0, 0, 0, buffer.data_ptr(), 0)
            if threads == 1:
                self._serial(*arguments, 1)
            else:
                _run_parallel(*arguments, threads)
            decoded = buffer[: view.groups * view.group * 16 * panels].view(-1, 16 * panels)
            y[:, 16 * first : 16 * (first + panels)] = values @ decoded[: self.columns]
        y += self._bias
        return y[:, : self.rows].to(x.dtype).reshape(*x.shape[:-1], self.rows)


def _run_parallel(
    block: int, x: int, stride: int, bias: int, y: int, tokens: int, threads: int
) -> None:
    """Run on numba's threads, as many as torch would use and numba has."""
    import numba

    threads = min(threads, numba.config.NUMBA_NUM_THREADS)
    before = numba.get_num_threads()
    if before != threads:
        numba.set_num_threads(threads)
    try:
        parallel_driver()(block, x, stride, bias, y, tokens, threads)
    finally:
        if before != threads:
            numba.set_num_threads(before)


def prepare(
    weight: QTensor, bias: Tensor | None = None, activations: ActivationFormat | None = None
) -> CpuLinear:
    """The layer of a weight [N, K] on the CPU and a bias [N] for one activation format.

    The first call for a weight repacks it, the first for a kind of codec compiles (then kept on
    disk). Raises ValueError if the weight is not on the CPU.
    """
    if weight.device.type != "cpu":
        raise ValueError(f"weight must be on the CPU, got {weight.device}")
    return CpuLinear(weight, bias, activations or ActivationFormat())


def linear(
    x: Tensor,
    weight: QTensor,
    bias: Tensor | None,
    activations: ActivationFormat,
    plan: Plan | None = None,
) -> Tensor:
    """y [M, N] = A(x) Wᵀ + bias of x's dtype; x [M, K], weight [N, K], bias [N] or None.

    plan: only a label here, since what it says follows from the same arguments.
    """
    return prepare(weight, bias, activations)(x)


def warmup(
    codecs: Iterable[str | Codec] = ("int4-g64", "int4-g32-fzero", "int8-g64", "int2"),
    progress: Callable[[str], None] | None = None,
) -> None:
    """Compile the kernels of some codecs into the cache on disk, for fp32, bf16 and one to many
    tokens. progress is called with a line before each step."""
    for item in codecs:
        codec = Codec.parse(item) if isinstance(item, str) else item
        weight = QTensor.empty(codec, (16, 64), device="cpu")
        weight.codes.zero_()
        weight.scales.zero_()
        if weight.zeros is not None:
            weight.zeros.zero_()
        for activations in ("int8-g64", "float"):
            layer = prepare(weight, None, ActivationFormat.parse(activations))
            for tokens in (1, 2, 4, 8, 16):
                if progress is not None:
                    progress(f"{codec} {activations} {tokens} token(s)")
                for dtype in (torch.float32, torch.bfloat16):
                    layer(torch.zeros(tokens, 64, dtype=dtype))
