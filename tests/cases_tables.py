"""Cases of `linear` with tables, ternary numbers or scales of 8 bits: weights, answers, bounds."""

from __future__ import annotations

import numpy as np
import torch

import oracle
from cases import LinearCase, LinearData, inputs_with
from lath.formats import packing
from lath.formats.activations import activation_format
from lath.formats.codec import Codec
from lath.formats.plan import Plan
from lath.formats.qtensor import QTensor
from lath.kernels.linear.triton_tables import is_looked_up
from lath.reference import codecs as reference_codecs
from lath.reference import linear as reference


def make_weight(
    text: str, rows: int, columns: int, rng: np.random.Generator, data: str = "normal"
) -> QTensor:
    """Every code that stands for a number, all scales different, and poison in the padded rows.

    data "integers": scales are powers of two, so that products and sums of few numbers are exact.
    """
    codec = Codec.parse(text)
    groups, padded = codec.num_groups(columns), packing.round_up(rows, packing.PANEL)
    table = None
    if codec.values == "learned":
        table = torch.from_numpy(np.sort(rng.standard_normal(codec.levels)).astype(np.float32))
    entries = reference_codecs.entries_of(codec, None if table is None else table.numpy())
    numbers = np.flatnonzero(np.isfinite(entries)) if codec.is_table else np.arange(codec.levels)
    wide = (padded, packing.round_up(columns, packing.block_of(codec)))
    poison = codec.levels - 1 if codec.packing == "base3" else (1 << codec.bits) - 1
    codes = np.full(wide, poison, np.uint8)  # of e4m3 and e5m2 it is NaN
    codes[:rows] = rng.choice(numbers, (rows, wide[1]))
    codes.reshape(-1)[: min(len(numbers), rows * wide[1])] = numbers[: rows * wide[1]]
    largest = float(np.abs(entries[numbers]).max()) if codec.is_table else float(codec.levels)
    exact = (0.5 + rng.random((groups, padded))) / (largest * columns**0.5)
    if data == "integers":
        exact = 2.0 ** rng.integers(-1, 2, (groups, padded))
    kind, outer = codec.scale_dtype, None
    if kind in ("fp16", "fp32"):
        exact[:, rows:] = np.nan
        scales = torch.from_numpy(exact).to(torch.float16 if kind == "fp16" else torch.float32)
    elif kind == "e8m0":
        middle = 127 if data == "integers" else 127 + round(np.log2(exact.mean()))
        stored = rng.integers(middle - 1, middle + 2, (groups, padded)).astype(np.uint8)
        stored[:, rows:] = 255
        scales = torch.from_numpy(stored)
    elif kind == "e4m3":
        stored = rng.integers(1, 127, (groups, padded)).astype(np.uint8)
        stored[:, rows:] = 127
        scales, outer = torch.from_numpy(stored), torch.tensor([float(exact.mean()) / 5])
    elif kind == "fp8":  # all scales that are stored, those near the least number too
        inner = torch.arange(1, 127, dtype=torch.uint8)
        inner = inner[inner.view(torch.float8_e4m3fn).float() <= codec.largest_inner_scale]
        scales = inner[torch.from_numpy(rng.integers(0, len(inner), (groups, padded)))]
        scales.reshape(-1)[: len(inner)] = inner[: scales.numel()]
        scales[:, rows:] = 127
        outer = torch.from_numpy(exact[0] / 50).float()
        outer[rows:] = torch.nan
    else:
        most = codec.largest_inner_scale
        scales = torch.from_numpy(rng.integers(1, most + 1, (groups, padded)).astype(np.uint8))
        outer = torch.from_numpy(exact[0] / most).half()
        outer[rows:] = torch.nan
    zeros = None
    if codec.zero == "integer":
        points = rng.integers(0, codec.levels, (groups, padded)).astype(np.uint8)
        zeros = torch.from_numpy(points)
    packed = packing.pack(torch.from_numpy(codes), codec)
    return QTensor(codec, (rows, columns), packed, scales, zeros, outer, table)


def answer(
    x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None, activations: str
) -> LinearData:
    """y64 by `lath.reference` and Σ|a||w| + |bias|; where zeros may be folded, their parts each."""
    codec, rows = weight.codec, weight.shape[0]
    outer = weight.outer
    if outer is not None:
        outer = outer[:rows]
    sides = [
        None if side is None else side.numpy()
        for side in (
            weight.scales[:, :rows],
            None if weight.zeros is None else weight.zeros[:, :rows],
            outer,
            weight.table,
        )
    ]
    codes, fmt = weight.unpack_codes().numpy(), activation_format(activations)
    offsets = None if bias is None else bias.float().numpy()
    y64 = reference.linear(
        x.float().numpy(), codes, sides[0], sides[1], codec, offsets, fmt, sides[2], sides[3]
    )  # type: ignore[arg-type]
    values = np.abs(reference.decode_activations(x.float().numpy(), fmt))
    parts = np.abs(reference_codecs.dequantize(codes, sides[0], sides[1], codec, *sides[2:]))  # type: ignore[arg-type]
    if not codec.is_table:
        group = np.arange(weight.shape[1]) // codec.group_size(weight.shape[1])
        scale = reference_codecs.effective_scales(sides[0], sides[2], codec)  # type: ignore[arg-type]
        parts = 2 * codec.levels * scale.T[:, group]
    gauge = values @ parts.T
    return LinearData(x, weight, bias, y64, gauge if offsets is None else gauge + np.abs(offsets))


def make(case: LinearCase) -> LinearData:
    """Inputs of a case and their answer; x has NaN beyond its columns."""
    inputs = inputs_with(case, make_weight)
    return answer(inputs.x, inputs.weight, inputs.bias, case.activations)


def bound_of(data: LinearData, activations: str, plan: Plan) -> np.ndarray:
    """The bound of the oracle. A looked-up entry is rounded to the type of a 16-bit dot, one of a
    learned table below 2**-29 of the largest to the grid of its subnormals: 2**-39 of it."""
    codec = data.weight.codec
    looked_up = is_looked_up(codec) and plan.dataflow in ("flat", "tiled")
    roundings = int(plan.dataflow == "decode_matmul" or (looked_up and plan.dot != "fp32"))
    dot = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}.get(plan.dot)
    bound = oracle.linear_bound(
        data.y64, data.gauge, data.weight.shape[1], data.x.dtype, roundings, dot
    )
    if codec.values == "learned" and looked_up and plan.dot == "fp16":
        values = reference.decode_activations(
            data.x.float().numpy(), activation_format(activations)
        )
        largest = float(data.weight.entries().abs().max())
        scales = data.weight.effective_scales()[:, : data.weight.shape[0]].double().numpy()
        group = np.arange(data.weight.shape[1]) // codec.group_size(data.weight.shape[1])
        bound += 2.0**-39 * largest * (np.abs(values) @ scales[group])
    return bound
