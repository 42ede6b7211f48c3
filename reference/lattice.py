"""The definition of lattices in NumPy: generators by alternating least squares, points, decoding.

All rows of a group of columns share a generator G [d, d]; each d neighbouring weights of a row are
scale * G z with whole z (GLVQ, 2510.20984, without its companding). Float64 inside; what is stored
is rounded first, and what follows is computed with the stored numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lath.formats.lattice import MOST_CONDITION, LatticeCodec

ROUNDS = 12  # of points and generators in turn
# Of the variances along the axes of a group, the least that counts, over their mean: a direction
# that weights never take must still have a length.
LEAST_VARIANCE = 2.0**-12
# Steps of the best uniform quantiser of 2**bits levels for a normal number (Max, 1960).
STEPS = {2: 0.9957, 3: 0.586, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}

Doubles = NDArray[np.float64]
# A lattice that fits most rows of a group clips those with a weight far from the others: they take
# it wider (lattice4-d8-g64, SmolLM2: perplexity 374 with the first alone, 43 with all).
WIDTHS = (1.0, 1.25, 1.5, 2.0, 3.0)


class Quantised(NamedTuple):
    """points: int64 [N, K'], K' = K rounded up to d. scales: fp16 [G, N]. generators: fp32
    [G, d, d]."""

    points: NDArray[np.int64]
    scales: NDArray[np.float16]
    generators: NDArray[np.float32]


def quantize(weight: NDArray[np.float32], codec: LatticeCodec) -> Quantised:
    """Generators, scales and points of a weight [N, K] fp32, for each group of columns:

        u      = w / sqrt(mean w²) of the row, in vectors of d
        G      = step * U at first, U upper triangular with U Uᵀ the covariance of u; then ROUNDS
                 times points by `babai` and the G of the least Σ |u - G z|²; the best of all rounds
        scale  = fp16(width * sqrt(mean w²) * |G|), G divided by its largest singular value |G|
        z      = babai(w / scale, G), for each row with the width among WIDTHS of the least
                 Σ (w - scale G z)², of equal ones the first

    A group of zeros has scale 1 and points 0. ValueError if the weight has NaN or infinity, or a
    scale overflows fp16.
    """
    if not np.isfinite(weight).all():
        raise ValueError("weight must be finite: it has NaN or infinity")
    (rows, columns), d = weight.shape, codec.dimension
    padded = np.zeros((rows, codec.columns_of_points(columns)))
    padded[:, :columns] = weight
    size, groups = (f(padded.shape[1]) for f in (codec.points.group_size, codec.points.num_groups))
    points = np.zeros(padded.shape, np.int64)
    scales = np.ones((groups, rows), np.float16)
    generators = np.zeros((groups, d, d), np.float32)
    for g in range(groups):
        block = padded[:, g * size : (g + 1) * size]
        root = np.sqrt((block**2).mean(axis=1, keepdims=True))
        scaled = block / np.where(root == 0, 1, root)
        exact = learn_generator(scaled.reshape(-1, d), codec)
        length = np.linalg.norm(exact, 2)
        generators[g] = (exact / length).astype(np.float32)
        stored = np.where(root == 0, 1, np.maximum(root * length, 2.0**-24))[:, 0]
        least = np.full(len(block), np.inf)
        for width in WIDTHS:
            with np.errstate(over="ignore", invalid="ignore"):
                trial = (width * stored).astype(np.float16)
                if width == 1 and not np.isfinite(trial).all():
                    raise ValueError(
                        f"weight is too large for {codec}: a scale of {stored.max():.3g} "
                        "overflows fp16"
                    )
                wide = trial.astype(np.float64)[:, None]
                own = generators[g].astype(np.float64)
                found = babai((block / wide).reshape(-1, d), own, codec.bits)
                decoded = wide * (found @ own.T).reshape(block.shape)
                error = ((block - decoded) ** 2).sum(axis=1)
            better = error < least
            least[better], scales[g, better] = error[better], trial[better]
            points[better, g * size : (g + 1) * size] = found.reshape(block.shape)[better]
    return Quantised(points, scales, generators)


def learn_generator(vectors: Doubles, codec: LatticeCodec) -> Doubles:
    """float64 [d, d] for vectors [P, d]: see `quantize`; the identity where all are 0."""
    d = codec.dimension
    if not vectors.any():
        return np.eye(d)
    covariance = vectors.T @ vectors / len(vectors)
    covariance += LEAST_VARIANCE * np.trace(covariance) / d * np.eye(d)
    # Cholesky of the matrix turned upside down gives the upper factor: the last coordinate is
    # rounded by itself, and each one before it given those behind.
    upper = np.linalg.cholesky(covariance[::-1, ::-1])[::-1, ::-1]
    trial = np.asarray(STEPS[codec.bits] * upper, np.float64)
    best = trial
    least = np.inf
    for _ in range(ROUNDS):
        z = babai(vectors, trial, codec.bits).astype(np.float64)
        loss = ((vectors - z @ trial.T) ** 2).sum()
        if loss < least:
            best, least = trial, loss
        squares = z.T @ z
        if np.linalg.cond(squares) > MOST_CONDITION**2:
            break  # some coordinate is (nearly) always 0: nothing is known of its direction
        trial = np.asarray(np.linalg.solve(squares, z.T @ vectors).T, np.float64)
        if np.linalg.cond(trial) > MOST_CONDITION / 2:
            break
    return best


def babai(vectors: Doubles, generator: Doubles, bits: int) -> NDArray[np.int64]:
    """Lattice points near vectors [P, d], int64 [P, d] of `bits` bits: Babai's nearest plane.

    With G = Q R, from the last coordinate to the first, z_i = rint((Qᵀ v)_i - Σ_{j>i} R_ij z_j) /
    R_ii, clipped to -2**(bits-1) .. 2**(bits-1) - 1. A point of the lattice gives its own z.
    """
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    q, r = np.linalg.qr(generator)
    left = vectors @ q
    z = np.zeros(vectors.shape)
    for i in range(len(generator) - 1, -1, -1):
        z[:, i] = np.clip(np.rint(left[:, i] / r[i, i]), low, high)
        left = left - z[:, i : i + 1] * r[:, i]
    return z.astype(np.int64)


def dequantize(
    points: NDArray[np.int64],
    scales: NDArray[np.float16],
    generators: NDArray[np.float32],
    codec: LatticeCodec,
    columns: int,
) -> Doubles:
    """Points [N, K'], scales [G, N], generators [G, d, d] → the weight [N, K] float64, exact."""
    d, decoded = codec.dimension, np.zeros(points.shape)
    for j, g in enumerate(codec.group_of_block(columns)):
        block = slice(d * j, d * (j + 1))
        own = points[:, block] @ generators[g].astype(np.float64).T
        decoded[:, block] = own * scales[g].astype(np.float64)[:, None]
    return decoded[:, :columns]


def transform(
    x: NDArray[np.float32], generators: NDArray[np.float32], codec: LatticeCodec
) -> NDArray[np.float32]:
    """x [M, K] → x G [M, K']: summed in float64, rounded once to fp32. What `linear` multiplies z
    by, and what an activation format rounds."""
    (tokens, columns), d = x.shape, codec.dimension
    padded = np.zeros((tokens, codec.columns_of_points(columns)))
    padded[:, :columns] = x
    for j, g in enumerate(codec.group_of_block(columns)):
        block = slice(d * j, d * (j + 1))
        padded[:, block] = padded[:, block] @ generators[g].astype(np.float64)
    return padded.astype(np.float32)
