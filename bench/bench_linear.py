"""`lath.linear` under pytest-benchmark, over the shapes of the tests' catalogue of speed.

    pytest bench --benchmark-only

For ratios against peers in one run use `lath bench linear`, which interleaves the calls; to see how
far each codec is from what one core can read,

    python bench/bench_linear.py [--tokens 1,8,128] [--codecs mxfp4/int8,nf4-g64/float] [--rounds 9]

which writes bench/results/codecs_cpu.md and codecs_cpu.json; with `--rows activations` it takes the
activation formats and the codecs that go with them instead (activations_cpu). --name: of other
files; sums_cpu holds sums of packed weights.
Vector codebooks and lattices hold random numbers here: to fit them takes longer than all the rest,
and no time depends on them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import cases
import lath
from lath.formats.activations import ActivationFormat
from lath.formats.families import weight_class, weight_codec
from lath.formats.lattice import LatticeCodec
from lath.formats.vectors import VectorCodec
from lath.integration.benchmark import machine_facts
from lath.integration.ceilings import COLD_BYTES
from lath.kernels.simd import isa
from lath.kernels.simd.ceilings import Read
from lath.verbs.kinds import kind_of

torch.set_num_threads(1)

TABLE_CODECS = (
    "ternary/int8", "ternary-1.6/int8", "int4-g128/int8-g128", "int8-g128/int8-g128",
    "fp4-g64/int8-g64", "mxfp4/int8",
    "mxfp4/int8-g32", "nvfp4/int8", "mxfp6/int8", "nf4-g64/int8-g64", "nf4-g64/float",
    "mxfp4/float", "e4m3/float", "e4m3/int8", "sparse50-int8/int8", "sparse80-int4-g64/int8-g64",
    "sparse50-bf16/float",
)  # fmt: skip
VECTOR_CODECS = (
    "vq8-256/float", "vq8-65536/float", "vq8-65536+256/float", "vq8-65536+256-g128/float",
    "vq4-256-g128/float", "vq2-16/float", "vq2-256/float", "vq8-256/int8",
    "lattice2-d8/int8", "lattice4-d8-g128/int8-g128",
)  # fmt: skip
# FlexQ, W8A8, DGQ beside the same codes with a sum for each group, FireQ, E4M3, views of one store.
ACTIVATION_CODECS = (
    "int6-g128/int6-g128", "int8/int8", "int4-g128/int8-g128", "int4-g128-s8/int8-g128",
    "int4-g128-s8/int8", "int4-g32-s8/int8-g32", "int4-g32-s8/int8", "int4-g128-fp8/fp8",
    "e4m3/fp8", "int8-g64-nested/int8-g64", "int4-g64-nested/int8-g64", "int2-g64-nested/int8-g64",
)  # fmt: skip
ROWS = {"codecs": TABLE_CODECS, "activations": ACTIVATION_CODECS, "vectors": VECTOR_CODECS}
# Blocks of calls in turn: long against the clock, short against what else the machine does.
BLOCK_SECONDS = 0.03


@pytest.mark.parametrize("case", cases.SPEED, ids=str)
def test_lath(case: cases.LinearCase, benchmark) -> None:  # type: ignore[no-untyped-def]
    data = cases.make_inputs(case)
    with torch.inference_mode():
        benchmark(lath.linear, data.x, data.weight, activations=case.activations)


@pytest.mark.parametrize("case", cases.SPEED, ids=str)
def test_torch(case: cases.LinearCase, benchmark) -> None:  # type: ignore[no-untyped-def]
    data = cases.make_inputs(case)
    dense = data.weight.dequantize(data.x.dtype)
    with torch.inference_mode():
        benchmark(torch.nn.functional.linear, data.x, dense)


def lath_call(name: str, m: int, k: int, n: int) -> tuple[Callable[[int], object], int]:
    """The layer "codec/activations" over enough copies of its view to be cold."""
    codec, activations = name.split("/")
    packed = packed_weight(codec, k, n)
    prepare = kind_of(packed).function("cpu", "prepare")
    x = torch.randn(m, k).bfloat16()
    layers: list[Callable[[torch.Tensor], object]] = []
    weights: list[lath.PackedWeight] = []  # a view lives as long as its weight
    while not weights or len(weights) * weights[0].view_nbytes < COLD_BYTES:
        copies = {name: tensor.clone() for name, tensor in packed.tensors.items()}
        weights.append(packed.from_tensors(packed.codec, packed.shape, copies))
        layers.append(prepare(weights[-1], None, ActivationFormat.parse(activations)))
        layers[-1](x)
    return (lambda i: layers[i % len(weights)](x)), weights[0].view_nbytes


def packed_weight(text: str, k: int, n: int) -> lath.PackedWeight:
    """A weight [n, k], of normal numbers; of vector codebooks and lattices any that are valid."""
    codec = weight_codec(text)
    if not isinstance(codec, (VectorCodec, LatticeCodec)):
        return lath.quantize(torch.randn(n, k) / k**0.5, codec)
    packed = weight_class(codec).empty(codec, (n, k), "cpu")
    for name, tensor in packed.tensors.items():
        if name == "codes":
            tensor.copy_(torch.randint(-(2**31), 2**31, tensor.shape))
        else:
            tensor.normal_().abs_().mul_(k**-0.5)
    return packed


def torch_call(m: int, k: int, n: int) -> tuple[Callable[[int], object], int]:
    dense = [torch.randn(n, k).bfloat16() for _ in range(max(2, COLD_BYTES // (2 * n * k)))]
    x = torch.randn(m, k).bfloat16()
    return (lambda i: torch.nn.functional.linear(x, dense[i % len(dense)])), 2 * n * k


def interleaved(calls: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds per call of this thread, which other processes do not take time from."""
    counts, place = {}, dict.fromkeys(calls, 0)
    for name, call in calls.items():
        call(0)
        start = time.thread_time()
        for i in range(3):
            call(i + 1)
        counts[name] = max(1, int(3 * BLOCK_SECONDS / (time.thread_time() - start)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            for i in range(place[name], place[name] + counts[name]):
                call(i)
            seconds[name].append((time.thread_time() - start) / counts[name])
            place[name] += counts[name]
    return seconds


def rows_of(names: list[str], m: int, k: int, n: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each layer "codec/activations", for torch's bf16 layer and for a plain read."""
    with torch.inference_mode():
        made = {name: lath_call(name, m, k, n) for name in names}
        read = Read(np.ones(COLD_BYTES, np.uint8), 8 << 20, 1)
        made["torch bf16"], made["read"] = torch_call(m, k, n), (read, read.nbytes)
        seconds = interleaved({name: call for name, (call, _) in made.items()}, rounds)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ceiling = made["read"][1] / median["read"]
    return [
        {
            "what": name, "tokens": m, "seconds": median[name], "fastest": min(seconds[name]),
            "bytes_per_second": nbytes / median[name],
            "of_read": nbytes / median[name] / ceiling,
            "operations_per_second": 0 if name == "read" else 2 * m * n * k / median[name],
            "torch_ratio": median["torch bf16"] / median[name],
        }
        for name, (_, nbytes) in made.items()
    ]  # fmt: skip


def as_markdown(rows: list[dict[str, Any]], shape: str, command: str) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in machine_facts().items())
    lines = [
        "# `lath.linear` of every kind of codec on one core",
        "",
        f"    {command}",
        "",
        f"{facts}; {isa.host_isa()}. K x N = {shape}, 1 thread, bf16 x, calls interleaved, weights "
        "cold, CPU time of the thread, which other processes take none of, medians over rounds. "
        "GB/s: of the view; of read: of a plain read in the same rounds.",
        "",
        "| codec/activations | M | µs | fastest | GB/s | of read | GOPS | torch bf16 / this |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rest = ""
        if row["what"] != "read":
            rest = f"{row['operations_per_second'] / 1e9:.0f} | {row['torch_ratio']:.2f}"
        lines.append(
            f"| {row['what']} | {row['tokens']} | {row['seconds'] * 1e6:.0f} | "
            f"{row['fastest'] * 1e6:.0f} | {row['bytes_per_second'] / 1e9:.1f} | "
            f"{row['of_read']:.2f} | {rest or ' | '} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = report.parser_of(__doc__)
    parser.add_argument("--shape", default="2560x6912", help="K x N")
    parser.add_argument("--tokens", default="1,8,128")
    parser.add_argument("--rows", choices=tuple(ROWS), default="codecs")
    parser.add_argument("--codecs", help="in place of those of --rows")
    parser.add_argument("--name", help="of the files written, in place of that of --rows")
    options = report.parsed(parser)
    if options.threads != 1:
        parser.error(f"--threads must be 1: CPU time is that of one thread, got {options.threads}")
    k, n = (int(part) for part in options.shape.split("x"))
    rows = []
    names = options.codecs.split(",") if options.codecs else list(ROWS[options.rows])
    for m in (int(part) for part in options.tokens.split(",")):
        rows += rows_of(names, m, k, n, options.rounds)
    command = report.command_of("bench_linear.py")
    report.save(
        options,
        options.name or f"{options.rows}_cpu",
        as_markdown(rows, options.shape, command),
        command,
        rows=rows,
    )


if __name__ == "__main__":
    main()
