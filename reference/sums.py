"""The definition of a sum of packed weights, in NumPy: how it multiplies, how it is quantised.

    y = Σ_t A_t(x[:, columns_t]) W_tᵀ + bias

A_t is the activation format of the call, applied to the columns that term t multiplies, in their
order (a scale per token is one of these columns, not of all of x); outliers multiply x itself. With
int8 activations in groups that divide a mix's, A_t is the format of x in its own order: whole
groups move. Sums are float64 here; a backend adds terms in fp32, first to last, and rounds once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.outliers import OutlierCodec
from lath.formats.sum_codec import MixCodec, Part, SignsCodec, SumCodec
from lath.reference import codecs

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Places = NDArray[np.int64]


class Summed(NamedTuple):
    """What a `SumTensor` holds: a term per packed weight, the places n * K + k and fp16 values of
    the outliers, and the order of the columns."""

    terms: list[codecs.Quantised]
    columns: Places | None = None
    places: Places | None = None
    values: NDArray[np.float16] | None = None


class DecodedTerm(NamedTuple):
    """weight: float64 [N, K_t]. multiply: the term's own definition of a product, x [M, K_t] and an
    activation format to float64 [M, N]. columns: [K_t] of x, None for all. exact: multiplies x
    itself."""

    weight: Doubles
    multiply: Callable[[Floats, ActivationFormat], Doubles]
    columns: Places | None = None
    exact: bool = False


def multiply(
    x: Floats,
    terms: list[DecodedTerm],
    bias: Floats | None = None,
    activations: ActivationFormat | None = None,
) -> Doubles:
    """x [M, K], decoded terms, bias [N] → y [M, N] float64."""
    chosen = activations or ActivationFormat()
    y = np.zeros((len(x), len(terms[0].weight)))
    for term in terms:
        own = x if term.columns is None else x[:, term.columns]
        y = y + term.multiply(own, ActivationFormat() if term.exact else chosen)
    return y if bias is None else y + bias.astype(np.float64)


def dense(terms: list[DecodedTerm], columns: int) -> Doubles:
    """The weight [N, K] that the terms stand for, float64."""
    whole = np.zeros((len(terms[0].weight), columns))
    for term in terms:
        whole[:, slice(None) if term.columns is None else term.columns] += term.weight
    return whole


def quantize(
    weight: Floats, codec: SumCodec, search: bool = False, importance: Doubles | None = None
) -> Summed:
    """weight [N, K] fp32 → a sum whose other parts are `Codec`s.

    importance: what a squared error of a weight costs, not negative, [K] (the mean square of each
    input: the diagonal of the Hessian) or [N, K] (a squared gradient); None: 1. It decides which
    weights are outliers, how wide a group is and which columns are salient.

    1. Outliers are the weights of the largest importance · w² (of equal ones the first), and 0 for
       all other parts: nothing there stretches a range for them.
    2. Each part quantises what the parts before it left.
    3. Salient columns of signs take their residual, or with `search` the better of both: a split.
    4. Values of outliers are what is left of the weight there, in fp16: also where a codec has no
       code for 0, a sum then is within fp16's rounding of the weight.
    """
    places, left, costs = without_outliers(weight, codec, importance)
    found: list[codecs.Quantised] = []
    columns: Places | None = None
    stored = np.zeros(weight.shape, np.float32)
    for part in codec.parts:
        if isinstance(part, OutlierCodec):
            continue
        order, coded = quantize_part(left, part, costs, search)
        columns = columns if order is None else order
        found += [q for q, _, _ in coded]
        decoded = decode_part(coded, weight.shape)
        left = left - decoded
        stored = stored + decoded
    if places is None:
        return Summed(found, columns)
    values = weight.astype(np.float32).reshape(-1)[places] - stored.reshape(-1)[places]
    return Summed(found, columns, places, values.astype(np.float16))


def settle(
    weight: Floats, codec: SumCodec, search: bool = True, importance: Doubles | None = None
) -> SumCodec:
    """The codec with the number of pairs, groups of M - 1 and of M + 1 bits, that fits the weight:
    SliM-LLM's allocation of bits (2405.14917), searched over the one number that is free.

    Groups stand in the order of `deal_groups`. For p = 0, 1, …, half of all, the first p have the
    widest width and the last p the narrowest; of the sums of their errors Σ costs (w - ŵ)² the
    least is taken, of equal ones the fewest pairs. All p are looked at, so the fixed share is among
    them: the error grows for no weight. (With int8 scales of groups the errors are those of a whole
    weight in one width; a term's own row scale may differ.) search: of the ranges, as in
    `quantize`. A codec with nothing open is returned as it is.
    """
    if not codec.is_open:
        return codec
    _, left, costs = without_outliers(weight, codec, importance)
    for part in codec.parts:
        if isinstance(part, MixCodec):
            return codec.with_pairs(best_pairs(left, part, costs, search))
        _, coded = quantize_part(left, part, costs, search)
        left = left - decode_part(coded, weight.shape)
    raise AssertionError("an open codec has a mix")


def best_pairs(weight: Floats, codec: MixCodec, costs: Doubles, search: bool) -> int:
    """How many groups the narrowest and the widest width of three take: see `settle`."""
    low, middle, high = (group_errors(weight, own, costs, search) for own in codec.codecs)
    ranked = rank_groups(low - high, weight.shape[1], codec)
    raised = np.cumsum((high - middle)[ranked])
    lowered = np.cumsum((low - middle)[ranked[::-1]])
    change = np.concatenate([[0.0], (raised + lowered)[: len(ranked) // 2]])
    return int(change.argmin())


def without_outliers(
    weight: Floats, codec: SumCodec, importance: Doubles | None
) -> tuple[Places | None, Floats, Doubles]:
    """Where the outliers are, None without, the weight with 0 there, and what errors cost
    [N, K]."""
    costs = np.ones(weight.shape) * (1 if importance is None else importance)
    left = weight.astype(np.float32)
    if codec.outliers is None:
        return None, left, costs
    places = choose_outliers(costs * weight.astype(np.float64) ** 2, codec.outliers)
    left = left.copy()
    left.reshape(-1)[places] = 0
    return places, left, costs


def decode_part(
    coded: list[tuple[codecs.Quantised, Codec, Places]], shape: tuple[int, ...]
) -> Floats:
    """What the terms of a part stand for, [N, K] fp32, added first to last."""
    decoded = np.zeros(shape, np.float32)
    for q, codec, piece in coded:
        decoded[:, piece] += codecs.dequantize(
            q.codes, q.scales, q.zeros, codec, q.outer, q.table
        ).astype(np.float32)
    return decoded


def quantize_part(
    weight: Floats, part: Part, costs: Doubles, search: bool
) -> tuple[Places | None, list[tuple[codecs.Quantised, Codec, Places]]]:
    """The order of the columns if the part deals them out, and each term with its columns."""
    columns = np.arange(weight.shape[1])
    if isinstance(part, MixCodec):
        columns = deal_groups(weight, part, costs, search)
        own = [term.columns for term in part.terms(weight.shape[1]) if term.columns is not None]
        pieces = [columns[first:last] for first, last in own]
        return columns, [
            (codecs.quantize(weight[:, piece], codec, search), codec, piece)
            for piece, codec in zip(pieces, part.codecs, strict=True)
        ]
    if isinstance(part, SignsCodec):
        columns = order_salient(weight, part, costs)
        cut = part.salient(weight.shape[1])
        return columns, [
            (q, part.sign, piece)
            for piece, split in ((columns[:cut], search), (columns[cut:], True))
            for q in two_signs(weight[:, piece], part.sign, split)
        ]
    assert isinstance(part, Codec)
    return None, [(codecs.quantize(weight, part, search), part, columns)]


def choose_outliers(score: Doubles, codec: OutlierCodec) -> Places:
    """Where the largest scores [N, K] are, ascending; of equal scores the first ones."""
    count = codec.count((score.shape[0], score.shape[1]))
    return np.sort(np.argsort(-score.reshape(-1), kind="stable")[:count])


def deal_groups(weight: Floats, codec: MixCodec, costs: Doubles, search: bool) -> Places:
    """The order of the columns of a mix: groups of the narrowest width first, of one width in
    theirs. What a group gains is its error Σ costs (w - ŵ)² in the narrowest width less that in the
    widest; the largest gains take the widest (of equal gains the first; the short last group
    before all), and so on down: SliM-LLM's salience (2405.14917), measured where it is spent."""
    columns = weight.shape[1]
    gains = group_errors(weight, codec.codecs[0], costs, search) - group_errors(
        weight, codec.codecs[-1], costs, search
    )
    ranked = rank_groups(gains, columns, codec)
    counts = codec.group_counts(columns)
    starts = np.cumsum((0, *counts[::-1]))
    of_width = [np.sort(ranked[a:b]) for a, b in itertools.pairwise(starts)][::-1]
    every = np.arange(columns)
    parts = [every[g * codec.group : (g + 1) * codec.group] for own in of_width for g in own]
    return np.concatenate([*parts, every[:0]])


def rank_groups(gains: Doubles, columns: int, codec: MixCodec) -> Places:
    """Groups, those of the largest gains [G] first; the short last one before all."""
    if columns % codec.group:
        gains = np.append(gains[:-1], np.inf)
    return np.argsort(-gains, kind="stable")


def group_errors(weight: Floats, codec: Codec, costs: Doubles, search: bool) -> Doubles:
    """Σ costs (w - ŵ)² of each group of columns over all rows, [G] float64."""
    q = codecs.quantize(weight, codec, search)
    decoded = codecs.dequantize(q.codes, q.scales, q.zeros, codec, q.outer, q.table)
    errors = (costs * (decoded - weight) ** 2).sum(axis=0)
    size = codec.group_size(weight.shape[1])
    starts = np.arange(0, weight.shape[1], size)
    return np.array([errors[start : start + size].sum() for start in starts])


def order_salient(weight: Floats, codec: SignsCodec, costs: Doubles) -> Places:
    """Columns of the largest Σ_n costs w² first (of equal ones the first), each part ascending."""
    score = (costs * weight.astype(np.float64) ** 2).sum(axis=0)
    ranked = np.argsort(-score, kind="stable")
    cut = codec.salient(weight.shape[1])
    return np.concatenate([np.sort(ranked[:cut]), np.sort(ranked[cut:])])


def two_signs(
    weight: Floats, codec: Codec, split: bool
) -> tuple[codecs.Quantised, codecs.Quantised]:
    """w ≈ a1·B1 + a2·B2 with B1 the sign of w, for each (row, group): BiLLM (2402.04291).

    split False: a1 = mean|w|, a2 = mean of what a1·B1 leaves (residual binarisation). True: |w| is
    cut in two at the break point of the least squared error, with means lo and hi; a1 = (hi + lo)/2
    and a2 = (hi - lo)/2. In both, with the scales as they are stored, B2 = B1 where |w| >= a1, else
    -B1: the nearer of a1 + a2 and a1 - a2, so the two differ in their scales alone, and the best
    break point is never worse. A one-bit code stands for half its scale: 2 a1 and 2 a2 are stored.
    """
    size, groups = codec.group_size(weight.shape[1]), codec.num_groups(weight.shape[1])
    codes = np.zeros((2, *weight.shape), np.uint8)
    scales = np.zeros((2, groups, len(weight)), np.float16)
    for g in range(groups):
        block = weight[:, g * size : (g + 1) * size]
        magnitude = np.abs(block.astype(np.float64))
        first, second = _split_scales(magnitude) if split else (2 * magnitude.mean(axis=1), None)
        scales[0, g] = _store(first, codec)
        half = scales[0, g].astype(np.float32)[:, None] / 2
        large = np.abs(block) >= half
        if second is None:
            second = 2 * np.abs(magnitude - half.astype(np.float64)).mean(axis=1)
        scales[1, g] = _store(second, codec)
        codes[0, :, g * size : (g + 1) * size] = block >= 0
        codes[1, :, g * size : (g + 1) * size] = (block >= 0) == large
    return codecs.Quantised(codes[0], scales[0]), codecs.Quantised(codes[1], scales[1])


def _split_scales(magnitude: Doubles) -> tuple[Doubles, Doubles]:
    """hi + lo and hi - lo [N] of |w| [N, g] at the best of its g - 1 break points (the first of
    equal ones); 2|w| and 0 of a single column."""
    ordered = np.sort(magnitude, axis=1)
    count = ordered.shape[1]
    if count == 1:
        return 2 * ordered[:, 0], np.zeros(len(ordered))
    below = np.cumsum(ordered, axis=1)
    total, below = below[:, -1:], below[:, :-1]
    small = np.arange(1, count)
    explained = below**2 / small + (total - below) ** 2 / (count - small)
    best = explained.argmax(axis=1)
    rows = np.arange(len(ordered))
    low = below[rows, best] / small[best]
    high = (total[:, 0] - below[rows, best]) / (count - small[best])
    return high + low, high - low


def _store(exact: Doubles, codec: Codec) -> NDArray[np.float16]:
    """A scale in fp16, which may be 0."""
    with np.errstate(over="ignore"):
        stored = exact.astype(np.float32).astype(np.float16)
    if not np.isfinite(stored).all():
        raise ValueError(
            f"weight is too large for {codec}: a scale of {exact.max():.3g} overflows fp16"
        )
    return stored
