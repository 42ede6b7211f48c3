"""What a selection missed: the mass of the softmax that it captured, and the entries it took."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lath.formats.pages import PAGE
from lath.formats.selection import IndexList
from lath.selectors.base import pool
from lath.verbs.attention_options import check_lengths, check_number, choose_query
from lath.verbs.backends import resolve_backend
from lath.verbs.decode import decode_attention
from lath.verbs.index_lists import check_lists
from lath.verbs.paged_kv import PagedKV
from lath.verbs.queries import check_query, queries_of, scaled_query
from lath.verbs.select_backends import token_scores


def captured_mass(
    q: Tensor,
    kv: PagedKV,
    ids: IndexList,
    *,
    scale: float | None = None,
    query_lengths: Any = None,
    backend: str = "auto",
) -> Tensor:
    """The share of the softmax that `ids` and the float parts hold, fp32 [B, Hq, Lq], 0 .. 1.

    Arguments as for `decode_attention(q, kv, pages=ids)`; it is computed twice, with the lists and
    over everything. A row that reads nothing at all has captured all of it: 1.
    """
    given: dict[str, Any] = {
        "scale": scale, "query_lengths": query_lengths, "backend": backend, "return_lse": True,
        "precision": "float" if kv.format.value.map == "float" else "auto",
    }  # fmt: skip
    _, some = decode_attention(q, kv, pages=ids, **given)
    _, everything = decode_attention(q, kv, **given)
    share = torch.exp(some - everything).clamp(max=1)
    empty = everything == float("-inf")
    return share.masked_fill(empty, 1.0)


def recall(
    q: Tensor,
    kv: PagedKV,
    ids: IndexList,
    *,
    scale: float | None = None,
    query_lengths: Any = None,
    backend: str = "auto",
) -> Tensor:
    """Of the entries that a list of the same length would best hold, the share that it does hold:
    fp32 [B, H], H the heads of `ids`; 1 for an empty list.

    Entries that are listed whatever their score (`IndexList.always`: the last full pages) count
    neither as found nor as missed; a list of nothing else is an empty one. The best entries are
    those of the largest exact weight (of pages: the sum over their tokens); rows and heads that
    share a list vote as in `lath.select`.
    """
    q = check_query(q, kv)
    batch, heads, rows, dim = q.shape
    view = kv.view()
    check_lists(ids, view, heads)
    lengths = check_lengths("query_lengths", query_lengths, batch, rows)
    chosen = resolve_backend(kv.backend if backend == "auto" else backend, q.device)
    queries = queries_of(scaled_query(q, kv), lengths)
    factor = dim**-0.5 if scale is None else check_number("scale", scale)
    query = choose_query("auto", kv.format)
    scores = token_scores(queries, view, factor, query, chosen)
    if ids.granularity == "page":
        scores = torch.logsumexp(scores.reshape(*scores.shape[:-1], -1, PAGE), dim=-1)
    held = _members(ids.indices, ids.counts, scores.shape[-1])
    weights = pool(scores, ids.num_heads)
    if ids.always is not None:
        held = held & ~ids.always
        weights = weights.masked_fill(ids.always, -math.inf)
    counts = held.sum(-1)
    ranked = torch.sort(weights, dim=-1, descending=True, stable=True).indices
    inside = held.gather(2, ranked[..., : ids.indices.shape[2]])
    counted = torch.arange(inside.shape[2], device=q.device) < counts[..., None]
    found = (inside & counted).sum(-1)
    return torch.where(counts > 0, found / counts.clamp(min=1), 1.0)


def reads_all(kv: PagedKV, ids: IndexList) -> Tensor:
    """bool [B, H]: lists that leave nothing out."""
    view = kv.view()
    there = view.page_counts if ids.granularity == "page" else view.counts.sum(-1)
    return ids.counts >= there[:, None]


def _members(indices: Tensor, counts: Tensor, width: int) -> Tensor:
    """bool [B, H, width]: which entries a list holds."""
    members = torch.zeros((*counts.shape, width), dtype=torch.int32, device=indices.device)
    members.scatter_add_(2, indices.long().clamp(min=0), (indices >= 0).to(torch.int32))
    return members > 0
