"""What a result may differ by, derived and not tuned.

`test_ratio` is max |error| / bound: a correct kernel stays at or below 1. The bound of a dot
product of K terms in fp32 over operands that were rounded r times each is

    |y - y64| <= u_out |y64| + (r u_in + (K + 8) u32) (1 + u_in) Σ|a||w| + tiny

(8: the scales, zero points and the bias, each a fp32 operation on a partial sum).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}
EPILOGUE_OPERATIONS = 8

Array = NDArray[np.float64]


def linear_bound(
    y64: Array,
    gauge: Array,
    columns: int,
    dtype: torch.dtype,
    weight_roundings: int = 0,
    dot_dtype: torch.dtype | None = None,
) -> Array:
    """Largest permitted |error| per element. gauge: Σ|a||w| (+ |bias|), float64 [M, N].

    weight_roundings: how often the kernel rounds a decoded weight to `dot_dtype` before the dot.
    """
    u_in = UNIT_ROUNDOFF[dot_dtype or dtype]
    relative = weight_roundings * u_in + (columns + EPILOGUE_OPERATIONS) * 2.0**-24
    return UNIT_ROUNDOFF[dtype] * np.abs(y64) + relative * (1 + u_in) * gauge + 4 * SMALLEST[dtype]


def test_ratio(y: torch.Tensor, y64: Array, bound: Array) -> float:
    """max |y - y64| / bound; infinite where one is finite and the other is not."""
    got = y.detach().double().cpu().numpy()
    if got.shape != y64.shape:
        return np.inf
    finite = np.isfinite(y64)
    if not np.array_equal(np.isfinite(got), finite):
        return np.inf
    if not finite.any():
        return 0.0
    return float((np.abs(got - y64)[finite] / bound[finite]).max())


test_ratio.__test__ = False  # type: ignore[attr-defined]


def worst(y: torch.Tensor, y64: Array, bound: Array) -> str:
    """Where the ratio is largest: the line that a failure prints."""
    got = y.detach().double().cpu().numpy()
    ratio = np.nan_to_num(np.abs(got - y64) / bound, nan=np.inf)
    where = tuple(int(i) for i in np.unravel_index(int(ratio.argmax()), ratio.shape))
    return f"at {where}: got {got[where]!r}, want {y64[where]!r}, ratio {ratio[where]:.3g}"
