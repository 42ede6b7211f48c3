"""Sparse weights for tests: built in NumPy without the quantiser, answers by the definition."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cases import LinearCase, LinearInputs, inputs_with
from lath.formats import packing
from lath.formats.activations import activation_format
from lath.formats.qtensor import SCALE_DTYPES
from lath.formats.sparse import SparseCodec, SparseTensor, pack
from lath.reference import linear as reference
from lath.verbs.kinds import kind_of


def make_weight(
    text: str, rows: int, columns: int, rng: np.random.Generator, data: str = "normal"
) -> SparseTensor:
    """Bits at random, about as many as the codec says; the first tile without any and, if there is
    a second, that one full; every number different from its neighbours, all scales different.

    data "integers": scales are powers of two, so that products and sums of few numbers are exact.
    """
    codec = SparseCodec.parse(text)
    mask = rng.random((rows, columns)) * 100 >= codec.share
    mask[:16, :128] = False
    if codec.share < 100:
        mask[:16, 128:256] = True
    if codec.is_table:
        numbers = rng.integers(-64, 65, (rows, columns)) / 64 * columns**-0.5
        if data == "integers":
            numbers = rng.integers(-64, 65, (rows, columns)).astype(np.float64)
        stored = torch.from_numpy(numbers).to(codec.code_dtype)
        return pack(stored, torch.from_numpy(mask), codec)
    half = 1 << (codec.bits - 1)
    stored = torch.from_numpy(rng.integers(-half, half, (rows, columns)).astype(np.int8))
    groups, padded = codec.num_groups(columns), packing.round_up(rows, packing.PANEL)
    scales = (0.5 + rng.random((groups, padded))) / (half * columns**0.5)
    if data == "integers":
        scales = 2.0 ** rng.integers(-1, 2, (groups, padded))
    scales[:, rows:] = 0
    assert codec.scale_dtype is not None
    side = torch.from_numpy(scales).to(SCALE_DTYPES[codec.scale_dtype])
    return pack(stored, torch.from_numpy(mask), codec, side)


def definition(
    x: Tensor, weight: SparseTensor, bias: Tensor | None, activations: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """y64 by `lath.reference`, and Σ|a||w| + |bias|. The zero point that a CPU kernel of whole
    numbers takes out again, 128, counts as a part of its own."""
    fmt = activation_format(activations)
    values, offsets = x.float().numpy(), None if bias is None else bias.float().numpy()
    with np.errstate(invalid="ignore"):
        y64 = kind_of(weight).reference(values, weight, offsets, fmt)
        parts = np.abs(kind_of(weight).decode(weight))
        if weight.scales is not None:
            group = np.arange(weight.shape[1]) // weight.codec.group_size(weight.shape[1])
            parts += 128 * weight.scales[:, : weight.shape[0]].double().numpy().T[:, group]
        gauge = np.abs(reference.decode_activations(values, fmt)) @ parts.T
    return y64, gauge if offsets is None else gauge + np.abs(offsets)


def make_inputs(case: LinearCase) -> tuple[LinearInputs, SparseTensor]:
    """The inputs of a case and their weight."""
    inputs = inputs_with(case, make_weight)
    return inputs, inputs.weight  # type: ignore[return-value]
