"""`lath.select`: which pages or tokens of a cache a query should read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from lath.formats.attention import PageView
from lath.formats.pages import PAGE
from lath.formats.selection import Granularity, Heads, IndexList
from lath.selectors import selector as parse_selector
from lath.selectors.base import Request, Scored, Selector, part_mass
from lath.verbs.attention_options import check_choice, check_lengths, check_number
from lath.verbs.backends import resolve_backend
from lath.verbs.budgets import Budget, TopMass, budget_tokens, budget_units, parse_budget
from lath.verbs.checks import check_size
from lath.verbs.paged_kv import PagedKV
from lath.verbs.queries import check_query, queries_of, scaled_query
from lath.verbs.select_backends import top_k


def select(
    q: Tensor,
    kv: PagedKV,
    selector: str | Selector,
    budget: int | float | str | TopMass,
    *,
    heads: str | None = None,
    recent: int | None = None,
    scale: float | None = None,
    query_lengths: Any = None,
    backend: str = "auto",
) -> IndexList:
    """Choose what `decode_attention(q, kv, pages=…)` reads of the cache's pages.

    q: [B, Hq, Lq, D], as for `decode_attention`. selector: a name ("quest", "sparq-32", …: see
    `lath.selectors`) or a `Selector`. budget: tokens of pages that each list may hold (an int, in
    whole pages for selectors of pages, at least one page), a share of the context (a float), a
    `TopMass`, or the text of one. A budget above the length is everything.
    heads: whose lists: "kv" (the query heads of a KV head share one), "query" (each its own) or
    "layer" (all share one); None: what the selector's authors do. Rows and heads that share a list
    vote by their softmax. recent: how many of the last full pages are read in any case; None: what
    the selector wants, mostly 1. These, the cache's float parts (first 64 tokens, unfilled last
    page) and pages that hold tokens of the queries themselves are outside the budget.
    scale, query_lengths, backend: as for `decode_attention`. scale > 0.

    Returns an `IndexList` of fixed width, without waiting for the device.
    """
    if not isinstance(kv, PagedKV):
        raise TypeError(f"kv must be a lath.PagedKV, got {type(kv).__name__}")
    q = check_query(q, kv)
    batch, query_heads, rows, dim = q.shape
    chosen, wanted = parse_selector(selector), parse_budget(budget)
    check_bounds(chosen, wanted)
    scale = dim**-0.5 if scale is None else check_number("scale", scale, positive=True)
    lengths = check_lengths("query_lengths", query_lengths, batch, rows)
    whose = chosen.default_heads if heads is None else check_whose(heads)
    resolved = resolve_backend(kv.backend if backend == "auto" else backend, q.device)
    view = kv.view()
    queries = queries_of(scaled_query(q, kv), lengths)
    lists = {"kv": kv.num_kv_heads, "query": query_heads, "layer": 1}[whose]
    hidden, most_hidden = hidden_pages(kv, view, rows)
    request = Request(queries, kv, view, scale, resolved, lists, hidden)
    kept = chosen.recent if recent is None else check_size("recent", recent)
    return pick(chosen, request, wanted, kept, most_hidden)


def check_whose(heads: Any) -> Heads:
    return check_choice("heads", heads, ("kv", "query", "layer"))  # type: ignore[return-value]


def check_bounds(selector: Selector, budget: Budget) -> None:
    """NotImplementedError for a budget by mass with a selector that knows no bounds."""
    if isinstance(budget, TopMass) and not selector.has_bounds:
        raise without_bounds(selector, budget)


def without_bounds(selector: Selector, budget: TopMass) -> NotImplementedError:
    return NotImplementedError(
        f"budget {str(budget)!r} needs bounds of what an entry holds, which selector "
        f"{str(selector)!r} has not; budget must be tokens or a share"
    )


def hidden_pages(kv: PagedKV, view: PageView, rows: int) -> tuple[Tensor | None, int]:
    """Pages that hold keys behind the first row's position, bool [S, P], and how many at most."""
    if rows <= 1:
        return None, 0  # the last row reads everything
    most = 0
    for span in kv.spans:
        late = 0
        for places in reversed(span.pages_at):
            if places[0] + len(places) <= span.length - rows + 1:
                break
            late += 1
        most = max(most, late)
    hidden = view.starts + view.counts > (view.lengths - rows + 1)[:, None]
    return hidden & (view.counts > 0), most


def pick(
    selector: Selector, request: Request, budget: int | float | TopMass, recent: int, hidden: int
) -> IndexList:
    """The list of the largest scores, with what is read in any case."""
    view, unit = request.view, selector.unit
    width, per_page = int(view.table.shape[1]), PAGE // unit
    if isinstance(budget, TopMass):
        size = width * per_page
    else:
        tokens = budget_tokens(budget, view.longest)
        request = dataclasses.replace(request, budget=tokens)
        free = budget_units(tokens, unit)
        size = free + (recent + hidden) * per_page
        if size >= width * per_page:
            return everything(request, selector.granularity)
    scored = selector.scores(request)
    scores = scored.scores.masked_fill(_always(request, recent, per_page), math.inf)
    if isinstance(budget, TopMass):
        scores = _cut_by_mass(selector, request, scores, budget.mass)
    indices = top_k(scores, size, request.backend)
    if selector.granularity == "token" and unit > 1:
        indices = _slots_of_units(request, indices, unit)
    ids = IndexList(
        indices, (indices >= 0).sum(-1, dtype=torch.int32), selector.granularity,
        always=_always(request, recent, 1 if selector.granularity == "page" else PAGE),
        strata=selector.strata,
    )  # fmt: skip
    return _with_mass(ids, scored, request)


def _slots_of_units(request: Request, indices: Tensor, unit: int) -> Tensor:
    """Lists of units [S, H, K] → of the slots of their tokens, int32 [S, H, K unit]."""
    token = torch.arange(unit, dtype=torch.int32, device=indices.device)
    slots = indices[..., None] * unit + token
    slots = torch.where(indices[..., None] >= 0, slots, -1).flatten(2)
    if request.whole:
        return slots
    # Pages that were cropped have slots that hold nothing: those go behind the last.
    counts = request.view.counts[:, None].expand(-1, slots.shape[1], -1)
    at = slots.clamp(min=0)
    there = (slots >= 0) & (at % PAGE < counts.gather(2, (at // PAGE).long()))
    order = torch.argsort((~there).to(torch.uint8), dim=2, stable=True)
    return torch.where(there, slots, -1).gather(2, order)


def everything(request: Request, granularity: Granularity) -> IndexList:
    """The lists that hold all there is, and all of the softmax."""
    view, heads = request.view, request.lists
    size = torch.ones_like(view.counts) if granularity == "page" else view.counts
    unit = 1 if granularity == "page" else PAGE
    token = torch.arange(unit, device=size.device)
    present = ((token < size[..., None]) & (view.counts > 0)[..., None]).flatten(1)
    numbers = torch.arange(present.shape[1], dtype=torch.int32, device=size.device)
    if granularity == "token":
        # Pages that were cropped have slots that hold nothing: those go behind the last.
        order = torch.argsort((~present).to(torch.uint8), dim=1, stable=True)
        numbers, present = order.to(torch.int32), present.gather(1, order)
    indices = torch.where(present, numbers, -1)[:, None].expand(-1, heads, -1)
    counts = present.sum(-1, dtype=torch.int32)[:, None].expand(-1, heads)
    mass = torch.ones(request.queries.q.shape[:3], device=size.device)
    return IndexList(indices, counts, granularity, mass)


def forced(request: Request, recent: int) -> Tensor:
    """bool [S, P]: pages that are read in any case."""
    view = request.view
    entry = torch.arange(view.table.shape[1], device=view.table.device)
    last = entry >= (view.page_counts - recent)[:, None]
    always = last & (view.counts > 0)
    return always if request.hidden is None else always | request.hidden


def _always(request: Request, recent: int, per_page: int) -> Tensor:
    """`forced`, as bool [S, 1, W] over so many units of each page: those that hold tokens."""
    known, key = request.kv.derived, f"always-{recent}-{per_page}"
    if request.hidden is None and key in known:
        mask: Tensor = known[key]
        return mask
    always = forced(request, recent)
    if per_page > 1:
        first = torch.arange(0, PAGE, PAGE // per_page, device=always.device)
        always = (always[..., None] & (first < request.view.counts[..., None])).flatten(1)
    if request.hidden is None:
        known[key] = always[:, None]
    return always[:, None]


def _cut_by_mass(selector: Selector, request: Request, scores: Tensor, mass: float) -> Tensor:
    """Scores with -inf from where the better ones hold `mass` of the softmax for certain.

    Entries in the order of their scores: the first k are enough when lower(first k, and the float
    parts) / (that + upper(the others)) >= mass for every row of the list.
    """
    bounds = selector.mass_bounds(request)
    if bounds is None:
        raise without_bounds(selector, TopMass(mass))
    lower, upper = bounds
    sequences, lists, width = scores.shape
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    per_row = order.repeat_interleave(lower.shape[1] // lists, dim=1)[:, :, None]
    per_row = per_row.expand(-1, -1, lower.shape[2], -1)
    held = torch.logcumsumexp(lower.gather(3, per_row).double(), dim=-1)
    held = torch.logaddexp(held, part_mass(request).double()[..., None])
    ahead = upper.gather(3, per_row).double().flip(-1)
    rest = torch.logcumsumexp(ahead, dim=-1).flip(-1)
    left = torch.cat([rest[..., 1:], rest.new_full((*rest.shape[:3], 1), -math.inf)], dim=-1)
    needed = (torch.sigmoid(held - left) < mass).sum(-1) + 1  # of each row
    rows = torch.arange(lower.shape[2], device=scores.device) < request.queries.lengths[:, None]
    needed = needed.masked_fill(~rows[:, None], 0)
    most = needed.reshape(sequences, lists, -1).amax(-1)
    rank = torch.zeros_like(order).scatter_(
        2, order, torch.arange(width, device=scores.device).expand_as(order).contiguous()
    )
    keep = (rank < most[..., None]) | (scores == math.inf)
    return scores.masked_fill(~keep, -math.inf)


def _with_mass(ids: IndexList, scored: Scored, request: Request) -> IndexList:
    """The list with the share of each row's softmax that it is taken to hold."""
    if scored.rows is None or scored.parts is None:
        return ids
    rows, lists = scored.rows, ids.num_heads
    heads = rows.shape[1] // lists
    at = ids.indices.long().clamp(min=0).repeat_interleave(heads, dim=1)[:, :, None]
    listed = rows.gather(3, at.expand(-1, -1, rows.shape[2], -1))
    used = (ids.indices >= 0).repeat_interleave(heads, dim=1)[:, :, None]
    listed = listed.masked_fill(~used, -math.inf)
    held = torch.logaddexp(torch.logsumexp(listed, dim=-1), scored.parts)
    total = torch.logaddexp(torch.logsumexp(rows, dim=-1), scored.parts)
    mass = torch.exp(held - total).masked_fill(total == -math.inf, 1.0)
    wanted = request.rows
    if mass.shape[2] != wanted:
        mass = mass.expand(-1, -1, wanted)
    return dataclasses.replace(ids, mass=mass)
