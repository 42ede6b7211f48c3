"""How far two right computations of a part of a model may lie apart: what the probe admits.

Both round the same numbers, at other places. A rounding to a dtype of unit roundoff u moves a
number by up to u of itself, by u / 2 on average; n of them in a row by n u / 2. A sum of up to
2**14 terms in fp32, in another order, differs by about 2**-17 of itself: 2**7 steps of a random
walk, of 2**-24 each.

Numbers that lie a little apart, by e of themselves, may be rounded to two codes. With s between two
codes that happens to the share e |x| / s of them and is an error of s: in the mean of squares e |x|
s, or relative to the square of the vector

    e c,   c = sum(|x| s) / sum(x²)

where s is the scale of whole numbers, and for 8-bit floats at most 2**-3 (E4M3) or 2**-2 (E5M2) of
|x|. c is counted on the very vectors that the model's own products were given, outliers and all. So
e becomes sqrt(e² + e c), and a product hands it on as it is: what does not lie along the rows of a
weight is not enlarged by it. Four vectors of a layer are rounded to codes one behind another, and
between them there are as many roundings to the dtype as `_STAGES` says.

That is a mean over many codes: n = e sum(|x| / s) are expected to be others, each of which is
b = e c / n of the vector's square; n + 3 sqrt(n) + 3 are admitted.

For normal numbers, int8 in groups of 32 and K = 1536 that makes 1.7 % of what a layer adds in fp32,
2.6 % in fp16, 5.6 % in bf16; without codes 0.004 %, 0.4 % and 2.9 %; E5M2, a third, hides much. Of
SmolLM2's layers none differs by more than 0.9 of it, in fp16 and int8 by the token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lath.formats.activations import ActivationFormat

_SUMS = 2.0**-17
_SURE = 3.0
# Of a norm; of a product, a rotation and attention; of a product and a norm; of a product, the
# function between gate and up, and their product.
_STAGES = (2, 5, 4, 3)
# Between two numbers of an 8-bit float, of the larger one; and the smallest there is.
_SPACING = {"e4m3": (2.0**-3, 2.0**-9), "e5m2": (2.0**-2, 2.0**-16)}


class Codes(NamedTuple):
    """Of a vector that is rounded to codes. share: c; one: sqrt(b)."""

    share: float
    one: float


def codes_of(x: Tensor, activations: ActivationFormat) -> Codes:
    """x: the vector [K] that a product was given."""
    if activations.kind == "float":
        return Codes(0.0, 0.0)
    size = activations.group_size(len(x))
    groups = torch.nn.functional.pad(x.double().abs(), (0, -len(x) % size)).view(-1, size)
    scale = groups.amax(dim=1, keepdim=True) / activations.largest
    if activations.is_integer:
        spacing = scale.expand_as(groups)
    else:
        relative, smallest = _SPACING[str(activations.values)]
        spacing = torch.maximum(relative * groups, smallest * scale)
    some = groups > 0
    x, spacing = groups[some], spacing[some]
    if not len(x):
        return Codes(0.0, 0.0)
    moved = float((x * spacing).sum())
    return Codes(
        moved / float(x.square().sum()),
        math.sqrt(moved / float((x / spacing).sum()) / float(x.square().sum())),
    )


def _apart(difference: float, roundings: int, dtype: torch.dtype) -> float:
    return difference + roundings * torch.finfo(dtype).eps / 4 + _SUMS


def _behind(difference: float, codes: Codes) -> float:
    mean = difference * codes.share
    more = _SURE * (math.sqrt(mean) * codes.one + codes.one**2)
    return math.sqrt(difference**2 + mean + more)


def layer_tolerance(stages: Sequence[Codes], dtype: torch.dtype) -> float:
    """Of what a layer adds: the largest admitted ||difference|| / ||what is added||.

    stages: of what queries, the output, the gate and down are products of.
    """
    difference = 0.0
    for roundings, codes in zip(_STAGES, stages, strict=True):
        difference = _behind(_apart(difference, roundings, dtype), codes)
    return _apart(difference, 1, dtype)


def norm_tolerance(dtype: torch.dtype) -> float:
    return _apart(0.0, 2, dtype)


def product_tolerance(codes: Codes, dtype: torch.dtype) -> float:
    """Of a product behind a norm: of the logits."""
    return _apart(_behind(_apart(0.0, 2, dtype), codes), 1, dtype)
