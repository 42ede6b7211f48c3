"""`lath compare` and `lath run --quantizer`: the list of codecs, rows, files, refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("rich")

import lath
from lath.formats.compared import COMPARED, compared_codecs
from lath.formats.families import GRAMMAR_TABLE, weight_codec
from lath.integration import compare_plot, run_command
from lath.integration.command_line import run
from lath.integration.compare import CompareOptions, CompareRow, Comparison, compare
from lath.integration.compare import comparison_table as table_of
from lath.integration.models import tiny_model
from lath.integration.perplexity import perplexity

SMALL = [
    "compare", "--model", "tiny", "--tokens", "64", "--calibration-tokens", "512", "--threads", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_form_of_the_grammar_is_compared() -> None:
    assert COMPARED.keys() == GRAMMAR_TABLE.keys()
    texts = compared_codecs()
    assert len(set(texts)) == len(texts)
    assert all(str(weight_codec(text)) == text for text in texts)
    assert all(COMPARED.values())


def options(**changes: Any) -> CompareOptions:
    known = {"model": "tiny", "codecs": ("int4-g16",), "quantizers": ("rtn",), "tokens": 60}
    return CompareOptions(**{**known, "calibration_tokens": 64, "window": 32, **changes})


def test_rows_are_what_patch_and_perplexity_say() -> None:
    model, _ = tiny_model()
    ids = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(0))
    wanted = options(quantizers=("rtn", "rtn+search", "gptq", "hqq"))
    seen: list[CompareRow] = []
    result = compare(model, ids, wanted, done=lambda _, row: seen.append(row))
    assert seen == result.rows
    assert result.before == perplexity(model, ids[:60], 32)
    assert result.calibrated_on == 64
    rows = {row.quantizer: row for row in result.rows}
    assert rows["hqq"].perplexity is None
    assert rows["hqq"].reason.startswith("quantizer 'hqq' optimises float minima")
    calibration = lath.Calibration.from_ids(ids[60:], 64, 32, 0)
    for name, more in (
        ("rtn", {}), ("rtn+search", {"search": True}),
        ("gptq", {"quantizer": "gptq", "calibration": calibration}),
    ):  # fmt: skip
        with lath.patch(model, "int4-g16", activations="float", **more) as report:  # type: ignore[arg-type]
            assert rows[name].perplexity == perplexity(model, ids[:60], 32)
            assert rows[name].error == report.mean_error
            weights = {n: m.qtensor for n, m in model.named_modules() if hasattr(m, "qtensor")}
            stored = sum(t.numel() * t.element_size() for w in weights.values()
                         for t in w.tensors.values())  # fmt: skip
            count = sum(w.shape[0] * w.shape[1] for w in weights.values())
            assert rows[name].bits == pytest.approx(8 * stored / count, rel=1e-12)
    assert rows["rtn"].perplexity != rows["gptq"].perplexity
    assert not any(hasattr(m, "qtensor") for m in model.modules())
    text = table_of(result)
    assert "refused" in text
    assert "hqq, int4-g16: quantizer 'hqq'" in text


def test_what_is_measured_is_not_calibrated_on() -> None:
    from lath.integration.calibration import split_text

    ids = torch.arange(1000)
    measured, calibration = split_text(ids[None], 100, 10_000, 128, 0)
    assert torch.equal(measured, ids[:100])
    assert calibration is not None
    assert calibration.ids.shape == (7, 128)
    assert int(calibration.ids.min()) >= 100
    assert len(calibration.ids.unique()) == 7 * 128
    assert split_text(ids, 950, 10_000, 128, 0)[1] is None
    with pytest.raises(ValueError, match="1000 tokens, 1001"):
        split_text(ids, 1001, 1, 2, 0)


def test_the_command_writes_json_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "compare.json"
    first = [*SMALL, "--codecs", "int4-g32,nf4-g32", "--quantizers", "rtn", "--json", str(path)]
    assert run(first) == 0
    shown = capsys.readouterr().out
    assert "bits per weight" in shown
    assert "nf4-g32" in shown
    record = json.loads(path.read_text())
    assert [row["codec"] for row in record["rows"]] == ["int4-g32", "nf4-g32"]
    assert "machine" in record
    record["rows"][0]["perplexity"] = 1.25  # kept, not measured again
    path.write_text(json.dumps(record))
    again = [*SMALL, "--codecs", "int4-g32,int8", "--quantizers", "rtn", "--json", str(path)]
    assert run([*again, "--resume"]) == 0
    rows = {row["codec"]: row["perplexity"] for row in json.loads(path.read_text())["rows"]}
    assert rows["int4-g32"] == 1.25
    assert set(rows) == {"int4-g32", "nf4-g32", "int8"}
    capsys.readouterr()
    assert run([*again, "--resume", "--seed", "3"]) == 2
    assert "another seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantizers", "gtpq"], "quantizer must be one of"),
        (["--codecs", "int9"], "int9"),
        (["--codecs", ","], "expected names"),
        (["--resume"], "--resume needs --json"),
        (["--json", "/no/such/folder/x.json"], "--json must be a file"),
        (["--tokens", "1"], "--tokens"),
        (["--tokens", "999999", "--codecs", "int8"], "tokens, 999999 are to be measured"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_a_plot_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare_plot, "find_spec", lambda name: None)
    assert run([*SMALL, "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install 'lath[plot]'" in capsys.readouterr().err


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        CompareRow("int4-g64", "rtn", 4.25, 39.8, 0.1, 1.0),
        CompareRow("int4-g64", "gptq", 4.25, 31.8, 0.1, 1.0),
        CompareRow("int2", "rtn", 2.0, 1e6, 0.5, 1.0), CompareRow("nf4", "hqq", reason="no"),
    ]  # fmt: skip
    path = tmp_path / "x.png"
    compare_plot.plot(Comparison(options(), 28.2, 64, rows), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "matplotlib" in sys.modules


def test_run_with_a_quantiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`lath run --quantizer gptq` measures other text than it calibrates on, and can be resumed."""
    for name, value in (
        ("PREFILL_TOKENS", 16), ("DECODE_TOKENS", 3), ("MEASURED_TOKENS", 128), ("WINDOW", 64),
    ):  # fmt: skip
        monkeypatch.setattr(run_command, name, value)
    monkeypatch.setattr(run_command, "english_text", lambda: "Leave it room to grab. " * 40)
    folder = tmp_path / "layers"
    command = [
        "run", "--model", "tiny", "--backend", "reference", "--rounds", "1", "--max-new-tokens",
        "5", "--weights", "int4-g32", "--quantizer", "awq+gptq", "--calibration-folder",
        str(folder), "--dtype", "float32",
    ]  # fmt: skip
    assert run(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "awq+gptq int4-g32" in shown
    assert "Calibrated on 768 tokens of the text; perplexity is of 128 others" in shown
    assert len(list(folder.glob("layer-*.safetensors"))) == 2
    assert run([*command[:-4], "--dtype", "float32", "--quantizer", "rtn"]) == 0
    assert run([*command, "--quantizer", "hqq"]) == 2
    assert "--calibration-folder is for gptq and awq" in capsys.readouterr().err
