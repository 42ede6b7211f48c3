"""`lath.decode_attention` and `lath.attention` on a CPU against torch, interleaved in one process.

    python bench/bench_attention.py [--rounds 9] [--threads 1] [--output bench/results]

writes attention_cpu.md and attention_cpu.json: the rows of `lath bench attention` over the shapes
below, and what a decode step does besides reading its cache.
"""

from __future__ import annotations

import sys

import report

from lath.integration.attention_benchmark import (
    AttentionRow,
    Prefill,
    attention_json,
    attention_markdown,
    bench_decode,
    bench_prefill,
    small_times,
)

DECODE_KEYS = (4096, 8192, 32768)
PREFILL = (
    Prefill(8, 8, 128, 2048),
    Prefill(8, 8, 128, 4096),
    Prefill(32, 8, 128, 1024),
    Prefill(9, 3, 64, 2048),
    Prefill(8, 8, 128, 2048, causal=False),
)


def main() -> None:
    options = report.parsed(report.parser_of(__doc__))
    rows: list[AttentionRow] = []
    for codecs in (("int8", "int8"), ("int4", "int4")):
        for keys in DECODE_KEYS:
            rows += bench_decode(keys, codecs, options.rounds)
            print(rows[-4], file=sys.stderr)
    for shape in PREFILL:
        rows += bench_prefill(shape, options.rounds)
        print(rows[-2], file=sys.stderr)
    small = small_times(options.rounds)
    command = report.command_of("bench_attention.py")
    table = attention_markdown(rows, small, command)
    report.save(options, "attention_cpu", table, command, rows=attention_json(rows), small=small)


if __name__ == "__main__":
    main()
