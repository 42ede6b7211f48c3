"""The codecs that `lath compare` measures: for each form of the grammar, the ones to look at.

A form that is added to `lath.formats.codec.GRAMMAR_TABLE` needs an entry here: a test says so.
"""

from __future__ import annotations

COMPARED: dict[str, tuple[str, ...]] = {
    "int{1..8}[-gG][-asym|-fzero][-s32|-s8]": (
        "int8", "int8-g64", "int6-g64", "int5-g64", "int4-g32", "int4-g64", "int4-g128", "int4",
        "int4-g64-asym", "int4-g32-fzero", "int4-g64-fzero", "int4-g64-s8", "int3-g32",
        "int3-g64", "int3-g64-asym", "int3-g64-fzero", "int2-g16", "int2-g32-fzero", "int1-g16",
    ),
    "ternary[-gG][-s32]": ("ternary-g64",),
    "nf4|fp4[-gG][-s32|-dq]": ("nf4-g64", "nf4-g64-dq", "fp4-g64"),
    "lut{1..8}[-gG][-s32|-dq]": ("lut4-g64", "lut4", "lut3-g64"),
    "e4m3|e5m2[-gG]": ("e4m3", "e5m2"),
    "mxfp4, mxfp6[-e3m2], mxfp8[-e5m2]": ("mxfp4", "mxfp6", "mxfp8"),
    "nvfp4": ("nvfp4",),
}  # fmt: skip


def compared_codecs() -> tuple[str, ...]:
    """All of them, in the order of the grammar."""
    return tuple(text for texts in COMPARED.values() for text in texts)
