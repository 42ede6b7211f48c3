"""`lath.decode_attention`: attention over a `PagedKV`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lath.formats.attention import PageView, ScoreOptions
from lath.formats.plan import Backend
from lath.formats.selection import IndexList
from lath.verbs.attention_options import (
    Shape,
    check_choice,
    check_device,
    check_lengths,
    check_scores,
    choose_precision,
    choose_query,
)
from lath.verbs.backends import resolve_backend
from lath.verbs.checks import check_flag, check_size, check_tensor
from lath.verbs.index_lists import check_lists
from lath.verbs.page_operators import attend
from lath.verbs.paged_kv import PagedKV
from lath.verbs.queries import check_query, queries_of, scaled_query
from lath.verbs.sparse import Sparse, check_repair, run_sparse

BITS = 32  # of a word of ScoreOptions.tree


def decode_attention(
    q: Tensor,
    kv: PagedKV,
    *,
    causal: bool = True,
    window: int | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    tree_mask: Tensor | None = None,
    query_lengths: Any = None,
    query: str = "auto",
    precision: str = "auto",
    scheme: str = "online",
    draft: bool = False,
    pages: IndexList | None = None,
    repair: bool | str = False,
    splits: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """softmax(scale * q kᵀ + …) v over the keys and values of a cache, which already holds the
    queries' own tokens.

    q: [B, Hq, Lq, D] of the cache's dtype and device, any Lq >= 0; Hq a multiple of the cache's
    heads (query head h reads KV head h // (Hq // Hkv)). Row i stands at position i + n - Lq of the
    n keys of its sequence.
    causal: read only keys at or before that position. window: read only keys less than `window`
    positions away. mask (bool, True = read) and bias (float, added): broadcastable to [B, Hq, Lq,
    len(kv)]. alibi: [Hq] slopes; slope * distance is subtracted. scale: default D**-0.5. softcap:
    s → softcap * tanh(s / softcap), before bias. sink: [Hq] scores that join the denominator alone.
    tree_mask: which of the last Lq keys (the tree's nodes) each row reads, in place of `causal`;
    all earlier keys are read. bool [Lq, Lq] or [B, Lq, Lq], or int64 bit masks [Lq] or [B, Lq]
    (bit j: node j; Lq <= 64).
    query_lengths: [B] ints or tensor, rows that each sequence has (the first ones; the others come
    out as 0); the sequence's own number stands for Lq above. None for all.
    query: how q is rounded for quantised keys: "int8", "e4m3" (int4, int2 and e4m3 keys: FireQ), or
    "auto": "e4m3" for e4m3 keys, else "int8". precision: of P·V: "float", "int8" or "int16" for
    integer values, "e4m3" or "float" for e4m3, "float" for float values; "auto": the first that the
    values admit of "int8", "e4m3", "float". scheme: "online", or "unified" (one maximum from the
    pages' bounds, FlashDecoding++; same result; no CPU kernel). draft: read the draft view
    (`PagedKV.draft`). pages: read only these pages or tokens (`lath.select`, `lath.index_list`) and
    the cache's float parts. repair: False; True or "spreads": add what the index rows of the pages
    say of the tokens that were not read (worse than nothing where values and scores of a page go
    together, as in some models); "centroids": by their mean keys alone, which gives a page that was
    not read no more weight than it has; "centroids:25%", "spreads:50%": a share of that weight;
    none of these with window, mask, bias, alibi or softcap. "mean": mix in the mean of all values
    by the mass that the list claims to hold (SparQ; lists of "sparq", "tokenselect" and "hgca"
    claim one). splits: pieces of the key list, None for the plan's choice. backend: "auto" is the
    cache's.

    Returns o [B, Hq, Lq, E] of q's dtype; with return_lse also lse fp32 [B, Hq, Lq], natural log. A
    row that reads nothing is 0 with lse -inf (or the sink). backward raises NotImplementedError.
    """
    if not isinstance(kv, PagedKV):
        raise TypeError(f"kv must be a lath.PagedKV, got {type(kv).__name__}")
    q = check_query(q, kv)
    batch, heads, rows, _ = q.shape
    shape = Shape(batch, heads, rows, len(kv), q.device)
    given = {
        "causal": causal, "window": window, "mask": mask, "bias": bias, "alibi": alibi,
        "scale": scale, "softcap": softcap, "sink": sink,
    }  # fmt: skip
    scores = check_scores(shape, given, kv.format.key_dim)
    tree = None if tree_mask is None else check_tree(tree_mask, shape)
    options = ScoreOptions(
        **scores,
        tree=tree,
        query=choose_query(query, kv.format),
        precision=choose_precision(precision, kv.format),
        scheme=check_choice("scheme", scheme, ("online", "unified")),  # type: ignore[arg-type]
    )
    if splits is not None and check_size("splits", splits) == 0:
        raise ValueError("splits must be 1 or more, or None, got 0")
    lengths = check_lengths("query_lengths", query_lengths, batch, rows)
    view = kv.view(check_flag("draft", draft))
    check_scheme(options, view)
    check_positions(kv, given, rows)
    row = scaled_query(q, kv)
    chosen = resolve_backend(kv.backend if backend == "auto" else backend, q.device)
    if pages is None:
        if repair is not False:
            raise ValueError(f"repair={repair!r} needs pages: there is nothing to repair")
        o, lse = run_decode(row, view, options, lengths, splits, chosen)
    else:
        selection = Sparse(check_lists(pages, view, heads), check_repair(repair, options, pages))
        o, lse = run_sparse(row, kv, view, selection, options, lengths, splits, chosen)
    if q.requires_grad and torch.is_grad_enabled():
        o = _NoBackward.apply(o, q)  # type: ignore[no-untyped-call]
    return (o, lse) if check_flag("return_lse", return_lse) else o


def check_positions(kv: PagedKV, given: dict[str, Any], rows: int) -> None:
    """Positions must be known to those options that count by them."""
    if kv.exact_positions:
        return
    why = (
        "goes by positions, and this cache does not know those of all its tokens any more "
        "(compact(renumber=False), append(keep=), compact_frequencies)"
    )
    for name in ("window", "mask", "bias", "alibi"):
        if given[name] is not None:
            raise NotImplementedError(f"{name} {why}")
    # Rows read what stands before them: right as long as that is exact from the first row on.
    for exact, length in zip(kv.exact_from, kv.lengths, strict=True):
        if rows > 1 and exact > length - rows + 1:
            raise NotImplementedError(f"q of {rows} rows {why}")


def run_decode(
    q: Tensor,
    view: PageView,
    options: ScoreOptions,
    query_lengths: list[int] | None,
    splits: int | None,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """`decode_attention` with its arguments checked: o [B, Hq, Lq, E] and lse fp32 [B, Hq, Lq].

    q: already multiplied by the cache's key channel scales.
    """
    return attend(queries_of(q, query_lengths), view, options, backend, splits)


class _NoBackward(torch.autograd.Function):
    """o as it is, in q's graph: a gradient that would be missing is an error, not a zero."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, q: Tensor) -> Tensor:
        return o.view_as(o)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "lath.decode_attention has no backward: a cache holds rounded numbers and no graph"
        )


def check_scheme(options: ScoreOptions, view: PageView) -> None:
    """The bound of "unified" is one of scale * q·k over whole pages: nothing may exceed it."""
    if options.scheme != "unified":
        return
    for name, present in (
        ("bias", options.bias is not None),
        ("alibi", options.alibi is not None),
        ("draft", view.draft),
    ):
        if present:
            raise NotImplementedError(
                f"scheme 'unified' cannot be combined with {name}: its bound does not cover it; "
                "scheme must be 'online'"
            )


def check_tree(tree_mask: Any, shape: Shape) -> Tensor:
    """A tree mask as `ScoreOptions.tree`: int32 [B, Lq, W]."""
    tensor = check_tensor("tree_mask", tree_mask, (torch.bool, torch.int64))
    check_device("tree_mask", tensor, shape.device)
    batch, rows = shape.batch, shape.rows
    per_row = (rows, rows) if tensor.dtype == torch.bool else (rows,)
    if tuple(tensor.shape) not in (per_row, (batch, *per_row)):
        raise ValueError(
            f"tree_mask must be {list(per_row)} or {[batch, *per_row]} of "
            f"{str(tensor.dtype).removeprefix('torch.')}, got shape {[*tensor.shape]}"
        )
    tensor = tensor.expand(batch, *per_row)
    words = -(-rows // BITS)
    if tensor.dtype == torch.int64:
        if rows > 64:
            raise ValueError(f"tree_mask as bits holds 64 nodes, got {rows} rows: give a bool one")
        return (
            tensor.contiguous().view(torch.int32).reshape(batch, rows, 2)[..., :words].contiguous()
        )
    padded = tensor.new_zeros((batch, rows, words * BITS))
    padded[..., :rows] = tensor
    weights = 2 ** torch.arange(BITS, dtype=torch.int64, device=tensor.device)
    bits = (padded.view(batch, rows, words, BITS) * weights).sum(dim=-1)
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
