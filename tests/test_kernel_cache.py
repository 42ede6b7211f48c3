"""Where compiled kernels cannot be kept on disk: they are compiled all the same, and it is said."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_cpu_processes import run_python

import lath
from hf_models import generate, hf_model, tokens

pytest.importorskip("numba")
import numba

from lath.kernels.simd import compile as simd

ROOT = Path(__file__).resolve().parent.parent
PROMPT, NEW = 70, 6


# What makes folders read-only to the owner of everything: modes bind once this capability is gone.
WITHOUT_OVERRIDE = """
    import ctypes, os, sys
    def bound_by_modes():
        if os.name == "posix" and os.geteuid() == 0:
            libc = ctypes.CDLL(None, use_errno=True)
            header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert libc.capget(header, sets) == 0
            for number in range(3):  # effective, permitted, inheritable
                sets[number] &= ~(1 << 1)  # CAP_DAC_OVERRIDE
            assert libc.capset(header, sets) == 0
    bound_by_modes()
    def is_writable(folder):
        try: open(os.path.join(folder, "try"), "w").close()
        except PermissionError: return False
        return True
"""


def read_only(folder: Path) -> None:
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        path.chmod(0o555)


@pytest.mark.skipif(os.name != "posix", reason="needs modes of folders")
def test_decoding_without_a_folder_to_write_to(tmp_path: Path) -> None:
    """The package, the folder that was named and the user's own are read-only: the step is compiled
    in memory, gives the modules' tokens, and one warning names the folders."""
    # As it is installed: real folders in the place of links.
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("named", "home", "src"):
        (tmp_path / name).mkdir(exist_ok=True)
        read_only(tmp_path / name)
    out = run_python(
        WITHOUT_OVERRIDE
        + f"""
    if any(map(is_writable, ({str(tmp_path / "src" / "lath")!r}, os.environ["HOME"]))):
        print("writable"); sys.exit()
    import torch, warnings; torch.set_num_threads(1); torch.set_grad_enabled(False)
    import lath; assert lath.__file__.startswith({str(tmp_path)!r})
    from hf_models import generate, hf_model, tokens
    model, outs = hf_model("Llama"), []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for way in ("modules", "fused"):
            with lath.patch(model, "int4-g32", skip=(), kv="float", activations="float",
                            decode=way) as report:
                outs.append(generate(model, tokens(1, {PROMPT}), {NEW})[0].tolist())
    print(outs[0] == outs[1], report.decode.counts["fused"], outs[1])
    print(*[one.message for one in seen if "kept on disk" in str(one.message)], sep="; ")
        """,
        PYTHONPATH=os.pathsep.join([str(tmp_path / "src"), str(ROOT / "tests")]),
        NUMBA_CACHE_DIR=str(tmp_path / "named"),
        HOME=str(tmp_path / "home"),
        XDG_CACHE_HOME=str(tmp_path / "home"),
    )
    if out.strip() == "writable":
        # Root, where the capability that lets it write anywhere cannot be given up.
        pytest.skip("no folder is read-only for this user")
    lines = out.splitlines()
    model = hf_model("Llama")
    with torch.no_grad(), lath.patch(
        model, "int4-g32", skip=(), kv="float", activations="float", decode="fused"
    ):  # fmt: skip
        expected = generate(model, tokens(1, PROMPT), NEW)[0].tolist()
    assert lines[0] == f"True {NEW - 1} {expected}"
    assert lines[1].startswith(
        "compiled kernels are not kept on disk: no folder for them can be written to. numba tries "
        f"NUMBA_CACHE_DIR={str(tmp_path / 'named')!r}, then {tmp_path}/src/lath/kernels/*/__pycache"
    )
    assert lines[1].endswith("set NUMBA_CACHE_DIR to a folder that can be written to")
    assert lines[1].count("kept on disk") == 1
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".nbi", ".nbc")]


def twice(x):  # type: ignore[no-untyped-def]
    return 2 * x


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """numba's cache."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    simd._say_not_kept.cache_clear()
    yield tmp_path
    simd._say_not_kept.cache_clear()


def compiled() -> tuple[int, list[str]]:
    """A function through the cache, and what was said."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        function = simd.driver(numba.int64(numba.int64))(twice)
    return function(21), [str(one.message) for one in seen]


def test_a_full_disk(folder: Path) -> None:
    """numba looks whether a file can be made, not whether anything fits into it."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        result, said = compiled()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result == 42
    assert len(said) == 1
    assert "File too large" in said[0]
    assert f"NUMBA_CACHE_DIR={str(folder)!r}" in said[0]
    assert compiled() == (42, [])  # there is room again


@pytest.mark.parametrize("length", [0, 20])
@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_damaged_file(suffix: str, length: int, folder: Path) -> None:
    assert compiled() == (42, [])
    (path,) = folder.rglob(f"*{suffix}")
    path.write_bytes(path.read_bytes()[:length])
    result, said = compiled()
    assert result == 42
    assert len(said) == 1
    assert "compiled kernels are not kept on disk" in said[0]


def test_an_error_of_the_kernel_itself_is_raised(folder: Path) -> None:
    def wrong(x):  # type: ignore[no-untyped-def]
        return x.nothing

    with pytest.raises(numba.core.errors.TypingError):
        simd.driver(numba.int64(numba.int64))(wrong)
