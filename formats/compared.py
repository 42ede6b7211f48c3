"""The codecs that `lath compare` measures: for each form of the grammar, the ones to look at.

A form that is added to `lath.formats.families.GRAMMAR_TABLE` needs an entry here: a test says so.
"""

from __future__ import annotations

COMPARED: dict[str, tuple[str, ...]] = {
    "A+outP%": ("int4-g64+out1%", "int4-g128+out1%", "nf4-g64+out1%", "int3-g64-asym+out1%"),
    "A+B": ("int2-g64+int2-g64",),
    "mixM[-pP]-gG[-asym|-fzero][-s32|-s8]": ("mix3.5-g64", "mix3-g64-asym"),
    "mixA:B-M-gG[...]": ("mix2:4-3-g64",),
    "billmP%-gG": ("billm10%-g64",),
    "sparse{0..100}-int{4|8}[-gG][-s32]": ("sparse50-int8-g64", "sparse50-int4-g64"),
    "sparse{0..100}-fp16|bf16": ("sparse50-bf16",),
    "vq{2|4|8|16}-E[+R][-gG]": ("vq2-256-g64", "vq4-256-g64", "vq2-16-g64"),
    "lattice{2..8}-d{2|4|8|16|32}[-gG]": ("lattice4-d8-g64", "lattice3-d8-g64"),
    "int{1..8}[-gG][-asym|-fzero][-s32|-s8]": (
        "int8", "int8-g64", "int6-g64", "int5-g64", "int4-g32", "int4-g64", "int4-g128", "int4",
        "int4-g64-asym", "int4-g32-fzero", "int4-g64-fzero", "int4-g64-s8", "int3-g32",
        "int3-g64", "int3-g64-asym", "int3-g64-fzero", "int2-g16", "int2-g32-fzero", "int1-g16",
    ),
    "int{2..4}[-gG]-fp8": ("int4-g64-fp8",),
    "int{8|4|2}[-gG]-nested[-s32]": ("int8-g64-nested", "int4-g64-nested"),
    "ternary[-1.6][-gG][-s32]": ("ternary-g64", "ternary-1.6-g80"),
    "nf4|fp4[-gG][-s32|-dq]": ("nf4-g64", "nf4-g64-dq", "fp4-g64"),
    "lut{1..8}[-gG][-s32|-dq]": ("lut4-g64", "lut4", "lut3-g64"),
    "e4m3|e5m2[-gG]": ("e4m3", "e5m2"),
    "mxfp4, mxfp6[-e3m2], mxfp8[-e5m2]": ("mxfp4", "mxfp6", "mxfp8"),
    "nvfp4": ("nvfp4",),
}  # fmt: skip


def compared_codecs() -> tuple[str, ...]:
    """All of them, in the order of the grammar."""
    return tuple(text for texts in COMPARED.values() for text in texts)
