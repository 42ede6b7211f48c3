"""Selection on a GPU in Triton: scores of pages and tokens, the largest of them, and repair.

What a `Plan` of `plan_select` says becomes launches; nothing waits for the device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from lath.formats.attention import PageView, Queries, QueryFormat, ScoreOptions
from lath.formats.device import DeviceDescription, describe_gpu, known_device
from lath.formats.pages import PAGE, PageFormat
from lath.formats.plan import Plan
from lath.formats.selection import PageScore
from lath.kernels.attention import triton as attention
from lath.kernels.attention import triton_corrections as corrections
from lath.kernels.attention.plan import DTYPE_NAMES, INTERPRETED_DEVICE
from lath.kernels.attention.triton_arguments import check as check_attention
from lath.kernels.attention.triton_arguments import page_lists as lists_as_attended
from lath.kernels.select import triton_pages, triton_tokens, triton_top_k
from lath.kernels.select.arguments import (
    check,
    check_kind,
    check_labels,
    check_top_k,
    check_unread,
    page_lists,
)
from lath.kernels.select.plan import (
    MOST_IN_REGISTERS,
    SelectKind,
    keeps_rows,
    plan_select,
    plan_top_k,
)


def page_scores(
    queries: Queries,
    pages: PageView,
    kind: PageScore,
    scale: float,
    plan: Plan | None = None,
) -> Tensor:
    """fp32 [S, Hq, L, P]: scores of pages from their index rows; see `reference.select`.

    -inf for entries and rows that a sequence has not got. plan: of `plan_select`, made here where
    None. ValueError for arguments that the kernels cannot run.
    """
    check(queries, pages)
    check_kind(kind)
    q, width = queries.q, pages.table.shape[1]
    scores = torch.empty((*q.shape[:3], width), dtype=torch.float32, device=q.device)
    if scores.numel() == 0:
        return scores
    with attention.device_of(q):
        plan = plan or _plan(queries, pages, kind)
        arguments = settings_of(pages.format, plan, q)
        triton_pages.page_scores_kernel[_grid(q, pages, plan)](
            _rows_of(q), queries.lengths, page_lists(pages), _index_views(pages), scores,
            q.shape[1], pages.num_kv_heads, q.shape[2], width, plan.split_k, scale, KIND=kind,
            **arguments,
        )  # fmt: skip
    return scores


def repair(
    queries: Queries,
    pages: PageView,
    unread: Tensor,
    scale: float,
    plan: Plan | None = None,
    *,
    spreads: bool = True,
) -> tuple[Tensor, Tensor]:
    """o fp32 [S, Hq, L, E], lse fp32 [S, Hq, L], natural: what the index rows say of the tokens
    that were not read; see `reference.select`.

    unread: fp32 [S, H, P], H = 1, Hkv or Hq. spreads: of scores of a page, else they are all that
    of its centre. Rows that a sequence has not got, and those to which
    nothing was left, have o = 0 and lse = -inf. plan: of `plan_select`, made here where None.
    """
    check(queries, pages)
    check_unread(unread, pages, queries.q.shape[1])
    q, width, fmt = queries.q, pages.table.shape[1], pages.format
    o = torch.empty((*q.shape[:3], fmt.value_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if o.numel() == 0 or width == 0:
        return o.zero_(), lse.fill_(-torch.inf)
    lists = unread.shape[1]
    own_lists = lists not in (1, pages.num_kv_heads)
    with attention.device_of(q):
        given = {"own_lists": own_lists, "spreads": spreads}
        plan = plan or _plan(queries, pages, "repair", **given)
        output = (o, lse)
        if plan.split_k > 1:
            output = (
                o.new_empty((plan.split_k, *o.shape)),
                o.new_empty((plan.split_k, *lse.shape)),
            )
        triton_pages.repair_kernel[_grid(q, pages, plan)](
            _rows_of(q), queries.lengths, page_lists(pages), _index_views(pages),
            (unread.contiguous(), lists), output, q.shape[1], pages.num_kv_heads, q.shape[2], width,
            plan.split_k, scale, SPREADS=spreads, OWN_LISTS=own_lists, PARTIAL=plan.split_k > 1,
            **settings_of(fmt, plan, q),
        )  # fmt: skip
        if plan.split_k > 1:
            rows = attention.MERGE_ROWS
            corrections.merge_kernel[(triton.cdiv(lse.numel(), rows),)](
                *output, o, lse, lse.numel(), plan.split_k, DIM=fmt.value_dim,
                BLOCK_D=_power_of_two(fmt.value_dim), BLOCK_R=rows, num_warps=2,
            )  # fmt: skip
    return o, lse


def top_k(scores: Tensor, k: int, plan: Plan | None = None) -> Tensor:
    """int32 [..., min(k, P)] of fp32 [..., P]: the indices of the largest, ascending, -1 behind.

    The lower index wins a tie; -inf is never taken; NaN is larger than everything.
    """
    check_top_k(scores, k)
    width = scores.shape[-1]
    taken = min(k, width)
    out = torch.empty((*scores.shape[:-1], taken), dtype=torch.int32, device=scores.device)
    if out.numel() == 0:
        return out
    rows = out.numel() // taken
    kernel = triton_top_k.top_k_kernel
    if width > MOST_IN_REGISTERS:
        kernel = triton_top_k.radix_top_k_kernel
    with attention.device_of(scores):
        plan = plan or plan_top_k(
            rows=rows, width=width, k=taken, device=_device(scores), backend="triton"
        )
        kernel[(rows,)](
            scores.contiguous(), out, width, taken, BLOCK=plan.block_n, num_warps=plan.warps,
            num_stages=plan.stages,
        )  # fmt: skip
    return out


def token_scores(
    queries: Queries,
    pages: PageView,
    scale: float,
    query: QueryFormat,
    plan: Plan | None = None,
) -> Tensor:
    """fp32 [S, Hq, L, 64 P]: the scores that attention computes; see `reference.select`.

    query: how q is rounded over quantised keys, as in `attend`. -inf for tokens that do not count
    and rows that a sequence has not got. plan: of `plan_select`, made here where None.
    """
    check(queries, pages)
    q, width = queries.q, pages.table.shape[1]
    shape = (*q.shape[:3], PAGE * width)
    scores = torch.empty(shape, dtype=torch.float32, device=q.device)
    if scores.numel() == 0:
        return scores
    options = ScoreOptions(scale, query=query)
    with attention.device_of(q):
        plan = plan or _plan(queries, pages, "token")
        as_attended = _as_attended(plan, q, pages.format, query)
        check_attention(queries, pages, options, as_attended)
        settings = attention.settings_of(
            pages.format, q.dtype, pages.draft, attention.switches_of(queries, pages, options),
            as_attended, attention.target_of(q),
        )  # fmt: skip
        dtypes = (settings.key_dtype, settings.value_dtype, torch.float32)
        records = tuple(pages.records.view(dtype) for dtype in dtypes)
        grid = _grid(q, pages, plan)
        padded = grid[0] * plan.block_m
        prepared = attention.prepare_queries(
            queries, pages, as_attended, settings, 0, padded, records[2],
            lists_as_attended(pages),
        )  # fmt: skip
        kept = {name: settings.loop[name] for name in ("KEYS", "PAGES", "MATH", "PACK", "BLOCK_M")}
        triton_tokens.token_scores_kernel[grid](
            _rows_of(q), prepared[:3], records, queries.lengths, page_lists(pages), scores,
            q.shape[1], pages.num_kv_heads, q.shape[2], width, padded, plan.split_k, scale, **kept,
            STAGES=plan.stages, num_warps=plan.warps,
        )  # fmt: skip
    return scores


def label_scores(
    queries: Queries,
    pages: PageView,
    labels: Tensor,
    label_scales: Tensor,
    label_channels: Tensor,
    rows_of: Tensor,
    scale: float,
    plan: Plan | None = None,
) -> Tensor:
    """fp32 [S, Hq, L, 64 P]: q·k over the channels of some rows of labels; see `reference.select`.

    labels: int8 [N, Hkv, C, 64], or uint8 [N, Hkv, C, 32] of 4 bits (tokens t and t + 32 in a
    byte); label_scales: fp32 [N, Hkv]; label_channels: int32 [Hkv, C]; rows_of: int32 [S, Hq, R].
    plan: of `plan_select`, made here where None.
    """
    check(queries, pages)
    given = (labels, label_scales, label_channels, rows_of)
    check_labels(*given, pages, queries.q.shape[1])
    q, width, count = queries.q, pages.table.shape[1], rows_of.shape[2]
    shape = (*q.shape[:3], PAGE * width)
    scores = torch.empty(shape, dtype=torch.float32, device=q.device)
    if scores.numel() == 0:
        return scores
    bits = 8 if labels.dtype == torch.int8 else 4
    with attention.device_of(q):
        plan = plan or _plan(queries, pages, "label", labels=(count, bits))
        triton_tokens.label_scores_kernel[_grid(q, pages, plan)](
            _rows_of(q), queries.lengths, page_lists(pages), pages.index.view(torch.bfloat16),
            *(tensor.contiguous() for tensor in given), scores, q.shape[1], pages.num_kv_heads,
            q.shape[2], width, plan.split_k, scale,
            LABELS=(labels.shape[2], count, _power_of_two(count, 16), bits),
            CENTRED=pages.format.key.map != "float", STRIDE=pages.format.index_bytes // 2,
            BLOCK_M=plan.block_m, STAGES=plan.stages, num_warps=plan.warps,
        )  # fmt: skip
    return scores


def _plan(queries: Queries, pages: PageView, kind: SelectKind, **given: Any) -> Plan:
    q = queries.q
    fmt = dataclasses.replace(pages.format, float_bytes=q.dtype.itemsize)
    return plan_select(
        sequences=q.shape[0], query_heads=q.shape[1], kv_heads=pages.num_kv_heads,
        queries=q.shape[2], pages=pages.table.shape[1], fmt=fmt, kind=kind, device=_device(q),
        backend="triton", **given,
    )  # fmt: skip


def _as_attended(plan: Plan, q: Tensor, fmt: PageFormat, query: QueryFormat) -> Plan:
    """The plan under which the loop of attention would compute these scores."""
    dot = plan.dot
    if fmt.key.map == "float":
        dot = DTYPE_NAMES[q.dtype]
    elif query == "e4m3" and dot == "int8":  # of keys that int8 queries meet as well
        dot = "e4m3"
    return dataclasses.replace(plan, dataflow="decode", split_k=1, dot=dot)


def _device(x: Tensor) -> DeviceDescription:
    """Where kernels for x run."""
    if x.is_cuda:
        return describe_gpu(x.device.index)
    target = attention.target_of(x)
    return INTERPRETED_DEVICE if target == "interpreter" else known_device(target)


def _grid(q: Tensor, pages: PageView, plan: Plan) -> tuple[int, int, int]:
    tiles = triton.cdiv(q.shape[2] * plan.pack, plan.block_m)
    return tiles, q.shape[1] // plan.pack, pages.num_sequences * plan.split_k


def _rows_of(q: Tensor) -> tuple[Any, ...]:
    return (q, *q.stride()[:3])


def _index_views(pages: PageView) -> tuple[Tensor, Tensor, Tensor]:
    views = (torch.bfloat16, torch.int8, torch.float32)
    return tuple(pages.index.view(dtype) for dtype in views)  # type: ignore[return-value]


def settings_of(fmt: PageFormat, plan: Plan, q: Tensor) -> dict[str, Any]:
    """Constexpr arguments and options of the kernels over index rows."""
    fields = fmt.index_fields
    blocks = (_power_of_two(channels, 16) for channels in (fmt.key_dim, fmt.value_dim))
    return {
        "INDEX": (
            fmt.index_bytes // 2, fmt.index_bytes, fmt.index_bytes // 4, fields["max"].offset,
            fields["min"].offset, fields["deviation"].offset, fields["numbers"].offset // 4,
            fields["value_mean"].offset // 2,
        ),
        "DIMS": (fmt.key_dim, fmt.value_dim, *blocks),
        "RELOAD": not keeps_rows(dataclasses.replace(fmt, float_bytes=q.dtype.itemsize)),
        "BLOCK_R": plan.block_m,
        "BLOCK_P": plan.block_n,
        "STAGES": plan.stages,
        "num_warps": plan.warps,
    }  # fmt: skip


def _power_of_two(value: int, low: int = 1) -> int:
    return max(low, 1 << max(value - 1, 0).bit_length())
