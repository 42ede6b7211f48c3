"""Read AMD machine code: the assembly text that LLVM prints for a kernel."""

from __future__ import annotations

import re

from tools.control_flow import Flow
from tools.instructions import Instruction

_PREFIXES = (
    ("tensor", ("v_mfma", "v_smfmac", "v_wmma", "v_swmmac")),
    ("global_load", ("global_load", "buffer_load", "flat_load")),
    ("global_store", ("global_store", "buffer_store", "flat_store")),
    ("global_store", ("global_atomic", "buffer_atomic", "flat_atomic")),
    ("shared_load", ("ds_read", "ds_load")),
    ("cross_lane", ("ds_bpermute", "ds_permute", "ds_swizzle", "v_readlane", "v_writelane")),
    ("shared_store", ("ds_",)),
    ("local", ("scratch_",)),
    ("synchronise", ("s_barrier", "s_waitcnt", "s_wait", "s_sched", "s_nop", "s_sleep")),
    ("control", ("s_cbranch", "s_branch", "s_endpgm", "s_setpc")),
    ("uniform", ("s_",)),
    ("convert", ("v_cvt",)),
    ("special", ("v_exp", "v_log", "v_rcp", "v_rsq", "v_sqrt", "v_sin", "v_cos")),
    ("move", ("v_mov", "v_accvgpr", "v_readfirstlane")),
)
_ARITHMETIC = re.compile(
    r"v_(?:pk_)?(?:fma|fmac|mul|add|sub|max|min|mac|mad|dot)\w*_(f16|bf16|f32)"
)
_MEMORY = frozenset({"global_load", "global_store", "shared_load", "shared_store", "local"})
_WIDTHS = (
    (re.compile(r"dwordx4|b128|x4\b"), 16),
    (re.compile(r"dwordx3|b96"), 12),
    (re.compile(r"dwordx2|b64"), 8),
    (re.compile(r"ubyte|sbyte|_[ui]8|_byte|b8"), 1),
    (re.compile(r"short|_[ui]16|b16"), 2),
)
_INSTRUCTION = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*(.*?)\s*(?:;.*)?$")
_LABEL = re.compile(r"^(\.?LBB[\w_]*):")


def metadata(text: str, field: str) -> int:
    """A number from the kernel's metadata, such as "vgpr_count"; 0 if it is not there."""
    found = re.search(rf"\.{field}:\s*(\d+)", text)
    return int(found[1]) if found else 0


def parse(text: str) -> tuple[list[Instruction], Flow]:
    """Assembly -> instructions, and where each may go next."""
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := _INSTRUCTION.match(line):
            found.append((match[1], match[2]))
    flow: list[tuple[int, ...] | None] = []
    for index, (name, operands) in enumerate(found):
        target = (labels[operands],) if operands in labels else ()
        if name.startswith("s_cbranch"):
            flow.append((index + 1, *target))
        elif name.startswith(("s_branch", "s_endpgm")):
            flow.append(target)
        else:
            flow.append(None)
    return [_instruction(name) for name, _ in found], flow


def _instruction(name: str) -> Instruction:
    kind = _kind(name)
    width = 0
    if kind in _MEMORY:
        width = next((size for pattern, size in _WIDTHS if pattern.search(name)), 4)
    shape = re.match(r"v_(?:s?mfma\w*?|s?wmma\w*?)_(\d+)x(\d+)x(\d+)", name)
    multiply_adds = int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else 0
    return Instruction(name, kind, width, multiply_adds)


def _kind(name: str) -> str:
    for kind, prefixes in _PREFIXES:
        if name.startswith(prefixes):
            return kind
    if arithmetic := _ARITHMETIC.match(name):
        return "float" if arithmetic[1] == "f32" else "half"
    if re.match(r"v_(?:mul|mad|dot)", name):
        return "multiply_add"
    return "integer" if name.startswith("v_") else "other"
