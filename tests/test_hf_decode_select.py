"""Selections within the fused decode step: the lists, what is read and what is measured are those
of the modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_hf_decode import ROUNDING, decoder, fused_tokens, patched, steps
from torch import Tensor

import lath
from hf_models import generate, relative, tokens

pytest.importorskip("transformers")
pytest.importorskip("numba")

PROMPT = 400  # the 64 first tokens, five pages, and a tail
STEPS = 70  # the tail becomes a page
# Each with lists of two pages: all selectors of lath.selectors that keep nothing between steps, and
# what a Selection may ask besides.
SELECTIONS: dict[str, Any] = {
    "quest": "quest:128",
    "quest, sub-pages": "quest-16:128",
    "centroid": "centroid:128",
    "tokens": "sparq-16:128",
    "labels": "double_sparsity-16:128",
    "mass": "quest:p0.9",
    "repair": lath.Selection.parse("centroid:128", repair=True),
    "reuse": lath.Selection.parse("quest:128", reuse=3),
    "cosine": lath.Selection.parse("quest:128", reuse_cosine=0.9),
    "a dense layer": lath.Selection.parse("quest:128", dense_layers=frozenset({0})),
    "dense at first": lath.Selection.parse("quest:128", dense_below=PROMPT + 10),
}

pytestmark = pytest.mark.usefixtures("no_grad")


def logits_of(decode: str, select: Any, **options: Any) -> Tensor:
    model = decoder("Llama")
    with patched(model, decode, select=select, **options) as report:
        out = steps(model, PROMPT, STEPS)
        assert decode == "modules" or fused_tokens(report) == STEPS
    return out


@pytest.mark.parametrize("name", SELECTIONS)
def test_logits_are_the_modules(name: str) -> None:
    expected = logits_of("modules", SELECTIONS[name])
    out = logits_of("fused", SELECTIONS[name])
    assert relative(out - expected, expected) < ROUNDING


def test_a_selection_shows() -> None:
    """Negative control: what was left out is missing from the logits."""
    dense, out = logits_of("fused", None), logits_of("fused", "quest:128")
    assert relative(out - dense, dense) > 100 * ROUNDING


def test_generate_and_audit() -> None:
    """The loop over tokens, and what an audit finds in them."""
    found = []
    for decode in ("modules", "fused"):
        model = decoder("Llama")
        with patched(model, decode, select="quest:128", audit=0.9) as report:
            out = generate(model, tokens(1, PROMPT), STEPS)
            assert decode == "modules" or fused_tokens(report) == STEPS - 1
            assert report.misses is not None
            found.append((out, report.misses.rows))
    (expected, rows), (out, own) = found
    assert torch.equal(out, expected)
    assert len(own) == len(rows) > 0
    for ours, theirs in zip(own, rows, strict=True):
        for name in ("layer", "head", "steps", "queries", "below", "mean_recall"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert abs(ours.mean_mass - theirs.mean_mass) < ROUNDING
