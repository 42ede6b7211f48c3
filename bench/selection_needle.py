"""Needles and perplexity of SmolLM2-135M-Instruct when decoding reads only what is selected.

    python bench/selection_needle.py [--lengths 1024,2048,4096,8192] [--needles 2] [--threads 1]
        [--missing]

writes bench/results/selection_needle.md and .json; --missing keeps the lines of that .json and
measures those that it has not. Needle: a sentence with a random number, at five
depths of a filler text in which no sentence comes twice; the number is asked for at the end. A
prompt is read once into an int8 cache, but for its last token; every selection goes on from there,
on a fork of the cache, and its greedy answer holds the number or not. Perplexity: of the last 128
tokens of the shipped English text, one token after the other. Captured mass and recall: of the
first of those tokens, means over layers, heads and pieces.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from needle_text import prompt
from torch import Tensor
from torch.nn import functional

import lath
from lath.formats.selection import Heads
from lath.integration.benchmark import machine_facts
from lath.integration.cache import LathCache, cache_argument
from lath.integration.models import load_model
from lath.integration.text_sample import english_text
from lath.selectors import Request, Scored, Selector

RESULTS = Path(__file__).parent / "results"
SELECTORS = [*lath.selectors.SELECTORS, "centroid-mass"]
# With options other than the default, chosen by captured mass in the text of the perplexity.
VARIANTS = ["double_sparsity-32"]
BUDGETS = [256, 512, 1024]
DEPTHS = [0, 0.25, 0.5, 0.75, 1]
CHUNK = 256
ANSWER = 8  # tokens; the number needs 6
SEQUENCES, STEPS = 8, 16  # of the perplexity: 128 tokens


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

    @property
    def selection(self) -> lath.Selection | None:
        if self.selector == "dense":
            return None
        chosen = RecentOnly() if self.selector == "recent" else lath.selector(self.selector)
        return lath.Selection(chosen, self.budget, heads=self.heads, repair=self.repair)

    def is_in(self, rows: list[dict[str, Any]], **wanted: Any) -> bool:
        """Whether one of the rows is its own."""
        wanted |= vars(self)
        return any(all(row[key] == value for key, value in wanted.items()) for row in rows)


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
        for budget in BUDGETS:
            yield Contender(selector, budget)


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

    def fork(self, cache: LathCache, contender: Contender, audit: float | None = None) -> LathCache:
        """A cache that shares the pages of `cache`, and reads by the contender's selection."""
        other = LathCache(
            self.model.config, "int8", backend=self.backend, select=contender.selection, audit=audit
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
    runner: Runner, tokenizer: Any, lengths: list[int], count: int, known: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    for length in lengths:
        wanted = [one for one in contenders() if not one.is_in(known, length=length)]
        if not wanted:
            continue
        start = time.perf_counter()
        # The answer stays within the length.
        made = [
            prompt(tokenizer, length - ANSWER, depth, seed)
            for seed in range(count)
            for depth in DEPTHS
        ]
        ids, numbers = torch.tensor([own for own, _ in made]), [number for _, number in made]
        filled = runner.prefill(ids[:, :-1])
        read = time.perf_counter()
        for contender in wanted:
            began = time.perf_counter()
            got = runner.answers(runner.fork(filled, contender), ids[:, -1:], tokenizer, numbers)
            found = [number in text for number, text in zip(numbers, got, strict=True)]
            rows.append({
                "length": length, **vars(contender), "found": found, "answers": got,
                "wanted": numbers, "seconds": time.perf_counter() - began,
            })  # fmt: skip
            print(
                length, named(rows[-1]), contender.budget, sum(found), file=sys.stderr, flush=True
            )
        seconds = f"prompts {read - start:.0f} s, answers {time.perf_counter() - read:.0f} s"
        print(f"{length} tokens: {seconds}", file=sys.stderr, flush=True)
    return rows


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
        own, total = runner.fork(cache, contender), 0.0
        for i in range(STEPS):
            logits, wanted = piece_step(runner, ids, first, i, own, mask)
            total += functional.cross_entropy(logits, wanted, reduction="sum").item()
        seconds = time.perf_counter() - began
        perplexity = math.exp(total / (SEQUENCES * STEPS))
        row = {**vars(contender), "perplexity": perplexity, "seconds": seconds}
        if contender.selection is not None and not contender.repair:
            audited = runner.fork(cache, contender, audit=0.5)
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


# The report


def named(row: dict[str, Any]) -> str:
    if row["heads"] is not None:
        return f"{row['selector']}, a list per query head"
    if isinstance(row["repair"], str):
        return f"{row['selector']}, repair='{row['repair']}'"
    return row["selector"] + (" with repair" if row["repair"] else "")


def by_name(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(named(row), []).append(row)
    return lines


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    rows = [f"| {' | '.join(line)} |" for line in [head, *lines]]
    return [rows[0], "|---" * len(head) + "|", *rows[1:], ""]


def hits(rows: list[dict[str, Any]], **wanted: Any) -> str:
    found = [hit for row in rows for hit in row["found"]
             if all(row[key] == value for key, value in wanted.items())]  # fmt: skip
    return f"{sum(found)}/{len(found)}"


def needle_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for name, own in by_name(rows).items():
        # Dense and the control have no budget.
        fixed = len({row["budget"] for row in own}) == 1
        cells = [hits(own) if fixed else hits(own, budget=budget) for budget in BUDGETS]
        lines.append([name, *cells])
    return table(["reads", *(f"budget {budget}" for budget in BUDGETS)], lines)


def length_table(rows: list[dict[str, Any]], budget: int) -> list[str]:
    lengths = sorted({row["length"] for row in rows})
    some = [row for row in rows if row["budget"] in (0, 64, budget)]
    lines = [
        [name, *(hits(own, length=length) for length in lengths)]
        for name, own in by_name(some).items()
    ]
    return table([f"budget {budget}", *(f"{length} tokens" for length in lengths)], lines)


def perplexity_table(rows: list[dict[str, Any]]) -> list[str]:
    dense = next(row["perplexity"] for row in rows if row["selector"] == "dense")
    lines = []
    for name, own in by_name(rows).items():
        cells = [f"{r['perplexity']:.3f} ({r['perplexity'] / dense - 1:+.2%})" for r in own]
        lines.append([name, *(cells if len(cells) > 1 else cells * len(BUDGETS))])
    return table(["reads", *(f"budget {budget}" for budget in BUDGETS)], lines)


def mass_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for name, own in by_name([row for row in rows if "mass" in row]).items():
        cells = [f"{r['mass']:.3f}, {r['recall']:.2f}" for r in own]
        lines.append([name, *(cells if len(cells) > 1 else cells * len(BUDGETS))])
    return table(["reads", *(f"budget {budget}" for budget in BUDGETS)], lines)


def as_good_as_dense(rows: list[dict[str, Any]], budget: int) -> list[str]:
    """Lines that find as many needles as dense, with the budget."""
    dense = sum(sum(row["found"]) for row in rows if row["selector"] == "dense")
    some = by_name([row for row in rows if row["budget"] == budget])
    return [name for name, own in some.items() if sum(sum(r["found"]) for r in own) >= dense]


def circumstances(run: dict[str, Any]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in run["machine"].items())
    return (
        f"{facts}; backend {run['backend']}, {run['threads']} thread(s), bf16 model, "
        f"{run['seconds']:.0f} s in all, {run['processor_seconds']:.0f} s of a processor. "
        f"Command: `{run['command']}`"
    )


def report(result: dict[str, Any]) -> str:
    assert __doc__ is not None
    rows = result["needles"]
    parts = [
        "# SmolLM2-135M-Instruct: decoding over selections", "", __doc__.strip(), "",
        *(line for run in result["runs"] for line in (circumstances(run), "")),
        "## Needles found", "",
        f"{result['count']} at each of five depths (0, 25, 50, 75, 100 %) of "
        f"{', '.join(map(str, result['lengths']))} tokens. recent: the first 64 tokens and the "
        "last 64 to 128 alone, the negative control: it finds needles that stand there. A budget "
        "counts the tokens of pages that are read besides those (clusterkv: besides the last 5 "
        "pages, hgca: the last 4). A list serves the 3 query heads of a KV head; tokenselect has "
        "one for all 9, hgca one for each, and so has what is named so.", "",
        *needle_table(rows),
    ]  # fmt: skip
    good = as_good_as_dense(rows, BUDGETS[-1])
    parts += [f"As many as dense at budget {BUDGETS[-1]}: {'; '.join(good) or 'none'}.", ""]
    parts += length_table(rows, BUDGETS[-1])
    parts += [
        "## Perplexity", "",
        f"{SEQUENCES * STEPS} tokens, each behind {result['context']} tokens or more of the same "
        f"text, in {SEQUENCES} pieces of {STEPS}: within a piece every token is read with the "
        "selection, what stands before a piece was read whole. In brackets the change against "
        "dense.", "", *perplexity_table(result["perplexities"]),
        "## Captured mass, recall", "", *mass_table(result["perplexities"]),
    ]  # fmt: skip
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--needles", type=int, default=2, help="at each depth of each length")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--missing", action="store_true", help="keep the lines that are stored")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    stored = options.output / "selection_needle.json"
    before = json.loads(stored.read_text()) if options.missing else {}
    if before and (before["lengths"], before["count"]) != (lengths, options.needles):
        parser.error(f"{stored} has other lengths or needles: {before['lengths']}")
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    model, tokenizer = load_model("smollm2", "bfloat16")
    runner = Runner(model, options.backend)
    with (
        lath.patch(model, None, attention="int8", kv="int8", backend=options.backend),
        torch.inference_mode(),
    ):
        kept = [before.get(name, []) for name in ("needles", "perplexities")]
        found = kept[0] + needles(runner, tokenizer, lengths, options.needles, kept[0])
        measured, context = perplexities(runner, tokenizer, kept[1])
    command = "python bench/selection_needle.py"
    for name in ("lengths", "needles", "threads"):
        if getattr(options, name) != parser.get_default(name):
            command += f" --{name} {getattr(options, name)}"
    run = {
        "machine": machine_facts(), "backend": options.backend, "threads": options.threads,
        "command": command + " --missing" * options.missing,
        "seconds": time.perf_counter() - start, "processor_seconds": time.process_time(),
    }  # fmt: skip
    result = {
        "runs": [*before.get("runs", []), run], "lengths": lengths, "count": options.needles,
        "context": context, "needles": found, "perplexities": kept[1] + measured,
    }  # fmt: skip
    stored.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    stored.with_suffix(".md").write_text(report(result))


if __name__ == "__main__":
    main()
