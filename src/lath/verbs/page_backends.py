"""Writing pages and attending over them, on the backend that was chosen."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.formats.pages import PAGE, PageFormat
from lath.formats.plan import Backend
from lath.reference import attention as reference
from lath.reference import pages as reference_pages
from lath.verbs.planning import describe_device

_DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def write_pages(
    keys: Tensor,
    values: Tensor,
    fmt: PageFormat,
    records: Tensor,
    index: Tensor,
    jobs: Tensor,
    backend: Backend,
) -> None:
    """Quantise keys [B, Hkv, L, D] and values [B, Hkv, L, E] into records and index rows, in place.

    jobs: int32 [J, 4], each (row b, first token, count 1..64, page number).
    """
    if backend == "reference":
        _write_reference(keys, values, fmt, records, index, jobs)
        return
    _writer(backend)(keys, values, fmt, records, index, jobs)


def _writer(backend: Backend) -> Any:
    """The page writer of a backend, imported on first use."""
    if backend == "triton":
        from lath.kernels.pages.triton import write_pages as triton_writer

        return triton_writer
    from lath.kernels.pages.cpu import write_pages as cpu_writer

    return cpu_writer


def _write_reference(
    keys: Tensor, values: Tensor, fmt: PageFormat, records: Tensor, index: Tensor, jobs: Tensor
) -> None:
    dtype = _DTYPE_NAMES[keys.dtype]
    k, v = as_array(keys), as_array(values)
    for row, first, count, page in jobs.tolist():
        tokens = slice(first, first + count)
        for head in range(k.shape[1]):
            written = reference_pages.write_page(
                k[row, head, tokens], v[row, head, tokens], fmt, dtype
            )
            for target, content in zip((records, index), written, strict=True):
                target[page, head] = torch.from_numpy(content).to(target.device)


def attend(
    queries: Queries,
    pages: PageView,
    options: ScoreOptions,
    backend: Backend,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, Hq, L, E] of q's dtype and lse fp32 [B, Hq, L].

    splits: pieces of the key list; None for what the plan chooses.
    """
    q = queries.q
    if q.shape[2] == 0 or pages.num_sequences == 0 or pages.longest == 0:
        return _nothing_to_read(queries, pages, options)
    if backend == "reference":
        return _attend_reference(queries, pages, options)
    from lath.kernels.attention.plan import plan_attention

    plan = plan_attention(
        sequences=pages.num_sequences, query_heads=q.shape[1], kv_heads=pages.num_kv_heads,
        queries=queries.longest, keys=pages.most_keys, fmt=pages.format, dtype=q.dtype,
        options=options, device=describe_device(q.device), backend=backend,
        lists=pages.list_heads, tokens=pages.tokens is not None, float_keys=_float_keys(pages),
        draft=pages.draft,
    )  # fmt: skip
    if splits is not None:
        plan = dataclasses.replace(plan, split_k=splits)
    o, lse = _attender(backend)(queries, pages, options, plan)
    return o, lse


def _float_keys(pages: PageView) -> int:
    """Keys that the float parts of the longest sequence hold, where its pages are full."""
    first = min(pages.longest, PAGE) if pages.first_keys is not None else 0
    return first + ((pages.longest - first) % PAGE if pages.last_keys is not None else 0)


def _attender(backend: Backend) -> Any:
    """The attention loop of a backend, imported on first use."""
    if backend == "triton":
        from lath.kernels.attention.triton import attend as triton_attend

        return triton_attend
    from lath.kernels.attention.cpu import attend as cpu_attend

    return cpu_attend


def _nothing_to_read(
    queries: Queries, pages: PageView, options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """Output 0; lse -inf, or the sink for rows of a sequence."""
    batch, heads, rows, _ = queries.q.shape
    o = queries.q.new_zeros((batch, heads, rows, pages.format.value_dim))
    lse = torch.full((batch, heads, rows), -math.inf, device=o.device)
    if options.sink is not None:
        if queries.offsets is None:
            at = torch.arange(rows, device=o.device)
            own = at < queries.lengths[:, None]
        else:
            own = torch.zeros((1, rows), dtype=torch.bool, device=o.device)
            for offset, count in zip(
                queries.offsets.tolist(), queries.lengths.tolist(), strict=True
            ):
                own[0, offset : offset + count] = True
        lse = torch.where(own[:, None], options.sink.float()[:, None], lse)
    return o, lse


def _attend_reference(
    queries: Queries, pages: PageView, options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """The NumPy definition, rounded once to q's dtype."""
    q = queries.q
    lengths = as_array(queries.lengths)
    offsets = None if queries.offsets is None else as_array(queries.offsets)
    rows = as_array(q)
    if offsets is not None:
        rows = np.zeros((len(lengths), q.shape[1], queries.longest, q.shape[3]), np.float32)
        for s, (offset, count) in enumerate(zip(offsets, lengths, strict=True)):
            rows[s, :, :count] = as_array(q[0, :, offset : offset + count])
    o, lse = reference.attend(rows, lengths, as_cache(pages, q.dtype), _options(options))
    if offsets is not None:
        packed_o = np.zeros((1, q.shape[1], q.shape[2], o.shape[3]))
        packed_lse = np.full((1, q.shape[1], q.shape[2]), -np.inf)
        for s, (offset, count) in enumerate(zip(offsets, lengths, strict=True)):
            packed_o[0, :, offset : offset + count] = o[s, :, :count]
            packed_lse[0, :, offset : offset + count] = lse[s, :, :count]
        o, lse = packed_o, packed_lse
    return (
        torch.from_numpy(o).to(device=q.device, dtype=q.dtype),
        torch.from_numpy(lse).to(device=q.device, dtype=torch.float32),
    )


def as_cache(pages: PageView, dtype: torch.dtype) -> reference.Cache:
    arrays = {
        field.name: as_array(getattr(pages, field.name))
        for field in dataclasses.fields(reference.Cache)
        if field.name not in ("format", "dtype", "draft")
    }
    return reference.Cache(
        format=pages.format, dtype=_DTYPE_NAMES[dtype], draft=pages.draft, **arrays
    )


def _options(options: ScoreOptions) -> reference.Options:
    arrays = {
        name: as_array(getattr(options, name)) for name in ("mask", "bias", "alibi", "sink", "tree")
    }
    return reference.Options(
        scale=options.scale, causal=options.causal, window=options.window, softcap=options.softcap,
        query=options.query, precision=options.precision, **arrays,
    )  # fmt: skip


def as_array(tensor: Tensor | None) -> Any:
    """A NumPy array; floats as fp32."""
    if tensor is None:
        return None
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
