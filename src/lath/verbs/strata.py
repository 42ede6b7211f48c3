"""Strata: groups of a cache's tokens with index rows of their own, in torch.

What they are: `lath.reference.strata`. To scores and repair a stratum is a page, so that the
kernels over index rows read them as they read pages.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lath.formats.activations import SMALLEST_ABSMAX
from lath.formats.attention import PageView, Queries
from lath.formats.page_pool import SideTable
from lath.formats.pages import INDEX_LEVELS, PAGE, PageFormat
from lath.formats.selection import IndexList, Strata
from lath.verbs.page_decode import decode_pages, read_field
from lath.verbs.paged_kv import PagedKV

_PAGES_AT_ONCE = 64  # their float64 numbers stay near


@dataclass(frozen=True)
class Places:
    """Strata by the number of each token's, int64 [..., n]; `count` for one in none."""

    of: Tensor
    count: int

    def reduce(self, x: Tensor, how: str) -> Tensor:
        """Numbers of tokens [..., n, C] → of strata [..., count, C], 0 of one without tokens."""
        shape = (*x.shape[:-2], self.count + 1, x.shape[-1])
        places = self.of[..., None].expand(x.shape)
        out = x.new_zeros(shape).scatter_reduce(-2, places, x, how, include_self=False)
        return out[..., : self.count, :]

    def spread(self, x: Tensor) -> Tensor:
        """Numbers of strata [..., count, C] → of their tokens [..., n, C]; 0 for one in none."""
        wide = torch.nn.functional.pad(x, (0, 0, 0, 1))
        return wide.gather(-2, self.of[..., None].expand(*self.of.shape, x.shape[-1]))


@dataclass(frozen=True)
class Runs:
    """Strata of `unit` tokens side by side, of which those `used`, bool [..., n], count."""

    used: Tensor
    unit: int

    def reduce(self, x: Tensor, how: str) -> Tensor:
        """As of `Places`."""
        nothing = {"sum": 0.0, "amax": -math.inf, "amin": math.inf}[how]
        kept = x if bool(self.used.all()) else x.masked_fill(~self.used[..., None], nothing)
        runs = kept.reshape(*x.shape[:-2], -1, self.unit, x.shape[-1])
        out: Tensor = getattr(runs, how)(dim=-2)
        return out if kept is x else out.masked_fill(out == nothing, 0.0)

    def spread(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.unit, dim=-2)


def index_rows(keys: Tensor, values: Tensor, strata: Places | Runs, fmt: PageFormat) -> Tensor:
    """Index rows uint8 [..., count, index_bytes] of strata; zeros for one that has no tokens.

    keys: fp64 [..., n, D], values [..., n, E].
    """
    tokens = strata.reduce(torch.ones_like(keys[..., :1]), "sum")
    divisor = tokens.clamp(min=1)
    mean = (strata.reduce(keys, "sum") / divisor).float().bfloat16()
    centred = keys - strata.spread(mean.double())
    finite = strata.reduce(torch.isfinite(centred).all(-1, keepdim=True).double(), "amin")[..., 0]
    centred = torch.nan_to_num(centred, nan=0, posinf=0, neginf=0)
    largest, smallest = (strata.reduce(centred, how) for how in ("amax", "amin"))
    shift = strata.reduce(centred, "sum") / divisor
    variance = strata.reduce(centred.square(), "sum") / divisor - shift.square()
    amax = torch.maximum(largest, -smallest).amax(-1).float()
    unit = torch.where(amax < SMALLEST_ABSMAX, 1.0, amax / INDEX_LEVELS)
    step = unit.double()[..., None]
    # A quotient that is a whole number but for its rounding is that number.
    contents = {
        "mean": mean,
        "max": torch.ceil(torch.round(largest / step, decimals=6)).to(torch.int8),
        "min": torch.floor(torch.round(smallest / step, decimals=6)).to(torch.int8),
        "numbers": torch.stack(
            [unit.masked_fill(finite == 0, math.nan), tokens[..., 0].float()], -1
        ),
        "deviation": torch.round(2 * variance.clamp(min=0).sqrt() / step).clamp(max=255).byte(),
        "value_mean": (strata.reduce(values, "sum") / divisor).float().bfloat16(),
    }
    rows = torch.zeros((*tokens.shape[:-1], fmt.index_bytes), dtype=torch.uint8, device=keys.device)
    for name, numbers in contents.items():
        stored = numbers.contiguous().view(torch.uint8)
        first = fmt.index_fields[name].offset
        rows[..., first : first + stored.shape[-1]] = stored
    return rows * (tokens > 0)


def cut(kv: PagedKV, view: PageView, unit: int) -> PageView:
    """A view whose pages are units of `unit` tokens: entry i becomes entries i * 64/unit and up, of
    which those behind its last token have count 0."""
    known, name = kv.derived, f"units-{unit}"
    if name not in known:
        compute = functools.partial(_rows_of_units, kv.format, kv.dtype, unit)
        table = kv.pool.side_tables.setdefault(name, SideTable(compute))
        (rows,) = table.of(
            kv.pool, lambda: [page for span in kv.spans for page in span.pages], view.table
        )
        first = torch.arange(0, PAGE, unit, dtype=torch.int32, device=rows.device)
        known[name] = {
            "index": rows.flatten(0, 1),
            "table": (view.table[..., None] * len(first) + first // unit).flatten(1),
            "starts": (view.starts[..., None] + first).flatten(1),
            "counts": (view.counts[..., None] - first).clamp(0, unit).flatten(1),
            "page_counts": view.page_counts * len(first),
        }
    own = known[name]
    return dataclasses.replace(view, records=own["index"], **own)


def _rows_of_units(
    fmt: PageFormat, dtype: torch.dtype, unit: int, records: Tensor, index: Tensor
) -> tuple[Tensor]:
    """uint8 [n, 64/unit, Hkv, index_bytes]."""
    pieces = zip(*(torch.split(rows, _PAGES_AT_ONCE) for rows in (records, index)), strict=True)
    made = [
        index_rows(*decode_pages(own, few, fmt, dtype), Runs(written(few, fmt), unit), fmt)
        for own, few in pieces
    ]
    return (torch.cat(made).transpose(1, 2).contiguous(),)


def written(index: Tensor, fmt: PageFormat) -> Tensor:
    """bool [n, Hkv, 64]: the tokens that a page was written with."""
    tokens = read_field(index, fmt.index_fields["numbers"], torch.float32)[..., 1, None]
    return torch.arange(PAGE, device=index.device) < tokens


def units(kv: PagedKV, view: PageView, unit: int) -> Strata:
    """The units of `cut` as strata."""
    slots = torch.arange(view.table.shape[1] * PAGE, device=view.table.device)
    there = (slots % PAGE).reshape(-1, PAGE) < view.counts[..., None]
    of = torch.where(there.flatten(1), slots // unit, -1)
    return Strata(cut(kv, view, unit), of[:, None].expand(-1, view.num_kv_heads, -1))


def unread_of_strata(strata: Strata, ids: IndexList, rows: int) -> tuple[PageView, Tensor]:
    """The strata as what was chosen from, and `reference.select.unread_quantile` of each, fp32
    [S, H, C], H of the lists; with strata of each head [S * Hkv, H / Hkv, C].

    What was listed whatever its score was not chosen, and counts as in no stratum: read tokens are
    taken to be the best of theirs. A stratum that some of the `rows` last positions may not read
    wholly counts as read.
    """
    view, of, indices = strata.view, strata.of, ids.indices.long()
    of = of if strata.per_head else of[:, :1]
    if ids.always is not None and ids.granularity == "token":
        of = of.masked_fill(ids.always, -1)
    width, heads = view.table.shape[1], of.shape[1]
    counts = _count(of, width)  # [S, 1 or Hkv, C]
    if ids.num_heads < heads:
        indices = indices.expand(-1, heads, -1)
    sharing = indices.shape[1] // heads
    entries = of.repeat_interleave(sharing, dim=1).gather(2, indices.clamp(min=0))
    read = _count(entries.masked_fill(indices < 0, -1), width)
    share = read.double() / counts.repeat_interleave(sharing, dim=1).clamp(min=1)
    counts = counts.flatten(0, 1)
    late = counts == 0
    if rows > 1:
        late = late | (view.starts + view.counts > (view.lengths - rows + 1)[:, None])
    z = torch.special.ndtri(1 - share).float().reshape(view.num_sequences, -1, width)
    own = dataclasses.replace(view, counts=counts.int())
    return own, z.masked_fill(late[:, None], -math.inf)


def _count(of: Tensor, width: int) -> Tensor:
    """int64 [S, H, width]: how many of [S, H, n] are each number; -1 is none."""
    places = torch.where(of >= 0, of, width)
    total = of.new_zeros((*of.shape[:2], width + 1))
    return total.scatter_add_(2, places, torch.ones_like(places))[..., :width]


def queries_of_heads(queries: Queries, heads: int) -> Queries:
    """Queries [S, Hq, L, D] as those of S * heads sequences of Hq / heads query heads."""
    q = queries.q
    own = q.reshape(q.shape[0] * heads, q.shape[1] // heads, *q.shape[2:])
    return Queries(own, queries.lengths.repeat_interleave(heads), queries.longest)
