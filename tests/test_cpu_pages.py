"""The compiled page writer: bytes of the definition, strides, threads, nothing else touched."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from test_cpu_processes import LOWERINGS, run_lowered
from test_triton_pages import JOBS, differences, inputs, layout
from torch import Tensor

from lath.formats.pages import PAGE_CODECS, PageFormat
from lath.kernels.pages.cpu import write_pages


def write(fmt: PageFormat, keys: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pages 0 and 2 of three; what is not written keeps its 0xFF."""
    records = torch.full((3, 2, fmt.record_bytes), 255, dtype=torch.uint8)
    index = torch.full((3, 2, fmt.index_bytes), 255, dtype=torch.uint8)
    jobs = torch.tensor([(b, first, count, page) for b, first, page in JOBS], dtype=torch.int32)
    write_pages(keys, values, fmt, records, index, jobs)
    assert bool((records[1] == 255).all())
    assert bool((index[1] == 255).all())
    return records, index


def check(codecs: str, dims: tuple[int, int], dtype: str, count: int) -> None:
    fmt = layout(codecs, *dims, dtype)
    keys, values = inputs(fmt, dtype)
    written = write(fmt, keys, values, count)
    found = differences(fmt, keys, values, count, dtype, *written)
    assert not found, (codecs, dims, dtype, count, found)
    end = max(field.end for field in fmt.fields.values())
    assert not written[0][(0, 2), :, end:].any()


QUICK_PAIRS = {(key, PAGE_CODECS[i - 1]) for i, key in enumerate(PAGE_CODECS)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK_PAIRS else [pytest.mark.slow])
        for pair in itertools.product(PAGE_CODECS, PAGE_CODECS)
    ],
)
def test_bytes_of_every_pair_of_codecs(key: str, value: str) -> None:
    """Keys and values are apart in the kernel: the quick pairs have every codec on both sides."""
    number = PAGE_CODECS.index(key) + PAGE_CODECS.index(value)
    dtype = ("bf16", "fp16", "fp32")[number % 3]
    check(f"{key}/{value}", (64, 32), dtype, (64, 17)[number % 2])


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 33, 63, 64])
def test_counts(count: int) -> None:
    check("int8/int8", (64, 48), "bf16", count)
    check("int4/int4", (64, 64), "bf16", count)


@pytest.mark.parametrize("dims", [(32, 256), (256, 32), (80, 96), (33, 17), (1, 1), (128, 80)])
def test_head_dims(dims: tuple[int, int]) -> None:
    for codecs in ("int8/int8", "int4/int2", "float/float"):
        check(codecs, dims, "bf16", 40)


@pytest.mark.parametrize("codec", PAGE_CODECS)
def test_zeros_ties_and_broken_groups(codec: str) -> None:
    fmt = layout(f"{codec}/{codec}", 64, 64, "fp32")
    keys, values = inputs(fmt, "fp32")
    keys[0, 0, 3:67] = 2.5  # equal keys: nothing is left of them
    values[0, 0, 3:67] = 0.0
    values[0, 0, 10, 5] = math.inf
    values[0, 1, 10, 6] = math.nan
    keys[1, 1, 25, 7] = math.nan
    keys[1, 0, 20:84] *= 2.0**-120  # below what has a reciprocal
    values[1, 0, 20:84, 3] *= 2.0**-110
    keys[0, 1, 3:67] = torch.arange(64.0)[:, None] * 2 - 63  # mean 0; ties at .5 of a step
    keys[0, 1, 3, 0], keys[0, 1, 66, 0] = -63.5, 63.5
    written = write(fmt, keys, values, 64)
    assert not differences(fmt, keys, values, 64, "fp32", *written)


def test_what_lies_behind_a_page_is_not_read() -> None:
    """Bit for bit the same with NaN in every token but those of the job."""
    for codecs in ("int8/int8", "int4/e4m3", "float/float"):
        fmt = layout(codecs, 48, 33, "bf16")
        keys, values = inputs(fmt, "bf16")
        clean = write(fmt, keys, values, 30)
        poisoned = []
        for tensor in (keys, values):
            other = torch.full_like(tensor, torch.nan)
            for row, first, _ in JOBS:
                other[row, :, first : first + 30] = tensor[row, :, first : first + 30]
            poisoned.append(other)
        assert all(torch.equal(a, b) for a, b in zip(clean, write(fmt, *poisoned, 30), strict=True))


def test_threads_write_the_same() -> None:
    fmt = layout("int8/int8", 64, 64, "bf16")
    keys, values = torch.randn(2, 3, 640, 64).bfloat16(), torch.randn(2, 3, 640, 64).bfloat16()
    jobs = [(b, 64 * i, 64, 10 * b + i) for b, i in itertools.product(range(2), range(10))]
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            records = torch.zeros((20, 3, fmt.record_bytes), dtype=torch.uint8)
            index = torch.zeros((20, 3, fmt.index_bytes), dtype=torch.uint8)
            write_pages(keys, values, fmt, records, index, torch.tensor(jobs, dtype=torch.int32))
        finally:
            torch.set_num_threads(1)
        results.append((records, index))
    assert all(
        torch.equal(a, b) for other in results for a, b in zip(other, results[0], strict=True)
    )
    assert bool(results[0][0].any(dim=2).all())


def test_a_wrong_byte_is_found() -> None:
    """Negative control of the comparison."""
    fmt = layout("int8/int8", 64, 64, "bf16")
    keys, values = inputs(fmt, "bf16")
    records, index = write(fmt, keys, values, 64)
    for tensor, fields in ((records, fmt.fields), (index, fmt.index_fields)):
        for name, field in fields.items():
            if name == "mean":
                continue  # everything else follows from it
            wrong = tensor.clone()
            wrong[0, 1, field.offset + 1] ^= 4
            pair = (wrong, index) if tensor is records else (records, wrong)
            assert name in differences(fmt, keys, values, 64, "bf16", *pair), name


def test_refusals() -> None:
    fmt = layout("int8/int8", 16, 16, "fp32")
    records = torch.zeros((1, 1, fmt.record_bytes), dtype=torch.uint8)
    index = torch.zeros((1, 1, fmt.index_bytes), dtype=torch.uint8)
    jobs = torch.tensor([(0, 0, 4, 0)], dtype=torch.int32)
    x = torch.randn(1, 1, 4, 16)
    with pytest.raises(TypeError, match="float64"):
        write_pages(x.double(), x.double(), fmt, records, index, jobs)
    with pytest.raises(TypeError, match="bfloat16"):
        write_pages(x, x.bfloat16(), fmt, records, index, jobs)
    with pytest.raises(ValueError, match="values must have last stride 1"):
        write_pages(x, torch.randn(1, 1, 16, 4).transpose(2, 3), fmt, records, index, jobs)
    write_pages(x, x, fmt, records, index, jobs[:0])
    assert not np.any(records.numpy())


@pytest.mark.parametrize("name", LOWERINGS)
def test_other_instruction_sets(name: str) -> None:
    run_lowered(
        name,
        """
        import torch; torch.set_num_threads(1)
        from test_cpu_pages import check
        for codecs, dtype in (("int8-planes/int4", "bf16"), ("e4m3/float", "fp16")):
            for dims, count in (((64, 64), 64), ((80, 33), 17)):
                check(codecs, dims, dtype, count)
        """,
    )
