"""The rows that a cache is asked with: checked, scaled, counted."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lath.formats.attention import Queries
from lath.verbs.attention_options import check_device, check_heads
from lath.verbs.checks import check_tensor
from lath.verbs.paged_kv import PagedKV


def check_query(given: Any, kv: PagedKV) -> Tensor:
    q = check_tensor("q", given)
    check_heads(q, kv.num_kv_heads, kv.format.key_dim, "the cache")
    if q.shape[0] != kv.batch:
        raise ValueError(f"q must have the cache's batch, {kv.batch}, got shape {[*q.shape]}")
    if q.dtype != kv.dtype:
        raise TypeError(
            f"q must be {str(kv.dtype).removeprefix('torch.')} like the cache, got "
            f"{str(q.dtype).removeprefix('torch.')}"
        )
    check_device("q", q, kv.device)
    return q


def scaled_query(q: Tensor, kv: PagedKV) -> Tensor:
    """q as it is multiplied with the keys that the cache holds."""
    if kv.key_channel_scales is None:
        return q
    group = q.shape[1] // kv.num_kv_heads
    scales = kv.key_channel_scales.repeat_interleave(group, dim=0)[:, None]
    return (q.float() * scales).to(q.dtype)


def queries_of(q: Tensor, query_lengths: list[int] | None) -> Queries:
    batch, _, rows, _ = q.shape
    counts = (rows,) * batch if query_lengths is None else tuple(query_lengths)
    q = q.detach() if q.stride(3) == 1 else q.detach().contiguous()
    return Queries(q, row_counts(counts, q.device), max(counts, default=0))


@functools.lru_cache(maxsize=64)  # every layer of every step asks for the same few numbers
def row_counts(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(counts, dtype=torch.int32, device=device)
