"""Attention over what a selection chose, and what stands in for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.formats.page_pool import SideTable
from lath.formats.pages import PAGE
from lath.formats.plan import Backend
from lath.formats.selection import IndexList
from lath.verbs.index_lists import choose, unread_quantiles
from lath.verbs.page_decode import read_field
from lath.verbs.page_operators import attend
from lath.verbs.paged_kv import PagedKV
from lath.verbs.queries import queries_of
from lath.verbs.repairs import Repair, parse_repair
from lath.verbs.select_backends import repair as repair_pages
from lath.verbs.strata import queries_of_heads, unread_of_strata

# A token's share of the softmax is never taken to be exactly 0 or 1: its odds stay finite.
_LEAST_SHARE = 1e-7


@dataclass(frozen=True)
class Sparse:
    """What is read, and what is done about the rest."""

    ids: IndexList
    repair: Repair | None


def check_repair(repair: Any, options: ScoreOptions, ids: IndexList) -> Repair | None:
    """`repair` as a `Repair`, if the options admit it."""
    wanted = parse_repair(repair)
    if wanted is None:
        return None
    for name, present in (
        ("window", options.window is not None),
        ("mask", options.mask is not None),
        ("bias", options.bias is not None),
        ("alibi", options.alibi is not None),
        ("softcap", options.softcap is not None),
    ):
        if present:
            raise NotImplementedError(
                f"repair cannot be combined with {name}: the estimate is one of scale * q·k over "
                "whole pages; repair must be False"
            )
    if wanted.kind == "mean" and ids.mass is None:
        raise ValueError(
            "repair='mean' needs lists that say what mass they hold, of 'sparq', 'tokenselect' or "
            "'hgca'; these do not"
        )
    return wanted


def run_sparse(
    q: Tensor,
    kv: PagedKV,
    view: PageView,
    sparse: Sparse,
    options: ScoreOptions,
    query_lengths: list[int] | None,
    splits: int | None,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """`decode_attention` over lists, with its arguments checked; q as `run_decode` has it."""
    queries = queries_of(q, query_lengths)
    o, lse = attend(queries, choose(view, sparse.ids), options, backend, splits)
    if sparse.repair is None:
        return o, lse
    if sparse.repair.kind == "mean":
        return _joined(o, lse, *_mean_part(kv, view, queries, sparse.ids, lse))
    spreads = sparse.repair.kind == "spreads"
    strata = None if sparse.ids.strata is None else sparse.ids.strata(kv, view)
    if strata is None:
        unread, asked = unread_quantiles(kv, view, sparse.ids, q.shape[2]), queries
    else:
        view, unread = unread_of_strata(strata, sparse.ids, q.shape[2])
        asked = queries_of_heads(queries, kv.num_kv_heads) if strata.per_head else queries
    rest, rest_lse = repair_pages(asked, view, unread, options.scale, backend, spreads=spreads)
    rest, rest_lse = rest.reshape(o.shape), rest_lse.reshape(lse.shape)
    return _joined(o, lse, rest, rest_lse + math.log(sparse.repair.share))


def _joined(o: Tensor, lse: Tensor, rest: Tensor, rest_lse: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` of two parts whose outputs are 0 where they read nothing."""
    total = torch.logaddexp(lse, rest_lse)
    share = torch.exp(rest_lse - total).masked_fill(total == float("-inf"), 0)
    return torch.lerp(o.float(), rest, share[..., None]).to(o.dtype), total


def _mean_part(
    kv: PagedKV, view: PageView, queries: Queries, ids: IndexList, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean of all values as a part whose weight beside `lse` is what the list does not hold."""
    mean = mean_values(kv, view)
    group = queries.q.shape[1] // mean.shape[1]
    o = mean.repeat_interleave(group, dim=1)[:, :, None].expand(-1, -1, lse.shape[2], -1)
    assert ids.mass is not None
    mass = ids.mass.clamp(_LEAST_SHARE, 1)
    rest = lse + torch.log1p(-mass) - torch.log(mass)
    return o, torch.where(mass >= 1, float("-inf"), rest)


def mean_values(kv: PagedKV, view: PageView) -> Tensor:
    """fp32 [S, Hkv, E]: the mean of the values of all tokens, from index rows and float parts."""
    table = kv.pool.side_tables.setdefault(
        "value_means", SideTable(lambda _, index: (_value_means(kv, index),))
    )
    (means,) = table.of(kv.pool, lambda: [p for span in kv.spans for p in span.pages], view.table)
    weights = view.counts.float()[..., None, None]
    total = (means[view.table.long()] * weights).sum(dim=1)
    count = view.counts.sum(-1).float()
    for values, lengths in (
        (view.first_values, view.first_lengths),
        (view.last_values, view.last_lengths),
    ):
        if values is None or lengths is None:
            continue
        present = torch.arange(PAGE, device=values.device) < lengths[:, None]
        kept = torch.where(present[:, None, :, None], values.float(), 0.0)
        total, count = total + kept.sum(dim=2), count + lengths
    mean: Tensor = total / count.clamp(min=1)[:, None, None]
    return mean


def _value_means(kv: PagedKV, index: Tensor) -> Tensor:
    field = kv.format.index_fields["value_mean"]
    means = read_field(index, field, torch.bfloat16).float()
    own: Tensor = means[..., : kv.format.value_dim].contiguous()
    return own
