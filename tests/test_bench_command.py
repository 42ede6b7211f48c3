"""`lath bench`: each command on little work, what it prints and writes, and its mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("numba")

from lath.integration import attention_benchmark, benchmark, ceilings, curves
from lath.integration.command_line import run


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("LATH_GGML", "LATH_VLUT", "LATH_BITNET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ceilings, "COLD_BYTES", 1)
    monkeypatch.setattr(benchmark, "BLOCK_SECONDS", 1e-4)
    monkeypatch.setattr(curves, "LAYER", 128)
    monkeypatch.setattr(curves, "BATCH_KEYS", 128)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_linear_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "rows.json", tmp_path / "rows.md"
    options = ["--shapes", "128x32", "--m", "1", "--codecs", "int2", "--rounds", "3"]
    peers = "torch-fp32,vlut-i2_v,bitnet-i2_s"
    files = ["--json", str(out), "--markdown", str(table)]
    assert run(["bench", "linear", *options, "--peers", peers, *files]) == 0
    shown = capsys.readouterr().out
    for name in ("vlut-i2_v", "bitnet-i2_s"):
        assert f"not measured: {name}: no " in shown
        assert f"Not measured: {name}: no " in table.read_text()
    (row,) = json.loads(out.read_text())
    assert row["peer"] == "torch-fp32"
    assert row["ceilings"]["gb_per_s"] > 0
    assert row["machine"]["processor"]


def test_linear_of_two_threads_without_peers(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shapes", "128x32", "--m", "1", "--codecs", "int2", "--rounds", "3"]
    assert run(["bench", "linear", *options, "--peers", "", "--threads", "2"]) == 0
    assert "of dots" in capsys.readouterr().out


def test_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "rows.json", tmp_path / "rows.md"
    options = ["--contexts", "192", "--batches", "2", "--caches", "int8/int4", "--prompts", "64"]
    files = ["--json", str(out), "--markdown", str(table)]
    assert run(["bench", "attention", *options, "--rounds", "3", *files]) == 0
    assert "decode int8/int4, 192 keys, batch 2" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert [row["peer"] for row in rows[:4]] == [
        f"torch {name}, {form}" for name in ("bf16", "fp32") for form in ("4 rows", "enable_gqa")
    ]
    form = attention_benchmark
    # Two full pages of every head and sequence are read, but the first, which is kept as it came.
    page = form.KV_HEADS * 2 * (192 // form.PAGE - 1)
    nbytes = rows[0]["gb_per_s"] * rows[0]["seconds"] * 1e9 / page
    assert 64 * 128 * 1.5 <= nbytes <= 64 * 128 * 1.7
    assert rows[0]["of_read"] == rows[0]["gb_per_s"] / rows[0]["ceilings"]["gb_per_s"]
    assert rows[-1]["what"] == "prefill int8, 8/8 heads, D 128, 64 tokens, causal"
    assert rows[-1]["gb_per_s"] is None
    assert "| decode int8/int4, 192 keys, batch 2 |" in table.read_text()


def test_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out, table, plot = (tmp_path / f"curves.{end}" for end in ("json", "md", "png"))
    options = ["--m", "1,3", "--sizes", "64,128", "--contexts", "128", "--batches", "1,2"]
    peers = ["--codecs", "int8,ternary", "--peers", "torch-fp32,torch-bf16,bitnet-i2_s"]
    files = ["--json", str(out), "--markdown", str(table), "--plot", str(plot)]
    assert run(["bench", "curves", *options, *peers, "--rounds", "3", *files]) == 0
    points = json.loads(out.read_text())
    assert [(p["curve"], p["what"], p["x"]) for p in points] == [
        *(("tokens", what, x) for what in ("int8", "ternary") for x in (1, 3)),
        *(("size", what, x) for what in ("int8", "ternary") for x in (64, 128)),
        ("context", "int8 cache", 128), ("batch", "int8 cache", 1), ("batch", "int8 cache", 2),
    ]  # fmt: skip
    assert {p["peer"].split("-")[0].split(" ")[0] for p in points} == {"torch"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert table.read_text().count("\n## ") == 4
    assert "Not measured: bitnet-i2_s" in table.read_text()
    assert "not measured: bitnet-i2_s" in capsys.readouterr().out


def test_the_strongest_peer_is_named() -> None:
    rows, _ = benchmark.bench_linear(64, 64, 1, "int8", ["torch-fp32", "torch-bf16"], rounds=3)
    best = min(rows, key=lambda row: row.peer_median_us)
    point = curves._of_linear("size", 64, rows)
    assert (point.peer, point.peer_us, point.ratio) == (best.peer, best.peer_median_us, best.ratio)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linear", "--m", "0"], "--m must be positive whole numbers, got '0'"),
        (["linear", "--cpu-time", "--threads", "2"], "--cpu-time times one thread"),
        (["linear", "--m", ""], "--m must be positive whole numbers, got none"),
        (["attention", "--contexts", "", "--prompts", ""], "nothing to measure"),
        (["curves", "--m", "", "--sizes", "", "--contexts", "", "--batches", ""], "nothing to m"),
        (["linear", "--peers", "numpy"], "peers must be among"),
        (["attention", "--caches", "int8/int8/int8"], "--caches must be like"),
        (["attention", "--contexts", "many"], "--contexts must be positive whole numbers"),
        (["curves", "--sizes", "-1"], "--sizes"),
        (["curves", "--codecs", "int9"], "int9"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
