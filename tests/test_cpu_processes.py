"""The compiled CPU kernels in processes of their own: other instruction sets, the cache on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import lath
from lath.kernels.simd import isa

TESTS = Path(__file__).resolve().parent


# Says where a process is that does not end, and ends it.
WATCHED = "import faulthandler; faulthandler.dump_traceback_later({seconds}, exit=True)\n"


def run_python(code: str, **environment: str) -> str:
    code = WATCHED.format(seconds=480) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=540,
        cwd=TESTS, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


LOWERINGS = {
    "avx2": {"LATH_ISA": "avx2"},
    "portable": {"LATH_ISA": "portable"},
    "no vector extension": {"LATH_ISA": "", "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
}


def run_lowered(name: str, code: str) -> None:
    """Run `code` in a process whose kernels are compiled for one of LOWERINGS.

    A process can leave out instructions its CPU has, never add some: AVX2 needs a CPU that has it.
    """
    if name == "avx2" and not isa.cpu_features() >= {"avx2", "fma", "f16c"}:
        pytest.skip("AVX2 kernels cannot run here: this CPU has no AVX2, FMA and F16C")
    run_python(code, **LOWERINGS[name])


@pytest.mark.parametrize("name", LOWERINGS)
def test_other_instruction_sets(name: str) -> None:
    run_lowered(
        name,
        """
        import torch; torch.set_num_threads(1)
        from test_cpu_kernels import LinearCase, check
        for text in ("int4-g64 {m} 37 201 fp16 int8-g64 normal True",
                     "int8-g32-asym {m} 20 100 bf16 int8 one_sign False",
                     "int2 {m} 33 300 fp32 int8 normal True",
                     "int1-g48 {m} 18 150 fp16 float one_sign False",
                     "int6-g32-fzero {m} 50 140 bf16 int8-g64 normal False"):
            for m in (1, 5, 9):
                check(LinearCase.parse(text.format(m=m)))
        """,
    )


@pytest.mark.parametrize("name", LOWERINGS)
def test_sums_of_the_largest_products(name: str) -> None:
    """Where a lowering adds in 16 bits, the largest codes and activations still fit."""
    run_lowered(name, "import test_cpu_processes; test_cpu_processes.check_largest_products()")


def check_largest_products() -> None:
    torch.set_num_threads(1)
    x = torch.ones(9, 320)
    x[1], x[2, ::2] = -1, -1
    dense = torch.ones(16, 320)
    dense[1], dense[2, ::2], dense[3, 1::2] = -1, -1, -1
    for codec in ("int2", "int4", "int4-asym", "int8", "int8-asym", "ternary", "ternary-1.6",
                  "mxfp4", "mxfp6", "int8-nested"):  # fmt: skip
        weight = lath.quantize(dense, codec)
        for tokens in (1, 4, 9):
            y, exact = (
                lath.linear(x[:tokens], weight, activations="int8", backend=backend)
                for backend in ("cpu", "reference")
            )
            assert (y - exact).abs().max() <= 2.0**-20 * exact.abs().max(), (codec, tokens)
            assert exact.abs().max() > 100, codec


def test_instruction_set_by_name() -> None:
    code = "from lath.kernels.simd import host_isa; print(host_isa())"
    assert run_python(code, LATH_ISA="portable").strip() == "portable"
    haswell = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
    assert run_python(code, LATH_ISA="", **haswell).strip() == "avx2"
    refused = "from lath.kernels.simd import host_isa\ntry: host_isa()\nexcept {}: print('refused')"
    assert "refused" in run_python(refused.format("ValueError"), LATH_ISA="sse")
    assert "refused" in run_python(
        refused.format("RuntimeError"), LATH_ISA="avx512_vnni", **haswell
    )


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    code = """
        import time, torch, lath
        torch.set_num_threads(1)
        from lath.formats.activations import ActivationFormat
        weight = lath.quantize(torch.ones(64, 128), "int4-g64")
        start = time.process_time()  # what others do here does not count
        from lath.kernels.linear import cpu, cpu_activations, cpu_dot, cpu_kernels, cpu_launch
        from lath.kernels.simd import compile as simd
        layer = cpu.prepare(weight, None, ActivationFormat("int8", 64))
        for m in (1, 9):
            layer(torch.ones(m, 128))
        seconds = time.process_time() - start
        kernels = [simd.compile_kernel(cpu_activations.emit_quantize, 0)]
        for m in (1, 9):
            tile = cpu_kernels.tile_of(layer._view.record, "int8", m, layer._view.panel_bytes)
            kernels.append(simd.compile_kernel(cpu_dot.emit_tile, 4, "none", True, *tile))
        hits = sum(cpu_launch.serial_driver().stats.cache_hits.values())
        print(hits, [kernel.cache_hits for kernel in kernels], seconds, sep=";")
    """
    first, second = (
        run_python(code, NUMBA_CACHE_DIR=str(tmp_path)).strip().split(";") for _ in range(2)
    )
    assert first[:2] == ["0", "[0, 0, 0]"]
    assert second[:2] == ["1", "[1, 1, 1]"]
    assert float(second[2]) < 1, second


def test_numba_missing_is_named() -> None:
    out = run_python("""
        import sys, torch
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("numba", "llvmlite"):
                    raise ModuleNotFoundError(name, name=name)
        sys.meta_path.insert(0, Refuse())
        import lath.kernels.simd
        try: import lath.kernels.linear.cpu
        except ImportError as error: print(error)
    """)
    assert "lath[cpu]" in out
