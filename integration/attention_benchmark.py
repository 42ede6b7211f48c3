"""Paired timing of `lath.decode_attention` and `lath.attention` on a CPU against torch's SDPA.

Contenders take turns within each round (`time_interleaved`); a ratio is the median over rounds of
(peer's time / lath's) in the same round, so that what else the machine does hits both. Caches are
cold: each call takes the next of enough copies to exceed them. q is bf16; peers take k and v in
their own dtype, with q as the rows of a group of one KV head (which is what reads k and v once) and
with enable_gqa. Page writing is part of lath's time in prefill.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import lath
from lath.integration import ceilings
from lath.integration.benchmark import machine_facts, time_interleaved
from lath.integration.ceilings import CeilingCalls, Ceilings

Call = Callable[[int], object]
KV_HEADS, GROUP, HEAD_DIM, PAGE = 8, 4, 128, 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Prefill:
    """The shape of an attention over a prompt."""

    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    causal: bool = True

    def __str__(self) -> str:
        shape = f"{self.heads}/{self.kv_heads} heads, D {self.head_dim}, {self.tokens} tokens"
        return shape + (", causal" if self.causal else "")


@dataclass(frozen=True)
class AttentionRow:
    """One comparison; seconds are medians. ratio: the median of the rounds' own, with the least and
    the largest. gb_per_s, of_read: pages of the cache per second, and that of a plain read."""

    what: str
    size: int
    batch: int
    seconds: float
    peer: str
    peer_seconds: float
    ratio: float
    spread: tuple[float, float]
    ceilings: Ceilings
    gb_per_s: float | None = None
    of_read: float | None = None


def bench_decode(
    keys: int,
    codecs: tuple[str, str],
    rounds: int,
    batch: int = 1,
    gqa: bool = True,
) -> list[AttentionRow]:
    """One query token of every head over a cache of `keys` tokens, first and last part included.

    gqa: torch's enable_gqa as well, which is slow.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    k, v = random(batch, KV_HEADS, keys, HEAD_DIM), random(batch, KV_HEADS, keys, HEAD_DIM)
    q = random(batch, KV_HEADS * GROUP, 1, HEAD_DIM)

    def cache() -> lath.PagedKV:
        kv = lath.PagedKV(
            KV_HEADS, HEAD_DIM, batch=batch, key_codec=codecs[0], value_codec=codecs[1]
        )
        kv.append(k, v)
        return kv

    first = cache()
    page_bytes = first.format.record_bytes * batch * KV_HEADS * max(keys // PAGE - 1, 0)
    caches = [first, *(cache() for _ in range(copies(page_bytes) - 1))]
    highest = CeilingCalls()
    calls: dict[str, Call] = {
        "lath": lambda i: lath.decode_attention(q, caches[i % len(caches)]),
        **decode_peers(q, k, v, gqa),
        **highest.calls(),
    }
    with torch.inference_mode():
        times = time_interleaved(calls, rounds)
    what = f"decode {'/'.join(codecs)}, {keys} keys" + (f", batch {batch}" if batch > 1 else "")
    return _rows(what, (keys, batch), times, "lath", highest.take(times), page_bytes)


def decode_peers(q: Tensor, k: Tensor, v: Tensor, gqa: bool = True) -> dict[str, Call]:
    """torch's calls over k, v [B, KV_HEADS, L, HEAD_DIM], each over copies of its own dtype."""
    calls: dict[str, Call] = {}
    packed = q.reshape(len(q), KV_HEADS, GROUP, HEAD_DIM)
    for name, dtype in DTYPES.items():
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
        if gqa:
            calls[f"torch {name}, enable_gqa"] = heads
    return calls


def bench_prefill(shape: Prefill, rounds: int) -> list[AttentionRow]:
    """A prompt's attention with values as they came, and with int8 ones."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, shape.tokens, shape.head_dim, generator=generator).bfloat16()
        for n in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    causal = shape.causal
    highest = CeilingCalls()
    calls: dict[str, Call] = {
        "float": lambda _: lath.attention(q, k, v, causal=causal, precision="float"),
        "int8": lambda _: lath.attention(q, k, v, causal=causal, precision="int8"),
        **highest.calls(),
    }
    for name, dtype in DTYPES.items():
        calls[f"torch {name}"] = _prefill_peer(q.to(dtype), k.to(dtype), v.to(dtype), causal)
    with torch.inference_mode():
        times = time_interleaved(calls, rounds)
    found = highest.take(times)
    return [
        row
        for precision in ("float", "int8")
        for row in _rows(
            f"prefill {precision}, {shape}", (shape.tokens, 1), times, precision, found
        )
    ]


def _prefill_peer(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    grouped = q.shape[1] != k.shape[1]
    return lambda _: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def _rows(
    what: str,
    size: tuple[int, int],
    times: dict[str, list[float]],
    own: str,
    found: Ceilings,
    cache_bytes: int | None = None,
) -> list[AttentionRow]:
    """A row for each peer of the contender `own`. size: tokens and batch."""
    seconds = statistics.median(times[own])
    rate = None if cache_bytes is None else cache_bytes / seconds / 1e9
    rows = []
    for peer, theirs in times.items():
        if not peer.startswith("torch"):
            continue
        ratios = sorted(b / a for a, b in zip(times[own], theirs, strict=True))
        rows.append(
            AttentionRow(
                what, *size, seconds, peer, statistics.median(theirs), statistics.median(ratios),
                (ratios[0], ratios[-1]), found, rate, None if rate is None else found.of_read(rate),
            )
        )  # fmt: skip
    return rows


def copies(nbytes: int) -> int:
    """How many of so many bytes are cold in turn."""
    return max(2, -(-ceilings.COLD_BYTES // max(nbytes, 1)))


def small_times(rounds: int) -> dict[str, float]:
    """Seconds of what a decode step does besides reading its cache, 8 KV heads, D 128."""
    from lath.kernels.pages.cpu import write_pages

    caches = [lath.PagedKV(KV_HEADS, HEAD_DIM) for _ in range(2)]
    token = torch.randn(1, KV_HEADS, 1, HEAD_DIM).bfloat16()
    page = torch.randn(1, KV_HEADS, PAGE, HEAD_DIM).bfloat16()
    q = torch.randn(1, KV_HEADS * GROUP, 1, HEAD_DIM).bfloat16()
    for kv in caches:
        kv.append(token, token)
    fmt = caches[0].format
    records = torch.empty((1, KV_HEADS, fmt.record_bytes), dtype=torch.uint8)
    index = torch.empty((1, KV_HEADS, fmt.index_bytes), dtype=torch.uint8)
    jobs = torch.tensor([(0, 0, PAGE, 0)], dtype=torch.int32)
    calls: dict[str, Call] = {
        "decode_attention over one key": lambda i: lath.decode_attention(q, caches[i % 2]),
        "one page of every KV head written": lambda _: write_pages(
            page, page, fmt, records, index, jobs
        ),
    }
    with torch.inference_mode():
        times = time_interleaved(calls, rounds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def attention_markdown(rows: list[AttentionRow], small: dict[str, float], command: str) -> str:
    """The report: the command, the machine, a line per comparison."""
    facts = ", ".join(f"{key} {value}" for key, value in machine_facts().items())
    lines = [
        "# Attention on a CPU against torch",
        "",
        f"    {command}",
        "",
        f"{facts}. {torch.get_num_threads()} thread(s), calls interleaved, medians over rounds; "
        "ratio: median of (peer / lath) round by round, the least and largest in brackets. Decode: "
        f"{KV_HEADS} KV heads, {GROUP} query heads each, D {HEAD_DIM}, bf16 q, caches cold; GB/s: "
        "page records read, and what share that is of a plain read in the same rounds.",
        "",
        "| | lath µs | peer | peer µs | ratio | GB/s | of a plain read |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = share = ""
        if row.gb_per_s is not None and row.of_read is not None:
            rate = f"{row.gb_per_s:.1f}"
            share = f"{100 * row.of_read:.0f} % of {row.ceilings.gb_per_s:.1f}"
        low, high = row.spread
        lines.append(
            f"| {row.what} | {row.seconds * 1e6:.0f} | {row.peer} | {row.peer_seconds * 1e6:.0f} | "
            f"{row.ratio:.2f} ({low:.2f}-{high:.2f}) | {rate} | {share} |"
        )
    if small:
        lines += ["", "| besides | µs |", "|---|---|"]
        lines += [f"| {name} | {seconds * 1e6:.1f} |" for name, seconds in small.items()]
    return "\n".join(lines) + "\n"


def attention_json(rows: list[AttentionRow]) -> list[dict[str, object]]:
    """A list of rows."""
    return [asdict(row) for row in rows]
