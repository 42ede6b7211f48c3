"""`lath.decode_attention` and `lath.attention` on a CPU against torch, interleaved in one process.

    python bench/bench_attention.py [--rounds 9] [--threads 1] [--output bench/results]

writes attention_cpu.md and attention_cpu.json. Contenders take turns within each round; a ratio is
the median over rounds of (peer's time / lath's) in the same round, so that what else the machine
does hits both. Caches are cold: each call takes the next of enough copies to exceed them. q is
bf16; peers take k and v in their own dtype, with q as the rows of a group of one KV head (which is
what reads k and v once) and with enable_gqa. Page writing is part of lath's time in prefill.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import report
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import lath
from lath.integration.benchmark import COLD_BYTES, machine_facts, time_interleaved

Call = Callable[[int], object]
KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
DECODE_KEYS = (4096, 8192, 32768)
# query heads, KV heads, head dim, tokens, causal
PREFILL = (
    (8, 8, 128, 2048, True),
    (32, 8, 128, 1024, True),
    (9, 3, 64, 2048, True),
    (8, 8, 128, 2048, False),
)


@dataclass(frozen=True)
class Row:
    """One comparison; seconds are medians. gb_per_s: of cache read, bandwidth: of a plain read."""

    what: str
    seconds: float
    peer: str
    peer_seconds: float
    ratio: float
    gb_per_s: float | None = None
    bandwidth: float | None = None


def rows_of(
    what: str, times: dict[str, list[float]], own: str, cache_bytes: int | None = None
) -> list[Row]:
    """A row for each peer of the contender `own`; "read" is the plain read of COLD_BYTES."""
    seconds = statistics.median(times[own])
    rate = None if cache_bytes is None else cache_bytes / seconds / 1e9
    read = times.get("read")
    bandwidth = None if read is None else COLD_BYTES / statistics.median(read) / 1e9
    return [
        Row(
            what, seconds, peer, statistics.median(theirs),
            statistics.median(b / a for a, b in zip(times[own], theirs, strict=True)),
            rate, bandwidth,
        )
        for peer, theirs in times.items()
        if peer.startswith("torch")
    ]  # fmt: skip


def copies(nbytes: int) -> int:
    return max(2, -(-COLD_BYTES // nbytes))


def bench_decode(keys: int, codecs: tuple[str, str], rounds: int) -> list[Row]:
    """One query token of every head over a cache of `keys` tokens, first and last part included."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    k, v = random(1, KV_HEADS, keys, HEAD_DIM), random(1, KV_HEADS, keys, HEAD_DIM)
    q = random(1, KV_HEADS * GROUP, 1, HEAD_DIM)

    def cache() -> lath.PagedKV:
        kv = lath.PagedKV(KV_HEADS, HEAD_DIM, key_codec=codecs[0], value_codec=codecs[1])
        kv.append(k, v)
        return kv

    page_bytes = cache().format.record_bytes * KV_HEADS * (keys // 64 - 1)
    caches = [cache() for _ in range(copies(page_bytes))]
    calls: dict[str, Call] = {
        "lath": lambda i: lath.decode_attention(q, caches[i % len(caches)]),
        **_decode_peers(q, k, v),
    }
    plain = torch.ones(COLD_BYTES // 4)
    calls["read"] = lambda _: plain.sum()
    with torch.inference_mode():
        times = time_interleaved(calls, rounds)
    what = f"decode {'/'.join(codecs)}, {keys} keys"
    return rows_of(what, times, "lath", page_bytes)


def _decode_peers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    packed = q.reshape(1, KV_HEADS, GROUP, HEAD_DIM)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        size = k.numel() * 2 * dtype.itemsize
        pairs = [(k.to(dtype, copy=True), v.to(dtype, copy=True)) for _ in range(copies(size))]
        q_rows, q_heads = packed.to(dtype), q.to(dtype)

        def rows(i: int, q: Tensor = q_rows, pairs: list[tuple[Tensor, Tensor]] = pairs) -> Tensor:
            return scaled_dot_product_attention(q, *pairs[i % len(pairs)])

        def heads(
            i: int, q: Tensor = q_heads, pairs: list[tuple[Tensor, Tensor]] = pairs
        ) -> Tensor:
            return scaled_dot_product_attention(q, *pairs[i % len(pairs)], enable_gqa=True)

        calls[f"torch {name}, {GROUP} rows"] = rows
        calls[f"torch {name}, enable_gqa"] = heads
    return calls


def bench_prefill(
    heads: int, kv_heads: int, head_dim: int, tokens: int, causal: bool, rounds: int
) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, tokens, head_dim, generator=generator).bfloat16()
        for n in (heads, kv_heads, kv_heads)
    )
    grouped = heads != kv_heads
    wide = tuple(x.float() for x in (q, k, v))
    calls: dict[str, Call] = {
        "float": lambda _: lath.attention(q, k, v, causal=causal, precision="float"),
        "int8": lambda _: lath.attention(q, k, v, causal=causal, precision="int8"),
        "torch bf16": lambda _: scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=grouped
        ),
        "torch fp32": lambda _: scaled_dot_product_attention(
            *wide, is_causal=causal, enable_gqa=grouped
        ),
    }
    with torch.inference_mode():
        times = time_interleaved(calls, rounds)
    shape = f"{heads}/{kv_heads} heads, D {head_dim}, {tokens} tokens"
    found = []
    for precision in ("float", "int8"):
        what = f"prefill {precision}, {shape}{', causal' if causal else ''}"
        found += rows_of(what, times, precision)
    return found


def small_times(rounds: int) -> dict[str, float]:
    """Seconds of what a decode step does besides reading its cache, 8 KV heads, D 128."""
    caches = [lath.PagedKV(KV_HEADS, HEAD_DIM) for _ in range(2)]
    token = torch.randn(1, KV_HEADS, 1, HEAD_DIM).bfloat16()
    page = torch.randn(1, KV_HEADS, 64, HEAD_DIM).bfloat16()
    q = torch.randn(1, KV_HEADS * GROUP, 1, HEAD_DIM).bfloat16()
    for kv in caches:
        kv.append(token, token)
    fmt = caches[0].format
    records = torch.empty((1, KV_HEADS, fmt.record_bytes), dtype=torch.uint8)
    index = torch.empty((1, KV_HEADS, fmt.index_bytes), dtype=torch.uint8)
    jobs = torch.tensor([(0, 0, 64, 0)], dtype=torch.int32)
    from lath.kernels.pages.cpu import write_pages

    calls: dict[str, Call] = {
        "decode_attention over one key": lambda i: lath.decode_attention(q, caches[i % 2]),
        "one page of every KV head written": lambda _: write_pages(
            page, page, fmt, records, index, jobs
        ),
    }
    with torch.inference_mode():
        times = time_interleaved(calls, rounds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def as_markdown(rows: list[Row], small: dict[str, float], command: str, threads: int) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in machine_facts().items())
    lines = [
        "# Attention on a CPU against torch",
        "",
        f"    {command}",
        "",
        f"{facts}. {threads} thread(s), calls interleaved, medians over rounds; ratio: median of "
        f"(peer / lath) round by round. Decode: {KV_HEADS} KV heads, {GROUP} query heads each, "
        f"D {HEAD_DIM}, batch 1, bf16 q, caches cold; GB/s: page records read, and what share "
        f"that is of a plain read of {COLD_BYTES >> 20} MiB in the same rounds.",
        "",
        "| | lath µs | peer | peer µs | ratio | GB/s | of a plain read |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = share = ""
        if row.gb_per_s is not None and row.bandwidth is not None:
            rate = f"{row.gb_per_s:.1f}"
            share = f"{100 * row.gb_per_s / row.bandwidth:.0f} % of {row.bandwidth:.1f}"
        lines.append(
            f"| {row.what} | {row.seconds * 1e6:.0f} | {row.peer} | {row.peer_seconds * 1e6:.0f} | "
            f"{row.ratio:.2f} | {rate} | {share} |"
        )
    lines += ["", "| besides | µs |", "|---|---|"]
    lines += [f"| {name} | {seconds * 1e6:.1f} |" for name, seconds in small.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = report.parsed(report.parser_of(__doc__))
    rows: list[Row] = []
    for codecs in (("int8", "int8"), ("int4", "int4")):
        for keys in DECODE_KEYS:
            rows += bench_decode(keys, codecs, options.rounds)
            print(rows[-4], file=sys.stderr)
    for shape in PREFILL:
        rows += bench_prefill(*shape, rounds=options.rounds)
        print(rows[-2], file=sys.stderr)
    small = small_times(options.rounds)
    command = report.command_of("bench_attention.py")
    table = as_markdown(rows, small, command, options.threads)
    report.save(
        options, "attention_cpu", table, command, rows=[asdict(row) for row in rows], small=small
    )


if __name__ == "__main__":
    main()
