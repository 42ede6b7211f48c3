"""llama.cpp's own benchmark program as a peer of a model's speed: one prompt, then tokens.

The rounds of both are interleaved and timed by the wall, as llama-bench times: the mean over all
tokens, whatever else the machine did between them.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lath.integration.gguf import read_gguf
from lath.integration.smollm2 import SOURCE

_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], capture_output=True, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@dataclass(frozen=True)
class Times:
    """Seconds by the wall: of the whole prompt, and of a token behind it, the mean."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Paired:
    """What the rounds came to: medians of tokens per second, and of each round's own ratio of
    llama-bench's time to ours with the least and the largest."""

    what: str
    ours: float
    theirs: float
    ratio: float
    least: float
    largest: float


class LlamaBench:
    """program: llama-bench. SystemExit with its last words where it fails."""

    def __init__(self, program: Path, gguf: Path, threads: int, prompt: int, tokens: int) -> None:
        self._start = [str(program), "-m", str(gguf), "-t", str(threads), "-r", "1", "-o", "json"]
        self._gguf, self.prompt, self.tokens = gguf, prompt, tokens
        self.facts = ""

    def run(self, *options: int | str) -> dict[str, Any]:
        """The row that it prints for one test."""
        command = [*self._start, *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{command[0]} failed: {done.stderr[-400:]}")
        row: dict[str, Any] = json.loads(done.stdout)[0]
        self.facts = (
            f"llama.cpp {row['build_commit']} ({row['backends']}), {row['model_type']}, "
            f"cache {row['type_k']}"
        )
        return row

    def peak_bytes(self) -> int:
        """The most it has in memory in one run. Not asked of this process: what a child took over
        from its parent before it became another program counts as the child's."""
        own = ["-p", str(self.prompt), "-n", str(self.tokens)]
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, *self._start, *own], capture_output=True, text=True
        )
        return 1024 * int(done.stdout)

    def prefill(self) -> float:
        """Seconds of the prompt."""
        return self.prompt / float(self.run("-p", self.prompt, "-n", 0)["avg_ts"])

    def decode(self) -> float:
        """Seconds of a token behind a prompt of that length."""
        row = self.run("-p", 0, "-n", self.tokens, "-d", self.prompt)
        return 1 / float(row["avg_ts"])

    def weights(self) -> str:
        """The types of the file's tensors, and whether SmolLM2 as lath loads it was made of it."""
        data = self._gguf.read_bytes()
        counts = Counter(tensor.type_name for tensor in read_gguf(data).tensors.values())
        same = hashlib.sha256(data).hexdigest() == SOURCE.sha256
        kinds = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        return f"{kinds}; {'the very' if same else 'not the'} file that lath's smollm2 is made of"


def pair(llama: LlamaBench, ours: Callable[[], Times], rounds: int) -> list[Paired]:
    """Rounds in which both come close upon each other; who is first changes."""
    ours()  # compiles and warms up
    found: list[tuple[Times, Times]] = []
    for turn in range(rounds):
        if turn % 2:
            own = ours()
            found.append((own, Times(llama.prefill(), llama.decode())))
        else:
            prefill, own = llama.prefill(), ours()
            found.append((own, Times(prefill, llama.decode())))
    prefills = [(own.prefill, other.prefill) for own, other in found]
    decodes = [(own.decode, other.decode) for own, other in found]
    return [
        _paired(f"prefill({llama.prompt})", llama.prompt, prefills),
        _paired(f"decode({llama.tokens}) behind {llama.prompt}", 1, decodes),
    ]


def _paired(what: str, tokens: int, seconds: Sequence[tuple[float, float]]) -> Paired:
    ratios = sorted(theirs / ours for ours, theirs in seconds)
    ours, theirs = (tokens / statistics.median(own) for own in zip(*seconds, strict=True))
    return Paired(what, ours, theirs, statistics.median(ratios), ratios[0], ratios[-1])
