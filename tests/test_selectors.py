"""Each selector against its definition, and against what its paper promises on built data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases_select import (
    BACKENDS,
    DIM,
    GROUP,
    HEADS,
    defined,
    make_cache,
    spelled,
)
from torch import Tensor

import lath
from cases_attention import as_array, as_cache
from lath.formats.pages import PAGE
from lath.reference import select as reference
from lath.reference import selectors as definition
from lath.selectors import SELECTORS, DoubleSparsity, SparQ
from lath.verbs.selection import Selecting


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", ["kv", "query", "layer"])
@pytest.mark.parametrize(
    "name",
    [
        *map(spelled, SELECTORS), "quest-16", "centroid-8", "centroid-mass", "centroid-mass-32",
        "paged_eviction-16", "quest+outliers", "centroid-mass+outliers", "quest-16+outliers",
        "centroid+tokens-2", "quest-16+tokens-2",
    ],
)  # fmt: skip
def test_equals_its_definition(name: str, heads: str, backend: str) -> None:
    kv, q = make_cache(batch=2, backend=backend)
    lists = {"kv": HEADS, "query": HEADS * GROUP, "layer": 1}[heads]
    kind = lath.selector(name)
    budget = 100 if kind.unit == 1 else 3 * PAGE // kind.unit
    wish = definition.Wish(DIM**-0.5, lists, budget, kind.recent)
    expected = defined(name, q, kv, wish)
    tokens = budget * kind.unit
    ids = lath.select(q, kv, kind, tokens, heads=heads)
    assert tuple(ids.indices.shape) == expected.shape
    assert ids.granularity == kind.granularity
    got = ids.tolist()
    for s, head in np.ndindex(expected.shape[:2]):
        own = [int(i) for i in expected[s, head] if i >= 0]
        assert got[s][head] == sorted(set(got[s][head]))
        # Lists may differ only where two scores are equal up to fp32: one entry in a hundred.
        different = set(got[s][head]) ^ set(own)
        allowed = 0 if backend == "reference" else 2 * (len(own) // 100 + 1) * (kind.unit == 1)
        assert len(different) <= allowed, f"{name} {heads} {backend} sequence {s} list {head}"


@pytest.mark.parametrize("name", [*SELECTORS, "quest-16", "centroid-mass-8", "sparq+outliers"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_is_dense_attention(name: str, backend: str) -> None:
    """A budget of the length or more: the same bits, with repair too."""
    kv, q = make_cache(backend=backend)
    dense = lath.decode_attention(q, kv, return_lse=True)
    for budget in (len(kv), 10**9, 1.0):
        ids = lath.select(q, kv, name, budget)
        for repair in (False, True, "mean"):
            got = lath.decode_attention(q, kv, pages=ids, repair=repair, return_lse=True)
            assert torch.equal(got[0], dense[0])
            assert torch.equal(got[1], dense[1])


@pytest.mark.parametrize("name", [*SELECTORS, "quest-16", "centroid-mass", "paged_eviction-8"])
def test_several_rows_read_their_own_tokens(name: str) -> None:
    """Pages that hold the rows' own tokens are always read; a list serves all rows."""
    kv, _ = make_cache(700)
    q = torch.randn(1, HEADS * GROUP, 70, DIM, generator=torch.Generator().manual_seed(1))
    ids = lath.select(q, kv, name, 128)
    whole = lath.index_list([[[*range(len(kv.spans[0].pages))]]], kv)
    # The first row stands at 630: it may not read all of the pages from 624 on.
    late = [i for i, start in enumerate(kv.view().starts[0].tolist()) if start + PAGE > 631]
    unit = 1 if ids.granularity == "page" else PAGE
    for own in ids.tolist()[0]:
        assert {i // unit for i in own} >= set(late)
    dense = lath.decode_attention(q, kv)
    assert torch.equal(lath.decode_attention(q, kv, pages=whole), dense)
    repaired = lath.decode_attention(q, kv, pages=ids, repair=True)
    dropped = lath.decode_attention(q, kv, pages=ids)
    assert (repaired - dense).abs().sum() < (dropped - dense).abs().sum()


# Quest


def test_quest_finds_the_page_of_the_largest_score() -> None:
    """The bound is rigorous: a page with a key that answers the query is never ranked below pages
    whose bound is smaller than that score."""
    kv, q = make_cache(2000)
    view = kv.view()
    scores = reference.token_scores(
        as_array(q), np.ones(1, np.int32), as_cache(view, q.dtype), DIM**-0.5, "float"
    )
    largest = scores.reshape(1, HEADS * GROUP, 1, -1, PAGE).max(-1)
    cache, rows = as_cache(view, q.dtype), np.ones(1, np.int32)
    bounds = reference.page_scores(as_array(q), rows, cache, "bound", DIM**-0.5)
    assert (bounds >= largest - 1e-9).all()


# Outliers


@pytest.mark.parametrize("inner", ["centroid", "paged_eviction", "clusterkv", "tokenselect"])
def test_the_outlier_of_every_page_is_read(inner: str) -> None:
    """Planted tokens, of each head its own; behind a crop they do not count."""
    generator = torch.Generator().manual_seed(8)
    keys = torch.randn(1, HEADS, 64 + 9 * PAGE, DIM, generator=generator)
    planted = torch.randint(0, PAGE, (HEADS, 9), generator=generator)
    planted[:, 8] = 50
    for head, page in np.ndindex(HEADS, 9):
        keys[0, head, 64 + PAGE * page + planted[head, page]] *= 4
    kv = lath.PagedKV(HEADS, DIM, dtype=torch.float32, backend="reference")
    kv.append(keys, torch.randn(keys.shape, generator=generator))
    q = torch.zeros(1, HEADS * GROUP, 1, DIM)  # whatever the query
    q[..., 0] = 1e-3
    wanted = {
        (head, PAGE * page + int(planted[head, page])) for head in (0, 1) for page in range(9)
    }
    for heads, budget in (("kv", 9), ("query", 9), ("layer", 18)):
        ids = lath.select(q, kv, f"{inner}+outliers", budget, heads=heads, recent=0)
        lists = ids.tolist()[0]
        for head in range(HEADS * GROUP):
            own = set(lists[head * len(lists) // (HEADS * GROUP)])
            assert {slot for h, slot in wanted if h == head // GROUP} <= own
            assert len(own) == budget
    # Negative control: without them they are not all read, with the room for them.
    bare = lath.select(q, kv, inner, 9, heads="kv", recent=0).tolist()[0]
    if lath.selector(inner).granularity == "token":
        assert any((h, slot) in wanted and slot not in bare[h] for h, slot in wanted)
    kv.crop(64 + 8 * PAGE + 20)
    ids = lath.select(q, kv, f"{inner}+outliers", 8, heads="kv", recent=0)
    assert all(slot < 8 * PAGE for own in ids.tolist()[0] for slot in own)


def test_outliers_leave_what_is_read_in_any_case() -> None:
    """More pages than tokens in the budget: the last page is read wholly all the same."""
    kv, q = make_cache(64 * 12)
    for own in lath.select(q, kv, "quest+outliers", 5).tolist()[0]:
        assert len(own) == 5 + 64
        assert set(range(64 * 10, 64 * 11)) <= set(own)


def test_outliers_of_what() -> None:
    named = lath.selector("quest-16+outliers")
    assert (str(named), named.default_heads, named.claims_mass) == (
        "quest-16+outliers",
        "kv",
        False,
    )
    assert lath.selector("tokenselect+outliers").default_heads == "layer"
    assert lath.selector("hgca+outliers").recent == 4
    assert lath.Selection.parse("sparq+outliers:64", repair="mean").selector.claims_mass
    for wrong in ("quest+outliers+outliers", "+outliers", "quest+outlier"):
        with pytest.raises(ValueError, match=r"inner must|selector must"):
            lath.selector(wrong)
    with pytest.raises(NotImplementedError, match="needs bounds"):
        lath.Selection.parse("quest+outliers:p0.9")


# SparQ


def test_sparq_with_all_channels_is_the_exact_top_k() -> None:
    kv, q = make_cache(1500)
    ids = lath.select(q, kv, SparQ(DIM), 200, heads="query", recent=0)
    # int8 q of `recall`'s scores against the unrounded one here: a tie or two may fall otherwise.
    assert lath.recall(q, kv, ids).min() > 0.98
    two = lath.select(q, kv, SparQ(2), 200, heads="query", recent=0)
    assert lath.recall(q, kv, two).mean() < 0.7


def test_sparq_mixes_in_the_mean_value() -> None:
    """repair="mean" is α o + (1 - α) mean(V), α what the list claims to hold."""
    kv, q = make_cache(1500)
    ids = lath.select(q, kv, SparQ(8), 100)
    assert ids.mass is not None
    o = lath.decode_attention(q, kv, pages=ids)
    mixed = lath.decode_attention(q, kv, pages=ids, repair="mean")
    _, values = kv.dequantize(0)
    mean = values.mean(dim=1).repeat_interleave(GROUP, dim=0)[None, :, None]
    alpha = ids.mass[..., None]
    assert 0.05 < float(alpha.min()) <= float(alpha.max()) < 1
    # Index rows keep the mean of a page's values in bfloat16.
    torch.testing.assert_close(mixed, alpha * o + (1 - alpha) * mean, atol=4e-3, rtol=0)


def test_sparq_misses_a_needle_outside_its_channels_and_says_so() -> None:
    kv, q = make_cache(0)
    keys = torch.randn(1, HEADS, 1000, DIM, generator=torch.Generator().manual_seed(5))
    q = torch.ones(1, HEADS * GROUP, 1, DIM)
    q[..., :8] = 1.5  # the channels that SparQ reads
    keys[:, :, 500] = 0
    keys[:, :, 500, 8:] = 12.0
    kv.append(keys, torch.randn(1, HEADS, 1000, DIM, generator=torch.Generator().manual_seed(6)))
    needle = 500 - PAGE
    blind = lath.select(q, kv, SparQ(8), 64)
    seeing = lath.select(q, kv, SparQ(DIM), 64)
    assert all(needle not in own for own in blind.tolist()[0])
    assert all(needle in own for own in seeing.tolist()[0])
    assert lath.captured_mass(q, kv, blind).max() < 0.05
    assert lath.captured_mass(q, kv, seeing).min() > 0.9


# Double Sparsity


def planted_channels(count: int) -> tuple[lath.PagedKV, Tensor, Tensor]:
    """Keys that live on `count` channels of each head."""
    generator = torch.Generator().manual_seed(9)
    keys = 0.01 * torch.randn(1, HEADS, 1500, DIM, generator=generator)
    channels = torch.stack([torch.arange(count) * 3 % DIM, torch.arange(count) * 3 % DIM + 1])
    for head in range(HEADS):
        keys[0, head, :, channels[head]] = torch.randn(1500, count, generator=generator)
    kv = lath.PagedKV(HEADS, DIM, dtype=torch.float32, backend="reference")
    kv.append(keys, torch.randn(1, HEADS, 1500, DIM, generator=generator))
    return kv, keys, channels.sort(dim=-1).values


def test_double_sparsity_finds_the_channels() -> None:
    kv, keys, channels = planted_channels(8)
    q = torch.randn(1, HEADS * GROUP, 1, DIM, generator=torch.Generator().manual_seed(2))
    assert torch.equal(lath.double_sparsity_channels(keys, 8), channels)
    assert torch.equal(lath.double_sparsity_channels(keys, 8, q), channels)
    found = lath.select(q, kv, DoubleSparsity(8), 100, recent=0)
    given = lath.select(q, kv, DoubleSparsity(indices=channels), 100, recent=0)
    assert torch.equal(found.indices, given.indices)
    assert lath.recall(q, kv, found).min() > 0.97
    seven = lath.recall(q, kv, lath.select(q, kv, DoubleSparsity(7), 100, recent=0))
    assert seven.mean() < 0.9


def test_labels_take_their_share_of_the_bytes() -> None:
    kv, q = make_cache(1500)
    codes = kv.format.fields["keys"].nbytes
    for bits, share in ((8, 4 / DIM), (4, 2 / DIM)):
        before = kv.pool.nbytes
        lath.select(q, kv, DoubleSparsity(4, bits=bits), 100)
        pages = len(kv.pool.references)
        scales = 4 * HEADS * pages
        assert kv.pool.nbytes - before - scales == codes * share * HEADS * pages
    coarse = lath.select(q, kv, DoubleSparsity(DIM, bits=4), 300, recent=0)
    assert lath.recall(q, kv, coarse).min() > 0.85


def test_a_page_that_is_used_again_gets_new_labels() -> None:
    kv, q = make_cache(1000)
    lath.select(q, kv, "sparq-8", 100)
    other, _ = make_cache(1000, seed=3)
    keys, values = other.dequantize(0)
    kv.crop(0)
    kv.append(keys[None].contiguous(), values[None].contiguous())
    fresh = lath.PagedKV(HEADS, DIM, dtype=torch.float32, backend="reference")
    fresh.append(keys[None].contiguous(), values[None].contiguous())
    for name in ("sparq-8", "quest-16", "paged_eviction", "clusterkv"):
        again, new = (lath.select(q, cache, name, 128).indices for cache in (kv, fresh))
        assert torch.equal(again, new), name


# TokenSelect


def test_the_soft_vote_is_not_the_sum_of_the_scores() -> None:
    """Three heads want a token that a loud fourth one rejects: a sum of scores drops it."""
    kv = lath.PagedKV(1, DIM, dtype=torch.float32, backend="reference")
    keys = torch.zeros(1, 1, 500, DIM)
    keys[0, 0, 200, 0] = 4.0
    keys[0, 0, 300, 1] = 10.0
    kv.append(keys, torch.randn(1, 1, 500, DIM, generator=torch.Generator().manual_seed(1)))
    q = torch.zeros(1, 4, 1, DIM)
    q[0, :3, 0, 0] = 8.0
    q[0, 3, 0, 0], q[0, 3, 0, 1] = -40.0, 8.0
    sums = (q[0, :, 0] @ keys[0, 0].T).sum(0)
    assert int(sums.argmax()) == 300
    assert int(sums.argmin()) == 200
    (own,) = lath.select(q, kv, "tokenselect", 1, recent=0).tolist()[0]
    assert own == [200 - PAGE]


def test_the_selection_cache_serves_like_queries() -> None:
    kv, q = make_cache(1500)
    at_work = Selecting(lath.Selection.parse("tokenselect:100", reuse_cosine=0.9))
    first = at_work.lists(q, kv)
    assert at_work.lists(1.5 * q, kv) is first
    orthogonal = q.flip(-1) * torch.tensor([1.0, -1.0]).repeat(DIM // 2)
    second = at_work.lists(orthogonal, kv)
    assert second is not first
    assert second is not None
    assert not torch.equal(second.indices, first.indices)  # type: ignore[union-attr]
    more = torch.randn(1, HEADS, 70, DIM, generator=torch.Generator().manual_seed(8))
    kv.append(more, more)  # a page fills: the list no longer holds the last one
    assert at_work.lists(orthogonal, kv) is not second
