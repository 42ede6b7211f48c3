"""The attend loop in Triton, interpreted, against the NumPy definition within derived bounds."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
from cases_attention import CATALOGUE, AttentionCase, dense_outputs, integers, make_attention
from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.formats.pages import PAGE_CODECS
from lath.formats.plan import Plan
from lath.kernels.attention import triton as launcher
from lath.kernels.attention.merge import merge
from lath.reference import attention as reference
from oracle_attention import Answer, definition
from tools.sanitizer import sanitize

SMALLEST_BOUND = 1e-30  # rows of no sequence are exact, and their bound is 0


def plan_for(
    case: AttentionCase,
    dataflow: str = "decode",
    splits: int = 1,
    pack: int | None = None,
    block_m: int | None = None,
    dot: str | None = None,
) -> Plan:
    heads, kv_heads = (int(count) for count in case.heads.split("/"))
    decode = dataflow == "decode"
    lists = heads if case.words.get("lists") == "query" else kv_heads
    if dot is None:
        dot = "e4m3" if "e4m3" in case.words else "int8"
        dot = case.dtype if case.codecs.startswith("float") else dot
    return Plan(
        "triton", dataflow, dot, "a test", 0, 0,  # type: ignore[arg-type]
        block_m=block_m or (16 if decode else 32), block_n=64, split_k=splits,
        pack=pack or (heads // lists if decode else 1), warps=4, stages=2,
    )  # fmt: skip


def ratios(answer: Answer, queries: Queries, o: Tensor, lse: Tensor) -> tuple[float, float]:
    """|error| over bound of o and of lse, the largest."""
    o, lse = dense_outputs(queries, o, lse)
    assert np.array_equal(np.isneginf(answer.lse), torch.isneginf(lse).numpy())
    finite = torch.isfinite(torch.from_numpy(answer.lse))
    lse_answer = np.where(finite, answer.lse, 0)
    lse = torch.where(finite, lse, 0)
    return (
        oracle.test_ratio(o, answer.o, answer.o_bound + SMALLEST_BOUND),
        oracle.test_ratio(lse, lse_answer, answer.lse_bound + SMALLEST_BOUND),
    )


def check(case: AttentionCase, *plans: Plan) -> None:
    queries, pages, options = make_attention(case)
    answer = definition(queries, pages, options)
    for plan in plans:
        o, lse = launcher.attend(queries, pages, options, plan)
        assert o.dtype == queries.q.dtype
        assert lse.dtype == torch.float32
        found = ratios(answer, queries, o, lse)
        assert max(found) <= 1, f"{case}: o {found[0]}, lse {found[1]}, {plan}"


@pytest.mark.parametrize("case", CATALOGUE, ids=str)
def test_parity(case: AttentionCase) -> None:
    check(case, plan_for(case, "decode"), plan_for(case, "prefill", splits=3))


@pytest.mark.parametrize(("key", "value"), list(itertools.product(PAGE_CODECS, PAGE_CODECS)))
def test_every_pair_of_codecs(key: str, value: str) -> None:
    precision = {"float": "float", "e4m3": "e4m3"}.get(value, "int8")
    query = ";e4m3" if key == "e4m3" else ""
    case = AttentionCase(
        f"{key}/{value}", "2/1", "64/32", 2, "150", "fp16", precision, f"parts;causal{query}"
    )
    check(case, plan_for(case))


@pytest.mark.parametrize("length", [0, 1, 15, 63, 64, 65, 129, 257])
@pytest.mark.parametrize("options", ["parts;causal", "causal"])
def test_lengths(length: int, options: str) -> None:
    """Pages, parts and rows (five, so that at times there are more queries than keys)."""
    value = "int8" if "parts" in options else "float"
    case = AttentionCase(f"int8/{value}", "2/1", "32/32", 5, str(length), "bf16", value, options)
    queries, pages, scores = make_attention(case)
    answer = definition(queries, pages, scores)
    for plan in (plan_for(case), plan_for(case, "prefill", splits=2)):
        o, lse = launcher.attend(queries, pages, scores, plan)
        assert max(ratios(answer, queries, o, lse)) <= 1
        alone = torch.from_numpy(np.isneginf(answer.lse))
        assert not o[alone].any()


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("int8/int8", "2/1", "80/96", 20, "200", "fp16", "int8", "causal;window=90"),
        AttentionCase("int4/int2", "2/1", "96/80", 3, "200", "bf16", "int16", "parts;causal"),
        AttentionCase("int8-planes/int8-planes", "2/1", "80/40", 3, "150", "bf16", "float",
                      "parts;draft;window=100"),
        AttentionCase("int2/e4m3", "2/1", "40/80", 2, "150", "bf16", "float", "e4m3;alibi"),
        AttentionCase("float/float", "2/1", "80/96", 30, "140", "fp16", "float",
                      "softcap=2;bias;causal"),
        AttentionCase("int8/e4m3", "3/1", "33/17", 4, "129", "fp32", "e4m3", "parts;sink;mask"),
    ],
    ids=str,
)  # fmt: skip
def test_head_dims_that_are_no_powers_of_two(case: AttentionCase) -> None:
    check(case, plan_for(case), plan_for(case, "prefill"))


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("e4m3/e4m3", "2/1", "32/48", 3, "200", "bf16", "e4m3", "parts;causal;e4m3"),
        AttentionCase("int4/e4m3", "2/1", "64/32", 2, "150", "bf16", "float", "e4m3"),
        AttentionCase("int2/e4m3", "2/1", "64/32", 2, "150", "fp32", "e4m3", "e4m3"),
    ],
    ids=str,
)
def test_fp16_stands_in_for_e4m3(case: AttentionCase) -> None:
    check(case, plan_for(case, dot="fp16"), plan_for(case, "prefill", dot="fp16"))


@pytest.mark.parametrize("pack", [1, 2, 4])
def test_heads_of_a_group_may_share_a_tile(pack: int) -> None:
    case = AttentionCase("int8/int8", "4/1", "32/32", 9, "150", "bf16", "int8", "parts;causal")
    check(case, plan_for(case, pack=pack), plan_for(case, "prefill", pack=pack, block_m=16))


@pytest.mark.parametrize(
    ("codecs", "precision", "options"),
    [
        ("int8/int8", "int8", "parts;causal;sink"),
        ("int4/int4", "int16", "parts"),
        ("int8/float", "float", "parts;unified"),
    ],
)
def test_splits_are_equal(codecs: str, precision: str, options: str) -> None:
    """Codes of P do not depend on the split, so only fp32 sums differ by their order."""
    case = AttentionCase(codecs, "2/1", "64/32", 2, "400", "fp32", precision, options)
    queries, pages, scores = make_attention(case)
    whole, lse = launcher.attend(queries, pages, scores, plan_for(case))
    for splits in (2, 3, 4, 9):
        o, other = launcher.attend(queries, pages, scores, plan_for(case, splits=splits))
        torch.testing.assert_close(o, whole, rtol=0, atol=2.0**-18 * float(whole.abs().max()))
        torch.testing.assert_close(other, lse, rtol=0, atol=2.0**-18 * float(lse.abs().max()))


@pytest.mark.parametrize("offset", [0.0, -300.0, 300.0, -90.0])
def test_unified_softmax_falls_back(offset: float) -> None:
    """The bound knows nothing of a bias: one this large loses or overflows every sum."""
    case = AttentionCase("int8/int8", "2/1", "32/32", 3, "200", "bf16", "int8", "unified;causal")
    queries, pages, options = make_attention(case)
    bias = torch.full((1, 1, 3, 200), offset)
    bias[:, :, 1] = 0.0
    options = dataclasses.replace(options, bias=bias)
    answer = definition(queries, pages, options)
    for splits in (1, 2):
        o, lse = launcher.attend(queries, pages, options, plan_for(case, splits=splits))
        assert max(ratios(answer, queries, o, lse)) <= 1


def test_a_bound_of_many_codecs() -> None:
    """Unified and online agree where the bound comes from other index units and formats of q."""
    for codecs, words in (("int4/int8", ""), ("float/int8", ""), ("e4m3/int8", ";e4m3")):
        case = AttentionCase(
            codecs, "2/1", "64/32", 2, "300", "bf16", "int8", f"parts;unified;softcap=4{words}"
        )
        check(case, plan_for(case), plan_for(case, "prefill"))


def test_rows_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long inputs are taken in runs of rows; nothing but memory depends on how long they are."""
    for options in ("causal", "packed;causal"):
        case = AttentionCase("int8/int8", "2/1", "32/32", 40, "40,21", "bf16", "int8", options)
        queries, pages, scores = make_attention(case)
        plan = plan_for(case, "prefill", block_m=16, splits=2)
        whole = launcher.attend(queries, pages, scores, plan)
        monkeypatch.setattr(launcher, "_MOST_CORRECTIONS", 1)
        parts = launcher.attend(queries, pages, scores, plan)
        monkeypatch.undo()
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


COVER = [
    ("int8/int8 4/2 32/32 5 200,64,10 bf16 int8 parts;ragged;causal;window=80", "decode", 2),
    ("int8/float 3/1 80/40 33 129,65 fp16 float causal", "prefill", 1),
    ("int4/int4 2/1 96/80 2 150 bf16 int8 parts;tree", "decode", 3),
    ("int8-planes/int8-planes 2/1 32/64 2 150 fp16 int16 parts;draft;bias;holes", "decode", 1),
    ("int2/e4m3 2/1 64/32 3 100 bf16 e4m3 parts;e4m3;mask;unified", "prefill", 2),
    ("float/int8 2/2 48/32 20 130 fp32 int8 parts;alibi;sink;softcap=3", "prefill", 1),
    ("e4m3/float 2/1 32/32 30 40,0,17 bf16 float packed;causal;e4m3", "prefill", 2),
    ("int8/int8 4/2 32/48 2 500,0,100 bf16 int8 parts;causal;lists=kv;tokens", "decode", 2),
    ("int4/float 4/2 80/32 20 300 fp16 float causal;lists=query;tokens;unified", "prefill", 1),
    ("int8/int8 4/2 32/32 40 400 bf16 int8 parts;causal;lists=shared;window=150", "prefill", 2),
]


@pytest.mark.parametrize(("text", "dataflow", "splits"), COVER)
def test_sanitizer_is_clean_and_nothing_else_changes(text: str, dataflow: str, splits: int) -> None:
    case = AttentionCase.parse(text)
    queries, pages, options = make_attention(case)
    plan = plan_for(case, dataflow, splits)
    given = (queries, pages, options)
    tensors = [v for part in given for v in vars(part).values() if isinstance(v, Tensor)]
    before = [tensor.clone() for tensor in tensors]
    results = []
    for order in (None, "reverse"):
        with sanitize(order=order) as report:  # type: ignore[arg-type]
            results.append(launcher.attend(queries, pages, options, plan))
        report.assert_clean()
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    for tensor, kept in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), kept.nan_to_num())
    answer = definition(queries, pages, options)
    assert max(ratios(answer, queries, *results[0])) <= 1


def nan_case(options: str) -> tuple[AttentionCase, Queries, PageView, ScoreOptions]:
    case = AttentionCase("int8/int8", "2/1", "32/32", 128, "192", "bf16", "int8", options)
    return case, *make_attention(case)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # NumPy, about a row of NaN
@pytest.mark.parametrize(
    ("dataflow", "options"), [("decode", "causal;unified"), ("prefill", "causal")]
)
def test_nan_comes_out_where_it_was_read(dataflow: str, options: str) -> None:
    """128 queries over three pages. A NaN scale of the last page's keys: every row that reads it is
    NaN and no other; one of a channel of its values: that channel of those rows."""
    case, queries, pages, scores = nan_case(options)
    plan = plan_for(case, dataflow)
    clean, _ = launcher.attend(queries, pages, scores, plan)
    fields, last = pages.format.fields, int(pages.table[0, 2])

    def poisoned(field: str, place: int) -> PageView:
        records = pages.records.clone()
        numbers = records[last, 0].view(torch.float32)
        numbers[fields[field].offset // 4 + place] = math.nan
        return dataclasses.replace(pages, records=records)

    o, lse = launcher.attend(queries, poisoned("key_scales", 0), scores, plan)
    assert bool(o[:, :, 64:].isnan().all() & lse[:, :, 64:].isnan().all())
    assert torch.equal(o[:, :, :64], clean[:, :, :64])
    o, _ = launcher.attend(queries, poisoned("value_scales", 5), scores, plan)
    assert bool(o[:, :, 64:, 5].isnan().all())
    others = [channel for channel in range(32) if channel != 5]
    assert torch.equal(o[..., others], clean[..., others])
    assert torch.equal(o[:, :, :64], clean[:, :, :64])
    q = queries.q.clone()
    q[0, 1, 70, 3] = math.nan
    o, _ = launcher.attend(dataclasses.replace(queries, q=q), pages, scores, plan)
    assert bool(o[0, 1, 70].isnan().all())
    o[0, 1, 70] = clean[0, 1, 70]
    assert torch.equal(o, clean)


def test_pages_that_no_row_reads_are_not_visited() -> None:
    """Numbers of pages outside the window, or behind every row, point nowhere: no read there."""
    case = AttentionCase("int8/int8", "2/1", "32/32", 20, "400", "bf16", "int8", "causal;window=50")
    queries, pages, scores = make_attention(case)
    plan = plan_for(case, "prefill", block_m=16)
    clean = launcher.attend(queries, pages, scores, plan)
    # Rows at 380 .. 399 read from 331 on: pages 5 and 6.
    records = pages.records.clone()
    records[pages.table[0, :5].long()] = 0xFF
    after = launcher.attend(queries, dataclasses.replace(pages, records=records), scores, plan)
    assert all(torch.equal(a, b) for a, b in zip(clean, after, strict=True))


@pytest.mark.parametrize("spoil", ["scale", "causal", "window", "value", "key scale", "level"])
def test_the_bounds_notice(spoil: str) -> None:
    """Negative controls: each of these small wrongs breaks a bound."""
    case = AttentionCase(
        "int8/int8", "2/1", "32/32", 3, "200", "fp32", "int8", "parts;causal;window=100"
    )
    queries, pages, options = make_attention(case)
    answer = definition(queries, pages, options)
    wrong = {
        "scale": {"scale": options.scale * (1 + 2.0**-12)},
        "causal": {"causal": False, "window": None},
        "window": {"window": 101},
        "level": {"precision": "int16"},
    }
    options = dataclasses.replace(options, **wrong.get(spoil, {}))  # type: ignore[arg-type]
    fields = pages.format.fields
    page = int(pages.table[0, 1])
    if spoil == "value":
        pages.records[page, 0, fields["values"].offset + 700] += 1
    if spoil == "key scale":
        pages.records[page, 0].view(torch.float32)[fields["key_scales"].offset // 4] *= 1.0001
    o, lse = launcher.attend(queries, pages, options, plan_for(case))
    assert max(ratios(answer, queries, o, lse)) > 1


def test_offsets_of_64_bits() -> None:
    """Rows of q, and a page, more than 2**31 bytes away (virtual memory: little is touched)."""
    case = AttentionCase("int8/int8", "2/1", "32/32", 2, "64", "fp16", "int8", "causal")
    queries, pages, options = make_attention(case)
    plan = plan_for(case)
    near = launcher.attend(queries, pages, options, plan)
    heads, size = pages.records.shape[1:]
    number = 2**31 // (heads * size) + 1
    records = torch.empty((number + 1, heads, size), dtype=torch.uint8)
    index = torch.empty((number + 1, heads, pages.index.shape[2]), dtype=torch.uint8)
    records[number], index[number] = (
        part[int(pages.table[0, 0])] for part in (pages.records, pages.index)
    )
    buffer = torch.empty(2**31 + 4096, dtype=torch.float16)
    q = torch.as_strided(buffer, (1, 2, 2, 32), (0, 2**10, 2**31, 1))
    q.copy_(queries.q)
    far = launcher.attend(
        dataclasses.replace(queries, q=q),
        dataclasses.replace(pages, records=records, index=index, table=integers([number])[None]),
        options, plan,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataflow": "tiled"}, "plan dataflow .* 'prefill' or 'decode', got 'tiled'"),
        ({"block_m": 24}, "plan block_m must be 16, 32, 64 or 128, got 24"),
        ({"block_n": 128}, "plan block_n must be a page, 64, got 128"),
        ({"pack": 3}, "plan pack must divide the 2 query heads of a list of pages, got 3"),
        ({"split_k": 0}, "plan split_k must be 1 or more, got 0"),
        ({"dot": "bf16"}, r"plan dot must be one of \['int8'\] here, got 'bf16'"),
    ],
)
def test_impossible_plans_are_refused(changed: dict[str, object], message: str) -> None:
    case = AttentionCase()
    queries, pages, options = make_attention(case)
    plan = dataclasses.replace(plan_for(case), **changed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        launcher.attend(queries, pages, options, plan)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "int8/int8 4/2 32/32 1 130 bf16 int8 e4m3",
            r"query for int8 keys .* \['int8'\], got 'e4m3'",
        ),
        ("e4m3/int8 4/2 32/32 1 130 bf16 int8 -", r"query for e4m3 keys .* \['e4m3'\], got 'int8'"),
        ("int4/int8 4/2 32/32 1 130 bf16 e4m3 -", "precision for int8 values .* got 'e4m3'"),
        ("int4/e4m3 4/2 32/32 1 130 bf16 int16 -", "precision for e4m3 values .* got 'int16'"),
    ],
)
def test_formats_that_do_not_go_together_are_refused(text: str, message: str) -> None:
    case = AttentionCase.parse(text)
    queries, pages, options = make_attention(case)
    with pytest.raises(ValueError, match=message):
        launcher.attend(queries, pages, options, plan_for(case))


def test_merge_is_the_definition() -> None:
    outputs, lses = torch.randn(3, 2, 5, 8), 4 * torch.randn(3, 2, 5)
    lses[1, 0], lses[:, 1, 4] = -math.inf, -math.inf
    outputs[1, 0] = math.nan  # a part that read nothing may hold anything
    o, lse = merge(outputs, lses)
    parts = [(a.double().numpy(), b.double().numpy()) for a, b in zip(outputs, lses, strict=True)]
    want_o, want_lse = reference.merge(parts)
    np.testing.assert_allclose(o.numpy(), want_o, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=1e-6, atol=1e-6)
    assert not o[1, 4].any()
    lses[0, 0, 0] = math.nan
    assert bool(merge(outputs, lses)[0][0, 0].isnan().all())
