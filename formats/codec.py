"""The codec: how a tile of numbers is stored, as a frozen value with a text form.

A weight `[N, K]` is cut along K into groups; every (group, row) has a scale and, if the codec says
so, a zero point or a minimum. With `g = k // group_size`:

    zero = "none"      weight[n, k] = scale[g, n] * (code[n, k] - zero_code)
    zero = "integer"   weight[n, k] = scale[g, n] * (code[n, k] - zeros[g, n])
    zero = "float"     weight[n, k] = scale[g, n] * code[n, k] + zeros[g, n]
    a table            weight[n, k] = scale[g, n] * table[code[n, k]]

A scale is stored in fp16 or fp32, or in 8 bits below a second scale:

    "e8m0"    2**(byte - 127)
    "e4m3"    E4M3 byte * an fp32 scale of the tensor
    "int8"    byte * an fp16 scale of the row
    "fp8"     E4M3 byte below an fp32 scale of the row, with each product rounded to E4M3:
              weight[n, k] = outer[n] * E4M3(byte * (code[n, k] - zero_code))

Text forms: the table of `GRAMMAR`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from lath.formats import values as value_tables
from lath.formats.values import Values

Zero = Literal["none", "integer", "float"]
ScaleDtype = Literal["fp16", "fp32", "int8", "fp8", "e8m0", "e4m3"]
Packing = Literal["planes", "base3"]

# Sixteen codes of a row are the finest run that every packed word keeps together (DESIGN.md, 2).
GROUP_MULTIPLE = 16

# Form, and what it means: the table in the README is made of it.
GRAMMAR_TABLE = {
    "int{1..8}[-gG][-asym|-fzero][-s32|-s8]": "whole numbers; -s8 (4 bits or fewer): int8 group "
    "scales under an fp16 scale of the row, scale * code fits int8 (DGQ)",
    "int{2..4}[-gG]-fp8": "E4M3 group scales under an fp32 scale of the row; scale * code is "
    "rounded to E4M3 (FireQ)",
    "int{8|4|2}[-gG]-nested[-s32]": "half a step beside whole numbers; `nested(4)` and `nested(2)` "
    "are views of the same codes (MatQuant)",
    "ternary[-1.6][-gG][-s32]": "-1, 0, 1 times the mean of |w|, of the tensor or the group "
    "(BitNet); -1.6: five codes a byte instead of four",
    "nf4|fp4[-gG][-s32|-dq]": "normal quantiles; E2M1. -dq: 8-bit group scales under an fp16 one",
    "lut{1..8}[-gG][-s32|-dq]": "a table of the tensor's own, by k-means",
    "e4m3|e5m2[-gG]": "8-bit floats with fp32 scales",
    "mxfp4, mxfp6[-e3m2], mxfp8[-e5m2]": "OCP microscaling: groups of 32 with a power of two",
    "nvfp4": "E2M1 in groups of 16 with E4M3 scales under an fp32 scale of the tensor",
}
GRAMMAR = "one of " + "; ".join(GRAMMAR_TABLE) + " (G a multiple of 16), for example 'int4-g128'"
_INTEGER = re.compile(
    r"int(?P<bits>[1-8])(-g(?P<group>[1-9]\d*))?(-(?P<zero>asym|fzero|nested))?(-(?P<scale>s32|s8|fp8))?"
)
_TABLE = re.compile(
    r"(?P<values>ternary|nf4|fp4|lut(?P<bits>[1-8])|e4m3|e5m2)"
    r"(?P<base3>(?<=ternary)-1\.6)?(-g(?P<group>[1-9]\d*))?"
    r"(-(?P<scale>s32|dq))?"
)
_ZERO_OF_TEXT: dict[str | None, Zero] = {None: "none", "asym": "integer", "fzero": "float"}
_TEXT_OF_ZERO: dict[Zero, str] = {"none": "", "integer": "-asym", "float": "-fzero"}
_SCALE_OF_TEXT: dict[str | None, ScaleDtype] = {
    None: "fp16", "s32": "fp32", "s8": "int8", "dq": "int8", "fp8": "fp8",
}  # fmt: skip
# The formats with fixed groups and scales: values, bits, group, scale.
_FIXED: dict[str, tuple[Values, int, int, ScaleDtype]] = {
    "mxfp4": ("fp4", 4, 32, "e8m0"), "mxfp6": ("e2m3", 6, 32, "e8m0"),
    "mxfp6-e3m2": ("e3m2", 6, 32, "e8m0"), "mxfp8": ("e4m3", 8, 32, "e8m0"),
    "mxfp8-e5m2": ("e5m2", 8, 32, "e8m0"), "nvfp4": ("fp4", 4, 16, "e4m3"),
}  # fmt: skip
# 8-bit floats reach far above 1: fp16 scales of them would be subnormal.
_WIDE_VALUES = ("e4m3", "e5m2")

# Codes are split into planes whose widths divide a word, low bits first: no code straddles words.
_PLANE_WIDTHS: dict[int, tuple[int, ...]] = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
}  # fmt: skip
# The planes of 4 and 2 upper bits are weights of their own.
_NESTED_WIDTHS: dict[int, tuple[int, ...]] = {2: (2,), 4: (2, 2), 8: (4, 2, 2)}


class PlanesCodec(Protocol):
    """What the loops over planes of codes, and their plan, ask of a codec. `plane_widths`: bits per
    weight; the rest as in `Codec`."""

    @property
    def bits(self) -> int: ...
    @property
    def group(self) -> int | None: ...
    @property
    def zero(self) -> Zero: ...
    @property
    def zero_code(self) -> float: ...
    @property
    def scale_dtype(self) -> ScaleDtype: ...
    @property
    def values(self) -> Values: ...
    @property
    def is_table(self) -> bool: ...
    @property
    def plane_widths(self) -> tuple[int, ...]: ...
    def group_size(self, in_features: int) -> int: ...
    def num_groups(self, in_features: int) -> int: ...


@dataclass(frozen=True)
class Codec:
    """Codes of `bits` bits with one scale per (group along K, row).

    bits: 1 to 8. group: a multiple of 16, or None for one group per row. zero: "none" (symmetric),
    "integer" (a uint8 zero point) or "float" (a minimum in the scale's dtype); tables have none.
    scale_dtype: "fp16", "fp32", or 8 bits ("int8", "e8m0", "e4m3"), see above. values: what codes
    stand for (`lath.formats.values`). packing: "planes" of their bits, or "base3", five ternary
    codes a byte (`lath.formats.packing`). Raises ValueError naming the field, its value and what is
    accepted.
    """

    bits: int
    group: int | None = None
    zero: Zero = "none"
    scale_dtype: ScaleDtype = "fp16"
    values: Values = "integer"
    packing: Packing = "planes"

    def __post_init__(self) -> None:
        if self.bits not in _PLANE_WIDTHS:
            raise ValueError(f"codec bits must be an integer from 1 to 8, got {self.bits!r}")
        group = self.group
        if group is not None and (
            type(group) is not int or group <= 0 or group % GROUP_MULTIPLE != 0
        ):
            raise ValueError(
                f"codec group must be a positive multiple of {GROUP_MULTIPLE} or None "
                f"(one group per row), got {group!r}"
            )
        if self.zero not in _TEXT_OF_ZERO:
            raise ValueError(f"codec zero must be 'none', 'integer' or 'float', got {self.zero!r}")
        packings = ("planes", "base3") if self.values == "ternary" else ("planes",)
        if self.packing not in packings:
            raise ValueError(
                f"codec packing of values {self.values!r} must be one of {packings}, "
                f"got {self.packing!r}"
            )
        # Kept, not formatted on demand: torch.compile traces attributes but not the formatting.
        object.__setattr__(self, "_text", _text_of(self))

    @staticmethod
    def parse(text: str) -> Codec:
        """The codec of a text form such as "int4-g128"; ValueError if the text is not one."""
        if text in _FIXED:
            fixed, bits, size, scale = _FIXED[text]
            return Codec(bits, size, "none", scale, fixed)
        match, zero = _INTEGER.fullmatch(text), None
        values: Values = "integer"
        packing: Packing = "planes"
        if match is not None:
            zero = match["zero"]
            if zero == "nested":
                zero, values = None, "nested"
        else:
            match = _TABLE.fullmatch(text)
            if match is None:
                raise ValueError(f"codec must be {GRAMMAR}; got {text!r}")
            values = "learned" if match["bits"] else cast(Values, match["values"])
            packing = "base3" if match["base3"] else "planes"
        bits = int(match["bits"]) if match["bits"] else value_tables.BITS[values]
        group = int(match["group"]) if match["group"] else None
        scale = _SCALE_OF_TEXT[match["scale"]]
        if values in _WIDE_VALUES:
            if match["scale"] is not None:
                raise ValueError(f"codec {match['values']!r} has fp32 scales, got {text!r}")
            scale = "fp32"
        return Codec(bits, group, _ZERO_OF_TEXT[zero], scale, values, packing)

    def __str__(self) -> str:
        return self._text  # type: ignore[attr-defined, no-any-return]

    @functools.cached_property
    def plane_widths(self) -> tuple[int, ...]:
        """Bits of each plane, the lowest bits of the code first: 3 → (2, 1)."""
        return (_NESTED_WIDTHS if self.values == "nested" else _PLANE_WIDTHS)[self.bits]

    @property
    def levels(self) -> int:
        """Codes in use, 0 .. levels - 1."""
        return 3 if self.values == "ternary" else 1 << self.bits

    @property
    def is_table(self) -> bool:
        """Whether codes stand for the entries of a table, not for whole numbers."""
        return self.values not in ("integer", "nested", "ternary")

    @property
    def rows_are_independent(self) -> bool:
        """Whether a row's numbers depend on no other row: no table, mean or outer scale is of the
        whole tensor."""
        of_all = self.values == "ternary" and self.group is None
        return not (of_all or self.values == "learned" or self.scale_dtype == "e4m3")

    @property
    def zero_code(self) -> float:
        """The code that stands for 0 in a symmetric codec of whole numbers: 2**(bits - 1), or 1 of
        ternary.

        One bit has no code to spare for 0: its two levels are -scale/2 and +scale/2.
        """
        if self.values == "ternary":
            return 1.0
        if self.values == "nested":
            return (self.levels - 1) / 2
        return 0.5 if self.bits == 1 else float(1 << (self.bits - 1))

    @property
    def largest_inner_scale(self) -> int:
        """The largest "int8" or "fp8" scale: of whole numbers, scale * |code - zero| is at most
        127, or 448."""
        if self.is_table:
            return 255
        if self.scale_dtype == "fp8":
            return 448 // int(self.zero_code)
        most = self.levels - 1 if self.zero == "integer" else int(self.zero_code)
        return 127 // most

    @property
    def has_row_search(self) -> bool:
        """Whether a search has a second phase over scales of rows and int8 scales of groups."""
        return self.values == "integer" and self.scale_dtype == "int8"

    def group_size(self, in_features: int) -> int:
        """Length of a group along K; per row, the whole K (1 when K is 0, so that it divides)."""
        return max(in_features, 1) if self.group is None else self.group

    def num_groups(self, in_features: int) -> int:
        """Groups along K; the last one may be short."""
        return -(-in_features // self.group_size(in_features))


def _text_of(codec: Codec) -> str:
    """The text form; ValueError for a combination that has none."""
    values, scale = codec.values, codec.scale_dtype
    for name, fixed in _FIXED.items():
        if fixed == (values, codec.bits, codec.group, scale) and codec.zero == "none":
            return name
    names = ("fp16", "fp32", "int8", "fp8")
    if scale not in names:
        raise ValueError(
            f"codec scale_dtype must be one of {names}, or that of {tuple(_FIXED)} with their "
            f"values and group, got {scale!r}"
        )
    grouped = "" if codec.group is None else f"-g{codec.group}"
    wide = {"fp16": "", "fp32": "-s32", "int8": "-s8" if values == "integer" else "-dq",
            "fp8": "-fp8"}[scale]  # fmt: skip
    if values == "integer":
        if scale == "fp8" and (codec.zero != "none" or not 2 <= codec.bits <= 4):
            raise ValueError(
                "codec scale_dtype 'fp8' needs 2 to 4 bits and zero 'none', "
                f"got {codec.bits} bits, zero {codec.zero!r}"
            )
        if scale == "int8" and (codec.zero == "float" or codec.bits > 4 or codec.bits == 1):
            raise ValueError(
                "codec scale_dtype 'int8' needs 2 to 4 bits and zero 'none' or 'integer' (scale * "
                f"code must fit int8), got {codec.bits} bits, zero {codec.zero!r}"
            )
        return f"int{codec.bits}{grouped}{_TEXT_OF_ZERO[codec.zero]}{wide}"
    if values == "nested":
        if codec.bits not in _NESTED_WIDTHS or codec.zero != "none" or wide not in ("", "-s32"):
            raise ValueError(
                "codec values 'nested' needs 2, 4 or 8 bits, zero 'none' and scales in fp16 or "
                f"fp32, got {codec.bits} bits, zero {codec.zero!r}, {scale}"
            )
        return f"int{codec.bits}{grouped}-nested{wide}"
    if values not in ("learned", *value_tables.BITS):
        known = ("integer", "learned", *value_tables.BITS)
        raise ValueError(f"codec values must be one of {known}, got {values!r}")
    if codec.zero != "none":
        raise ValueError(f"codec zero of values {values!r} must be 'none', got {codec.zero!r}")
    if values != "learned" and codec.bits != value_tables.BITS[values]:
        raise ValueError(
            f"codec bits of values {values!r} must be {value_tables.BITS[values]}, got {codec.bits}"
        )
    if values in _WIDE_VALUES:
        if scale != "fp32":
            raise ValueError(f"codec scale_dtype of {values!r} must be 'fp32', got {scale!r}")
        return f"{values}{grouped}"
    if values in ("e2m3", "e3m2") or (values == "ternary" and scale == "int8") or scale == "fp8":
        raise ValueError(f"codec values {values!r} cannot have {scale} scales in groups {grouped}")
    name = f"lut{codec.bits}" if values == "learned" else values
    denser = "-1.6" if codec.packing == "base3" else ""
    return f"{name}{denser}{grouped}{wide}"


def codec(codec: str | Codec) -> Codec:
    """The `Codec` of a text form; a `Codec` is returned as it is.

    >>> codec("int4-g128")
    Codec(bits=4, group=128, zero='none', scale_dtype='fp16', values='integer', packing='planes')
    """
    if isinstance(codec, Codec):
        return codec
    if not isinstance(codec, str):
        raise TypeError(f"codec must be a str or a Codec, got {type(codec).__name__}: {codec!r}")
    return Codec.parse(codec)
