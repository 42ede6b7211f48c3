"""The command `lath`, on the tiny model and the NumPy definition: its figures and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("rich")

from lath.integration import run_command, store
from lath.integration.command_line import run
from lath.integration.models import tiny_model
from lath.integration.patch import patch
from lath.integration.report import model_bytes

TINY = ["--model", "tiny", "--backend", "reference", "--rounds", "1", "--max-new-tokens", "5"]
KEYS = {
    "bytes_before", "bytes_after", "perplexity_before", "perplexity_after",
    "prefill_tokens_per_s_before", "prefill_tokens_per_s_after",
    "decode_tokens_per_s_before", "decode_tokens_per_s_after",
    "backend", "weights", "text_before", "text_after",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(run_command, "english_text", lambda: "Leave it room to grab. " * 20)
    monkeypatch.setattr(run_command, "PREFILL_TOKENS", 16)
    monkeypatch.setattr(run_command, "DECODE_TOKENS", 3)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_run_reports_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    options = ["--weights", "int8-g32", "--dtype", "float32", "--json", str(path)]
    assert run(["run", *TINY, *options]) == 0
    figures: dict[str, Any] = json.loads(path.read_text())
    assert set(figures) == KEYS
    assert figures["backend"] == "reference"
    assert figures["weights"] == "int8-g32"
    assert figures["bytes_after"] < figures["bytes_before"]
    assert figures["perplexity_after"] == pytest.approx(figures["perplexity_before"], rel=0.01)
    assert all(figures[key] > 0 for key in KEYS if "tokens_per_s" in key)
    shown = capsys.readouterr()
    for label in ("bytes", "perplexity", "prefill tokens/s", "decode tokens/s", "reference"):
        assert label in shown.out
    assert shown.err == ""


def test_run_with_attention_and_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    options = ["--weights", "int8-g32", "--dtype", "float32", "--json", str(path)]
    assert run(["run", *TINY, *options, "--attention", "int8", "--kv", "k8v4"]) == 0
    figures: dict[str, Any] = json.loads(path.read_text())
    assert figures["perplexity_after"] == pytest.approx(figures["perplexity_before"], rel=0.01)
    assert "attention int8, cache int8/int4" in " ".join(capsys.readouterr().out.split())


def test_run_fuses_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("numba")
    assert run(["run", *TINY, "--kv", "int8", "--decode", "fused", "--backend", "cpu"]) == 0
    assert "decode: one compiled call per token" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--backend", "reference"], "cache: the model's own (backend reference)"),
        (["--decode", "modules"], "cache: the model's own (--decode modules)"),
        (["--kv", "none"], ""),
        ([], "decode: one compiled call per token"),
    ],
)
def test_the_cache_is_paged_where_that_fuses_decoding(
    options: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("numba")
    assert run(["run", *TINY, "--backend", "cpu", *options]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert shown in text
    assert ("cache int8" in text) == (not options)
    assert ("decode:" in text) == (not options)


def test_packed_codes_come_from_the_checkpoint_not_from_its_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --dtype bfloat16 the model runs in bfloat16, but its weights are packed from fp32."""
    seen = []

    def spy(model: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(model.dtype)
        return patch(model, *arguments, **options)

    monkeypatch.setattr(run_command, "patch", spy)
    path = tmp_path / "figures.json"
    assert run(["run", *TINY, "--json", str(path)]) == 0
    assert set(seen) == {torch.float32}
    model, _ = tiny_model(torch.bfloat16)
    assert json.loads(path.read_text())["bytes_before"] == model_bytes(model)


def test_plan_prints_each_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", "tiny", "--m", "1,64", "--device", "sm_90"]) == 0
    shown = capsys.readouterr().out
    for part in ("gate_proj", "down_proj", "176", "64", "sm_90", "int4-g64"):
        assert part in shown
    assert "lm_head" not in shown


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--weights", "int9"], "int9"),
        (["run", "--activations", "int7"], "int7"),
        (["run", "--backend", "gpu"], "backend must be one of"),
        (["run", "--model", "nope"], "'smollm2', 'tiny' or the path"),
        (["run", "--model", "tiny", "--dtype", "float8"], "dtype must be one of"),
        (["run", "--model", "tiny", "--attention", "int4"], "attention must be"),
        (["run", "--model", "tiny", "--kv", "k3v4"], "kv must be one of"),
        (["run", "--model", "tiny", "--decode", "quick"], "decode must be one of"),
        (["run", "--model", "tiny", "--decode", "fused", "--kv", "none"], "paged cache"),
        (["run", "--threads", "many"], "--threads"),
        (["run", "--threads", "-1"], "--threads"),
        (["run", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["run", "--model", "tiny", "--json", "/no/such/folder/x.json"], "--json"),
        (["run", *TINY, "--skip", "nothing"], "'nothing' fits no module"),
        (["plan", "--model", "tiny", "--m", "1,x"], "--m must be"),
        (["plan", "--model", "tiny", "--device", "sm_1"], "sm_1"),
        (["plan", "--model", "tiny", "--weights", "int0"], "int0"),
        (["frobnicate"], "frobnicate"),
        (["run", "--frobnicate"], "frobnicate"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith("lath: ")
    assert message in shown.err


def test_no_disk_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LATH_CACHE_DIR", str(tmp_path / "cache"))
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage)
    assert run(["run", "--model", "smollm2"]) == 2
    assert "no disk space" in capsys.readouterr().err


def test_without_typer_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['typer'] = None\n"
        "from lath.integration.command_line import main\n"
        "main(['run'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'lath[cli]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("a fault")

    monkeypatch.setattr("lath.integration.commands.run_model", broken)
    with pytest.raises(AssertionError, match="a fault"):
        run(["run", *TINY])


def test_difference_marks_words() -> None:
    assert str(run_command.difference("a b c", "a x c d")) == (
        "Difference of the answers: a [-b-] {+x+} c {+d+}"
    )
    assert "same" in str(run_command.difference("a b", "a b"))


def test_a_model_that_takes_no_pages_keeps_its_cache() -> None:
    pytest.importorskip("numba")
    options = run_command.RunOptions(
        "x", "int8", "auto", "cpu", (), "none", False, "x", 1, "auto", 1, kv=run_command.AUTO_CACHE
    )
    chosen, note = run_command.with_cache(torch.nn.Linear(16, 16), options)
    assert chosen.kv is None
    assert "PreTrainedModel" in note
