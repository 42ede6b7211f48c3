"""The activation format: which numbers `linear` multiplies, the same on every backend.

"float" leaves x as it is. "int8" rounds each token to int8 with one scale; "int8-gG" with one scale
per token and group of G along K (the last group may be short). For a group x[...] in fp32:

    absmax  = max |x|
    scale   = absmax / 127      inverse = 127 / absmax      (scale 1, inverse 0 if absmax < 2**-100)
    code    = rint(x * inverse)                              round half to even
    any NaN or infinity in the group: scale = NaN, codes = 0 (the token's output is NaN)

Each step is one IEEE fp32 operation, so that the codes agree bit for bit everywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lath.formats.codec import GROUP_MULTIPLE

# Below this 127 / absmax would overflow; a group that small is zero for every practical purpose.
SMALLEST_ABSMAX = 2.0**-100
LARGEST_CODE = 127

_PATTERN = re.compile(r"int8(-g(?P<group>[1-9]\d*))?")


@dataclass(frozen=True)
class ActivationFormat:
    """kind: "float" or "int8"; group: a multiple of 16 along K, or None for one scale per token."""

    kind: Literal["float", "int8"] = "float"
    group: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("float", "int8"):
            raise ValueError(f"activations kind must be 'float' or 'int8', got {self.kind!r}")
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
                f"activations must be 'float', 'int8' or 'int8-g{{multiple of 16}}'; got {text!r}"
            )
        return ActivationFormat("int8", int(match["group"]) if match["group"] else None)

    def __str__(self) -> str:
        return self._text  # type: ignore[attr-defined, no-any-return]

    @property
    def bits(self) -> int | None:
        """Bits of a code; None where x stays in its own floating-point type."""
        return 8 if self.kind == "int8" else None

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
