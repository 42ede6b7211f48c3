"""From which share of zeros a sparse weight is faster than the dense one it would be, on one core.

    python bench/sparse_break_even.py [--shape 2560x6912] [--tokens 1,8] [--kept int8/int8]

Each row pairs a sparse codec with its dense one, and with torch's bf16 layer, in the same rounds.
"""

from __future__ import annotations

import itertools
from typing import Any

import report
import torch
from bench_linear import rows_of

from lath.integration.benchmark import machine_facts
from lath.kernels.simd import isa

SHARES = (0, 50, 60, 70, 80, 90)


def measured(shape: str, tokens: list[int], series: list[str], rounds: int) -> list[dict[str, Any]]:
    """series: "codec/activations", kept numbers of the sparse layers and the dense layer."""
    k, n = (int(part) for part in shape.split("x"))
    rows: list[dict[str, Any]] = []
    for m in tokens:
        for kept in series:
            names = [f"sparse{share}-{kept}" for share in SHARES]
            found = {row["what"]: row for row in rows_of([kept, *names], m, k, n, rounds)}
            base = found[kept]
            bytes_of = {
                what: row["bytes_per_second"] * row["seconds"] for what, row in found.items()
            }
            rows += [
                {
                    "kept": kept, "tokens": m, "share": share, "seconds": found[name]["seconds"],
                    "fastest": found[name]["fastest"], "dense_seconds": base["seconds"],
                    "dense_ratio": base["seconds"] / found[name]["seconds"],
                    "torch_ratio": found[name]["torch_ratio"],
                    "view_bits": 8 * bytes_of[name] / (k * n),
                }
                for share, name in zip(SHARES, names, strict=True)
            ]  # fmt: skip
    return rows


def break_even(rows: list[dict[str, Any]], kept: str, tokens: int) -> str:
    """The share at which the ratio passes 1, between the two that were measured around it."""
    chosen = [
        (r["share"], r["dense_ratio"]) for r in rows if (r["kept"], r["tokens"]) == (kept, tokens)
    ]
    for (low, before), (high, after) in itertools.pairwise(chosen):
        if before < 1 <= after:
            return f"{low + (high - low) * (1 - before) / (after - before):.0f} %"
    return "below 0 %" if chosen[0][1] >= 1 else f"above {SHARES[-1]} %"


def as_markdown(rows: list[dict[str, Any]], shape: str, command: str) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in machine_facts().items())
    lines = [
        "# Sparse weights against dense ones on one core", "",
        f"    {command}", "",
        f"{facts}; {isa.host_isa()}, expansion by "
        f"{'vpexpandb' if isa.has_native_expand(isa.host_isa()) else 'plain code'}. "
        f"K x N = {shape}, 1 thread, bf16 x, calls interleaved, weights cold, CPU time of the "
        "thread (the machine had other work), medians over rounds. bits: of the CPU's view per "
        "weight.", "",
        "| kept/activations | M | zeros | bits | µs | fastest | dense µs | dense / this | "
        "torch bf16 / this |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        times = (1e6 * r[name] for name in ("seconds", "fastest", "dense_seconds"))
        lines.append(
            f"| {r['kept']} | {r['tokens']} | {r['share']} % | {r['view_bits']:.2f} | "
            f"{' | '.join(f'{time:.0f}' for time in times)} | "
            f"{r['dense_ratio']:.2f} | {r['torch_ratio']:.2f} |"
        )
    lines += ["", "Break-even, interpolated between the rows:", ""]
    for kept, tokens in dict.fromkeys((str(r["kept"]), int(str(r["tokens"]))) for r in rows):
        lines.append(f"* {kept}, M = {tokens}: {break_even(rows, kept, tokens)} zeros")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = report.parser_of(__doc__)
    parser.add_argument("--shape", default="2560x6912", help="K x N")
    parser.add_argument("--tokens", default="1,8")
    parser.add_argument("--kept", default="int8/int8", help="codec/activations, …")
    options = report.parsed(parser)
    if options.threads != 1:
        parser.error(f"--threads must be 1: CPU time is that of one thread, got {options.threads}")
    torch.manual_seed(0)
    tokens = [int(part) for part in options.tokens.split(",")]
    rows = measured(options.shape, tokens, options.kept.split(","), options.rounds)
    command = report.command_of("sparse_break_even.py")
    table = as_markdown(rows, options.shape, command)
    report.save(options, "sparse_break_even", table, command, rows=rows)


if __name__ == "__main__":
    main()
