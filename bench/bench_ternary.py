"""Ternary weights on one core: 1.6 bits against 2, and look-ups against products without VNNI.

    python bench/bench_ternary.py [--rounds 9]

writes bench/results/ternary_cpu.md and .json. The second part runs in a process whose code is
compiled for a Haswell (AVX2, sixteen 256-bit registers): LATH_ISA=avx2 alone would let LLVM use the
wider registers of this machine. It is still this machine that runs it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import report
import torch
from bench_linear import interleaved, lath_call
from bench_lowerings import IN_CHILD, LOWERINGS

import lath
from lath.formats.activations import ActivationFormat
from lath.integration.benchmark import machine_facts
from lath.kernels.linear import cpu
from lath.kernels.simd import isa

SHAPES = ((2560, 6912), (4096, 4096), (4096, 14336))  # K x N
DENSE, WIDE = "ternary-1.6/int8", "ternary/int8"


def paired(calls: dict[str, Any], rounds: int, shape: tuple[int, int], m: int) -> dict[str, Any]:
    """Medians of two calls and the median of their ratios, first over second, round by round."""
    seconds = interleaved(calls, rounds)
    first, second = seconds.values()
    ratio = statistics.median(a / b for a, b in zip(first, second, strict=True))
    names = list(calls)
    return {
        "shape": f"{shape[0]}x{shape[1]}", "tokens": m, "isa": isa.host_isa(), "names": names,
        "seconds": [statistics.median(first), statistics.median(second)], "ratio": ratio,
    }  # fmt: skip


def measure_bits(rounds: int) -> list[dict[str, Any]]:
    """2 bits over 1.6, weights cold, bf16 x."""
    rows = []
    for k, n in SHAPES:
        for m in (1, 8, 128):
            calls = {name: lath_call(name, m, k, n)[0] for name in (WIDE, DENSE)}
            rows.append(paired(calls, rounds, (k, n), m))
    return rows


def measure_look_ups(rounds: int) -> list[dict[str, Any]]:
    """Products over look-ups of one weight, fp32 x."""
    (k, n), rows = SHAPES[0], []
    whole = cpu.prepare(lath.quantize(torch.randn(n, k), "ternary"), None, ActivationFormat("int8"))
    kind = ActivationFormat("int8")
    products, look_ups = (
        cpu.CpuLinear(whole._view, "int8", kind, None, on) for on in (False, True)
    )
    for m in (8, 12, 16, 20, 24, 32, 128):
        x = torch.randn(m, k)
        assert torch.equal(products(x), look_ups(x))
        calls = {"products": lambda _, x=x: products(x), "look-ups": lambda _, x=x: look_ups(x)}
        rows.append(paired(calls, rounds, (k, n), m))
    return rows


def as_markdown(rows: list[dict[str, Any]], command: str) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in machine_facts().items())
    lines = [
        "# Ternary weights on one core",
        "",
        f"    {command}",
        "",
        f"{facts}; load average {os.getloadavg()[0]:.0f}. 1 thread, int8 activations (their "
        "rounding included), calls interleaved, CPU time of the thread, medians over rounds; the "
        "ratio is that of the two calls in each round. "
        "1.6 against 2 bits: weights cold, bf16 x. Look-ups against products: one weight, fp32 x, "
        "compiled for a Haswell and run on this machine.",
        "",
        "| K x N | M | compiled for | this / that | µs | GOPS | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        k, n = (int(size) for size in row["shape"].split("x"))
        micro = [f"{seconds * 1e6:.0f}" for seconds in row["seconds"]]
        rate = [f"{2e-9 * k * n * row['tokens'] / seconds:.0f}" for seconds in row["seconds"]]
        lines.append(
            f"| {row['shape']} | {row['tokens']} | {row['isa']} | {' / '.join(row['names'])} | "
            f"{' / '.join(micro)} | {' / '.join(rate)} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    options = report.parsed(report.parser_of(__doc__))
    if os.environ.get(IN_CHILD):
        print(json.dumps(measure_look_ups(options.rounds)))
        return
    with torch.inference_mode():
        rows = measure_bits(options.rounds)
    child = subprocess.run(
        [sys.executable, Path(__file__), "--rounds", str(options.rounds)],
        env={**os.environ, **LOWERINGS["avx2"], IN_CHILD: "1"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    rows += json.loads(child.stdout)
    command = report.command_of("bench_ternary.py")
    report.save(options, "ternary_cpu", as_markdown(rows, command), command, rows=rows)


if __name__ == "__main__":
    main()
