"""The definition of selection for torch arguments, with the error that fp32 arithmetic admits.

Bounds: a sum of n products in fp32, in any order and with or without fused multiply-add, is within
(n + 2) u Σ|products| of the true one, u = 2**-24 (Higham, Accuracy and Stability, 3.5).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from cases_attention import as_array, as_cache, dense_queries
from lath.formats.attention import PageView, Queries
from lath.formats.pages import PAGE
from lath.formats.selection import FREEZING, LOGISTIC, PageScore
from lath.reference import select
from lath.reference.attention import Array, page_tile, round_query
from lath.reference.pages import read_page

UNIT = 2.0**-24
_EXP2 = 2.0**-20  # relative error of exp2, log2 and the products around them, of all backends


def page_scores(
    queries: Queries,
    pages: PageView,
    kind: PageScore,
    scale: float,
) -> tuple[Array, Array]:
    """Scores [S, Hq, L, P] and the largest admitted error of each."""
    cache, q = as_cache(pages, queries.q.dtype), dense_queries(queries)
    rows = queries.lengths.numpy()
    exact = select.page_scores(q, rows, cache, kind, scale)
    bound = np.zeros_like(exact)
    for s, head in np.ndindex(*exact.shape[:2]):
        own = np.abs(q[s, head, : rows[s]]).astype(np.float64)
        for i, index, count in _rows(cache, s, head, exact.shape[1]):
            error = _page_error(own, index, kind, scale) + _EXP2 * np.log(count)
            bound[s, head, : rows[s], i] = error
    return exact, bound


def _rows(cache, s: int, head: int, heads: int):  # type: ignore[no-untyped-def]
    kv_head = head // (heads // cache.records.shape[1])
    for i, (number, _, count, _) in enumerate(cache.entries(s, kv_head)):
        if count:
            yield i, select.read_index(cache.index[number, kv_head], cache.format), count


def _page_error(q: Array, row: select.IndexRow, kind: PageScore, scale: float) -> Array:
    """Of rows |q| [R, D]."""
    size = np.abs(row.mean)
    if kind in ("bound", "floor"):
        size = size + row.unit * 128 + np.abs(row.mean) * 2.0**-8
    error = scale * (3 * q.shape[1] + 16) * UNIT * (q @ size)
    if kind == "mass":
        sigma = select.spread(q, row, scale)
        error = error + np.minimum(sigma, FREEZING) * spread_error(q, sigma) + _EXP2 * (1 + sigma)
    return error + 4 * UNIT


def spread_error(q: Array, sigma: Array) -> Array:
    return sigma * (q.shape[1] + 16) * UNIT


def token_scores(
    queries: Queries, pages: PageView, scale: float, query: str
) -> tuple[Array, Array]:
    """Scores [S, Hq, L, 64 P] and the largest admitted error of each."""
    cache, q = as_cache(pages, queries.q.dtype), dense_queries(queries)
    rows = queries.lengths.numpy()
    exact = select.token_scores(q, rows, cache, scale, query)  # type: ignore[arg-type]
    bound = np.zeros((*exact.shape[:3], cache.table.shape[1], PAGE))
    group = exact.shape[1] // cache.records.shape[1]
    for s, head in np.ndindex(*exact.shape[:2]):
        own = q[s, head, : rows[s]]
        for i, (number, start, count, _) in enumerate(cache.entries(s, head // group)):
            place = number, head // group
            page = read_page(
                cache.records[place], cache.index[place], cache.format, cache.dtype, cache.draft
            )
            tile = page_tile(start, count, page, cache.format)
            rounded = np.abs(own) if tile.key_map == "float" else np.abs(round_query(own, query))  # type: ignore[arg-type]
            size = rounded @ (np.abs(tile.key_codes) * tile.key_scales[:, None]).T
            size = size + (np.abs(own) @ np.abs(tile.mean))[:, None]
            bound[s, head, : rows[s], i, :count] = scale * (2 * q.shape[3] + 16) * UNIT * size
    return exact, bound.reshape(exact.shape) + 4 * UNIT


def label_scores(
    queries: Queries,
    pages: PageView,
    labels: torch.Tensor,
    label_scales: torch.Tensor,
    label_channels: torch.Tensor,
    rows_of: torch.Tensor,
    scale: float,
) -> tuple[Array, Array]:
    """Scores [S, Hq, L, 64 P] and the largest admitted error of each. labels: int8, not packed."""
    cache, q = as_cache(pages, queries.q.dtype), dense_queries(queries)
    given = [as_array(t) for t in (labels, label_scales, label_channels, rows_of)]
    rows = queries.lengths.numpy()
    exact = select.label_scores(q, rows, cache, *given, scale)
    positive = select.label_scores(
        np.abs(q), rows, _absolute(cache), np.abs(given[0]), *given[1:], abs(scale)
    )
    count = rows_of.shape[2]
    return exact, np.where(np.isneginf(positive), 0, positive) * (2 * count + 16) * UNIT + 4 * UNIT


def _absolute(cache):  # type: ignore[no-untyped-def]
    """The cache with every mean of the index made positive."""
    import dataclasses

    index = cache.index.copy()
    field = cache.format.index_fields["mean"]
    index[..., field.offset + 1 : field.end : 2] &= 0x7F
    return dataclasses.replace(cache, index=index)


def repair(
    queries: Queries,
    pages: PageView,
    unread: torch.Tensor,
    scale: float,
    spreads: bool = True,
) -> tuple[Array, Array, Array, Array]:
    """o [S, Hq, L, E], lse [S, Hq, L], and the largest admitted errors of both."""
    cache, q = as_cache(pages, queries.q.dtype), dense_queries(queries)
    rows, z = queries.lengths.numpy(), unread.double().numpy()
    o, lse = select.repair(q, rows, cache, z, scale, spreads)
    o_bound, lse_bound = np.zeros_like(o), np.zeros_like(lse)
    heads, lists = o.shape[1], z.shape[1]
    for s, head in np.ndindex(*o.shape[:2]):
        own = np.abs(q[s, head, : rows[s]]).astype(np.float64)
        errors, weights, means = [np.zeros((int(rows[s]), 1))], [], []
        for i, index, count in _rows(cache, s, head, heads):
            at = z[s, head // (heads // lists), i]
            if np.isneginf(at):
                continue
            sigma = select.spread(own, index, scale) * spreads
            kind: PageScore = "mass" if spreads else "mean"
            error = _page_error(own, index, kind, scale) + _EXP2 * np.log(count)
            if np.isfinite(at):
                distance = np.abs(at - sigma)
                further = spread_error(own, sigma) if spreads else 0.0
                error = error + LOGISTIC * (further + _EXP2 * (1 + distance))
            errors.append(error[:, None])
            signed = q[s, head, : rows[s]].astype(np.float64)
            score = select.rest_score(signed, index, count, at, scale, spreads)
            weights.append(np.exp(score - lse[s, head, : rows[s]]))
            means.append(np.abs(index.value_mean))
        if not weights:
            continue
        relative = 2 * np.concatenate(errors, axis=1)[:, 1:] + _EXP2 + len(weights) * UNIT
        stacked = np.stack(weights, axis=1) * relative
        total = stacked.sum(axis=1, keepdims=True)
        o_bound[s, head, : rows[s]] = (stacked + np.stack(weights, 1) * total) @ np.stack(means)
        lse_bound[s, head, : rows[s]] = total[:, 0] + _EXP2 * (1 + np.abs(lse[s, head, : rows[s]]))
    return o, lse, o_bound + 4 * UNIT, lse_bound


def admitted(got: NDArray[np.float32], exact: Array, bound: Array) -> float:
    """The largest share of the admitted error that is used; inf where one is -inf and not both."""
    got64 = got.astype(np.float64)
    if not np.array_equal(np.isneginf(got64), np.isneginf(exact)):
        return float("inf")
    if not np.array_equal(np.isnan(got64), np.isnan(exact)):
        return float("inf")
    finite = np.isfinite(exact)
    if not np.isfinite(got64[finite]).all():
        return float("inf")
    return float((np.abs(got64 - exact)[finite] / np.maximum(bound[finite], 1e-300)).max(initial=0))
