"""`plan_select`: what it chooses, why, that it is pure, and that its bytes are those loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from cases import DTYPES
from lath.formats.attention import PageView, Queries
from lath.formats.device import KNOWN_DEVICES, known_device
from lath.formats.pages import PAGE, PageCodec, PageFormat
from lath.formats.plan import Plan
from lath.kernels.select import triton as kernels
from lath.kernels.select.plan import (
    MOST_IN_REGISTERS,
    PIECES_PER_UNIT,
    RADIX_BLOCK,
    SelectKind,
    index_bytes,
    plan_select,
    plan_top_k,
)
from tools.sanitizer import sanitize

KINDS = get_args(SelectKind)
GPUS = [name for name, device in KNOWN_DEVICES.items() if device.kind != "cpu"]


def plan(kind: str = "bound", **changed: Any) -> Plan:
    codecs, dims = changed.pop("codecs", "int8/int8"), changed.pop("dims", (128, 128))
    key, value = (PageCodec(name) for name in codecs.split("/"))
    fmt = PageFormat(key, value, *dims, changed.pop("float_bytes", 2))
    given: dict[str, Any] = {
        "sequences": 1, "query_heads": 32, "kv_heads": 8, "queries": 1, "pages": 512, "fmt": fmt,
        "device": known_device("sm_90"), "backend": "triton",
        "labels": (32, 8) if kind == "label" else None,
    }  # fmt: skip
    return plan_select(kind=kind, **given | changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", GPUS)
def test_every_kind_on_every_device(kind: str, device: str) -> None:
    for queries, heads in ((1, 32), (16, 32), (64, 8)):
        found = plan(kind, device=known_device(device), queries=queries, query_heads=heads)
        assert found.backend == "triton"
        assert found.dataflow == "select"
        assert found.reason
        assert found.split_k >= 1
        assert found.warps in (1, 2, 4, 8)
        assert found.bytes_moved > 0
        if kind != "top_k":
            assert found.block_m in (16, 32, 64)
            assert found.block_n in (16, 32, 64)
            assert found.pack == (1 if kind == "label" else heads // 8)
            assert found.operations > 0


def test_it_is_pure() -> None:
    assert plan() == plan()
    assert plan("repair") == plan("repair")


def test_scores_are_split_until_every_unit_has_work() -> None:
    few, many = plan(pages=4096), plan(pages=4096, sequences=64)
    assert few.split_k * 8 > 0.9 * PIECES_PER_UNIT * 132
    assert many.split_k < few.split_k
    assert "8 tiles on 132 units: 4096 pages in" in few.reason
    short = plan(pages=3)
    assert short.split_k == 1


def test_no_piece_is_without_a_page() -> None:
    for kind in ("bound", "repair", "token", "label"):
        for pages in (1, 7, 63, 64, 65, 500, 4096):
            found = plan(kind, pages=pages)
            size = 1 if found.block_n == PAGE and kind in ("token", "label") else found.block_n
            steps = -(-pages // size)
            each = -(-steps // found.split_k)
            assert each * (found.split_k - 1) < steps, (kind, pages)


def test_repair_is_split_no_more_than_pays() -> None:
    assert plan("repair", sequences=32).split_k == 1
    assert 1 < plan("repair").split_k <= 16


def test_top_k_takes_several_passes_where_registers_end() -> None:
    for width, block, passes in (
        (5, 16, 1), (1000, 1024, 1), (MOST_IN_REGISTERS, MOST_IN_REGISTERS, 1),
        (MOST_IN_REGISTERS + 1, RADIX_BLOCK, 5), (100_000, RADIX_BLOCK, 5),
    ):  # fmt: skip
        found = plan_top_k(rows=3, width=width, k=7, device=known_device("sm_90"), backend="triton")
        assert found.block_n == block
        assert found.bytes_moved == 4 * 3 * (passes * width + min(7, width))
    assert plan("top_k", pages=100).bytes_moved == 4 * 32 * (100 + 100)


def test_what_an_index_row_costs() -> None:
    fmt = PageFormat(PageCodec("int8"), PageCodec("int8"), 128, 96)
    whole = sum(index_bytes(kind, fmt) for kind in ("mean", "bound", "mass", "floor"))
    assert whole == 256 + (256 + 4 + 256) + (256 + 4 + 128) + (256 + 8)
    assert index_bytes("repair", fmt) == 256 + 4 + 128 + 192
    assert index_bytes("repair", fmt, spreads=False) == 256 + 192
    for kind in get_args(SelectKind):
        assert index_bytes(kind, fmt) <= fmt.index_bytes


def test_other_backends() -> None:
    cpu = plan(backend="cpu", device=dataclasses.replace(known_device("avx2"), threads=3))
    assert (cpu.dataflow, cpu.threads, cpu.dot) == ("select", 3, "fp32")
    definition = plan("repair", backend="reference")
    assert (definition.dataflow, definition.dot) == ("definition", "fp64")
    assert plan_top_k(
        rows=1, width=9, k=9, device=known_device("avx2"), backend="reference"
    ).dataflow == "definition"  # fmt: skip
    interpreted = plan(device=known_device("avx2"))
    assert interpreted == plan()


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("median", {}, "kind must be one of .* got 'median'"),
        ("label", {"labels": None}, "labels must be given for kind 'label' alone"),
        ("bound", {"labels": (4, 8)}, "labels must be given for kind 'label' alone"),
        ("label", {"labels": (4, 2)}, "labels must have 4 or 8 bits, got 2"),
        ("token", {"own_lists": True}, "own_lists must be given for kind 'repair' alone"),
        ("mass", {"spreads": False}, "spreads=False must be given for kind 'repair' alone"),
    ],
)
def test_what_does_not_go_together(kind: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(kind, **changed)


# Predicted against counted

# Some pieces, few enough to run in the interpreter.
FEW_UNITS = dataclasses.replace(known_device("sm_90"), compute_units=5)

SHAPES = [
    # codecs, dims, dtype, rows, pages, Hq/Hkv
    ("int8/int8", (64, 32), "bf16", 1, 66, "2/1"),
    ("int4/int8", (80, 48), "fp16", 17, 35, "2/1"),
    ("float/float", (32, 32), "fp32", 5, 7, "2/2"),
    ("e4m3/int8", (144, 96), "bf16", 2, 18, "3/1"),
]


def make_view(codecs: str, dims: tuple[int, int], dtype: str, pages: int, heads: int) -> PageView:
    """Two sequences of whole pages that hold anything; the index says 64 tokens."""
    key, value = (PageCodec(name) for name in codecs.split("/"))
    fmt = PageFormat(key, value, *dims, DTYPES[dtype].itemsize)
    records = torch.zeros(pages, heads, fmt.record_bytes, dtype=torch.uint8)
    index = torch.zeros(pages, heads, fmt.index_bytes, dtype=torch.uint8)
    index.view(torch.float32)[..., fmt.index_fields["numbers"].offset // 4 + 1] = PAGE
    table = torch.stack([torch.randperm(pages) for _ in range(2)]).to(torch.int32)
    counts = torch.full((2, pages), PAGE, dtype=torch.int32)
    lengths = torch.full((2,), pages * PAGE, dtype=torch.int32)
    return PageView(
        fmt, records, index, table, table.clone(), counts,
        torch.full((2,), pages, dtype=torch.int32), lengths, pages * PAGE,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, "own_lists", "centroids"])
@pytest.mark.parametrize(("codecs", "dims", "dtype", "rows", "pages", "heads"), SHAPES)
def test_bytes_are_those_that_kernels_load(
    kind: str, codecs: str, dims: tuple[int, int], dtype: str, rows: int, pages: int, heads: str
) -> None:
    query_heads, kv_heads = (int(count) for count in heads.split("/"))
    view = make_view(codecs, dims, dtype, pages, kv_heads)
    q = torch.zeros(2, query_heads, rows, dims[0], dtype=DTYPES[dtype])
    queries = Queries(q, torch.full((2,), rows, dtype=torch.int32), rows)
    outputs = 4 * 2 * query_heads * rows
    watched = {
        "q": q, "lengths": queries.lengths, "table": view.table, "counts": view.counts,
        "page_counts": view.page_counts, "index": view.index, "records": view.records,
    }  # fmt: skip
    extra = extras(kind, view, query_heads, rows)
    options = {
        "own_lists": {"kind": "repair", "own_lists": True},
        "centroids": {"kind": "repair", "spreads": False},
        "label": {"kind": "label", "labels": (7, 8)},
    }
    found = plan_select(
        sequences=2, query_heads=query_heads, kv_heads=kv_heads, queries=rows, pages=pages,
        fmt=view.format, device=FEW_UNITS, backend="triton",
        **options.get(kind, {"kind": kind}),  # type: ignore[arg-type]
    )  # fmt: skip
    with sanitize(poison=False, races=False, watch=watched | extra) as report:
        call(kind, queries, view, extra, found)()
    loaded = sum(seen.bytes for seen in report.loads.values())
    if kind in ("repair", "own_lists", "centroids"):
        pieces, width = found.split_k, dims[1]
        stored = outputs * (width + 1) * pieces
        if pieces > 1:  # read again, the logarithms twice, and merged
            stored += outputs * (pieces * (width + 2) + width + 1)
    elif kind == "top_k":
        stored = outputs * pages
    else:
        stored = outputs * pages * (PAGE if kind in ("token", "label") else 1)
    if kind == "token" and view.format.key.map != "float":
        lanes = 2 * kv_heads * -(-rows * found.pack // found.block_m) * found.block_m
        codes = lanes * (view.format.padded_key_dim + 4)
        stored += codes * (1 + found.split_k) + 2 * 4 * lanes * pages
    assert found.bytes_moved == loaded + stored


def extras(kind: str, view: PageView, query_heads: int, rows: int) -> dict[str, Tensor]:
    """Further tensors that a kind of selection reads."""
    pages, kv_heads = view.index.shape[:2]
    return {
        "label": {
            "labels": torch.zeros(pages, kv_heads, 9, PAGE, dtype=torch.int8),
            "label_scales": torch.ones(pages, kv_heads),
            "label_channels": torch.zeros(kv_heads, 9, dtype=torch.int32),
            "rows_of": torch.zeros(2, query_heads, 7, dtype=torch.int32),
        },
        "repair": {"unread": torch.zeros(2, kv_heads, pages)},
        "own_lists": {"unread": torch.zeros(2, query_heads, pages)},
        "centroids": {"unread": torch.zeros(2, kv_heads, pages)},
        "top_k": {"scores": torch.randn(2, query_heads, rows, pages)},
    }.get(kind, {})


def call(
    kind: str, queries: Queries, view: PageView, extra: dict[str, Tensor], found: Plan
) -> Callable[[], object]:
    query = "e4m3" if view.format.key.name == "e4m3" else "int8"
    calls: dict[str, Callable[[], object]] = {
        "token": lambda: kernels.token_scores(queries, view, 1.0, query, found),  # type: ignore[arg-type]
        "label": lambda: kernels.label_scores(queries, view, *extra.values(), 1.0, found),
        "repair": lambda: kernels.repair(queries, view, extra["unread"], 1.0, found),
        "own_lists": lambda: kernels.repair(queries, view, extra["unread"], 1.0, found),
        "centroids": lambda: kernels.repair(
            queries, view, extra["unread"], 1.0, found, spreads=False
        ),
        "top_k": lambda: kernels.top_k(extra["scores"], view.table.shape[1], found),
    }
    scores = lambda: kernels.page_scores(queries, view, kind, 1.0, plan=found)  # type: ignore[arg-type]  # noqa: E731
    return calls.get(kind, scores)
