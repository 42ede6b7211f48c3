"""Round-to-nearest quantisation in torch of tables, ternary numbers and scales of 8 bits.

The steps of `lath.reference.codecs`: exact scales of all groups, the scales that are stored, then
codes. The same fp32 operations, so that codes and scales agree bit for bit (a ternary scale and a
learned table are sums in float64: they may differ in their last stored bit).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lath.formats import packing
from lath.formats import values as value_tables
from lath.formats.codec import Codec
from lath.formats.qtensor import SCALE_DTYPES, QTensor

_SMALLEST_SCALE = {"fp16": 2.0**-24, "fp32": 2.0**-126}
_RATIOS = [(64 - i) / 64 for i in range(33)]
_POWER_RATIOS = [1.0, 2.0, 0.5]
_ROW_RATIOS = [1.0, *(i / 16 for i in range(12, 25) if i != 16)]
_INNER_STEPS = [0, -1, 1]
_LLOYD_ROUNDS = 200
# Weights whose distances to a table are held at once: bounds the temporary memory.
_CHUNK_WEIGHTS = 1 << 22


def quantize_in_steps(weight: Tensor, codec: Codec, search: bool, table: Tensor | None) -> QTensor:
    """weight [N, K] → QTensor; ValueError on NaN, infinity or overflow."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite: it has NaN or infinity")
    weight = weight.float()
    if codec.values == "learned":
        table = learn_table(weight, codec) if table is None else table
    entries = entries_of(codec, table, weight.device)
    blocks = _blocks(weight, codec)
    exact = torch.cat([_best_scales(block, codec, entries, search) for block in blocks], dim=1)
    if codec.values == "ternary" and codec.group is None:
        mean = weight.double().abs().mean() if weight.numel() else weight.new_zeros(())
        exact = mean.float().expand_as(exact)
    scales, outer = store_scales(exact.T, codec)
    if search and codec.has_row_search and outer is not None:
        scales, outer = _search_rows(blocks, codec, exact, outer)
    rows, pad = weight.shape[0], (0, -weight.shape[0] % packing.PANEL)
    effective = effective_scales(scales, outer, codec).T
    codes, zeros, group = [], [], 0
    for block in blocks:
        own = effective[:, group : group + block.shape[1]]
        q, z = _nearest(block, own, codec, entries)
        codes.append(q.flatten(1))
        zeros.append(z)
        group += block.shape[1]
    kept = torch.cat(zeros, dim=1).T if codec.zero == "integer" else None
    if codec.values == "nested":  # no code stands for 0: the scale of a group of zeros must
        scales = torch.where(exact.T == 0, 0, scales)
    if outer is not None and codec.scale_dtype in ("int8", "fp8"):
        outer = torch.nn.functional.pad(outer, pad)
    return QTensor(
        codec, (rows, weight.shape[1]), packing.pack(torch.cat(codes, dim=1), codec),
        # Nothing to pad leaves the strides of a transpose, which no kernel follows.
        torch.nn.functional.pad(scales, pad).contiguous(),
        None if kept is None else torch.nn.functional.pad(kept, pad).contiguous(),
        outer, entries if codec.values == "learned" else None,
    )  # fmt: skip


def _blocks(weight: Tensor, codec: Codec) -> list[Tensor]:
    """The groups of a weight: whole ones [N, G, g], then the short last one [N, 1, rest]."""
    rows, columns = weight.shape
    size = codec.group_size(columns)
    whole = columns // size * size
    blocks = [weight[:, :whole].reshape(rows, columns // size, size)]
    if whole < columns:
        blocks.append(weight[:, None, whole:])
    return blocks


def entries_of(codec: Codec, table: Tensor | None, device: torch.device) -> Tensor:
    """fp32 [levels], the number of each code; empty where codes are whole numbers."""
    if not codec.is_table:
        return torch.empty(0, device=device)
    if codec.values != "learned":
        return torch.tensor(value_tables.table(codec.values), device=device)
    assert table is not None
    if tuple(table.shape) != (codec.levels,) or not bool(torch.isfinite(table).all()):
        raise ValueError(
            f"table of {codec} must be {codec.levels} finite numbers, got shape {[*table.shape]}"
        )
    if bool((table[1:] < table[:-1]).any()) or not bool(table.any()):
        raise ValueError(f"table of {codec} must ascend and hold a number that is not 0")
    return table.to(device=device, dtype=torch.float32)


def _best_scales(block: Tensor, codec: Codec, entries: Tensor, search: bool) -> Tensor:
    """Exact scales [N, G] of groups [N, G, g], before they are stored."""
    base = _exact_scale(block, codec, entries)
    ratios = _POWER_RATIOS if codec.scale_dtype == "e8m0" else _RATIOS
    if not search:
        return base
    best, best_loss = base, torch.full_like(base, math.inf, dtype=torch.float64)
    for ratio in ratios:
        scale = base * ratio
        safe = torch.where(scale == 0, 1.0, scale)
        if codec.scale_dtype in ("fp16", "fp32", "e8m0"):
            safe = effective_scales(store_scales(scale, codec)[0], None, codec)
        loss = _loss(block, safe, codec, entries)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best = torch.where(better, scale, best)
    return best


def _loss(block: Tensor, scale: Tensor, codec: Codec, entries: Tensor) -> Tensor:
    """Σ (ŵ - w)² of groups [N, G, g] for scales [N, G], float64 [N, G]."""
    q, z = _nearest(block, scale, codec, entries)
    return (_decode(q, scale, z, codec, entries) - block.double()).square_().sum(dim=-1)


def _search_rows(
    blocks: list[Tensor], codec: Codec, exact: Tensor, outer: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales uint8 [G, N] and outer fp16 [N] by the squared error of rows; exact [N, G]. See
    `lath.reference.codecs.search_rows`."""
    entries = exact.new_empty(0)
    best_loss = torch.full_like(outer, math.inf, dtype=torch.float64)
    best_row, best = outer, torch.zeros_like(exact, dtype=torch.uint8)
    for ratio in _ROW_RATIOS:
        row = (outer.float() * ratio).clamp_(2.0**-24, 65504).half()
        losses = torch.full_like(exact, math.inf, dtype=torch.float64)
        inner = torch.zeros_like(best)
        for step in _INNER_STEPS:
            near = torch.round(exact / row.float()[:, None]) + step
            byte = near.clamp_(1, codec.largest_inner_scale).to(torch.uint8)
            scales = effective_scales(byte.T, row, codec).T
            counts = [block.shape[1] for block in blocks]
            pairs = zip(blocks, scales.split(counts, dim=1), strict=True)
            found = [_loss(block, scale, codec, entries) for block, scale in pairs]
            better = torch.cat(found, dim=1) < losses
            losses = torch.where(better, torch.cat(found, dim=1), losses)
            inner = torch.where(better, byte, inner)
        total = losses.sum(dim=1)
        better = total < best_loss
        best_loss = torch.where(better, total, best_loss)
        best_row = torch.where(better, row, best_row)
        best = torch.where(better[:, None], inner, best)
    return best.T, best_row


def _exact_scale(block: Tensor, codec: Codec, entries: Tensor) -> Tensor:
    if block.numel() == 0:
        return block.new_zeros(block.shape[:2])
    if codec.values == "ternary":
        return block.double().abs().mean(dim=-1).float()
    amax = block.abs().amax(dim=-1)
    if codec.values == "nested":
        return amax / (codec.levels // 2)
    if codec.is_table:
        return amax / entries[torch.isfinite(entries)].abs().max()
    if codec.zero == "integer":
        span = block.amax(dim=-1).clamp(min=0) - block.amin(dim=-1).clamp(max=0)
        return span / (codec.levels - 1)
    return amax / (codec.levels / 2 - 0.5)


def _nearest(block: Tensor, scale: Tensor, codec: Codec, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, G, g] and zero points uint8 [N, G] for scales [N, G] > 0."""
    scaled = block / scale[..., None]
    zero = torch.zeros(scale.shape, dtype=torch.uint8, device=block.device)
    if codec.is_table:
        return nearest_entry(scaled, entries), zero
    top = codec.levels - 1
    if codec.values == "nested":
        code = torch.floor(scaled) + codec.levels // 2
        return code.clamp_(0, top).to(torch.uint8), zero
    offset: Tensor | float = codec.zero_code
    if codec.zero == "integer":
        low = block.amin(dim=-1).clamp(max=0) if block.numel() else torch.zeros_like(scale)
        zero = torch.round(-low / scale).clamp_(0, top).to(torch.uint8)
        offset = zero[..., None].float()
    return (torch.round(scaled) + offset).clamp_(0, top).to(torch.uint8), zero


def ascending(entries: Tensor) -> tuple[Tensor, Tensor]:
    """The finite entries by number, float64, and the code of each."""
    numbers = entries.tolist()
    # Of equal numbers (0 and -0 of a float) the even code alone, else the lower: what is left has
    # one code each.
    finite = [code for code, number in enumerate(numbers) if math.isfinite(number)]
    order = sorted(finite, key=lambda code: (numbers[code], code % 2, code))
    kept = [c for i, c in enumerate(order) if i == 0 or numbers[order[i - 1]] != numbers[c]]
    codes = torch.tensor(kept, dtype=torch.int64, device=entries.device)
    return entries[codes].double(), codes


def nearest_entry(
    x: Tensor, entries: Tensor, by_number: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The code of the finite entry nearest to each x; of two that are as near, the even code.

    by_number: `ascending(entries)`, where it is at hand.
    """
    values, codes = ascending(entries) if by_number is None else by_number
    flat, out = x.reshape(-1), []
    for part in flat.split(_CHUNK_WEIGHTS):
        wide = part.double()
        above = torch.searchsorted(values, wide).clamp(1, len(codes) - 1)
        left, right = wide - values[above - 1], values[above] - wide
        upper = (right < left) | ((right == left) & (codes[above] % 2 == 0))
        out.append(codes[torch.where(upper, above, above - 1)].to(torch.uint8))
    return torch.cat(out).reshape(x.shape) if out else x.to(torch.uint8)


def store_scales(exact: Tensor, codec: Codec) -> tuple[Tensor, Tensor | None]:
    """Exact scales [G, N] → stored ones and the outer ones: see `lath.reference.codecs`."""
    kind = codec.scale_dtype
    if kind in _SMALLEST_SCALE:
        return _store(exact, kind, codec), None
    if kind == "e8m0":
        mantissa = 2 * math.frexp(value_tables.largest(codec.values))[0]
        exponent = torch.frexp(torch.where(exact == 0, 1.0, exact) * mantissa).exponent - 1
        exponent = torch.where(exact == 0, 0, exponent)
        return (exponent.clamp(-127, 127) + 127).to(torch.uint8), None
    most = exact.max() if exact.numel() else exact.new_zeros(())
    if kind == "e4m3":
        outer = torch.where(most > 0, most / 448.0, 1.0).clamp(min=_SMALLEST_SCALE["fp32"])
        inner = (exact / outer).to(torch.float8_e4m3fn)
        smallest = torch.tensor(2.0**-9, device=exact.device).to(torch.float8_e4m3fn)
        inner = torch.where(inner.float() < 2.0**-9, smallest.float(), inner.float())
        return inner.to(torch.float8_e4m3fn).view(torch.uint8), outer.reshape(1)
    top = exact.amax(dim=0) if exact.shape[0] else exact.new_zeros(exact.shape[1])
    if kind == "fp8":
        row = _store(top / codec.largest_inner_scale, "fp32", codec)
        # The largest is within a rounding of the cap, which E4M3 holds: it rounds to it.
        inner = (exact / row).to(torch.float8_e4m3fn).float().clamp(min=2.0**-9)
        return inner.to(torch.float8_e4m3fn).view(torch.uint8), row
    row = _store(top / codec.largest_inner_scale, "fp16", codec)
    byte = torch.round(exact / row.float()).clamp_(1, codec.largest_inner_scale)
    return byte.to(torch.uint8), row


def _store(exact: Tensor, kind: str, codec: Codec) -> Tensor:
    floored = exact.clamp(min=_SMALLEST_SCALE[kind])
    stored = torch.where(exact == 0, torch.ones_like(exact), floored).to(SCALE_DTYPES[kind])
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(
            f"weight is too large for {codec}: a scale of {float(exact.abs().max()):.3g} overflows "
            f"{kind}; use '-s32' or scale the weight"
        )
    return stored


def effective_scales(scales: Tensor, outer: Tensor | None, codec: Codec) -> Tensor:
    """fp32, as `QTensor.effective_scales`."""
    if codec.scale_dtype == "e8m0":
        return torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - 127)
    if outer is None:
        return scales.float()
    inner = scales.view(torch.float8_e4m3fn) if codec.scale_dtype in ("e4m3", "fp8") else scales
    return inner.float() * outer.float()


def _decode(q: Tensor, scale: Tensor, zero: Tensor, codec: Codec, entries: Tensor) -> Tensor:
    """fp64 values of codes [N, G, g]."""
    if codec.is_table:
        return entries.double()[q.long()] * scale.double()[..., None]
    offset = zero.double()[..., None] if codec.zero == "integer" else codec.zero_code
    return (q.double() - offset) * scale.double()[..., None]


def learn_table(weight: Tensor, codec: Codec, importance: Tensor | None = None) -> Tensor:
    """fp32 [levels]: see `lath.reference.codecs.learn_table`. importance: float64 [K]."""
    parts, weights = [], []
    shares = None if importance is None else _blocks(importance[None], codec)
    for i, block in enumerate(_blocks(weight, codec)):
        if not block.numel():
            continue
        wide = block.double()
        amax = wide.abs().amax(dim=-1, keepdim=True)
        parts.append((wide / torch.where(amax == 0, 1.0, amax)).transpose(0, 1).flatten())
        mass = (amax**2).expand_as(wide)
        if shares is not None:
            mass = mass * shares[i]
        weights.append(mass.transpose(0, 1).flatten())
    values = torch.cat(parts) if parts else weight.new_zeros(0, dtype=torch.float64)
    own = torch.cat(weights) if weights else values
    if not bool(own.any()):
        raise ValueError(
            f"weight of {codec} must hold a number that is not 0: its table is learned"
        )
    values, order = values.sort(stable=True)
    own = own[order]
    zero = own.new_zeros(1)
    mass = torch.cat([zero, own.cumsum(0)])
    sums = torch.cat([zero, (own * values).cumsum(0)])
    places = (torch.arange(codec.levels, dtype=torch.float64) + 0.5) / codec.levels
    first = (places * len(values)).long().clamp(max=len(values) - 1).to(values.device)
    centres = values[first]
    ends = torch.zeros(codec.levels + 1, dtype=torch.int64, device=values.device)
    ends[-1] = len(values)
    for _ in range(_LLOYD_ROUNDS):
        edges = (centres[1:] + centres[:-1]) / 2
        ends[1:-1] = torch.searchsorted(values, edges, right=True)
        held, total = mass[ends].diff(), sums[ends].diff()
        centres = torch.where(held > 0, total / torch.where(held > 0, held, 1.0), centres)
        if importance is not None:
            outermost = centres.abs().argmax()
            centres[outermost] = centres[outermost].sign()
    centres[centres.abs().argmin()] = 0
    return centres.sort().values.float()
