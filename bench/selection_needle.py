"""Needles and perplexity of SmolLM2-135M-Instruct when decoding reads only what is selected.

    python bench/selection_needle.py [--lengths 1024,2048,4096,8192] [--needles 2] [--threads 1]
        [--missing [--parts needles,choice,held,layers,perplexities]]

writes bench/results/selection_needle.md and .json; --missing keeps the lines of that .json and
measures those that it has not. Needle: a sentence with a random number, at five
depths of a filler text in which no sentence comes twice; the number is asked for at the end. A
prompt is read once into an int8 cache, but for its last token; every selection goes on from there,
on a fork of the cache, and its greedy answer holds the number or not. Perplexity: of the last 128
tokens of the shipped English text, one token after the other. Captured mass and recall: of the
first of those tokens, means over layers, heads and pieces. Forms of selectors were chosen on other
needles (other seeds), which have a table of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from needle_probe import BUDGET as PROBE_BUDGET
from needle_probe import Probe, needle_rows, place_of
from needle_text import prompt, sentence
from selection_needle_report import (
    BUDGETS,
    CHOICE_LENGTH,
    CHOICE_SEEDS,
    LAYERS_LENGTH,
    SEQUENCES,
    STEPS,
    named,
    report,
)
from torch import Tensor
from torch.nn import functional

import lath
from lath.formats.selection import Heads
from lath.integration.benchmark import machine_facts
from lath.integration.cache import LathCache, cache_argument
from lath.integration.models import load_model
from lath.integration.text_sample import english_text
from lath.selectors import SUFFIX, Request, Scored, Selector

RESULTS = Path(__file__).parent / "results"
SELECTORS = [*lath.selectors.SELECTORS, "centroid-mass"]
# Other forms than the default: chosen, or the nearest to dense of their selector, on CHOICE_SEEDS.
VARIANTS = [
    "double_sparsity-32", "clusterkv+outliers", "quest+outliers", "centroid+outliers",
    "centroid-mass+outliers", "paged_eviction+outliers", "clusterkv-10", "quest+tokens",
    "centroid-mass+tokens", "paged_eviction+tokens",
]  # fmt: skip
CHOICE = [
    "quest", "quest-16", "quest+outliers", "quest-16+outliers", "centroid", "centroid+outliers",
    "centroid-mass", "centroid-mass+outliers", "paged_eviction", "paged_eviction+outliers",
    "double_sparsity", "double_sparsity-16", "double_sparsity-24", "double_sparsity-32",
    "clusterkv", "clusterkv+outliers", "clusterkv-20", "clusterkv-10", "centroid-16",
    "centroid-mass-16", "centroid-mass-8", "paged_eviction-16", "quest+tokens", "quest+tokens-2",
    "quest+tokens-8", "quest-16+tokens", "centroid+tokens", "centroid-mass+tokens",
    "centroid-mass+tokens-2", "paged_eviction+tokens", "paged_eviction+tokens-2",
]  # fmt: skip
HELD = ["quest", "centroid", "centroid-mass", "paged_eviction", "clusterkv"]
# The others at the largest alone.
EVERY_BUDGET = {"double_sparsity-32", "centroid-mass+tokens", "paged_eviction+tokens"}
PARTS = ("needles", "choice", "held", "layers", "perplexities")
DEPTHS = [0, 0.25, 0.5, 0.75, 1]
CHUNK = 256
ANSWER = 8  # tokens; the number needs 6


class RecentOnly(Selector):
    """Nothing but what is read in any case: the negative control."""

    name = "recent"

    def scores(self, request: Request) -> Scored:
        view = request.view
        nothing = torch.full((len(view.lengths), request.lists, view.table.shape[1]), -math.inf)
        return Scored(nothing)


@dataclass(frozen=True)
class Contender:
    """A selection, or dense; what a line of the tables is about."""

    selector: str
    budget: int = 0
    repair: bool | str = False
    heads: Heads | None = None
    dense_layers: tuple[int, ...] = ()

    @property
    def selection(self) -> lath.Selection | None:
        if self.selector == "dense":
            return None
        chosen = RecentOnly() if self.selector == "recent" else lath.selector(self.selector)
        return lath.Selection(
            chosen, self.budget, self.heads, repair=self.repair,
            dense_layers=frozenset(self.dense_layers),
        )  # fmt: skip

    def is_in(self, rows: list[dict[str, Any]], **wanted: Any) -> bool:
        """Whether one of the rows is its own."""
        wanted |= self.facts
        bare = {"dense_layers": []}  # older rows do not name them
        return any(all((bare | row)[key] == own for key, own in wanted.items()) for row in rows)

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says about it."""
        return {**vars(self), "dense_layers": list(self.dense_layers)}


def contenders() -> Iterator[Contender]:
    yield Contender("dense")
    yield Contender("recent", 64)
    for selector in SELECTORS:
        for budget in BUDGETS:
            yield Contender(selector, budget)
            yield Contender(selector, budget, repair=True)
            # paged_eviction does not look at the query.
            if lath.selector(selector).default_heads == "kv" and selector != "paged_eviction":
                yield Contender(selector, budget, heads="query")
    for selector in VARIANTS:
        for budget in BUDGETS if selector in EVERY_BUDGET else BUDGETS[-1:]:
            yield Contender(selector, budget)
    yield Contender("centroid-mass+outliers", BUDGETS[-1], heads="query")


def choices() -> Iterator[Contender]:
    """What was compared before the forms were chosen, at the largest budget."""
    yield Contender("dense")
    for selector in CHOICE:
        yield Contender(selector, BUDGETS[-1])
    for selector in ("quest", "centroid", "centroid-mass", "paged_eviction"):
        yield Contender(selector, BUDGETS[-1], dense_layers=(0, 1))
    yield Contender("paged_eviction+outliers", BUDGETS[-1], dense_layers=(0, 1))
    per_head = [one for one in CHOICE if one.endswith(SUFFIX)]
    for selector in ("quest", "quest-16", "centroid-mass", *per_head):
        yield Contender(selector, BUDGETS[-1], heads="query")


def by_layers() -> Iterator[Contender]:
    """Where needles are lost: the heads that look at them lie in layers 18 and up."""
    for selector in ("quest", "centroid"):
        for layers in ((), tuple(range(18)), tuple(range(18, 30))):
            yield Contender(selector, BUDGETS[-1], dense_layers=layers)


def read_on() -> Iterator[Contender]:
    """Whose perplexity is measured: all, and repair that adds less."""
    yield from contenders()
    for selector in ("quest", "centroid"):
        for repair in ("centroids", "centroids:25%"):
            for budget in BUDGETS:
                yield Contender(selector, budget, repair)


# Running


class Runner:
    """The model, patched to read LathCaches, and steps of it."""

    def __init__(self, model: Any, backend: str) -> None:
        self.model, self.backend = model, backend
        self.cache_name = cache_argument(model)

    def step(self, ids: Tensor, cache: LathCache, **given: Any) -> Tensor:
        """Logits [B, V] behind the last of ids [B, L]."""
        given[self.cache_name] = cache
        logits: Tensor = self.model(ids, use_cache=True, logits_to_keep=1, **given).logits
        return logits[:, -1].float()

    def prefill(self, ids: Tensor) -> LathCache:
        cache = LathCache(self.model.config, "int8", backend=self.backend)
        for piece in torch.split(ids, CHUNK, dim=1):
            self.step(piece, cache)
        return cache

    def fork(
        self, cache: LathCache, selection: lath.Selection | None, audit: float | None = None
    ) -> LathCache:
        """A cache that shares the pages of `cache`, and reads by the selection."""
        other = LathCache(
            self.model.config, "int8", backend=self.backend, select=selection, audit=audit
        )
        for mine, theirs in zip(other.layers, cache.layers, strict=True):
            states = theirs.pages.first_keys[:, :, :0]
            mine.lazy_initialization(states, states)
            mine.pages, mine.slots, mine.valid = theirs.pages.fork(), theirs.slots, theirs.valid
        return other

    def answers(self, cache: LathCache, last: Tensor, tokenizer: Any, want: list[str]) -> list[str]:
        """Greedy continuations behind the prompts' last tokens [B, 1]; they end early where every
        one holds what is wanted."""
        taken: list[Tensor] = []
        for _ in range(ANSWER):
            last = self.step(last, cache).argmax(-1, keepdim=True)
            taken.append(last)
            texts = [tokenizer.decode(row) for row in torch.cat(taken, dim=1)]
            if all(number in text for number, text in zip(want, texts, strict=True)):
                break
        return texts


def needles(
    runner: Runner, tokenizer: Any, lengths: list[int], seeds: Sequence[int],
    asked: list[Contender], known: list[dict[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each of those asked for, at each length, that is not known."""
    rows = []
    for length in lengths:
        wanted = [one for one in asked if not one.is_in(known, length=length)]
        if not wanted:
            continue
        start = time.perf_counter()
        ids, numbers = prompts(tokenizer, length, seeds)
        filled = runner.prefill(ids[:, :-1])
        read = time.perf_counter()
        for contender in wanted:
            before = rows[-1]["selector"] if rows else contender.selector
            if not alike(before, contender.selector):
                forget(filled)
            began = time.perf_counter()
            got = runner.answers(
                runner.fork(filled, contender.selection), ids[:, -1:], tokenizer, numbers
            )
            found = [number in text for number, text in zip(numbers, got, strict=True)]
            rows.append({
                "length": length, **contender.facts, "found": found, "answers": got,
                "wanted": numbers, "seconds": time.perf_counter() - began,
            })  # fmt: skip
            print(
                length, named(rows[-1]), contender.budget, sum(found), file=sys.stderr, flush=True
            )
        seconds = f"prompts {read - start:.0f} s, answers {time.perf_counter() - read:.0f} s"
        print(f"{length} tokens: {seconds}", file=sys.stderr, flush=True)
    return rows


def prompts(tokenizer: Any, length: int, seeds: Sequence[int]) -> tuple[Tensor, list[str]]:
    """Prompts [B, length] less the room for the answer, and the numbers that are asked for."""
    made = [prompt(tokenizer, length - ANSWER, depth, seed) for seed in seeds for depth in DEPTHS]
    return torch.tensor([own for own, _ in made]), [number for _, number in made]


def lists_hold(runner: Runner, tokenizer: Any, length: int = CHOICE_LENGTH) -> list[dict[str, Any]]:
    """See `needle_probe.needle_rows`, in the step behind the prompts of CHOICE_SEEDS."""
    ids, numbers = prompts(tokenizer, length, CHOICE_SEEDS)
    probe = Probe(others=tuple(map(lath.selector, HELD)))
    filled = runner.prefill(ids[:, :-1])
    runner.step(ids[:, -1:], runner.fork(filled, lath.Selection(probe, PROBE_BUDGET)))
    wanted = [tokenizer(sentence(number)).input_ids for number in numbers]
    places = [place_of(row, own) for row, own in zip(ids[:, :-1].tolist(), wanted, strict=True)]
    return needle_rows(probe, places)


def alike(one: str, other: str) -> bool:
    """Whether selectors use the same tables of the cache's pages."""
    return other in (one, one + SUFFIX) or (one.endswith(SUFFIX) and other.endswith(SUFFIX))


def forget(cache: LathCache) -> None:
    """Drop what selectors keep of the cache's pages: of 82,000 tokens it is gigabytes."""
    for layer in cache.layers:
        layer.pages.pool.side_tables.clear()
        layer.pages.pool.constants.clear()


def perplexities(
    runner: Runner, tokenizer: Any, known: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], int]:
    """Of SEQUENCES pieces of STEPS tokens at the end of the text, each behind all that stands
    before it; and the context of the first piece."""
    ids = tokenizer(english_text(), return_tensors="pt", verbose=False).input_ids[0]
    first = len(ids) - SEQUENCES * STEPS
    cache, mask = staggered(runner, ids, first - 1)
    rows = []
    for contender in (one for one in read_on() if not one.is_in(known)):
        began = time.perf_counter()
        own, total = runner.fork(cache, contender.selection), 0.0
        for i in range(STEPS):
            logits, wanted = piece_step(runner, ids, first, i, own, mask)
            total += functional.cross_entropy(logits, wanted, reduction="sum").item()
        seconds = time.perf_counter() - began
        perplexity = math.exp(total / (SEQUENCES * STEPS))
        row = {**contender.facts, "perplexity": perplexity, "seconds": seconds}
        if contender.selection is not None and not contender.repair:
            audited = runner.fork(cache, contender.selection, audit=0.5)
            piece_step(runner, ids, first, 0, audited, mask)
            missed = audited.misses.rows
            row["mass"] = sum(one.mean_mass for one in missed) / len(missed)
            row["recall"] = sum(one.mean_recall for one in missed) / len(missed)
        rows.append(row)
        print(named(rows[-1]), contender.budget, perplexity, file=sys.stderr, flush=True)
    return rows, first


def piece_step(
    runner: Runner, ids: Tensor, first: int, i: int, cache: LathCache, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits [SEQUENCES, V] for token i of every piece, and those tokens."""
    at = first + torch.arange(SEQUENCES) * STEPS + i
    longer = functional.pad(mask, (0, i + 1), value=1)
    logits = runner.step(
        ids[at - 1, None], cache, attention_mask=longer, position_ids=at[:, None] - 1
    )
    return logits, ids[at]


def staggered(runner: Runner, ids: Tensor, first: int) -> tuple[LathCache, Tensor]:
    """A cache of the first `first + STEPS * s` tokens in sequence s, and its mask of slots. What
    all have in common is read once; the rest is padded on its left."""
    cache = runner.prefill(ids[None, :first])
    cache.batch_repeat_interleave(SEQUENCES)
    width = STEPS * (SEQUENCES - 1)
    places = torch.arange(width) - width + STEPS * torch.arange(SEQUENCES)[:, None]
    mask = torch.cat([torch.ones(SEQUENCES, first), (places >= 0).float()], dim=1).long()
    at = first + places.clamp(min=0)
    runner.step(ids[at], cache, attention_mask=mask, position_ids=at)
    return cache, mask


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--needles", type=int, default=2, help="at each depth of each length")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", default="all", help=f"of {', '.join(PARTS)}; with --missing")
    parser.add_argument("--missing", action="store_true", help="keep the lines that are stored")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.parts != "all" and not (
        options.missing and set(options.parts.split(",")) <= set(PARTS)
    ):
        parser.error(f"--parts must be of {', '.join(PARTS)}, with --missing, got {options.parts}")
    lengths = [int(length) for length in options.lengths.split(",")]
    stored = options.output / "selection_needle.json"
    before = json.loads(stored.read_text()) if options.missing else {}
    if before and (before["lengths"], before["count"]) != (lengths, options.needles):
        parser.error(f"{stored} has other lengths or needles: {before['lengths']}")
    torch.set_num_threads(options.threads)
    start, processor = time.perf_counter(), time.process_time()
    model, tokenizer = load_model("smollm2", "bfloat16")
    runner = Runner(model, options.backend)
    asked = PARTS if options.parts == "all" else options.parts.split(",")
    result: dict[str, Any] = {"lengths": lengths, "count": options.needles, **before}
    kept = {part: result.setdefault(part, []) for part in PARTS}
    with (
        lath.patch(model, None, attention="int8", kv="int8", backend=options.backend),
        torch.inference_mode(),
    ):
        if "needles" in asked:
            kept["needles"] += needles(
                runner, tokenizer, lengths, range(options.needles), list(contenders()),
                kept["needles"],
            )  # fmt: skip
        if "choice" in asked:
            kept["choice"] += needles(
                runner, tokenizer, [CHOICE_LENGTH], CHOICE_SEEDS, list(choices()), kept["choice"]
            )
        if "held" in asked and not kept["held"]:
            kept["held"] += lists_hold(runner, tokenizer)
        if "layers" in asked:
            seeds = range(options.needles)
            kept["layers"] += needles(
                runner, tokenizer, [LAYERS_LENGTH], seeds, list(by_layers()), kept["layers"]
            )
        if "perplexities" in asked:
            measured, result["context"] = perplexities(runner, tokenizer, kept["perplexities"])
            kept["perplexities"] += measured
    command = "python bench/selection_needle.py"
    for name in ("lengths", "needles", "threads", "parts"):
        if getattr(options, name) != parser.get_default(name):
            command += f" --{name} {getattr(options, name)}"
    run = {
        "machine": machine_facts(), "backend": options.backend, "threads": options.threads,
        "command": command + " --missing" * options.missing,
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - processor,
    }  # fmt: skip
    result["runs"] = [*result.get("runs", []), run]
    stored.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    stored.with_suffix(".md").write_text(report(result, __doc__ or ""))


if __name__ == "__main__":
    main()
