"""How much a selection may read: tokens, a share of the context, or as much as a mass needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lath.formats.pages import PAGE


@dataclass(frozen=True)
class TopMass:
    """As few entries as hold the share `mass` of the softmax for certain, of every row: by bounds
    of what each entry can hold (top-p). Text form "p0.95"."""

    mass: float

    def __post_init__(self) -> None:
        number = isinstance(self.mass, (int, float)) and not isinstance(self.mass, bool)
        if not number or not 0 < self.mass < 1:
            raise ValueError(f"mass must lie between 0 and 1, got {self.mass!r}")

    def __str__(self) -> str:
        return f"p{self.mass:g}"


Budget = int | float | TopMass


def parse_budget(value: Any) -> Budget:
    """A budget: tokens (int >= 1), a share of the context (0 < float <= 1) or a `TopMass`; or the
    text of one, "1024", "12.5%", "p0.95". TypeError or ValueError otherwise."""
    if isinstance(value, TopMass):
        return value
    if isinstance(value, str):
        return _parse_text(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            "budget must be tokens (int), a share of the context (float), a TopMass or its text, "
            f"got {type(value).__name__}: {value!r}"
        )
    if isinstance(value, int):
        if value < 1:
            raise ValueError(f"budget must be 1 token or more, got {value}")
        return value
    if not 0 < value <= 1:
        raise ValueError(
            f"budget as a share of the context must be greater than 0, at most 1, got {value}"
        )
    return value


def _parse_text(text: str) -> Budget:
    try:
        if text.startswith("p"):
            return TopMass(float(text[1:]))
        if text.endswith("%"):
            return parse_budget(float(text[:-1]) / 100)
        return parse_budget(int(text))
    except ValueError as error:
        raise ValueError(
            f"budget must be like '1024', '12.5%' or 'p0.95', got {text!r}: {error}"
        ) from None


def budget_tokens(budget: int | float, length: int) -> int:
    """Tokens of a fixed budget or of a share of `length` tokens."""
    return budget if isinstance(budget, int) else max(math.ceil(budget * length), 1)


def budget_units(tokens: int, unit: int = PAGE) -> int:
    """Whole pages, or units of `unit` tokens, within a budget of tokens, at least one."""
    return max(tokens // unit, 1)
