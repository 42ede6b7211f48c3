"""What selection costs on a CPU next to the attention that it saves, interleaved in one process.

    python bench/bench_select.py [--rounds 9] [--threads 1] [--output bench/results]

writes select_cpu.md and select_cpu.json. One decode step over 32k keys: scores of all 512 pages for
all query heads, the largest 64 of 512 per KV head, and repair of all pages but those, each next to
`lath.decode_attention` over the whole int8 cache in the same rounds. Caches are cold: each call
takes the next of enough copies to exceed them. Every call is timed by itself, in blocks of 20 ms
that take turns. On a machine that others use too, the time of the fastest tenth of the calls is
what a call takes undisturbed; shares and GB/s are of that, medians stand beside it. GB/s: of the
fields of the index rows that are read. What a call costs beside reading is that of one page.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import report
import torch
from torch import Tensor

import lath
from lath.formats.attention import PageView, Queries
from lath.formats.pages import PAGE, PageCodec, PageFormat
from lath.integration.benchmark import machine_facts
from lath.integration.ceilings import COLD_BYTES
from lath.kernels.pages.cpu import write_pages
from lath.kernels.select import cpu
from lath.kernels.select.top_k import top_k as portable_top_k

Call = Callable[[int], object]
KV_HEADS, GROUP, HEAD_DIM, KEYS, TAKEN = 8, 4, 128, 32768, 64
PAGES = KEYS // PAGE
BLOCK_SECONDS = 0.02
READ_BYTES = 4 << 20  # of one plain read
SCALE = HEAD_DIM**-0.5
FORMAT = PageFormat(PageCodec("int8"), PageCodec("int8"), HEAD_DIM, HEAD_DIM)
# Fields of an index row that are read.
READ = {
    "page_scores(bound)": ("mean", "max", "min", "numbers"),
    "page_scores(floor)": ("mean", "max", "min", "numbers"),
    "page_scores(mean)": ("mean",),
    "page_scores(mass)": ("mean", "numbers", "deviation"),
    "repair": ("mean", "numbers", "deviation", "value_mean"),
}


@dataclass(frozen=True)
class Row:
    """seconds: of the fastest tenth of the calls; median: of all. share: of dense decoding.
    gb_per_s, bandwidth: of what is read, of a plain read. one_page: seconds with one page."""

    what: str
    seconds: float
    median: float
    share: float
    nbytes: int
    gb_per_s: float
    bandwidth: float
    one_page: float


def time_calls(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, sorted; contenders take turns in blocks."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)  # compiles, allocates
    for _ in range(rounds):
        for name, call in calls.items():
            end = time.perf_counter() + BLOCK_SECONDS
            while (start := time.perf_counter()) < end:
                call(len(times[name]))
                times[name].append(time.perf_counter() - start)
    return {name: sorted(seconds) for name, seconds in times.items()}


def fastest_tenth(seconds: list[float]) -> float:
    """The time that a tenth of the calls undercuts."""
    return seconds[len(seconds) // 10]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def view_of(index: Tensor) -> PageView:
    """PAGES whole pages, in order; the records are not read by what is timed here."""
    pages = len(index)
    table = torch.arange(pages, dtype=torch.int32)[None]
    records = torch.empty((0, KV_HEADS, FORMAT.record_bytes), dtype=torch.uint8)
    return PageView(
        FORMAT, records, index, table, PAGE * table, torch.full_like(table, PAGE),
        torch.tensor([pages], dtype=torch.int32), torch.tensor([PAGE * pages], dtype=torch.int32),
        PAGE * pages,
    )  # fmt: skip


def views(k: Tensor, v: Tensor) -> list[PageView]:
    """Enough copies of one index to exceed the caches."""
    records = torch.empty((PAGES, KV_HEADS, FORMAT.record_bytes), dtype=torch.uint8)
    index = torch.empty((PAGES, KV_HEADS, FORMAT.index_bytes), dtype=torch.uint8)
    jobs = torch.tensor([(0, PAGE * i, PAGE, i) for i in range(PAGES)], dtype=torch.int32)
    write_pages(k, v, FORMAT, records, index, jobs)
    return [view_of(index.clone()) for _ in range(-(-COLD_BYTES // index.numel()))]


def dense_calls(k: Tensor, v: Tensor, q: Tensor) -> Call:
    caches = []
    for _ in range(max(2, -(-COLD_BYTES // (FORMAT.record_bytes * KV_HEADS * PAGES)))):
        cache = lath.PagedKV(KV_HEADS, HEAD_DIM, key_codec="int8", value_codec="int8")
        cache.append(k, v)
        caches.append(cache)
    return lambda i: lath.decode_attention(q, caches[i % len(caches)])


def unread_of(scores: Tensor) -> Tensor:
    """z of all pages but the largest TAKEN of each KV head: -inf for what was read."""
    pooled = scores.reshape(1, KV_HEADS, GROUP, -1).amax(2)
    taken = cpu.top_k(pooled, min(TAKEN, pooled.shape[-1])).long()
    return torch.full_like(pooled, math.inf).scatter_(2, taken, -math.inf)


def step_calls(queries: Queries, made: list[PageView]) -> dict[str, Call]:
    """The parts of a step, by name; `made` are taken in turn."""
    first = cpu.page_scores(queries, made[0], "bound", SCALE)
    z = unread_of(first)
    lists = [torch.randn(1, KV_HEADS, first.shape[-1]) for _ in range(16)]

    def view(i: int) -> PageView:
        return made[i % len(made)]

    return {
        **{
            f"page_scores({kind})": lambda i, kind=kind: cpu.page_scores(  # type: ignore[misc]
                queries, view(i), kind, SCALE
            )
            for kind in ("bound", "mean", "mass", "floor")
        },
        "repair": lambda i: cpu.repair(queries, view(i), z, SCALE),
        f"top_k({TAKEN} of {PAGES})": lambda i: cpu.top_k(lists[i % 16], TAKEN),
        f"top_k({TAKEN} of {PAGES}), torch": lambda i: portable_top_k(lists[i % 16], TAKEN),
    }


def bench(rounds: int) -> tuple[list[Row], tuple[float, float]]:
    """A row for each part of a step, and seconds of dense decoding: fastest tenth, median."""
    k, v = random(1, KV_HEADS, KEYS, HEAD_DIM, seed=1), random(1, KV_HEADS, KEYS, HEAD_DIM, seed=2)
    q = random(1, KV_HEADS * GROUP, 1, HEAD_DIM)
    queries = Queries(q, torch.tensor([1], dtype=torch.int32), 1)
    made = views(k, v)
    steps = step_calls(queries, made)
    plain = torch.ones(COLD_BYTES // READ_BYTES, READ_BYTES // 4)
    calls: dict[str, Call] = {
        "dense": dense_calls(k, v, q), **steps, "read": lambda i: plain[i % len(plain)].sum()
    }  # fmt: skip
    small = [dataclasses.replace(view_of(view.index[:1])) for view in made[:2]]
    one = step_calls(queries, small)
    with torch.inference_mode():
        times = time_calls(calls, rounds)
        little = time_calls(one, rounds)
    dense, read = times.pop("dense"), times.pop("read")
    bandwidth = READ_BYTES / fastest_tenth(read) / 1e9
    rows = []
    for name, all_seconds in times.items():
        nbytes = 4 * PAGES * KV_HEADS
        if name in READ:
            sizes = [FORMAT.index_fields[field].nbytes for field in READ[name]]
            nbytes = PAGES * KV_HEADS * sum(sizes)
        seconds = fastest_tenth(all_seconds)
        rows.append(
            Row(
                name, seconds, statistics.median(all_seconds), seconds / fastest_tenth(dense),
                nbytes, nbytes / seconds / 1e9, bandwidth, fastest_tenth(little[name]),
            )
        )  # fmt: skip
    return rows, (fastest_tenth(dense), statistics.median(dense))


def as_markdown(rows: list[Row], dense: tuple[float, float], command: str, threads: int) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in machine_facts().items())
    lines = [
        "# Selection on a CPU next to dense decoding",
        "",
        f"    {command}",
        "",
        f"{facts}. {threads} thread(s), every call timed by itself, contenders in turns, caches "
        f"cold. {KEYS} keys, {KV_HEADS} KV heads, {GROUP} query heads each, D {HEAD_DIM}, batch 1, "
        "bf16 q, int8 pages. µs: of the fastest tenth of the calls, the median in brackets (the "
        f"machine was shared); dense decoding over the whole cache took {dense[0] * 1e6:.0f} "
        f"({dense[1] * 1e6:.0f}) µs in the same rounds. GB/s: of the fields of the index rows that "
        "are read. One page: the same call with one page, what it costs beside reading.",
        "",
        "| | µs | of dense | MB read | GB/s | of a plain read | one page, µs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        part = f"{100 * row.gb_per_s / row.bandwidth:.0f} % of {row.bandwidth:.1f}"
        rate = f"{row.nbytes / 1e6:.2f} | {row.gb_per_s:.1f} | {part}"
        if row.what.startswith("top_k"):
            rate = f"{row.nbytes / 1e6:.2f} | |"
        lines.append(
            f"| {row.what} | {row.seconds * 1e6:.1f} ({row.median * 1e6:.1f}) | "
            f"{100 * row.share:.2f} % | {rate} | {row.one_page * 1e6:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    options = report.parsed(report.parser_of(__doc__))
    rows, dense = bench(options.rounds)
    command = report.command_of("bench_select.py")
    table = as_markdown(rows, dense, command, options.threads)
    report.save(
        options, "select_cpu", table, command, dense_seconds=dense[0], dense_median=dense[1],
        rows=[asdict(row) for row in rows],
    )  # fmt: skip


if __name__ == "__main__":
    main()
