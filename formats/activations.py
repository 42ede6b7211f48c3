"""The activation format: which numbers `linear` multiplies, the same on every backend.

"float" leaves x as it is. The others round each token with one scale, or ("-gG") each group of G
columns of a token with its own (the last group may be short). For a group x[...] in fp32:

    absmax  = max |x|
    scale   = absmax / largest      inverse = largest / absmax      (scale 1, inverse 0 if
    code    = round(x * inverse)                                     absmax < 2**-100)
    any NaN or infinity in the group: scale = NaN, codes = 0 (the token's output is NaN)

    kind        largest   codes
    int8            127   whole numbers, half to even
    int6             31   whole numbers of 6 bits (FlexQ), multiplied as those of int8
    fp8             448   E4M3, half to even
    fp8-e5m2      57344   E5M2, half to even

Each step is one IEEE fp32 operation, so that the codes agree bit for bit everywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from lath.formats import values as value_tables
from lath.formats.codec import GROUP_MULTIPLE
from lath.formats.values import Values

# Below this the largest number / absmax would overflow; so small a group is zero for any purpose.
SMALLEST_ABSMAX = 2.0**-100
LARGEST_CODE = 127  # of int8

Kind = Literal["float", "int8", "int6", "fp8", "fp8-e5m2"]
# The largest code of the whole numbers, and the bits of one.
_INTEGERS: dict[str, tuple[int, int]] = {"int8": (LARGEST_CODE, 8), "int6": (31, 6)}
_FLOATS: dict[str, Values] = {"fp8": "e4m3", "fp8-e5m2": "e5m2"}
_PATTERN = re.compile(r"(?P<kind>int8|int6|fp8-e5m2|fp8)(-g(?P<group>[1-9]\d*))?")


@dataclass(frozen=True)
class ActivationFormat:
    """kind: see above; group: a multiple of 16 along K, or None for one scale per token."""

    kind: Kind = "float"
    group: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"activations kind must be one of {get_args(Kind)}, got {self.kind!r}")
        group = self.group
        if group is not None:
            if self.kind == "float":
                raise ValueError(f"activations 'float' has no group, got group={group!r}")
            if type(group) is not int or group <= 0 or group % GROUP_MULTIPLE != 0:
                raise ValueError(
                    "activations group must be a positive multiple of "
                    f"{GROUP_MULTIPLE}, got {group!r}"
                )
        # Kept, not formatted on demand: torch.compile traces attributes but not the formatting.
        text = self.kind if group is None else f"{self.kind}-g{group}"
        object.__setattr__(self, "_text", text)

    @staticmethod
    def parse(text: str) -> ActivationFormat:
        """The format of "float", "int8" or "int8-g64"; ValueError naming the text otherwise."""
        if text == "float":
            return ActivationFormat()
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(
                "activations must be 'float', or 'int8', 'int6', 'fp8' or 'fp8-e5m2', each also "
                f"with '-g{{multiple of 16}}'; got {text!r}"
            )
        group = int(match["group"]) if match["group"] else None
        return ActivationFormat(cast(Kind, match["kind"]), group)

    def __str__(self) -> str:
        return self._text  # type: ignore[attr-defined, no-any-return]

    @property
    def is_integer(self) -> bool:
        """Whether x is rounded to whole numbers, which int8 dots take."""
        return self.kind in _INTEGERS

    @property
    def values(self) -> Values | None:
        """The 8-bit float that x is rounded to, as `lath.formats.values` names it, or None."""
        return _FLOATS.get(self.kind)

    @property
    def bits(self) -> int | None:
        """Bits of a code; None where x stays in its own floating-point type."""
        if self.kind == "float":
            return None
        return _INTEGERS[self.kind][1] if self.is_integer else 8

    @property
    def largest(self) -> int:
        """The code of the largest |x| of a group; ValueError of "float", which has no codes."""
        if self.kind == "float":
            raise ValueError("activations 'float' have no codes")
        if self.is_integer:
            return _INTEGERS[self.kind][0]
        return int(value_tables.largest(_FLOATS[self.kind]))

    def group_size(self, in_features: int) -> int:
        return max(in_features, 1) if self.group is None else self.group

    def num_groups(self, in_features: int) -> int:
        return -(-in_features // self.group_size(in_features))


def activation_format(activations: str | ActivationFormat) -> ActivationFormat:
    """The `ActivationFormat` of a text form; an `ActivationFormat` is returned as it is."""
    if isinstance(activations, ActivationFormat):
        return activations
    if not isinstance(activations, str):
        raise TypeError(
            "activations must be a str or an ActivationFormat, "
            f"got {type(activations).__name__}: {activations!r}"
        )
    return ActivationFormat.parse(activations)
