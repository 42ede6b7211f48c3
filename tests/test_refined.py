"""Tokens among the candidates of another selector: `quest+tokens`."""

from __future__ import annotations

import pytest
import torch
from cases_select import BACKENDS, DIM, GROUP, HEADS, make_cache
from test_strata import KERNELS, seeded

import lath
from lath.formats.pages import PAGE
from lath.selectors import Outliers, Quest, Refined


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", ["kv", "query", "layer"])
def test_of_all_pages_it_is_the_vote_over_all(heads: str, backend: str) -> None:
    """With every page a candidate the inner selector has no say."""
    kv, q = make_cache(1100, batch=2, backend=backend)
    everything = lath.select(q, kv, "tokenselect", 128, heads=heads)
    for inner in ("quest", "centroid-16", "paged_eviction", "double_sparsity"):
        ids = lath.select(q, kv, f"{inner}+tokens-8", 128, heads=heads)
        assert torch.equal(ids.indices, everything.indices)
    # Negative control: with fewer it has.
    few = lath.select(q, kv, "centroid+tokens-2", 128, heads=heads)
    assert not torch.equal(few.indices, everything.indices)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("codec", ["int8", "int4", "float"])
def test_kernels_read_candidates(codec: str, backend: str) -> None:
    """Lists of the compiled kernels and of the definition, of pages that were cropped too."""
    lists = []
    for own in ("reference", backend):
        kv, q = make_cache(1100, batch=2, codec=codec)
        kv.crop(700)
        more = [torch.randn(2, HEADS, 300, DIM, generator=seeded(i)) for i in (1, 2)]
        kv.append(*more)
        ids = [lath.select(q, kv, "centroid+tokens", 64, heads=heads, backend=own)
               for heads in ("kv", "query", "layer")]  # fmt: skip
        lists.append([own for one in ids for rows in one.tolist() for own in rows])
    for expected, got in zip(*lists, strict=True):
        # Two scores that are equal up to fp32 may stand the other way about.
        assert len(set(expected) ^ set(got)) <= 2


def test_a_needle_among_tokens_that_score_less() -> None:
    """Its page is no more than the second; two pages are not read for it, 64 tokens are."""
    keys = 0.1 * torch.randn(1, HEADS, 64 + 20 * PAGE, DIM, generator=seeded(1))
    q = torch.ones(1, HEADS * GROUP, 1, DIM)
    keys[:, :, 64 + 3 * PAGE : 64 + 4 * PAGE] += 0.2  # a page of tokens that all score a little
    keys[:, :, 64 + 9 * PAGE + 5] = 3.0
    kv = lath.PagedKV(HEADS, DIM, dtype=torch.float32, backend="reference")
    kv.append(keys, torch.randn(keys.shape, generator=seeded(2)))
    needle = 9 * PAGE + 5
    plain = lath.select(q, kv, "centroid", 64, recent=0)
    assert all(needle // PAGE not in own for own in plain.tolist()[0])
    refined = lath.select(q, kv, "centroid+tokens-2", 64, recent=0)
    assert all(needle in own and len(own) == 64 for own in refined.tolist()[0])
    # Negative control: a page of candidates is the page that is read.
    one = lath.select(q, kv, "centroid+tokens-1", 64, recent=0)
    assert all(needle not in own for own in one.tolist()[0])


def test_several_rows_and_none() -> None:
    kv, _ = make_cache(700)
    q = torch.randn(1, HEADS * GROUP, 70, DIM, generator=seeded(1))
    ids = lath.select(q, kv, "quest+tokens", 128)
    late = [i for i, start in enumerate(kv.view().starts[0].tolist()) if start + PAGE > 631]
    for own in ids.tolist()[0]:
        assert {i // PAGE for i in own} >= set(late)
        assert len(own) == 128 + 2 * PAGE  # one for the last page, one for the hidden
    for tokens in (0, 40, 127):
        kv, q = make_cache(tokens)
        assert lath.select(q, kv, "quest+tokens", 64).counts.sum() == 0


def test_names_and_what_it_refuses() -> None:
    for text in ("quest+tokens", "centroid-mass-16+tokens-8", "quest+tokens+outliers"):
        assert str(lath.selector(text)) == text
    assert lath.selector("tokenselect+tokens").default_heads == "layer"
    assert lath.selector("hgca+tokens").recent == 4
    for wrong, match in (
        ("quest+tokens-0", "whole number"), ("quest+tokens+tokens", "by itself"),
        ("quest+outliers+tokens", "by itself"), ("quest+token", "must be one of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            lath.selector(wrong)
    with pytest.raises(TypeError, match="inner must be a Selector"):
        Refined("quest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="factor must be"):
        Refined(Quest(), 0)
    with pytest.raises(ValueError, match="by itself"):
        Refined(Outliers(Quest()))
    with pytest.raises(NotImplementedError, match="needs bounds"):
        lath.Selection.parse("quest+tokens:p0.9")
