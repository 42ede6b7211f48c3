"""Arguments of selection as the kernels take them, and what of them cannot be run."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from lath.formats.attention import PageView, Queries
from lath.formats.pages import PAGE
from lath.formats.selection import PageScore

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check(queries: Queries, pages: PageView) -> None:
    """ValueError for rows or pages that no kernel of selection reads."""
    q, kv_heads = queries.q, pages.num_kv_heads
    if queries.offsets is not None:
        raise ValueError("queries must be dense, [S, Hq, L, D] with offsets None, got packed rows")
    if pages.list_heads is not None:
        raise ValueError(
            f"pages must have no lists of heads, table [S, P], got {tuple(pages.table.shape)}"
        )
    if q.dtype not in _FLOATS:
        raise TypeError(f"q must be float16, bfloat16 or float32, got {q.dtype}")
    if q.dim() != 4 or q.shape[0] != pages.num_sequences or q.shape[3] != pages.format.key_dim:
        raise ValueError(
            f"q must be [{pages.num_sequences}, Hq, L, {pages.format.key_dim}], "
            f"got {tuple(q.shape)}"
        )
    if q.stride(3) != 1 and q.shape[3] > 1:
        raise ValueError(f"q must have last stride 1, got strides {q.stride()}")
    if kv_heads == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"q must have a multiple of {kv_heads} KV heads, got {q.shape[1]}")
    for name, tensor in (("records", pages.records), ("index", pages.index)):
        if not tensor.is_contiguous():
            raise ValueError(f"pages {name} must be contiguous, got strides {tensor.stride()}")


def check_top_k(scores: Tensor, k: int) -> None:
    """TypeError for other scores than float32, ValueError for k < 0."""
    if scores.dtype != torch.float32:
        raise TypeError(f"scores must be float32, got {scores.dtype}")
    if k < 0:
        raise ValueError(f"k must be 0 or more, got {k}")


def check_kind(kind: PageScore) -> None:
    if kind not in get_args(PageScore):
        raise ValueError(f"kind must be one of {get_args(PageScore)}, got {kind!r}")


def check_unread(unread: Tensor, pages: PageView, query_heads: int) -> None:
    sequences, width = pages.table.shape
    heads = unread.shape[1] if unread.dim() == 3 else 0
    if heads not in (1, pages.num_kv_heads, query_heads):
        raise ValueError(
            f"unread must be [S, H, P] with H = 1, {pages.num_kv_heads} or {query_heads}, "
            f"got {tuple(unread.shape)}"
        )
    _check_tensor("unread", unread, torch.float32, (sequences, heads, width))


def check_labels(
    labels: Tensor,
    label_scales: Tensor,
    label_channels: Tensor,
    rows_of: Tensor,
    pages: PageView,
    query_heads: int,
) -> None:
    if labels.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"labels must be int8, or uint8 where they have 4 bits, got {labels.dtype}")
    size = PAGE if labels.dtype == torch.int8 else PAGE // 2
    places, count = pages.index.shape[:2], labels.shape[2] if labels.dim() == 4 else 0
    _check_tensor("labels", labels, labels.dtype, (*places, count, size))
    _check_tensor("label_scales", label_scales, torch.float32, tuple(places))
    _check_tensor("label_channels", label_channels, torch.int32, (pages.num_kv_heads, count))
    chosen = rows_of.shape[2] if rows_of.dim() == 3 else 0
    _check_tensor("rows_of", rows_of, torch.int32, (pages.num_sequences, query_heads, chosen))


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")


def page_lists(pages: PageView) -> tuple[Tensor, Tensor, Tensor]:
    """table, counts int32 [S, P] and page_counts int32 [S], contiguous."""
    return pages.table.contiguous(), pages.counts.contiguous(), pages.page_counts.contiguous()
