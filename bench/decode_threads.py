"""One thread and several over the same cache, taking turns every few tokens, on a machine that is
quiet and on one where another process keeps a core busy.

Both kinds of tokens meet the same machine that way: what others do for seconds hits them alike.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

TURN, TURNS = 16, 10  # tokens of a turn behind its first, turns of a round


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
    begin: Callable[[], Callable[[], float]], threads: int, rounds: int, places: dict[str, bool]
) -> list[Turns]:
    """begin: what a round starts with; it returns a turn, which returns the seconds of a token.
    places: by name, whether a core is kept busy there. One after the other: a step remembers for a
    while that its helpers did not come."""
    seen: dict[str, list[dict[int, list[float]]]] = {name: [] for name in places}
    for name, busy in places.items():
        for number in range(rounds + 1):
            with busy_core() if busy else contextlib.nullcontext():
                seconds = _round(begin(), threads, number % 2)
            if number:  # the first round compiles and warms up
                seen[name].append(seconds)
    torch.set_num_threads(threads)
    return [_summary(name, own, threads) for name, own in seen.items()]


def _round(turn: Callable[[], float], threads: int, first: int) -> dict[int, list[float]]:
    """Seconds of a token by the number of threads; the first turn of each is not counted."""
    counts = (1, threads)
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(TURNS + 2):
        count = counts[(first + number) % 2]
        torch.set_num_threads(count)
        own = turn()
        if number > 1:
            seconds[count].append(own)
    return seconds


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
