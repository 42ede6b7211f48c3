"""Selection on a CPU: compiled kernels over index rows, shared by torch's threads.

Scores, lists and repair are those of the definition, computed in fp32. A result does not depend on
the number of threads.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from lath.formats.attention import PageView, Queries, QueryFormat
from lath.formats.pages import PAGE
from lath.formats.selection import PageScore

try:
    import numba  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the compiled CPU kernels need numba: pip install 'lath[cpu]'", name=error.name
    ) from error

from lath.kernels.attention.cpu_arguments import INDEX as ATTENTION_INDEX
from lath.kernels.select import cpu_tokens, cpu_top_k
from lath.kernels.select.arguments import (
    check,
    check_kind,
    check_labels,
    check_top_k,
    check_unread,
)
from lath.kernels.select.cpu_arguments import INDEX
from lath.kernels.select.cpu_labels import emit_label_scores
from lath.kernels.select.cpu_launch import SLOTS, block_of, divide
from lath.kernels.select.cpu_repair import emit_repair
from lath.kernels.select.cpu_scores import emit_page_scores
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import BF16, FP16, FP32
from lath.kernels.simd.isa import has_native_brain, host_isa
from lath.kernels.simd.workers import Slots, run_units

DTYPES = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
_TOKEN_SLOTS = Slots(*(ATTENTION_INDEX[n] for n in ("task", "thread_number", "thread_count")))
_TOP_K_SLOTS = Slots(*(cpu_top_k.INDEX[n] for n in ("task", "thread_number", "thread_count")))
# Scores whose largest are worth a thread: it takes a few microseconds to wake one.
_SCORES_OF_A_THREAD = 8192
_LOWEST = float("-inf")


def page_scores(
    queries: Queries,
    pages: PageView,
    kind: PageScore,
    scale: float,
) -> Tensor:
    """Scores fp32 [S, Hq, L, P] of pages; -inf for unused entries and rows a sequence has not got.

    queries: dense. pages: without lists. kind: "bound", "mean", "mass" or "floor".
    ValueError or TypeError for what is none of these.
    """
    check(queries, pages)
    check_kind(kind)
    q = queries.q
    sequences, heads, rows, _ = q.shape
    kv_heads, width = pages.num_kv_heads, pages.table.shape[1]
    scores = torch.full((sequences, heads, rows, width), _LOWEST)
    if scores.numel() == 0:
        return scores
    threads = torch.get_num_threads()
    division = divide(sequences, kv_heads, heads // kv_heads, rows, width, threads)
    block, alive = block_of(queries, pages, scale, division)
    block[INDEX["out"]] = scores.data_ptr()
    kernel = compile_kernel(emit_page_scores, kind, DTYPES[q.dtype])
    run_units(kernel, block, block.buffer_info()[0], division.units, SLOTS)
    del alive  # until here the kernel used it
    return scores


def token_scores(queries: Queries, pages: PageView, scale: float, query: QueryFormat) -> Tensor:
    """The scores of attention fp32 [S, Hq, L, 64 P]; -inf for tokens that do not count and rows
    that a sequence has not got.

    queries: dense. pages: without lists. query: how q is rounded over quantised keys, "int8" (not
    over e4m3 keys) or "e4m3"; float keys take it as it is. ValueError for another, packed queries
    and lists.
    """
    check(queries, pages)
    q, fmt = queries.q, pages.format
    if fmt.key.map != "float" and query not in ("int8", "e4m3")[fmt.key.map == "e4m3" :]:
        raise ValueError(
            f"query must be 'e4m3', or 'int8' over other keys than e4m3, got {query!r} over "
            f"{fmt.key} keys"
        )
    sequences, heads, rows, _ = q.shape
    kv_heads, width = pages.num_kv_heads, pages.table.shape[1]
    scores = torch.full((sequences, heads, rows, PAGE * width), _LOWEST)
    if scores.numel() == 0:
        return scores
    threads = torch.get_num_threads()
    division = cpu_tokens.divide(fmt, sequences, kv_heads, heads // kv_heads, rows, width, threads)
    block, alive = cpu_tokens.fill(queries, pages, scores, scale, division)
    key = "draft" if pages.draft and fmt.key.name == "int8-planes" else fmt.key.name
    brain = q.dtype == torch.bfloat16 and has_native_brain(host_isa())
    kernel = compile_kernel(
        cpu_tokens.emit_token_scores, key, "int8" if key == "float" else query, DTYPES[q.dtype],
        int(brain),
    )  # fmt: skip
    run_units(kernel, block, block.buffer_info()[0], division.units, _TOKEN_SLOTS)
    del alive
    return scores


def label_scores(
    queries: Queries,
    pages: PageView,
    labels: Tensor,
    label_scales: Tensor,
    label_channels: Tensor,
    rows_of: Tensor,
    scale: float,
) -> Tensor:
    """q·k over some channels fp32 [S, Hq, L, 64 P]; -inf for tokens that do not count and rows that
    a sequence has not got.

    queries: dense. pages: without lists. labels: int8 [N, Hkv, C, 64], or uint8 [N, Hkv, C, 32] of
    4 bits (tokens t and t + 32 in a byte), contiguous. label_scales: fp32 [N, Hkv]. label_channels:
    int32 [Hkv, C], the channel of each row of labels. rows_of: int32 [S, Hq, R], which of them a
    query head reads. ValueError or TypeError for what is none of these.
    """
    check(queries, pages)
    q = queries.q
    sequences, heads, rows, _ = q.shape
    check_labels(labels, label_scales, label_channels, rows_of, pages, heads)
    if not labels.is_contiguous():
        raise ValueError(f"labels must be contiguous, got strides {labels.stride()}")
    kv_heads, width = pages.num_kv_heads, pages.table.shape[1]
    scores = torch.full((sequences, heads, rows, PAGE * width), _LOWEST)
    if scores.numel() == 0:
        return scores
    threads, chosen = torch.get_num_threads(), rows_of.shape[2]
    group = heads // kv_heads
    division = divide(sequences, kv_heads, group, rows, width, threads, chosen=chosen)
    block, alive = block_of(queries, pages, scale, division)
    small = [tensor.contiguous() for tensor in (label_scales, label_channels, rows_of)]
    for name, tensor in zip(("label_scales", "label_channels", "rows_of"), small, strict=True):
        block[INDEX[name]] = tensor.data_ptr()
    at = INDEX["labels"]
    block[at] = labels.data_ptr()
    block[at + 1], block[at + 2] = labels.stride(0), labels.stride(1)
    block[INDEX["label_scales_page"]] = 4 * kv_heads
    block[INDEX["label_rows"]] = labels.shape[2]
    block[INDEX["out"]] = scores.data_ptr()
    packed, centred = labels.dtype == torch.uint8, pages.format.key.map != "float"
    kernel = compile_kernel(emit_label_scores, int(packed), int(centred), DTYPES[q.dtype])
    run_units(kernel, block, block.buffer_info()[0], division.units, SLOTS)
    del alive, small
    return scores


def repair(
    queries: Queries, pages: PageView, unread: Tensor, scale: float, spreads: bool = True
) -> tuple[Tensor, Tensor]:
    """o fp32 [S, Hq, L, E] and lse fp32 [S, Hq, L] (natural) of the tokens that were not read.

    queries: dense. pages: without lists. unread: fp32 [S, H, P], z of each entry for H = 1, Hkv or
    Hq lists: +inf where nothing of a page was read, -inf where all was. spreads: of scores of a
    page, else they are all that of its centre. Rows with nothing left: 0
    and -inf. Threads share sequences and KV heads, never the entries of a table. ValueError or
    TypeError for what is none of these.
    """
    check(queries, pages)
    q = queries.q
    sequences, heads, rows, _ = q.shape
    check_unread(unread, pages, heads)
    kv_heads, (_, lists, width) = pages.num_kv_heads, unread.shape
    o = torch.zeros((sequences, heads, rows, pages.format.value_dim))
    lse = torch.full((sequences, heads, rows), _LOWEST)
    if o.numel() == 0 or width == 0:
        return o, lse
    unread = unread if unread.stride(2) == 1 else unread.contiguous()
    threads = torch.get_num_threads()
    division = divide(sequences, kv_heads, heads // kv_heads, rows, width, threads, states=True)
    block, alive = block_of(queries, pages, scale, division)
    at = INDEX["unread"]
    block[at] = unread.data_ptr()
    block[at + 1], block[at + 2] = 4 * unread.stride(0), 4 * unread.stride(1)
    block[INDEX["sharing"]] = heads // lists
    block[INDEX["o"]], block[INDEX["lse"]] = o.data_ptr(), lse.data_ptr()
    own_lists = lists not in (1, kv_heads)
    kernel = compile_kernel(emit_repair, int(spreads), int(own_lists), DTYPES[q.dtype])
    run_units(kernel, block, block.buffer_info()[0], division.units, SLOTS)
    del alive
    return o, lse


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices int32 [..., min(k, P)] of the largest of fp32 scores [..., P], ascending, -1 behind.

    The lower index wins a tie; -inf is never taken; NaN is larger than everything. TypeError for
    other scores than float32, ValueError for k < 0.
    """
    check_top_k(scores, k)
    width = scores.shape[-1]
    k = min(k, width)
    indices = torch.empty((*scores.shape[:-1], k), dtype=torch.int32)
    if indices.numel() == 0:
        return indices
    scores = scores.contiguous()
    rows = scores.numel() // width
    units = min(rows, rows * width // _SCORES_OF_A_THREAD + 1)
    slot = -(-width // 16) * 64
    keys = torch.empty(min(torch.get_num_threads(), units) * slot, dtype=torch.uint8)
    block = array("q", bytes(8 * len(cpu_top_k.FIELDS)))
    addresses = (scores.data_ptr(), keys.data_ptr(), indices.data_ptr())
    block[:7] = array("q", (*addresses, rows, width, k, slot))
    kernel = compile_kernel(cpu_top_k.emit_top_k)
    run_units(kernel, block, block.buffer_info()[0], units, _TOP_K_SLOTS)
    return indices
