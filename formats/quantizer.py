"""Quantisers: how the codes of a weight are chosen. Frozen values with a text form.

    "rtn"        round to nearest
    "hqq"        round to nearest, then float minima by half-quadratic splitting
    "gptq"       column by column, each error made good by the columns that follow
    "awq"        inputs that are large get finer steps: columns are scaled, what makes x unscales
    "awq+gptq"   the same, rounded by GPTQ

`calibrated`: whether it looks at inputs. A quantiser knows no codec: every codec that rounds one
weight at a time can be had from each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar


def _check(name: str, value: Any, good: bool, accepted: str) -> None:
    if isinstance(value, bool) or not math.isfinite(value) or not good:
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}")


@dataclass(frozen=True)
class RTN:
    """Round to nearest."""

    calibrated: ClassVar[bool] = False

    def __str__(self) -> str:
        return "rtn"


@dataclass(frozen=True)
class HQQ:
    """Half-quadratic quantisation (Badri & Shaji 2023): the minimum of each group that
    makes the sum of |error|**p small; scales stay. Only for codecs with float minima ("-fzero").

    p: 0 < p <= 1; below 2 outliers count less. beta: weight of the splitting at first, error in
    steps; kappa: what it grows by in each of `rounds`.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    rounds: int = 20

    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check("HQQ p", self.p, 0 < self.p <= 1, "above 0 and at most 1")
        _check("HQQ beta", self.beta, self.beta > 0, "above 0")
        _check("HQQ kappa", self.kappa, self.kappa >= 1, "1 or more")
        _check_count("HQQ rounds", self.rounds, 0)

    def __str__(self) -> str:
        return "hqq"


@dataclass(frozen=True)
class GPTQ:
    """GPTQ (2210.17323): columns in turn, each error spread over the columns not yet rounded.

    act_order: columns in the order of their mean squared input, largest first. Scales are those of
    the weight's own groups ("static groups"), so that no permutation is stored. damping: added to
    the Hessian's diagonal, as a share of its mean. block: columns between two updates of all that
    follow; it changes the speed, not the numbers.
    """

    act_order: bool = True
    damping: float = 0.01
    block: int = 128

    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check("GPTQ damping", self.damping, self.damping >= 0, "0 or more")
        _check_count("GPTQ block", self.block, 1)
        if not isinstance(self.act_order, bool):
            raise TypeError(f"GPTQ act_order must be a bool, got {self.act_order!r}")

    def __str__(self) -> str:
        return "gptq"


@dataclass(frozen=True)
class AWQ:
    """Activation-aware scaling (2306.00978): column k times s[k] = rms(x[k])**alpha before it is
    rounded, x[k] divided by it; alpha from a grid, by the error of the output.

    grid: how many alphas 0, 1/grid, ... below 1 are tried. rounding: what rounds the scaled weight.
    """

    grid: int = 20
    rounding: RTN | GPTQ = field(default_factory=RTN)

    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_count("AWQ grid", self.grid, 1)
        if not isinstance(self.rounding, RTN | GPTQ):
            raise TypeError(f"AWQ rounding must be RTN() or GPTQ(), got {self.rounding!r}")

    def __str__(self) -> str:
        return "awq+gptq" if isinstance(self.rounding, GPTQ) else "awq"


Quantizer = RTN | HQQ | GPTQ | AWQ

QUANTIZERS: dict[str, Quantizer] = {
    str(one): one for one in (RTN(), HQQ(), GPTQ(), AWQ(), AWQ(rounding=GPTQ()))
}


def quantizer(value: str | Quantizer) -> Quantizer:
    """The quantiser of a text form; a quantiser is returned as it is.

    >>> quantizer("gptq")
    GPTQ(act_order=True, damping=0.01, block=128)
    """
    if isinstance(value, RTN | HQQ | GPTQ | AWQ):
        return value
    if not isinstance(value, str):
        raise TypeError(
            f"quantizer must be a str or one of RTN, HQQ, GPTQ, AWQ, got {type(value).__name__}"
        )
    if value not in QUANTIZERS:
        raise ValueError(f"quantizer must be one of {tuple(QUANTIZERS)}, got {value!r}")
    return QUANTIZERS[value]
