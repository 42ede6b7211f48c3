"""`attend` on a GPU in Triton: what a `Plan` says becomes launches. No choices are made here.

[prepare: codes of q, q·mean, bounds]   attend   [merge, where the keys are split]

Rows are taken in runs so long that q·mean (4 bytes per row, head and page) stays small.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lath.formats.activations import SMALLEST_ABSMAX
from lath.formats.attention import LOG2E, PageView, Queries, ScoreOptions
from lath.formats.device import has_e4m3
from lath.formats.pages import PageCodec, PageFormat
from lath.formats.plan import Plan
from lath.kernels.attention import triton_attend as loop
from lath.kernels.attention import triton_corrections as before
from lath.kernels.attention.triton_arguments import (
    check,
    float_parts,
    list_mode,
    page_lists,
    score_tensors,
)

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# Bytes that q·mean may take at once.
_MOST_CORRECTIONS = 256 << 20
MERGE_ROWS = 4


@dataclass(frozen=True)
class _Settings:
    """What formats, options and plan fix about the launches: computed once, kept."""

    query: str
    key_dtype: torch.dtype  # of the pointer through which keys are read; values likewise
    value_dtype: torch.dtype
    codes_dtype: torch.dtype
    loop: dict[str, Any]  # constexpr arguments of the attend loop
    prepare: dict[str, Any]
    prepare_rows: int  # rows of a program of the kernel before the loop, at most


# Codes and scales of q, q·mean and bounds, for a run of rows; placeholders where not made.
_Prepared = tuple[Tensor, Tensor, Tensor, Tensor]


def attend(
    queries: Queries, pages: PageView, options: ScoreOptions, plan: Plan
) -> tuple[Tensor, Tensor]:
    """o [B, Hq, L, E] of q's dtype and lse fp32 [B, Hq, L], in natural units.

    All tensors on one device. Rows that read nothing have o = 0 and lse = -inf (or the sink).
    plan: of `plan_attention` for the Triton backend. ValueError for one that cannot be run.
    """
    q = queries.q
    batch, heads, rows, _ = q.shape
    fmt = pages.format
    check(queries, pages, options, plan)
    packed = queries.offsets is not None
    o, lse = _outputs((batch, heads, rows), fmt.value_dim, q.dtype, q.device, packed)
    if o.numel() == 0 or queries.longest == 0 or pages.num_sequences == 0:
        return o.zero_(), lse.fill_(-torch.inf)
    with device_of(q):
        settings = settings_of(
            fmt, q.dtype, pages.draft, switches_of(queries, pages, options), plan, target_of(q)
        )
        if plan.split_k == 1:
            _attend(o, lse, queries, pages, options, plan, settings)
            return o, lse
        shape = (plan.split_k, batch, heads, rows)
        parts, logarithms = _outputs(shape, fmt.value_dim, torch.float32, q.device, packed)
        _attend(parts, logarithms, queries, pages, options, plan, settings)
        before.merge_kernel[(triton.cdiv(lse.numel(), MERGE_ROWS),)](
            parts, logarithms, o, lse, lse.numel(), plan.split_k,
            DIM=fmt.value_dim, BLOCK_D=_power_of_two(fmt.value_dim),
            BLOCK_R=MERGE_ROWS, num_warps=2,
        )  # fmt: skip
        return o, lse


def _outputs(
    shape: tuple[int, ...], channels: int, dtype: torch.dtype, device: torch.device, packed: bool
) -> tuple[Tensor, Tensor]:
    """Room for outputs [*shape, channels] and logarithms [*shape]."""
    if not packed:  # every row is written
        o = torch.empty((*shape, channels), dtype=dtype, device=device)
        return o, torch.empty(shape, dtype=torch.float32, device=device)
    # Rows between sequences belong to none, and no program writes them.
    o = torch.zeros((*shape, channels), dtype=dtype, device=device)
    return o, torch.full(shape, -torch.inf, dtype=torch.float32, device=device)


def _attend(
    o: Tensor,
    lse: Tensor,
    queries: Queries,
    pages: PageView,
    options: ScoreOptions,
    plan: Plan,
    settings: _Settings,
) -> None:
    """Launch the loop into o and lse, or into pieces of both."""
    q, sequences, width = queries.q, pages.num_sequences, pages.table.shape[-1]
    batch, heads, rows, _ = q.shape
    blocks = heads // plan.pack
    per_token = 4 * sequences * heads * max(width, 1) * (2 if options.scheme == "unified" else 1)
    run = max(_MOST_CORRECTIONS // per_token // plan.block_m, 1) * plan.block_m
    dtypes = (settings.key_dtype, settings.value_dtype, torch.float32)
    records = tuple(pages.records.view(dtype) for dtype in dtypes)
    lists = page_lists(pages)
    rows_of_q = (q, *q.stride()[:3])
    parts, extras = float_parts(pages, q), score_tensors(options, queries, pages)
    factor, cap = options.scale * LOG2E, 0.0
    if options.softcap is not None:
        factor, cap = 2 * factor / options.softcap, options.softcap * LOG2E
    offsets = queries.lengths if queries.offsets is None else queries.offsets
    lengths = (pages.lengths, queries.lengths, offsets)
    # Packed rows are counted within a sequence; dense ones all have to be written.
    last = rows if queries.offsets is None else queries.longest
    for first in range(0, last, run):
        tiles = triton.cdiv(min(run, last - first) * plan.pack, plan.block_m)
        padded = tiles * plan.block_m
        made = prepare_queries(queries, pages, plan, settings, first, padded, records[2], lists)
        loop.attend_kernel[(tiles, blocks, sequences * plan.split_k)](
            rows_of_q, made, records, lists, lengths, *parts, *extras, (o, lse, batch, rows),
            heads, pages.num_kv_heads, width, padded, first, plan.split_k,
            options.window or 0, factor, cap, **settings.loop,
            num_warps=plan.warps, num_stages=plan.stages, enable_fp_fusion=True,
        )  # fmt: skip


def prepare_queries(
    queries: Queries,
    pages: PageView,
    plan: Plan,
    settings: _Settings,
    first: int,
    padded: int,
    numbers: Tensor,
    lists: tuple[Any, ...],
) -> _Prepared:
    """Codes, scales, q·mean and bounds of the rows from token `first` on."""
    q, sequences, width = queries.q, pages.num_sequences, pages.table.shape[-1]
    heads = q.shape[1]
    bounds_needed = settings.prepare["BOUNDS"]
    if settings.query == "float" and not bounds_needed:
        return q, numbers, numbers, numbers
    shape = (sequences, heads // plan.pack, padded)

    def numbers_of(*sizes: int, wanted: bool) -> Tensor:
        if not wanted:
            return numbers
        return torch.empty(sizes, dtype=torch.float32, device=q.device)

    codes, rounded = q, settings.query != "float"
    if rounded:
        channels = settings.prepare["PADDED"]
        codes = torch.empty((*shape, channels), dtype=settings.codes_dtype, device=q.device)
    per_page = (sequences, heads // plan.pack, width, padded)
    made = (
        codes,
        numbers_of(*shape, wanted=rounded),
        numbers_of(*per_page, wanted=rounded),
        numbers_of(*per_page, wanted=bounds_needed),
    )
    block, pages_each = min(plan.block_m, settings.prepare_rows), settings.prepare["BLOCK_P"]
    offsets = queries.lengths if queries.offsets is None else queries.offsets
    grid = (padded // block, heads // plan.pack, sequences * max(1, triton.cdiv(width, pages_each)))
    before.prepare_kernel[grid](
        q, queries.lengths, offsets, pages.index.view(torch.bfloat16),
        pages.index.view(torch.int8), pages.index.view(torch.float32), lists,
        *made, *q.stride()[:3], heads, pages.num_kv_heads, width, padded, first,
        **settings.prepare, BLOCK_R=block, num_warps=8 if settings.prepare_rows == 16 else 4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return made


def switches_of(queries: Queries, pages: PageView, options: ScoreOptions) -> tuple[Any, ...]:
    """What of the arguments the launches are compiled for: (options of the scores, parts, ...)."""
    # A sequence's only query is its last token: it may read every key before it.
    causal = options.causal and options.tree is None and queries.longest > 1
    window = 0 if options.window is None else 1 if options.causal else 2
    scores = (
        causal, window, options.softcap is not None, options.mask is not None,
        options.bias is not None, options.alibi is not None, options.tree is not None,
        pages.tokens is not None,
    )  # fmt: skip
    parts = (pages.first_keys is not None, pages.last_keys is not None)
    lists = list_mode(pages)
    unified = options.scheme == "unified"
    return (
        scores, parts, lists, options.sink is not None, queries.offsets is not None, options.query,
        options.precision, unified,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def settings_of(
    fmt: PageFormat,
    dtype: torch.dtype,
    draft: bool,
    switches: tuple[Any, ...],
    plan: Plan,
    target: str,
) -> _Settings:
    scores, parts, lists, sink, packed, query, precision, unified = switches
    native = has_e4m3(target) and not (plan.dot == "fp16" and query == "e4m3")
    query = "float" if fmt.key.map == "float" else query
    query = "e4m3-fp16" if query == "e4m3" and not native else query
    precision = "float" if fmt.value.map == "float" else precision
    fields, index = fmt.fields, fmt.index_fields
    key_dtype, value_dtype = (_pointer(codec, dtype, native) for codec in (fmt.key, fmt.value))
    keys = _layout(fmt, "keys", fmt.key, draft, native, query != "float", key_dtype)
    values = _layout(fmt, "values", fmt.value, draft, native, True, value_dtype)
    scale_of = [
        fields[name].offset // 4 if name in fields else -1
        for name in ("value_scales", "key_scales", "token_scales")
    ]
    width = fmt.padded_key_dim
    # q in three parts, bounds and long rows take registers.
    prepare_rows = 32 if dtype == torch.float32 or unified or width > 128 else 64
    if prepare_rows == 32 and width > 128:
        prepare_rows = 16
    loop_arguments = {
        "KEYS": keys,
        "VALUES": values,
        "PAGES": (
            fmt.record_bytes // key_dtype.itemsize, fmt.record_bytes // value_dtype.itemsize,
            fmt.record_bytes // 4, *scale_of, fmt.key_dim, fmt.value_dim,
        ),
        "MATH": (query, precision, unified, _fp32_dot(target)),
        "OPTIONS": scores,
        "PARTS": parts,
        "LISTS": lists,
        "SINK": sink,
        "PACKED": packed,
        "PARTIAL": plan.split_k > 1,
        "BOUNDED": scores[1] > 0 or (scores[0] and plan.dataflow == "prefill"),
        "CLEAN": plan.dataflow == "prefill" and not (scores[3] or scores[7]),
        "P_TYPE": _TYPES[dtype],
        "FLOAT_BLOCK": max(16, _power_of_two(fmt.key_dim)),
        "PACK": plan.pack,
        "BLOCK_M": plan.block_m,
        "STAGES": plan.stages,
    }  # fmt: skip
    prepare = {
        "QUERY": query,
        "INDEX": (
            fmt.index_bytes // 2, fmt.index_bytes, index["max"].offset, index["min"].offset,
            fmt.index_bytes // 4, index["numbers"].offset // 4,
        ),
        "DIM": fmt.key_dim,
        "PADDED": width,
        "BLOCK_D": max(16, _power_of_two(width)),
        "BLOCK_P": prepare_rows,
        "BOUNDS": unified,
        "LISTS": lists,
        "PACKED": packed,
        "PACK": plan.pack,
        "SMALLEST": SMALLEST_ABSMAX,
    }  # fmt: skip
    codes = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "e4m3-fp16": torch.float16}
    return _Settings(
        query,
        key_dtype,
        value_dtype,
        codes.get(query, dtype),
        loop_arguments,
        prepare,
        prepare_rows,
    )


def _pointer(codec: PageCodec, dtype: torch.dtype, native: bool) -> torch.dtype:
    """What the codes of a side are read as."""
    if codec.name == "e4m3":
        return torch.float8_e4m3fn if native else torch.uint8
    return {"float": dtype, "int8": torch.int8}.get(codec.name, torch.int32)


def _layout(
    fmt: PageFormat,
    name: str,
    codec: PageCodec,
    draft: bool,
    native: bool,
    narrow_dot: bool,
    dtype: torch.dtype,
) -> tuple[str, int, bool, int, int, int, int]:
    """The layout of `triton_tiles` of one side. narrow_dot: 8-bit operands need a depth of 32."""
    channels = fmt.padded_key_dim if name == "keys" else fmt.padded_value_dim
    parts = 8 // codec.plane_bits if codec.map == "integer" else 1
    width = channels // parts
    kind = codec.name if codec.name in ("float", "int8") else "narrow"
    if codec.name == "e4m3":
        kind = "e4m3" if native else "e4m3-fp16"
    least = 32 if narrow_dot and name == "keys" else 16
    fields = fmt.fields
    low = f"{name}_low" in fields and not draft
    at = fields[name].offset // dtype.itemsize
    low_at = fields[f"{name}_low"].offset // dtype.itemsize if low else at
    return kind, parts, low, width, max(least, _power_of_two(width)), at, low_at


def _fp32_dot(target: str) -> str:
    """How fp32 is multiplied: NVIDIA's tensor cores take it as three products of parts, whose
    error is that of fp32 sums; AMD's take it as it is."""
    return "tf32x3" if target.startswith("sm_") else "ieee"


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def target_of(x: Tensor) -> str:
    """What kernels for x are compiled for: "sm_90", "gfx942", ...; "interpreter" for none."""
    if not x.is_cuda and triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return str(target.arch) if target.backend == "hip" else f"sm_{target.arch}"


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
