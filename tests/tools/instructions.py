"""What the readers of SASS and of AMD assembly have in common."""

from __future__ import annotations

import dataclasses

# Classes of instructions, in the order in which reports show them.
CLASSES = (
    "tensor",  # tensor core / matrix core
    "integer",  # logic, shifts, adds, selects, comparisons
    "multiply_add",  # integer multiply-add
    "half",  # fp16 / bf16 arithmetic
    "float",  # fp32 / fp64 arithmetic
    "convert",
    "special",  # exponential, reciprocal, ...
    "global_load",
    "global_store",
    "shared_load",
    "shared_store",
    "tensor_memory",
    "local",  # spills and local arrays
    "cross_lane",
    "synchronise",
    "uniform",  # scalar unit
    "move",
    "control",
    "other",
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One machine instruction of one warp.

    name: mnemonic with modifiers. kind: one of CLASSES. width: bytes per lane of a memory access,
    else 0. multiply_adds: of a tensor instruction whose name tells its shape, per warp, else 0.
    stall: cycles that the compiler asks the warp to wait after it (0 where not known).
    """

    name: str
    kind: str
    width: int = 0
    multiply_adds: int = 0
    stall: int = 0
