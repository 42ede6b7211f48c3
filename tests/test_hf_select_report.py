"""`lath.patch(select=…)`: its arguments, its row of the report, and `lath run`."""

from __future__ import annotations

import copy
import dataclasses
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lath
from hf_models import forward, generate, hf_model, patched, tokens

pytest.importorskip("transformers")
from lath.formats.pages import PAGE, PageCodec, PageFormat
from lath.integration.cache import LathCache
from lath.integration.selecting import describe
from lath.selectors import DoubleSparsity, Quest, Scored
from lath.verbs.planning import plan_attention

PROMPT = 330


pytestmark = pytest.mark.usefixtures("no_grad")


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"select": "quest:64", "kv": None}, ValueError, "select='quest:64' needs kv"),
        ({"select": "nope:64"}, ValueError, "selector must be one of.*nope"),
        ({"select": "quest:none"}, ValueError, "budget must be.*none"),
        ({"select": 64}, TypeError, "select must be a str.*int: 64"),
        ({"repair": True}, ValueError, "repair=True needs select"),
        ({"repair": False}, ValueError, "repair=False needs select"),
        ({"audit": 0.9}, ValueError, r"audit=0\.9 needs select"),
        ({"select": "quest", "repair": "median"}, ValueError, "repair must be.*median"),
        ({"select": "quest", "audit": 1.5}, ValueError, r"audit must lie between.*1\.5"),
        ({"select": "quest", "audit": 0}, ValueError, "audit must lie between"),
        ({"select": "quest", "audit": True}, TypeError, "audit must be a number.*bool"),
        ({"select": lath.Selection(Quest(), dense_layers=frozenset({1, 7}))}, ValueError,
         r"dense_layers must be layers 0 \.\. 1.*\[7\]"),
        ({"select": lath.Selection(Quest(), layer_budgets=(64,))}, ValueError,
         "layer_budgets must have one budget for each of the model's 2 layers, got 1"),
    ],
)  # fmt: skip
def test_mistakes(options: Any, error: type[Exception], message: str) -> None:
    model = hf_model("Llama")
    before = dict(model.__dict__)
    with pytest.raises(error, match=message):
        patched(model, **options)
    assert dict(model.__dict__) == before
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("options", [{"repair": True}, {"repair": "mean"}, {"audit": 0.5}])
def test_softcaps_admit_no_estimate(options: Any) -> None:
    model = hf_model("Gemma2")
    named = next(iter(options))
    with pytest.raises(NotImplementedError, match=f"{named}=.*softcap.*softcapping=2.0"):
        patched(model, select="tokenselect:64", **options)
    with pytest.raises(NotImplementedError, match="softcap"):
        LathCache(model.config, "int8", select="tokenselect:64", **options)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("options", [{"repair": True}, {"audit": 0.5}, {}])
def test_masks_admit_no_estimate(options: Any) -> None:
    """A mask that the caller made is seen when it comes; selecting under it is possible."""
    model = hf_model("Llama")
    with patched(model, select="quest:64", **options) as report:
        cache = report.new_cache()
        forward(model, tokens(1, PROMPT), cache)
        mask = torch.ones(1, 1, 1, PROMPT + 1, dtype=torch.bool)
        mask[..., 100:110] = False
        if not options:
            assert torch.isfinite(forward(model, tokens(1, 1), cache, attention_mask=mask)).all()
            return
        with pytest.raises(NotImplementedError, match=f"{next(iter(options))}.*mask"):
            forward(model, tokens(1, 1), cache, attention_mask=mask)


# Patching


def test_patch_and_undo_leave_no_trace() -> None:
    model = hf_model("Llama")
    ids = tokens(1, PROMPT)
    before = dict(model.__dict__)
    expected = generate(model, ids)
    report = patched(model, select="quest:64", repair=True, audit=0.9)
    assert report.active
    first = generate(model, ids)
    report.undo()
    report.undo()
    assert dict(model.__dict__) == before
    assert model.config._attn_implementation == "eager"
    assert torch.equal(generate(model, ids), expected)
    steps = report.misses.rows[0].steps
    report.redo()
    assert torch.equal(generate(model, ids), first)
    assert report.misses.rows[0].steps == 2 * steps
    report.undo()


def test_patching_again() -> None:
    model = hf_model("Llama")
    indices = torch.tensor([[0, 3], [1, 2]])
    wish = lath.Selection(DoubleSparsity(indices=indices), 64)
    first = patched(model, select=wish, audit=0.9)
    same = lath.Selection(DoubleSparsity(indices=indices.clone()), 64)
    second = patched(model, select=same, audit=0.9)
    assert {row.action for row in second.attention} == {"already patched"}
    assert second.selection.action == "already patched"
    generate(model, tokens(1, PROMPT), 2)
    assert second.misses is first.misses
    assert len(second.misses.rows) == 8
    others: list[dict[str, Any]] = [
        {}, {"select": "double_sparsity:64"}, {"select": wish, "audit": 0.8}, {"select": wish},
        {"select": wish, "repair": True, "audit": 0.9},
        {"select": dataclasses.replace(wish, reuse=2), "audit": 0.9},
    ]  # fmt: skip
    for options in others:
        with pytest.raises(ValueError, match=r"patched already with .*double_sparsity:64.*undo"):
            patched(model, **options)
    second.undo()
    assert model.config._attn_implementation == "lath-float-reference"
    first.undo()
    assert model.config._attn_implementation == "eager"


def test_a_copy_of_the_model_is_measured_too() -> None:
    model = hf_model("Llama")
    ids = tokens(1, PROMPT)
    with patched(model, select="quest:64", audit=0.9) as report:
        expected = generate(model, ids)
        steps = report.misses.rows[0].steps
        other = copy.deepcopy(model)
    assert torch.equal(generate(other, ids), expected)
    assert report.misses.rows[0].steps == 2 * steps


def test_a_cache_of_ones_own() -> None:
    model = hf_model("Llama")
    ids = tokens(1, PROMPT)
    with patched(model, select="quest:64", repair=True):
        expected = generate(model, ids)
    with patched(model) as report:
        cache = LathCache(
            model.config, "int8", backend="reference", select="quest:64", repair=True, audit=0.9
        )
        assert torch.equal(generate(model, ids, cache=cache), expected)
        assert report.misses is None
        assert len(cache.misses.rows) == 8
        assert LathCache(model.config).misses is None


# The row of the report


def test_the_row() -> None:
    model = hf_model("Llama", torch.bfloat16, head_dim=64)
    wish = lath.Selection.parse("quest:128", dense_layers=frozenset({1}))
    report = patched(model, select=wish, repair=True, dry_run=True)
    row = report.selection
    assert (row.selector, row.budget, row.repair) == ("quest", "128 tokens", True)
    assert (row.layers, row.dense) == (2, {1: "dense_layers"})
    # 64 of 512 tokens are floats, the others 7 pages: the list holds two and the last.
    fmt = PageFormat(PageCodec("int8"), PageCodec("int8"), 64, 64, 2)
    page, first = fmt.record_bytes + 2 * 64, PAGE * (64 + 64) * 2
    dense = 2 * (7 * page + first) + 4 * (64 + 64) * 2
    assert row.context == 512
    assert row.bytes_before == 2 * dense
    listed = 2 * (3 * page + first) + 4 * (64 + 64) * 2
    scores = 2 * 7 * (4 * 64 + 4)  # mean, max, min and their unit
    repair = 2 * 7 * (5 * 64 + 4)  # mean, deviation, unit, mean of the values
    assert row.bytes_after > dense + listed + scores + repair
    # Beside them the plans count tables, q and what the launches write: little.
    assert row.bytes_after < dense + listed + 1.5 * (scores + repair)
    text = str(report)
    assert "quest:128 with repair, dense_layers=[1] in 1 of 2 layers" in text
    assert "dense for dense_layers: 1" in text
    assert f"{row.bytes_before:,} → {row.bytes_after:,} bytes" in text
    assert report.misses is None
    assert patched(model, dry_run=True).selection is None


@pytest.mark.parametrize(
    ("select", "budget"),
    [
        ("sparq:10%", "0.1 of the context"), ("double_sparsity:64", "64 tokens"),
        ("tokenselect:64", "64 tokens"), ("hgca:64", "64 tokens"), ("clusterkv:64", "64 tokens"),
        ("paged_eviction:64", "64 tokens"), ("centroid:p0.95", "0.95 of the mass"),
        ("quest+tokens:64", "64 tokens"), ("clusterkv+outliers:64", "64 tokens"),
    ],
)  # fmt: skip
def test_rows_of_every_selector(select: str, budget: str) -> None:
    row = patched(hf_model("Llama"), select=select, dry_run=True).selection
    assert row.budget == budget
    assert (row.bytes_after is None) is select.endswith("p0.95")
    assert row.bytes_before > 0


def test_what_windows_and_unknown_selectors_leave_out() -> None:
    class Own(Quest):
        def scores(self, request: Any) -> Scored:
            return super().scores(request)

    row = patched(hf_model("GptOss"), select="quest:64", dry_run=True).selection
    assert row.dense == {0: "sliding window"}
    model = hf_model("Llama")
    dense = plan_attention(
        query_heads=4, kv_heads=2, keys=512, head_dim=16, key_codec="int8", value_codec="int8",
        dtype=torch.float32,
    ).bytes_moved  # fmt: skip
    assert row.bytes_before == dense
    row = patched(model, select="quest:100000", dry_run=True).selection
    assert row.bytes_before == row.bytes_after == 2 * dense


def test_descriptions() -> None:
    assert describe(lath.Selection.parse("quest:64")) == "quest:64"
    wish = lath.Selection.parse(
        "sparq-4:25%", repair="mean", chunks=True, reuse=3, layer_budgets=(64, 0.5)
    )
    assert describe(wish) == (
        "sparq-4:25%, repair='mean', layer_budgets=['64', '0.5'], reuse=3 with chunks"
    )


# The command and the example


def test_the_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "examples" / "sparse_selection.py"
    options = ["--model", "tiny", "--backend", "reference", "--new-tokens", "3"]
    options += ["--prompt-tokens", "300", "--select", "quest:64"]
    monkeypatch.setattr("sys.argv", [str(path), *options])
    runpy.run_path(str(path), run_name="example")["main"]()
    shown = capsys.readouterr().out
    assert "the same while measuring" in shown
    assert "): True" in shown
    assert "mean recall" in shown


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    from lath.integration import run_command
    from lath.integration.command_line import run as run_line

    monkeypatch.setattr(run_command, "english_text", lambda: "Leave it room to grab. " * 20)
    monkeypatch.setattr(run_command, "LONG_WINDOW", 300)
    monkeypatch.setattr(run_command, "DECODE_TOKENS", 3)
    base = ["run", "--model", "tiny", "--backend", "reference", "--rounds", "1"]
    return lambda *more: run_line([*base, "--max-new-tokens", "3", *more])


def test_run_selects_and_measures(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    options = ["--kv", "int8", "--select", "quest:64", "--repair", "--audit", "0.9"]
    assert run("--dtype", "float32", "--json", str(path), *options) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("selection quest:64 with repair", "captured mass of the selections", "layer",
                 "windows of 300 tokens, 16 at a time"):  # fmt: skip
        assert part in shown
    figures = json.loads(path.read_text())
    assert len(figures["misses"]) == 2 * 6
    # The text in pieces; the answer is read wholly, and what is timed is not measured.
    assert {row["queries"] for row in figures["misses"]} == {measured_queries(460)}
    assert figures["perplexity_after"] == pytest.approx(figures["perplexity_before"], rel=0.05)


def measured_queries(tokens_of_text: int) -> int:
    """Queries of pieces of 16 tokens whose cache has more full pages than a list of one: it holds
    the last one too, and the one that ends within the piece."""
    total = 0
    for begin in range(0, tokens_of_text, 300):
        window = min(300, tokens_of_text - begin)
        for start in range(16, window, 16):
            end = min(start + 16, window)
            pages = end // PAGE - 1  # the first page is in 16 bits
            total += end - start if pages > 2 + (end % PAGE < end - start) else 0
    return total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv", "none", "--select", "quest:64"], "needs kv"),
        (["--kv", "int8", "--repair"], "repair=True needs select"),
        (["--kv", "int8", "--audit", "0.5"], "audit=0.5 needs select"),
        (["--kv", "int8", "--select", "quest", "--audit", "2"], "audit must lie between"),
        (["--kv", "int8", "--select", "quest:x"], "budget must be"),
    ],
)
def test_mistakes_of_the_command(
    run: Callable[..., int], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*options) == 2
    assert message in capsys.readouterr().err
