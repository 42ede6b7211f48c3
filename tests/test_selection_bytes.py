"""Bytes of one step with a selection: those that the plan predicts are those that are counted.

Counted in the interpreter: everything that kernels of scores load and store, but not top-k; of
attention what `plan_attention` counts (records by lines of 128 bytes), as in test_triton_lists.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_triton_lists import untouched
from torch import Tensor

import lath
from lath.formats.device import known_device
from lath.formats.pages import PAGE, SUBPAGE, SUBPAGES
from lath.integration.selection_bytes import Step
from lath.selectors.base import Around
from lath.verbs.decode import decode_attention
from tools.loads import LINE
from tools.sanitizer import sanitize

HEADS, GROUP, DIM, TOKENS = 2, 2, 32, PAGE * 14 + 9
BUDGET = 64
INDEX_KERNELS = {"page_scores_kernel"}
TOKEN_KERNELS = {"prepare_kernel", "token_scores_kernel", "label_scores_kernel"}


def make() -> tuple[lath.PagedKV, Tensor]:
    """A cache of 13 full pages, made so that lists are at their longest.

    In every page the 38th token scores most and lies farthest from the rest (so that units of the
    largest bounds lie in pages of their own); one token of each other sub-page comes next; then the
    second and the last sub-page. The last page scores less than all others.
    """
    generator = torch.Generator().manual_seed(0)
    slot = torch.arange(PAGE)
    scores = 0.5 * ((slot // 16) % 2 == 1) + 1.5 * (slot % 16 == 5) + 1.5 * (slot == 37)
    scores = torch.cat(
        [torch.zeros(PAGE), scores.repeat(12), torch.full((PAGE,), -4), torch.zeros(9)]
    )
    keys = scores[:, None] + torch.randn(1, HEADS, TOKENS, DIM, generator=generator) / 50
    values = torch.randn(keys.shape, generator=generator)
    q = 1 + torch.rand(1, HEADS * GROUP, 1, DIM, generator=generator) / 4
    kv = lath.PagedKV(HEADS, DIM, dtype=torch.bfloat16, backend="reference")
    kv.append(keys.bfloat16(), values.bfloat16())
    return kv, q.bfloat16()


def step_of(kv: lath.PagedKV, units: int = 132) -> Step:
    """The step that the interpreter's launches are planned for. units: 1 splits no list."""
    device = dataclasses.replace(known_device("sm_90"), compute_units=units)
    return Step(len(kv), HEADS * GROUP, HEADS, kv.format, kv.dtype, device)


def counted_scores(q: Tensor, kv: lath.PagedKV, selection: lath.Selection) -> int:
    """Bytes that kernels of scores move, and those of the numbers that outliers look up."""
    lath.select(q, kv, selection.selector, BUDGET, heads=selection.heads)  # side tables
    with sanitize(poison=False, races=False) as report:
        ids = lath.select(
            q, kv, selection.selector, BUDGET, heads=selection.heads, backend="triton"
        )
    report.assert_clean()
    assert set(report.moved) <= INDEX_KERNELS | TOKEN_KERNELS | {"top_k_kernel"}
    total = sum(nbytes for name, nbytes in report.moved.items() if name != "top_k_kernel")
    if "outliers" in str(selection.selector):
        (farthest,) = kv.pool.side_tables["outliers"].of(kv.pool, list, kv.view().table)
        total += farthest[kv.view().table.long()].nbytes
    assert int(ids.counts.min()) > 0
    return total


def counted_attention(q: Tensor, kv: lath.PagedKV, ids: lath.IndexList) -> int:
    """Bytes of a step over a list: of records by lines, of index rows and float parts, q and o."""
    view = kv.view()
    watched = {
        name: getattr(view, name)
        for name in ("records", "index", "first_keys", "first_values", "last_keys", "last_values")
    }
    with sanitize(watch=watched, races=False) as report:
        decode_attention(q, kv, pages=ids, backend="triton", splits=1)
    report.assert_clean()
    loads = report.loads
    assert untouched(view.format, False) == 0
    rest = sum(own.bytes for name, own in loads.items() if name != "records")
    return loads["records"].lines * LINE + rest + 2 * q.numel() * q.element_size()


FORMS = [
    "quest", "centroid-mass", "tokenselect", "sparq-8", "quest-32", "quest-16", "quest-8",
    "quest+tokens", "centroid-mass+tokens-2", "centroid-mass-16+tokens", "tokenselect+tokens-3",
    "quest+outliers", "centroid-16+outliers", "tokenselect+outliers", "sparq-8+outliers",
    "quest+tokens+outliers",
]  # fmt: skip


@pytest.mark.parametrize("heads", ["kv", "query", "layer"])
@pytest.mark.parametrize("form", FORMS)
def test_scores_move_what_is_predicted(form: str, heads: str) -> None:
    kv, q = make()
    selection = lath.Selection.parse(f"{form}:{BUDGET}", heads=heads)
    made = {"kv": HEADS, "query": HEADS * GROUP, "layer": 1}[heads]
    predicted = step_of(kv).scored(selection.selector, BUDGET, made)
    assert counted_scores(q, kv, selection) == predicted
    if isinstance(selection.selector, Around):
        # Negative controls: the inner selector alone, and twice the candidates.
        inner = step_of(kv).scored(selection.selector.inner, BUDGET, made)
        assert inner is not None
        assert predicted is not None
        assert inner < predicted
        if "+tokens" in form:
            assert step_of(kv).scored(selection.selector, 2 * BUDGET, made) != predicted


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("form", FORMS)
def test_attention_moves_what_is_predicted(form: str, heads: str) -> None:
    """Lists at their longest. Negative controls: all of each page, and a list of one page."""
    kv, q = make()
    selection = lath.Selection.parse(f"{form}:{BUDGET}", heads=heads)
    lists = HEADS if heads == "kv" else HEADS * GROUP
    ids = lath.select(q, kv, selection.selector, BUDGET, heads=heads)
    step = step_of(kv, units=1)
    pages, subpages = step.touched(selection, BUDGET)
    for own in ids.tolist()[0] if ids.granularity == "token" else ():
        assert (len({i // PAGE for i in own}), len({i // SUBPAGE for i in own})) == (
            pages,
            subpages,
        )
    predicted = step.attended(selection, BUDGET, lists)
    assert counted_attention(q, kv, ids) == predicted
    whole = predicted + (SUBPAGES * pages - subpages) * lists * kv.format.subpage_bytes()
    all_of_them = step._attention(len(kv) - step.pages * PAGE + pages * PAGE, lists)
    assert whole == all_of_them
    one = lath.select(q, kv, "quest", 64, heads=heads, recent=0)
    assert counted_attention(q, kv, one) < predicted


@pytest.mark.parametrize("form", FORMS)
def test_no_list_touches_more(form: str) -> None:
    """The longest that a list can be, over random caches and budgets."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(1, HEADS, TOKENS, DIM, generator=generator)
        kv = lath.PagedKV(HEADS, DIM, dtype=torch.float32, backend="reference")
        kv.append(keys, keys)
        q = torch.randn(1, HEADS * GROUP, 1, DIM, generator=generator)
        for budget in (5, 40, 64, 150, 400):
            ids = lath.select(q, kv, form, budget)
            most = step_of(kv).touched(lath.Selection.parse(form), budget)
            unit = 1 if ids.granularity == "token" else PAGE
            for own in ids.tolist()[0]:
                tokens = [unit * i + j for i in own for j in range(unit)]
                touched = len({t // PAGE for t in tokens}), len({t // SUBPAGE for t in tokens})
                assert touched[0] <= most[0]
                assert touched[1] <= most[1]
