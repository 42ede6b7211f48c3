"""Quantising into a sum of packed weights, in torch, on the device of the weight.

The same steps as `lath.reference.sums.quantize`, which says what they mean; each part by the
quantiser of its own kind.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lath.formats import packing
from lath.formats.codec import Codec
from lath.formats.outliers import OutlierCodec, Outliers
from lath.formats.packed_weight import PackedWeight, WeightCodec
from lath.formats.qtensor import QTensor
from lath.formats.sum_codec import MixCodec, Part, SignsCodec, SumCodec
from lath.formats.sum_tensor import SumTensor
from lath.verbs.kinds import kind_of

# One packed weight and the columns of it, None for all.
_Piece = tuple[PackedWeight, Tensor | None]


def quantize(
    weight: Tensor,
    codec: SumCodec,
    search: bool = False,
    table: Tensor | None = None,
    importance: Tensor | None = None,
) -> SumTensor:
    """weight [N, K] fp16, bf16 or fp32 → SumTensor. importance: [K] or [N, K], not negative: what a
    squared error of a weight costs; None: the same everywhere. table: as for the first part.

    ValueError on NaN, infinity or overflow.
    """
    places, left, costs = _without_outliers(weight, codec, importance)
    weight = weight.float()
    pieces: list[_Piece] = []
    columns = None
    stored = torch.zeros_like(weight)
    for part in codec.parts:
        if isinstance(part, OutlierCodec):
            continue
        if isinstance(part, MixCodec):
            columns = _deal_groups(left, part, costs, search)
        elif isinstance(part, SignsCodec):
            columns = _order_salient(left, part, costs)
        coded = list(_quantize_part(left, part, columns, search, table))
        pieces += coded
        decoded = _decode_part(coded, weight)
        left = left - decoded
        stored += decoded
        table = None
    shape = (weight.shape[0], weight.shape[1])
    terms = [packed for packed, _ in pieces]
    if codec.outliers is not None and places is not None:
        values = weight.reshape(-1)[places] - stored.view(-1)[places]
        terms.append(Outliers.from_places(codec.outliers, shape, places, values))
    return SumTensor(codec, shape, terms, None if columns is None else columns.int())


def settle(
    weight: Tensor,
    codec: SumCodec,
    search: bool = True,
    table: Tensor | None = None,
    importance: Tensor | None = None,
) -> SumCodec:
    """The codec with the number of pairs of a mix of three widths that fits the weight; the
    arguments are those of `quantize`. See `lath.reference.sums.settle`."""
    if not codec.is_open:
        return codec
    _, left, costs = _without_outliers(weight, codec, importance)
    for part in codec.parts:
        if isinstance(part, MixCodec):
            return codec.with_pairs(_best_pairs(left, part, costs, search))
        left = left - _decode_part(list(_quantize_part(left, part, None, search, table)), left)
        table = None
    raise AssertionError("an open codec has a mix")


def _best_pairs(weight: Tensor, codec: MixCodec, costs: Tensor, search: bool) -> int:
    low, middle, high = (
        _group_errors(weight, own, codec.group, costs, search) for own in codec.codecs
    )
    ranked = _rank_groups(low - high, weight.shape[1], codec)
    raised = (high - middle)[ranked].cumsum(0)
    lowered = (low - middle)[ranked.flip(0)].cumsum(0)
    change = (raised + lowered)[: len(ranked) // 2]
    return int(torch.cat([change.new_zeros(1), change]).argmin())


def _without_outliers(
    weight: Tensor, codec: SumCodec, importance: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """int64 places of the outliers, the fp32 weight with 0 there, float64 costs of errors."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite: it has NaN or infinity")
    weight = weight.float()
    costs = torch.ones((), dtype=torch.float64, device=weight.device)
    if importance is not None:
        costs = importance.to(weight.device, torch.float64)
    if codec.outliers is None:
        return None, weight, costs
    places = choose_outliers(costs * weight.double().square(), codec.outliers)
    left = weight.clone()
    left.view(-1)[places] = 0
    return places, left, costs


def _decode_part(coded: list[_Piece], like: Tensor) -> Tensor:
    """What the terms of a part stand for, fp32 [N, K] as `like`, added first to last."""
    decoded = torch.zeros_like(like)
    for packed, own in coded:
        decoded[:, slice(None) if own is None else own] += packed.dequantize()
    return decoded


def choose_outliers(score: Tensor, codec: OutlierCodec) -> Tensor:
    """int64, ascending: where the largest scores [N, K] are; of equal scores the first ones."""
    flat, count = score.reshape(-1), codec.count((score.shape[0], score.shape[1]))
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=score.device)
    least = flat.topk(count, sorted=False).values.min()
    above = flat > least
    equal = (flat == least).nonzero().view(-1)[: count - int(above.sum())]
    return torch.cat([above.nonzero().view(-1), equal]).sort().values


def _quantize_part(
    weight: Tensor, part: Part, columns: Tensor | None, search: bool, table: Tensor | None
) -> Iterator[_Piece]:
    if isinstance(part, MixCodec):
        assert columns is not None
        for term in part.terms(weight.shape[1]):
            assert term.columns is not None
            own = columns[term.columns[0] : term.columns[1]]
            yield _quantize(weight[:, own], term.codec, search), own
    elif isinstance(part, SignsCodec):
        assert columns is not None
        cut = part.salient(weight.shape[1])
        for own, split in ((columns[:cut], search), (columns[cut:], True)):
            for packed in two_signs(weight[:, own], part.sign, split):
                yield packed, own
    else:
        assert not isinstance(part, OutlierCodec)
        yield _quantize(weight, part, search, table), None


def _quantize(
    weight: Tensor, codec: WeightCodec, search: bool, table: Tensor | None = None
) -> PackedWeight:
    packed: PackedWeight = kind_of(codec).function("quantize", "quantize")(
        weight, codec, search, table
    )
    return packed


def _deal_groups(weight: Tensor, codec: MixCodec, costs: Tensor, search: bool) -> Tensor:
    """The order of the columns of a mix, int64 [K]."""
    columns = weight.shape[1]
    gains = _group_errors(weight, codec.codecs[0], codec.group, costs, search) - _group_errors(
        weight, codec.codecs[-1], codec.group, costs, search
    )
    ranked = _rank_groups(gains, columns, codec)
    counts = codec.group_counts(columns)
    of_width = [own.sort().values for own in torch.split(ranked, list(counts[::-1]))][::-1]
    groups = torch.cat(of_width)
    inside = torch.arange(codec.group, device=weight.device)
    order = (groups[:, None] * codec.group + inside).reshape(-1)
    return order[order < columns]


def _rank_groups(gains: Tensor, columns: int, codec: MixCodec) -> Tensor:
    """Groups, those of the largest gains [G] first; the short last one before all."""
    if columns % codec.group:
        gains = torch.cat([gains[:-1], gains.new_full((1,), torch.inf)])
    return gains.argsort(descending=True, stable=True)


def _group_errors(weight: Tensor, codec: Codec, group: int, costs: Tensor, search: bool) -> Tensor:
    """Σ costs (w - ŵ)² of each group of columns, [G] float64."""
    difference = _quantize(weight, codec, search).dequantize().double() - weight
    errors = (costs * difference.square_()).sum(dim=0)
    padded = torch.nn.functional.pad(errors, (0, -len(errors) % group))
    return padded.view(-1, group).sum(dim=1)


def _order_salient(weight: Tensor, codec: SignsCodec, costs: Tensor) -> Tensor:
    """The order of the columns, salient ones first, int64 [K]."""
    score = (costs * weight.double().square()).sum(dim=0)
    ranked = score.argsort(descending=True, stable=True)
    cut = codec.salient(weight.shape[1])
    return torch.cat([ranked[:cut].sort().values, ranked[cut:].sort().values])


def two_signs(weight: Tensor, codec: Codec, split: bool) -> tuple[QTensor, QTensor]:
    """A weight [N, K] as two sums of signs: residual binarisation, or split by magnitude."""
    rows, columns = weight.shape
    size, groups = codec.group_size(columns), codec.num_groups(columns)
    codes = weight.new_zeros((2, rows, columns), dtype=torch.uint8)
    scales = weight.new_zeros((2, groups, rows), dtype=torch.float16)
    whole = columns // size * size
    for start, stop, width in ((0, whole, size), (whole, columns, columns - whole)):
        if start == stop or rows == 0:
            continue
        block = weight[:, start:stop].reshape(rows, -1, width)
        magnitude = block.double().abs()
        first, second = _split_scales(magnitude) if split else (2 * magnitude.mean(dim=-1), None)
        first = _store(first, codec)
        half = (first.float() / 2)[..., None]
        if second is None:
            second = 2 * (magnitude - half).abs_().mean(dim=-1)
        positive = block >= 0
        codes[0, :, start:stop] = positive.reshape(rows, -1)
        codes[1, :, start:stop] = (positive == (block.abs() >= half)).reshape(rows, -1)
        at = slice(start // size, start // size + block.shape[1])
        scales[0, at], scales[1, at] = first.T, _store(second, codec).T
    padded = torch.nn.functional.pad(scales, (0, -rows % packing.PANEL))
    one, two = (
        QTensor(codec, (rows, columns), packing.pack(codes[i], codec), padded[i].contiguous())
        for i in (0, 1)
    )
    return one, two


def _split_scales(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """hi + lo and hi - lo [N, G] of |w| [N, G, g] at the best break point."""
    ordered = magnitude.sort(dim=-1).values
    count = ordered.shape[-1]
    if count == 1:
        return 2 * ordered[..., 0], torch.zeros_like(ordered[..., 0])
    below = ordered.cumsum(dim=-1)
    total, below = below[..., -1:], below[..., :-1]
    small = torch.arange(1, count, device=magnitude.device)
    explained = below.square() / small + (total - below).square() / (count - small)
    best = explained.argmax(dim=-1, keepdim=True)
    low = below.gather(-1, best) / small[best]
    high = (total - below.gather(-1, best)) / (count - small[best])
    return (high + low)[..., 0], (high - low)[..., 0]


def _store(exact: Tensor, codec: Codec) -> Tensor:
    stored = exact.float().half()
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(
            f"weight is too large for {codec}: a scale of {float(exact.max()):.3g} overflows fp16"
        )
    return stored
