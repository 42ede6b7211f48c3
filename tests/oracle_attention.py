"""What an attention kernel may differ by from the definition, derived and not tuned.

With u = 2**-24 (fp32), over the keys n that a row reads, real units:

    score      |δs| <= u (D + 16) scale Σ_d |q||k| + 16 u (|s| + |bias| + slope·distance + softcap)
    weight     relative ε = 2 max|δs| + 2**-20     (exp2 of GPUs and polynomials: below 2**-21 each)
    rounding   u_P where P meets floating-point values: once to the 16-bit type of the dot
    codes      one level, where P * levels lies within ε P levels + 2**-16 of a tie
    output     |δo| <= u_out|o| + (2ε + u_P + (n + 16) u) Σ p|v| + levels that may flip
    lse        |δlse| <= 2 max|δs| + (n + 16) u + 2**-20 + 2 u |lse|
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cases_attention import as_cache, as_options, dense_queries
from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.reference import attention as reference
from oracle import SMALLEST, UNIT_ROUNDOFF

Array = NDArray[np.float64]
_UNIT, _EXP2 = 2.0**-24, 2.0**-20


class Answer(NamedTuple):
    """o [S, Hq, L, E] and lse [S, Hq, L] of the definition, and the largest errors permitted."""

    o: Array
    lse: Array
    o_bound: Array
    lse_bound: Array


def definition(queries: Queries, pages: PageView, options: ScoreOptions) -> Answer:
    """The definition's answer; rows as in `cases_attention.dense_queries`."""
    q = dense_queries(queries)
    rows = queries.lengths.numpy()
    cache, arrays = as_cache(pages, queries.q.dtype), as_options(options)
    o, lse = reference.attend(q, rows, cache, arrays)
    o_bound, lse_bound = np.zeros_like(o), np.zeros_like(lse)
    for s in range(len(rows)):
        length = int(cache.lengths[s])
        if rows[s] == 0 or length == 0:
            continue
        own = reference.sequence_options(arrays, s, int(rows[s]), length)
        tiles = [cache.tiles(s, head) for head in range(cache.heads)]
        part = q[s, :, : rows[s]]
        bounds = sequence_bounds(part, tiles, length, own, queries.q.dtype, o[s], lse[s])
        o_bound[s, :, : rows[s]], lse_bound[s, :, : rows[s]] = bounds
    return Answer(o, lse, o_bound, lse_bound)


def sequence_bounds(
    q: NDArray[np.float32],
    tiles: list[list[reference.Tile]],
    length: int,
    options: reference.Options,
    dtype: torch.dtype,
    o: Array,
    lse: Array,
) -> tuple[Array, Array]:
    heads, rows, _ = q.shape
    group = heads // len(tiles)
    s = reference.scores(q, tiles, length, options)
    gauge = score_gauge(q, tiles, length, options, s)
    readable = ~np.isneginf(s)
    largest = np.where(readable, gauge, 0).max(axis=2)
    weight_error = 2 * largest + _EXP2
    sum_error = (length + 16) * _UNIT
    log_total = np.where(np.isneginf(lse[:, :rows]), 0, lse[:, :rows])
    p = np.exp(s - log_total[..., None])
    bound = np.zeros((heads, rows, o.shape[-1]))
    p_roundoff = UNIT_ROUNDOFF[dtype]
    for head in range(heads):
        for tile in tiles[head // group]:
            own = p[head][:, tile.positions]
            values = np.abs(tile.value_codes * tile.value_scales)
            relative = 2 * weight_error[head] + sum_error
            if tile.value_map == "float" or options.precision == "float":
                relative = relative + p_roundoff
                flips = np.zeros_like(own)
            else:
                flips = flipping(s[head][:, tile.positions], tile, options, weight_error[head])
                flips = flips * own.max(axis=1, keepdims=True)
            bound[head] += relative[:, None] * (own @ values) + flips @ values
    small = UNIT_ROUNDOFF[dtype] * np.abs(o[:, :rows]) + 4 * SMALLEST[dtype]
    lse_bound = 2 * largest + sum_error + _EXP2 + 2 * _UNIT * np.abs(log_total)
    return bound + small, lse_bound


def score_gauge(
    q: NDArray[np.float32],
    tiles: list[list[reference.Tile]],
    length: int,
    options: reference.Options,
    s: Array,
) -> Array:
    """|δs| [Hq, Lq, length]."""
    heads, rows, channels = q.shape
    group = heads // len(tiles)
    gauge = np.zeros((heads, rows, length))
    for head in range(heads):
        for tile in tiles[head // group]:
            size = np.abs(tile.key_codes) * tile.key_scales[:, None] + np.abs(tile.mean)
            gauge[head][:, tile.positions] = np.abs(q[head].astype(np.float64)) @ size.T
    gauge *= (channels + 16) * _UNIT * options.scale
    extra = np.where(np.isneginf(s), 0, np.abs(s))
    if options.bias is not None:
        extra = extra + np.abs(options.bias)
    if options.alibi is not None:
        distance = np.abs(np.arange(rows)[:, None] + length - rows - np.arange(length)[None])
        extra = extra + np.abs(options.alibi)[:, None, None] * distance
    if options.softcap is not None:
        extra = extra + options.softcap
    return gauge + 16 * _UNIT * extra


def flipping(
    s: Array, tile: reference.Tile, options: reference.Options, weight_error: Array
) -> Array:
    """The part of a tile's largest weight by which a code may differ: one level near a tie."""
    shift = s.max(axis=1, initial=-np.inf, keepdims=True)
    weights = np.exp(s - np.where(np.isneginf(shift), 0, shift))
    if options.precision == "e4m3":  # a step is 1/8 of the number, or 2**-9 for subnormals
        scaled = weights * 256
        step = np.ldexp(1.0, np.maximum(np.frexp(scaled)[1] - 1, -6) - 3)
        position = scaled / step
        levels = 256 / step
    else:
        levels = np.full_like(weights, reference.LEVELS[options.precision])
        position = weights * levels
    distance = np.abs(position - np.floor(position) - 0.5)
    near = distance <= weight_error[:, None] * position + 2.0**-16
    return np.where(near, 1 / levels, 0)
