"""Whole models of large shapes with random weights on a CPU: speed through `generate()` and memory.

    python bench/bench_models.py --shape llama-1b [--weights int4-g32] [--head int8-g32]
                                 [--llama-bench PATH] [--folder /tmp/lath-models] [--rounds 9]

writes models_<shape>.md and .json. The model is written to --folder if it is not there, in bf16 or,
ternary, as a BitNet checkpoint, and then loaded with `lath.load`. Memory is what is resident beside
what was before, at its most from the first byte read to the last token: beforehand a model of the
same shape with one layer and a small vocabulary was loaded and generated, so that what is imported
and compiled once does not count. "packed" is all that the model then holds, the embedding too.

llama-bench, where given, decodes a random GGUF of that shape in turn with the fused step, with
blocks of the same bytes: Q4_0 beside int4-g32 or TQ2_0 beside ternary-s32, and a Q8_0 embedding
(its output layer too) beside int8-g32. Its CPU time per token is that of a run of many tokens less
that of a run of few.
"""

from __future__ import annotations

import dataclasses
import gc
import resource
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import report
import torch
from bench_decode import load_average, table_of_pairs
from llama_bench import LlamaBench, Paired, Times, pair
from random_models import SHAPES, Shape, write_folder, write_gguf
from torch import Tensor

import lath
from lath.integration.benchmark import machine_facts
from lath.integration.cache import cache_argument
from lath.integration.linear import PackedLinear
from lath.integration.measure import (
    generate,
    peak_bytes,
    reset_peak,
    resident_bytes,
    time_generate,
    token_seconds,
)
from lath.integration.report import model_bytes

PROMPT, TOKENS, FEW = 256, 64, 8
KV = "int8"


@dataclass(frozen=True)
class Memory:
    """Bytes. before: resident without the model. loaded, generated: the most beside that, until the
    model was there and until the last token. packed: parameters and buffers. cache: of the
    generation. seconds: of loading."""

    before: int
    loaded: int
    generated: int
    packed: int
    cache: int
    seconds: float

    @property
    def ratio(self) -> float:
        return self.generated / (self.packed + self.cache)


def prepared(shape: Shape, options: Any) -> tuple[Path, Path, Path]:
    """The folders of the model and of its small likeness, and the GGUF file, written if need be."""
    kinds = ("TQ2_0" if shape.ternary else "Q4_0", "Q8_0")
    folder, small = options.folder / options.shape, options.folder / f"{options.shape}-one-layer"
    gguf = options.folder / f"{options.shape}-{'-'.join(kinds)}.gguf"
    for path, own in (
        (folder, shape),
        (small, dataclasses.replace(shape, layers=1, vocabulary=512)),
    ):
        if not (path / "model.safetensors.index.json").exists():
            write_folder(own, path)
    if options.llama_bench is not None and not gguf.exists():
        partial = gguf.with_suffix(".partial")
        write_gguf(shape, partial, *kinds)
        partial.rename(gguf)
    return folder, small, gguf


def loaded(folder: Path, options: Any) -> tuple[Any, lath.PatchReport]:
    model = lath.load(folder, options.weights, head=options.head)
    return model, lath.patch(model, None, attention="int8", kv=KV, decode="fused")


def cached_generation(model: Any, patched: lath.PatchReport, ids: Tensor) -> Any:
    assert patched.new_cache is not None
    cache = patched.new_cache()
    generate(model, ids, TOKENS, min_new_tokens=TOKENS, **{cache_argument(model): cache})
    return cache


def measured_memory(
    folder: Path, small: Path, ids: Tensor, options: Any
) -> tuple[Any, lath.PatchReport, Memory]:
    model, patched = loaded(small, options)
    cached_generation(model, patched, ids)
    del model, patched
    reset_peak()
    before, start = resident_bytes(), time.perf_counter()
    model, patched = loaded(folder, options)
    seconds, at_load = time.perf_counter() - start, peak_bytes() - before
    cache = cached_generation(model, patched, ids)
    memory = Memory(
        before, at_load, peak_bytes() - before, model_bytes(model), cache.nbytes, seconds
    )
    not_compact = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear) and not module.is_compact
    ]
    if not_compact:
        raise SystemExit(f"these layers hold their codes twice: {not_compact}")
    return model, patched, memory


class CpuTimes:
    """CPU seconds of a token of both, in turn."""

    def __init__(self, llama: LlamaBench) -> None:
        self.llama = llama
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def round(self, model: Any, ids: Tensor) -> None:
        self.ours.append(token_seconds(model, ids, TOKENS, time.thread_time))
        many, few = (self._seconds(tokens) for tokens in (TOKENS + FEW, FEW))
        self.theirs.append((many - few) / TOKENS)

    def _seconds(self, tokens: int) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.llama.run("-p", 0, "-n", tokens, "-d", PROMPT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)

    def paired(self) -> Paired:
        ratios = sorted(b / a for a, b in zip(self.ours, self.theirs, strict=True))
        ours, theirs = (1 / statistics.median(own) for own in (self.ours, self.theirs))
        middle = statistics.median(ratios)
        return Paired("decode, CPU time", ours, theirs, middle, ratios[0], ratios[-1])


def measured_pairs(
    model: Any, ids: Tensor, gguf: Path, options: Any
) -> tuple[list[Paired], str, int]:
    llama = LlamaBench(options.llama_bench, gguf, options.threads, PROMPT, TOKENS)

    def ours() -> Times:
        prefill, rest = time_generate(model, ids, TOKENS + 1)
        return Times(prefill, rest / TOKENS)

    before = load_average()
    peers = pair(llama, ours, options.rounds)
    if options.threads == 1:
        cpu = CpuTimes(llama)
        for _ in range(options.rounds):
            cpu.round(model, ids)
        peers.append(cpu.paired())
    facts = f"{llama.facts}; {gguf.stem}; load average {before}, after {load_average()}"
    return peers, facts, llama.peak_bytes()


def table_of(options: Any, memory: Memory, milliseconds: float, command: str) -> str:
    mega = 1e6
    return "\n".join(
        [
            f"# {options.shape} with random weights: {options.weights}, output layer "
            f"{options.head}, cache {KV}",
            "",
            f"`{command}`; {', '.join(machine_facts().values())}; {options.threads} thread(s), "
            f"load average {load_average()}.",
            "",
            f"{milliseconds:.2f} ms of CPU time a token (mean of {TOKENS} behind {PROMPT}).",
            "",
            "| MB | |",
            "|---|---|",
            f"| packed | {memory.packed / mega:.0f} |",
            f"| cache | {memory.cache / mega:.0f} |",
            f"| peak while loading, in {memory.seconds:.0f} s | {memory.loaded / mega:.0f} |",
            f"| peak, loading and {PROMPT} + {TOKENS} tokens | {memory.generated / mega:.0f} |",
            f"| peak / (packed + cache) | {memory.ratio:.3f} |",
            f"| not counted: the process before | {memory.before / mega:.0f} |",
            "",
        ]
    )


def main() -> None:
    parser = report.parser_of(__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--weights")
    parser.add_argument("--head", default="int8-g32")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/lath-models"))
    parser.add_argument("--llama-bench", type=Path)
    options = report.parsed(parser)
    shape = SHAPES[options.shape]
    options.weights = options.weights or ("ternary-s32" if shape.ternary else "int4-g32")
    torch.set_grad_enabled(False)
    folder, small, gguf = prepared(shape, options)
    ids = torch.randint(3, 500, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    gc.collect()
    model, patched, memory = measured_memory(folder, small, ids, options)
    seconds = token_seconds(model, ids, TOKENS, time.thread_time)
    peers, facts, resident = [], "", 0
    if options.llama_bench is not None:
        peers, facts, resident = measured_pairs(model, ids, gguf, options)
        facts += f"; its peak of resident memory {resident / 1e6:.0f} MB, its program included"
    command = report.command_of("bench_models.py")
    table = table_of(options, memory, 1e3 * seconds, command) + f"\n{patched.decode}\n"
    table += table_of_pairs(peers, facts, options.rounds)
    report.save(
        options, f"models_{options.shape}", table, command, load_average=load_average(),
        memory={**asdict(memory), "ratio": memory.ratio}, milliseconds=1e3 * seconds,
        llama_bench={"what": facts, "rows": [asdict(p) for p in peers], "resident": resident},
    )  # fmt: skip


if __name__ == "__main__":
    main()
