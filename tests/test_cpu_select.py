"""The compiled kernels of selection against the NumPy definition, within derived bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import oracle_select as oracle
import pytest
import torch
from test_cpu_processes import LOWERINGS, run_lowered
from test_triton_select import labels_of, unread_of
from torch import Tensor

from cases_attention import CATALOGUE, AttentionCase, integers, make_attention
from lath.formats.attention import PageView, Queries
from lath.formats.selection import PageScore
from lath.kernels.select import cpu
from lath.reference import select as reference

KINDS = get_args(PageScore)
CASES = [case for case in CATALOGUE if not case.words.keys() & {"lists", "packed"}]
WIDE = [
    AttentionCase("int8/int8", "4/2", "128/128", 3, "1500,200", "bf16", "int8", "holes"),
    AttentionCase("int4/int2", "3/1", "96/80", 6, "1400", "fp16", "int8", "ragged;parts;holes"),
    AttentionCase("float/float", "2/2", "256/256", 1, "1200", "fp32", "float", "holes"),
    AttentionCase("e4m3/e4m3", "8/2", "33/17", 5, "1300,0,64", "bf16", "e4m3", "ragged;e4m3"),
    AttentionCase("int2/int8", "6/2", "1/1", 1, "1088", "bf16", "int8", "holes"),
]


def share_of(got: Tensor, exact: np.ndarray, bound: np.ndarray) -> float:  # type: ignore[type-arg]
    assert got.dtype == torch.float32
    return oracle.admitted(got.numpy(), exact, bound)


def check_pages(queries: Queries, pages: PageView, scale: float, what: object) -> None:
    for kind in KINDS:
        answer = oracle.page_scores(queries, pages, kind, scale)
        share = share_of(cpu.page_scores(queries, pages, kind, scale), *answer)
        assert share <= 1, (str(what), kind, share)


def check_repair(queries: Queries, pages: PageView, z: Tensor, scale: float, what: object) -> None:
    for spreads in (True, False):
        o, lse, *bounds = oracle.repair(queries, pages, z, scale, spreads)
        got = zip(cpu.repair(queries, pages, z, scale, spreads), (o, lse), bounds, strict=True)
        assert max(shares := [share_of(*each) for each in got]) <= 1, (str(what), spreads, shares)


def check(case: AttentionCase) -> None:
    """All of a case but labels."""
    queries, pages, options = make_attention(case)
    heads, kv_heads = (int(count) for count in case.heads.split("/"))
    check_pages(queries, pages, options.scale, case)
    for lists in sorted({1, kv_heads, heads}):
        check_repair(queries, pages, unread_of(pages, lists), options.scale, case)
    answer = oracle.token_scores(queries, pages, options.scale, options.query)
    share = share_of(cpu.token_scores(queries, pages, options.scale, options.query), *answer)
    assert share <= 1, (str(case), "token", share)


@pytest.mark.parametrize("case", CASES + WIDE, ids=str)
def test_parity(case: AttentionCase) -> None:
    check(case)


@pytest.mark.parametrize("group", range(1, 9))
def test_groups(group: int) -> None:
    """Query heads of a KV head and rows that fill four, or not."""
    for kv_heads, rows in ((1, 1), (3, 2), (2, 7)):
        heads = f"{group * kv_heads}/{kv_heads}"
        check(AttentionCase("int8/int8", heads, "48/32", rows, "300,90", "bf16", "int8", "holes"))


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1023, 1024, 1025, 1100])
def test_lengths_around_a_page_and_a_tile(length: int) -> None:
    for options in ("-", "holes", "parts"):
        check(AttentionCase("int8/int8", "2/1", "32/32", 1, f"{length},5", "bf16", "int8", options))


def labelled(case: AttentionCase, count: int, chosen: int, bits: int) -> tuple[Any, ...]:
    """queries, pages, labels (not packed), scales, channels, rows of labels, scale."""
    queries, pages, options = make_attention(case)
    heads, kv_heads = (int(number) for number in case.heads.split("/"))
    dim = pages.format.key_dim
    channels = torch.stack([torch.randperm(dim)[:count] for _ in range(kv_heads)]).to(torch.int32)
    rows = [torch.randperm(count)[:chosen] for _ in range(pages.num_sequences * heads)]
    rows_of = torch.stack(rows).reshape(pages.num_sequences, heads, chosen).to(torch.int32)
    labels, scales = labels_of(pages, case.dtype, bits, channels)
    return queries, pages, labels, scales, channels, rows_of, options.scale


LABELS = [
    (AttentionCase("int8/int8", "4/2", "64/32", 1, "400,130", "bf16", "int8", "holes"), 16, 16),
    (AttentionCase("int4/int8", "4/2", "80/32", 5, "300,9", "fp16", "int8", "ragged"), 20, 7),
    (AttentionCase("float/int8", "2/2", "48/32", 20, "260", "fp32", "int8", "parts"), 48, 33),
    (AttentionCase("e4m3/int8", "3/1", "32/32", 1, "1200", "fp16", "int8", "e4m3"), 8, 1),
]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("case", "count", "chosen"), LABELS, ids=str)
def test_label_scores(case: AttentionCase, count: int, chosen: int, bits: int) -> None:
    queries, pages, labels, *given = labelled(case, count, chosen, bits)
    answer = oracle.label_scores(queries, pages, labels, *given)
    if bits == 4:
        packed = reference.pack_labels(labels.numpy().reshape(-1, 64))
        labels = torch.from_numpy(packed).reshape(*labels.shape[:3], 32)
    assert share_of(cpu.label_scores(queries, pages, labels, *given), *answer) <= 1


# Threads, memory, NaN


def calls(case: AttentionCase) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Every kernel once."""
    queries, pages, labels, *given = labelled(case, 9, 5, 8)
    scale, heads = given[-1], queries.q.shape[1]
    shared, own = unread_of(pages, pages.num_kv_heads), unread_of(pages, heads)
    scores = torch.randn(70, 1000)
    made: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        kind: lambda kind=kind: (cpu.page_scores(queries, pages, kind, scale),) for kind in KINDS
    }
    return made | {
        "token": lambda: (cpu.token_scores(queries, pages, scale, "int8"),),
        "label": lambda: (cpu.label_scores(queries, pages, labels, *given),),
        "repair": lambda: cpu.repair(queries, pages, shared, scale),
        "repair of own lists": lambda: cpu.repair(queries, pages, own, scale),
        "top_k": lambda: (cpu.top_k(scores, 90),),
    }


@pytest.mark.parametrize(
    "text",
    [
        "int8/int8 8/4 64/48 1 2200,150 bf16 int8 holes",
        "int8/int8 6/2 32/32 9 1100,90,0 fp16 int8 ragged",
    ],
)
def test_results_do_not_depend_on_threads(text: str) -> None:
    made = calls(AttentionCase.parse(text))
    single = {name: call() for name, call in made.items()}
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            for name, call in made.items():
                same = zip(call(), single[name], strict=True)
                assert all(torch.equal(a, b) for a, b in same), (name, threads)
        finally:
            torch.set_num_threads(1)


def test_strides_do_not_matter() -> None:
    case = AttentionCase("int8/int8", "4/2", "32/48", 3, "700,300", "bf16", "int8", "holes")
    queries, pages, options = make_attention(case)
    z = unread_of(pages, 2)
    plain = Queries(queries.q.contiguous(), queries.lengths, queries.longest)
    wide = {
        name: torch.stack([getattr(pages, name), torch.full_like(getattr(pages, name), 99)], 2)
        for name in ("table", "counts")
    }
    apart = dataclasses.replace(pages, **{name: pair[:, :, 0] for name, pair in wide.items()})
    turned = z.transpose(0, 2).contiguous().transpose(0, 2)
    for kind in KINDS:
        one = cpu.page_scores(queries, pages, kind, options.scale)
        assert torch.equal(one, cpu.page_scores(plain, apart, kind, options.scale))
    pair = cpu.repair(queries, pages, z, options.scale)
    other = cpu.repair(plain, apart, turned, options.scale)
    assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))


def test_one_list_for_all_heads() -> None:
    """H = 1, Hkv and Hq with the same z give the same bits."""
    case = AttentionCase("int8/int8", "6/3", "64/32", 2, "900,200", "bf16", "int8", "-")
    queries, pages, options = make_attention(case)
    z = unread_of(pages, 1)
    results = [
        cpu.repair(queries, pages, z.expand(-1, heads, -1), options.scale) for heads in (1, 3, 6)
    ]
    assert all(
        torch.equal(a, b) for other in results for a, b in zip(other, results[0], strict=True)
    )


def test_nothing_to_repair() -> None:
    queries, pages, options = make_attention(WIDE[3])
    z = torch.full((3, 1, pages.table.shape[1]), -math.inf)
    o, lse = cpu.repair(queries, pages, z, options.scale)
    assert not o.any()
    assert bool(torch.isneginf(lse).all())
    none = dataclasses.replace(queries, lengths=integers([0, 0, 0]))
    for kind in KINDS:
        assert bool(torch.isneginf(cpu.page_scores(none, pages, kind, options.scale)).all())
    o, lse = cpu.repair(none, pages, torch.zeros_like(z), options.scale)
    assert not o.any()
    assert bool(torch.isneginf(lse).all())


def with_field(pages: PageView, entry: int, name: str, value: float, at: int = 0) -> PageView:
    """The view with one number of an index row of head 0 replaced."""
    index, field = pages.index.clone(), pages.format.index_fields[name]
    row = index[int(pages.table[0, entry]), 0, field.offset : field.end]
    row.view(torch.float32 if name == "numbers" else torch.bfloat16)[at] = value
    return dataclasses.replace(pages, index=index)


def test_nan_in_a_page_stays_there_and_is_seen() -> None:
    case = AttentionCase("int8/int8", "4/2", "32/32", 2, "1300", "bf16", "int8", "-")
    queries, pages, options = make_attention(case)
    for name in ("mean", "numbers"):
        broken = with_field(pages, 3, name, math.nan)
        for kind in KINDS:
            if (name, kind) == ("numbers", "mean"):
                continue  # reads no unit
            clean = cpu.page_scores(queries, pages, kind, options.scale)
            got = cpu.page_scores(queries, broken, kind, options.scale)
            assert bool(got[0, :2, :, 3].isnan().all())
            got[0, :2, :, 3] = clean[0, :2, :, 3]
            assert torch.equal(got, clean)
        check_pages(queries, broken, options.scale, name)


@pytest.mark.parametrize("lists", [2, 4])
def test_nan_in_what_is_repaired(lists: int) -> None:
    """Seen by the rows that add the page, by nobody else: not even through a weight of 0."""
    case = AttentionCase("int8/int8", "4/2", "32/32", 2, "1300", "bf16", "int8", "-")
    queries, pages, options = make_attention(case)
    z = torch.full((1, lists, pages.table.shape[1]), math.inf)
    z[0, 0, 3] = -math.inf  # the first list has read all of page 3
    clean, clean_lse = cpu.repair(queries, pages, z, options.scale)
    apart = slice(0, 4 // lists)
    for name in ("mean", "value_mean"):
        broken = with_field(pages, 3, name, math.nan, 5)
        check_repair(queries, broken, z, options.scale, name)
        o, lse = cpu.repair(queries, broken, z, options.scale)
        assert torch.equal(o[:, apart], clean[:, apart])
        assert torch.equal(lse[:, apart], clean_lse[:, apart])
        assert torch.equal(o[:, 2:], clean[:, 2:])  # the other KV head
        if lists == 4:
            assert bool(o[0, 1, :, 5].isnan().all())
            assert bool(lse[0, 1].isnan().all()) == (name == "mean")


def test_nan_in_a_query_stays_in_its_row() -> None:
    case = AttentionCase("int8/int8", "4/2", "32/32", 3, "1300", "bf16", "int8", "-")
    made = make_attention(case)
    q = made[0].q.clone()
    q[0, 1, 2, 3] = math.nan
    broken, z, scale = dataclasses.replace(made[0], q=q), unread_of(made[1], 1), made[2].scale

    def results(queries: Queries) -> list[Tensor]:
        scores = [cpu.page_scores(queries, made[1], kind, scale) for kind in KINDS]
        return [*scores, cpu.token_scores(queries, made[1], scale, "int8"),
                *cpu.repair(queries, made[1], z, scale)]  # fmt: skip

    for clean, got in zip(results(made[0]), results(broken), strict=True):
        read = ~torch.isneginf(clean[0, 1, 2])
        assert bool(got[0, 1, 2][read].isnan().all())
        got[0, 1, 2] = clean[0, 1, 2]
        assert torch.equal(got, clean)


# Negative controls


def flipped(pages: PageView, name: str) -> PageView:
    """One byte of a field of an index row changed."""
    index, field = pages.index.clone(), pages.format.index_fields[name]
    index[int(pages.table[0, 1]), 0, field.offset + (5 if name != "numbers" else 2)] ^= 0x20
    return dataclasses.replace(pages, index=index)


READS = {
    "bound": ("mean", "max", "min", "numbers"),
    "mean": ("mean",),
    "mass": ("mean", "numbers", "deviation"),
    "floor": ("mean", "numbers"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_byte_of_the_index_is_found(kind: PageScore) -> None:
    """In every field that a score reads, and in no other."""
    case = AttentionCase("int8/int8", "2/1", "32/32", 1, "500", "fp32", "int8", "-")
    queries, pages, options = make_attention(case)
    clean = cpu.page_scores(queries, pages, kind, options.scale)
    answer = oracle.page_scores(queries, pages, kind, options.scale)
    for name in pages.format.index_fields:
        got = cpu.page_scores(queries, flipped(pages, name), kind, options.scale)
        if name in READS[kind]:
            assert share_of(got, *answer) > 1, name
        else:
            assert torch.equal(got, clean), name


def test_a_wrong_byte_or_quantile_of_repair_is_found() -> None:
    case = AttentionCase("int8/int8", "2/1", "32/32", 1, "500", "fp32", "int8", "-")
    queries, pages, options = make_attention(case)
    z, scale = torch.zeros(1, 1, pages.table.shape[1]), options.scale / 8  # no page has all weight
    o, lse, o_bound, lse_bound = oracle.repair(queries, pages, z, scale)

    def share(pages: PageView, z: Tensor) -> float:
        got_o, got_lse = cpu.repair(queries, pages, z, scale)
        return max(share_of(got_o, o, o_bound), share_of(got_lse, lse, lse_bound))

    assert share(pages, z) <= 1
    for name in ("mean", "numbers", "deviation", "value_mean"):
        assert share(flipped(pages, name), z) > 1, name
    for entry in range(z.shape[2]):
        other = z.clone()
        other[0, 0, entry] = 0.1
        assert share(pages, other) > 1, entry


@pytest.mark.parametrize("packed", [False, True])
def test_a_wrong_label_is_found(packed: bool) -> None:
    case, count, chosen = LABELS[0]
    queries, pages, labels, *given = labelled(case, count, chosen, 4 if packed else 8)
    answer = oracle.label_scores(queries, pages, labels, *given)
    if packed:
        flat = reference.pack_labels(labels.numpy().reshape(-1, 64))
        labels = torch.from_numpy(flat).reshape(*labels.shape[:3], 32)
    assert share_of(cpu.label_scores(queries, pages, labels, *given), *answer) <= 1
    labels[int(pages.table[0, 0]), 1, 3, 0] ^= 1
    assert share_of(cpu.label_scores(queries, pages, labels, *given), *answer) > 1


def test_a_wrong_extreme_or_key_is_found() -> None:
    case = AttentionCase("int8/int8", "2/1", "32/32", 1, "500", "fp32", "int8", "-")
    queries, pages, options = make_attention(case)
    page, field = int(pages.table[0, 2]), pages.format.index_fields["max"]
    answer = oracle.page_scores(queries, pages, "bound", options.scale)
    pages.index[page, 0, field.offset : field.end] -= 1
    assert share_of(cpu.page_scores(queries, pages, "bound", options.scale), *answer) > 1
    answer = oracle.token_scores(queries, pages, options.scale, "int8")
    pages.records[page, 0, pages.format.fields["keys"].offset + 7] ^= 1
    assert share_of(cpu.token_scores(queries, pages, options.scale, "int8"), *answer) > 1


def test_refusals() -> None:
    queries, pages, labels, *given = labelled(LABELS[0][0], 16, 16, 8)
    scale, z = given[-1], torch.zeros(2, 3, pages.table.shape[1])
    doubled = dataclasses.replace(queries, q=queries.q.double())
    packed = dataclasses.replace(queries, offsets=integers([0, 1]))
    turned = labels.transpose(2, 3).contiguous().transpose(2, 3)
    case = AttentionCase("int8/int8", "4/2", "64/64", 1, "900", "bf16", "int8", "lists=kv")
    _, listed, _ = make_attention(case)
    with pytest.raises(ValueError, match="kind must be one of"):
        cpu.page_scores(queries, pages, "sum", scale)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float64"):
        cpu.page_scores(doubled, pages, "mean", scale)
    with pytest.raises(ValueError, match="offsets"):
        cpu.repair(packed, pages, z[:, :1], scale)
    with pytest.raises(ValueError, match="unread must be"):
        cpu.repair(queries, pages, z, scale)
    with pytest.raises(ValueError, match="labels must be contiguous"):
        cpu.label_scores(queries, pages, turned, *given)
    with pytest.raises(ValueError, match="query must be"):
        cpu.token_scores(queries, pages, scale, "float")
    with pytest.raises(ValueError, match="lists"):
        cpu.token_scores(queries, listed, scale, "int8")


@pytest.mark.parametrize("name", LOWERINGS)
def test_other_instruction_sets(name: str) -> None:
    run_lowered(
        name,
        """
        import torch; torch.set_num_threads(1)
        from test_cpu_select import AttentionCase, LABELS, check, test_label_scores
        from test_top_k import check_cpu
        for text in ("int8/int8 4/2 33/17 3 200,90 bf16 int8 holes",
                     "int4/int4 3/1 64/80 1 200 fp16 int8 parts"):
            check(AttentionCase.parse(text))
        test_label_scores(*LABELS[1], 4)
        check_cpu()
        """,
    )
