"""bitnet.cpp's I2_S product, through a shared library of its kernels: a peer beside lath.

The library is built from bench/bitnet_i2_s.cpp and a checkout of bitnet.cpp, as the file's heading
says, and given by its path or in the environment's LATH_BITNET.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

# Columns of one vector of I2_S codes, and bytes behind them for the scale of the tensor.
BLOCK, TAIL = 128, 32


def find_library(path: str | Path | None = None) -> Path | None:
    """The library: given, or in LATH_BITNET; or None."""
    path = path or os.environ.get("LATH_BITNET")
    return None if path is None or not Path(path).is_file() else Path(path)


def bitnet_call(
    ternary: Tensor, x: Tensor, copies: int, library: Path, threads: int
) -> tuple[Callable[[int], Tensor], int]:
    """The call that multiplies x [M, K] by the next copy of the codes -1, 0, 1 [N, K], and the
    bytes of one. ValueError for K that is no multiple of 128, OSError for another library."""
    rows, columns = ternary.shape
    if columns % BLOCK:
        raise ValueError(f"I2_S takes K of {BLOCK}s, got {columns}")
    loaded = ctypes.CDLL(str(library), mode=os.RTLD_LOCAL | getattr(os, "RTLD_DEEPBIND", 0))
    try:
        pack, multiply = loaded.bitnet_pack, loaded.bitnet_linear
    except AttributeError as error:
        raise OSError(f"{library} is not built from bench/bitnet_i2_s.cpp: {error}") from None
    pack.restype = multiply.restype = None
    pack.argtypes = [c_void_p, c_void_p, c_int64, c_int64]
    multiply.argtypes = [*[c_void_p] * 3, c_int, c_int, c_int, c_float, c_int]
    codes, values = ternary.float().contiguous(), x.float().contiguous()
    packed = torch.empty(rows * columns // 4 + TAIL, dtype=torch.uint8)
    pack(codes.data_ptr(), packed.data_ptr(), rows, columns)
    weights = [packed.clone() for _ in range(copies)]
    y = torch.empty(len(values), rows)

    def call(i: int) -> Tensor:
        weight = weights[i % copies].data_ptr()
        multiply(values.data_ptr(), weight, y.data_ptr(), len(values), rows, columns, 1.0, threads)
        return y

    return call, packed.numel()
