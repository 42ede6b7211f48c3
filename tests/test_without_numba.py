"""A machine without numba: what a user sees of patching, decoding, loading and the command line.

A process of its own, which finds every package that this one finds but numba and llvmlite.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import lath
from hf_models import generate, hf_model, tokens

pytest.importorskip("transformers")
pytest.importorskip("numba")
TESTS = Path(__file__).resolve().parent
MISSING = ("numba", "llvmlite")
NEEDED = "needs numba: pip install 'lath[cpu]'"
PROMPT, NEW = 70, 6  # more than the part that stays in 16 bits


def folders_without(packages: tuple[str, ...], place: Path) -> list[str]:
    """Folders to import from, as this process's, without some packages: a folder that has one of
    them is replaced by links to all else in it."""
    folders = [str(TESTS.parent / "src"), str(TESTS)]
    for number, name in enumerate(filter(os.path.isdir, sys.path)):
        folder = Path(name)
        if any((folder / package).exists() for package in packages):
            links = place / str(number)
            links.mkdir()
            for entry in folder.iterdir():
                if not entry.name.startswith(packages):
                    (links / entry.name).symlink_to(entry)
            folder = links
        folders.append(str(folder))
    return folders


def run_without_numba(place: Path, code: str, *arguments: str) -> Any:
    """What the code, in a process without numba, puts into the dict `found`."""
    head = """
        import contextlib, io, json, sys, warnings
        import torch; torch.set_num_threads(1); torch.set_grad_enabled(False)
        import lath
        from hf_models import generate, hf_model, tokens
        found = {}
    """
    whole = "".join(map(textwrap.dedent, (head, code, "\nprint(json.dumps(found))")))
    # Without `site`, which would put the packages of the environment back.
    done = subprocess.run(
        [sys.executable, "-S", "-c", whole, *arguments], capture_output=True, text=True,
        check=False, cwd=TESTS, env={
            **os.environ, "PYTHONPATH": os.pathsep.join(folders_without(MISSING, place)),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_patched_models_decode_by_modules_and_say_so(tmp_path: Path) -> None:
    """The tokens are those of the compiled kernels; what names the kernels says what is missing and
    leaves the model as it was."""
    found = run_without_numba(
        tmp_path,
        f"""
        try: import numba
        except ModuleNotFoundError: pass
        else: raise SystemExit("numba is there")
        model = hf_model("Llama")
        given = dict(skip=(), kv="float", activations="float")
        warned = warnings.catch_warnings(record=True)
        with warned as seen, lath.patch(model, "int4-g32", **given) as report:
            warnings.simplefilter("always")
            found["promised"] = str(report.decode)
            found["tokens"] = generate(model, tokens(1, {PROMPT}), {NEW}).tolist()
            found["report"], found["counts"] = str(report), report.decode.counts
            found["said"] = [str(one.message) for one in seen]
        before = type(model), set(model.__dict__), set(dict(model.named_parameters()))
        for name, options in (("fused", dict(decode="fused")), ("cpu", dict(backend="cpu"))):
            try: lath.patch(model, "int4-g32", **given, **options)
            except (ValueError, RuntimeError) as error: found[name] = str(error)
            after = type(model), set(model.__dict__), set(dict(model.named_parameters()))
            assert after == before, name
        """,
    )
    model = hf_model("Llama")
    with torch.no_grad(), lath.patch(
        model, "int4-g32", skip=(), kv="float", activations="float", decode="fused"
    ) as report:  # fmt: skip
        expected = generate(model, tokens(1, PROMPT), NEW)
        assert report.decode is not None
        assert report.decode.counts["fused"] == NEW - 1
    assert found["tokens"] == expected.tolist()
    assert found["promised"] == f"decode: module by module: the compiled step {NEEDED}"
    reason = f"the compiled step {NEEDED}"
    assert found["counts"] == {"several tokens": 1, reason: NEW - 1}
    assert "backend reference" in found["report"]
    assert sum("numba is not installed" in text for text in found["said"]) == 1
    assert f"{NEW - 1:,} calls by modules ({reason})" in found["report"]
    assert found["fused"] == (
        f"decode='fused' cannot be had for this LlamaForCausalLM: {reason}; decode='auto' takes "
        "its modules there"
    )
    assert found["cpu"] == f"backend='cpu' {NEEDED}"


def test_commands_and_loading(tmp_path: Path) -> None:
    """`lath warmup` and a named backend are refused in one line; what is left to lath runs by the
    definition, and says so."""
    hf_model("Llama").save_pretrained(tmp_path / "model")
    found = run_without_numba(
        tmp_path,
        f"""
        from lath.integration import run_command
        from lath.integration.command_line import run
        run_command.english_text = lambda: "Leave it room to grab. " * 20
        run_command.PREFILL_TOKENS, run_command.DECODE_TOKENS = 16, 3
        def command(*arguments):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = run(arguments)
            return code, " ".join(out.getvalue().split()), err.getvalue()
        tiny = ("--model", "tiny", "--rounds", "1", "--max-new-tokens", "3")
        found["warmup"] = command("warmup")
        found["cpu"] = command("run", *tiny, "--backend", "cpu")
        found["fused"] = command("run", *tiny, "--decode", "fused")
        found["run"] = command("run", *tiny, "--kv", "int8")
        found["plan"] = command("plan", "--model", "tiny", "--device", "cpu")
        model = lath.load(sys.argv[1], "int4-g32", head="int8-g32", activations="float")
        with lath.patch(model, None, kv="float") as report:
            found["tokens"] = generate(model, tokens(1, {PROMPT}), {NEW}).tolist()
            found["decode"] = str(report.decode)
        try: lath.load(sys.argv[1], backend="cpu")
        except RuntimeError as error: found["load"] = str(error)
        """,
        str(tmp_path / "model"),
    )
    refused = f"lath: backend='cpu' {NEEDED}\n"
    assert found["warmup"] == [2, "", refused]
    assert found["cpu"] == [2, "", refused]
    assert found["fused"][0] == 2
    assert f"the compiled step {NEEDED}" in found["fused"][2]
    assert found["run"][0] == 0, found["run"]
    assert f"decode: module by module: the compiled step {NEEDED}" in found["run"][1]
    assert found["plan"][0] == 0, found["plan"]
    assert found["load"] == f"backend='cpu' {NEEDED}"
    assert f"the compiled step {NEEDED}" in found["decode"]
    model = lath.load(tmp_path / "model", "int4-g32", head="int8-g32", activations="float")
    with torch.no_grad(), lath.patch(model, None, kv="float", decode="fused"):
        assert found["tokens"] == generate(model, tokens(1, PROMPT), NEW).tolist()
