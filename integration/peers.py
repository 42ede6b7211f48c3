"""What `lath.linear` is timed against on a CPU: other libraries' matrix products, where installed.

A peer multiplies x [M, K] by the next of several copies of a weight [N, K], in its own number
formats; quantising the activations, where it does, is part of its time as it is of lath's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lath.integration import ggml_peer

Call = Callable[[int], object]


class PeerMissingError(RuntimeError):
    """A peer that cannot be timed here, and why."""


@dataclass(frozen=True)
class PeerSetting:
    """copies: how many weights to take in turn, from the bytes of one. threads: of the peer's own
    pool, if it has one. ggml: the folder of its libraries; None: those of llama-cpp-python."""

    copies: Callable[[int], int]
    threads: int = 1
    ggml: Path | None = None


def make_peer(name: str, dense: Tensor, x: Tensor, setting: PeerSetting) -> tuple[Call, int]:
    """The call of a peer and the bytes of one of its weights.

    ValueError for a name that is not in `PEERS`, PeerMissingError if it is not installed.
    """
    if name not in PEERS:
        raise ValueError(f"peers must be among {sorted(PEERS)}, got {name!r}")
    return PEERS[name](dense, x, setting)


def _torch_dense(dtype: torch.dtype) -> Callable[[Tensor, Tensor, PeerSetting], tuple[Call, int]]:
    def make(dense: Tensor, x: Tensor, setting: PeerSetting) -> tuple[Call, int]:
        first, values = dense.to(dtype), x.to(dtype)
        nbytes = first.numel() * first.element_size()
        weights = [first.clone() for _ in range(setting.copies(nbytes))]
        return lambda i: torch.nn.functional.linear(values, weights[i % len(weights)]), nbytes

    return make


def _torch_int8(dense: Tensor, x: Tensor, setting: PeerSetting) -> tuple[Call, int]:
    """Dynamic int8 by oneDNN: a scale per row of the weight and one for all of x."""
    if "onednn" not in torch.backends.quantized.supported_engines:
        raise PeerMissingError("this torch has no oneDNN quantised engine")
    torch.backends.quantized.engine = "onednn"
    scales = dense.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*deprecated", UserWarning)
        quantised = torch.quantize_per_channel(dense.float(), scales, zeros, 0, torch.qint8)
    prepack: Any = torch.ops.quantized.linear_prepack
    weights = [prepack(quantised, None) for _ in range(setting.copies(dense.numel()))]
    multiply: Any = torch.ops.quantized.linear_dynamic
    values = x.float()
    return lambda i: multiply(values, weights[i % len(weights)], True), dense.numel()


def _torch_int4(dense: Tensor, x: Tensor, setting: PeerSetting) -> tuple[Call, int]:
    """torch's own 4-bit product: groups of 128 with a bf16 scale and zero, bf16 activations."""
    rows, columns = dense.shape
    group = 128
    if columns % group or rows % 16:
        raise PeerMissingError(f"torch's int4 product takes K of {group}s and N of 16s")
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    pack: Any = torch._convert_weight_to_int4pack_for_cpu
    multiply: Any = torch._weight_int4pack_mm_for_cpu
    sides = torch.randn(columns // group, rows, 2).bfloat16()
    nbytes = rows * columns // 2 + sides.numel() * 2
    weights = [pack(codes, 1) for _ in range(setting.copies(nbytes))]
    values = x.bfloat16()
    return lambda i: multiply(values, weights[i % len(weights)], group, sides), nbytes


def _ggml(kind: str) -> Callable[[Tensor, Tensor, PeerSetting], tuple[Call, int]]:
    def make(dense: Tensor, x: Tensor, setting: PeerSetting) -> tuple[Call, int]:
        folder = ggml_peer.find_libraries(setting.ggml)
        if folder is None:
            where = "llama-cpp-python is not installed" if setting.ggml is None else setting.ggml
            raise PeerMissingError(f"no libggml-cpu.so: {where}; give the folder of a build")
        copies = setting.copies(dense.numel() // 2)
        return ggml_peer.ggml_call(dense, x, kind, copies, folder, setting.threads)

    return make


PEERS: dict[str, Callable[[Tensor, Tensor, PeerSetting], tuple[Call, int]]] = {
    "torch-bf16": _torch_dense(torch.bfloat16),
    "torch-fp32": _torch_dense(torch.float32),
    "torch-int8": _torch_int8,
    "torch-int4": _torch_int4,
    **{f"ggml-{kind}": _ggml(kind) for kind in ggml_peer.TYPES},
}
