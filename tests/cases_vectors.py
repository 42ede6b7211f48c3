"""Cases of `linear` with vector codebooks: weights, answers, bounds."""

from __future__ import annotations

import numpy as np
import torch

import oracle
from cases import LinearCase, LinearData, inputs_with
from lath.formats import packing
from lath.formats.activations import activation_format
from lath.formats.plan import Plan
from lath.formats.vectors import VectorCodec, VectorTensor, pack_indices
from lath.reference import linear as reference
from lath.reference import vectors as definition


def make_weight(
    text: str, rows: int, columns: int, rng: np.random.Generator, data: str = "normal"
) -> VectorTensor:
    """Both ends of every book in use, all scales different; poison in scales of padded rows and in
    padded indices (the last entry).

    data "integers": entries and scales of few bits, so that products and sums are exact.
    """
    codec = VectorCodec.parse(text)
    padded, vectors = packing.round_up(rows, packing.PANEL), codec.num_vectors(columns)
    wide = packing.round_up(columns, packing.BLOCK) // codec.vector
    indices, books = [], []
    for entries in codec.books:
        index = np.full((padded, wide), entries - 1)
        index[:rows, :vectors] = rng.integers(0, entries, (rows, vectors))
        index[0, 0], index[rows - 1, vectors - 1] = 0, entries - 1
        indices.append(torch.from_numpy(index))
        book = rng.standard_normal((entries, codec.vector))
        book = rng.integers(-4, 5, book.shape) if data == "integers" else book
        books.append(np.abs(book) if data == "one_sign" else book)
    scales = (0.5 + rng.random((codec.num_groups(columns), padded))) / columns**0.5
    if data == "integers":
        scales = 2.0 ** rng.integers(-1, 2, scales.shape)
    scales[:, rows:] = np.nan
    return VectorTensor(
        codec, (rows, columns), pack_indices(indices, codec), torch.from_numpy(scales).half(),
        torch.from_numpy(np.concatenate(books)).half(),
    )  # fmt: skip


def decode(weight: VectorTensor) -> np.ndarray:
    """The definition's float64 weight."""
    rows, columns = weight.shape
    indices = [index.numpy() for index in weight.unpack_indices()]
    scales = weight.scales[:, :rows].numpy()
    return definition.dequantize(indices, scales, weight.books.numpy(), weight.codec, columns)


def answer(
    x: torch.Tensor, weight: VectorTensor, bias: torch.Tensor | None, activations: str
) -> LinearData:
    """y64 by the definition and Σ|a||w| + |bias|; of two books the parts count each."""
    fmt, dense = activation_format(activations), decode(weight)
    offsets = None if bias is None else bias.float().numpy()
    y64 = reference.multiply(x.float().numpy(), dense, offsets, fmt)
    positive = VectorTensor(
        weight.codec, weight.shape, weight.codes, weight.scales, weight.books.abs()
    )
    with np.errstate(invalid="ignore"):
        gauge = np.abs(reference.decode_activations(x.float().numpy(), fmt)) @ decode(positive).T
    gauge = gauge if offsets is None else gauge + np.abs(offsets)
    return LinearData(x, weight, bias, y64, gauge)  # type: ignore[arg-type]


def make(case: LinearCase) -> LinearData:
    """Inputs of a case and their answer; x has NaN beyond its columns."""
    inputs = inputs_with(case, make_weight)
    return answer(inputs.x, inputs.weight, inputs.bias, case.activations)


def bound_of(data: LinearData, plan: Plan | None) -> np.ndarray:
    """The bound of the oracle. A 16-bit dot takes entries rounded once: in bf16 always, in fp16 the
    sum of two books. A CPU (plan None) multiplies fp32, where rounded activations are rounded once
    more."""
    columns, dtype = data.weight.shape[1], data.x.dtype
    if plan is None:
        return oracle.linear_bound(data.y64, data.gauge, columns + 1, dtype)
    rounded = plan.dot == "bf16" or (plan.dot == "fp16" and data.weight.codec.residual > 0)  # type: ignore[attr-defined]
    rounded = rounded or plan.dataflow == "decode_matmul"
    dot = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(plan.dot, torch.float32)
    return oracle.linear_bound(data.y64, data.gauge, columns, dtype, int(rounded), dot)
