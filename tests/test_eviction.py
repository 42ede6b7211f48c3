"""Eviction policies: against their definitions, step by step, and what they must never touch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lath
from lath.reference import select as reference_select
from lath.reference import store as definition
from lath.verbs.eviction import PagedEviction, Scope, norm_ratios
from lath.verbs.page_backends import as_cache
from tools.caches import assert_same
from tools.decoding import DIM, GROUP, HEADS, VALUE_DIM, assert_close, filled, held, numbers, query
from tools.dense_attention import dense_attention


def feed(length: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens whose norms vary from stretch to stretch."""
    size = 1 + numbers(batch, 1, -(-length // 16), 1, seed=seed + 2).abs()
    size = size.repeat_interleave(16, dim=2)[:, :, :length]
    k = numbers(batch, HEADS, length, DIM, seed=seed)
    return k * size, numbers(batch, HEADS, length, VALUE_DIM, seed=seed + 1) / size


def page_ratio(kv: lath.PagedKV, s: int, entry: int) -> float:
    """The definition's score of a whole page, from what the cache reads back."""
    span = kv.spans[s]
    at = span.first + sum(span.counts[:entry])
    k, v = (x[:, at : at + span.counts[entry]].double().numpy() for x in kv.dequantize(s))
    return definition.norm_ratio(k, v)


@pytest.mark.parametrize("codec", ["float", "int8", "int4"])
@pytest.mark.parametrize("recent", [0, 1, 2])
@pytest.mark.parametrize("budget", [319, 300, 256])
def test_paged_eviction_step_by_step(codec: str, recent: int, budget: int) -> None:
    """Which pages go is the definition's; the budget holds after every step."""
    policy = PagedEviction(budget, recent)
    scales = torch.linspace(0.5, 2, HEADS * DIM).reshape(HEADS, DIM) if codec == "int8" else None
    kv = filled(0, codec, batch=2, key_channel_scales=scales)
    k, v = feed(700, batch=2)
    steps = [(0, 130), *((i, i + 1) for i in range(130, 200)), (200, 450), (450, 451), (451, 700)]
    evictions = 0
    for begin, end in steps:
        counts = [end - begin, (end - begin) // 2]
        kv.append(k[:, :, begin:end], v[:, :, begin:end], counts)
        expected = []
        for s, span in enumerate(kv.spans):
            scores = [page_ratio(kv, s, i) for i in range(len(span.pages))]
            gone = definition.evicted(scores, span.counts, span.tokens, budget, recent)
            expected.append([page for i, page in enumerate(span.pages) if i not in gone])
            evictions += len(gone)
        lengths = kv.lengths
        policy.step(kv)
        assert [span.pages for span in kv.spans] == expected
        assert max(kv.tokens) <= budget
        assert kv.lengths == lengths
        for span in kv.spans:
            assert len(set(span.pages)) == len(span.pages)
            assert span.first_at == range(min(span.length, 64))  # sinks
            newest = [p[-1] for p in span.pages_at][len(span.pages) - recent :]
            paged = (span.length - 64) // 64 * 64
            if recent and paged > 0:
                assert newest[-1] == 64 + paged - 1  # the newest page
        assert kv.exact_positions
    assert evictions > 5
    assert kv.pool.pages_in_use == sum(len(span.pages) for span in kv.spans)


def test_a_page_goes_when_one_fills() -> None:
    """Where budget + 1 is a whole number of pages: then, and only then."""
    policy = PagedEviction(64 * 5 - 1)
    kv = filled(0)
    k, v = feed(640)
    for i in range(640):
        kv.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        before = kv.tokens[0]
        policy.step(kv)
        fills = (i + 1) % 64 == 0 and i + 1 >= 320
        assert before - kv.tokens[0] == (64 if fills else 0)


def test_what_stays_is_what_is_read() -> None:
    policy = PagedEviction(256)
    kv = filled(0, "float")
    k, v = feed(600)
    kv.append(k, v)
    policy.step(kv)
    positions = kv.positions(0)
    q = query(1)
    got = lath.decode_attention(q, kv, return_lse=True)
    left = k[:, :, positions], v[:, :, positions]
    assert_close(got, dense_attention(q, *left, causal=True))
    assert all(torch.equal(a, b) for a, b in zip(held(kv), left, strict=True))
    whole = dense_attention(q, k, v, causal=True)
    assert (got[0] - whole[0]).abs().max() > 1e-3  # negative control: something is missing


def test_scores_follow_pages_that_are_used_again() -> None:
    """A page number that is taken anew has a new score; one that is not is decoded once."""
    kv = filled(0)
    k, v = feed(300)
    kv.append(k, v)
    first = norm_ratios(kv)[kv.spans[0].pages].tolist()
    assert first == pytest.approx([page_ratio(kv, 0, i) for i in range(3)], rel=1e-12)
    pages = list(kv.spans[0].pages)
    kv.crop(64)
    kv.append(2 * v[:, :, :200, :DIM], v[:, :, :200])
    assert sorted(kv.spans[0].pages) == sorted(pages)  # the same numbers
    again = norm_ratios(kv)[kv.spans[0].pages].tolist()
    assert again == pytest.approx([page_ratio(kv, 0, i) for i in range(3)], rel=1e-12)
    kv.crop(100)  # a page that is cut keeps its score: its bytes are the same
    assert norm_ratios(kv)[kv.spans[0].pages].tolist() == again[:1]


def test_broken_pages_stay_and_are_seen() -> None:
    kv = filled(0)
    k, v = feed(448)
    v[:, :, 100] = math.nan  # in the first page
    k[:, :, 128:192] = 0  # the second: an infinite ratio
    kv.append(k, v)
    PagedEviction(256).step(kv)
    assert {128, 64} <= set(kv.spans[0].starts)


@pytest.mark.parametrize("recent", [0, 1])
def test_prompts_are_thinned_out_before_they_are_stored(recent: int) -> None:
    policy = PagedEviction(320, recent)
    k, v = feed(500, batch=2)
    k[1, :, 77] = 0
    v[1, :, 77] = 0  # 0/0
    keep = policy.keep(k, v)
    for s in (0, 1):
        ratios = [
            definition.norm_ratio(k[s, :, [i]].double().numpy(), v[s, :, [i]].double().numpy())
            for i in range(500)
        ]
        assert keep[s] == definition.tokens_kept(np.array(ratios), 320, 64, 64 * recent)
        assert len(keep[s]) == 320
    assert 77 in keep[1]
    kv = filled(0, batch=2)
    kv.append(k, v, keep=keep)
    assert (kv.lengths, kv.tokens) == ([500, 500], [320, 320])
    assert kv.positions(0) == keep[0]
    before = kv.fork()
    policy.step(kv)
    assert_same(kv, before)
    kv.append(*feed(1, batch=2))
    policy.step(kv)
    assert kv.tokens == [257, 257]
    q = query(1, batch=2)
    got = lath.decode_attention(q, kv, return_lse=True)
    for s in (0, 1):
        expected = dense_attention(q[s : s + 1], *held(kv, s), causal=True)
        assert_close([x[s : s + 1] for x in got], expected)
    assert policy.keep(k[:, :, :320], v[:, :, :320]) == [list(range(320))] * 2


@pytest.mark.parametrize("interval", [1, 16, 100])
@pytest.mark.parametrize("prefill", [200, 192, 30])
def test_scope_leaves_the_prompt_and_bounds_the_rest(prefill: int, interval: int) -> None:
    budget = 64 * 3 + interval
    policy = Scope(budget, prefill, interval, recent=1)
    kv = filled(0, "int8")
    k, v = feed(900)
    kv.append(k[:, :, :prefill], v[:, :, :prefill])
    policy.step(kv, query(prefill))
    first = kv.first_keys.clone()
    prompt = list(kv.spans[0].pages)
    record = kv.pool.records[prompt].clone()
    changes = 0
    for i in range(prefill, 900):
        kv.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        q = query(1, seed=i)
        expected = scope_by_definition(kv, q, policy)
        before = kv.spans[0].copy()
        policy.step(kv, q)
        assert kv.spans[0].pages == expected
        assert kv.lengths == [i + 1]
        assert sum(position >= prefill for position in kv.positions(0)) <= budget
        if kv.spans[0].pages != before.pages:
            changes += 1
            assert (i + 1 - prefill) % interval == 0
        assert kv.positions(0)[:prefill] == list(range(prefill))
    assert kv.spans[0].pages[: len(prompt)] == prompt
    assert torch.equal(kv.pool.records[prompt], record)
    used = min(prefill, 64)
    assert torch.equal(kv.first_keys[:, :, :used], first[:, :, :used])
    assert changes >= (900 - prefill - budget) // max(64 * 2, interval)


def scope_by_definition(kv: lath.PagedKV, q: Tensor, policy: Scope) -> list[int]:
    """The pages that stay, with scores of the NumPy definition and one page after the other."""
    span, prefill = kv.spans[0], policy.prefill
    assert isinstance(prefill, int)
    decoded = span.length - prefill
    held_now = sum(position >= prefill for position in span.positions)
    limit = policy.budget - policy.interval + 1
    if decoded % policy.interval or held_now <= limit:
        return list(span.pages)
    view = kv.view()
    scores = reference_select.page_scores(
        q.numpy(), np.array([1]), as_cache(view, q.dtype), "mass", DIM**-0.5
    )
    votes = reference_select.pool(scores, 1)[0, 0]
    outside = sum(first < prefill for first in span.starts)
    gone = definition.evicted(
        list(votes[outside:]), span.counts[outside:], held_now, limit, policy.recent
    )
    return [page for i, page in enumerate(span.pages) if i - outside not in gone]


def test_scope_takes_what_queries_read() -> None:
    """Pages along the query stay, the others go; chunks of several rows count as many tokens."""
    kv = filled(0, batch=2)
    k, v = feed(640, batch=2)
    direction = torch.ones(DIM) * 0.5
    loud = [slice(192, 256), slice(320, 384)]
    for part in loud:
        k[:, :, part] += 4 * direction
    kv.append(k, v, [640, 500])
    policy = Scope(64 * 5, [128, 128], interval=64)
    q = direction.expand(2, HEADS * GROUP, 64, DIM) + 0.01 * query(64, batch=2)
    policy.step(kv, q)
    for span in kv.spans:
        assert {192, 320} <= set(span.starts)
        assert span.starts[0] == 64  # of the prompt
    assert kv.tokens[0] == 128 + 256
    tokens = kv.tokens
    kv.append(k[:, :, :10], v[:, :, :10])
    policy.step(kv, q[:, :, :10])  # 512 + 10: no multiple of 64 went by
    assert kv.tokens == [n + 10 for n in tokens]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PagedEviction(191), ValueError, "budget must be at least 192 tokens"),
        (lambda: PagedEviction(1.5), TypeError, "budget must be an int"),
        (lambda: PagedEviction(1000, -1), ValueError, "recent must be 0 or more"),
        (lambda: Scope(192, 10), ValueError, "budget must be at least 193"),
        (lambda: Scope(500, -1), ValueError, "prefill must be 0 or more, got -1"),
        (lambda: Scope(500, [3, -1]), ValueError, "prefill must be 0 or more, got -1"),
        (lambda: Scope(500, 1.0), TypeError, "prefill must be"),
        (lambda: Scope(500, 1, 0), ValueError, "interval must be 1 or more"),
        (lambda: Scope(500, 1, scale=0.0), ValueError, "scale must be finite and greater"),
        (lambda: Scope(500, 1).step(filled(70)), TypeError, "q must be the queries"),
        (lambda: Scope(500, 1).step(filled(70), query(1)[:, :3]), ValueError, "q must have"),
        (lambda: Scope(500, [1, 2]).step(filled(70), query(1)), ValueError, "prefill must have"),
        (lambda: PagedEviction(500).step(3), TypeError, "kv must be a lath.PagedKV, got int"),
        (lambda: PagedEviction(500).keep(query(1), query(2)), ValueError, "v must be"),
        (lambda: PagedEviction(500).keep(1, query(2)), TypeError, "k must be a torch.Tensor"),
    ],
)
def test_bad_policies(make: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
