"""The published techniques that work here, as data: `lath systems`, `docs/systems.md` and a test.

A technique is listed when its definition in NumPy, its kernels and its tests exist; each test is
named here and must exist. What a paper leaves to a model or a scheduler stays the caller's, and the
note says so.
"""

from __future__ import annotations

from lath.formats.systems_attention import ATTENTION_SYSTEMS
from lath.formats.systems_linear import LINEAR_SYSTEMS

SYSTEMS = (*LINEAR_SYSTEMS, *ATTENTION_SYSTEMS)


def systems_table() -> str:
    """`SYSTEMS` as a table in Markdown."""
    lines = ["| technique | family | here | note |", "|---|---|---|---|"]
    lines += [f"| {s.name} | {s.family} | {s.how} | {s.note} |" for s in SYSTEMS]
    return "\n".join(lines) + "\n"
