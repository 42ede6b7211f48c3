"""Selection and attention together on a CPU: dense decoding, torch and every selector, interleaved.

    python bench/bench_sparse.py [--rounds 9] [--threads 1] [--keys 32768] [--output bench/results]

writes sparse_cpu.md and sparse_cpu.json. One decode step of all heads as a caller makes it:
`lath.select` with a budget of an eighth of the pages, then `lath.decode_attention(pages=…)`, beside
`lath.decode_attention` over the whole int8 cache and torch's `scaled_dot_product_attention` in its
fastest form over a 16- or 32-bit one. Contenders take turns; a ratio is the median over rounds of
ratios within a round; caches are cold. What selectors keep of pages is made before.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass

import report
import torch
from torch import Tensor

import lath
from lath.formats.pages import PAGE
from lath.integration.attention_benchmark import (
    GROUP,
    HEAD_DIM,
    KV_HEADS,
    Call,
    copies,
    decode_peers,
)
from lath.integration.benchmark import machine_facts, time_interleaved

# Those whose scores are of pages are what the figure is about; the others are timed once.
PAGE_SELECTORS = (
    "quest", "quest-16", "quest+tokens", "centroid", "centroid-mass", "centroid-mass-16",
    "centroid-mass+tokens", "paged_eviction",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Seconds are medians. selection: the share of `lath.select` alone. dense, torch: how many
    times as long those took."""

    what: str
    seconds: float
    selection: float | None
    dense: float
    torch: float


def make_caches(keys: int) -> tuple[Tensor, list[lath.PagedKV], dict[str, Call]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    k, v = random(1, KV_HEADS, keys, HEAD_DIM), random(1, KV_HEADS, keys, HEAD_DIM)
    q = random(1, KV_HEADS * GROUP, 1, HEAD_DIM)
    caches = []
    for _ in range(copies(lath.PagedKV(KV_HEADS, HEAD_DIM).format.record_bytes * keys // 8)):
        kv = lath.PagedKV(KV_HEADS, HEAD_DIM)
        kv.reserve(keys)
        kv.append(k, v)
        caches.append(kv)
    peers = decode_peers(q, k, v, gqa=False)
    return q, caches, peers


def contenders(
    q: Tensor, caches: list[lath.PagedKV], names: list[str], budget: int
) -> dict[str, Call]:
    """select alone, with attention, and with repair, of each selector."""

    def cache(i: int) -> lath.PagedKV:
        return caches[i % len(caches)]

    def step(i: int, name: str, repair: bool) -> Tensor:
        kv = cache(i)
        ids = lath.select(q, kv, name, budget)
        output: Tensor = lath.decode_attention(q, kv, pages=ids, repair=repair)
        return output

    calls: dict[str, Call] = {"dense": lambda i: lath.decode_attention(q, cache(i))}
    for name in names:
        for kv in caches:
            lath.select(q, kv, name, budget)
        calls[f"{name}, selection alone"] = lambda i, n=name: lath.select(q, cache(i), n, budget)
        calls[name] = lambda i, n=name: step(i, n, False)
        calls[f"{name}, repair"] = lambda i, n=name: step(i, n, True)
    return calls


def rows_of(times: dict[str, list[float]], names: list[str]) -> list[Row]:
    peers = [theirs for name, theirs in times.items() if name.startswith("torch")]
    best = min(peers, key=statistics.median)

    def ratio(a: list[float], b: list[float]) -> float:
        return statistics.median(x / y for x, y in zip(a, b, strict=True))

    rows = []
    for name in ["dense", *(n + end for n in names for end in ("", ", repair"))]:
        own = times[name]
        alone = times.get(f"{name.removesuffix(', repair')}, selection alone")
        share = None if alone is None else ratio(alone, own)
        rows.append(
            Row(name, statistics.median(own), share, ratio(times["dense"], own), ratio(best, own))
        )
    return rows


def as_markdown(rows: list[Row], command: str, keys: int, budget: int, threads: int) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in machine_facts().items())
    lines = [
        "# Sparse decoding on a CPU",
        "",
        f"    {command}",
        "",
        f"{facts}. {threads} thread(s), calls interleaved, medians over rounds, caches cold. "
        f"{keys} keys, {KV_HEADS} KV heads, {GROUP} query heads each, D {HEAD_DIM}, batch 1, bf16 "
        f"q, int8 pages; budget {budget} tokens ({budget // PAGE} of {keys // PAGE} pages). "
        "Selection: the share of `lath.select` in the step. Dense, torch: their time over that of "
        "the step.",
        "",
        "| | µs | selection | dense / this | torch / this |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        share = "" if row.selection is None else f"{100 * row.selection:.0f} %"
        lines.append(
            f"| {row.what} | {row.seconds * 1e6:.0f} | {share} | {row.dense:.2f} | "
            f"{row.torch:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = report.parser_of(__doc__)
    parser.add_argument("--keys", type=int, default=32768)
    parser.add_argument("--selectors", default=",".join(PAGE_SELECTORS))
    options = report.parsed(parser)
    names = options.selectors.split(",")
    for name in names:
        lath.selector(name)
    budget = options.keys // 8
    with torch.inference_mode():
        q, caches, peers = make_caches(options.keys)
        times = time_interleaved({**contenders(q, caches, names, budget), **peers}, options.rounds)
    rows = rows_of(times, names)
    command = report.command_of("bench_sparse.py")
    text = as_markdown(rows, command, options.keys, budget, options.threads)
    page = options.output / "sparse_cpu.md"  # sections behind the table are not of this run
    if page.exists():
        text += "".join(page.read_text().partition("\n## ")[1:])
    report.save(options, "sparse_cpu", text, command, rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    main()
