"""How cost grows: tokens, size of the weight, context and batch, lath beside the strongest peer.

At each point all peers take turns with lath in one run (`bench_linear`, `bench_decode`), and the
fastest of them is the one that is named. A layer over a batch of B tokens is its point M = B.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lath.formats.families import weight_codec
from lath.integration import attention_benchmark
from lath.integration.benchmark import BenchRow, bench_linear, machine_facts
from lath.integration.ceilings import Ceilings

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SIZES = (512, 1024, 2048, 4096, 8192, 16384)
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
BATCHES = (1, 2, 4, 8, 16, 32)
# A layer for the curve over tokens; keys of each sequence of the curve over batches.
LAYER, BATCH_KEYS = 4096, 4096
CODECS = ("ternary", "int4-g128")
PEERS = ("torch-bf16", "torch-int8", "onnxruntime-g128", "ggml-q4_0", "ggml-tq2_0")
CURVES = {
    "tokens": ("M", f"tokens M, K x N = {LAYER} x {LAYER}"),
    "size": ("K = N", "size K = N, one token"),
    "context": ("keys", "keys of the context, one query token, int8 cache"),
    "batch": ("sequences", f"sequences, one query token each, {BATCH_KEYS} keys, int8 cache"),
}


@dataclass(frozen=True)
class Point:
    """what: the codec or the cache. x: the place on the curve. peer: the fastest one, or "" if none
    is here. Times are medians in µs; shares as in `BenchRow`."""

    curve: str
    what: str
    x: int
    median_us: float
    peer: str
    peer_us: float
    ratio: float
    ceilings: Ceilings
    of_read: float | None
    of_dots: float | None
    gops: float | None = None


@dataclass(frozen=True)
class CurveOptions:
    """What is measured; an empty tuple leaves a curve out."""

    tokens: tuple[int, ...] = TOKENS
    sizes: tuple[int, ...] = SIZES
    contexts: tuple[int, ...] = CONTEXTS
    batches: tuple[int, ...] = BATCHES
    codecs: tuple[str, ...] = CODECS
    peers: tuple[str, ...] = PEERS
    rounds: int = 5


def measure_curves(
    options: CurveOptions,
    paths: Mapping[str, Path],
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[list[Point], dict[str, str]]:
    """The points of every curve, and the peers that are missing with the reason."""
    points: list[Point] = []
    missing: dict[str, str] = {}
    jobs = [
        *(("tokens", LAYER, m, codec) for codec in options.codecs for m in options.tokens),
        *(("size", size, 1, codec) for codec in options.codecs for size in options.sizes),
    ]
    for curve, size, m, codec in jobs:
        rows, absent = bench_linear(
            size, size, m, codec, list(options.peers), None, options.rounds, paths, clock
        )
        missing |= absent
        points.append(_of_linear(curve, m if curve == "tokens" else size, rows))
        progress(describe(points[-1]))
    for curve, keys, batch in (
        *(("context", keys, 1) for keys in options.contexts),
        *(("batch", BATCH_KEYS, batch) for batch in options.batches),
    ):
        found = attention_benchmark.bench_decode(
            keys, ("int8", "int8"), options.rounds, batch, gqa=False
        )
        points.append(_of_attention(curve, keys if curve == "context" else batch, found))
        progress(describe(points[-1]))
    return points, missing


def _of_linear(curve: str, x: int, rows: list[BenchRow]) -> Point:
    best = min(rows, key=lambda row: row.peer_median_us)
    return Point(
        curve, str(weight_codec(best.codec)), x, best.median_us, best.peer, best.peer_median_us,
        best.ratio, best.ceilings, best.of_read, best.of_dots, best.gops,
    )  # fmt: skip


def _of_attention(curve: str, x: int, rows: list[attention_benchmark.AttentionRow]) -> Point:
    best = min(rows, key=lambda row: row.peer_seconds)
    return Point(
        curve, "int8 cache", x, best.seconds * 1e6, best.peer, best.peer_seconds * 1e6, best.ratio,
        best.ceilings, best.of_read, None,
    )  # fmt: skip


def describe(point: Point) -> str:
    """One line: where, lath, the strongest peer."""
    peer = f"{point.peer} {point.peer_us:.0f} µs ({point.ratio:.2f})" if point.peer else "no peer"
    name = CURVES[point.curve][0]
    return f"{point.what}, {name} {point.x}: lath {point.median_us:.0f} µs, {peer}"


def curves_markdown(points: Sequence[Point], command: str, notes: Sequence[str] = ()) -> str:
    """The command, the machine and its ceilings, a table for each curve, the notes."""
    facts = ", ".join(f"{key} {value}" for key, value in machine_facts().items())
    read = statistics.median(point.ceilings.gb_per_s for point in points)
    gops = statistics.median(point.ceilings.gops for point in points)
    lines = [
        "# How cost grows on a CPU",
        "",
        f"    {command}",
        "",
        f"{facts}. {torch.get_num_threads()} thread(s), weights and caches cold, calls "
        "interleaved, medians; the peer is the fastest of those here, ratio its time over lath's. "
        "Activations int8 in the weight's groups, their rounding included. Ceilings are measured "
        f"in each point's own rounds, their medians: {read:.1f} GB/s read, {gops:.0f} GOPS of int8 "
        "products in registers.",
    ]
    for curve, (name, title) in CURVES.items():
        own = [point for point in points if point.curve == curve]
        if not own:
            continue
        lines += [
            "", f"## {title}", "",
            f"| | {name} | lath µs | strongest peer | its µs | ratio | of read | of dots |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for point in own:
            shares = [
                "" if share is None else f"{share:.2f}" for share in (point.of_read, point.of_dots)
            ]
            lines.append(
                f"| `{point.what}` | {point.x} | {point.median_us:.0f} | {point.peer} | "
                f"{point.peer_us:.0f} | {point.ratio:.2f} | {' | '.join(shares)} |"
            )
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def curves_json(points: Sequence[Point]) -> list[dict[str, object]]:
    return [asdict(point) for point in points]
