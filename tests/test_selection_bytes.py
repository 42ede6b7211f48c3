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
from lath.integration.selection_bytes import Step
from lath.selectors.base import Around
from lath.verbs.decode import decode_attention
from tools.loads import LINE
from tools.sanitizer import sanitize

HEADS, GROUP, DIM, TOKENS = 2, 2, 32, 64 * 14 + 9
BUDGET = 64
INDEX_KERNELS = {"page_scores_kernel"}
TOKEN_KERNELS = {"prepare_kernel", "token_scores_kernel", "label_scores_kernel"}


def make(seed: int = 0) -> tuple[lath.PagedKV, Tensor]:
    """A cache of 14 full pages, of which the last scores less than all others."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, HEADS, TOKENS, DIM, generator=generator)
    keys[..., 64 * 13 : 64 * 14, :] -= 4
    values = torch.randn(keys.shape, generator=generator)
    q = torch.rand(1, HEADS * GROUP, 1, DIM, generator=generator) / 4
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
    "quest", "centroid-mass", "tokenselect", "sparq-8",
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
    """These lists are at their longest: the budget in pages of their own, and the last page."""
    kv, q = make()
    selection = lath.Selection.parse(f"{form}:{BUDGET}", heads=heads)
    lists = HEADS if heads == "kv" else HEADS * GROUP
    ids = lath.select(q, kv, selection.selector, BUDGET, heads=heads)
    predicted = step_of(kv, units=1).attended(selection, BUDGET, lists)
    counted = counted_attention(q, kv, ids)
    assert counted == predicted
    # Negative control: a list of one page.
    one = lath.select(q, kv, "quest", 64, heads=heads, recent=0)
    assert counted_attention(q, kv, one) < predicted
