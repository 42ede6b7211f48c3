"""Selections in Hugging Face models: what is read, by which layers, on every road of generate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lath
from hf_models import forward, generate, hf_model, padded, patched, positions, relative, tokens

pytest.importorskip("transformers")
from lath.integration.cache import LathCache
from lath.selectors import Scored, TokenSelect
from lath.verbs import selection as selection_module

# The same sums over the same keys, in float64 and rounded to fp32 once: two layers of them.
ROUNDING = 1e-5
# 64 first tokens, four pages, ten tokens in the unfilled one.
PROMPT = 330
EVERYTHING = 256  # tokens of the pages: fewer than there are in all, so that lists are made
SELECTORS = [
    "quest", "quest-16", "quest+tokens", "centroid", "centroid-mass", "paged_eviction", "sparq",
    "double_sparsity", "tokenselect", "hgca-64", "clusterkv",
]  # fmt: skip
CLAIM_MASS = ("sparq", "tokenselect", "hgca-64")


pytestmark = pytest.mark.usefixtures("no_grad")


def paged(model: Any, select: Any = None, kv: str = "int8", **options: Any) -> LathCache:
    cache = LathCache(model.config, kv, backend="reference", select=select, **options)
    model.set_attn_implementation("lath-float-reference")
    return cache


def small(name: str, budget: int = 64, **options: Any) -> lath.Selection:
    """Every selector leaves something out: ClusterKV would read five recent pages of these four."""
    return lath.Selection.parse(f"{name}:{budget}", **{"recent": 0, **options})


def steps(model: Any, cache: LathCache, ids: torch.Tensor, count: int = 3, **kw: Any) -> Any:
    """Logits [B, count, V] of `count` single tokens after the prompt `ids`."""
    forward(model, ids, cache, **kw)
    more = tokens(ids.shape[0], count, 9)
    return torch.cat([forward(model, more[:, i : i + 1], cache) for i in range(count)], dim=1)


# Lists that hold everything


@pytest.mark.parametrize("name", SELECTORS)
def test_lists_of_everything_are_the_dense_cache(name: str) -> None:
    model = hf_model("Llama")
    ids = tokens(1, PROMPT)
    expected = steps(model, paged(model), ids)
    for budget in (EVERYTHING, 10_000):
        cache = paged(model, f"{name}:{budget}", audit=0.999)
        assert torch.equal(steps(model, cache, ids), expected)
        made = [layer.lists._selecting._ids is not None for layer in cache.layers]
        assert made == [budget == EVERYTHING] * 2
        assert cache.misses.rows == []  # nothing was left out
    with patched(model):
        text = generate(model, ids)
    with patched(model, select=f"{name}:{EVERYTHING}"):
        assert torch.equal(generate(model, ids), text)


@pytest.mark.parametrize("name", ["Qwen3", "Mixtral", "Gemma2", "GptOss", "Mistral"])
def test_lists_of_everything_in_every_model(name: str) -> None:
    """Soft caps, sinks, windows and experts beside a selection."""
    model = hf_model(name)
    ids = tokens(2, PROMPT)
    expected = steps(model, paged(model), ids)
    logits = steps(model, paged(model, f"quest:{EVERYTHING}"), ids)
    assert torch.equal(logits, expected)


ROADS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several": {"num_beams": 2, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "chunks": {"prefill_chunk_size": 120},
}


@pytest.mark.parametrize("road", ROADS)
def test_float_pages_of_everything_are_the_own_cache(road: str) -> None:
    model = hf_model("Llama")
    ids = tokens(1, PROMPT)
    ids[:, 60:120] = ids[:, :60]  # something to look up
    expected = generate(model, ids, **ROADS[road])
    wish = lath.Selection.parse(f"quest:{EVERYTHING}", chunks=True, reuse=3)
    with patched(model, kv="float", select=wish):
        assert torch.equal(generate(model, ids, **ROADS[road]), expected)


# Lists that do not


@pytest.mark.parametrize("name", SELECTORS)
def test_small_budgets_with_and_without_repair(name: str) -> None:
    model = hf_model("Llama")
    ids, mask = padded([PROMPT, 280], "left")
    place = positions(mask)
    logits: dict[Any, Any] = {}
    repairs = [None, False, True, "centroids:25%"] + (["mean"] if name in CLAIM_MASS else [])
    for repair in repairs:
        wish = None if repair is None else small(name, repair=repair)
        cache = paged(model, wish)
        forward(model, ids, cache, attention_mask=mask, position_ids=place)
        grown = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        logits[repair] = forward(
            model, torch.tensor([[7], [7]]), cache, attention_mask=grown,
            position_ids=positions(grown)[:, -1:],
        )  # fmt: skip
        assert torch.isfinite(logits[repair]).all()
    for one in repairs[1:]:
        assert relative(logits[one] - logits[None], logits[None]) > ROUNDING
    assert not torch.equal(logits[True], logits[False])


@pytest.mark.parametrize("select", ["quest:64", "tokenselect:64"])
def test_the_cpu_kernels_read_the_same(select: str) -> None:
    pytest.importorskip("numba")
    model = hf_model("Llama", torch.bfloat16)
    logits = []
    for backend in ("cpu", "reference"):
        with patched(model, select=select, repair=True, backend=backend) as report:
            logits.append(steps(model, report.new_cache(), tokens(1, PROMPT)))
    # Two layers whose outputs are rounded to bfloat16, 8 bits: a few of its steps.
    assert relative(logits[0] - logits[1], logits[1]) < 4 * 2**-8


class _Worst(TokenSelect):
    """The tokens of the smallest weights."""

    def scores(self, request: Any) -> Scored:
        scores = super().scores(request).scores
        return Scored(torch.where(scores == -torch.inf, scores, -scores))


def test_the_wrong_tokens_are_seen() -> None:
    model = hf_model("Llama")
    for layer in model.model.layers:  # a softmax with something to choose
        layer.self_attn.q_proj.weight.mul_(12)
    ids = tokens(1, PROMPT)
    dense = steps(model, paged(model), ids)
    mass, far = {}, {}
    for name, selector in (("best", TokenSelect()), ("worst", _Worst())):
        cache = paged(model, lath.Selection(selector, 96, heads="query", recent=0), audit=0.5)
        far[name] = relative(steps(model, cache, ids) - dense, dense)
        mass[name] = [row.mean_mass for row in cache.misses.rows]
        assert {row.mean_recall for row in cache.misses.rows} == {float(name == "best")}
    assert far["worst"] > 20 * far["best"] > 0
    assert all(worst < best for worst, best in zip(mass["worst"], mass["best"], strict=True))


@pytest.mark.parametrize("repair", [False, True])
def test_left_padded_rows_are_the_rows_alone(repair: bool) -> None:
    model = hf_model("Qwen3")
    lengths = [PROMPT, 300]
    ids, mask = padded(lengths, "left")
    with patched(model, attention="int8", select="quest:64", repair=repair, audit=0.5) as report:
        out = generate(model, ids, 5, attention_mask=mask)
        assert {row.queries for row in report.misses.rows} == {2 * 4}
        for row, length in enumerate(lengths):
            alone = generate(model, tokens(1, length, row), 5)
            assert torch.equal(out[row, -5:], alone[0, -5:])


def test_padding_between_pieces_selects_for_the_tokens_alone() -> None:
    """A second piece with padding: rows are packed, and those of padding are not counted."""
    model = hf_model("Llama")
    ids, mask = padded([PROMPT, 290], "left")
    more, more_mask = padded([9, 4], "right", seed=5)
    both = torch.cat([mask, more_mask], dim=1)
    place = positions(both)
    cache = paged(model, "quest:64", audit=0.5)
    forward(model, ids, cache, attention_mask=mask, position_ids=place[:, : ids.shape[1]])
    second = forward(model, more, cache, attention_mask=both, position_ids=place[:, ids.shape[1] :])
    assert {row.queries for row in cache.misses.rows} == {13}
    for row, (length, new) in enumerate([(PROMPT, 9), (290, 4)]):
        # Pages that hold tokens of the step itself are read outside the budget, as many as the
        # longest row may have: alone, the same rows stand in a piece of the same width.
        alone = paged(model, "quest:64")
        forward(model, tokens(1, length, row), alone)
        own = forward(model, tokens(1, new, 5 + row), alone)
        assert relative(second[row, :new] - own[0], own) < ROUNDING


@pytest.mark.parametrize("road", ROADS)
def test_roads_with_small_budgets(road: str) -> None:
    model = hf_model("Llama")
    ids = tokens(1, PROMPT)
    ids[:, 60:120] = ids[:, :60]
    made = {}
    for reuse in (1, 3):
        wish = small("quest", repair=True, reuse=reuse)
        with patched(model, attention="int8", select=wish):
            made[reuse] = generate(model, ids, **ROADS[road])
    assert made[1].shape[1] == PROMPT + 8
    # Beams are reordered at every step: no list may serve twice.
    assert road not in ("beams", "several") or torch.equal(made[1], made[3])


def test_an_assistant_drafts() -> None:
    """Rejected drafts are cropped, lists or not; several rows vote for one list."""
    model, assistant = hf_model("Llama"), hf_model("Llama")
    for layer in assistant.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.9)
    ids = tokens(1, PROMPT)
    wish = small("quest", repair=True)
    with patched(model, select=wish), patched(assistant, select=wish):
        out = generate(model, ids, 12, assistant_model=assistant)
    assert out.shape == (1, PROMPT + 12)


# When lists are made


def test_the_first_piece_reads_everything() -> None:
    model = hf_model("Llama")
    ids = tokens(1, PROMPT)
    for attention in (None, "int8"):
        logits = {}
        for select in (None, small("quest", chunks=True)):
            with patched(model, attention=attention, select=select) as report:
                logits[select] = forward(model, ids, report.new_cache())
        first, second = logits.values()
        assert torch.equal(first, second)


@pytest.mark.parametrize("chunks", [False, True])
def test_later_pieces_select_where_they_are_to(chunks: bool) -> None:
    model = hf_model("Llama")
    ids, more = tokens(1, PROMPT), tokens(1, 20, 9)
    logits = []
    for select in (None, small("quest", chunks=chunks)):
        cache = paged(model, select)
        forward(model, ids, cache)
        logits.append(forward(model, more, cache))
    assert torch.equal(*logits) is not chunks


def count_selections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens of the cache at each list that is made."""
    made, own = [], selection_module.select

    def spy(q: Any, kv: Any, *args: Any, **kw: Any) -> Any:
        made.append(kv.lengths[0])
        return own(q, kv, *args, **kw)

    monkeypatch.setattr(selection_module, "select", spy)
    return made


def test_a_list_serves_as_often_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_selections(monkeypatch)
    model = hf_model("Llama")
    steps(model, paged(model, small("quest", reuse=3)), tokens(1, PROMPT), 7)
    assert made == [PROMPT + 1] * 2 + [PROMPT + 4] * 2 + [PROMPT + 7] * 2
    made.clear()
    # A page fills at 384 tokens: the list does not know it.
    steps(model, paged(model, small("quest", reuse=9)), tokens(1, 381), 4)
    assert made == [382] * 2 + [384] * 2


CHANGES: dict[str, Any] = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 1])),
    "crop": lambda cache: cache.crop(-70),
    "nothing": lambda cache: cache.crop(0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_list_outlives_a_change_of_the_cache(change: str) -> None:
    """The shapes stay, and the pages are others."""
    model = hf_model("Llama")
    ids = tokens(2, PROMPT + 64)
    logits = []
    for reuse in (1, 100):
        cache = paged(model, small("quest", reuse=reuse))
        steps(model, cache, ids, 1)
        CHANGES[change](cache)
        logits.append(forward(model, torch.tensor([[5], [5]]), cache))
    assert torch.equal(*logits) is (change != "nothing")


def test_no_list_outlives_a_step_with_padding() -> None:
    """A sequence that had no query has no list, though the shapes and the tables stay."""
    model = hf_model("Llama")
    ids, mask = padded([PROMPT, PROMPT + 1], "left")
    grown = torch.cat([mask, torch.tensor([[1], [0]]), torch.tensor([[1], [1]])], dim=1)
    place = positions(grown)
    logits = []
    for reuse in (1, 100):
        cache = paged(model, small("quest", reuse=reuse))
        at = 0
        for width in (ids.shape[1], 1, 1):
            piece = ids if width > 1 else torch.tensor([[5], [5]])
            out = forward(
                model, piece, cache, attention_mask=grown[:, : at + width],
                position_ids=place[:, at : at + width],
            )  # fmt: skip
            at += width
        assert cache.layers[0].pages.lengths == [PROMPT + 2] * 2
        logits.append(out)
    assert torch.equal(*logits)


def test_reset_and_copies() -> None:
    model = hf_model("Llama")
    ids = tokens(1, PROMPT)
    cache = paged(model, small("quest", reuse=100), repair=True)
    expected = steps(model, cache, ids)
    other = copy.deepcopy(cache)
    own = [forward(model, torch.tensor([[5]]), one) for one in (cache, other)]
    # The copy's list is a new one: the last step of a cache that makes one each time.
    fresh = paged(model, small("quest"), repair=True)
    steps(model, fresh, ids)
    assert not torch.equal(own[0], own[1])
    assert relative(own[1] - forward(model, torch.tensor([[5]]), fresh), own[1]) < 0.05
    cache.reset()
    assert torch.equal(steps(model, cache, ids), expected)


# Layers


def test_dense_layers_read_everything() -> None:
    model = hf_model("Llama")
    ids = tokens(1, PROMPT)
    dense = steps(model, paged(model), ids)
    for layers in ({0, 1}, {0}):
        cache = paged(model, small("quest", dense_layers=frozenset(layers)), audit=0.5)
        assert torch.equal(steps(model, cache, ids), dense) is (len(layers) == 2)
        assert {row.layer for row in cache.misses.rows} == {0, 1} - layers
        assert cache.dense_layers == dict.fromkeys(layers, "dense_layers")


def test_short_caches_are_read_whole() -> None:
    model = hf_model("Llama")
    ids = tokens(1, PROMPT)
    dense = steps(model, paged(model), ids)
    for below in (PROMPT + 3, PROMPT):
        cache = paged(model, small("quest", dense_below=below))
        assert torch.equal(steps(model, cache, ids), dense) is (below > PROMPT)


@pytest.mark.parametrize(("name", "sliding"), [("Mistral", {0, 1}), ("GptOss", {0})])
def test_sliding_layers_read_their_window(name: str, sliding: set[int]) -> None:
    model = hf_model(name)
    ids, mask = padded([PROMPT, 290], "right")  # holes: the window becomes a mask of slots
    more, more_mask = padded([3, 2], "left", seed=5)
    both = torch.cat([mask, more_mask], dim=1)
    place = positions(both)
    logits = []
    for select in (None, small("quest")):
        cache = paged(model, select, audit=None if select is None else 0.5)
        forward(model, ids, cache, attention_mask=mask, position_ids=place[:, : ids.shape[1]])
        logits.append(forward(
            model, more, cache, attention_mask=both, position_ids=place[:, ids.shape[1] :],
        )[more_mask.bool()])  # fmt: skip
    assert cache.dense_layers == dict.fromkeys(sliding, "sliding window")
    assert {row.layer for row in cache.misses.rows} == {0, 1} - sliding
    assert torch.equal(*logits) is (len(sliding) == 2)


def test_budgets_by_layer() -> None:
    model = hf_model("Llama")
    ids = tokens(1, PROMPT)
    wish = lath.Selection.parse("quest", layer_budgets=(EVERYTHING, 64), recent=0)
    cache = paged(model, wish, audit=0.99)
    steps(model, cache, ids)
    for row in cache.misses.rows:
        assert (row.mean_mass == 1) is (row.layer == 0)


def test_a_draft_selects_and_is_not_measured() -> None:
    model = hf_model("Llama")
    cache = paged(model, small("quest"), kv="int8-planes", audit=0.5)
    steps(model, cache, tokens(1, PROMPT), 2)
    with cache.draft():
        logits = forward(model, torch.tensor([[5]]), cache)
    assert torch.isfinite(logits).all()
    assert {row.steps for row in cache.misses.rows} == {2}
