"""The same kernels compiled for lesser CPUs: AVX2 without VNNI, and plain x86-64 (SSE2).

    python bench/bench_lowerings.py [--rounds 5] [--lowerings host,avx2,portable]

writes bench/results/lowerings_cpu.md and .json. Each lowering has a process of its own, whose code
is compiled for a Haswell (AVX2, sixteen 256-bit registers) or for no vector extension beyond SSE2;
LATH_ISA alone would let LLVM use the wider registers of this machine, which runs all of them. The
processes take turns, a round each; CPU time of the thread, medians. torch's own kernels are not
lowered: they are there for scale. Decoding is the fused step of a model of SmolLM2-135M's shape
with random weights in int4-g64, its output layer int8-g64.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
from bench_linear import lath_call, torch_call

from lath.integration.attention_benchmark import GROUP, HEAD_DIM, KV_HEADS, copies, decode_peers
from lath.integration.benchmark import machine_facts
from lath.integration.ceilings import CeilingCalls
from lath.kernels.simd import isa

# What each lowering changes in the environment.
LOWERINGS = {
    "host": {},
    "avx2": {
        "NUMBA_CPU_NAME": "haswell", "LATH_ISA": "",
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+sse4.2,+bmi,+bmi2,+popcnt",
    },
    "portable": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "LATH_ISA": ""},
}  # fmt: skip
IN_CHILD = "LATH_BENCH_CHILD"
SHAPE = (2560, 6912)  # K x N
CODECS = ("ternary/int8", "int4-g128/int8-g128", "int8/int8")
TOKENS = (1, 8, 128)
KEYS = 8192
BLOCK_SECONDS = 0.03
DECODED = 16
# Something that is timed: a round of it returns the seconds of one call or token.
Item = Callable[[], float]


def item_of(call: Callable[[int], object]) -> Item:
    """Rounds of some calls, CPU seconds of one."""
    call(0)
    start = time.thread_time()
    call(1)
    count = max(1, int(BLOCK_SECONDS / max(time.thread_time() - start, 1e-7)))
    place = itertools.count(step=count)

    def run() -> float:
        first = next(place)
        start = time.thread_time()
        for i in range(first, first + count):
            call(i)
        return (time.thread_time() - start) / count

    return run


def linear_items(m: int) -> dict[str, Item]:
    k, n = SHAPE
    items = {f"{name}, M = {m}": item_of(lath_call(name, m, k, n)[0]) for name in CODECS}
    return {**items, f"torch bf16, M = {m}": item_of(torch_call(m, k, n)[0])}


def attention_items() -> dict[str, Item]:
    import lath

    generator = torch.Generator().manual_seed(0)
    k, v = (
        torch.randn(1, KV_HEADS, KEYS, HEAD_DIM, generator=generator).bfloat16() for _ in range(2)
    )
    q = torch.randn(1, KV_HEADS * GROUP, 1, HEAD_DIM, generator=generator).bfloat16()
    caches = []
    for _ in range(copies(KV_HEADS * KEYS * HEAD_DIM * 2)):
        kv = lath.PagedKV(KV_HEADS, HEAD_DIM)
        kv.append(k, v)
        caches.append(kv)
    peer = decode_peers(q, k, v, gqa=False)[f"torch bf16, {GROUP} rows"]
    own = item_of(lambda i: lath.decode_attention(q, caches[i % len(caches)]))
    return {f"decode_attention, {KEYS} keys": own, f"torch bf16, {KEYS} keys": item_of(peer)}


def decode_items() -> dict[str, Item]:
    """Tokens of a model behind 64 others: the fused step, and the same through modules."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import lath
    from lath.integration.find import OUTPUT_LAYER
    from lath.integration.measure import token_seconds
    from lath.integration.run_command import DEFAULT_HEAD

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().bfloat16()
    ids = torch.randint(0, 49152, (1, 64))

    def item(decode: str) -> Item:
        def run() -> float:
            with (
                lath.patch(model, "int4-g64", attention="int8", kv="int8", decode=decode) as done,
                lath.patch(model, DEFAULT_HEAD, skip=(), only=(OUTPUT_LAYER,)),
            ):
                seconds = token_seconds(model, ids, DECODED, time.thread_time)
                if decode == "fused" and "one compiled call" not in str(done.decode):
                    raise RuntimeError(f"the step was not fused: {done.decode}")
            return seconds

        run()
        return run

    return {f"{how} step, a token": item(how) for how in ("fused", "modules")}


GROUPS: dict[str, Callable[[], dict[str, Item]]] = {
    **{f"M = {m}": (lambda m=m: linear_items(m)) for m in TOKENS},
    "attention": attention_items,
    "decoding": decode_items,
}


def child() -> None:
    """For each line of stdin, the name of a group: a round of its items, seconds by name, as JSON.
    One group's weights are held at a time."""
    torch.set_grad_enabled(False)
    highest = CeilingCalls()
    print(json.dumps({"isa": isa.host_isa(), "sizes": highest.sizes()}), flush=True)
    held, items = "", {}
    for line in sys.stdin:
        if line.strip() != held:
            items.clear()
            held = line.strip()
            items = {name: item_of(call) for name, call in highest.calls().items()}
            items |= GROUPS[held]()
        print(json.dumps({name: item() for name, item in items.items()}), flush=True)


class Lowered:
    """The process of a lowering."""

    def __init__(self, name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env={**os.environ, **LOWERINGS[name], IN_CHILD: "1"},
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.facts = self._line()
        self.seconds: dict[str, list[float]] = {}

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of its own ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def round(self, group: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{group}\n")
        self._process.stdin.flush()
        for name, seconds in self._line().items():
            self.seconds.setdefault(name, []).append(seconds)

    def close(self) -> dict[str, float]:
        """Medians."""
        self._process.communicate("")
        return {name: statistics.median(times) for name, times in self.seconds.items()}


def as_markdown(medians: dict[str, dict[str, float]], facts: dict[str, Any], command: str) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in machine_facts().items())
    names = list(medians)
    ceilings = "; ".join(
        f"{name}: {facts[name]['sizes']['read'] / medians[name]['read'] / 1e9:.1f} GB/s, "
        f"{facts[name]['sizes']['dots'] / medians[name]['dots'] / 1e9:.0f} GOPS"
        for name in names
    )
    lines = [
        "# The same kernels compiled for lesser CPUs",
        "",
        f"    {command}",
        "",
        f"{machine}; load average {os.getloadavg()[0]:.0f}. K x N = {SHAPE[0]}x{SHAPE[1]}, weights "
        f"and caches cold, bf16 x, 1 thread, CPU time, medians; in brackets the times of "
        f"{names[0]}. Reads and int8 products of operands at hand, in the same rounds: {ceilings}.",
        "",
        "| µs | " + " | ".join(f"{name} ({facts[name]['isa']})" for name in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for what, first in medians[names[0]].items():
        if what not in ("read", "dots"):
            cells = [
                f"{1e6 * medians[name][what]:.0f} ({medians[name][what] / first:.2f})"
                for name in names
            ]
            lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = report.parser_of(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--lowerings", default=",".join(LOWERINGS))
    parser.add_argument("--groups", default=",".join(GROUPS))
    options = report.parsed(parser)
    if os.environ.get(IN_CHILD):
        child()
        return
    names, groups = options.lowerings.split(","), options.groups.split(",")
    for option, given, known in (("lowerings", names, LOWERINGS), ("groups", groups, GROUPS)):
        if not set(given) <= set(known):
            parser.error(f"--{option} must be among {list(known)}, got {given}")
    processes = {name: Lowered(name) for name in names}
    for group in groups:
        for _ in range(options.rounds):
            for process in processes.values():
                process.round(group)
    facts = {name: process.facts for name, process in processes.items()}
    medians = {name: process.close() for name, process in processes.items()}
    command = report.command_of(Path(__file__).name)
    table = as_markdown(medians, facts, command)
    report.save(options, "lowerings_cpu", table, command, lowerings=facts, seconds=medians)


if __name__ == "__main__":
    main()
