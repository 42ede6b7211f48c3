"""The published selections in NumPy: which pages or tokens each one reads (`lath.select`).

Every function takes q fp32 [S, Hq, L, D], the rows of each sequence, a cache without lists and a
`Wish`, and returns int32 [S, H, K] as `lath.formats.selection.IndexList.indices`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lath.formats.attention import QueryFormat
from lath.formats.pages import PAGE
from lath.formats.selection import PageScore
from lath.reference import select, strata
from lath.reference.attention import Array, Cache
from lath.reference.pages import Page, read_page

Indices = NDArray[np.int32]
Rows = NDArray[np.int32]


@dataclass(frozen=True)
class Wish:
    """scale: of scores. lists: of a sequence, 1, Hkv or Hq. budget: pages, units or tokens of
    a list. recent: last full pages that are read in any case."""

    scale: float
    lists: int
    budget: int
    recent: int = 1


def pick(pooled: Array, cache: Cache, wish: Wish, rows: int, per_page: int) -> Indices:
    """The largest `budget` of pooled scores [S, H, W], and what is read in any case: the last
    `recent` pages and those that hold keys behind the position of the first of `rows` rows.

    per_page: scores of a page, of 64 / per_page tokens each.
    """
    scores = pooled.copy()
    hidden = 0  # the most of any sequence
    for s in range(len(scores)):
        number, own = int(cache.page_counts[s]), 0
        for entry in range(number):
            end = int(cache.starts[s, entry]) + int(cache.counts[s, entry])
            late = rows > 1 and end > int(cache.lengths[s]) - rows + 1
            own += late
            if entry >= number - wish.recent or late:
                count = -(-int(cache.counts[s, entry]) * per_page // PAGE)
                scores[s, :, entry * per_page : entry * per_page + count] = np.inf
        hidden = max(hidden, own)
    return select.top_k(scores, wish.budget + (wish.recent + hidden) * per_page)


def slots_of_units(indices: Indices, cache: Cache, size: int) -> Indices:
    """Lists of units [S, H, K] → of the slots of their tokens [S, H, K size], -1 at the end."""
    slots = np.full((*indices.shape[:2], indices.shape[2] * size), -1, np.int32)
    for s, head in np.ndindex(indices.shape[:2]):
        own = [size * i + t for i in indices[s, head] if i >= 0 for t in range(size)]
        own = [slot for slot in own if slot % PAGE < cache.counts[s, slot // PAGE]]
        slots[s, head, : len(own)] = own
    return slots


def hide(scores: Array, cache: Cache, per_page: int) -> Array:
    """Scores [S, Hq, L, W], -inf for pages that hold keys behind the first row's position."""
    rows, hidden = scores.shape[2], scores.copy()
    for s in range(len(scores) if rows > 1 else 0):
        for entry in range(int(cache.page_counts[s])):
            end = int(cache.starts[s, entry]) + int(cache.counts[s, entry])
            if end > int(cache.lengths[s]) - rows + 1:
                hidden[s, :, :, entry * per_page : (entry + 1) * per_page] = -np.inf
    return hidden


def part_mass(q: NDArray[np.floating], cache: Cache, scale: Array | float) -> Array:
    """log Σ exp(score) [S, Hq, L] over the float parts."""
    sequences, heads, rows, _ = q.shape
    scores = np.full((sequences, heads, rows, 2 * PAGE), -np.inf)
    group = heads // cache.records.shape[1]
    for side, (keys, lengths) in enumerate(
        ((cache.first_keys, cache.first_lengths), (cache.last_keys, cache.last_lengths))
    ):
        if keys is None or lengths is None:
            continue
        for s, head in np.ndindex(sequences, heads):
            own = keys[s, head // group, : lengths[s]].astype(np.float64)
            at = side * PAGE
            scores[s, head, :, at : at + len(own)] = q[s, head] @ own.T
    scores = np.where(np.isneginf(scores), -np.inf, scores * np.asarray(scale)[..., None])
    return log_sum(scores)


def log_sum(scores: Array) -> Array:
    """log Σ exp over the last axis, -inf of nothing."""
    largest = scores.max(axis=-1, initial=-np.inf)
    shift = np.where(np.isneginf(largest), 0, largest)
    with np.errstate(divide="ignore"):
        total: Array = shift + np.log(np.exp(scores - shift[..., None]).sum(axis=-1))
        return total


def by_page(
    q: NDArray[np.float32],
    rows: Rows,
    cache: Cache,
    wish: Wish,
    kind: PageScore,
    size: int = PAGE,
) -> Indices:
    """Quest ("bound") and the centroid ("mean", "mass"), by pages or by units of `size` tokens."""
    own, per_page = cache if size == PAGE else strata.cut(cache, size), PAGE // size
    scores = hide(select.page_scores(q, rows, own, kind, wish.scale), cache, per_page)
    chosen = pick(select.pool(scores, wish.lists), cache, wish, q.shape[2], per_page)
    return chosen if size == PAGE else slots_of_units(chosen, cache, size)


def token_select(
    q: NDArray[np.float32], rows: Rows, cache: Cache, wish: Wish, query: QueryFormat
) -> Indices:
    """TokenSelect: the softmax of each query head over all tokens, summed over a list's heads."""
    count = q.shape[2]
    if count > 1:
        own = np.arange(count) < rows[:, None]
        mean = (q * own[:, None, :, None]).sum(axis=2, keepdims=True)
        q = (mean / np.maximum(rows, 1)[:, None, None, None]).astype(np.float32)
        rows = np.minimum(rows, 1)
    scores = select.token_scores(q, rows, cache, wish.scale, query)
    scores = _hide_for(scores, cache, count)
    extra = part_mass(q, cache, wish.scale)
    return pick(select.pool(scores, wish.lists, extra), cache, wish, count, PAGE)


def _hide_for(scores: Array, cache: Cache, rows: int) -> Array:
    """`hide` for scores of one row that stands for several."""
    return hide(np.repeat(scores, rows, axis=2), cache, PAGE)[:, :, : scores.shape[2]]


def hgca(
    q: NDArray[np.float32], rows: Rows, cache: Cache, wish: Wish, query: QueryFormat, share: float
) -> Indices:
    """HGCA: tokens with more than `share` times the mean weight of the softmax."""
    scores = hide(select.token_scores(q, rows, cache, wish.scale, query), cache, PAGE)
    total = np.logaddexp(log_sum(scores), part_mass(q, cache, wish.scale))
    weights = np.exp(scores - np.where(np.isneginf(total), 0, total)[..., None])
    votes = weights.reshape(len(q), wish.lists, -1, scores.shape[-1]).mean(axis=2)
    votes[~(votes * np.maximum(cache.lengths, 1)[:, None, None] > share)] = -np.inf
    return pick(votes, cache, wish, q.shape[2], PAGE)


def by_channels(
    q: NDArray[np.float32],
    rows: Rows,
    cache: Cache,
    wish: Wish,
    label_channels: Indices,
    rows_of: Indices,
    bits: int,
    sparq: bool,
) -> Indices:
    """Double Sparsity and, with the temperature of SparQ, SparQ.

    label_channels: [Hkv, C]; rows_of: [S, Hq, R], as for `select.label_scores`.
    """
    labels, scales = make_labels(cache, label_channels, bits)
    scores = select.label_scores(
        q, rows, cache, labels, scales, label_channels, rows_of, wish.scale
    )
    extra = None
    if sparq:
        group = q.shape[1] // len(label_channels)
        used = np.zeros(q.shape)
        for s, head in np.ndindex(q.shape[:2]):
            own = label_channels[head // group, rows_of[s, head]]
            used[s, head][:, own] = q[s, head][:, own]
        share = np.abs(used).sum(-1) / np.maximum(np.abs(q.astype(np.float64)).sum(-1), 1e-30)
        factor = 1 / np.sqrt(np.maximum(share, 1e-30))
        scores = scores * factor[..., None]
        extra = part_mass(used, cache, wish.scale * factor)
    pooled = select.pool(hide(scores, cache, PAGE), wish.lists, extra)
    return pick(pooled, cache, wish, q.shape[2], PAGE)


def sparq_rows(q: NDArray[np.float32], count: int) -> Indices:
    """The `count` channels [S, Hq, count] of largest Σ|q| over a head's rows; ties: the lower."""
    sizes = np.abs(q).sum(axis=2)
    return np.argsort(-sizes, axis=-1, kind="stable")[..., :count].astype(np.int32)


def pages_of(cache: Cache) -> dict[tuple[int, int], Page]:
    """Every page in use by number and KV head."""
    heads = range(cache.records.shape[1])
    numbers = {entry[0] for s in range(len(cache.lengths)) for entry in cache.entries(s, 0)}
    return {
        (n, h): read_page(
            cache.records[n, h], cache.index[n, h], cache.format, cache.dtype, cache.draft
        )
        for n in numbers
        for h in heads
    }


def make_labels(
    cache: Cache, label_channels: Indices, bits: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Labels int8 [N, Hkv, C, 64] and scales fp32 [N, Hkv] of `select.write_labels`."""
    heads, count = label_channels.shape
    labels = np.zeros((len(cache.records), heads, count, PAGE), np.int8)
    scales = np.ones((len(cache.records), heads), np.float32)
    exact = bits == 8 and cache.format.key.name in ("int8", "int8-planes")
    for (number, head), page in pages_of(cache).items():
        own = select.write_labels(page, label_channels[head], bits, exact)
        labels[number, head], scales[number, head] = own
    return labels, scales


def farthest(page: Page, mean: Array, written: int) -> int:
    """The token whose key lies farthest from the page's stored mean; ties: the first."""
    return int(np.square(page.keys[:written] - mean).sum(axis=1).argmax())


def with_outliers(scores: Array, cache: Cache, wish: Wish, rows: int, per_page: int) -> Indices:
    """Pooled scores [S, H, W], so many of a page, and before them the outlier of every page, all of
    them within the budget, which is of tokens; but what is read in any case comes first."""
    heads = cache.records.shape[1]
    wide, pages = scores.repeat(PAGE // per_page, axis=2), pages_of(cache)
    for s, head in np.ndindex(len(wide), heads):
        for i, (number, _, count, _) in enumerate(cache.entries(s, head)):
            row = select.read_index(cache.index[number, head], cache.format)
            token = farthest(pages[number, head], row.mean, row.tokens)
            lists = range(wide.shape[1]) if wide.shape[1] == 1 else range(
                head * wide.shape[1] // heads, (head + 1) * wide.shape[1] // heads
            )  # fmt: skip
            for own in lists:
                wide[s, own, PAGE * i + count : PAGE * (i + 1)] = -np.inf
                if token < count:
                    wide[s, own, PAGE * i + token] = np.finfo(np.float32).max
    return pick(wide, cache, wish, rows, PAGE)


def refined(
    q: NDArray[np.float32],
    rows: Rows,
    cache: Cache,
    wish: Wish,
    pooled: Array,
    factor: int,
    query: QueryFormat,
) -> Indices:
    """Tokens by the soft vote over `factor` times the budget of candidates: the pages of the
    largest of the pooled scores [S, H, W] of another selector."""
    pages = pooled.reshape(*pooled.shape[:2], cache.table.shape[1], -1).max(axis=-1)
    chosen = select.top_k(pages, max(factor * wish.budget // PAGE, 1))
    scores = hide(select.token_scores(q, rows, cache, wish.scale, query), cache, PAGE)
    group = q.shape[1] // wish.lists
    for s, head in np.ndindex(chosen.shape[:2]):
        others = ~np.isin(np.arange(pages.shape[2]), chosen[s, head]).repeat(PAGE)
        scores[s, head * group : (head + 1) * group, :, others] = -np.inf
    votes = select.pool(scores, wish.lists, part_mass(q, cache, wish.scale))
    return pick(votes, cache, wish, q.shape[2], PAGE)


def paged_eviction(
    q: NDArray[np.float32], rows: Rows, cache: Cache, wish: Wish, size: int = PAGE
) -> Indices:
    """PagedEviction: the mean over a page's or unit's tokens of |v| / |k|."""
    kv_heads, per_page = cache.records.shape[1], PAGE // size
    scores = np.full((len(q), kv_heads, cache.table.shape[1] * per_page), -np.inf)
    pages = pages_of(cache)
    for s, head in np.ndindex(len(q), kv_heads):
        for i, (number, _, count, _) in enumerate(cache.entries(s, head)):
            written = select.read_index(cache.index[number, head], cache.format).tokens
            page = pages[number, head]
            norms = np.linalg.norm(page.keys[:written], axis=1)
            ratios = np.linalg.norm(page.values[:written], axis=1) / np.maximum(norms, 1e-30)
            for part in range(-(-count // size)):
                own = ratios[part * size : (part + 1) * size]
                scores[s, head, i * per_page + part] = own.mean()
    if wish.lists == 1:
        scores = scores.mean(axis=1, keepdims=True)
    scores = scores.repeat(max(wish.lists // kv_heads, 1), axis=1)
    chosen = pick(scores, cache, wish, q.shape[2], per_page)
    return chosen if size == PAGE else slots_of_units(chosen, cache, size)


def k_means(x: Array, clusters: int, rounds: int) -> tuple[Array, NDArray[np.int64]]:
    """Cosine k-means of x [n, D]: centroids [C, D] (means of x as it is) and each row's cluster.

    Begins at rows n c // C; a tie goes to the lower cluster; an empty one keeps its direction.
    """
    directions = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    centres = directions[np.arange(clusters) * len(x) // clusters]
    for _ in range(rounds):
        cluster_of = (directions @ centres.T).argmax(axis=1)
        for c in range(clusters):
            total = directions[cluster_of == c].sum(axis=0)
            if np.abs(total).sum() > 0:
                centres[c] = total / np.linalg.norm(total)
    cluster_of = (directions @ centres.T).argmax(axis=1)
    means = [x[cluster_of == c].mean(axis=0) if (cluster_of == c).any() else 0 * x[0]
             for c in range(clusters)]  # fmt: skip
    return np.stack(means), cluster_of


def cluster_kv(
    q: NDArray[np.float32],
    rows: Rows,
    cache: Cache,
    wish: Wish,
    segments: list[list[int]],
    tokens_per_cluster: int,
    rounds: int = 10,
) -> Indices:
    """ClusterKV: whole clusters by q·centroid, the last one cut to the budget.

    segments: of each sequence the numbers of pages that are clustered together, in order; pages
    behind them are not clustered and must be among the last `wish.recent`.
    """
    sequences, heads, count, _ = q.shape
    kv_heads = cache.records.shape[1]
    scores = np.full((sequences, heads, count, cache.table.shape[1] * PAGE), -np.inf)
    pages = pages_of(cache)
    for s, head in np.ndindex(sequences, kv_heads):
        entries, at = cache.entries(s, head), 0
        own = q[s, head * heads // kv_heads : (head + 1) * heads // kv_heads].astype(np.float64)
        for size in segments[s]:
            keys = np.concatenate([pages[e[0], head].keys for e in entries[at : at + size]])
            clusters = max(len(keys) // tokens_per_cluster, 1)
            centroids, cluster_of = k_means(keys, clusters, rounds)
            ranked = wish.scale * (own @ centroids.T)[..., cluster_of]
            place = slice(head * heads // kv_heads, (head + 1) * heads // kv_heads)
            scores[s, place, :, at * PAGE : (at + size) * PAGE] = ranked
            at += size
        for i, (_, _, tokens, _) in enumerate(entries):
            scores[s, :, :, i * PAGE + tokens : (i + 1) * PAGE] = -np.inf
    return pick(select.pool(scores, wish.lists), cache, wish, count, PAGE)


def top_mass(lower: Array, upper: Array, extra: Array, scores: Array, mass: float) -> list[int]:
    """How many of the best entries hold `mass` for certain, for each list of one sequence.

    lower, upper: [Hq, L, W] bounds of log Σ exp of each entry; extra: [Hq, L], of what is read in
    any case; scores: [H, W], whose order is taken.
    """
    needed = []
    for head, own in enumerate(scores):
        order, most = np.argsort(-own, kind="stable"), 0
        per = lower.shape[0] // len(scores)
        for row, i in np.ndindex(per, lower.shape[1]):
            low, high = (side[head * per + row, i][order] for side in (lower, upper))
            for k in range(1, len(order) + 1):
                held = np.logaddexp(log_sum(low[:k]), extra[head * per + row, i])
                if 1 / (1 + math.exp(min(log_sum(high[k:]) - held, 700))) >= mass:
                    break
            most = max(most, k)
        needed.append(most)
    return needed
