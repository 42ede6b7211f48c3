"""Lattices in torch, on the device of the weight: the steps of `lath.reference.lattice`, which says
what they mean, in float64 like it."""

from __future__ import annotations

import torch
from torch import Tensor

from lath.formats import packing
from lath.formats.lattice import MOST_CONDITION, LatticeCodec, LatticeTensor

_ROUNDS = 12
_LEAST_VARIANCE = 2.0**-12
_WIDTHS = (1.0, 1.25, 1.5, 2.0, 3.0)
_STEPS = {2: 0.9957, 3: 0.586, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}


def quantize(
    weight: Tensor, codec: LatticeCodec, search: bool = False, table: Tensor | None = None
) -> LatticeTensor:
    """weight [N, K] fp16, bf16 or fp32 → LatticeTensor; ValueError on NaN, infinity or overflow.

    search, table: none of lattices, ValueError.
    """
    if search:
        raise ValueError(f"search must be False for {codec}: its generators are fitted already")
    if table is not None:
        raise ValueError(f"table is for 'lut' codecs, got codec {str(codec)!r}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite: it has NaN or infinity")
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.double(), (0, -columns % codec.dimension))
    wide = padded.shape[1]
    size, groups = codec.points.group_size(wide), codec.points.num_groups(wide)
    codes = torch.empty((rows, wide), dtype=torch.uint8, device=weight.device)
    scales = weight.new_ones((groups, rows), dtype=torch.float16)
    generators = weight.new_empty((groups, codec.dimension, codec.dimension), dtype=torch.float32)
    for g in range(groups):
        own = slice(g * size, (g + 1) * size)
        scales[g], generators[g], z = _quantize_group(padded[:, own], codec)
        codes[:, own] = (z + (1 << (codec.bits - 1))).to(torch.uint8)
    packed = packing.pack(codes, codec.points)
    scales = torch.nn.functional.pad(scales, (0, -rows % packing.PANEL))
    return LatticeTensor(codec, (rows, columns), packed, scales, generators)


def _quantize_group(block: Tensor, codec: LatticeCodec) -> tuple[Tensor, Tensor, Tensor]:
    """float64 [N, g] → scales fp16 [N], a generator fp32 [d, d], points [N, g]."""
    d = codec.dimension
    root = (block**2).mean(dim=1, keepdim=True).sqrt()
    exact = _learn((block / torch.where(root == 0, 1.0, root)).reshape(-1, d), codec)
    length = torch.linalg.matrix_norm(exact, 2)
    generator = (exact / length).float()
    stored = torch.where(root == 0, 1.0, (root * length).clamp(min=2.0**-24))[:, 0]
    scales, points = stored.half(), torch.zeros_like(block)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(
            f"weight is too large for {codec}: a scale of {float(stored.max()):.3g} overflows fp16"
        )
    least = torch.full_like(stored, torch.inf)
    for width in _WIDTHS:
        trial = (width * stored).half()
        wide, own = trial.double()[:, None], generator.double()
        found = babai((block / wide).reshape(-1, d), own, codec.bits)
        error = (block - wide * (found @ own.T).reshape(block.shape)).square().sum(dim=1)
        better = error < least
        least, scales = torch.where(better, error, least), torch.where(better, trial, scales)
        points = torch.where(better[:, None], found.reshape(block.shape), points)
    return scales, generator, points


def _learn(vectors: Tensor, codec: LatticeCodec) -> Tensor:
    """The generator of vectors [P, d], float64 [d, d]."""
    d = codec.dimension
    identity = torch.eye(d, dtype=torch.float64, device=vectors.device)
    if not bool(vectors.any()):
        return identity
    covariance = vectors.T @ vectors / len(vectors)
    covariance += _LEAST_VARIANCE * covariance.trace() / d * identity
    upper = torch.linalg.cholesky(covariance.flip(0, 1)).flip(0, 1)
    trial = best = _STEPS[codec.bits] * upper
    least = torch.inf
    for _ in range(_ROUNDS):
        z = babai(vectors, trial, codec.bits)
        loss = float(((vectors - z @ trial.T) ** 2).sum())
        if loss < least:
            best, least = trial, loss
        squares = z.T @ z
        if not float(torch.linalg.cond(squares)) <= MOST_CONDITION**2:
            break
        trial = torch.linalg.solve(squares, z.T @ vectors).T
        if not float(torch.linalg.cond(trial)) <= MOST_CONDITION / 2:
            break
    return best


def babai(vectors: Tensor, generator: Tensor, bits: int) -> Tensor:
    """Points near vectors [P, d], whole float64 [P, d]: Babai's nearest plane, clipped."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    q, r = torch.linalg.qr(generator)
    left = vectors @ q
    z = torch.zeros_like(left)
    for i in range(len(generator) - 1, -1, -1):
        z[:, i] = torch.round(left[:, i] / r[i, i]).clamp_(low, high)
        left = left - z[:, i : i + 1] * r[:, i]
    return z
