"""How fast a model reads a prompt and writes tokens, through its own `generate()`; how much memory
it takes.

Variants are measured in turn within one run, order reversed every other round, and the medians are
compared: what else the machine is doing then hits all of them alike.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lath.formats.memory import give_back
from lath.integration.progress import Advance


@dataclass(frozen=True)
class Speed:
    """Medians, in tokens per second."""

    prefill: float
    decode: float


def generate(model: Any, ids: Tensor, new_tokens: int, **options: Any) -> Tensor:
    """Greedy `model.generate` for a prompt `ids` [1, L]; returns the new tokens alone, 1-D."""
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            **options,
        )
    new: Tensor = output[0, ids.shape[1] :]
    return new


def time_generate(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    now: Callable[[], float] = time.perf_counter,
    **options: Any,
) -> tuple[float, float]:
    """Seconds of the prompt, and of all that follows it up to `new_tokens`, one of which the prompt
    has given. now: the clock. options: of `generate`, such as a cache.

    No streamer tells when the prompt is done: it would have every token come to it one by one.
    """
    prefill, ends = model._prefill, [now()]

    def noted(*args: Any, **kwargs: Any) -> Any:
        outputs = prefill(*args, **kwargs)
        ends.append(now())
        return outputs

    model._prefill = noted
    try:
        generate(model, ids, new_tokens, min_new_tokens=new_tokens, **options)
    finally:
        del model._prefill
    start, done = ends
    return done - start, now() - done


def token_seconds(
    model: Any, ids: Tensor, new_tokens: int, now: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of a token, the mean of all that come behind the first two (of the prompt and of a
    step that prepares the others)."""
    _, few = time_generate(model, ids, 2, now)
    _, many = time_generate(model, ids, new_tokens, now)
    return (many - few) / (new_tokens - 2)


def measure_speeds(
    model: Any,
    ids: Tensor,
    variants: Mapping[str, Callable[[], None]],
    new_tokens: int = 32,
    rounds: int = 3,
    advance: Advance | None = None,
) -> dict[str, Speed]:
    """The speed of each variant on the prompt `ids` [1, L].

    variants: by name, the call that brings the model into that state. new_tokens: 2 or more, per
    round. advance: called with 1 after each of the len(variants) * (rounds + 1) measurements; the
    first of each variant only warms up.
    """
    if new_tokens < 2 or rounds < 1:
        raise ValueError(
            f"new_tokens must be 2 or more and rounds 1 or more, got {new_tokens} and {rounds}"
        )
    prefill: dict[str, list[float]] = {name: [] for name in variants}
    decode: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds + 1):
        for name in names if turn % 2 else names[::-1]:
            variants[name]()
            first, rest = time_generate(model, ids, new_tokens if turn else 2)
            if turn:
                prefill[name].append(first)
                decode[name].append(rest / (new_tokens - 1))
            if advance is not None:
                advance(1)
    return {
        name: Speed(ids.shape[1] / median(prefill[name]), 1 / median(decode[name]))
        for name in names
    }


def resident_bytes() -> int:
    """What the process has in memory now, what it maps of files included (Linux)."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that it had since it began, or since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Start the peak anew, at what is resident once freed memory has gone back to the system."""
    gc.collect()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
