"""Lists of pages per head and masks of tokens in Triton, interpreted: what the catalogue leaves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from test_triton_attention import plan_for, ratios
from torch import Tensor

from cases_attention import AttentionCase, make_attention, spoiled
from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.formats.device import known_device
from lath.formats.pages import PAGE, PageFormat
from lath.formats.plan import Plan
from lath.kernels.attention import triton as launcher
from lath.kernels.attention.plan import plan_attention
from lath.verbs import page_operators
from oracle_attention import definition
from tools.loads import LINE
from tools.sanitizer import Report, sanitize

LISTED = "int8/int8 4/2 32/32 2 500,200 bf16 int8 parts;causal;lists=kv;tokens"

# No list is split for it.
ONE_UNIT = dataclasses.replace(known_device("sm_90"), compute_units=1)


def attend(case: AttentionCase, view: PageView, **planned: object) -> tuple[Tensor, Tensor]:
    queries, _, options = make_attention(case)
    return launcher.attend(queries, view, options, plan_for(case, **planned))  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["kv", "query"])
def test_lists_of_all_pages_are_no_lists(which: str) -> None:
    """Every head's list is the table, with stride 0: the same bits as without lists."""
    case = AttentionCase.parse("int8/int8 4/2 32/32 1 500,200 bf16 int8 parts")
    queries, view, options = make_attention(case)
    heads = 2 if which == "kv" else 4
    own = {
        name: getattr(view, name)[:, None].expand(-1, heads, *getattr(view, name).shape[1:])
        for name in ("table", "starts", "counts", "page_counts")
    }
    listed = dataclasses.replace(view, **own, listed=view.longest)
    plan = plan_for(case, pack=2 if which == "kv" else 1)
    expected = launcher.attend(queries, view, options, plan_for(case, pack=1))
    got = launcher.attend(queries, listed, options, plan)
    whole = dataclasses.replace(listed, tokens=torch.full(own["table"].shape, -1))
    masked = launcher.attend(queries, whole, options, plan)
    for one, other, third in zip(expected, got, masked, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_strides_of_lists_are_free() -> None:
    """Heads first in memory, or each tensor with strides of its own: the same bits."""
    case = AttentionCase.parse(LISTED)
    _, view, _ = make_attention(case)
    names = ("table", "starts", "counts", "tokens", "page_counts")
    turned = {name: getattr(view, name).transpose(0, 1).contiguous().transpose(0, 1)
              for name in names}  # fmt: skip
    apart = {**turned, "starts": view.starts, "counts": torch.cat([view.counts] * 2, 2)}
    apart["counts"] = apart["counts"][:, :, : view.table.shape[2]]
    expected = attend(case, view)
    for other in (turned, apart):
        assert any(not tensor.is_contiguous() for tensor in other.values())
        got = attend(case, dataclasses.replace(view, **other))  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "int8/int8 4/2 32/32 2 400 bf16 int8 lists=kv;tokens",
        "int8/float 4/2 32/32 2 500 bf16 float lists=query;tokens",
        "float/float 2/2 32/32 20 300 fp16 float lists=kv;tokens;causal",
        "int4/int4 4/2 64/64 1 500 bf16 int16 parts;lists=kv;tokens;unified",
    ],
)
def test_a_page_without_a_token_adds_nothing(text: str) -> None:
    """Its record and index row are NaN, and its only bits lie behind its count: no trace of them.
    A list of nothing else is a list of nothing."""
    case = AttentionCase.parse(text)
    queries, view, options = make_attention(case)
    assert view.tokens is not None
    bad = int(view.table[0, 0, 0])
    records, index, tokens, counts = (
        tensor.clone() for tensor in (view.records, view.index, view.tokens, view.counts)
    )
    here = (view.table == bad) & (view.counts > 0)
    assert bool(here.any())
    counts[here], tokens[here] = counts[here].clamp(max=40), -1 << 40
    view = dataclasses.replace(view, tokens=tokens, counts=counts)
    records[bad], index[bad] = 0xFF, 0xFF
    spoiled = dataclasses.replace(view, records=records, index=index)
    dataflow = "prefill" if case.rows > 16 else "decode"
    for splits in (1, 3):
        plan = plan_for(case, dataflow, splits)
        for one, other in zip(
            launcher.attend(queries, view, options, plan),
            launcher.attend(queries, spoiled, options, plan),
            strict=True,
        ):
            assert not other.isnan().any()
            torch.testing.assert_close(one, other, rtol=2**-8, atol=2**-18)
        o, lse = launcher.attend(queries, spoiled, options, plan)
        assert max(ratios(definition(queries, view, options), queries, o, lse)) <= 1
    if "parts" not in case.words:
        empty = dataclasses.replace(spoiled, tokens=torch.zeros_like(tokens))
        o, lse = launcher.attend(queries, empty, options, plan)
        assert not o.any()
        assert bool(torch.isneginf(lse).all())


@pytest.mark.parametrize("wrong", ["tokens", "head", "count"])
def test_the_bounds_notice(wrong: str) -> None:
    """Negative controls: tokens that were not chosen, another head's list, a page too few."""
    case = AttentionCase.parse(LISTED)
    queries, view, options = make_attention(case)
    answer = definition(queries, view, options)
    changed = {name: getattr(view, name).clone() for name in ("tokens", "table", "page_counts")}
    if wrong == "tokens":
        changed["tokens"][0, 0, 1] = -1
    elif wrong == "head":
        changed["table"] = changed["table"].flip(1)
    else:
        changed["page_counts"][0, 1] -= 1
    o, lse = launcher.attend(queries, dataclasses.replace(view, **changed), options, plan_for(case))
    assert max(ratios(answer, queries, o, lse)) > 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"table": torch.zeros(2, 3, 6)}, "pages table .* 2 KV heads or of the 4 query heads"),
        ({"starts": torch.zeros(2, 2, 1)}, r"pages starts must have the table's shape \(2, 2, "),
        ({"page_counts": torch.zeros(2)}, r"pages page_counts must be \(2, 2\)"),
    ],
)
def test_impossible_lists_are_refused(changed: dict[str, Tensor], message: str) -> None:
    case = AttentionCase.parse(LISTED)
    _, view, _ = make_attention(case)
    with pytest.raises(ValueError, match=message):
        attend(case, dataclasses.replace(view, **changed))  # type: ignore[arg-type]


def test_what_lists_need_is_refused_without_them() -> None:
    case = AttentionCase.parse("int8/int8 4/2 32/32 1 200 bf16 int8 parts")
    queries, view, options = make_attention(case)
    with pytest.raises(ValueError, match="pages tokens need lists of heads"):
        attend(case, dataclasses.replace(view, tokens=torch.ones_like(view.table).long()))
    case = AttentionCase.parse("int8/int8 4/2 32/32 1 200 bf16 int8 parts;lists=query")
    queries, view, options = make_attention(case)
    with pytest.raises(ValueError, match="pack must divide the 1 query heads of a list"):
        launcher.attend(queries, view, options, plan_for(case, pack=2))


# What a step reads


def uniform_lists(view: PageView, heads: int, pages: int) -> PageView:
    """The view with lists of as many pages each, chosen at random, ascending."""
    rng = np.random.default_rng(7)
    sequences, width = view.table.shape
    chosen = torch.tensor(
        [[sorted(rng.permutation(width)[:pages]) for _ in range(heads)] for _ in range(sequences)]
    )
    table, starts, counts = (
        entries[:, None].expand(-1, heads, -1).gather(2, chosen)
        for entries in (view.table, view.starts, view.counts)
    )
    assert view.first_lengths is not None and view.last_lengths is not None  # noqa: PT018
    floats = int((view.first_lengths + view.last_lengths).max())
    return dataclasses.replace(
        view, table=table, starts=starts, counts=counts,
        page_counts=torch.full((sequences, heads), pages, dtype=torch.int32),
        tokens=torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, table.shape)),
        listed=pages * PAGE + floats,
    )  # fmt: skip


def of_units(view: PageView, seed: int = 3) -> tuple[PageView, int]:
    """The view's lists with masks of units of 16 tokens, or of one token of them: one to three of
    each page, as many in each list. Returns their number too."""
    rng = np.random.default_rng(seed)
    sequences, heads, pages = view.table.shape
    numbers = [1 + page % 3 for page in range(pages)]
    masks = np.zeros((sequences, heads, pages), np.uint64)
    for s, head, page in np.ndindex(*masks.shape):
        for subpage in rng.permutation(4)[: numbers[page]]:
            unit = int(rng.choice([0xFFFF, 1 << int(rng.integers(16))]))
            masks[s, head, page] |= np.uint64(unit << 16 * int(subpage))
    tokens = torch.from_numpy(masks.view(np.int64))
    return dataclasses.replace(view, tokens=tokens), sum(numbers)


def planned(
    queries: Queries,
    view: PageView,
    options: ScoreOptions,
    floats: int,
    subpages: int | None = None,
) -> Plan:
    return plan_attention(
        sequences=view.num_sequences, query_heads=queries.q.shape[1], kv_heads=view.num_kv_heads,
        queries=queries.longest, keys=view.most_keys, fmt=view.format, dtype=queries.q.dtype,
        options=options, device=ONE_UNIT, backend="triton", lists=view.list_heads,
        tokens=view.tokens is not None, subpages=subpages, float_keys=floats, draft=view.draft,
    )  # fmt: skip


def untouched(fmt: PageFormat, draft: bool) -> int:
    """Bytes of a record in lines without a field that the loop reads: scales that floats lack."""
    read = set()
    for name, field in fmt.fields.items():
        floats = fmt.key.map if name == "key_scales" else fmt.value.map
        if (name.endswith("scales") and floats == "float") or (draft and name.endswith("_low")):
            continue
        used = 4 if name == "key_scales" else field.nbytes
        read |= {at // LINE for at in range(field.offset, field.offset + used)}
    whole = fmt.draft_bytes if draft else fmt.record_bytes
    return whole - LINE * len(read)


def counted(
    queries: Queries, view: PageView, options: ScoreOptions, plan: Plan
) -> tuple[Report, int]:
    """The report of a step, and the bytes that it loaded from index rows and float parts."""
    watched = {
        name: getattr(view, name)
        for name in ("records", "index", "first_keys", "first_values", "last_keys", "last_values")
    }
    with sanitize(watch=watched, races=False) as report:
        launcher.attend(queries, view, options, plan)
    report.assert_clean()
    return report, sum(loads.bytes for name, loads in report.loads.items() if name != "records")


READ = [
    "int8/int8 4/2 64/64 1 720,720 bf16 int8 parts",
    "int4/int4 4/2 96/40 1 720 fp16 int8 parts",
    "int8-planes/int8-planes 4/2 64/64 1 720 bf16 int8 parts;draft",
    "int8/int8 4/2 48/80 1 720 bf16 float parts;unified",
    "float/float 4/2 32/64 1 720 bf16 float parts",
    "int8/float 4/2 64/32 1 720 bf16 float parts",
]


@pytest.mark.parametrize("lists", ["kv", "query", "none"])
@pytest.mark.parametrize("text", READ)
def test_a_step_reads_what_its_plan_says(text: str, lists: str) -> None:
    """Lists of 4 of 10 pages. Records by lines of 128 bytes, everything else by bytes: exactly the
    plan's number, but for the scales in records of floats, which no kernel reads."""
    case = AttentionCase.parse(text)
    queries, view, options = make_attention(case)
    assert view.first_lengths is not None and view.last_lengths is not None  # noqa: PT018
    floats = int(view.first_lengths[0] + view.last_lengths[0])
    if lists != "none":
        view = uniform_lists(view, 2 if lists == "kv" else 4, 4)
    plan = planned(queries, view, options, floats)
    report, rest = counted(queries, view, options, plan)
    records = report.loads["records"]
    pages = int(view.page_counts.sum()) * (2 if lists == "none" else 1)
    unread = untouched(view.format, view.draft)
    assert unread == 0 or "float" in case.codecs
    q_and_o = queries.q[..., 0].numel() * (view.format.key_dim + view.format.value_dim)
    q_and_o *= queries.q.element_size()
    assert records.lines * LINE + rest + q_and_o + unread * pages == plan.bytes_moved
    # Nothing twice: what a program loads from a record fits its lines.
    assert records.bytes <= records.lines * LINE


@pytest.mark.parametrize("lists", ["kv", "query"])
@pytest.mark.parametrize("text", [*READ, "e4m3/e4m3 4/2 64/64 1 720 bf16 e4m3 parts;e4m3"])
def test_subpages_without_a_token_are_not_read(text: str, lists: str) -> None:
    """Of lists of 4 of 10 pages, 7 of 16 sub-pages: exactly the plan's number, which is less than
    that of all, and not a bit that depends on what lies in the others, NaN included."""
    case = AttentionCase.parse(text)
    queries, view, options = make_attention(case)
    assert view.first_lengths is not None and view.last_lengths is not None  # noqa: PT018
    floats = int(view.first_lengths[0] + view.last_lengths[0])
    view, subpages = of_units(uniform_lists(view, 2 if lists == "kv" else 4, 4))
    plan = planned(queries, view, options, floats, subpages)
    report, rest = counted(queries, view, options, plan)
    pages = int(view.page_counts.sum())
    q_and_o = queries.q[..., 0].numel() * (view.format.key_dim + view.format.value_dim)
    found = report.loads["records"].lines * LINE + rest + q_and_o * queries.q.element_size()
    assert found + untouched(view.format, view.draft) * pages == plan.bytes_moved
    whole = planned(queries, view, options, floats)
    part = view.format.subpage_bytes(view.draft)
    assert whole.bytes_moved - plan.bytes_moved == (4 * pages - pages // 4 * subpages) * part > 0
    expected = launcher.attend(queries, view, options, plan)
    assert not expected[0].isnan().any()
    for unread, same in ((True, True), (False, False)):
        other = spoiled(view, unread)
        got = launcher.attend(queries, other, options, plan)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)) is same


def test_whole_lists_would_not_fit_the_plan() -> None:
    """Negative control: a kernel that read the table instead of the lists would be seen."""
    case = AttentionCase.parse("int8/int8 4/2 64/64 1 720 bf16 int8 parts")
    queries, view, options = make_attention(case)
    plan = planned(queries, view, options, 80)
    report, _ = counted(queries, view, options, plan)
    few, _ = counted(queries, uniform_lists(view, 2, 4), options, plan)
    assert 4 * report.loads["records"].lines == 10 * few.loads["records"].lines
    assert 4 * report.loads["index"].bytes == 10 * few.loads["index"].bytes


@triton.jit
def twice_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0) + tl.load(x + i % 4)
    tl.store(y + tl.program_id(0) * BLOCK + i, value)


def test_loads_are_counted_by_elements_and_lines() -> None:
    x, y = torch.zeros(64), torch.zeros(128)
    with sanitize(watch={"x": x, "end": x[40:]}) as report:
        twice_kernel[(2,)](x, y, 50, BLOCK=64)
    report.assert_clean()
    assert (report.loads["x"].bytes, report.loads["x"].lines) == (2 * 4 * (50 + 64), 2 * 2)
    assert (report.loads["end"].bytes, report.loads["end"].lines) == (2 * 4 * 10, 2)
    with (
        pytest.raises(ValueError, match="watched x must be contiguous"),
        sanitize(watch={"x": x[::2]}),
    ):
        pass


# The operator


def test_the_operator_carries_lists_and_tokens() -> None:
    text = "int8/int8 4/2 32/32 2 300 bf16 int8 parts;causal;lists=query;tokens"
    case = AttentionCase.parse(text)
    queries, view, options = make_attention(case)
    answer = definition(queries, view, options)
    for backend in ("reference", "triton"):
        direct = page_operators.attend(queries, view, options, backend)  # type: ignore[arg-type]
        assert max(ratios(answer, queries, *direct)) <= 1

    def step(q: Tensor) -> tuple[Tensor, Tensor]:
        own = dataclasses.replace(queries, q=q)
        return page_operators.attend(own, view, options, "triton")

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(queries.q)
    for one, other in zip(direct, compiled, strict=True):
        assert torch.equal(one, other)


def test_the_operator_passes_opcheck() -> None:
    case = AttentionCase.parse("int8/int8 2/1 32/32 1 200 bf16 int8 parts;lists=query;tokens")
    queries, view, options = make_attention(case)
    arguments = (
        queries.q.contiguous(), queries.lengths, view.records, view.index, view.table, view.starts,
        view.counts, view.page_counts, view.lengths, view.first_keys, view.first_values,
        view.first_lengths, view.last_keys, view.last_values, view.last_lengths, *[None] * 5,
        "int8", "int8", 32, 32, 1, view.longest, False, options.scale, True, None, None, "int8",
        "int8", "online", "reference", None, view.tokens, view.listed,
    )  # fmt: skip
    torch.library.opcheck(page_operators._attend_operator, arguments)
