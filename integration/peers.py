"""What `lath.linear` is timed against on a CPU: other libraries' matrix products, where installed.

A peer multiplies x [M, K] by the next of several copies of a weight [N, K], in its own number
formats; quantising the activations, where it does, is part of its time as it is of lath's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lath.integration import bitnet_peer, ggml_peer, onnx_peer
from lath.integration.ggml_peer import WrongProductError

Call = Callable[[int], object]
# Columns of which vlut.cpp's packings take whole numbers.
VLUT_COLUMNS = 32


class PeerMissingError(RuntimeError):
    """A peer that cannot be timed here, and why."""


@dataclass(frozen=True)
class PeerSetting:
    """copies: how many weights to take in turn, from the bytes of one. threads: of the peer's own
    pool, if it has one. paths: where "ggml" and "vlut" (folders of libraries) and "bitnet" (a
    library) are; else as the environment says, and ggml's in llama-cpp-python."""

    copies: Callable[[int], int]
    threads: int = 1
    paths: Mapping[str, Path] = field(default_factory=dict)


Make = Callable[[Tensor, Tensor, PeerSetting], tuple[Call, int]]


def make_peer(name: str, dense: Tensor, x: Tensor, setting: PeerSetting) -> tuple[Call, int]:
    """The call of a peer and the bytes of one of its weights.

    ValueError for a name that is not in `PEERS`, PeerMissingError if it is not installed, cannot be
    loaded, or multiplies wrongly.
    """
    if name not in PEERS:
        raise ValueError(f"peers must be among {sorted(PEERS)}, got {name!r}")
    try:
        return PEERS[name](dense, x, setting)
    except (OSError, WrongProductError) as error:
        raise PeerMissingError(str(error)) from error


def _torch_dense(dtype: torch.dtype) -> Make:
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


def _onnxruntime(block: int) -> Make:
    """MatMulNBits with blocks of so many columns, activations rounded to int8 within."""

    def make(dense: Tensor, x: Tensor, setting: PeerSetting) -> tuple[Call, int]:
        absent = [name for name in ("onnxruntime", "onnx") if find_spec(name) is None]
        if absent:
            raise PeerMissingError(f"{' and '.join(absent)} not installed: pip install {absent[0]}")
        if dense.shape[1] % block:
            raise PeerMissingError(f"MatMulNBits takes K of {block}s here")
        call, nbytes = onnx_peer.onnx_call(dense, x, block, setting.copies, setting.threads)
        # Half a step of 4 bits is some 7 per cent of normal numbers, in wider blocks 11.
        return _checked(call, dense, x, 0.25, "MatMulNBits'"), nbytes

    return make


def _bitnet(dense: Tensor, x: Tensor, setting: PeerSetting) -> tuple[Call, int]:
    """I2_S: codes -1, 0, 1 and int8 activations."""
    path = bitnet_peer.find_library(setting.paths.get("bitnet"))
    if path is None:
        raise PeerMissingError(
            _where("library", setting, "bitnet") + "; bench/bitnet_i2_s.cpp says how to build one"
        )
    if dense.shape[1] % bitnet_peer.BLOCK:
        raise PeerMissingError(f"I2_S takes K of {bitnet_peer.BLOCK}s")
    ternary = _ternary(dense)
    copies = setting.copies(dense.numel() // 4)
    call, nbytes = bitnet_peer.bitnet_call(ternary, x, copies, path, setting.threads)
    return _checked(call, ternary, x, 0.1, "I2_S's"), nbytes


def _ggml(kind: str) -> Make:
    def make(dense: Tensor, x: Tensor, setting: PeerSetting) -> tuple[Call, int]:
        folder = ggml_peer.find_libraries(setting.paths.get("ggml"))
        if folder is None:
            where = setting.paths.get("ggml", "llama-cpp-python is not installed")
            raise PeerMissingError(f"no libggml-cpu.so: {where}; give the folder of a build")
        return ggml_peer.ggml_call(
            dense, x, kind, setting.copies(dense.numel() // 2), folder, setting.threads
        )

    return make


def _vlut(kind: str) -> Make:
    def make(dense: Tensor, x: Tensor, setting: PeerSetting) -> tuple[Call, int]:
        folder = ggml_peer.find_vlut(setting.paths.get("vlut"))
        if folder is None:
            raise PeerMissingError(_where("libggml-cpu.so of vlut.cpp", setting, "vlut"))
        if dense.shape[1] % VLUT_COLUMNS:
            raise PeerMissingError(f"vlut.cpp takes K of {VLUT_COLUMNS}s here")
        copies = setting.copies(dense.numel() // 4)
        return ggml_peer.ggml_call(_ternary(dense), x, kind, copies, folder, setting.threads)

    return make


def _where(what: str, setting: PeerSetting, name: str) -> str:
    given = setting.paths.get(name)
    return f"no {what}: " + (f"none at {given}" if given else f"--{name} gives no path")


def _ternary(dense: Tensor) -> Tensor:
    """-1, 0, 1, as lath's "ternary" rounds a weight with one scale."""
    return (dense / dense.abs().mean()).round().clamp(-1, 1)


def _checked(call: Call, weight: Tensor, x: Tensor, bound: float, name: str) -> Call:
    y = call(0)
    assert isinstance(y, Tensor)
    ggml_peer.check_product(y, weight, x, bound, name)
    return call


PEERS: dict[str, Make] = {
    "torch-bf16": _torch_dense(torch.bfloat16),
    "torch-fp32": _torch_dense(torch.float32),
    "torch-int8": _torch_int8,
    "torch-int4": _torch_int4,
    **{f"onnxruntime-g{block}": _onnxruntime(block) for block in (32, 128)},
    **{f"ggml-{kind}": _ggml(kind) for kind in ggml_peer.TYPES},
    "bitnet-i2_s": _bitnet,
    **{f"vlut-{kind}": _vlut(kind) for kind in ggml_peer.VLUT_TYPES},
}
