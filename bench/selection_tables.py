"""What the pages about selection on synthetic caches share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SHOWN = 1 / 8  # the budget of the summaries
SHARPNESS = [1.0, 2.0]

Row = dict[str, Any]


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    written = ["| " + " | ".join(line) + " |" for line in [head, *lines]]
    return "\n".join([written[0], "|---" * len(head) + "|", *written[1:]])


def share(budget: float) -> str:
    return "1" if budget == 1 else f"1/{round(1 / budget)}"


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in found.items()
    }
