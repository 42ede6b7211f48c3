"""Arguments of `attend` as the kernels take them, and what of them cannot be run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.formats.pages import PAGE
from lath.formats.plan import Plan

_DOTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# How q may be rounded before it meets keys, and weights before they meet values, by codec.
_QUERIES = {"int8": {"int8"}, "int8-planes": {"int8"}, "e4m3": {"e4m3"}}
_PRECISIONS = {"integer": ("float", "int8", "int16"), "e4m3": ("float", "e4m3")}


def check(queries: Queries, pages: PageView, options: ScoreOptions, plan: Plan) -> None:
    """ValueError for arguments that the kernels cannot run, naming what is accepted."""
    q, fmt = queries.q, pages.format
    allowed = _QUERIES.get(fmt.key.name, {"int8", "e4m3"})
    if fmt.key.map != "float" and options.query not in allowed:
        raise ValueError(
            f"query for {fmt.key} keys must be one of {sorted(allowed)}, got {options.query!r}"
        )
    precisions = _PRECISIONS.get(fmt.value.map, (options.precision,))
    if options.precision not in precisions:
        raise ValueError(
            f"precision for {fmt.value} values must be one of {precisions}, "
            f"got {options.precision!r}"
        )
    for name, tensor in (("records", pages.records), ("index", pages.index)):
        if not tensor.is_contiguous():
            raise ValueError(f"pages {name} must be contiguous, got strides {tensor.stride()}")
    if q.stride(3) != 1 and q.shape[3] > 1:
        raise ValueError(f"q must have last stride 1, got strides {q.stride()}")
    _check_lists(pages, q.shape[1])
    dots = {"int8"} if options.query == "int8" else {"e4m3", "fp16"}
    if fmt.key.map == "float":
        dots = {_DOTS[q.dtype]}
    _check_plan(plan, q.shape[1] // max(lists_of_heads(pages), 1), dots)


def _check_lists(pages: PageView, query_heads: int) -> None:
    if pages.list_heads not in (None, pages.num_kv_heads, query_heads):
        raise ValueError(
            f"pages table must hold a list for each of the {pages.num_kv_heads} KV heads or of the "
            f"{query_heads} query heads, got shape {tuple(pages.table.shape)}"
        )
    for name in ("starts", "counts", "tokens"):
        entries = getattr(pages, name)
        if entries is not None and entries.shape != pages.table.shape:
            raise ValueError(
                f"pages {name} must have the table's shape {tuple(pages.table.shape)}, "
                f"got {tuple(entries.shape)}"
            )
    if pages.tokens is not None and pages.list_heads is None:
        raise ValueError(
            f"pages tokens need lists of heads [S, H, P], got a table {tuple(pages.table.shape)}"
        )
    if pages.page_counts.shape != pages.table.shape[:-1]:
        raise ValueError(
            f"pages page_counts must be {tuple(pages.table.shape[:-1])} as the table's lists, "
            f"got {tuple(pages.page_counts.shape)}"
        )


def lists_of_heads(pages: PageView) -> int:
    """Lists of a sequence: as many as KV heads (perhaps one list for all), or as query heads."""
    return pages.num_kv_heads if pages.list_heads is None else pages.list_heads


def page_lists(pages: PageView) -> tuple[Any, ...]:
    """The lists as the kernels take them: (table, starts, counts, tokens, page_counts, strides of
    sequence and of head of the first four, of page_counts). tokens is a placeholder where there
    are none. Heads that read one list have stride 0."""
    lists = [pages.table, pages.starts, pages.counts]
    if pages.tokens is not None:
        lists.append(pages.tokens)
    strides = lists[0].stride()
    if strides[-1] != 1 or any(entries.stride() != strides for entries in lists):
        lists = [entries.contiguous() for entries in lists]
        strides = lists[0].stride()
    counts = pages.page_counts
    of_head, counts_of_head = (0, 0) if pages.list_heads is None else (strides[1], counts.stride(1))
    return (
        *lists[:3], lists[-1], counts, strides[0], of_head, counts.stride(0), counts_of_head,
    )  # fmt: skip


def list_mode(pages: PageView) -> int:
    """0: one list for all heads; 1: of each KV head; 2: of each query head."""
    if pages.list_heads is None:
        return 0
    return 1 if pages.list_heads == pages.num_kv_heads else 2


def _check_plan(plan: Plan, group: int, dots: set[str]) -> None:
    """group: query heads that read one list of pages. dots: types that q·k may be multiplied in."""
    if plan.dataflow not in ("prefill", "decode"):
        raise ValueError(
            f"plan dataflow for attention must be 'prefill' or 'decode', got {plan.dataflow!r}"
        )
    if plan.block_m not in (16, 32, 64, 128):
        raise ValueError(f"plan block_m must be 16, 32, 64 or 128, got {plan.block_m}")
    if plan.block_n != PAGE:
        raise ValueError(f"plan block_n must be a page, {PAGE}, got {plan.block_n}")
    if plan.pack < 1 or group % plan.pack:
        raise ValueError(
            f"plan pack must divide the {group} query heads of a list of pages, got {plan.pack}"
        )
    if plan.split_k < 1:
        raise ValueError(f"plan split_k must be 1 or more, got {plan.split_k}")
    if plan.dot not in dots:
        raise ValueError(f"plan dot must be one of {sorted(dots)} here, got {plan.dot!r}")


def float_parts(pages: PageView, q: Tensor) -> list[tuple[Any, ...]]:
    """Keys, values, lengths and strides of the two float parts; placeholders for none."""
    parts: list[tuple[Any, ...]] = []
    for keys, values, lengths in (
        (pages.first_keys, pages.first_values, pages.first_lengths),
        (pages.last_keys, pages.last_values, pages.last_lengths),
    ):
        if keys is None or values is None or lengths is None:
            parts.append((q, q, pages.lengths, *(0,) * 6))
        else:
            parts.append((keys, values, lengths, *keys.stride()[:3], *values.stride()[:3]))
    return parts


def score_tensors(options: ScoreOptions, queries: Queries, pages: PageView) -> list[Any]:
    """mask and bias with strides, alibi, sink, and tree with strides."""
    q, nothing = queries.q, pages.lengths
    shape = (pages.num_sequences, q.shape[1], queries.longest, pages.longest)
    extras: list[Any] = []
    for given in (options.mask, options.bias):
        if given is None:
            extras.append((nothing, 0, 0, 0, 0))
            continue
        seen = given.view(torch.uint8) if given.dtype == torch.bool else given
        seen = _broadcast(seen, shape)
        extras.append((seen, *seen.stride()))
    for given in (options.alibi, options.sink):
        extras.append(nothing if given is None else given.contiguous())
    tree = options.tree
    if tree is None:
        return [*extras, (nothing, 0, 0)]
    tree = tree.contiguous()
    return [*extras, (tree, tree.stride(0), tree.stride(1))]


def _broadcast(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[S, Hq, Lq, Lk] with stride 0 where it repeats; longer rows than asked for stay."""
    tensor = tensor.reshape((1,) * (4 - tensor.dim()) + tuple(tensor.shape))
    wanted = [max(size, own) for size, own in zip(shape, tensor.shape, strict=True)]
    return tensor.expand(wanted)
