"""Decoding of a whole model on a CPU through `generate()`, contenders interleaved in one process.

    python bench/bench_decode.py [--model smollm2] [--rounds 9] [--threads 1] [--positions 2048]
                                 [--llama-bench PATH --gguf PATH] [--output bench/results]
    python bench/bench_decode.py --threads 2 --disturbed [--rounds 9]

The first writes decode_cpu.md and decode_cpu.json. Contenders take turns within each round, one
greedy `generate` of 48 tokens each behind the same prompt of 256; a ratio is the median over rounds
of the round's own, so that what else the machine does hits both. The clock is the thread's CPU time
with one thread, wall time with more. llama-bench, where given, takes turns with the fused step in
rounds of their own, both by the wall (llama_bench.py).

--disturbed: the fused step alone, one thread against several, on a quiet machine and with another
process on a core (decode_threads.py); writes decode_threads_cpu.md and .json.

--positions: the logits of the fused step, one token at a time over that many tokens of text,
against those of the unpatched model in fp32, and the modules' likewise: KL divergence in nats and
how often the largest logit is the same.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import report
import torch
from decode_threads import TURN, TURNS, table_of_turns, take_turns
from llama_bench import LlamaBench, Paired, Times, pair
from torch import Tensor

import lath
from lath.integration.benchmark import machine_facts
from lath.integration.cache import LathCache, cache_argument
from lath.integration.ceilings import CeilingCalls
from lath.integration.find import OUTPUT_LAYER
from lath.integration.measure import generate, time_generate, token_seconds
from lath.integration.models import load_model
from lath.integration.run_command import DEFAULT_HEAD, DEFAULT_WEIGHTS
from lath.integration.text_sample import english_text

PROMPT, TOKENS, WINDOW = 256, 48, 512
LLAMA_TOKENS = 64
KV = "int8"


@dataclass(frozen=True)
class Speed:
    """milliseconds: medians of a token. ratio: this contender's time over the fused step's."""

    name: str
    milliseconds: float
    tokens_per_second: float
    ratio: float


@dataclass(frozen=True)
class Fidelity:
    """Against the unpatched fp32 model: mean KL in nats, share of equal largest logits,
    perplexities of both."""

    name: str
    positions: int
    kl: float
    top_1: float
    perplexity: float
    perplexity_unpatched: float


@dataclass(frozen=True)
class Floor:
    """What a token of the fused step reads at least: views of packed weights, and what the cache
    holds half way through the tokens. gb_per_s: of a plain read of cold memory between the rounds.
    share: of the time, median over rounds, that the read alone takes."""

    weight_bytes: int
    cache_bytes: int
    gb_per_s: float
    share: float

    @property
    def milliseconds(self) -> float:
        return 1e-6 * (self.weight_bytes + self.cache_bytes) / self.gb_per_s


class Contenders:
    """One model and what can be made of it: each name is a call that brings the model there."""

    def __init__(self, model: Any, weights: str) -> None:
        self.model = model
        self._reports: dict[str, list[lath.PatchReport]] = {"unpatched": []}
        for name, decode in (("modules", "modules"), ("fused", "auto")):
            body = lath.patch(model, weights, attention="int8", kv=KV, decode=decode)
            head = lath.patch(model, DEFAULT_HEAD, skip=(), only=(OUTPUT_LAYER,))
            self._reports[name] = [body, head]
            self._undo(name)
        self.now = "unpatched"

    @property
    def names(self) -> list[str]:
        return list(self._reports)

    def _undo(self, name: str) -> None:
        for one in reversed(self._reports[name]):
            one.undo()

    def choose(self, name: str) -> None:
        self._undo(self.now)
        for one in self._reports[name]:
            one.redo()
        self.now = name

    def fused_cache(self) -> Any:
        """An empty one, of the fused step, to which the model is brought."""
        self.choose("fused")
        new_cache = self._reports["fused"][0].new_cache
        assert new_cache is not None
        return new_cache()

    def bytes_of_a_token(self, ids: Tensor) -> tuple[int, int]:
        """Of the fused step: of weights, and of the cache behind the prompt and half the tokens."""
        cache, half = self.fused_cache(), TOKENS // 2
        name = cache_argument(self.model)
        generate(self.model, ids, half, min_new_tokens=half, **{name: cache})
        return sum(one.view_bytes for one in self._reports["fused"]), cache.nbytes_in_use

    def decode_report(self, name: str) -> str:
        return str(self._reports[name][0].decode)


def wall_times(contenders: Contenders, ids: Tensor) -> Times:
    """Of the fused step, as llama-bench counts: means, the first token with its preparations."""
    contenders.choose("fused")
    prefill, rest = time_generate(contenders.model, ids, LLAMA_TOKENS + 1)
    return Times(prefill, rest / LLAMA_TOKENS)


def reading(read: Callable[[int], object], now: Callable[[], float]) -> float:
    """Seconds of one call that reads: the median of nine."""
    times = [now()]
    for i in range(9):
        read(i)
        times.append(now())
    return statistics.median(after - before for before, after in itertools.pairwise(times))


def measure(
    contenders: Contenders, ids: Tensor, rounds: int, threads: int
) -> tuple[list[Speed], Floor]:
    now = time.thread_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {}
    ceilings = CeilingCalls()
    read, nbytes, floors = ceilings.calls()["read"], contenders.bytes_of_a_token(ids), []
    for turn in range(rounds + 1):
        order = contenders.names if turn % 2 else contenders.names[::-1]
        for name in order:
            contenders.choose(name)
            own = token_seconds(contenders.model, ids, TOKENS, now)
            if turn:  # the first round compiles and warms up
                seconds.setdefault(name, []).append(own)
        if turn:
            floors.append(sum(nbytes) * reading(read, now) / ceilings.sizes()["read"])
    fused = seconds["fused"]
    floor = Floor(
        *nbytes, 1e-9 * sum(nbytes) / statistics.median(floors),
        statistics.median(a / b for a, b in zip(floors, fused, strict=True)),
    )  # fmt: skip
    speeds = [
        Speed(
            name, 1e3 * statistics.median(own), 1 / statistics.median(own),
            statistics.median(b / a for a, b in zip(fused, own, strict=True)),
        )
        for name, own in seconds.items()
    ]  # fmt: skip
    return speeds, floor


def stepwise(model: Any, ids: Tensor) -> Tensor:
    """Logits [n, V] fp32 of a window, its first token as a prompt, the others one at a time."""
    cache = LathCache(model.config, KV)
    name = cache_argument(model)
    rows = [
        model(ids[:, i : i + 1], use_cache=True, **{name: cache}).logits[0, -1].float()
        for i in range(ids.shape[1])
    ]
    return torch.stack(rows)


def fidelity(
    contenders: Contenders, unpatched: Any, text: Tensor, positions: int
) -> list[Fidelity]:
    """unpatched: the model in its checkpoint's own numbers."""
    model = contenders.model
    window = min(WINDOW, positions)
    windows = text[:, : positions // window * window].split(window, dim=1)
    names = [name for name in contenders.names if name != "unpatched"]
    sums = {name: [0.0, 0.0, 0.0, 0.0] for name in names}
    for ids in windows:
        exact = unpatched(ids, use_cache=False).logits[0].float().log_softmax(-1)
        targets = ids[0, 1:, None]
        for name in names:
            contenders.choose(name)
            own = stepwise(model, ids).log_softmax(-1)
            added = (
                float((exact.exp() * (exact - own)).sum()),
                float((own.argmax(-1) == exact.argmax(-1)).sum()),
                *(-float(logits[:-1].gather(1, targets).sum()) for logits in (own, exact)),
            )
            sums[name] = [a + b for a, b in zip(sums[name], added, strict=True)]
    count, predicted = window * len(windows), (window - 1) * len(windows)
    return [
        Fidelity(
            name, count, kl / count, same / count,
            *(float(torch.tensor(nats / predicted).exp()) for nats in (own, exact)),
        )
        for name, (kl, same, own, exact) in sums.items()
    ]  # fmt: skip


def table_of(
    options: Any, speeds: list[Speed], floor: Floor, found: list[Fidelity], how: str, command: str
) -> str:
    facts = machine_facts()
    clock = "CPU time of the thread" if options.threads == 1 else "wall time"
    lines = [
        f"# Decoding through `generate()`: {options.model}, {options.weights}, output layer "
        f"{DEFAULT_HEAD}, cache {KV}",
        "",
        f"`{command}`; {', '.join(facts.values())}; {options.threads} thread(s), {clock}, load "
        f"average {load_average()}; medians of {options.rounds} rounds, {TOKENS} greedy tokens "
        f"behind {PROMPT}.",
        "",
        "| | ms per token | tokens/s | time / fused |",
        "|---|---|---|---|",
        *(
            f"| {s.name} | {s.milliseconds:.2f} | {s.tokens_per_second:.0f} | {s.ratio:.2f} |"
            for s in speeds
        ),
        "",
        f"Bytes a token reads at least: {1e-6 * floor.weight_bytes:.1f} MB of weights and "
        f"{1e-6 * floor.cache_bytes:.1f} MB of cache, which a plain read ({floor.gb_per_s:.1f} "
        f"GB/s between the rounds) takes {floor.milliseconds:.2f} ms for: {floor.share:.0%} of the "
        "fused step's time.",
        "",
        how,
        "",
    ]
    if found:
        lines += [
            f"Over {found[0].positions} positions of text, one token at a time, against the "
            f"unpatched model in fp32 (perplexity {found[0].perplexity_unpatched:.2f}):",
            "",
            "| | KL, nats | same largest logit | perplexity |",
            "|---|---|---|---|",
            *(f"| {f.name} | {f.kl:.4f} | {f.top_1:.1%} | {f.perplexity:.2f} |" for f in found),
            "",
        ]
    return "\n".join(lines)


def disturbed(options: Any, contenders: Contenders, prompt: Tensor) -> None:
    """Measure one thread against several and save that."""

    def begin() -> Callable[[], float]:
        cache, ids = contenders.fused_cache(), prompt
        name = cache_argument(contenders.model)

        def turn() -> float:
            nonlocal ids
            _, rest = time_generate(contenders.model, ids, TURN + 1, **{name: cache})
            # Whatever they are: what is stored already is not read again.
            ids = torch.cat([ids, ids[:, : TURN + 1]], dim=1)
            return rest / TURN

        return turn

    before = load_average()
    places = {"nobody else": False, "another process on one core": True}
    turns = take_turns(begin, options.threads, options.rounds, places)
    command = report.command_of("bench_decode.py")
    load = f"load average {before}, after {load_average()}"
    table = "\n".join([
        f"# Several threads in the fused step: {options.model}, {options.weights}, output layer "
        f"{DEFAULT_HEAD}, cache {KV}",
        "",
        f"`{command}`; {', '.join(machine_facts().values())}; wall time, {load}; "
        f"{options.rounds} rounds of {TURNS} turns behind {PROMPT} tokens, one thread and "
        f"{options.threads} in turn, {TURN} greedy tokens each.",
        "",
        table_of_turns(turns, options.threads),
        contenders.decode_report("fused"),
        "",
    ])  # fmt: skip
    report.save(
        options, "decode_threads_cpu", table, command, load_average=load,
        turns=[asdict(t) for t in turns],
    )  # fmt: skip


def table_of_pairs(peers: list[Paired], against: str, rounds: int) -> str:
    if not peers:
        return ""
    lines = [
        "",
        f"llama-bench in turn with the fused step, both by the wall; {rounds} rounds; {against}.",
        "",
        "| | lath, tokens/s | llama.cpp, tokens/s | ratio, median of rounds | least, largest |",
        "|---|---|---|---|---|",
        *(
            f"| {p.what} | {p.ours:.0f} | {p.theirs:.0f} | {p.ratio:.2f} | "
            f"{p.least:.2f}, {p.largest:.2f} |"
            for p in peers
        ),
        "",
    ]
    return "\n".join(lines)


def load_average() -> str:
    path = Path("/proc/loadavg")
    return " ".join(path.read_text().split()[:3]) if path.exists() else "unknown"


def main() -> None:
    parser = report.parser_of(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--positions", type=int, default=0)
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--disturbed", action="store_true")
    options = report.parsed(parser)
    if options.positions < 0 or options.positions == 1:
        sys.exit(f"--positions must be 0 or at least 2, got {options.positions}")
    if options.disturbed and options.threads < 2:
        sys.exit(f"--disturbed compares with --threads of 2 or more, got {options.threads}")
    if (options.llama_bench is None) != (options.gguf is None):
        sys.exit("--llama-bench and --gguf go together")
    torch.set_grad_enabled(False)
    model, tokenizer = load_model(options.model)
    contenders = Contenders(model, options.weights)
    model.to(getattr(torch, options.dtype))
    text = tokenizer(english_text(), return_tensors="pt", verbose=False).input_ids
    prompt = text[:, :PROMPT]
    if options.disturbed:
        disturbed(options, contenders, prompt)
        return
    speeds, floor = measure(contenders, prompt, options.rounds, options.threads)
    peers, against = [], ""
    if options.llama_bench is not None:
        llama = LlamaBench(options.llama_bench, options.gguf, options.threads, PROMPT, LLAMA_TOKENS)
        weights, before = llama.weights(), load_average()
        peers = pair(llama, lambda: wall_times(contenders, prompt), options.rounds)
        against = f"{llama.facts}; {weights}; load average {before}, after {load_average()}"
    found = []
    if options.positions:
        unpatched, _ = load_model(options.model, "float32")
        found = fidelity(contenders, unpatched, text, options.positions)
    command = report.command_of("bench_decode.py")
    table = table_of(options, speeds, floor, found, contenders.decode_report("fused"), command)
    table += table_of_pairs(peers, against, options.rounds)
    report.save(
        options, "decode_cpu", table, command, load_average=load_average(),
        speeds=[asdict(s) for s in speeds], floor=asdict(floor),
        fidelity=[asdict(f) for f in found],
        llama_bench={"what": against, "rows": [asdict(p) for p in peers]},
    )  # fmt: skip


if __name__ == "__main__":
    main()
