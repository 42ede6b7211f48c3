"""Which instruction set the compiled CPU kernels are lowered for.

avx512_vnni   vpdpbusd: sixteen dot products of four 8-bit pairs in one instruction
avx2          vpmaddubsw and vpmaddwd, on 256-bit halves
portable      plain vector IR: whatever the machine has, an Arm CPU included
"""

from __future__ import annotations

import functools
import os
import platform
from typing import Literal, cast, get_args

Isa = Literal["avx512_vnni", "avx2", "portable"]


class MissingInstructionsError(RuntimeError):
    """An instruction set was named that this CPU has not got."""


_NEEDS: dict[Isa, frozenset[str]] = {
    "avx512_vnni": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "portable": frozenset(),
}


@functools.cache
def cpu_features() -> frozenset[str]:
    """The features that numba compiles for, in LLVM's names: the host's, or NUMBA_CPU_FEATURES
    (empty with NUMBA_CPU_NAME=generic)."""
    from numba.core import codegen, config

    listed = config.CPU_FEATURES
    if listed is None:
        listed = codegen.get_host_cpu_features()
    return frozenset(name[1:] for name in listed.split(",") if name.startswith("+"))


@functools.cache
def host_isa() -> Isa:
    """The instruction set in use: the widest this machine has, or the one LATH_ISA names.

    ValueError for an unknown LATH_ISA, MissingInstructionsError for one that cannot run here.
    """
    features = cpu_features()
    asked = os.environ.get("LATH_ISA", "")
    if not asked:
        return next(isa for isa, needs in _NEEDS.items() if needs <= features)
    if asked not in get_args(Isa):
        raise ValueError(f"LATH_ISA must be one of {get_args(Isa)}, got {asked!r}")
    missing = sorted(_NEEDS[cast(Isa, asked)] - features)
    if missing:
        raise MissingInstructionsError(f"LATH_ISA={asked!r} needs {missing}, which this CPU lacks")
    return cast(Isa, asked)


def has_native_half() -> bool:
    """Whether instructions convert fp16: on x86-64 F16C, on a 64-bit Arm always."""
    return platform.machine().lower() in ("aarch64", "arm64") or "f16c" in cpu_features()


def has_wide_look_up(isa: Isa) -> bool:
    """Whether the instruction set in use looks bytes up in 128 others (AVX512_VBMI)."""
    return isa == "avx512_vnni" and "avx512vbmi" in cpu_features()


def has_quick_permutation(isa: Isa) -> bool:
    """Whether looking up 32 numbers of 16 bits and adding them takes less than 1.5 times as long as
    64 products of bytes do: on a Zen 4 core 1.25 cycles and 1. Others multiply 128 in a cycle."""
    return isa == "avx512_vnni" and _cpu_name() == "znver4"


def _cpu_name() -> str:
    """The CPU that numba compiles for, in LLVM's words: the host, or NUMBA_CPU_NAME."""
    import llvmlite.binding
    from numba.core import config

    return config.CPU_NAME or str(llvmlite.binding.get_host_cpu_name())


def has_native_brain(isa: Isa) -> bool:
    """Whether the instruction set in use multiplies bf16 (AVX512_BF16)."""
    return isa == "avx512_vnni" and "avx512bf16" in cpu_features()


def has_native_expand(isa: Isa) -> bool:
    """Whether one instruction of the set in use puts bytes where a mask has bits (AVX512_VBMI2)."""
    return isa == "avx512_vnni" and "avx512vbmi2" in cpu_features()
