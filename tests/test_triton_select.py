"""Selection in Triton, interpreted, against the NumPy definition within derived bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import oracle_select as oracle
import pytest
import torch
from torch import Tensor

from cases_attention import CATALOGUE, AttentionCase, make_attention
from lath.formats.attention import PageView, Queries
from lath.formats.plan import Plan
from lath.formats.selection import PageScore
from lath.kernels.select import triton as kernels
from lath.reference import select as reference
from lath.reference.pages import read_page
from tools.sanitizer import sanitize

KINDS = get_args(PageScore)
# Of those that differ by what selection does not see, one is enough.
UNSEEN = {"mask", "bias", "alibi", "sink", "window", "unified", "softcap"}
CASES = [
    case for case in CATALOGUE if not case.words.keys() & {"lists", "packed", *UNSEEN}
]  # fmt: skip


def small_plan(case: AttentionCase, split: int = 2, **changed: Any) -> Plan:
    """Two pieces of tiles of 16 rows and 16 pages, so that a small case has several of each."""
    heads, kv_heads = (int(count) for count in case.heads.split("/"))
    plan = Plan(
        "triton", "select", "int8", "a test", 0, 0, block_m=16, block_n=16, split_k=split,
        pack=heads // kv_heads, warps=4, stages=2,
    )  # fmt: skip
    return dataclasses.replace(plan, **changed)


def check(got: Tensor, exact: np.ndarray, bound: np.ndarray, what: str) -> None:
    assert got.dtype == torch.float32
    share = oracle.admitted(got.numpy(), exact, bound)
    assert share <= 1, f"{what}: {share}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_page_scores(case: AttentionCase) -> None:
    queries, pages, options = make_attention(case)
    for kind in KINDS:
        exact, bound = oracle.page_scores(queries, pages, kind, options.scale)
        check(kernels.page_scores(queries, pages, kind, options.scale), exact, bound, kind)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_token_scores(case: AttentionCase) -> None:
    queries, pages, options = make_attention(case)
    exact, bound = oracle.token_scores(queries, pages, options.scale, options.query)
    got = kernels.token_scores(queries, pages, options.scale, options.query)
    check(got, exact, bound, "tokens")


def unread_of(pages: PageView, heads: int) -> Tensor:
    """Quantiles of pages read in part, wholly (-inf) and not at all (+inf)."""
    shape = (pages.num_sequences, heads, pages.table.shape[1])
    z = torch.randn(shape)
    z[torch.rand(shape) < 0.3] = -math.inf
    z[torch.rand(shape) < 0.4] = math.inf
    return z


def check_repair(
    queries: Queries, pages: PageView, z: Tensor, scale: float, *plans: Plan | None
) -> None:
    exact = {spreads: oracle.repair(queries, pages, z, scale, spreads) for spreads in (True, False)}
    for number, plan in enumerate(plans):
        for spreads in (True,) if number else (True, False):  # one plan is enough for both
            o, lse, o_bound, lse_bound = exact[spreads]
            got_o, got_lse = kernels.repair(queries, pages, z, scale, plan, spreads=spreads)
            check(got_o, o, o_bound, f"o of {z.shape[1]} lists, spreads {spreads}")
            check(got_lse, lse, lse_bound, f"lse of {z.shape[1]} lists, spreads {spreads}")


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=str)
def test_repair(number: int, case: AttentionCase) -> None:
    """One list for all, of KV heads or of query heads; under the plan, and in two pieces."""
    queries, pages, options = make_attention(case)
    heads, kv_heads = (int(count) for count in case.heads.split("/"))
    z = unread_of(pages, (1, kv_heads, heads)[number % 3])
    check_repair(queries, pages, z, options.scale, None, small_plan(case, 1 + number % 2))


WIDE = [
    AttentionCase("int8/int8", "4/2", "128/128", 2, "700,100", "bf16", "int8", "holes"),
    AttentionCase("int4/int2", "3/1", "96/80", 6, "1100", "fp16", "int8", "ragged;parts;holes"),
    AttentionCase("float/float", "2/2", "256/256", 1, "400", "fp32", "float", "holes"),
    AttentionCase("float/float", "4/2", "64/48", 2, "300", "fp16", "float", "parts"),
    AttentionCase("e4m3/e4m3", "8/2", "33/17", 3, "900,0,64", "bf16", "e4m3", "ragged;e4m3"),
]  # fmt: skip


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_many_pages_in_pieces(case: AttentionCase) -> None:
    """Head dims of all sizes, sequences of several tiles of pages, whole tiles without a page."""
    queries, pages, options = make_attention(case)
    scale, dot = options.scale, case.dtype if case.codecs.startswith("float") else "int8"
    for kind in KINDS:
        exact, bound = oracle.page_scores(queries, pages, kind, scale)
        got = kernels.page_scores(queries, pages, kind, scale, plan=small_plan(case))
        check(got, exact, bound, kind)
    exact, bound = oracle.token_scores(queries, pages, scale, options.query)
    plan = small_plan(case, 3, dot=dot, block_n=64)
    got = kernels.token_scores(queries, pages, scale, options.query, plan)
    check(got, exact, bound, "tokens")
    heads = int(case.heads.split("/")[0])
    check_repair(queries, pages, unread_of(pages, heads), scale, small_plan(case, 2))
    check_repair(queries, pages, unread_of(pages, 1), scale, small_plan(case, 1))


def labels_of(pages: PageView, dtype: str, bits: int, channels: Tensor) -> tuple[Tensor, Tensor]:
    numbers, heads, _ = pages.index.shape
    fmt = pages.format
    codes = np.full((numbers, heads, channels.shape[1], 64), 3, np.int8)
    scales = np.full((numbers, heads), np.nan, np.float32)
    for place in np.ndindex(numbers - 1, heads):
        page = read_page(pages.records[place].numpy(), pages.index[place].numpy(), fmt, dtype)
        exact = bits == 8 and fmt.key.name in ("int8", "int8-planes")
        codes[place], scales[place] = reference.write_labels(
            page, channels[place[1]].numpy(), bits, exact
        )
    return torch.from_numpy(codes), torch.from_numpy(scales)


@pytest.mark.parametrize(
    ("case", "count", "chosen", "bits"),
    [
        (
            AttentionCase("int8/int8", "4/2", "64/32", 1, "200,70", "bf16", "int8", "holes"),
            16,
            16,
            8,
        ),
        (AttentionCase("int8/int8", "4/2", "64/32", 1, "200,9", "bf16", "int8", "-"), 16, 9, 4),
        (
            AttentionCase("int4/int8", "2/1", "80/32", 5, "300,9", "fp16", "int8", "ragged"),
            20,
            7,
            4,
        ),
        (
            AttentionCase("float/int8", "2/2", "48/32", 20, "260", "fp32", "int8", "parts"),
            48,
            33,
            8,
        ),
        (AttentionCase("e4m3/int8", "3/1", "32/32", 1, "200", "fp16", "int8", "e4m3"), 8, 1, 8),
        (AttentionCase("float/int8", "2/1", "32/32", 2, "130", "fp16", "int8", "-"), 32, 32, 4),
    ],
    ids=str,
)
def test_label_scores(case: AttentionCase, count: int, chosen: int, bits: int) -> None:
    queries, pages, options = make_attention(case)
    heads, kv_heads = (int(number) for number in case.heads.split("/"))
    channels = torch.stack([torch.randperm(pages.format.key_dim)[:count] for _ in range(kv_heads)])
    channels = channels.to(torch.int32)
    rows_of = torch.stack(
        [torch.randperm(count)[:chosen] for _ in range(pages.num_sequences * heads)]
    )
    rows_of = rows_of.reshape(pages.num_sequences, heads, chosen).to(torch.int32)
    labels, scales = labels_of(pages, case.dtype, bits, channels)
    given = (scales, channels, rows_of, options.scale)
    exact, bound = oracle.label_scores(queries, pages, labels, *given)
    if bits == 4:
        flat = labels.numpy().reshape(-1, 64)
        packed = reference.pack_labels(flat).reshape(*labels.shape[:3], 32)
        labels = torch.from_numpy(packed)
    check(kernels.label_scores(queries, pages, labels, *given), exact, bound, "default plan")
    plan = small_plan(case, 3, pack=1)
    check(kernels.label_scores(queries, pages, labels, *given, plan=plan), exact, bound, "pieces")


# What nobody may touch, and NaN

SANITISED = "int4/int4 3/1 96/80 6 200,0,64 bf16 int8 ragged;holes"


def calls(text: str) -> dict[str, Callable[[], Any]]:
    """Every kernel once, on one case in several pieces."""
    case = AttentionCase.parse(text)
    queries, pages, options = make_attention(case)
    heads, kv_heads = (int(count) for count in case.heads.split("/"))
    scale, plan = options.scale, small_plan(case)
    channels = torch.arange(9, dtype=torch.int32).expand(kv_heads, 9)
    labels, scales = labels_of(pages, case.dtype, 8, channels)
    rows_of = torch.randint(0, 9, (pages.num_sequences, heads, 5), dtype=torch.int32)
    packed = torch.from_numpy(reference.pack_labels(labels.numpy().reshape(-1, 64)))
    packed = packed.reshape(*labels.shape[:3], 32)
    given = (scales, channels, rows_of, scale)
    tokens = dataclasses.replace(plan, block_n=64)
    apart = dataclasses.replace(plan, pack=1)
    z, own = unread_of(pages, kv_heads), unread_of(pages, heads)
    made: dict[str, Callable[[], Any]] = {
        kind: lambda kind=kind: kernels.page_scores(queries, pages, kind, scale, plan=plan)
        for kind in KINDS
    }
    return made | {
        "token": lambda: kernels.token_scores(queries, pages, scale, options.query, tokens),
        "label": lambda: kernels.label_scores(queries, pages, labels, *given, plan=apart),
        "label of 4 bits": lambda: kernels.label_scores(queries, pages, packed, *given, plan=apart),
        "repair": lambda: kernels.repair(queries, pages, z, scale, plan),
        "repair of own lists": lambda: kernels.repair(queries, pages, own, scale, plan),
    }


def test_sanitizer_is_clean() -> None:
    """And neither the order of programs nor what memory held before matters."""
    made = calls(SANITISED)
    results = {name: call() for name, call in made.items()}
    with sanitize(order="reverse") as report:
        again = {name: call() for name, call in made.items()}
    report.assert_clean()
    for name, first in results.items():
        pairs = zip(first, again[name], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name


def test_nan_comes_out_where_it_was_read() -> None:
    """Of a row of q, of one page's unit, of one page's mean of values."""
    case = AttentionCase("int8/int8", "4/2", "32/32", 2, "260", "bf16", "int8", "-")
    queries, pages, options = make_attention(case)
    scale, fields = options.scale, pages.format.index_fields
    z = torch.zeros(1, 2, pages.table.shape[1])
    q = queries.q.clone()
    q[0, 1, 1, 5] = math.nan
    spoilt = dataclasses.replace(queries, q=q)
    for kind in KINDS:
        clean = kernels.page_scores(queries, pages, kind, scale)
        got = kernels.page_scores(spoilt, pages, kind, scale)
        assert bool(got[0, 1, 1].isnan().all()), kind
        got[0, 1, 1] = clean[0, 1, 1]
        assert torch.equal(got, clean), kind
    o, lse = kernels.repair(spoilt, pages, z, scale)
    assert bool(o[0, 1, 1].isnan().all() & lse[0, 1, 1].isnan())
    assert int(lse.isnan().sum()) == 1
    assert int(o.isnan().any(-1).sum()) == 1

    number = int(pages.table[0, 2])

    def poisoned(field: str, dtype: torch.dtype, place: int) -> PageView:
        index = pages.index.clone()
        at = fields[field].offset // dtype.itemsize + place
        index[number, 0].view(dtype)[at] = math.nan
        return dataclasses.replace(pages, index=index)

    broken = poisoned("numbers", torch.float32, 0)
    for kind in ("bound", "mass", "floor"):
        nan = kernels.page_scores(queries, broken, kind, scale).isnan()  # type: ignore[arg-type]
        assert bool(nan[0, :2, :, 2].all())
        assert int(nan.sum()) == 4, kind
    broken = poisoned("value_mean", torch.bfloat16, 7)
    own = torch.zeros(1, 4, pages.table.shape[1])
    own[0, 0, 2] = -math.inf  # head 0 read that page: it does not meet its mean
    for lists, heads in ((z, [0, 1]), (own, [1])):
        nan = kernels.repair(queries, broken, lists, scale)[0].isnan()
        assert bool(nan[0, heads, :, 7].all())
        assert int(nan.sum()) == 2 * len(heads)
    z[0, 0, 2] = -math.inf
    assert not kernels.repair(queries, broken, z, scale)[0].isnan().any()


@pytest.mark.parametrize("spoil", ["scale", "mean", "unit", "max", "deviation", "value_mean", "z"])
def test_the_bounds_notice(spoil: str) -> None:
    """Negative controls: each of these small wrongs breaks a bound."""
    case = AttentionCase("int8/int8", "4/2", "64/64", 2, "300", "fp32", "int8", "-")
    queries, pages, options = make_attention(case)
    scale, z = options.scale, torch.zeros(1, 2, pages.table.shape[1])
    kind = {"mean": "mean", "deviation": "mass"}.get(spoil, "bound")
    exact, bound = oracle.page_scores(queries, pages, kind, scale)  # type: ignore[arg-type]
    o, lse, o_bound, lse_bound = oracle.repair(queries, pages, z, scale)
    row = pages.index[int(pages.table[0, 1]), 0]
    fields = pages.format.index_fields
    if spoil == "scale":
        scale *= 1 + 2.0**-14
    elif spoil == "unit":
        row[fields["numbers"].offset : fields["numbers"].end].view(torch.float32)[0] *= 1 + 2.0**-12
    elif spoil == "z":
        z += 2.0**-10
    elif spoil == "value_mean":  # of every page: one alone may weigh nothing
        pages.index[:, :, fields[spoil].offset] ^= 1
    else:
        row[fields[spoil].offset] ^= 1
    got = kernels.page_scores(queries, pages, kind, scale)  # type: ignore[arg-type]
    shares = [oracle.admitted(got.numpy(), exact, bound)]
    for part, answer, gauge in zip(
        kernels.repair(queries, pages, z, scale), (o, lse), (o_bound, lse_bound), strict=True
    ):
        shares.append(oracle.admitted(part.numpy(), answer, gauge))
    noticed = {"z": shares[1:], "value_mean": shares[1:]}.get(spoil, shares[:1])
    assert max(noticed) > 1


def test_offsets_of_64_bits() -> None:
    """A page more than 2**31 bytes away (virtual memory: little is touched)."""
    case = AttentionCase("int8/int8", "2/1", "32/32", 1, "64", "fp16", "int8", "-")
    queries, pages, options = make_attention(case)
    channels = torch.arange(4, dtype=torch.int32)[None]
    rows_of = channels.expand(1, 2, 4).contiguous()
    labels, scales = labels_of(pages, case.dtype, 8, channels)

    def of_index(view: PageView, labels: Tensor, scales: Tensor) -> list[Tensor]:
        given = (scales, channels, rows_of, options.scale)
        return [
            *(kernels.page_scores(queries, view, kind, options.scale) for kind in KINDS),
            kernels.label_scores(queries, view, labels, *given),
            *kernels.repair(queries, view, torch.zeros(1, 1, 1), options.scale),
        ]

    def moved(tensor: Tensor, number: int) -> Tensor:
        far = torch.empty((number + 1, *tensor.shape[1:]), dtype=tensor.dtype)
        far[number] = tensor[int(pages.table[0, 0])]
        return far

    near = of_index(pages, labels, scales)
    number = 2**31 // pages.index.shape[2] + 1
    table = torch.tensor([[number]], dtype=torch.int32)
    distant = dataclasses.replace(pages, index=moved(pages.index, number), table=table)
    far = of_index(distant, moved(labels, number), moved(scales, number))
    number = 2**31 // pages.records.shape[2] + 1
    distant = dataclasses.replace(
        pages, records=moved(pages.records, number), index=moved(pages.index, number),
        table=torch.tensor([[number]], dtype=torch.int32),
    )  # fmt: skip
    near.append(kernels.token_scores(queries, pages, options.scale, "int8"))
    far.append(kernels.token_scores(queries, distant, options.scale, "int8"))
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


def test_bad_arguments_are_refused() -> None:
    case = AttentionCase("int8/int8", "4/2", "32/32", 2, "130", "bf16", "int8", "-")
    queries, pages, options = make_attention(case)
    scale, width = options.scale, pages.table.shape[1]
    packed = dataclasses.replace(queries, offsets=queries.lengths)
    with pytest.raises(ValueError, match="queries must be dense"):
        kernels.page_scores(packed, pages, "mean", scale)
    with pytest.raises(ValueError, match=r"kind must be one of .* got 'median'"):
        kernels.page_scores(queries, pages, "median", scale)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unread must be \[S, H, P\] with H = 1, 2 or 4, got"):
        kernels.repair(queries, pages, torch.zeros(1, 3, width), scale)
    with pytest.raises(TypeError, match=r"unread must be torch\.float32, got torch\.float64"):
        kernels.repair(queries, pages, torch.zeros(1, 2, width, dtype=torch.float64), scale)
    with pytest.raises(ValueError, match=r"query for int8 keys .* got 'e4m3'"):
        kernels.token_scores(queries, pages, scale, "e4m3")
    lists = tuple(x[:, None].expand(-1, 2, -1) for x in (pages.table, pages.starts, pages.counts))
    listed = dataclasses.replace(pages, table=lists[0], starts=lists[1], counts=lists[2])
    with pytest.raises(ValueError, match="pages must have no lists of heads"):
        kernels.page_scores(queries, listed, "mean", scale)
