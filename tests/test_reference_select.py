"""The definition of selection against float64 attention, brute force and exact limits."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases_attention import CATALOGUE, AttentionCase, as_cache, dense_queries, make_attention
from lath.formats.pages import PAGE, PAGE_CODECS, PageCodec, PageFormat
from lath.formats.selection import FREEZING, LOGISTIC
from lath.reference import attention, pages, select, selectors
from lath.reference.attention import Array

CASES = [c for c in CATALOGUE if not {"lists", "packed"} & set(c.words) and c.rows < 30]


def setting(case: AttentionCase) -> tuple[Any, Any, Any, float]:
    queries, view, options = make_attention(case)
    cache = as_cache(view, queries.q.dtype)
    return dense_queries(queries), queries.lengths.numpy(), cache, options.scale


def exact_scores(q: Any, rows: Any, cache: Any, scale: float) -> Array:
    """Scores [S, Hq, L, P, 64] with keys decoded one by one, in float64."""
    scores = np.full((*q.shape[:3], cache.table.shape[1], PAGE), -np.inf)
    group = q.shape[1] // cache.records.shape[1]
    for s, head in itertools.product(range(len(q)), range(q.shape[1])):
        for i, (number, _, count, _) in enumerate(cache.entries(s, head // group)):
            place = number, head // group
            page = pages.read_page(
                cache.records[place], cache.index[place], cache.format, cache.dtype, cache.draft
            )
            for row in range(rows[s]):
                keys = page.keys[:count]
                scores[s, head, row, i, :count] = scale * (keys @ q[s, head, row].astype(float))
    return scores


@pytest.mark.parametrize("case", [c for c in CASES if "draft" not in c.words], ids=str)
def test_bound_and_floor_hold_for_every_page(case: AttentionCase) -> None:
    q, rows, cache, scale = setting(case)
    scores = exact_scores(q, rows, cache, scale)
    bound = select.page_scores(q, rows, cache, "bound", scale)
    floor = select.page_scores(q, rows, cache, "floor", scale)
    mean = select.page_scores(q, rows, cache, "mean", scale)
    there = ~np.isneginf(scores).all(-1)
    slack = 1e-9 * (1 + np.abs(np.where(there, bound, 0)))
    with np.errstate(invalid="ignore"):
        assert (np.where(there, bound - scores.max(-1), 0) >= -slack).all()
        mass = selectors.log_sum(scores)
        assert (np.where(there, mass - floor, 0) >= -slack).all()
        assert (np.where(there, bound - mean, 0) >= -slack).all()
    for kind in ("bound", "mean", "floor", "mass"):
        given = select.page_scores(q, rows, cache, kind, scale)  # type: ignore[arg-type]
        assert np.array_equal(np.isneginf(given), ~there)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_token_scores_are_those_of_attention(case: AttentionCase) -> None:
    """A softmax over them and the values is `attend` over the same pages."""
    q, rows, cache, scale = setting(case)
    _, _, options = make_attention(case)
    scores = select.token_scores(q, rows, cache, scale, options.query)
    plain = attention.Options(scale, query=options.query)
    for s in range(len(q)):
        length = int(cache.lengths[s])
        if length == 0 or rows[s] == 0:
            continue
        tiles = [cache.tiles(s, head) for head in range(cache.records.shape[1])]
        expected = attention.scores(q[s, :, : rows[s]], tiles, length, plain)
        for i, (_, start, count, _) in enumerate(cache.entries(s, 0)):
            got = scores[s, :, : rows[s], i * PAGE : i * PAGE + count]
            np.testing.assert_allclose(got, expected[:, :, start : start + count], rtol=1e-12)


def test_log_mean_lies_between_a_page_and_many() -> None:
    """Of many pages the mean of exp is exp(σ²/2); one page of 64 tokens hardly ever has as much."""
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((20000, PAGE))
    for sigma in (0.3, 1.0, 2.0, 4.0, 8.0):
        means = np.exp(sigma * sample).mean(axis=1)
        estimate = float(select.log_mean(np.array(sigma)))
        assert np.median(np.log(means)) - 1e-3 <= estimate <= sigma**2 / 2 + 1e-12
        assert sigma > 2 or abs(math.log(means.mean()) - estimate) < 0.1
        assert sigma < 3 or estimate < sigma**2 / 2 - 0.1
    assert math.isclose(float(select.log_mean(np.array(FREEZING))), math.log(PAGE))
    step = 1e-6
    slope = (
        select.log_mean(np.array(FREEZING + step)) - select.log_mean(np.array(FREEZING))
    ) / step
    assert math.isclose(float(slope), FREEZING, rel_tol=1e-4)


def test_the_logistic_function_is_close_to_the_normal_one() -> None:
    x = np.linspace(-6, 6, 2001)
    normal = np.array([NormalDist().cdf(value) for value in x])
    assert np.abs(np.exp(select.log_rest(x)) - normal).max() < 0.0096
    assert select.log_rest(np.array(np.inf)) == 0
    assert math.isclose(float(select.log_rest(np.array(-50.0))), -50 * LOGISTIC)


# Lists


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.5, math.inf, -math.inf, math.nan]), max_size=12),
    st.integers(0, 14),
)
def test_top_k_by_brute_force(values: list[float], k: int) -> None:
    def key(i: int) -> tuple[float, float, int]:
        above = math.isnan(values[i])
        return (0.0 if above else 1.0, 0.0 if above else -values[i], i)

    best = sorted(range(len(values)), key=key)[:k]
    expected = sorted(i for i in best if values[i] != -math.inf)
    width = min(k, len(values))
    got = select.top_k(np.array([values]), k)
    assert got.shape == (1, width)
    assert got[0].tolist() == expected + [-1] * (width - len(expected))


def test_pool_is_a_vote() -> None:
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((2, 4, 3, 7))
    scores[0, :, :, 5] = -np.inf
    extra = rng.standard_normal((2, 4, 3))
    got = select.pool(scores, 2, extra)
    for s, head, i in itertools.product(range(2), range(2), range(7)):
        votes = []
        for h, row in itertools.product((2 * head, 2 * head + 1), range(3)):
            own = np.exp(scores[s, h, row])
            votes.append(own[i] / (own.sum() + math.exp(extra[s, h, row])))
        if np.isneginf(scores[s, 2 * head, 0, i]):
            assert np.isneginf(got[s, head, i])
        else:
            assert math.isclose(got[s, head, i], sum(votes), rel_tol=1e-12)
    assert select.pool(scores[:, :, :1], 4).tolist() == scores[:, :, 0].tolist()
    scores[1, 2, 1, 3] = np.nan
    assert np.argwhere(np.isnan(select.pool(scores, 2))).tolist() == [[1, 1, 3]]


@pytest.mark.parametrize("codec", PAGE_CODECS)
def test_labels_with_all_channels_are_the_keys(codec: str) -> None:
    case = AttentionCase(f"{codec}/int8", "4/2", "64/64", 2, "300", "fp32", "int8",
                         "parts;e4m3" if codec == "e4m3" else "parts")  # fmt: skip
    q, rows, cache, scale = setting(case)
    every = np.tile(np.arange(64, dtype=np.int32), (2, 1))
    labels, scales = selectors.make_labels(cache, every, 8)
    rows_of = np.tile(np.arange(64, dtype=np.int32), (1, 4, 1))
    got = select.label_scores(q, rows, cache, labels, scales, every, rows_of, scale)
    expected = exact_scores(q, rows, cache, scale).reshape(got.shape)
    # int8 codes as they are; others rounded once more, half a step of each channel at most.
    tolerance = 1e-9
    if not codec.startswith("int8"):
        tolerance = scale * np.abs(q).sum(-1).max() * scales.max() / 2 * 1.001
    there = ~np.isneginf(expected)
    assert np.array_equal(there, ~np.isneginf(got))
    assert np.abs(got - expected)[there].max() <= tolerance
    packed = select.pack_labels(np.clip(labels[0, 0], -7, 7))
    low, high = (packed & 15).astype(np.int8), (packed >> 4).astype(np.int8)
    halves = np.concatenate([low, high], axis=1)
    assert np.array_equal(np.where(halves >= 8, halves - 16, halves), np.clip(labels[0, 0], -7, 7))


# Repair


def constant_pages(values: Array, keys: Array) -> Any:
    """A cache of one head whose pages hold one key and one value each."""
    fmt = PageFormat(PageCodec("int8"), PageCodec("float"), keys.shape[1], values.shape[1], 4)
    written = [
        pages.write_page(
            np.repeat(k[None], PAGE, 0).astype(np.float32),
            np.repeat(v[None], PAGE, 0).astype(np.float32), fmt,
        )
        for k, v in zip(keys, values, strict=True)
    ]  # fmt: skip
    number = len(keys)
    table = np.arange(number, dtype=np.int32)[None]
    return attention.Cache(
        fmt, np.stack([w[0] for w in written])[:, None], np.stack([w[1] for w in written])[:, None],
        table, table * PAGE, np.full_like(table, PAGE), np.array([number], np.int32),
        np.array([number * PAGE], np.int32),
    )  # fmt: skip


def test_repair_of_equal_tokens_is_exact() -> None:
    """Pages without spread: what was not read is known wholly, at any share that was read."""
    rng = np.random.default_rng(2)
    # Numbers of bfloat16, so that means are stored as they are.
    keys, values = (np.round(rng.standard_normal((6, 16)) * 4) / 4 for _ in range(2))
    cache = constant_pages(values, keys)
    q = rng.standard_normal((1, 1, 2, 16)).astype(np.float32)
    rows = np.array([2], np.int32)
    o, lse = attention.attend(q, rows, cache, attention.Options(0.5, query="float"))
    for read in ([0, 0, 0, 0, 0, 0], [64, 0, 64, 0, 0, 64], [64] * 6):
        unread = select.unread_quantile(np.array([[read]]), np.full((1, 1, 6), PAGE))
        taken = np.array([[[i for i in range(6) if read[i]]]], np.int32).reshape(1, 1, -1)
        parts = [
            attention.attend(q, rows, select.choose(cache, taken, "page"),
                             attention.Options(0.5, query="float")),
            select.repair(q, rows, cache, unread, 0.5),
        ]  # fmt: skip
        got = attention.merge(parts)
        np.testing.assert_allclose(got[0], o, atol=1e-9)
        np.testing.assert_allclose(got[1], lse, atol=1e-9)
    half = select.repair(q, rows, cache, np.zeros((1, 1, 6)), 0.5)  # the half was read: Φ(0)
    np.testing.assert_allclose(half[1], lse - math.log(2), atol=1e-9)


def test_repair_adds_up() -> None:
    """Over two sets of pages it is the merge of both; nothing left is 0 and -inf."""
    q, rows, cache, scale = setting(AttentionCase(rows=2, lengths="500,90"))
    rng = np.random.default_rng(3)
    own = rng.random((2, 4, cache.table.shape[1])) < 0.5
    parts = [
        select.repair(q, rows, cache, np.where(m, np.inf, -np.inf), scale) for m in (own, ~own)
    ]
    whole = select.repair(q, rows, cache, np.full(own.shape, np.inf), scale)
    merged = attention.merge(parts)
    np.testing.assert_allclose(merged[0], whole[0], atol=1e-12)
    np.testing.assert_allclose(merged[1], whole[1], atol=1e-12)
    nothing = select.repair(q, rows, cache, np.full((2, 1, own.shape[2]), -np.inf), scale)
    assert not nothing[0].any()
    assert np.isneginf(nothing[1]).all()


def test_centroids_never_add_too_much() -> None:
    """Of pages that were not read: no more than they hold (convexity), and what is equal to all of
    it where keys do not differ; with spreads it can be more."""
    q, rows, cache, scale = setting(AttentionCase(rows=1, lengths="500,90"))
    q = q * 6  # sharp, so that spreads matter
    unread = np.full((2, 1, cache.table.shape[1]), np.inf)
    exact = select.token_scores(q, rows, cache, scale, "float")
    held = np.logaddexp.reduce(exact, axis=-1)
    # A mean that was rounded to bfloat16, and codes: half an index unit of each channel.
    widest = max(
        float(np.abs(q).sum(-1).max() * (np.abs(row.mean).max() * 2.0**-8 + row.unit / 2))
        for row in (
            select.read_index(cache.index[n, h], cache.format)
            for s in range(2) for h in range(2) for n, *_ in cache.entries(s, h)
        )
    )  # fmt: skip
    with_spreads = select.repair(q, rows, cache, unread, scale)[1]
    centroids = select.repair(q, rows, cache, unread, scale, spreads=False)[1]
    there = np.isfinite(held)
    assert (centroids[there] <= held[there] + scale * widest).all()
    assert (with_spreads[there] > centroids[there]).all()
    assert held[there].mean() - centroids[there].mean() > 2 * scale * widest  # the slack is small
    half = select.repair(q, rows, cache, np.zeros_like(unread), scale, spreads=False)[1]
    np.testing.assert_allclose(half[there], centroids[there] - math.log(2), atol=1e-9)


def test_the_read_part_is_taken_off_the_top() -> None:
    """Of normal scores, the rest of Σ exp after the highest were read is Φ(z - σ) of it."""
    rng = np.random.default_rng(4)
    for sigma, read in itertools.product((0.5, 1.0, 2.0), (4, 16, 48)):
        scores = np.sort(rng.standard_normal((3000, PAGE)) * sigma, axis=1)
        rest = np.exp(scores[:, : PAGE - read]).sum() / np.exp(scores).sum()
        z = select.unread_quantile(np.array([read]), np.array([PAGE]))[0]
        assert abs(math.exp(select.log_rest(np.array(z - sigma))) - rest) < 0.03
        assert rest < (PAGE - read) / PAGE  # what the count alone would say is too much


def test_unread_quantile_ends() -> None:
    z = select.unread_quantile(np.array([0, 64, 32, 0, 3]), np.array([64, 64, 64, 0, 3]))
    assert z.tolist() == [np.inf, -np.inf, 0.0, -np.inf, -np.inf]
