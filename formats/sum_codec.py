"""The codec of a sum: parts that are added, each over all columns of x or over some of them.

    weight = Σ_part weight_part          "int4-g128+out1%", "int1-g128+int1-g128"

A part is a codec of another family, outliers (`outP%`, the last part), or one that deals out the
columns, which are then kept in its order:

    mixM-gG, mixA:B-M-gG     groups of G columns, each in the width that it needs; M bits on average
    mixM-pP-gG               the same of three widths, P groups each of the narrowest and the widest
    billmP%-gG               P % salient columns and the rest, each as two sums of signs
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from lath.formats.codec import Codec
from lath.formats.outliers import OutlierCodec
from lath.formats.packed_weight import WeightCodec

GRAMMAR_TABLE = {
    "A+outP%": "P % of the weights, the largest, beside any codec A as fp16 with their columns",
    "A+B": "a codec B for what a codec A leaves, as in 'int1-g128+int1-g128'",
    "mixM[-pP]-gG[-asym|-fzero][-s32|-s8]": "whole numbers of M bits on average, a width for each "
    "group of G columns: M - 1, M, M + 1 (P groups of the first and of the last; without -pP an "
    "eighth of all, or what a search finds), or the two widths beside M",
    "mixA:B-M-gG[...]": "the same of the widths A and B",
    "billmP%-gG": "signs: P % salient columns twice, the rest with two scales by a mask (BiLLM)",
}
# A sum has a '+' before a name; one before a number ("vq8-65536+256") is another codec's own.
_JOINT = re.compile(r"\+(?=[a-z])")
CLAIMS = r"(mix|billm).*|[^+].*\+[a-z].*"
_MIX = re.compile(
    r"mix((?P<low>[1-8]):(?P<high>[1-8])-)?(?P<mean>\d(\.\d+)?)(-p(?P<pairs>\d+))?"
    r"-g(?P<group>[1-9]\d*)(?P<rest>(-asym|-fzero)?(-s32|-s8)?)"
)
_SIGNS = re.compile(r"billm(?P<percent>\d+(\.\d+)?)%-g(?P<group>[1-9]\d*)")

# Of three widths, the share of groups that take the widest, and as many the narrowest, where the
# codec does not say how many.
OUTER_SHARE = 1 / 8


class Term(NamedTuple):
    """One packed weight of a sum. columns: (first, past the last) of the order of the columns that
    a part chose; None: all columns of x, in their own order."""

    codec: WeightCodec
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class MixCodec:
    """Groups of `group` columns, shared by all rows, in codecs that differ in their bits.

    widths: ascending; codec_text: of a term, with "{}" for its bits. Three widths are M - 1, M and
    M + 1 with as many groups of the first as of the last; of two, so many take the wider that the
    mean is as near to `mean` as whole groups allow. The short last group takes the widest in use.
    pairs: of three widths, how many groups the first and the last have (at most a half each); None:
    OUTER_SHARE of all, rounded down.
    """

    widths: tuple[int, ...]
    mean: float
    group: int
    rest: str = ""
    pairs: int | None = None

    def __post_init__(self) -> None:
        ordered = list(self.widths) == sorted(set(self.widths))
        if len(self.widths) not in (2, 3) or not ordered or self.widths[0] < 1:
            raise ValueError(f"codec widths of a mix must be 2 or 3, ascending, got {self.widths}")
        if max(self.widths) > 8 or not self.widths[0] < self.mean < self.widths[-1]:
            raise ValueError(
                f"codec mean of a mix must lie between its widths (1 to 8 bits), got {self.mean:g} "
                f"of {self.widths}"
            )
        middle = (int(self.mean) - 1, int(self.mean), int(self.mean) + 1)
        if len(self.widths) == 3 and (self.widths != middle or self.mean != middle[1]):
            raise ValueError(f"codec widths of a mix of {self.mean:g} bits must be {middle}")
        if self.pairs is not None and (len(self.widths) != 3 or self.pairs < 0):
            raise ValueError(
                f"codec pairs of a mix must be None or 0 and more of three widths, got "
                f"{self.pairs} of {self.widths}"
            )
        object.__setattr__(self, "_codecs", tuple(map(self._codec, self.widths)))
        object.__setattr__(self, "_text", self._form())

    @staticmethod
    def parse(text: str) -> MixCodec | None:
        match = _MIX.fullmatch(text)
        if match is None:
            return None
        mean = float(match["mean"])
        if match["low"]:
            widths: tuple[int, ...] = (int(match["low"]), int(match["high"]))
        elif mean == int(mean):
            widths = (int(mean) - 1, int(mean), int(mean) + 1)
        else:
            widths = (int(mean), int(mean) + 1)
        pairs = None if match["pairs"] is None else int(match["pairs"])
        return MixCodec(widths, mean, int(match["group"]), match["rest"], pairs)

    def _codec(self, bits: int) -> Codec:
        return Codec.parse(f"int{bits}-g{self.group}{self.rest}")

    def _form(self) -> str:
        neighbours = len(self.widths) == 3 or (
            self.widths == (int(self.mean), int(self.mean) + 1) and self.mean != int(self.mean)
        )
        named = "" if neighbours else f"{self.widths[0]}:{self.widths[1]}-"
        pairs = "" if self.pairs is None else f"-p{self.pairs}"
        return f"mix{named}{self.mean:g}{pairs}-g{self.group}{self.rest}"

    def __str__(self) -> str:
        return self._text  # type: ignore[attr-defined, no-any-return]

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """The codec of each width, the narrowest first."""
        return self._codecs  # type: ignore[attr-defined, no-any-return]

    def group_counts(self, in_features: int) -> tuple[int, ...]:
        """Groups of each width, the narrowest first."""
        groups = -(-in_features // self.group)
        if len(self.widths) == 3:
            wanted = int(groups * OUTER_SHARE) if self.pairs is None else self.pairs
            outer = min(wanted, groups // 2)
            return outer, groups - 2 * outer, outer
        low, high = self.widths
        wider = round(groups * (self.mean - low) / (high - low))
        return groups - wider, wider

    @property
    def is_open(self) -> bool:
        """Whether a search may choose how many groups each width has."""
        return len(self.widths) == 3 and self.pairs is None

    def terms(self, in_features: int) -> list[Term]:
        counts, short = list(self.group_counts(in_features)), -in_features % self.group
        sizes = [count * self.group for count in counts]
        sizes[max(i for i, count in enumerate(counts) if count or not i)] -= short
        terms, first = [], 0
        for codec, size in zip(self.codecs, sizes, strict=True):
            terms.append(Term(codec, (first, first + size)))
            first += size
        return terms


@dataclass(frozen=True)
class SignsCodec:
    """Two sums of signs with scales in groups of `group` columns: BiLLM (2402.04291).

    percent: of the columns are salient: a1·B1 + a2·B2, B2 the signs of what B1 leaves. The rest is
    split by magnitude, scale lo or hi under a mask m: s (lo + m (hi - lo)) = (hi + lo)/2 · s +
    (hi - lo)/2 · s (2m - 1), again two sums of signs. A mask costs the bit that a second sign does:
    two bits for every weight, and nothing is counted as less.
    """

    percent: float
    group: int

    def __post_init__(self) -> None:
        if not 0 < self.percent < 100:
            raise ValueError(f"codec percent of billm must be in (0, 100), got {self.percent!r}")
        object.__setattr__(self, "_codec", Codec.parse(f"int1-g{self.group}"))
        object.__setattr__(self, "_text", f"billm{self.percent:g}%-g{self.group}")

    @staticmethod
    def parse(text: str) -> SignsCodec | None:
        match = _SIGNS.fullmatch(text)
        return None if match is None else SignsCodec(float(match["percent"]), int(match["group"]))

    def __str__(self) -> str:
        return self._text  # type: ignore[attr-defined, no-any-return]

    @property
    def sign(self) -> Codec:
        """The codec of all four terms."""
        return self._codec  # type: ignore[attr-defined, no-any-return]

    def salient(self, in_features: int) -> int:
        """Columns that are salient: they come first in the order."""
        return round(in_features * self.percent / 100)

    def terms(self, in_features: int) -> list[Term]:
        salient = (0, self.salient(in_features))
        rest = (salient[1], in_features)
        return [Term(self.sign, columns) for columns in (salient, salient, rest, rest)]


Part = WeightCodec | MixCodec | SignsCodec | OutlierCodec


@dataclass(frozen=True)
class SumCodec:
    """parts: what is added. At most one deals out columns, at most one is outliers, and that last;
    a single part is one that deals out columns. ValueError naming what is accepted otherwise."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        dealt = sum(isinstance(part, MixCodec | SignsCodec) for part in self.parts)
        outliers = [isinstance(part, OutlierCodec) for part in self.parts]
        if any(isinstance(part, SumCodec) for part in self.parts):
            raise ValueError(f"codec parts must be no sums themselves, got {self.parts}")
        if dealt > 1 or any(outliers[:-1]) or all(outliers) or len(self.parts) < 2 - dealt:
            raise ValueError(
                "codec parts of a sum must be two or more, at most one of them a mix or billm, and "
                f"outliers only the last, got {[str(part) for part in self.parts]}"
            )
        object.__setattr__(self, "_text", "+".join(map(str, self.parts)))

    @staticmethod
    def parse(text: str) -> SumCodec:
        """The codec of a text form such as "int4-g128+out1%"; ValueError if the text is not one."""
        return SumCodec(tuple(_parse_part(part, text) for part in _JOINT.split(text)))

    def __str__(self) -> str:
        return self._text  # type: ignore[attr-defined, no-any-return]

    @property
    def group(self) -> int | None:
        """The group of the first part."""
        return self.parts[0].group

    @property
    def dealer(self) -> MixCodec | SignsCodec | None:
        """The part that deals out the columns, if there is one."""
        return next((p for p in self.parts if isinstance(p, MixCodec | SignsCodec)), None)

    @property
    def outliers(self) -> OutlierCodec | None:
        last = self.parts[-1]
        return last if isinstance(last, OutlierCodec) else None

    @property
    def takes_importance(self) -> bool:
        """Whether `lath.quantize` chooses something by `importance`."""
        return self.dealer is not None or self.outliers is not None

    @property
    def is_open(self) -> bool:
        """Whether a search may choose how many groups each width of a mix has."""
        return isinstance(self.dealer, MixCodec) and self.dealer.is_open

    @property
    def opened(self) -> SumCodec:
        """The codec that this one was before a search."""
        return self.with_pairs(None)

    def with_pairs(self, pairs: int | None) -> SumCodec:
        """The codec with so many groups each of the narrowest and the widest of a mix's three."""
        return SumCodec(
            tuple(
                replace(part, pairs=pairs)
                if isinstance(part, MixCodec) and len(part.widths) == 3
                else part
                for part in self.parts
            )
        )

    def terms(self, in_features: int) -> list[Term]:
        """The packed weights that are added, in their order; as many for every `in_features`."""
        terms: list[Term] = []
        for part in self.parts:
            deals = isinstance(part, MixCodec | SignsCodec)
            terms += part.terms(in_features) if deals else [Term(part)]  # type: ignore[union-attr]
        return terms


def _parse_part(text: str, whole: str) -> Part:
    # Imported here: the list of families names this one too.
    from lath.formats.families import weight_codec

    if text.startswith("out"):
        return OutlierCodec.parse(text)
    dealt = MixCodec.parse(text) or SignsCodec.parse(text)
    if dealt is not None:
        return dealt
    if text.startswith(("mix", "billm")):
        forms = "; ".join(GRAMMAR_TABLE)
        raise ValueError(f"codec must be one of {forms}, for example 'mix2.5-g64'; got {whole!r}")
    return weight_codec(text)
