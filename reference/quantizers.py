"""The definition of every quantiser, in NumPy, float64: GPTQ, AWQ, HQQ.

Each begins with the scales that round-to-nearest would store (`lath.reference.codecs.quantize`) and
chooses other codes (GPTQ), other columns (AWQ) or other zeros (HQQ).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lath.formats.codec import Codec
from lath.formats.quantizer import AWQ, GPTQ, HQQ
from lath.reference import codecs
from lath.reference.codecs import Codes, Quantised
from lath.reference.scales import Floats, effective_scales

Wide = NDArray[np.float64]


def nearest_code(values: Wide, scale: Wide, zero: Wide, codec: Codec, entries: Floats) -> Codes:
    """The code nearest to each value, given scales and zeros, all of one shape.

    The fp32 operations of round-to-nearest: a value that is a fp32 number gets the code that
    `codecs.quantize` would give it. zero: the minimum of "float", the zero point of "integer".
    """
    w, s, z = (x.astype(np.float32) for x in (values, scale, zero))
    top = codec.levels - 1
    if codec.is_table:
        return codecs.nearest_entry(w / s, entries)
    if codec.zero == "float":
        code: Floats = np.rint((w - z) / s)
    elif codec.bits == 1 and codec.zero == "none":
        return (w >= 0).astype(np.uint8)
    else:
        offset = z if codec.zero == "integer" else np.float32(codec.zero_code)
        code = np.rint(w / s) + offset
    return np.clip(code, 0, top).astype(np.uint8)


def damped(hessian: Wide, damping: float) -> Wide:
    """hessian + damping * mean of its diagonal * I. ValueError if that is not positive definite."""
    spread: Wide = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    # The margin of rounding of a matrix of this size: below it the inverse means nothing.
    least = np.linalg.eigvalsh(spread)[0]
    if not least > len(spread) * 2.0**-52 * np.abs(spread).max():
        raise ValueError(
            f"hessian is singular: its smallest eigenvalue is {least:.3g} with damping {damping}; "
            "raise the damping or calibrate on more tokens"
        )
    return spread


def gptq(
    weight: Floats, codec: Codec, hessian: Wide, options: GPTQ, start: Quantised | None = None
) -> Quantised:
    """GPTQ (Frantar et al. 2022, 2210.17323) of a weight [N, K] for inputs with Σ x xᵀ = hessian.

    hessian: [K, K] symmetric, in any unit. start: gives scales, zeros and table; None: those of
    round-to-nearest (`start_of`). For each column k, in the order of the diagonal (`act_order`, of
    equal ones the first) or as they come, with H the damped Hessian of the columns that are left:

        code[:, k] = nearest(w[:, k])
        w[:, j]   -= (w[:, k] - decode(code[:, k])) * inv(H)[k, j] / inv(H)[k, k]   for all j left

    which is what makes the error tr(E H Eᵀ), E = w - decoded, least over the columns left, were
    they free. The rows U of the Cholesky factor inv(H) = Uᵀ U hold all those ratios at once.
    """
    start = start_of(weight, codec, hessian) if start is None else start
    columns = weight.shape[1]
    order = np.argsort(-np.diag(hessian), kind="stable") if options.act_order else None
    order = np.arange(columns) if order is None else order
    inverse = np.linalg.inv(damped(hessian, options.damping)[np.ix_(order, order)])
    upper = np.linalg.cholesky((inverse + inverse.T) / 2).T
    scale, zero = sides(start, codec, columns)
    entries = codecs.entries_of(codec, start.table)
    left = weight.astype(np.float64)[:, order]
    codes = np.zeros(weight.shape, np.uint8)
    for i, k in enumerate(order):
        codes[:, k] = nearest_code(left[:, i], scale[:, k], zero[:, k], codec, entries)
        decoded = _decoded(codes[:, k], scale[:, k], zero[:, k], codec, entries)
        error = (left[:, i] - decoded) / upper[i, i]
        left[:, i:] -= np.outer(error, upper[i, i:])
    return start._replace(codes=codes)


def start_of(weight: Floats, codec: Codec, hessian: Wide, search: bool = False) -> Quantised:
    """Round-to-nearest, but a learned table by k-means in which column k counts diag(hessian)[k]
    times, over the mean of the diagonal: the first-order error of the output (SqueezeLLM,
    2306.07629). Where the diagonal is 0 everywhere, all columns count alike."""
    table = None
    square = np.diag(hessian)
    if codec.values == "learned" and square.any():
        table = codecs.learn_table(weight, codec, square / square.mean())
    return codecs.quantize(weight, codec, search, table)


def sides(start: Quantised, codec: Codec, columns: int) -> tuple[Wide, Wide]:
    """Scales and zeros of every weight, [N, K] float64; zeros are 0 where the codec has none."""
    group = np.arange(columns) // codec.group_size(columns)
    scale = effective_scales(start.scales, start.outer, codec).T[:, group]
    if start.zeros is None:
        return scale, np.zeros(scale.shape)
    return scale, start.zeros.astype(np.float64).T[:, group]


def _decoded(codes: Codes, scale: Wide, zero: Wide, codec: Codec, entries: Floats) -> Wide:
    return codecs._decode(codes, scale, zero, codec, entries)


def output_error(difference: Wide, hessian: Wide) -> float:
    """tr(D H Dᵀ) = Σ_t ||D x_t||² of a difference of weights [N, K]."""
    return float(((difference @ hessian) * difference).sum())


def awq_scales(
    weights: list[Floats],
    codec: Codec,
    hessian: Wide,
    options: AWQ,
    shared: NDArray[np.int64] | None = None,
    search: bool = False,
) -> Floats:
    """Column scales of weights [N_i, K] that read the same x (AWQ, Lin et al. 2023, 2306.00978).

    For each alpha = 0, 1/grid, ..: s = rms**alpha, over sqrt(max s * min s), fp32; the error is
    Σ_i tr(D H Dᵀ) with D = decode(quantize(w * s)) / s - w. Returns the s of the least error; 1
    of the first alpha, so that it never exceeds round-to-nearest's. AWQ takes mean |x|, this takes
    rms(x), which the Hessian knows.

    shared: for each column the number of its scale; columns that share one take the mean square of
    them all (heads of queries that read one head of values). Returns fp32 [K]; a column whose input
    is always 0 counts as the smallest of the others.
    """
    square = np.diag(hessian).astype(np.float64)
    if shared is not None:
        square = (np.bincount(shared, square) / np.bincount(shared))[shared]
    if not (square > 0).any():
        return np.ones(len(square), np.float32)
    rms = np.sqrt(np.where(square > 0, square, square[square > 0].min()))
    best, best_error = np.ones(len(square), np.float32), np.inf
    for step in range(options.grid):
        s = rms ** (step / options.grid)
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
        error = 0.0
        for weight in weights:
            q = codecs.quantize(weight * s, codec, search)
            decoded = codecs.dequantize(q.codes, q.scales, q.zeros, codec, q.outer, q.table)
            error += output_error(decoded / s - weight, hessian)
        if error < best_error:
            best, best_error = s, error
    return best


def hqq(weight: Floats, codec: Codec, options: HQQ, start: Quantised | None = None) -> Quantised:
    """Half-quadratic quantisation (Badri & Shaji 2023) of a weight [N, K].

    Minimises, over the zero of each group, Σ |r|**p with r = (w - decoded) / scale, by splitting r
    into an outlier part e and a rest: from the zeros of `start` (None: round-to-nearest), `rounds`
    times, with b = beta * kappa**round,

        e     = sign(r) * max(|r| - |r|**(p - 1) / b, 0)
        zero  = the mean over the group of (w - scale * e - scale * code)

    The zero is rounded to its stored dtype, codes are taken anew, and of all rounds and the start
    the first with the least sum is kept. Scales stay. HQQ splits errors in the weight's own unit;
    in steps of the scale p, beta and kappa mean the same for every weight.

    Raises ValueError for a codec without minima; whole zero points stay where they are, because a
    step of the splitting moves them by less than a half.
    """
    if codec.zero != "float":
        raise ValueError(f"hqq optimises the minima of '-fzero', {str(codec)!r} has none")
    start = codecs.quantize(weight, codec) if start is None else start
    assert start.zeros is not None
    columns, size = weight.shape[1], codec.group_size(weight.shape[1])
    codes, zeros = start.codes.copy(), start.zeros.copy()
    entries = codecs.entries_of(codec)
    every_scale = effective_scales(start.scales, start.outer, codec)
    for g in range(codec.num_groups(columns)):
        own = slice(g * size, (g + 1) * size)
        block, scale = weight[:, own].astype(np.float64), every_scale[g][:, None]
        shape = block.shape
        best = np.full(len(block), np.inf)
        zero = start.zeros[g].copy()
        for step in range(options.rounds + 1):
            wide = zero.astype(np.float64)[:, None]
            every = np.broadcast_to(scale, shape), np.broadcast_to(wide, shape)
            q = nearest_code(block, *every, codec, entries)
            r = (block - _decoded(q, *every, codec, entries)) / scale
            loss = (np.abs(r) ** options.p).sum(axis=1)
            better = loss < best
            best = np.where(better, loss, best)
            codes[:, own][better], zeros[g, better] = q[better], zero[better]
            beta = options.beta * options.kappa**step
            size_of_r = np.maximum(np.abs(r), 1e-30)
            e = np.sign(r) * np.maximum(size_of_r - size_of_r ** (options.p - 1) / beta, 0)
            zero = (block - scale * (e + q)).mean(axis=1).astype(zeros.dtype)
    return start._replace(codes=codes, zeros=zeros)
