"""The one catalogue of cases: parity, the sanitizer, ahead-of-time compilation, benchmarks.

A case is data. Its text form, printed by a failing test, rebuilds it: `LinearCase.parse(text)`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lath.formats import packing
from lath.formats.activations import activation_format
from lath.formats.codec import codec as parse_codec
from lath.formats.plan import Plan
from lath.formats.qtensor import SCALE_DTYPES, QTensor
from lath.reference import linear as reference

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class LinearCase:
    """codec, M, N, K, dtype of x, activation format, kind of data, bias or not.

    data: "normal" (random signs), "one_sign" (nothing cancels: an accumulator that is too narrow
    shows), "integers" (|x| <= 4, scales 1 and 2, so that fp32 sums are exact at every split).
    """

    codec: str
    m: int
    n: int
    k: int
    dtype: str = "fp16"
    activations: str = "float"
    data: str = "normal"
    bias: bool = False

    def __str__(self) -> str:
        return " ".join(str(getattr(self, field.name)) for field in dataclasses.fields(self))

    @staticmethod
    def parse(text: str) -> LinearCase:
        codec, m, n, k, dtype, activations, data, bias = text.split()
        return LinearCase(codec, int(m), int(n), int(k), dtype, activations, data, bias == "True")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


# Each row varies what the one before did not; together they meet every width, zero, group shape,
# dtype, activation format and kind of data, with odd N, K off every multiple, and M across arms.
CATALOGUE = [
    LinearCase("int4-g128", 1, 48, 256),
    LinearCase("int4-g64", 3, 37, 300, "bf16", "int8-g64", bias=True),
    LinearCase("int4-g32-fzero", 5, 16, 96, "fp32", "float", "one_sign"),
    LinearCase("int4-g48-asym", 17, 33, 200, "fp16", "int8"),
    LinearCase("int4", 1, 21, 130, "fp32", "int8", bias=True),
    LinearCase("int8", 2, 19, 77, "bf16", "float", bias=True),
    LinearCase("int8-g16-asym", 1, 32, 140, "fp32", "int8-g16"),
    LinearCase("int8-g96-fzero-s32", 9, 40, 290, "fp16", "int8-g32", "one_sign"),
    LinearCase("int2", 1, 64, 512, "fp16", "int8", bias=True),
    LinearCase("int2-g64-asym", 6, 17, 129, "bf16", "float", "one_sign"),
    LinearCase("int1-g16", 2, 23, 100, "fp16", "int8-g16"),
    LinearCase("int1-fzero", 1, 16, 260, "fp32", "float"),
    LinearCase("int3-g128-s32", 4, 35, 384, "fp16", "float"),
    LinearCase("int3-g80", 3, 18, 170, "bf16", "int8-g48"),
    LinearCase("int5-g256", 1, 31, 520, "fp32", "float", bias=True),
    LinearCase("int6-g64", 8, 48, 140, "fp16", "int8-g128"),
    LinearCase("int7-g112-asym", 2, 20, 230, "bf16", "int8"),
    LinearCase("int4-g128", 65, 34, 260, "fp16", "float", "one_sign"),
    LinearCase("int4-g128", 33, 50, 260, "bf16", "int8-g128"),
    LinearCase("int4-g64", 1, 1, 1),
]

# What the benchmarks run: one token and many, on a layer of a 135M and of a 7B model.
SPEED = [
    LinearCase(codec, m, n, k, "bf16", activations)
    for n, k in ((1536, 576), (11008, 4096))
    for m in (1, 8, 128)
    for codec, activations in (("int4-g64", "int8-g64"), ("int2", "int8"), ("int8-g64", "int8-g64"))
]


@dataclass(frozen=True)
class LinearInputs:
    """What a case calls `linear` with."""

    x: Tensor
    weight: QTensor
    bias: Tensor | None


@dataclass(frozen=True)
class LinearData(LinearInputs):
    """Inputs and their answer: y64 and the gauge Σ|a||w| + |bias|, float64 [M, N]."""

    y64: NDArray[np.float64]
    gauge: NDArray[np.float64]


def make_weight(text: str, rows: int, columns: int, rng: np.random.Generator, data: str) -> QTensor:
    """A packed weight with every code in use and every scale and zero different from its like."""
    codec = parse_codec(text)
    groups, padded = codec.num_groups(columns), packing.round_up(rows, packing.PANEL)
    codes = rng.integers(0, codec.levels, (rows, columns)).astype(np.uint8)
    scales = np.zeros((groups, padded), np.float32)
    zeros = np.zeros((groups, padded), np.float32)
    if data == "integers":
        scales[:, :rows] = rng.integers(1, 3, (groups, rows))
        zeros[:, :rows] = -rng.integers(0, codec.levels, (groups, rows))
    else:
        scales[:, :rows] = (0.5 + rng.random((groups, rows))) / (codec.levels * columns**0.5)
        zeros[:, :rows] = -scales[:, :rows] * codec.levels * rng.random((groups, rows))
        if data == "one_sign":
            zeros = -zeros
    scale_dtype = SCALE_DTYPES[codec.scale_dtype]
    zeros_tensor = None
    if codec.zero == "float":
        zeros_tensor = torch.from_numpy(zeros).to(scale_dtype)
    elif codec.zero == "integer":
        low, high = (0, 1) if data == "one_sign" else (0, codec.levels)
        points = np.zeros((groups, padded), np.uint8)
        points[:, :rows] = rng.integers(low, high, (groups, rows))
        zeros_tensor = torch.from_numpy(points)
    packed = packing.pack(torch.from_numpy(codes), codec)
    stored = torch.from_numpy(scales).to(scale_dtype)
    return QTensor(codec, (rows, columns), packed, stored, zeros_tensor)


def make_inputs(case: LinearCase) -> LinearInputs:
    """The inputs of a case: the same in every process, from a seed that is the case itself."""
    seed = int.from_bytes(hashlib.sha256(str(case).encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    weight = make_weight(case.codec, case.n, case.k, rng, case.data)
    if case.data == "integers":
        values = rng.integers(-4, 5, (case.m, case.k)).astype(np.float32)
        offsets = rng.integers(-8, 9, case.n).astype(np.float32)
    else:
        values = rng.standard_normal((case.m, case.k)).astype(np.float32)
        offsets = rng.standard_normal(case.n).astype(np.float32)
        if case.data == "one_sign":
            values, offsets = np.abs(values), np.abs(offsets)
    x = torch.from_numpy(values).to(case.torch_dtype)
    bias = torch.from_numpy(offsets).to(case.torch_dtype) if case.bias else None
    return LinearInputs(x, weight, bias)


def inputs_with(case: LinearCase, weight_of: Callable[..., Any]) -> LinearInputs:
    """The inputs of a case with a weight of another kind, made as `make_weight` makes one; x has
    NaN beyond its columns."""
    seed = int.from_bytes(hashlib.sha256(str(case).encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    weight = weight_of(case.codec, case.n, case.k, rng, case.data)
    values, offsets = rng.standard_normal((case.m, case.k)), rng.standard_normal(case.n)
    if case.data == "one_sign":
        values, offsets = np.abs(values), np.abs(offsets)
    x = torch.full((case.m, case.k + 3), torch.nan, dtype=case.torch_dtype)[:, : case.k]
    x.copy_(torch.from_numpy(values))
    bias = torch.from_numpy(offsets).to(case.torch_dtype) if case.bias else None
    return LinearInputs(x, weight, bias)


def make(case: LinearCase) -> LinearData:
    """The inputs of a case with the answer that `lath.reference` gives."""
    inputs = make_inputs(case)
    y64, gauge = definition(inputs.x, inputs.weight, inputs.bias, case.activations)
    return LinearData(inputs.x, inputs.weight, inputs.bias, y64, gauge)


def definition(
    x: Tensor, weight: QTensor, bias: Tensor | None, activations: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """y64 by `lath.reference`, and the sum of the magnitudes that make it up (+ |bias|)."""
    rows = weight.shape[0]
    codes = weight.unpack_codes().numpy()
    scales = weight.scales[:, :rows].numpy()
    zeros = None if weight.zeros is None else weight.zeros[:, :rows].numpy()
    offsets = None if bias is None else bias.float().numpy()
    fmt = activation_format(activations)
    y64 = reference.linear(x.float().numpy(), codes, scales, zeros, weight.codec, offsets, fmt)
    values = np.abs(reference.decode_activations(x.float().numpy(), fmt))
    # A kernel may fold the zero point into sums of x, so each part counts by itself: a code of up
    # to `levels` in magnitude, and its offset again up to `levels`, or the minimum.
    group = np.arange(weight.shape[1]) // weight.codec.group_size(weight.shape[1])
    parts = 2 * weight.codec.levels * scales.T.astype(np.float64)[:, group]
    if weight.codec.zero == "float" and zeros is not None:
        parts = parts + np.abs(zeros.T.astype(np.float64)[:, group])
    gauge = values @ parts.T
    return y64, gauge if offsets is None else gauge + np.abs(offsets)


def plan_of(text: str, stages: int = 2) -> Plan:
    """A Triton plan in words, "flat fp16 16x32x128 k2 w4 swap": dataflow, dot, block_m x block_n x
    block_k, then if they differ from 1, 4 and no: pieces of K, warps, the weight on the left."""
    dataflow, dot, tile, *rest = text.split()
    block_m, block_n, block_k = (int(size) for size in tile.split("x"))
    words = {word[0]: word[1:] for word in rest}
    return Plan(
        backend="triton",
        dataflow=dataflow,  # type: ignore[arg-type]
        dot=dot,
        reason="a test",
        bytes_moved=0,
        operations=0,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        split_k=int(words.get("k", 1)),
        swap="s" in words,
        warps=int(words.get("w", 4)),
        stages=stages,
    )
