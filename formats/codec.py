"""The codec: how a tile of numbers is stored, as a frozen value with a text form.

A weight `[N, K]` is cut along K into groups; every (group, row) has a scale and, if the codec says
so, a zero point or a minimum. With `g = k // group_size`:

    zero = "none"      weight[n, k] = scale[g, n] * (code[n, k] - zero_code)
    zero = "integer"   weight[n, k] = scale[g, n] * (code[n, k] - zeros[g, n])
    zero = "float"     weight[n, k] = scale[g, n] * code[n, k] + zeros[g, n]

Text forms: `int{1..8}[-g{multiple of 16}][-asym|-fzero][-s32]`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

Zero = Literal["none", "integer", "float"]
ScaleDtype = Literal["fp16", "fp32"]

# Sixteen codes of a row are the finest run that every packed word keeps together (DESIGN.md, 2).
GROUP_MULTIPLE = 16

GRAMMAR = "int{1..8}[-g{multiple of 16}][-asym|-fzero][-s32], for example 'int4-g128'"
_PATTERN = re.compile(
    r"int(?P<bits>[1-8])(-g(?P<group>[1-9]\d*))?(-(?P<zero>asym|fzero))?(?P<wide>-s32)?"
)
_ZERO_OF_TEXT: dict[str | None, Zero] = {None: "none", "asym": "integer", "fzero": "float"}
_TEXT_OF_ZERO: dict[Zero, str] = {"none": "", "integer": "-asym", "float": "-fzero"}

# Codes are split into planes whose widths divide a word, low bits first: no code straddles words.
_PLANE_WIDTHS: dict[int, tuple[int, ...]] = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
}  # fmt: skip


@dataclass(frozen=True)
class Codec:
    """Integer codes of `bits` bits with one scale per (group along K, row).

    bits: 1 to 8. group: a multiple of 16, or None for one group per row. zero: "none" (symmetric),
    "integer" (a uint8 zero point) or "float" (a minimum in the scale's dtype). scale_dtype: "fp16"
    or "fp32". Raises ValueError naming the field, its value and what is accepted.
    """

    bits: int
    group: int | None = None
    zero: Zero = "none"
    scale_dtype: ScaleDtype = "fp16"

    def __post_init__(self) -> None:
        if self.bits not in _PLANE_WIDTHS:
            raise ValueError(f"codec bits must be an integer from 1 to 8, got {self.bits!r}")
        group, grouped = self.group, ""
        if group is not None and (
            type(group) is not int or group <= 0 or group % GROUP_MULTIPLE != 0
        ):
            raise ValueError(
                f"codec group must be a positive multiple of {GROUP_MULTIPLE} or None "
                f"(one group per row), got {group!r}"
            )
        if self.zero not in _TEXT_OF_ZERO:
            raise ValueError(f"codec zero must be 'none', 'integer' or 'float', got {self.zero!r}")
        if self.scale_dtype not in ("fp16", "fp32"):
            raise ValueError(
                f"codec scale_dtype must be 'fp16' or 'fp32', got {self.scale_dtype!r}"
            )
        # Kept, not formatted on demand: torch.compile traces attributes but not the formatting.
        if group is not None:
            grouped = f"-g{group}"
        wide = "-s32" if self.scale_dtype == "fp32" else ""
        text = f"int{self.bits}{grouped}{_TEXT_OF_ZERO[self.zero]}{wide}"
        object.__setattr__(self, "_text", text)

    @staticmethod
    def parse(text: str) -> Codec:
        """The codec of a text form such as "int4-g128"; ValueError if the text is not one."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"codec must be {GRAMMAR}; got {text!r}")
        return Codec(
            bits=int(match["bits"]),
            group=int(match["group"]) if match["group"] else None,
            zero=_ZERO_OF_TEXT[match["zero"]],
            scale_dtype="fp32" if match["wide"] else "fp16",
        )

    def __str__(self) -> str:
        return self._text  # type: ignore[attr-defined, no-any-return]

    @functools.cached_property
    def plane_widths(self) -> tuple[int, ...]:
        """Bits of each plane, the lowest bits of the code first: 3 → (2, 1)."""
        return _PLANE_WIDTHS[self.bits]

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def zero_code(self) -> float:
        """The code that stands for 0 in a symmetric codec: 2**(bits - 1).

        One bit has no code to spare for 0: its two levels are -scale/2 and +scale/2.
        """
        return 0.5 if self.bits == 1 else float(1 << (self.bits - 1))

    def group_size(self, in_features: int) -> int:
        """Length of a group along K; per row, the whole K (1 when K is 0, so that it divides)."""
        return max(in_features, 1) if self.group is None else self.group

    def num_groups(self, in_features: int) -> int:
        """Groups along K; the last one may be short."""
        return -(-in_features // self.group_size(in_features))


def codec(codec: str | Codec) -> Codec:
    """The `Codec` of a text form; a `Codec` is returned as it is.

    >>> codec("int4-g128")
    Codec(bits=4, group=128, zero='none', scale_dtype='fp16')
    """
    if isinstance(codec, Codec):
        return codec
    if not isinstance(codec, str):
        raise TypeError(f"codec must be a str or a Codec, got {type(codec).__name__}: {codec!r}")
    return Codec.parse(codec)
