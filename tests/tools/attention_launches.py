"""What `attend` and `write_pages` of the Triton backend would compile for a case in words.

    attend: "int8/int8 128 fp16 int8 prefill causal sink"
    writer: "int4/int2 128 bf16"

codecs of keys / values, head dim, dtype, precision (of P), "prefill" (1024 rows over 1024 keys, 8
query heads on 2) or "decode" (one row over 8192 keys, 32 query heads on 8), then features.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.formats.device import known_device
from lath.formats.pages import PAGE, PageFormat, page_codec
from lath.formats.plan import Plan
from lath.kernels.attention import triton as attention
from lath.kernels.attention.plan import plan_attention
from lath.kernels.pages import triton as pages
from tools.fake_gpu import Specialisation, fake_gpu

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Rows of q, keys, query heads, KV heads.
SHAPES = {"prefill": (1024, 1024, 8, 2), "decode": (1, 8192, 32, 8)}
FEATURES = (
    "causal", "window", "softcap", "mask", "bias", "alibi", "sink", "tree", "parts", "unified",
    "draft", "q-e4m3", "lists", "query-lists", "tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Launched:
    """A plan, and the things to compile for it in the order of their first launch."""

    plan: Plan
    specialisations: list[Specialisation]


def page_format(codecs: str, dim: int, dtype: torch.dtype) -> PageFormat:
    key, value = codecs.split("/")
    return PageFormat(page_codec(key), page_codec(value), dim, dim, dtype.itemsize)


def record_attend(text: str, architecture: str) -> Launched:
    """The launches of one attention on an architecture, under the plan that it would get."""
    codecs, dim, dtype_name, precision, phase, *features = text.split()
    if unknown := set(features) - set(FEATURES):
        raise ValueError(f"features must be of {FEATURES}, got {sorted(unknown)}")
    rows, keys, heads, kv_heads = SHAPES[phase]
    dtype = DTYPES[dtype_name]
    fmt = page_format(codecs, int(dim), dtype)
    view = _view(fmt, keys, kv_heads, dtype, features)
    view = _listed(view, heads if "query-lists" in features else kv_heads, features)
    queries = Queries(torch.zeros(1, heads, rows, int(dim), dtype=dtype), _one(rows), rows)
    options = _options(int(dim), heads, rows, keys, precision, features)
    device = known_device(architecture)
    plan = plan_attention(
        sequences=1, query_heads=heads, kv_heads=kv_heads, queries=rows, keys=keys, fmt=fmt,
        dtype=dtype, options=options, device=device, backend="triton", lists=view.list_heads,
        tokens=view.tokens is not None, float_keys=2 * PAGE if "parts" in features else 0,
        draft=view.draft,
    )  # fmt: skip
    with fake_gpu(device) as recording:
        attention.attend(queries, view, options, plan)
    return Launched(plan, recording.specialisations())


def record_writer(text: str, architecture: str) -> list[Specialisation]:
    """The launches of the page writer on an architecture."""
    codecs, dim, dtype_name = text.split()
    dtype = DTYPES[dtype_name]
    fmt = page_format(codecs, int(dim), dtype)
    keys = torch.zeros(1, 2, 4 * PAGE, int(dim), dtype=dtype)
    records = torch.zeros(4, 2, fmt.record_bytes, dtype=torch.uint8)
    index = torch.zeros(4, 2, fmt.index_bytes, dtype=torch.uint8)
    jobs = torch.tensor([[0, PAGE * i, PAGE, i] for i in range(4)], dtype=torch.int32)
    with fake_gpu(architecture) as recording:
        pages.write_pages(keys, keys.clone(), fmt, records, index, jobs)
    return recording.specialisations()


def _one(number: int) -> Tensor:
    return torch.tensor([number], dtype=torch.int32)


def _view(
    fmt: PageFormat, keys: int, kv_heads: int, dtype: torch.dtype, features: list[str]
) -> PageView:
    with_parts = "parts" in features
    count = keys // PAGE - (2 if with_parts else 0)
    first = PAGE if with_parts else 0
    parts: dict[str, Any] = {}
    if with_parts:
        for side in ("first", "last"):
            part = torch.zeros(1, kv_heads, PAGE, fmt.key_dim, dtype=dtype)
            parts |= {
                f"{side}_keys": part, f"{side}_values": part.clone(), f"{side}_lengths": _one(PAGE)
            }  # fmt: skip
    return PageView(
        format=fmt,
        records=torch.zeros(count, kv_heads, fmt.record_bytes, dtype=torch.uint8),
        index=torch.zeros(count, kv_heads, fmt.index_bytes, dtype=torch.uint8),
        table=torch.arange(count, dtype=torch.int32)[None],
        starts=first + PAGE * torch.arange(count, dtype=torch.int32)[None],
        counts=torch.full((1, count), PAGE, dtype=torch.int32),
        page_counts=_one(count),
        lengths=_one(keys),
        longest=keys,
        draft="draft" in features,
        **parts,
    )


def _listed(view: PageView, heads: int, features: list[str]) -> PageView:
    """The view with a list of every page for each of the heads, where the features ask for it."""
    if not {"lists", "query-lists", "tokens"} & set(features):
        return view
    table, starts, counts, page_counts = (
        entries.unsqueeze(1).repeat(1, heads, *(1,) * (entries.dim() - 1))
        for entries in (view.table, view.starts, view.counts, view.page_counts)
    )
    return dataclasses.replace(
        view, table=table, starts=starts, counts=counts, page_counts=page_counts,
        tokens=torch.full(table.shape, -1) if "tokens" in features else None, listed=view.longest,
    )  # fmt: skip


def _options(
    dim: int, heads: int, rows: int, keys: int, precision: str, features: list[str]
) -> ScoreOptions:
    given: dict[str, Any] = {
        "causal": ("causal", True),
        "window": ("window", 256),
        "softcap": ("softcap", 30.0),
        "mask": ("mask", torch.ones(1, 1, rows, keys, dtype=torch.bool)),
        "bias": ("bias", torch.zeros(1, 1, rows, keys)),
        "alibi": ("alibi", torch.zeros(heads)),
        "sink": ("sink", torch.zeros(heads)),
        "tree": ("tree", torch.ones(1, rows, 1, dtype=torch.int32)),
        "unified": ("scheme", "unified"),
        "q-e4m3": ("query", "e4m3"),
    }
    chosen = dict(given[name] for name in features if name in given)
    return ScoreOptions(scale=dim**-0.5, precision=precision, **chosen)  # type: ignore[arg-type]
