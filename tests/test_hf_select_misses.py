"""MissReport: its numbers are those of `lath.captured_mass` and `recall`; it changes nothing."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

import lath
from hf_models import forward, generate, hf_model, padded, patched, tokens

pytest.importorskip("transformers")
from lath.integration import cache as cache_module
from lath.integration.misses import MissReport

PROMPT = 330


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("select", ["quest:64", "tokenselect:64", "hgca-64:64"])
def test_misses_are_what_the_verbs_say(select: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_model("Llama")
    masses: list[torch.Tensor] = []
    recalls: list[torch.Tensor] = []
    own = cache_module.decode_attention

    def spy(q: Any, kv: Any, **given: Any) -> Any:
        if "pages" in given:
            named = {name: given[name] for name in ("scale", "query_lengths", "backend")}
            masses.append(lath.captured_mass(q, kv, given["pages"], **named))
            recalls.append(lath.recall(q, kv, given["pages"], **named))
        return own(q, kv, **given)

    monkeypatch.setattr(cache_module, "decode_attention", spy)
    ids, mask = padded([PROMPT, 300], "left")
    with patched(model, select=select, repair=True, audit=0.7) as report:
        generate(model, ids, 6, attention_mask=mask)
    # Two layers take turns, five steps of two sequences.
    assert len(masses) == 10
    rows = report.misses.rows
    assert [(row.layer, row.head) for row in rows] == [(i, h) for i in (0, 1) for h in range(4)]
    for row in rows:
        mass = torch.cat([one[:, row.head] for one in masses[row.layer :: 2]]).double()
        assert (row.steps, row.queries) == (5, 10)
        assert row.mean_mass == pytest.approx(float(mass.mean()), rel=1e-12)
        assert row.least_mass == float(mass.min())
        assert row.below == int((mass < 0.7).sum())
        lists = recalls[0].shape[1]
        found = torch.cat([one[:, row.head * lists // 4] for one in recalls[row.layer :: 2]])
        assert row.mean_recall == pytest.approx(float(found.double().mean()), rel=1e-12)
    assert 0 < sum(row.below for row in rows) < 80


def test_measuring_changes_nothing() -> None:
    model = hf_model("GptOss")  # with sinks, which are no part of the captured mass
    ids = tokens(1, PROMPT)
    made = []
    for audit in (None, 0.9):
        wish = lath.Selection.parse("quest:64", reuse=2)
        with patched(model, attention="int8", select=wish, repair=True, audit=audit) as report:
            logits, cache = [], report.new_cache()
            for piece in (ids, *tokens(1, 5, 9).split(1, dim=1)):
                logits.append(forward(model, piece, cache))
            made.append(torch.cat(logits, dim=1))
    assert torch.equal(*made)
    assert {row.layer for row in report.misses.rows} == {1}


def test_the_report_of_misses() -> None:
    report = MissReport(0.5)
    assert report.rows == []
    assert "no step" in str(report)
    # Two sequences, of which the second has one row of the two; one list for both heads.
    mass = torch.tensor([[[0.25, 0.75], [1.0, 0.5]], [[0.5, 0.0], [0.125, 0.0]]])
    some = torch.zeros(2, 1, dtype=torch.bool)
    report.record(3, mass, torch.tensor([[0.5], [1.0]]), torch.tensor([2, 1]), some)
    report.record(3, torch.ones(2, 2, 1), torch.ones(2, 1), torch.tensor([1, 0]), some)
    nan = torch.full((1, 2, 1), torch.nan)
    report.record(0, nan, torch.ones(1, 2), None, torch.zeros(1, 2, dtype=torch.bool))
    # Lists that leave nothing out are not measured: all of them, and one of two.
    report.record(3, torch.ones(2, 2, 1), torch.ones(2, 1), None, ~some)
    report.record(1, torch.ones(1, 2, 1), torch.ones(1, 2), None, torch.tensor([[True, False]]))
    first, second = report.rows[3:]
    assert (first.layer, first.head, first.steps, first.queries) == (3, 0, 2, 4)
    assert (first.mean_mass, first.least_mass, first.below) == (2.5 / 4, 0.25, 1)
    assert (second.mean_mass, second.least_mass, second.below) == (2.625 / 4, 0.125, 1)
    assert first.mean_recall == second.mean_recall == 2.5 / 3
    assert report.rows[0].below == 1  # what is no number is below every threshold
    assert [(row.layer, row.head, row.steps) for row in report.rows[2:3]] == [(1, 1, 1)]
    read = json.loads(report.to_json())
    assert read["threshold"] == 0.5
    assert read["rows"][3:] == [dataclasses.asdict(row) for row in (first, second)]
    del report._layers[0], report._layers[1]
    assert [row.head for row in report.worst(1)] == [0]
    text = str(report)
    assert "2 of 8 queries" in text
    assert "layer 3, head 1: mean mass 0.6562, least 0.1250, recall 0.833" in text
    report.reset()
    assert report.rows == []


def test_a_short_sequence_that_is_read_wholly_is_not_measured() -> None:
    """Of two sequences the second fits its lists: the report is that of the first alone."""
    model = hf_model("Llama")
    ids, mask = padded([PROMPT, 150], "left")
    made = []
    for own, own_mask in ((ids, mask), (ids[:1], mask[:1])):
        with patched(model, attention="int8", select="tokenselect:64", audit=0.9) as report:
            forward(model, own, cache := report.new_cache(), attention_mask=own_mask)
            longer = torch.nn.functional.pad(own_mask, (0, 1), value=1)
            forward(model, ids[: len(own), :1], cache, attention_mask=longer)
        made.append(report.misses.rows)
    assert made[0] == made[1]
    assert [row.queries for row in made[0]] == [1] * 8
    assert max(row.least_mass for row in made[0]) < 1


def test_a_pause() -> None:
    model = hf_model("Llama")
    with patched(model, select="quest:64", audit=0.9) as report:
        with report.misses.paused():
            generate(model, tokens(1, PROMPT), 3)
        assert report.misses.rows == []
        generate(model, tokens(1, PROMPT), 3)
        assert report.misses.rows[0].steps == 2
