"""Page lists of each head and masks of tokens in the compiled attend loop, and what it reads."""

from __future__ import annotations

import dataclasses
import functools

import numba
import numpy as np
import pytest
import torch
from test_cpu_attention import check, plan
from test_triton_attention import ratios
from torch import Tensor

from cases_attention import AttentionCase, integers, make_attention, spoiled
from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.formats.device import known_device
from lath.formats.pages import PAGE, PageCodec, PageFormat
from lath.kernels.attention import cpu, cpu_ask, cpu_loop, cpu_softmax, cpu_tile
from lath.kernels.attention.cpu_arguments import Kind
from lath.kernels.attention.cpu_order import asked_lines
from lath.kernels.attention.plan import plan_attention
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import BF16
from oracle_attention import definition

LISTS = ("table", "starts", "counts", "page_counts")
Arguments = tuple[Queries, PageView, ScoreOptions]


def case(options: str, lengths: str = "700,300", rows: int = 1) -> AttentionCase:
    return AttentionCase("int8/int8", "4/2", "64/64", rows, lengths, "bf16", "int8", options)


def every_page(pages: PageView, heads: int, own: bool) -> PageView:
    """Lists of all pages for `heads` heads. own: each in its own memory, else one for all."""
    lists = {}
    for name in LISTS:
        tensor = getattr(pages, name)
        tensor = tensor[:, None].expand(-1, heads, *tensor.shape[1:])
        lists[name] = tensor.contiguous() if own else tensor
    return dataclasses.replace(pages, **lists, listed=pages.longest)


def equal(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_lists_of_all_pages_are_the_dense_view(rows: int) -> None:
    """Bit for bit: shared, of KV heads, of query heads; with masks that admit every token."""
    queries, pages, options = make_attention(case("parts;causal;holes", rows=rows))
    dense = cpu.attend(queries, pages, options, plan())
    for heads in (2, 4):
        for own in (False, True):
            view = every_page(pages, heads, own)
            full = torch.full(view.table.shape, -1, dtype=torch.int64)
            for tokens in (None, full):
                listed = dataclasses.replace(view, tokens=tokens)
                assert equal(cpu.attend(queries, listed, options, plan()), dense)


@pytest.mark.parametrize("options", ["lists=kv", "lists=query;tokens", "lists=shared;tokens"])
def test_more_rows_pieces_and_packed_rows(options: str) -> None:
    """Tiles of 64 rows; more pieces than pages; rows of all sequences in one batch row."""
    check(case(f"parts;causal;{options}", "400,64", rows=70), 1, 3)
    check(case(f"parts;{options}", "400,64,130"), 2, 40)
    check(case(f"parts;causal;packed;window=200;{options}", "300,70"), 1)


def test_lists_may_have_any_strides() -> None:
    """Slices of larger tensors, each with strides of its own; garbage around them."""
    queries, pages, options = make_attention(case("parts;lists=kv;tokens"))
    expected = cpu.attend(queries, pages, options, plan())
    lists = {}
    for number, name in enumerate((*LISTS, "tokens")):
        tensor = getattr(pages, name)
        sequences, heads, *width = tensor.shape
        wide = [size + number for size in width]
        large = torch.full((heads + 1, sequences + number, *wide), -7, dtype=tensor.dtype)
        own = large.transpose(0, 1)[:sequences, 1:]
        own = own[..., number:] if width else own
        own.copy_(tensor)
        lists[name] = own
    assert equal(
        cpu.attend(queries, dataclasses.replace(pages, **lists), options, plan()), expected
    )


def test_what_is_behind_a_list_or_a_count_is_not_read() -> None:
    """Entries behind page_counts, and bits of tokens behind an entry's count."""
    arguments = make_attention(case("parts;holes;lists=kv;tokens"))
    queries, pages, options = arguments
    expected = cpu.attend(queries, pages, options, plan())
    assert pages.tokens is not None
    used = torch.arange(pages.table.shape[2]) < pages.page_counts[..., None]
    assert bool((pages.counts[used] < PAGE).any())
    assert not used.all()
    other = dataclasses.replace(
        pages,
        table=torch.where(used, pages.table, 2**30),
        starts=torch.where(used, pages.starts, 3),
        counts=torch.where(used, pages.counts, PAGE),
        tokens=pages.tokens ^ (-1 << pages.counts.long().clamp(max=63)) * (pages.counts < PAGE),
    )
    assert equal(cpu.attend(queries, other, options, plan()), expected)


def test_a_page_without_tokens_is_skipped() -> None:
    """As if it were not in the list, and not read; bits that do not count admit nothing."""
    queries, pages, options = make_attention(case("parts;causal;lists=query", rows=2))
    traffic, fewer = cpu.Traffic(), cpu.Traffic()
    tokens = torch.full(pages.table.shape, -1, dtype=torch.int64)
    counts = torch.where(pages.counts > 0, PAGE // 2, 0).to(torch.int32)
    pages = dataclasses.replace(pages, counts=counts)
    # The first of each list: only tokens that do not count.
    tokens[:, :, 0] = -1 << (PAGE // 2)
    masked = dataclasses.replace(pages, tokens=tokens)
    shorter = dataclasses.replace(
        masked,
        **{
            name: getattr(masked, name)[:, :, 1:]
            for name in ("table", "starts", "counts", "tokens")
        },
        page_counts=(pages.page_counts - 1).clamp(min=0),
    )
    assert equal(
        cpu.attend(queries, masked, options, plan(), traffic=traffic),
        cpu.attend(queries, shorter, options, plan(), traffic=fewer),
    )
    assert traffic == fewer
    half = pages.format.record_bytes - 2 * pages.format.subpage_bytes()
    assert traffic.records == int(shorter.page_counts.sum()) * half


@pytest.mark.parametrize("text", ["parts;lists=kv", "parts;lists=query;tokens", "lists=shared"])
def test_empty_lists_leave_the_float_parts(text: str) -> None:
    queries, pages, options = make_attention(case(text))
    empty = dataclasses.replace(pages, page_counts=torch.zeros_like(pages.page_counts))
    found = cpu.attend(queries, empty, options, plan(2))
    if "parts" not in text:
        assert not found[0].any()
        assert bool(torch.isneginf(found[1]).all())
        return
    answer = definition(queries, empty, options)
    assert max(ratios(answer, queries, *found)) <= 1
    assert float(found[0].abs().max()) > 0


@pytest.mark.parametrize("text", ["parts;lists=kv;tokens", "parts;causal;lists=query"])
def test_results_do_not_depend_on_threads(text: str) -> None:
    queries, pages, options = make_attention(case(text))
    for pieces in (1, 3):
        single = cpu.attend(queries, pages, options, plan(pieces))
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            try:
                traffic = cpu.Traffic()
                found = cpu.attend(queries, pages, options, plan(pieces), traffic=traffic)
            finally:
                torch.set_num_threads(1)
            assert equal(found, single)
            assert traffic.records == int(pages.page_counts.sum()) * pages.format.record_bytes


# What is read


def test_traffic_of_lists() -> None:
    """Records and means of the listed pages, counted over calls; nothing in the answer changes."""
    queries, pages, options = make_attention(case("parts;lists=kv"))
    traffic = cpu.Traffic()
    for pieces in (1, 4):
        plain = cpu.attend(queries, pages, options, plan(pieces))
        assert equal(cpu.attend(queries, pages, options, plan(pieces), traffic=traffic), plain)
    read, fmt = 2 * int(pages.page_counts.sum()), pages.format
    assert traffic == cpu.Traffic(read * fmt.record_bytes, read * 2 * fmt.padded_key_dim)


def test_traffic_of_what_is_read_in_part() -> None:
    """A window's pages, planes of a draft, float keys without a mean, pages for each row tile."""

    def traffic_of(text: str) -> tuple[cpu.Traffic, PageView]:
        queries, pages, options = make_attention(AttentionCase.parse(text))
        traffic = cpu.Traffic()
        cpu.attend(queries, pages, options, plan(), traffic=traffic)
        return traffic, pages

    traffic, pages = traffic_of("int8/int8 4/2 64/64 1 640 bf16 int8 causal;window=100")
    assert traffic.records == 2 * 2 * pages.format.record_bytes  # positions 540 .. 639
    traffic, pages = traffic_of(
        "int8-planes/int8-planes 4/2 64/64 1 260 bf16 int8 parts;draft;causal"
    )
    assert traffic.records == 2 * int(pages.page_counts.sum()) * pages.format.draft_bytes
    traffic, pages = traffic_of("float/float 4/2 32/32 1 256 bf16 float -")
    assert traffic == cpu.Traffic(2 * 4 * pages.format.record_bytes, 0)
    traffic, pages = traffic_of("int8/int8 2/2 64/64 128 128 bf16 int8 causal")
    assert traffic.records == 2 * (1 + 2) * pages.format.record_bytes


@pytest.mark.parametrize("heads", [None, 2, 4])
def test_the_plan_predicts_the_traffic(heads: int | None) -> None:
    """Without lists, with lists of KV heads and with lists of query heads, of 10 full pages."""
    queries, pages, options = make_attention(case("-", "640,640"))
    if heads is not None:
        pages = every_page(pages, heads, own=True)
    traffic = cpu.Traffic()
    cpu.attend(queries, pages, options, plan(), traffic=traffic)
    predicted = plan_attention(
        sequences=2, query_heads=4, kv_heads=2, queries=1, keys=pages.most_keys, fmt=pages.format,
        dtype=queries.q.dtype, options=options, device=known_device("avx512_vnni"), backend="cpu",
        lists=pages.list_heads,
    ).bytes_moved  # fmt: skip
    rows_of_q_and_o = 2 * queries.q.numel() * queries.q.element_size()
    assert traffic.records + traffic.index + rows_of_q_and_o == predicted


@pytest.mark.parametrize("heads", [2, 4])
def test_the_plan_predicts_the_traffic_of_subpages(heads: int) -> None:
    """As many 16 tokens of each list as are said, of a page one to four."""
    queries, pages, options = make_attention(case("-", "640,640"))
    pages = every_page(pages, heads, own=True)
    bits = torch.tensor([-1 << 60, 1, 1 << 20 | 1, 1 << 30 | 1 << 62, 1 | 1 << 17 | 1 << 40, -1])
    subpages = [1, 1, 2, 2, 3, 4]
    some = [i % 6 for i in range(10)]
    tokens = bits[some].expand(pages.table.shape).contiguous()
    traffic = cpu.Traffic()
    cpu.attend(queries, dataclasses.replace(pages, tokens=tokens), options, plan(), traffic)
    planned = {
        name: plan_attention(
            sequences=2, query_heads=4, kv_heads=2, queries=1, keys=pages.most_keys,
            fmt=pages.format, dtype=queries.q.dtype, options=options, backend="cpu", tokens=True,
            device=known_device("avx512_vnni"), lists=heads, subpages=count,
        ).bytes_moved
        for name, count in (("own", sum(subpages[i] for i in some)), ("all", 40), ("none", None))
    }  # fmt: skip
    rows_of_q_and_o = 2 * queries.q.numel() * queries.q.element_size()
    assert traffic.records + traffic.index + rows_of_q_and_o == planned["own"]
    assert planned["own"] < planned["all"] == planned["none"]


@pytest.mark.parametrize("codecs", ["int8/int8", "int8-planes/int4", "int2/int8", "float/int8"])
@pytest.mark.parametrize("dims", [(128, 128), (64, 192), (16, 32)])
@pytest.mark.parametrize("draft", [False, True])
def test_every_line_is_asked_for_once(codecs: str, dims: tuple[int, int], draft: bool) -> None:
    """Of the planes that the integer loops read; as many as those loops, and 4 rows of a softmax
    that follows keys, have places for."""
    names = codecs.split("/")
    fmt = PageFormat(PageCodec(names[0]), PageCodec(names[1]), *dims)
    key, value = ("draft" if draft and name == "int8-planes" else name for name in names)
    kind = Kind(key, value, "int8", "int8", BF16, brain=False, few=True)
    lines, before_values = asked_lines(fmt, kind)
    read = {"keys": key, "values": value, "keys_low": key, "values_low": value}
    expected: list[int] = []
    for name, field in fmt.fields.items():
        if name.removesuffix("_low") in ("keys", "values") and read[name] != "float":
            if name.endswith("_low") and read[name] == "draft":
                continue
            assert field.offset % 64 == field.nbytes % 64 == 0
            expected += range(field.offset, field.end, 64)
    assert sorted(lines) == expected
    assert before_values == sum(line < fmt.fields["values"].offset for line in expected)
    assert before_values % 16 == 0


# Sub-pages without a token


SPARSE = [
    "int8/int8 4/2 64/64 1 700,300 bf16 int8 parts;lists=kv",
    "int8/int8 4/2 48/80 3 500 fp32 int16 parts;causal;lists=query",
    "int8-planes/int8-planes 4/2 64/64 1 500 bf16 int8 parts;lists=kv",
    "int8-planes/int8-planes 4/2 64/64 1 500 bf16 int8 parts;lists=query;draft",
    "int4/int2 4/2 64/64 1 500 fp16 int8 parts;lists=shared",
    "int8/float 4/2 64/32 2 500 bf16 float lists=kv;causal",
    "e4m3/e4m3 4/2 64/64 1 500 bf16 e4m3 parts;lists=kv;e4m3",
    "float/int8 4/2 32/32 40 500 fp32 int8 lists=kv;causal;alibi",
    "float/float 4/2 48/32 1 500 bf16 float lists=query;softcap=5",
    "int4/int8 4/2 64/64 30 400 bf16 float parts;causal;window=90;lists=kv",
]


def with_units(text: str, seed: int = 0) -> Arguments:
    """Masks of units of 16 tokens, of tokens in some, and of the whole of others."""
    queries, pages, options = make_attention(AttentionCase.parse(text))
    rng = np.random.default_rng(seed)
    shape = tuple(pages.table.shape)
    units = rng.choice([0, 0, 0x1, 0x8001, 0xFFFF, 0xFFFF], size=(*shape, 4)).astype(np.uint64)
    masks = functools.reduce(np.bitwise_or, (units[..., s] << np.uint64(16 * s) for s in range(4)))
    return (
        queries,
        dataclasses.replace(pages, tokens=torch.from_numpy(masks.view(np.int64))),
        options,
    )


@pytest.mark.parametrize("text", SPARSE)
def test_subpages_without_a_token_are_not_read(text: str) -> None:
    """Whatever lies in them, NaN included: not a bit changes. It does where others are spoiled."""
    queries, pages, options = with_units(text)
    found = cpu.attend(queries, pages, options, plan())
    assert not found[0].isnan().any()
    assert max(ratios(definition(queries, pages, options), queries, *found)) <= 1
    assert equal(cpu.attend(queries, spoiled(pages, True), options, plan()), found)
    assert not equal(cpu.attend(queries, spoiled(pages, False), options, plan()), found)


@pytest.mark.parametrize("text", SPARSE)
def test_leaving_them_out_changes_no_bit(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same loop over all four sub-pages of each page."""
    queries, pages, options = with_units(text)
    found = cpu.attend(queries, pages, options, plan())
    every = lambda c, tokens, subpage: c.true  # noqa: E731
    for module in (cpu_tile, cpu_softmax, cpu_ask, cpu_loop):
        monkeypatch.setattr(module, "subpage_is_read", every)
    monkeypatch.setattr("lath.kernels.simd.compile.callback", numba.cfunc)
    monkeypatch.setattr(cpu, "compile_kernel", compile_kernel.__wrapped__)
    monkeypatch.setattr(cpu, "_prepared", cpu._prepared.__wrapped__)
    traffic = cpu.Traffic()
    assert equal(cpu.attend(queries, pages, options, plan(), traffic), found)
    few = cpu.Traffic()
    monkeypatch.undo()
    cpu.attend(queries, pages, options, plan(), few)
    assert few.records < traffic.records


# Negative controls and refusals


def test_another_heads_list_is_found() -> None:
    for lists in ("kv", "query"):
        queries, pages, options = make_attention(case(f"lists={lists}"))
        answer = definition(queries, pages, options)
        turned = {name: getattr(pages, name).roll(1, dims=1) for name in LISTS}
        o, lse = cpu.attend(queries, dataclasses.replace(pages, **turned), options, plan())
        assert max(ratios(answer, queries, o, lse)) > 1


def test_a_wrong_bit_is_found() -> None:
    queries, pages, options = make_attention(case("lists=kv;tokens"))
    assert pages.tokens is not None
    answer = definition(queries, pages, options)
    wrong = dataclasses.replace(pages, tokens=pages.tokens ^ (1 << 17))
    o, lse = cpu.attend(queries, wrong, options, plan())
    assert max(ratios(answer, queries, o, lse)) > 1


def test_refusals() -> None:
    queries, pages, options = make_attention(case("lists=query"))
    three = {name: getattr(pages, name)[:, :3] for name in LISTS}
    with pytest.raises(ValueError, match="2 KV or 4 query heads, got 3"):
        cpu.attend(queries, dataclasses.replace(pages, **three), options, plan())
    wide = pages.starts.repeat_interleave(2, dim=2)[..., ::2]
    with pytest.raises(ValueError, match="stride 1 in their last axis"):
        cpu.attend(queries, dataclasses.replace(pages, starts=wide), options, plan())
    queries, pages, options = make_attention(case("-"))
    masked = dataclasses.replace(pages, tokens=torch.full((2, 11), -1))
    with pytest.raises(ValueError, match="tokens must come with lists"):
        cpu.attend(queries, masked, options, plan())
    assert integers([1]).dtype == pages.table.dtype
