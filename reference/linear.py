"""The definition of `lath.linear` in NumPy, float64 inside.

    y[m, n] = Σ_k A(x)[m, k] * W[n, k] + bias[n]

W is the decoded weight (`lath.reference.codecs.dequantize`), A the activation format
(`lath.formats.activations`): "float" is x itself, the others the rounded codes times their scale.
The sum, the scales and the bias are float64 here; a backend computes scales and bias in fp32 and
rounds once to the type of x.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lath.formats.activations import SMALLEST_ABSMAX, ActivationFormat
from lath.formats.codec import Codec
from lath.reference import floats
from lath.reference.codecs import dequantize


def quantize_activations(
    x: NDArray[np.float32], activations: ActivationFormat
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """x [M, K] fp32 → codes [M, K] and scales fp32 [M, groups], for a format that rounds.

    codes: int8, or of an 8-bit float the numbers, fp32. A group with NaN or infinity has scale NaN
    and codes 0; one below 2**-100 scale 1 and codes 0.
    """
    tokens, columns = x.shape
    size, groups = activations.group_size(columns), activations.num_groups(columns)
    codes = np.zeros((tokens, columns), np.int8 if activations.is_integer else np.float32)
    largest = np.float32(activations.largest)
    scales = np.ones((tokens, groups), np.float32)
    for g in range(groups):
        block = x[:, g * size : (g + 1) * size].astype(np.float32)
        absmax = np.abs(block).max(axis=1)
        finite = np.isfinite(block).all(axis=1)
        usable = finite & (absmax >= SMALLEST_ABSMAX)
        safe = np.where(usable, absmax, np.float32(1))
        inverse = largest / safe
        scaled = np.where(usable[:, None], block, np.float32(0)) * inverse[:, None]
        if activations.values is None:
            codes[:, g * size : (g + 1) * size] = np.rint(scaled)
        else:
            codes[:, g * size : (g + 1) * size] = floats.round_float8(scaled, activations.values)
        scales[:, g] = np.where(usable, safe / largest, np.float32(1))
        scales[~finite, g] = np.nan
    return codes, scales


def decode_activations(
    x: NDArray[np.float32], activations: ActivationFormat
) -> NDArray[np.float64]:
    """A(x): the numbers [M, K] that are multiplied, float64."""
    if activations.kind == "float":
        return x.astype(np.float64)
    codes, scales = quantize_activations(x, activations)
    group = np.arange(x.shape[1]) // activations.group_size(x.shape[1])
    return codes.astype(np.float64) * scales.astype(np.float64)[:, group]


def linear(
    x: NDArray[np.float32],
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.float32] | None,
    codec: Codec,
    bias: NDArray[np.float32] | None = None,
    activations: ActivationFormat | None = None,
    outer: NDArray[np.float32] | None = None,
    table: NDArray[np.float32] | None = None,
) -> NDArray[np.float64]:
    """x [M, K], codes [N, K], scales and zeros [G, N], bias [N] → y [M, N] float64.

    outer, table: of the codecs that have them, as in `lath.reference.codecs.Quantised`.
    """
    decoded = dequantize(codes, scales, zeros, codec, outer, table)
    return multiply(x, decoded, bias, activations)


def multiply(
    x: NDArray[np.float32],
    decoded: NDArray[np.float64],
    bias: NDArray[np.float32] | None = None,
    activations: ActivationFormat | None = None,
) -> NDArray[np.float64]:
    """x [M, K], a decoded weight [N, K], bias [N] → y [M, N] float64."""
    values = decode_activations(x, activations or ActivationFormat())
    with np.errstate(invalid="ignore"):
        y = values @ decoded.T
    return y if bias is None else y + bias.astype(np.float64)
