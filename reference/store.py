"""The definitions of what `PagedKV` does to tokens that it holds, in NumPy, float64.

FreqKV: tokens along which a signal changes slowly are fewer tokens. DeltaLLM: a key that differs
little from the one before repeats it. PagedEviction: which pages go.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def dct_matrix(size: int) -> Array:
    """The orthonormal DCT-II: coefficient k of x is Σ x[n] w[k] cos(π (2n + 1) k / 2N), with w[0] =
    sqrt(1/N), the others sqrt(2/N)."""
    k, n = np.arange(size)[:, None], np.arange(size)[None, :]
    weights = np.where(k == 0, math.sqrt(1 / size), math.sqrt(2 / size))
    return weights * np.cos(np.pi * (2 * n + 1) * k / (2 * size))


def low_frequencies(x: Array, kept: int) -> Array:
    """x [N, C] → [kept, C]: coefficients 0 .. kept - 1, back by the inverse of size `kept`, times
    sqrt(kept / N): a constant stays the same constant. kept = N gives x."""
    coefficients = dct_matrix(len(x))[:kept] @ x
    return math.sqrt(kept / len(x)) * dct_matrix(kept).T @ coefficients


def nominal_positions(positions: list[int], kept: int) -> list[int]:
    """Where the `kept` tokens of `low_frequencies` stand: token m covers the m-th of `kept` equal
    stretches of the old ones, and takes the position of the token at its middle."""
    tokens = len(positions)
    return [positions[(2 * m + 1) * tokens // (2 * kept)] for m in range(kept)]


def threshold_deltas(keys: Array, threshold: float) -> tuple[Array, NDArray[np.bool_]]:
    """keys [n, C] → keys with small deltas dropped, and where a delta is 0, bool [n, C].

    Channel by channel: a number whose difference to the last one that was kept is at most
    `threshold` repeats that; another is kept. The first is kept.
    """
    out, zero = keys.copy(), np.zeros(keys.shape, np.bool_)
    for channel in range(keys.shape[1]):
        for token in range(1, len(keys)):
            # What stands before is the last kept value, or repeats it.
            if abs(keys[token, channel] - out[token - 1, channel]) <= threshold:
                out[token, channel] = out[token - 1, channel]
                zero[token, channel] = True
    return out, zero


def norm_ratio(keys: Array, values: Array) -> float:
    """The mean of |v|₂ / |k|₂ over heads and tokens: keys [Hkv, n, D], values [Hkv, n, E]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.sqrt((values**2).sum(axis=2)) / np.sqrt((keys**2).sum(axis=2))
    return float(ratios.mean())


def evicted(
    scores: list[float], counts: list[int], held: int, budget: int, protected: int
) -> list[int]:
    """Which pages go so that `held` tokens become at most `budget`, in the order that they go.

    One at a time the page with the lowest score (NaN is the highest; the earlier of equal ones);
    never one of the last `protected`.
    """
    gone: list[int] = []
    while held > budget:
        free = [i for i in range(len(scores) - protected) if i not in gone]
        if not free:
            break
        lowest = free[0]
        for i in free[1:]:
            if scores[i] < scores[lowest] or (
                math.isnan(scores[lowest]) and not math.isnan(scores[i])
            ):
                lowest = i
        gone.append(lowest)
        held -= counts[lowest]
    return gone


def tokens_kept(scores: Array, budget: int, first: int, last: int) -> list[int]:
    """Which of n tokens with scores [n] are stored: the first and the last ones, and of the others
    those with the highest scores (NaN is the highest; the earlier of equal ones)."""
    tokens = len(scores)
    if tokens <= budget:
        return list(range(tokens))
    middle = range(first, tokens - last)
    ranked = sorted(middle, key=lambda i: (not math.isnan(scores[i]), -scores[i], i))
    chosen = ranked[: budget - first - last]
    return sorted([*range(first), *chosen, *range(tokens - last, tokens)])
