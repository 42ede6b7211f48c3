"""What is said of a published technique that works here (`lath.formats.registry`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal[
    "low-bit linear", "sparse weights", "rounding of weights", "8-bit attention",
    "key-value cache", "decoding", "sparse selection", "eviction", "ragged batches", "trees",
]  # fmt: skip


@dataclass(frozen=True)
class System:
    """name: as published. how: the combination of parts that it is here. tests: "file::test"."""

    name: str
    family: Family
    how: str
    tests: tuple[str, ...]
    note: str = ""
