"""The compiled attend loop against the NumPy definition, within derived bounds."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading

import numba
import numpy as np
import pytest
import torch
from test_cpu_processes import LOWERINGS, run_lowered
from test_triton_attention import ratios

from cases_attention import CATALOGUE, AttentionCase, integers, make_attention
from lath.formats.attention import PageView, Queries
from lath.formats.pages import PAGE, PAGE_CODECS
from lath.formats.plan import Plan
from lath.kernels.attention import cpu, cpu_tile
from lath.kernels.simd.compile import compile_kernel
from oracle_attention import definition


def plan(splits: int = 1) -> Plan:
    return Plan("cpu", "decode", "int8", "a test", 0, 0, split_k=splits)


def check(case: AttentionCase, *splits: int) -> None:
    queries, pages, options = make_attention(case)
    answer = definition(queries, pages, options)
    for pieces in splits or (1,):
        o, lse = cpu.attend(queries, pages, options, plan(pieces))
        assert o.dtype == queries.q.dtype
        assert lse.dtype == torch.float32
        found = ratios(answer, queries, o, lse)
        assert max(found) <= 1, f"{case}: o {found[0]}, lse {found[1]}, {pieces} pieces"


@pytest.mark.parametrize("case", [c for c in CATALOGUE if "unified" not in c.words], ids=str)
def test_parity(case: AttentionCase) -> None:
    check(case, 1, 3)


def pair_case(key: str, value: str) -> AttentionCase:
    precision = {"float": "float", "e4m3": "e4m3"}.get(value, "int8")
    options = "parts;causal;e4m3" if key == "e4m3" else "parts;causal"
    return AttentionCase(f"{key}/{value}", "2/1", "64/64", 1, "230", "bf16", precision, options)


QUICK_PAIRS = {(key, PAGE_CODECS[i - 1]) for i, key in enumerate(PAGE_CODECS)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK_PAIRS else [pytest.mark.slow])
        for pair in itertools.product(PAGE_CODECS, PAGE_CODECS)
    ],
)
def test_every_pair_of_codecs(key: str, value: str) -> None:
    """Keys and values are apart in the kernel: the quick pairs have every codec on both sides."""
    check(pair_case(key, value))


# Few kernels, many shapes: a kernel is compiled for codecs and dtype, not for sizes or options.
KINDS = (
    ("int8/int8", "bf16", "int8"),
    ("int8/float", "bf16", "float"),
    ("int8/int8", "fp16", "int8"),
    ("int8/float", "fp32", "float"),
)


@pytest.mark.parametrize(
    "dims", ["32/32", "64/64", "80/80", "96/128", "128/96", "256/256", "33/17"]
)
def test_head_dims(dims: str) -> None:
    for codecs, dtype, precision in KINDS:
        check(AttentionCase(codecs, "4/2", dims, 3, "150", dtype, precision, "parts;causal"))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193])
def test_lengths_around_a_page(length: int) -> None:
    for parts in ("parts;causal", "causal", "holes;causal"):
        codecs, dtype, precision = KINDS[length % len(KINDS)]
        check(AttentionCase(codecs, "2/1", "32/32", 1, str(length), dtype, precision, parts), 1, 2)


@pytest.mark.parametrize("heads", ["1/1", "2/2", "5/1", "9/3", "8/1", "6/2", "7/7", "24/3"])
def test_heads_and_rows(heads: str) -> None:
    """Rows that fill 4, or not, or several tiles of 64; heads that share keys, or not."""
    for rows, (codecs, dtype, precision) in zip((1, 3, 40, 100), KINDS, strict=True):
        lengths = "130,70" if rows < 50 else "180"
        check(
            AttentionCase(codecs, heads, "32/48", rows, lengths, dtype, precision, "parts;causal")
        )


OPTIONS = (
    "-", "causal;window=1", "window=1", "causal;window=64", "window=65", "causal;window=500",
    "softcap=2;causal;bias", "alibi", "alibi;window=20;mask", "mask;bias;softcap=1", "sink;mask",
    "tree;bias", "tree;window=30", "tree;causal;window=30", "sink;ragged;causal;holes",
    "packed;window=9", "packed;alibi;sink;causal", "ragged;tree",
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str) -> None:
    for number, (codecs, dtype, precision) in enumerate(KINDS):
        parts = "" if "packed" in options else ("parts;", "")[number % 2]
        rows = (2, 70)[number // 2]
        case = AttentionCase(
            codecs, "4/2", "32/32", rows, "150,90", dtype, precision, parts + options
        )
        check(case, 1, 3)


def test_splits_agree() -> None:
    """More pieces than pages, too."""
    case = AttentionCase(
        "int8/int8", "4/2", "64/64", 2, "500,64,0,130", "fp32", "int8", "parts;causal"
    )
    arguments = make_attention(case)
    o, lse = cpu.attend(*arguments, plan())
    for pieces in (2, 3, 7, 40):
        other, other_lse = cpu.attend(*arguments, plan(pieces))
        assert float((other - o).abs().max()) < 2**-19
        assert torch.equal(torch.isneginf(other_lse), torch.isneginf(lse))
        assert float(torch.nan_to_num(other_lse - lse).abs().max()) < 2**-18


def test_results_do_not_depend_on_threads() -> None:
    """Bit for bit, for one piece and for several; also with several Python threads at once."""
    cases = [
        AttentionCase("int8/int8", "8/4", "64/64", 1, "500,200", "bf16", "int8", "parts;causal"),
        AttentionCase("int8/float", "6/3", "64/64", 150, "150", "bf16", "float", "causal"),
    ]
    inputs = [(make_attention(case), plan(pieces)) for case in cases for pieces in (1, 3)]
    single = [cpu.attend(*arguments, p) for arguments, p in inputs]
    wrong: list[int] = []

    def work(threads: int) -> None:
        torch.set_num_threads(threads)
        for _ in range(5):
            for i, (arguments, p) in enumerate(inputs):
                got = cpu.attend(*arguments, p)
                if not all(torch.equal(a, b) for a, b in zip(got, single[i], strict=True)):
                    wrong.append(i)

    workers = [threading.Thread(target=work, args=(threads,)) for threads in (2, 3, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert torch.get_num_threads() == 1


# What is not there, and what is broken


def poisoned(pages: PageView) -> PageView:
    """Everything that no position holds set to all ones: -1, NaN or the NaN code."""
    fmt, records = pages.format, pages.records.clone()
    for s, i in itertools.product(range(pages.num_sequences), range(pages.table.shape[1])):
        count, page = int(pages.counts[s, i]), int(pages.table[s, i])
        if count == 0:
            continue
        for name in ("keys", "keys_low", "values", "values_low"):
            if name not in fmt.fields:
                continue
            field = fmt.fields[name]
            codes = records[page, :, field.offset : field.end]
            codec = fmt.key if name.startswith("keys") else fmt.value
            if codec.map == "float":
                codes.view(-1, PAGE, field.nbytes // PAGE)[:, count:] = 255
            elif name.startswith("keys"):
                units = codes.view(-1, 4, field.nbytes // PAGE // 16, 16, 16).transpose(2, 3)
                for token in range(count, PAGE):
                    units[:, token // 16, token % 16] = 255
            else:
                units = codes.view(-1, 4, field.nbytes // PAGE, 16)
                for token in range(count, PAGE):
                    units[:, token // 16, :, token % 16] = 255
        if "token_scales" in fmt.fields:
            field = fmt.fields["token_scales"]
            records[page, :, field.offset + 4 * count : field.end] = 255
    return dataclasses.replace(pages, records=records)


@pytest.mark.parametrize(
    "text",
    [
        "int8/int8 4/2 64/64 1 200,33 bf16 int8 holes;causal",
        "int8/int8 4/2 64/64 9 200,33 bf16 int8 holes;causal",
        "int8/float 4/2 64/64 9 200,33 bf16 float holes",
        "int8/float 4/2 64/64 9 200,33 fp32 float holes",
        "int4/int2 4/2 64/64 2 200,33 fp16 int8 holes",
        "e4m3/e4m3 4/2 64/64 2 200,33 bf16 e4m3 holes;e4m3",
        "float/float 4/2 64/64 4 200,33 bf16 float holes;mask",
    ],
)
def test_slots_behind_the_last_token_are_not_used(text: str) -> None:
    queries, pages, scores = make_attention(AttentionCase.parse(text))
    clean = cpu.attend(queries, pages, scores, plan())
    other = cpu.attend(queries, poisoned(pages), scores, plan())
    assert all(torch.equal(a, b) for a, b in zip(clean, other, strict=True))


def test_nan_in_a_query_stays_in_its_row() -> None:
    for codecs, dtype, precision in KINDS:
        case = AttentionCase(codecs, "4/2", "32/32", 5, "200", dtype, precision, "parts;causal")
        queries, pages, options = make_attention(case)
        clean, clean_lse = cpu.attend(queries, pages, options, plan())
        q = queries.q.clone()
        q[0, 1, 2, 3] = math.nan
        o, lse = cpu.attend(dataclasses.replace(queries, q=q), pages, options, plan())
        assert bool(o[0, 1, 2].isnan().all())
        assert bool(lse[0, 1, 2].isnan())
        o[0, 1, 2], lse[0, 1, 2] = clean[0, 1, 2], clean_lse[0, 1, 2]
        assert torch.equal(o, clean)
        assert torch.equal(lse, clean_lse)


@pytest.mark.parametrize("side", ["key_scales", "value_scales"])
def test_nan_in_a_page_reaches_the_rows_that_read_it(side: str) -> None:
    case = AttentionCase("int8/int8", "2/1", "32/32", 80, "256", "bf16", "int8", "causal")
    queries, pages, options = make_attention(case)
    clean, _ = cpu.attend(queries, pages, options, plan())
    field = pages.format.fields[side]
    page = int(pages.table[0, 3])  # tokens 192 .. 255; rows 16 .. 79 stand there
    records = pages.records.clone()
    records[page, 0, field.offset : field.end].view(torch.float32)[0] = math.nan
    broken = dataclasses.replace(pages, records=records)
    o, lse = cpu.attend(queries, broken, options, plan())
    assert torch.equal(o[:, :, :16], clean[:, :, :16])
    if side == "key_scales":
        assert bool(o[:, :, 16:].isnan().all())
        assert bool(lse[:, :, 16:].isnan().all())
    else:
        assert bool(o[:, :, 16:, 0].isnan().all())
        assert torch.equal(o[:, :, 16:, 1:], clean[:, :, 16:, 1:])


@pytest.mark.parametrize("precision", ["int8", "float"])
def test_rows_without_keys(precision: str) -> None:
    codecs = f"int8/{precision if precision == 'float' else 'int8'}"
    case = AttentionCase(codecs, "4/2", "32/32", 3, "0,70", "bf16", precision, "parts;sink")
    queries, pages, options = make_attention(case)
    assert options.sink is not None
    o, lse = cpu.attend(queries, pages, options, plan())
    assert not o[0].any()
    assert (
        torch.equal(lse[0], options.sink[:, None].expand(4, 3))
        or float((lse[0] - options.sink[:, None]).abs().max()) <= 2**-20
    )
    bare = dataclasses.replace(options, sink=None, mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    for pieces in (1, 4):
        o, lse = cpu.attend(queries, pages, bare, plan(pieces))
        assert not o.any()
        assert bool(torch.isneginf(lse).all())
    none = dataclasses.replace(queries, lengths=integers([0, 2]), longest=2)
    o, lse = cpu.attend(none, pages, options, plan())
    assert not o[0].any()
    assert bool(torch.isneginf(lse[0]).all())
    assert bool(torch.isneginf(lse[1, :, 2]).all())


def test_a_row_that_reads_one_key_gets_its_value() -> None:
    """window = 1: the weight is 1, whatever the score, so that nothing may round."""
    for codecs, dtype, precision in (KINDS[1], KINDS[3]):
        case = AttentionCase(
            codecs, "2/2", "48/32", 130, "130", dtype, precision, "causal;window=1"
        )
        queries, pages, options = make_attention(case)
        o, _ = cpu.attend(queries, pages, options, plan())
        answer = definition(queries, pages, options)
        assert np.array_equal(o.double().numpy(), answer.o)


# Negative controls


def changed(pages: PageView, name: str) -> PageView:
    records = pages.records.clone()
    field = pages.format.fields[name]
    part = records[int(pages.table[0, 0]), 0, field.offset : field.end]
    if name.endswith("scales"):
        part.view(torch.float32)[0] *= 1.25
    else:
        part[: 16 * 16] ^= 64
    return dataclasses.replace(pages, records=records)


@pytest.mark.parametrize("name", ["keys", "values", "key_scales", "value_scales"])
def test_a_wrong_page_is_found(name: str) -> None:
    case = AttentionCase("int8/int8", "2/1", "32/32", 2, "100", "bf16", "int8", "-")
    queries, pages, options = make_attention(case)
    answer = definition(queries, pages, options)
    o, lse = cpu.attend(queries, changed(pages, name), options, plan())
    assert max(ratios(answer, queries, o, lse)) > 1


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that lose their lowest bit: one part in 127 of a key must not pass."""
    honest = cpu_tile.signed_code

    def wrong(c, *arguments):  # type: ignore[no-untyped-def]
        return c.b.and_(honest(c, *arguments), c.e.constant(-0x01010102))

    monkeypatch.setattr(cpu_tile, "signed_code", wrong)
    # Compiled anew and not kept: neither this process nor the disk may see it again.
    monkeypatch.setattr("lath.kernels.simd.compile.callback", numba.cfunc)
    monkeypatch.setattr(cpu, "compile_kernel", compile_kernel.__wrapped__)
    monkeypatch.setattr(cpu, "_prepared", cpu._prepared.__wrapped__)
    case = AttentionCase("int8/float", "2/1", "32/32", 2, "200", "fp32", "float", "-")
    with pytest.raises(AssertionError, match="pieces"):
        check(case)


def test_refusals() -> None:
    queries, pages, options = make_attention(CATALOGUE[0])
    with pytest.raises(NotImplementedError, match="unified"):
        cpu.attend(queries, pages, dataclasses.replace(options, scheme="unified"), plan())
    with pytest.raises(TypeError, match="float64"):
        cpu.attend(Queries(queries.q.double(), queries.lengths, 1), pages, options, plan())


@pytest.mark.parametrize("name", LOWERINGS)
def test_other_instruction_sets(name: str) -> None:
    run_lowered(
        name,
        """
        import torch; torch.set_num_threads(1)
        from test_cpu_attention import AttentionCase, check
        for text in ("int8/float 4/2 33/32 70 130 bf16 float causal;softcap=3;alibi;sink",
                     "int4/int2 4/2 64/64 2 150 fp16 int16 parts;tree",
                     "e4m3/e4m3 4/2 32/32 2 150 fp32 e4m3 parts;mask;e4m3"):
            check(AttentionCase.parse(text), 1, 2)
        """,
    )
