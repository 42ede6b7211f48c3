"""`lath.select`, lists, budgets and repair as a user meets them: limits, bad input, evictions."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from cases_select import BACKENDS, DIM, GROUP, HEADS, make_cache

import lath
from lath.formats.pages import PAGE
from lath.formats.selection import IndexList
from lath.selectors import SELECTORS, selector
from lath.verbs.budgets import budget_units, parse_budget
from lath.verbs.selection import Selecting


def error(got: torch.Tensor, dense: torch.Tensor) -> float:
    return float((got - dense).abs().sum() / dense.abs().sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codec", ["int8", "int4", "float", "int8-planes"])
def test_attention_over_lists_is_attention_over_those_tokens(codec: str, backend: str) -> None:
    """Pages and tokens alike, one list each head, against a cache that holds nothing else."""
    kv, q = make_cache(700, backend=backend, codec=codec)
    keys, values = (part.float() for part in kv.dequantize(0))
    pages = len(kv.spans[0].pages)
    tail = 64 + 64 * pages
    generator = torch.Generator().manual_seed(3)
    lists = [
        [i for i in range(pages) if torch.rand((), generator=generator) < 0.5] for _ in range(4)
    ]
    slots = [
        [p for p in range(64, tail) if torch.rand((), generator=generator) < 0.2] for _ in range(4)
    ]
    for heads in (1, HEADS, HEADS * GROUP):
        for kind, chosen in (("page", lists[:heads]), ("token", slots[:heads])):
            ids = lath.index_list([chosen], kv, kind)
            o, lse = lath.decode_attention(
                q,
                kv,
                pages=ids,
                precision="float" if codec == "float" else "int16",
                return_lse=True,
            )
            for head in range(HEADS * GROUP):
                own = chosen[head * heads // (HEADS * GROUP)]
                if kind == "page":
                    own = [64 + 64 * page + t for page in own for t in range(PAGE)]
                read = [*range(64), *own, *range(tail, 700)]
                scores = keys[head // GROUP, read] @ q[0, head, 0] * DIM**-0.5
                expected = torch.softmax(scores, 0) @ values[head // GROUP, read]
                # q is rounded to 8 bits over quantised keys: half a step of each channel.
                assert (o[0, head, 0] - expected).abs().max() < (1e-4 if codec == "float" else 0.06)
                assert abs(float(lse[0, head, 0] - torch.logsumexp(scores, 0))) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_repair_halves_the_error_of_plain_data(backend: str) -> None:
    kv = lath.PagedKV(HEADS, DIM, dtype=torch.float32, backend=backend)
    generator = torch.Generator().manual_seed(11)
    keys = torch.randn(1, HEADS, 4000, DIM, generator=generator)
    kv.append(keys, torch.randn(1, HEADS, 4000, DIM, generator=generator) + 0.3)
    q = torch.randn(1, HEADS * GROUP, 1, DIM, generator=generator)
    dense = lath.decode_attention(q, kv)
    for name in ("quest", "centroid", "tokenselect", "hgca"):
        ids = lath.select(q, kv, name, 500)
        dropped = error(lath.decode_attention(q, kv, pages=ids), dense)
        repaired = error(lath.decode_attention(q, kv, pages=ids, repair=True), dense)
        assert repaired < dropped / 2, f"{name}: {dropped} to {repaired}"
    # Negative control: repairing with the wrong pages taken as read is no repair.
    wrong = IndexList(ids.indices * 0, ids.counts * 0 + 1, "page")
    assert error(lath.decode_attention(q, kv, pages=wrong, repair=True), dense) > 0.0


def test_a_list_of_nothing_reads_the_float_parts() -> None:
    kv, q = make_cache(700)
    nothing = lath.index_list([[[]]], kv)
    o, lse = lath.decode_attention(q, kv, pages=nothing, return_lse=True)
    keys, values = kv.dequantize(0)
    read = [*range(64), *range(64 + 64 * len(kv.spans[0].pages), 700)]
    for head in range(HEADS * GROUP):
        scores = keys[head // GROUP, read] @ q[0, head, 0] * DIM**-0.5
        expected = torch.softmax(scores, 0) @ values[head // GROUP, read]
        torch.testing.assert_close(o[0, head, 0], expected, atol=1e-5, rtol=1e-4)
        assert abs(float(lse[0, head, 0] - torch.logsumexp(scores, 0))) < 1e-5


def test_an_empty_cache_and_one_without_pages() -> None:
    for tokens in (0, 40, 127):
        kv, q = make_cache(tokens)
        for name in SELECTORS:
            ids = lath.select(q, kv, name, 64)
            assert ids.counts.sum() == 0
            o = lath.decode_attention(q, kv, pages=ids, repair=True)
            assert torch.equal(o, lath.decode_attention(q, kv))


@pytest.mark.parametrize("name", [*SELECTORS, "centroid-mass-16", "paged_eviction-32"])
def test_after_a_crop_and_an_eviction(name: str) -> None:
    """Pages of fewer tokens, positions with gaps: lists stay within what there is."""
    kv, q = make_cache(1000)
    lath.select(q, kv, name, 128)  # what it keeps of pages must not outlive them
    kv.crop(620)
    kv.append(
        *(
            torch.randn(1, HEADS, 300, DIM, generator=torch.Generator().manual_seed(i))
            for i in (1, 2)
        )
    )
    kv.drop_pages([[1, 4]])
    assert len(kv) == 920
    assert kv.tokens == [920 - 2 * PAGE]
    dense = lath.decode_attention(q, kv)
    everything = lath.select(q, kv, name, 10_000)
    assert torch.equal(lath.decode_attention(q, kv, pages=everything, repair=True), dense)
    some = lath.select(q, kv, name, 128)
    counts, starts = kv.view().counts[0].tolist(), kv.view().starts[0].tolist()
    for own in some.tolist()[0]:
        for i in own:
            entry, token = (i, 0) if some.granularity == "page" else (i // PAGE, i % PAGE)
            assert token < counts[entry]
            assert starts[entry] + token < 920
    repaired = lath.decode_attention(q, kv, pages=some, repair=True)
    assert error(repaired, dense) < 1
    kv.crop(300)
    assert torch.isfinite(lath.decode_attention(q, kv, pages=lath.select(q, kv, name, 64))).all()


def test_page_and_token_lists_of_the_same_tokens_agree() -> None:
    kv, q = make_cache(700)
    pages = lath.index_list([[[1, 5, 6]]], kv)
    tokens = lath.index_list(
        [[[64 + 64 * p + t for p in (1, 5, 6) for t in range(64)]]], kv, "token"
    )
    for repair in (False, True):
        a, b = (lath.decode_attention(q, kv, pages=ids, repair=repair) for ids in (pages, tokens))
        assert torch.equal(a, b)
    # Positions of float parts are read anyway and have no index.
    more = lath.index_list([[[0, 5, 63, 64, 690]]], kv, "token")
    assert more.tolist() == [[[0]]]


# Budgets


def test_budgets_in_their_forms() -> None:
    assert parse_budget("1024") == 1024
    assert parse_budget("12.5%") == 0.125
    assert parse_budget("p0.9") == lath.TopMass(0.9)
    assert str(lath.TopMass(0.9)) == "p0.9"
    assert budget_units(1) == 1
    assert budget_units(1024) == 16
    kv, q = make_cache(1000)
    for budget, pages in ((64, 2), (128, 3), (200, 4), (0.5, 8), ("25%", 4), (1, 2)):
        ids = lath.select(q, kv, "quest", budget)
        assert ids.counts.tolist() == [[pages] * HEADS], budget
    assert lath.select(q, kv, "quest", 128, recent=0).counts.tolist() == [[2, 2]]
    assert lath.select(q, kv, "quest", 128, recent=4).counts.tolist() == [[6, 6]]
    assert lath.select(q, kv, "sparq", 100).counts.tolist() == [[164, 164]]


@pytest.mark.parametrize(
    "wrong", [0, -1, 0.0, -0.5, 1.5, "0", "x", "p1", "p0", "101%", "", float("nan")]
)
def test_budgets_that_are_none(wrong: Any) -> None:
    kv, q = make_cache(200)
    with pytest.raises(ValueError, match=r"budget|mass"):
        lath.select(q, kv, "quest", wrong)


@pytest.mark.parametrize("wrong", [True, None, [64]])
def test_budgets_of_other_types(wrong: Any) -> None:
    kv, q = make_cache(200)
    with pytest.raises(TypeError, match="budget"):
        lath.select(q, kv, "quest", wrong)


# Text forms


def test_selectors_by_name() -> None:
    texts = ("quest", "quest-16", "centroid-8", "centroid-mass", "centroid-mass-32", "sparq-32",
             "double_sparsity-8", "clusterkv-80", "hgca-512", "tokenselect", "paged_eviction",
             "paged_eviction-16")  # fmt: skip
    for text in texts:
        assert str(selector(text)) == text
    assert set(SELECTORS) == {
        "quest", "sparq", "double_sparsity", "tokenselect", "clusterkv", "hgca", "paged_eviction",
        "centroid",
    }  # fmt: skip
    for wrong, match in (
        ("quests", "must be one of"), ("quest-24", "24"), ("sparq-x", "whole number"),
        ("sparq-0", "whole number"), ("tokenselect-3", "no option"), ("centroid-max", "one of"),
        ("centroid-16-mass", "one of"), ("centroid-mass-4", "centroid-mass"),

    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            selector(wrong)
    with pytest.raises(TypeError, match="selector"):
        selector(3)  # type: ignore[arg-type]


def test_selections_by_text() -> None:
    wish = lath.Selection.parse("sparq-32:12.5%", repair=True)
    assert (str(wish.selector), wish.budget, wish.repair) == ("sparq-32", 0.125, True)
    assert str(wish) == "sparq-32:12.5% with repair"
    assert lath.Selection.parse("quest").budget == 1024
    assert lath.Selection.parse(wish) is wish
    assert lath.Selection.parse(wish, repair=False).repair is False
    for wrong in ("quest:", "quest:0", ":64", "nothing:64"):
        with pytest.raises(ValueError, match=r"budget|selector"):
            lath.Selection.parse(wrong)
    for name in ("quest", "clusterkv", "double_sparsity"):
        with pytest.raises(ValueError, match=f"repair='mean' needs a selector that.*{name}"):
            lath.Selection.parse(name, repair="mean")
    for name in ("sparq", "tokenselect", "hgca"):
        assert lath.Selection.parse(name, repair="mean").repair == "mean"
    for name in ("clusterkv", "sparq", "double_sparsity", "hgca"):
        with pytest.raises(NotImplementedError, match=f"budget 'p0.9' needs bounds.*'{name}'"):
            lath.Selection.parse(f"{name}:p0.9")
        with pytest.raises(NotImplementedError, match="needs bounds"):
            lath.Selection.parse(name, layer_budgets=(64, "p0.9"))
    for name in ("quest", "centroid", "paged_eviction", "tokenselect"):
        assert lath.Selection.parse(f"{name}:p0.9").budget == lath.TopMass(0.9)
    assert lath.Selection(lath.selectors.HGCA(share=0), "p0.9").budget == "p0.9"
    for options in ({"reuse": 0}, {"reuse_cosine": 2.0}, {"heads": "all"}, {"repair": "some"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            lath.Selection.parse("quest", **options)


def test_when_a_selection_reads_everything() -> None:
    kv, q = make_cache(1000)
    assert Selecting(lath.Selection.parse("quest:64", dense_below=1000)).lists(q, kv) is None
    assert Selecting(lath.Selection.parse("quest:64", dense_below=999)).lists(q, kv) is not None
    assert Selecting(lath.Selection.parse("quest:1000")).lists(q, kv) is None
    layers = lath.Selection.parse("quest:64", dense_layers=frozenset({0, 2}))
    assert [Selecting(layers, i).lists(q, kv) is None for i in range(3)] == [True, False, True]
    budgets = lath.Selection.parse("quest", layer_budgets=(64, 256))
    counts = [Selecting(budgets, i).lists(q, kv).counts[0, 0] for i in range(2)]  # type: ignore[union-attr]
    assert counts == [2, 5]
    with pytest.raises(ValueError, match="layer_budgets"):
        Selecting(budgets, 2).lists(q, kv)
    many = q.expand(-1, -1, 20, -1)
    assert Selecting(lath.Selection.parse("quest:64")).lists(many, kv) is None
    assert Selecting(lath.Selection.parse("quest:64", chunks=True)).lists(many, kv) is not None


def test_a_list_serves_several_steps_until_the_cache_changes() -> None:
    kv, q = make_cache(1000)
    at_work = Selecting(lath.Selection.parse("quest:64", reuse=3))
    lists = [at_work.lists(q * (1 + i), kv) for i in range(6)]
    assert lists[0] is lists[1] is lists[2]
    assert lists[2] is not lists[3]
    kv.append(*(torch.randn(1, HEADS, 2, DIM) for _ in range(2)))
    assert at_work.lists(q, kv) is not None
    kv.crop(900)
    assert at_work.lists(q, kv) is not lists[5]
    assert at_work.lists(q.expand(-1, -1, 2, -1), kv) is not lists[5]


# What was missed


def test_recall_leaves_out_what_is_read_in_any_case() -> None:
    """The last full page has the least weight here: it neither costs nor brings recall."""
    keys = torch.zeros(1, HEADS, 64 + 5 * PAGE, DIM)
    for page in range(5):
        at = 64 + PAGE * page
        keys[:, :, at : at + PAGE, 0] = [3.0, 1.0, 4.0, 2.0, -9.0][page]
    kv = lath.PagedKV(HEADS, DIM, dtype=torch.float32, backend="reference")
    kv.append(keys, torch.ones_like(keys))
    q = torch.zeros(1, HEADS * GROUP, 1, DIM)
    q[..., 0] = 1.0
    ids = lath.select(q, kv, "quest", 2 * PAGE)
    assert ids.tolist() == [[[0, 2, 4]] * HEADS]
    assert bool((lath.recall(q, kv, ids) == 1).all())
    # Negative controls: the same entries as a list of one's own, the wrong ones, and no others.
    own = lath.index_list([[[0, 2, 4]]], kv)
    assert lath.recall(q, kv, own).tolist() == [[pytest.approx(2 / 3)]]
    for entries, found in (([1, 3, 4], 0), ([0, 1, 4], 0.5)):
        indices = torch.tensor([[entries] * HEADS], dtype=torch.int32)
        other = dataclasses.replace(ids, indices=indices)
        assert bool((lath.recall(q, kv, other) == found).all())
    none = lath.select(q, kv, "quest", PAGE, recent=5)
    assert bool((lath.recall(q, kv, none) == 1).all())


# Bad input


def test_lists_that_cannot_be() -> None:
    kv, q = make_cache(700)
    for wrong, match in (
        ([[[0, 9]]], r"indices\[0\]\[0\] must hold pages of the sequence, 0 \.\. 8, got 9"),
        ([[[-1]]], "got -1"),
        ([[[2, 2]]], "must ascend, but repeats 2"),
        ([[[3, 1]]], "puts out of order 1"),
        ([[[1]], [[1]]], "must hold 1 sequences, got 2"),
        ([[[1], [1], [1]]], "one per KV head"),
        ([[]], "one per KV head"),
        (torch.ones(1, 1, 2), "integer tensor"),
        (torch.ones(1, 2, dtype=torch.int64), "integer tensor"),
    ):
        with pytest.raises(ValueError, match=match):
            lath.index_list(wrong, kv)
    with pytest.raises(ValueError, match="positions of the sequence"):
        lath.index_list([[[700]]], kv, "token")
    with pytest.raises(ValueError, match="granularity"):
        lath.index_list([[[0]]], kv, "block")
    with pytest.raises(TypeError, match="pages must be a lath"):
        lath.decode_attention(q, kv, pages=[0, 1])  # type: ignore[arg-type]
    other, _ = make_cache(700, batch=2)
    with pytest.raises(ValueError, match="pages must hold lists for 1 sequences"):
        lath.decode_attention(q, kv, pages=lath.index_list([[[0]], [[0]]], other))
    three = lath.index_list(torch.tensor([[[0, 2, -1]]]), kv)
    assert three.tolist() == [[[0, 2]]]


def test_repair_that_cannot_be() -> None:
    kv, q = make_cache(700)
    ids = lath.select(q, kv, "quest", 64)
    for wrong in (
        "some",
        1,
        None,
        "centroids:0%",
        "centroids:25",
        "mean:50%",
        "spreads:200%",
        ":5%",
    ):
        with pytest.raises(ValueError, match="repair must be"):
            lath.decode_attention(q, kv, pages=ids, repair=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs pages"):
        lath.decode_attention(q, kv, repair=True)
    with pytest.raises(ValueError, match="say what mass they hold"):
        lath.decode_attention(q, kv, pages=ids, repair="mean")
    given: dict[str, Any] = {
        "window": 100, "softcap": 5.0, "alibi": torch.ones(4),
        "mask": torch.ones(1, 1, 1, 700, dtype=torch.bool), "bias": torch.zeros(1, 1, 1, 700),
    }  # fmt: skip
    for name, value in given.items():
        with pytest.raises(NotImplementedError, match=f"repair cannot be combined with {name}"):
            lath.decode_attention(q, kv, pages=ids, repair=True, **{name: value})
        assert torch.isfinite(lath.decode_attention(q, kv, pages=ids, **{name: value})).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_repair_by_centroids(backend: str) -> None:
    """On keys that do not differ within pages it is exact, with spreads or without; of its weight a
    share can be taken."""
    generator = torch.Generator().manual_seed(11)
    pages = torch.randn(1, HEADS, 9, DIM, generator=generator)
    keys = pages.repeat_interleave(PAGE, dim=2)
    values = torch.randn(1, HEADS, 9, DIM, generator=generator).repeat_interleave(PAGE, dim=2)
    kv = lath.PagedKV(HEADS, DIM, dtype=torch.float32, backend=backend)
    kv.append(keys, values)
    q = torch.randn(1, HEADS * GROUP, 1, DIM, generator=generator)
    ids = lath.select(q, kv, "quest", 2 * PAGE)
    dense, all_mass = lath.decode_attention(q, kv, return_lse=True)
    dropped, some_mass = lath.decode_attention(q, kv, pages=ids, return_lse=True)
    assert error(dropped, dense) > 0.1
    # bfloat16 means of keys and values against codes of 8 bits.
    for repair in (True, "spreads", "centroids", "centroids:100%"):
        assert error(lath.decode_attention(q, kv, pages=ids, repair=repair), dense) < 0.02, repair
    _, mass = lath.decode_attention(q, kv, pages=ids, repair="centroids:25%", return_lse=True)
    quarter = (all_mass.exp() - some_mass.exp()) / 4 + some_mass.exp()
    torch.testing.assert_close(mass.exp(), quarter, rtol=0.02, atol=0)


def test_arguments_of_select() -> None:
    kv, q = make_cache(700)
    for wrong, kind, match in (
        ({"heads": "all"}, ValueError, "heads"),
        ({"recent": -1}, ValueError, "recent"),
        ({"scale": -1.0}, ValueError, "scale"),
        ({"backend": "gpu"}, ValueError, "backend"),
    ):
        with pytest.raises(kind, match=match):
            lath.select(q, kv, "quest", 64, **wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=re.escape("kv must be a lath.PagedKV")):
        lath.select(q, q, "quest", 64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="channels"):
        lath.select(q, kv, lath.selectors.SparQ(DIM + 1), 64)
    with pytest.raises(ValueError, match="indices must"):
        lath.select(q, kv, lath.selectors.DoubleSparsity(indices=[[0, 0], [1, 2]]), 64)


def test_a_cache_without_exact_positions_refuses_windows() -> None:
    kv, q = make_cache(700)
    kv.compact([[i for i in range(700) if i % 3]], renumber=False)
    assert len(kv) == 700
    assert torch.isfinite(lath.decode_attention(q, kv)).all()
    with pytest.raises(NotImplementedError, match="window goes by positions"):
        lath.decode_attention(q, kv, window=100)
