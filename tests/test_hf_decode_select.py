"""Selections within the fused decode step: the lists, what is read and what is measured are those
of the modules."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_hf_decode import ROUNDING, decoder, fused_tokens, patched, steps
from torch import Tensor

import lath
from hf_models import generate, relative, tokens

pytest.importorskip("transformers")
pytest.importorskip("numba")
from lath.integration import decode_cache
from lath.verbs.selection import page_choice

PROMPT = 400  # the 64 first tokens, five pages, and a tail
STEPS = 70  # the tail becomes a page
# Votes over pages, which are rows of the program.
ROWS: dict[str, Any] = {
    "quest": "quest:128",
    "centroid": "centroid:128",
    "centroid, mass": "centroid-mass:64",
    "each its own list": lath.Selection.parse("quest:128", heads="query"),
    "one list": lath.Selection.parse("quest:128", heads="layer", recent=2),
    "a dense layer": lath.Selection.parse("quest:128", dense_layers=frozenset({0})),
    "everything": "quest:2000",
}
# What is asked of the layer's own lists between two pieces of the program.
ASKED: dict[str, Any] = {
    "quest, units": "quest-16:128",
    "quest, two steps": "quest+tokens-2:64",
    "tokens": "sparq-16:128",
    "labels": "double_sparsity-16:128",
    "mass": "quest:p0.9",
    "repair": lath.Selection.parse("centroid:128", repair=True),
    "reuse": lath.Selection.parse("quest:128", reuse=3),
    "cosine": lath.Selection.parse("quest:128", reuse_cosine=0.9),
    "a share": "quest:30%",
    "dense at first": lath.Selection.parse("quest:128", dense_below=PROMPT + 10),
}

pytestmark = pytest.mark.usefixtures("no_grad")


def logits_of(decode: str, select: Any, prompt: int = PROMPT, count: int = STEPS) -> Tensor:
    model = decoder("Llama")
    with patched(model, decode, select=select) as report:
        out = steps(model, prompt, count)
        assert decode == "modules" or fused_tokens(report) == count
    return out


@pytest.mark.parametrize("name", ROWS | ASKED)
def test_logits_are_the_modules(name: str) -> None:
    select = (ROWS | ASKED)[name]
    expected, out = logits_of("modules", select), logits_of("fused", select)
    assert relative(out - expected, expected) < ROUNDING


def test_from_no_page_on() -> None:
    """Behind 100 tokens there is no page yet; behind 300 the list leaves out one of three."""
    expected, out = (logits_of(way, "quest:64", 100, 200) for way in ("modules", "fused"))
    assert relative(out - expected, expected) < ROUNDING


def test_a_selection_shows() -> None:
    """Negative control: what was left out is missing from the logits."""
    dense, out = logits_of("fused", None), logits_of("fused", "quest:128")
    assert relative(out - dense, dense) > 100 * ROUNDING


@pytest.mark.parametrize("field", ["pages", "recent"])
def test_a_choice_shows(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: rows that choose one page fewer give other logits."""

    def spoilt(*arguments: Any) -> Any:
        choice = page_choice(*arguments)
        assert choice is not None
        return dataclasses.replace(choice, **{field: getattr(choice, field) - 1})

    expected = logits_of("modules", "quest:128")
    monkeypatch.setattr(decode_cache, "page_choice", spoilt)
    out = logits_of("fused", "quest:128")
    assert relative(out - expected, expected) > 100 * ROUNDING


@pytest.mark.parametrize("name", ROWS | ASKED)
def test_what_is_rows(name: str) -> None:
    """Of layer 1: layer 0 is dense in one case."""
    choice = page_choice(lath.Selection.parse((ROWS | ASKED)[name]), 1, 2, 4)
    assert (choice is not None) == (name in ROWS)


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
