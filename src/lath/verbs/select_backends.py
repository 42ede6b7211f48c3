"""Scores of pages and tokens, the largest k of them, and repair, on the backend that was chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lath.formats.attention import PageView, Queries, QueryFormat
from lath.formats.plan import Backend
from lath.formats.selection import PageScore
from lath.reference import select as reference
from lath.verbs.page_backends import as_array, as_cache


def _kernels(backend: Backend) -> Any:
    """The module of a backend's selection kernels, imported on first use."""
    if backend == "triton":
        from lath.kernels.select import triton

        return triton
    from lath.kernels.select import cpu

    return cpu


def page_scores(
    queries: Queries,
    pages: PageView,
    kind: PageScore,
    scale: float,
    backend: Backend,
) -> Tensor:
    """fp32 [S, Hq, L, P]: see `reference.select.page_scores`."""
    if backend != "reference":
        scores: Tensor = _kernels(backend).page_scores(queries, pages, kind, scale)
        return scores
    cache = as_cache(pages, queries.q.dtype)
    exact = reference.page_scores(*_rows(queries), cache, kind, scale)
    return _tensor(exact, queries.q)


def token_scores(
    queries: Queries, pages: PageView, scale: float, query: QueryFormat, backend: Backend
) -> Tensor:
    """fp32 [S, Hq, L, 64 P]: see `reference.select.token_scores`."""
    if backend != "reference":
        scores: Tensor = _kernels(backend).token_scores(queries, pages, scale, query)
        return scores
    cache = as_cache(pages, queries.q.dtype)
    return _tensor(reference.token_scores(*_rows(queries), cache, scale, query), queries.q)


def label_scores(
    queries: Queries,
    pages: PageView,
    labels: Tensor,
    label_scales: Tensor,
    label_channels: Tensor,
    rows_of: Tensor,
    scale: float,
    backend: Backend,
) -> Tensor:
    """fp32 [S, Hq, L, 64 P]: see `reference.select.label_scores`.

    labels: int8 [N, Hkv, C, 64], or uint8 [N, Hkv, C, 32] of 4 bits.
    """
    if backend != "reference":
        scores: Tensor = _kernels(backend).label_scores(
            queries, pages, labels, label_scales, label_channels, rows_of, scale
        )
        return scores
    if labels.dtype == torch.uint8:
        labels = unpack_labels(labels)
    exact = reference.label_scores(
        *_rows(queries), as_cache(pages, queries.q.dtype), as_array(labels),
        as_array(label_scales), as_array(label_channels), as_array(rows_of), scale,
    )  # fmt: skip
    return _tensor(exact, queries.q)


def unpack_labels(labels: Tensor) -> Tensor:
    """uint8 [..., C, 32] → int8 [..., C, 64]: the inverse of `reference.select.pack_labels`."""
    halves = torch.cat([labels & 15, labels >> 4], dim=-1).to(torch.int8)
    return torch.where(halves >= 8, halves - 16, halves)


def top_k(scores: Tensor, k: int, backend: Backend) -> Tensor:
    """int32 [..., min(k, P)]: see `reference.select.top_k`."""
    if backend == "reference":
        return torch.from_numpy(reference.top_k(as_array(scores), k)).to(scores.device)
    indices: Tensor = _kernels(backend).top_k(scores, k)
    return indices


def repair(
    queries: Queries,
    pages: PageView,
    unread: Tensor,
    scale: float,
    backend: Backend,
    *,
    spreads: bool = True,
) -> tuple[Tensor, Tensor]:
    """o fp32 [S, Hq, L, E], lse fp32 [S, Hq, L]: see `reference.select.repair`."""
    if backend != "reference":
        o, lse = _kernels(backend).repair(queries, pages, unread, scale, spreads=spreads)
        return o, lse
    cache = as_cache(pages, queries.q.dtype)
    exact = reference.repair(*_rows(queries), cache, as_array(unread), scale, spreads)
    return _tensor(exact[0], queries.q), _tensor(exact[1], queries.q)


def _rows(queries: Queries) -> tuple[Any, Any]:
    return as_array(queries.q), as_array(queries.lengths)


def _tensor(array: Any, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(device=like.device, dtype=torch.float32)
