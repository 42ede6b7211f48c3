"""Selectors that cluster, threshold, or look at no query, and budgets by mass, on built data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases_select import DIM, GROUP, HEADS, make_cache

import lath
from cases_attention import as_array, as_cache
from lath import selectors
from lath.formats.pages import PAGE
from lath.formats.selection import IndexList
from lath.reference import select as reference
from lath.reference import selectors as definition
from lath.selectors import SELECTORS, ClusterKV, SparQ
from lath.selectors.clusterkv import k_means

# ClusterKV


def test_planted_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(4)
    centres = torch.nn.functional.normalize(torch.randn(5, DIM, generator=generator), dim=-1)
    member = torch.randint(5, (300,), generator=generator)
    member[torch.arange(5) * 60] = torch.arange(5)  # where k-means begins
    x = 5 * centres[member] + 0.05 * torch.randn(300, DIM, generator=generator)
    centroids, cluster_of = k_means(x[None], 5, 10)
    assert torch.equal(cluster_of[0], member)
    means, expected = definition.k_means(x.double().numpy(), 5, 10)
    assert np.array_equal(cluster_of[0].numpy(), expected)
    np.testing.assert_allclose(centroids[0].numpy(), means, atol=1e-5)


def test_singleton_clusters_are_the_exact_top_k() -> None:
    kv, q = make_cache(700)
    ids = lath.select(q, kv, ClusterKV(1), 100, heads="query", recent=0)
    everything = lath.select(q, kv, SparQ(DIM), 100, heads="query", recent=0)
    same = [set(a) & set(b) for a, b in zip(ids.tolist()[0], everything.tolist()[0], strict=True)]
    assert min(len(both) for both in same) >= 99


def test_clusters_are_made_as_the_cache_grows() -> None:
    """What is younger than a window is read; the budget is kept; old segments stay."""
    kv, q = make_cache(1000)
    name = ClusterKV()
    lath.select(q, kv, name, 128)
    segments = kv.pool.constants[str(name)]
    assert [len(key) for key in segments] == [14]
    before = next(iter(segments.values()))
    more = torch.randn(1, HEADS, 64 * 7, DIM, generator=torch.Generator().manual_seed(8))
    kv.append(more, more)
    ids = lath.select(q, kv, name, 128)
    assert sorted(len(key) for key in segments) == [5, 14]
    assert any(segment is before for segment in segments.values())
    assert ids.counts.tolist() == [[128 + 5 * PAGE] * HEADS]


# HGCA


def test_hgca_is_a_merge_of_its_dense_and_its_sparse_part() -> None:
    kv, q = make_cache(1500)
    ids = lath.select(q, kv, "hgca-128", 300)
    assert len({*ids.counts.flatten().tolist()}) > 1  # ragged
    o, lse = lath.decode_attention(q, kv, pages=ids, return_lse=True)
    pages = len(kv.spans[0].pages)
    recent = 64 * (pages - 2)
    old = [[[i for i in own if i < recent] for own in ids.tolist()[0]]]
    sparse = padded(old)
    dense = lath.index_list([[[pages - 2, pages - 1]]], kv)
    # The float parts are read by both; take them out of one by an empty list.
    parts = [lath.decode_attention(q, kv, pages=p, return_lse=True) for p in (sparse, dense)]
    nothing = lath.decode_attention(q, kv, pages=lath.index_list([[[]]], kv), return_lse=True)
    weights = [torch.exp(lse - nothing[1]) for _, lse in parts]
    total = weights[0] + weights[1] - 1
    joined = (
        parts[0][0] * weights[0][..., None] + parts[1][0] * weights[1][..., None] - nothing[0]
    ) / total[..., None]
    torch.testing.assert_close(joined, o, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(nothing[1] + torch.log(total), lse, atol=2e-5, rtol=0)


def padded(lists: list[list[list[int]]]) -> IndexList:
    width = max(len(own) for rows in lists for own in rows)
    rows = [[own + [-1] * (width - len(own)) for own in rows] for rows in lists]
    indices = torch.tensor(rows, dtype=torch.int32)
    return IndexList(indices, (indices >= 0).sum(-1, dtype=torch.int32), "token")


# PagedEviction


def test_paged_eviction_reads_pages_of_large_values_and_small_keys() -> None:
    kv = lath.PagedKV(HEADS, DIM, dtype=torch.float32, backend="reference")
    keys = torch.randn(1, HEADS, 1000, DIM, generator=torch.Generator().manual_seed(0))
    values = torch.randn(1, HEADS, 1000, DIM, generator=torch.Generator().manual_seed(1))
    values[:, :, 192:256] *= 3  # the third page is entry 2
    keys[:, :, 448:512] *= 0.4
    kv.append(keys, values)
    q = torch.randn(1, HEADS * GROUP, 1, DIM, generator=torch.Generator().manual_seed(2))
    for scaled in (q, -q):  # whatever the query
        ids = lath.select(scaled, kv, "paged_eviction", 128)
        assert ids.tolist()[0] == [[2, 6, 13]] * HEADS


# Budgets by mass


@pytest.mark.parametrize("mass", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["quest", "centroid-mass", "tokenselect", "paged_eviction"])
def test_top_mass_holds_at_least_its_share(name: str, mass: float) -> None:
    """On keys of little spread the bounds are tight enough to leave something out."""
    kv = lath.PagedKV(HEADS, DIM, dtype=torch.float32, backend="reference")
    generator = torch.Generator().manual_seed(7)
    page = torch.randn(1, HEADS, 20, DIM, generator=generator).repeat_interleave(PAGE, dim=2)
    kv.append(page + 0.02 * torch.randn(page.shape, generator=generator), page)
    q = 2 * torch.randn(1, HEADS * GROUP, 1, DIM, generator=generator)
    ids = lath.select(q, kv, name, f"p{mass}")
    assert lath.captured_mass(q, kv, ids).min() >= mass * (1 - 1e-3)
    limit = 19 * (1 if ids.granularity == "page" else PAGE)
    assert mass > 0.9 or int(ids.counts.max()) < limit


def test_top_mass_is_the_smallest_list_of_its_definition() -> None:
    kv, q = make_cache(1500)
    ids = lath.select(q, kv, "tokenselect", "p0.7", recent=0)
    cache, rows = as_cache(kv.view(), q.dtype), np.ones(1, np.int32)
    scores = reference.token_scores(as_array(q), rows, cache, DIM**-0.5, "int8")
    extra = definition.part_mass(as_array(q), cache, DIM**-0.5)
    pooled = reference.pool(scores, 1, extra)
    expected = definition.top_mass(scores[0], scores[0], extra[0], pooled[0], 0.7)
    assert ids.counts.tolist() == [expected]


def test_selectors_without_bounds_say_so() -> None:
    kv, q = make_cache()
    for name in ("sparq", "double_sparsity", "clusterkv", "hgca"):
        with pytest.raises(NotImplementedError, match="bounds"):
            lath.select(q, kv, name, "p0.9")
    assert (
        lath.captured_mass(q, kv, lath.select(q, kv, selectors.HGCA(share=0), "p0.9")).min() > 0.899
    )


def test_scores_of_empty_rows_are_no_votes() -> None:
    """A sequence without rows in a ragged batch takes what is always read, and no NaN."""
    kv, _ = make_cache(700, batch=2)
    q = torch.randn(2, HEADS * GROUP, 3, DIM, generator=torch.Generator().manual_seed(3))
    for name in (*SELECTORS, "quest-16", "centroid-mass"):
        ids = lath.select(q, kv, name, 128, query_lengths=[3, 0])
        assert math.isfinite(float(ids.counts.float().sum()))
        o = lath.decode_attention(q, kv, pages=ids, repair=True, query_lengths=[3, 0])
        assert torch.isfinite(o).all(), name
        assert not o[1].any(), name
