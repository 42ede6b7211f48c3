"""`lath.tequila`: a ternary weight whose zeros come back as a bias of each output."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lath.formats.codec import Codec
from lath.formats.codec import codec as parse_codec
from lath.formats.qtensor import QTensor
from lath.verbs.checks import check_tensor
from lath.verbs.quantize import quantize


def tequila(
    weight: Tensor, codec: str | Codec = "ternary", *, strength: float = 1e-3
) -> tuple[QTensor, Tensor]:
    """A weight [N, K] as ternary numbers and the bias [N] of what they left out (Tequila).

        y = A(x) Tᵀ + C,    C[n] = strength * Σ of the weights of row n that became 0

    weight: float16, bfloat16 or float32, of a model trained so. codec: a ternary one. strength: the
    λ of the training, 1e-3 in the paper. C does not depend on x.

    Returns the packed weight and C, fp32, summed in float64: `lath.linear(x, packed, C)`. Raises
    ValueError for another codec, a strength that is not finite, a weight with NaN or infinity.
    """
    weight, parsed = check_tensor("weight", weight), parse_codec(codec)
    if parsed.values != "ternary":
        raise ValueError(f"codec of tequila must be a ternary one, got {str(parsed)!r}")
    if not math.isfinite(strength):
        raise ValueError(f"strength must be finite, got {strength!r}")
    packed = quantize(weight, parsed)
    assert isinstance(packed, QTensor)  # of a Codec
    dead = packed.unpack_codes() == int(parsed.zero_code)
    left_out = torch.where(dead, weight.detach().double(), 0.0).sum(dim=1)
    return packed, (strength * left_out).float()
