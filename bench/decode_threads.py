"""One thread and several within the same `generate`, taking turns every few tokens, on a machine
that is quiet and on one where another process keeps a core busy.

Both kinds of tokens meet the same machine that way: what others do for seconds hits them alike.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TURN = 8  # tokens; the first of a turn is not counted: caches and helpers change over


@dataclass(frozen=True)
class Turns:
    """Milliseconds of a token, medians and means over all rounds, by one thread and by several;
    ratio: one / several, the median over rounds of the round's own medians, with the least and the
    largest; of_means: the same of the rounds' means, where a stall shows."""

    what: str
    one: float
    several: float
    one_mean: float
    several_mean: float
    ratio: float
    least: float
    largest: float
    of_means: float


class _Turns:
    """A streamer that changes torch's number of threads every TURN tokens."""

    def __init__(self, threads: int, first: int) -> None:
        self._counts = (1, threads)
        self._tokens, self._turn, self._last = 0, first, 0.0
        self.seconds: dict[int, list[float]] = {1: [], threads: []}
        torch.set_num_threads(self._counts[first])

    def put(self, value: Tensor) -> None:
        now = time.perf_counter()
        # The prompt, the first token, and what the first step prepares are not decoding.
        if self._tokens > TURN and self._tokens % TURN > 1:
            self.seconds[self._counts[self._turn]].append(now - self._last)
        self._tokens += 1
        if self._tokens % TURN == 0:
            self._turn = 1 - self._turn
            torch.set_num_threads(self._counts[self._turn])
        self._last = time.perf_counter()

    def end(self) -> None:
        pass


@contextlib.contextmanager
def busy_core() -> Iterator[int]:
    """A process that counts, on the last core that this one may use; its number."""
    core = max(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            os.sched_setaffinity(process.pid, {core})
            yield core
        finally:
            process.kill()


def take_turns(
    run: Callable[[Any], None], threads: int, rounds: int, places: dict[str, bool]
) -> list[Turns]:
    """run: a `generate` with a streamer. places: by name, whether a core is kept busy there. One
    after the other: a step remembers for a while that its helpers did not come."""
    seen: dict[str, list[dict[int, list[float]]]] = {name: [] for name in places}
    for name, busy in places.items():
        for number in range(rounds + 1):
            turns = _Turns(threads, number % 2)
            with busy_core() if busy else contextlib.nullcontext():
                run(turns)
            if number:  # the first round compiles and warms up
                seen[name].append(turns.seconds)
    torch.set_num_threads(threads)
    return [_summary(name, own, threads) for name, own in seen.items()]


def _summary(what: str, rounds: list[dict[int, list[float]]], threads: int) -> Turns:
    one, several = ([s for own in rounds for s in own[n]] for n in (1, threads))
    ratios, means = (
        [middle(own[1]) / middle(own[threads]) for own in rounds]
        for middle in (statistics.median, statistics.fmean)
    )
    return Turns(
        what, 1e3 * statistics.median(one), 1e3 * statistics.median(several),
        1e3 * statistics.fmean(one), 1e3 * statistics.fmean(several),
        statistics.median(ratios), min(ratios), max(ratios), statistics.median(means),
    )  # fmt: skip


def table_of_turns(turns: list[Turns], threads: int) -> str:
    lines = [
        f"| | 1 thread: ms, median (mean) | {threads} threads | one / {threads}: median of rounds "
        "(least, largest) | of means |",
        "|---|---|---|---|---|",
        *(
            f"| {t.what} | {t.one:.2f} ({t.one_mean:.2f}) | {t.several:.2f} ({t.several_mean:.2f}) "
            f"| {t.ratio:.2f} ({t.least:.2f}, {t.largest:.2f}) | {t.of_means:.2f} |"
            for t in turns
        ),
        "",
    ]
    return "\n".join(lines)
