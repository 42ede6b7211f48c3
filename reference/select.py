"""The definition of selection over pages in NumPy, float64 inside: scores, lists, repair.

Scores of a page, from its index row alone (q a row of one query head, μ the mean that was taken
from its keys, σ² = scale² Σ q² deviation²):

    mean    scale q·μ                                              the page's centroid
    bound   scale (q·μ + unit (relu(q)·max - relu(-q)·min))        >= every score (Quest 2406.10774)
    mass    scale q·μ + f(σ) + ln n, f(σ) = σ²/2 up to σ = F, then σF - F²/2     ≈ log Σ exp(score)
    floor   scale (q·μ - Σ|q| (|μ| 2**-8 + unit/2)) + ln n         <= log Σ exp(score), by convexity

n: tokens that count; F: `FREEZING`. `floor` needs μ to be the mean of just the tokens that count;
where fewer count than were written it takes the least score, scale (q·μ - unit (relu(-q)·max -
relu(q)·min)) + ln n. Pages that a sequence has not got score -inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lath.formats.attention import QueryFormat
from lath.formats.pages import PAGE, PageFormat
from lath.formats.selection import FREEZING, LOGISTIC, Granularity, PageScore
from lath.reference import floats
from lath.reference.attention import Array, Cache, page_tile, raw_scores
from lath.reference.pages import Page, read_page


@dataclass(frozen=True)
class IndexRow:
    """An index row read back: mean, max, min (index units), deviation, value_mean per channel; the
    index unit and the tokens that were written."""

    mean: Array
    largest: Array
    smallest: Array
    deviation: Array
    value_mean: Array
    unit: float
    tokens: int


def read_index(row: NDArray[np.uint8], fmt: PageFormat) -> IndexRow:
    fields = {name: row[f.offset : f.end] for name, f in fmt.index_fields.items()}
    numbers = fields["numbers"].view(np.float32).astype(np.float64)
    keys, values = slice(fmt.key_dim), slice(fmt.value_dim)

    def bfloat16(name: str) -> Array:
        return floats.from_bfloat16_bits(fields[name].view(np.uint16)).astype(np.float64)

    return IndexRow(
        bfloat16("mean")[keys],
        fields["max"].view(np.int8).astype(np.float64)[keys],
        fields["min"].view(np.int8).astype(np.float64)[keys],
        fields["deviation"].astype(np.float64)[keys] * numbers[0] / 2,
        bfloat16("value_mean")[values],
        float(numbers[0]),
        int(numbers[1]),
    )


def spread(q: Array, row: IndexRow, scale: float) -> Array:
    """σ [R] of the scores of a page for rows q [R, D]."""
    return scale * np.sqrt((q**2) @ (row.deviation**2))


def log_mean(sigma: Array) -> Array:
    """f(σ): log of the mean of exp over a page's scores, relative to their mean."""
    frozen = sigma * FREEZING - FREEZING**2 / 2
    return np.where(sigma <= FREEZING, sigma**2 / 2, frozen)


def page_score(q: Array, row: IndexRow, count: int, kind: PageScore, scale: float) -> Array:
    """Scores [R] of one page with `count` tokens for rows q [R, D]."""
    centre = q @ row.mean
    above, below = np.maximum(q, 0), np.maximum(-q, 0)
    if kind == "mean":
        return scale * centre
    if kind == "bound":
        return scale * (centre + row.unit * (above @ row.largest - below @ row.smallest))
    if kind == "mass":
        return scale * centre + log_mean(spread(q, row, scale)) + math.log(count)
    if count == row.tokens:
        slack = np.abs(q) @ (np.abs(row.mean) * 2.0**-8 + row.unit / 2)
    else:
        slack = row.unit * (below @ row.largest - above @ row.smallest)
    return scale * (centre - slack) + math.log(count)


def each_page(
    q: NDArray[np.float32], query_lengths: NDArray[np.int32], cache: Cache
) -> Iterator[tuple[tuple[int, int, slice, int], NDArray[np.float32], tuple[int, int], int, int]]:
    """Every page that rows of every query head may read, in order.

    Place in scores [S, Hq, L, P], the rows [R, D], (page, KV head), position and tokens.
    """
    group = q.shape[1] // cache.records.shape[1]
    for s, head in np.ndindex(q.shape[:2]):
        rows = slice(int(query_lengths[s]))
        for i, (number, start, count, _) in enumerate(cache.entries(s, head // group)):
            if count:  # a stratum behind the last token of its page has none
                yield (s, head, rows, i), q[s, head, rows], (number, head // group), start, count


def page_scores(
    q: NDArray[np.float32],
    query_lengths: NDArray[np.int32],
    cache: Cache,
    kind: PageScore,
    scale: float,
) -> Array:
    """q [S, Hq, L, D] → [S, Hq, L, P]; -inf for unused entries and rows a sequence has not got.

    cache: without lists.
    """
    scores = np.full((*q.shape[:3], cache.table.shape[1]), -np.inf)
    for at, rows, place, _, count in each_page(q, query_lengths, cache):
        row = read_index(cache.index[place], cache.format)
        scores[at] = page_score(rows.astype(np.float64), row, count, kind, scale)
    return scores


def token_scores(
    q: NDArray[np.float32],
    query_lengths: NDArray[np.int32],
    cache: Cache,
    scale: float,
    query: QueryFormat,
) -> Array:
    """q [S, Hq, L, D] → [S, Hq, L, 64 P]: the scores that attention computes, token by token.

    query: how q is rounded over quantised keys, as in `attend`. -inf for tokens that do not count.
    """
    scores = np.full((*q.shape[:3], cache.table.shape[1], PAGE), -np.inf)
    for at, rows, place, start, count in each_page(q, query_lengths, cache):
        page = read_page(
            cache.records[place], cache.index[place], cache.format, cache.dtype, cache.draft
        )
        tile = page_tile(start, count, page, cache.format)
        scores[at][:, :count] = scale * raw_scores(rows, tile, query)
    return scores.reshape(*q.shape[:3], -1)


def write_labels(
    page: Page, channels: NDArray[np.int32], bits: int, exact: bool
) -> tuple[NDArray[np.int8], np.float32]:
    """Labels of a page: centred keys on some channels, int8 [C, 64] and their scale.

    bits: 8 or 4 (codes -127 .. 127 or -7 .. 7, scale amax/127 or amax/7 over channels and tokens, 1
    where amax is 0). exact: keys are int8 codes and bits is 8: the labels are those codes.
    """
    if exact:
        return page.key_codes[:, channels].T.astype(np.int8), page.key_scales[0]
    centred = page.key_codes * page.key_scales.astype(np.float64)[:, None]
    own = np.nan_to_num(centred[:, channels].T, nan=0, posinf=0, neginf=0).astype(np.float32)
    levels = np.float32(127 if bits == 8 else 7)
    amax = np.abs(own).max(initial=0)
    safe = np.float32(amax) if amax > 0 else np.float32(1)
    codes = np.rint(own * (levels / safe))
    return codes.astype(np.int8), safe / levels if amax > 0 else np.float32(1)


def pack_labels(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Labels of 4 bits int8 [C, 64] → uint8 [C, 32]: tokens t (low half) and t + 32 in one byte."""
    halves = codes.view(np.uint8) & 15
    packed: NDArray[np.uint8] = (halves[:, :32] | (halves[:, 32:] << 4)).astype(np.uint8)
    return packed


def label_scores(
    q: NDArray[np.float32],
    query_lengths: NDArray[np.int32],
    cache: Cache,
    labels: NDArray[np.int8],
    label_scales: NDArray[np.float32],
    label_channels: NDArray[np.int32],
    rows_of: NDArray[np.int32],
    scale: float,
) -> Array:
    """q [S, Hq, L, D] → [S, Hq, L, 64 P]: q·k over some channels only.

    labels: int8 [N, Hkv, C, 64], label_scales: fp32 [N, Hkv] of `write_labels`; label_channels:
    int32 [Hkv, C], the channel of each row of labels. rows_of: int32 [S, Hq, R], which rows of
    labels a query head reads. -inf for tokens that do not count.
    """
    scores = np.full((*q.shape[:3], cache.table.shape[1], PAGE), -np.inf)
    for at, rows, place, _, count in each_page(q, query_lengths, cache):
        chosen = rows_of[at[:2]]
        channels = label_channels[place[1], chosen]
        own = rows.astype(np.float64)[:, channels]
        mean = read_index(cache.index[place], cache.format).mean
        if cache.format.key.map == "float":
            mean = np.zeros_like(mean)
        codes = labels[place][chosen, :count].astype(np.float64)
        products = own @ codes * float(label_scales[place]) + (own @ mean[channels])[:, None]
        scores[at][:, :count] = scale * products
    return scores.reshape(*q.shape[:3], -1)


def pool(scores: Array, heads: int, extra: Array | None = None) -> Array:
    """Scores [S, Hq, L, P] → [S, heads, P], one list each: Σ over its rows of softmax(scores).

    The rows of a list are the tokens of the query heads that share it (a soft vote: TokenSelect
    2411.02886). extra: [S, Hq, L], log Σ exp of the scores of what is read in any case; it joins
    the denominators. A single row keeps its scores. Entries that no row can read stay -inf; a NaN
    makes its entry NaN.
    """
    sequences, query_heads, rows, width = scores.shape
    grouped = scores.reshape(sequences, heads, query_heads // heads * rows, width)
    if grouped.shape[2] == 1:
        return grouped[:, :, 0]
    known = np.where(np.isnan(grouped), -np.inf, grouped)
    others = np.full(grouped.shape[:3], -np.inf)
    if extra is not None:
        others = extra.reshape(grouped.shape[:3])
    largest = np.maximum(known.max(axis=-1, initial=-np.inf), others)[..., None]
    shift = np.where(np.isneginf(largest), 0, largest)
    total = np.exp(known - shift).sum(axis=-1, keepdims=True) + np.exp(others[..., None] - shift)
    votes = (np.exp(grouped - shift) / np.where(total == 0, 1, total)).sum(axis=2)
    return np.where(np.isneginf(grouped).all(axis=2), -np.inf, votes)


def top_k(scores: Array, k: int) -> NDArray[np.int32]:
    """Scores [..., P] → int32 [..., min(k, P)]: the largest k, ascending by index, -1 behind.

    The lower index wins a tie; -inf is never taken; NaN is larger than everything, so that what
    breaks a result is read and seen.
    """
    width = min(k, scores.shape[-1])
    out = np.full((*scores.shape[:-1], width), -1, np.int32)
    for place in np.ndindex(scores.shape[:-1]):
        own = np.where(np.isnan(scores[place]), np.inf, scores[place])
        above = np.isnan(scores[place])
        order = np.lexsort((np.arange(len(own)), -own, ~above))[:width]
        taken = np.sort(order[~np.isneginf(own[order])])
        out[place][: len(taken)] = taken
    return out


def choose(cache: Cache, indices: NDArray[np.int32], granularity: Granularity) -> Cache:
    """The cache with the lists [S, H, K] of an `IndexList`, H = Hkv or Hq (or 1: all KV heads)."""
    sequences, heads, _ = indices.shape
    kv_heads = cache.records.shape[1]
    width = max(indices.shape[2], 1)
    lists: dict[str, NDArray[Any]] = {
        name: np.zeros((sequences, heads, width), np.int32)
        for name in ("table", "starts", "counts")
    }
    tokens = np.zeros((sequences, heads, width), np.int64)
    page_counts = np.zeros((sequences, heads), np.int32)
    for s, head in np.ndindex(sequences, heads):
        own = indices[s, head][indices[s, head] >= 0]
        entries = np.unique(own if granularity == "page" else own // PAGE)
        for name, array in lists.items():
            array[s, head, : len(entries)] = getattr(cache, name)[s, entries]
        page_counts[s, head] = len(entries)
        for i, entry in enumerate(entries):
            mask = -1
            if granularity == "token":
                mask = sum(1 << int(slot % PAGE) for slot in own[own // PAGE == entry])
            tokens[s, head, i] = mask - (1 << 64) if mask >= 1 << 63 else mask
    if heads == 1:
        lists = {name: np.repeat(array, kv_heads, axis=1) for name, array in lists.items()}
        tokens, page_counts = (np.repeat(a, kv_heads, axis=1) for a in (tokens, page_counts))
    chosen = tokens if granularity == "token" else None
    return replace(
        cache, table=lists["table"], starts=lists["starts"], counts=lists["counts"],
        page_counts=page_counts, tokens=chosen,
    )  # fmt: skip


def unread_quantile(read: NDArray[np.int64], count: NDArray[np.int64]) -> Array:
    """z with Φ(z) = 1 - read/count, Φ the normal distribution function: +inf where nothing of a
    page was read, -inf where all was (or it has no tokens)."""
    from statistics import NormalDist

    z = np.where(read == 0, np.inf, -np.inf)
    z = np.where(count == 0, -np.inf, z)
    for place in np.argwhere((read > 0) & (read < count)):
        at = tuple(place)
        z[at] = NormalDist().inv_cdf(1 - float(read[at]) / float(count[at]))
    return z


def repair(
    q: NDArray[np.float32],
    query_lengths: NDArray[np.int32],
    cache: Cache,
    unread: Array,
    scale: float,
    spreads: bool = True,
) -> tuple[Array, Array]:
    """What the pages' index rows say of the tokens that were not read, to be merged with the rest.

    q [S, Hq, L, D] → o [S, Hq, L, E], lse [S, Hq, L]. cache: without lists. unread: z [S, H, P] of
    `unread_quantile`, H = 1, Hkv or Hq.

    The scores of a page are taken as normal with its own mean and spread σ, and the tokens that
    were read as its highest: what is left of Σ exp(score) is exp(mass) Φ(z - σ), with the value
    `value_mean`. Φ is the logistic function of LOGISTIC * x. A page with z = -inf adds nothing; one
    that is read nowhere (z = +inf) adds all of its mass. spreads False: σ = 0, every token of a
    page scores like its centroid; of a page that is read nowhere that is never too much, by
    convexity.
    """
    sequences, heads, rows, _ = q.shape
    lists, kv_heads = unread.shape[1], cache.records.shape[1]
    o = np.zeros((sequences, heads, rows, cache.format.value_dim))
    lse = np.full((sequences, heads, rows), -np.inf)
    for s in range(sequences):
        for head in range(heads):
            count_rows = int(query_lengths[s])
            own = q[s, head, :count_rows].astype(np.float64)
            scores, means = [], []
            kv_head = head // (heads // kv_heads)
            for i, (number, _, count, _) in enumerate(cache.entries(s, kv_head)):
                z = unread[s, head // (heads // lists), i]
                if np.isneginf(z):
                    continue
                row = read_index(cache.index[number, kv_head], cache.format)
                scores.append(rest_score(own, row, count, z, scale, spreads))
                means.append(row.value_mean)
            if not scores or not count_rows:
                continue
            e = np.stack(scores, axis=-1)
            largest = e.max(axis=-1, keepdims=True)
            weights = np.exp(e - largest)
            total = weights.sum(axis=-1, keepdims=True)
            o[s, head, :count_rows] = weights @ np.stack(means) / total
            lse[s, head, :count_rows] = (largest + np.log(total))[..., 0]
    return o, lse


def rest_score(q: Array, row: IndexRow, count: int, z: float, scale: float, spreads: bool) -> Array:
    """log Σ exp(score) [R] over what is left of a page, z > -inf of `unread_quantile`; see
    `repair`."""
    if not spreads:
        return page_score(q, row, count, "mean", scale) + math.log(count) + log_rest(np.array(z))
    mass = page_score(q, row, count, "mass", scale)
    return mass + log_rest(z - spread(q, row, scale))


def log_rest(x: Array) -> Array:
    """log of the logistic function of LOGISTIC * x, 0 at +inf."""
    return -np.logaddexp(0, -LOGISTIC * x)
