"""The page writer in Triton, interpreted: bytes of the definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cases import DTYPES
from lath.formats.pages import PAGE_CODECS, PageCodec, PageFormat
from lath.kernels.pages.triton import write_pages
from lath.reference import floats
from lath.reference import pages as reference
from tools.sanitizer import sanitize

Bytes = NDArray[np.uint8]
JOBS = [(0, 3, 2), (1, 20, 0)]  # row, first token, page


def layout(codecs: str, key_dim: int, value_dim: int, dtype: str) -> PageFormat:
    key, value = (PageCodec(name) for name in codecs.split("/"))
    return PageFormat(key, value, key_dim, value_dim, DTYPES[dtype].itemsize)


def inputs(fmt: PageFormat, dtype: str) -> tuple[Tensor, Tensor]:
    """keys and values [2, 2, 100, D or E], strides as in models, keys off zero."""
    keys = torch.randn(2, 100, 2, fmt.key_dim) + 2 * torch.randn(fmt.key_dim)
    values = torch.randn(2, 2, 100, fmt.value_dim)
    return keys.to(DTYPES[dtype]).transpose(1, 2), values.to(DTYPES[dtype])


def write(fmt: PageFormat, keys: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    records = torch.zeros((3, 2, fmt.record_bytes), dtype=torch.uint8)
    index = torch.zeros((3, 2, fmt.index_bytes), dtype=torch.uint8)
    jobs = torch.tensor([(b, first, count, page) for b, first, page in JOBS], dtype=torch.int32)
    write_pages(keys, values, fmt, records, index, jobs)
    assert not records[1].any()  # no job's
    assert not index[1].any()
    return records, index


# The fields of the index that are whole numbers or compared bit for bit.
INDEX_TYPES = {"mean": np.uint16, "max": np.int8, "min": np.int8, "deviation": np.uint8}


def index_slack(fmt: PageFormat, name: str) -> tuple[int, int]:
    """How far a field may lie from the definition's: (lowest, highest)."""
    outward = 0 if fmt.key.name in ("int8", "int8-planes") else 1
    return {"max": (0, outward), "min": (-outward, 0), "deviation": (-1, 1)}.get(name, (0, 0))


def near(got: NDArray[np.floating], numbers: NDArray[np.floating]) -> bool:
    """Whether bfloat16 [D] are the means of numbers [n, D], but for one step and an fp32 sum."""
    with np.errstate(invalid="ignore"):
        exact = numbers.astype(np.float64).mean(axis=0)
    finite = np.isfinite(exact)
    largest, exact_finite = np.abs(numbers).max(axis=0)[finite], exact[finite]
    step = 2.0**-8 * np.abs(exact_finite) * (1 + 2.0**-7) + 1e-6 * largest
    same = np.array_equal(got[~finite], exact[~finite], equal_nan=True)
    return same and bool((np.abs(got[finite] - exact_finite) <= step).all())


def same_value_mean(fmt: PageFormat, got: Bytes, want: Bytes, values: NDArray[np.floating]) -> bool:
    """Exact for codes, NaN for NaN; for floats near, for their sum has no order."""
    means = [floats.from_bfloat16_bits(field.view(np.uint16)) for field in (got, want)]
    if fmt.value.map != "float":
        return np.array_equal(*means, equal_nan=True)
    return near(means[0][: fmt.value_dim], values) and not means[0][fmt.value_dim :].any()


def differences(
    fmt: PageFormat, keys: Tensor, values: Tensor, count: int, dtype: str,
    records: Tensor, index: Tensor,
) -> list[str]:  # fmt: skip
    """The fields that are not what the definition writes with the mean that was stored."""
    found = []
    for (row, first, page), head in itertools.product(JOBS, range(2)):
        tokens = slice(first, first + count)
        k, v = (t[row, head, tokens].float().numpy() for t in (keys, values))
        got_record, got_index = records[page, head].numpy(), index[page, head].numpy()
        stored = got_index[: 2 * fmt.padded_key_dim].view(np.uint16)
        mean = floats.from_bfloat16_bits(stored)[: fmt.key_dim]
        if not near(mean, k):
            found.append("mean")
        record, row_of_index = reference.write_page(k, v, fmt, dtype, mean)
        for name, field in fmt.fields.items():
            got, want = got_record[field.offset : field.end], record[field.offset : field.end]
            if name.endswith("scales"):
                got, want = got.view(np.float32), want.view(np.float32)
                same = np.array_equal(got, want, equal_nan=True)
            else:
                same = np.array_equal(got, want)
            found += [] if same else [name]
        for name, field in fmt.index_fields.items():
            got, want = (row[field.offset : field.end] for row in (got_index, row_of_index))
            if name == "numbers":
                same = np.array_equal(*(b.view(np.float32) for b in (got, want)), equal_nan=True)
            elif name == "value_mean":
                same = same_value_mean(fmt, got, want, v)
            else:
                kind = INDEX_TYPES[name]
                off = got.view(kind).astype(np.int64) - want.view(kind).astype(np.int64)
                low, high = index_slack(fmt, name)
                same = bool((off >= low).all() and (off <= high).all())
            found += [] if same else [name]
    return found


@pytest.mark.parametrize(("key", "value"), list(itertools.product(PAGE_CODECS, PAGE_CODECS)))
def test_bytes_of_every_pair_of_codecs(key: str, value: str) -> None:
    number = PAGE_CODECS.index(key) + PAGE_CODECS.index(value)
    dtype, count = ("bf16", "fp16", "fp32")[number % 3], (64, 17)[number % 2]
    fmt = layout(f"{key}/{value}", 64, 32, dtype)
    keys, values = inputs(fmt, dtype)
    written = write(fmt, keys, values, count)
    assert not differences(fmt, keys, values, count, dtype, *written)


@pytest.mark.parametrize(
    ("codecs", "dims", "dtype", "count"),
    [
        ("int8/int8", (80, 96), "bf16", 1),
        ("int4/int2", (80, 33), "fp16", 64),
        ("int8-planes/e4m3", (17, 80), "fp32", 63),
        ("float/float", (33, 20), "bf16", 30),
        ("e4m3/int4", (256, 16), "fp32", 5),
    ],
)
def test_head_dims_and_counts(codecs: str, dims: tuple[int, int], dtype: str, count: int) -> None:
    fmt = layout(codecs, *dims, dtype)
    keys, values = inputs(fmt, dtype)
    written = write(fmt, keys, values, count)
    assert not differences(fmt, keys, values, count, dtype, *written)


@pytest.mark.parametrize("codec", PAGE_CODECS)
def test_zeros_ties_and_broken_groups(codec: str) -> None:
    fmt = layout(f"{codec}/{codec}", 64, 64, "fp32")
    keys, values = inputs(fmt, "fp32")
    keys[0, 0, 3:67] = 2.5  # equal keys: nothing is left of them
    values[0, 0, 3:67] = 0.0
    values[0, 0, 10, 5] = math.inf
    keys[1, 1, 25, 7] = math.nan
    keys[1, 0, 20:84] *= 2.0**-120  # below what has a reciprocal
    values[1, 0, 20:84, 3] *= 2.0**-110
    keys[0, 1, 3:67] = torch.arange(64.0)[:, None] * 2 - 63  # mean 0; ties at .5 of a step
    keys[0, 1, 3, 0], keys[0, 1, 66, 0] = -63.5, 63.5
    written = write(fmt, keys, values, 64)
    assert not differences(fmt, keys, values, 64, "fp32", *written)


@pytest.mark.parametrize("codecs", ["int8/int8", "int4/int2", "e4m3/float", "int8-planes/e4m3"])
def test_sanitizer_is_clean(codecs: str) -> None:
    fmt = layout(codecs, 48, 33, "bf16")
    keys, values = inputs(fmt, "bf16")
    before = keys.clone(), values.clone()
    results = []
    for order in (None, "reverse"):
        with sanitize(order=order) as report:  # type: ignore[arg-type]
            results.append(write(fmt, keys, values, 30))
        report.assert_clean()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


def test_tokens_past_the_count_do_not_matter() -> None:
    fmt = layout("int8/e4m3", 32, 32, "bf16")
    keys, values = inputs(fmt, "bf16")
    clean = write(fmt, keys, values, 20)
    for row, first, _ in JOBS:
        keys[row, :, first + 20 :], values[row, :, first + 20 :] = math.nan, math.nan
    assert all(torch.equal(a, b) for a, b in zip(clean, write(fmt, keys, values, 20), strict=True))


@pytest.mark.parametrize(
    "field",
    ["keys", "values", "value_scales", "key_scales", "max", "mean", "numbers", "value_mean"],
)
def test_the_comparison_notices(field: str) -> None:
    """Negative controls: one bit of each."""
    fmt = layout("int8/int8", 32, 32, "bf16")
    keys, values = inputs(fmt, "bf16")
    records, index = write(fmt, keys, values, 64)
    place, target = (fmt.fields, records) if field in fmt.fields else (fmt.index_fields, index)
    # The mean's lowest bit may differ; two steps may not.
    target[2, 1, place[field].offset] ^= 4 if field == "mean" else 1
    assert differences(fmt, keys, values, 64, "bf16", records, index)


def test_what_cannot_be_written_is_refused() -> None:
    fmt = layout("float/int8", 32, 32, "bf16")
    keys, values = inputs(fmt, "bf16")
    records = torch.zeros((3, 2, fmt.record_bytes), dtype=torch.uint8)
    index = torch.zeros((3, 2, fmt.index_bytes), dtype=torch.uint8)
    jobs = torch.zeros((1, 4), dtype=torch.int32)
    with pytest.raises(ValueError, match="records must be contiguous, got strides"):
        write_pages(keys, values, fmt, records.transpose(0, 1), index, jobs)
    with pytest.raises(ValueError, match="keys must have last stride 1, got strides"):
        write_pages(keys.transpose(2, 3), values, fmt, records, index, jobs)
    with pytest.raises(ValueError, match=r"values must be of keys' dtype, torch.bfloat16, got"):
        write_pages(keys, values.float(), fmt, records, index, jobs)
    with pytest.raises(ValueError, match="fmt float_bytes must be that of keys, 4, got 2"):
        write_pages(keys.float(), values.float(), fmt, records, index, jobs)
    write_pages(keys, values, fmt, records, index, jobs[:0])
    assert not records.any()
