"""What repair could reach on the caches of `selection_data`, and what keeps it from that.

With iid values of variance 1 and mean 0, weights w, R what was read and U the rest, dropping leaves
an error of variance

    (W_U / W_R)² Σ_R w² + Σ_U w²        all over (W_R + W_U)², W the sums of w:

the rest is missing, and what was read weighs too much in its place. Exact weights of pages and
means of their unread values leave Σ_U w² (1 - E[w]² / E[w²]), E over U: tokens of a page are not
told apart. The root of the quotient is what repair can gain at most.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import lath
from lath.formats.pages import PAGE
from lath.verbs.backends import resolve_backend
from lath.verbs.index_lists import unread_quantiles
from lath.verbs.queries import queries_of, scaled_query
from lath.verbs.select_backends import repair, token_scores
from lath.verbs.strata import queries_of_heads, unread_of_strata
from tools.selection_data import Asked


def normal_gain(spread: float, budget: float) -> tuple[float, float]:
    """The largest gain where scores are normal with this spread and their upper `budget` was read;
    and what it would be if dropping did no more than leave the rest out."""
    normal = torch.distributions.Normal(0.0, 1.0)
    edge = normal.icdf(torch.tensor(1 - budget)).item()

    def below(factor: float) -> float:  # of Σ exp(factor * score), in units of spread
        return normal.cdf(torch.tensor(edge - factor * spread)).item()

    left, squares = below(1), below(2)
    even = math.exp(-(spread**2)) * left**2 / squares / (1 - budget)  # E[w]² / E[w²]
    read = (left / (1 - left)) ** 2 * (1 - squares)
    lower = 1 / math.sqrt(1 - even)
    return lower * math.sqrt((read + squares) / squares), lower


def ceiling(asked: Asked, ids: lath.IndexList) -> Tensor:
    """The output of a repair that knew, of each page (or unit, or cluster, where lists go by those)
    and query, exactly what its unread tokens weigh together and the mean of their values, and
    nothing that tells them apart: [Q, Hq, 1, D]."""
    q, kv = asked.q, asked.kv
    read_part, lse = lath.decode_attention(q, kv, pages=ids, return_lse=True)
    left = unread_scores(asked, ids)  # [Q, Hq, n]
    groups = groups_of(asked, ids)  # [Q, Hkv, n]
    own = kv.dequantize(0)[1].double()[:, PAGE : PAGE + left.shape[-1]]  # [Hkv, n, D]
    rest = left.logsumexp(-1)
    weights = torch.exp(left - rest.masked_fill(rest == -math.inf, 0)[..., None])
    o = torch.zeros(*left.shape[:2], own.shape[-1], dtype=torch.float64)
    share = left.shape[1] // groups.shape[1]
    for s in range(left.shape[0]):
        for head in range(left.shape[1]):
            unread = left[s, head] > -math.inf
            group = groups[s, head // share][unread]
            sizes = left.new_zeros(int(groups.max()) + 1)
            count, mass = (
                sizes.index_add(0, group, part)
                for part in (torch.ones_like(group, dtype=sizes.dtype), weights[s, head, unread])
            )
            # Every token of a group weighs as much as their mean.
            o[s, head] = (mass / count.clamp(min=1))[group] @ own[head // share, unread]
    parts = [(read_part.float(), lse), (o[:, :, None].float(), rest[..., None].float())]
    return lath.merge(parts)[0]


def unread_scores(asked: Asked, ids: lath.IndexList) -> Tensor:
    """fp64 [Q, Hq, n]: the scores of the tokens in pages as attention computes them, -inf of those
    that a list holds and those that do not count."""
    q, kv = asked.q, asked.kv
    queries = queries_of(scaled_query(q, kv), None)
    scores = token_scores(queries, kv.view(), q.shape[3] ** -0.5, "int8", "reference")[:, :, 0]
    unit = PAGE if ids.granularity == "page" else 1
    entries = ids.indices.long()
    read = torch.zeros(*entries.shape[:2], scores.shape[-1] // unit + 1, dtype=torch.bool)
    places = torch.where(entries >= 0, entries, read.shape[-1] - 1)
    read = read.scatter(2, places, torch.ones_like(places, dtype=torch.bool))[..., :-1]
    read = read.repeat_interleave(unit, dim=2)
    sharing = scores.shape[1] // read.shape[1]
    return scores.double().masked_fill(read.repeat_interleave(sharing, dim=1), -math.inf)


def groups_of(asked: Asked, ids: lath.IndexList) -> Tensor:
    """int64 [Q, Hkv, n]: the number of each token's page, or unit or cluster. A token in none is
    a group with its page's others."""
    view = asked.kv.view()
    pages = torch.arange(view.table.shape[1]).repeat_interleave(PAGE)
    pages = pages.expand(view.num_sequences, view.num_kv_heads, -1)
    strata = None if ids.strata is None else ids.strata(asked.kv, view)
    if strata is None:
        return pages
    return torch.where(strata.of >= 0, strata.of, pages + int(strata.of.max()) + 1)


def weighed(asked: Asked, ids: lath.IndexList) -> tuple[Tensor, float]:
    """The output of `repair=True` if it knew what all unread tokens weigh together; how that is
    spread over pages, and their mean values, are its own. And what it takes them to weigh, over
    what they do: the geometric mean over queries and heads."""
    q, kv = asked.q, asked.kv
    o, lse = lath.decode_attention(q, kv, pages=ids, return_lse=True)
    view, queries = kv.view(), queries_of(scaled_query(q, kv), None)
    strata = None if ids.strata is None else ids.strata(kv, view)
    if strata is None:
        unread = unread_quantiles(kv, view, ids, 1)
    else:
        view, unread = unread_of_strata(strata, ids, 1)
        queries = queries_of_heads(queries, kv.num_kv_heads) if strata.per_head else queries
    backend = resolve_backend(asked.backend, q.device)
    rest, taken = repair(queries, view, unread, q.shape[3] ** -0.5, backend)
    left = unread_scores(asked, ids).logsumexp(-1, keepdim=True).float()
    share = torch.exp((taken.reshape(left.shape) - left).mean()).item()
    return lath.merge([(o.float(), lse), (rest.reshape(o.shape), left)])[0], share
