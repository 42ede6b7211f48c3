"""The package as a whole: imports in fresh processes, the floors of the house, sizes of files."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("formats", "kernels", "reference", "integration", "src/lath", "tests", "bench")

# Which floors each floor may import (DESIGN.md, 1): arrows go down only.
FLOORS = {
    "formats": {"formats"},
    "reference": {"reference", "formats"},
    "kernels": {"kernels", "formats"},
    "src/lath": {"verbs", "selectors", "kernels", "reference", "formats", "integration"},
    "integration": {"integration", "verbs", "selectors", "kernels", "reference", "formats", ""},
}


def run_python(code: str) -> str:
    """stdout of a fresh interpreter; fails with its stderr."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, env=environment, cwd=ROOT / "tests", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources(folder: str) -> list[Path]:
    found = (ROOT / folder).rglob("*.py")
    return [p for p in found if not any(part.is_symlink() for part in [p, *p.parents])]


def test_import_needs_no_optional_package() -> None:
    """With triton, numba, transformers, typer and rich refused, import and the reference work."""
    run_python("""
        import sys
        optional = {"triton", "numba", "llvmlite", "transformers", "typer", "rich"}
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in optional:
                    raise ModuleNotFoundError(name, name=name)
        import torch
        sys.meta_path.insert(0, Refuse())
        import warnings; warnings.simplefilter("ignore")
        import lath
        packed = lath.quantize(torch.randn(20, 64), "int4-g32")
        y = lath.linear(torch.randn(2, 64), packed, backend="reference")
        assert y.shape == (2, 20)
    """)


def test_import_brings_no_optional_package_and_no_gpu() -> None:
    run_python("""
        import torch, sys
        before = set(sys.modules)
        import lath
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        assert not new & {"numba", "llvmlite", "transformers", "typer", "rich", "kernels"}, new
        assert not torch.cuda.is_initialized()
    """)


def test_import_is_fast_on_top_of_torch() -> None:
    seconds = [
        float(run_python("""
            import torch, torch.library, time
            start = time.process_time()  # what others do on this machine does not count
            import lath
            print(time.process_time() - start)
        """))
        for _ in range(3)
    ]  # fmt: skip
    assert min(seconds) < 0.5, seconds


def test_numba_missing_is_said_once_and_named_backends_raise() -> None:
    out = run_python("""
        import torch, warnings, lath
        from lath.verbs import backends
        backends.is_installed = lambda package: package != "numba"
        packed = lath.quantize(torch.randn(20, 64), "int4-g32")
        x = torch.randn(2, 64)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            lath.linear(x, packed); lath.linear(x, packed)
        print(len([w for w in seen if "numba is not installed" in str(w.message)]))
        for backend, word in (("cpu", "numba"), ("triton", "GPU")):
            try: lath.linear(x, packed, backend=backend)
            except RuntimeError as error: assert word in str(error), error
            else: raise SystemExit(backend)
    """)
    assert out.strip() == "1"


@pytest.mark.parametrize("folder", FLOORS)
def test_arrows_go_down_only(folder: str) -> None:
    wrong = []
    for path in sources(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                parts = name.split(".")
                if parts[0] == "lath":
                    floor = parts[1] if len(parts) > 1 else ""
                    if floor not in FLOORS[folder]:
                        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_folders_at_the_top_are_no_packages() -> None:
    """With an __init__.py, `kernels/` would be imported in place of Hugging Face's package."""
    for folder in ("formats", "kernels", "reference", "integration"):
        assert not (ROOT / folder / "__init__.py").exists()
        assert (ROOT / "src/lath" / folder).is_symlink()


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_and_functions_stay_small(folder: str) -> None:
    """A file over 400 lines or a function over 120 is a seam that is missing."""
    large = []
    for path in sources(folder):
        text = path.read_text()
        if len(text.splitlines()) > 400:
            large.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 120:
                    large.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines}")
    assert not large, "\n".join(large)


def test_public_functions_are_typed_and_documented() -> None:
    bare = []
    for folder in ("formats", "reference", "src/lath"):
        for path in sources(folder):
            tree = ast.parse(path.read_text())
            assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"
            for node in tree.body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    typed = node.returns is not None and all(
                        arg.annotation is not None for arg in node.args.args
                    )
                    if not typed:
                        bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not bare, "\n".join(bare)
