"""What stands in for what a selection left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

RepairKind = Literal["spreads", "centroids", "mean"]


@dataclass(frozen=True)
class Repair:
    """How what was not read is estimated, and how much of that estimate is used.

    kind: "spreads", the scores of a page are normal with its mean and spread; "centroids", they are
    all that of its mean key, which never adds more weight than a page has (`reference.select`):
    both with the page's mean value; "mean", the mean of all values by the mass that the list claims
    to hold (SparQ). share: the estimated weight is multiplied with it.
    """

    kind: RepairKind
    share: float = 1.0


def parse_repair(value: Any) -> Repair | None:
    """None for False; a `Repair` for True ("spreads") or a text: a kind, and a share of its weight,
    "centroids", "centroids:25%". ValueError otherwise."""
    if isinstance(value, bool):
        return Repair("spreads") if value else None
    if isinstance(value, str):
        kind, colon, text = value.partition(":")
        share = _share(text) if colon else 1.0
        if kind in get_args(RepairKind) and share is not None and not (colon and kind == "mean"):
            return Repair(kind, share)  # type: ignore[arg-type]
    raise ValueError(
        "repair must be True, False, 'spreads', 'centroids', these with a share of their weight "
        f"like 'centroids:25%', or 'mean', got {value!r}"
    )


def _share(text: str) -> float | None:
    """Greater than 0, at most 1, of "25%"; None for anything else."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        return None
    return share if text.endswith("%") and 0 < share <= 1 else None
