"""top_k of the CPU kernel and in plain torch operations: exactly the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases_select import extreme_rows, hard_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases_attention import as_array
from lath.kernels.select import cpu
from lath.kernels.select.top_k import top_k
from lath.reference import select as reference

WAYS = {"cpu": cpu.top_k, "torch": top_k}
EDGES = [
    0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan, 2.0**-149, -(2.0**-149),
    3.4028234663852886e38, -3.4028234663852886e38, 1.0000001192092896,
]  # fmt: skip


def check(way: str, scores: Tensor, k: int) -> None:
    got = WAYS[way](scores, k)
    assert got.dtype == torch.int32
    np.testing.assert_array_equal(got.numpy(), reference.top_k(as_array(scores), k), f"k = {k}")


def check_cpu() -> None:
    """For other instruction sets."""
    for width in (1, 15, 33, 300):
        for k in (1, width // 2, width):
            check("cpu", hard_scores(3, width), k)


@pytest.mark.parametrize("way", WAYS)
@given(
    numbers=st.lists(st.one_of(st.sampled_from(EDGES), st.floats(width=32)), max_size=70),
    k=st.integers(0, 80),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_any_numbers(way: str, numbers: list[float], k: int) -> None:
    check(way, torch.tensor(numbers, dtype=torch.float32), k)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 63, 64, 65, 512, 1025, 4096])
def test_widths(way: str, width: int) -> None:
    scores = hard_scores(3, width)
    for k in sorted({0, 1, 2, width // 8, width // 2, width - 1, width, width + 5}):
        check(way, scores, k)


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_one_kind(way: str) -> None:
    width = 40
    for k in (1, 7, width // 2, width):
        check(way, extreme_rows(width), k)


@pytest.mark.parametrize("way", WAYS)
def test_shapes_and_strides(way: str) -> None:
    scores = hard_scores(6, 90).reshape(2, 3, 90)
    check(way, scores, 10)
    check(way, scores[0, 0], 10)
    check(way, scores.transpose(0, 1)[..., ::2], 10)
    check(way, scores[:, :1].expand(2, 3, 90), 10)
    assert WAYS[way](torch.empty(2, 0), 4).shape == (2, 0)
    assert WAYS[way](torch.empty(0, 8), 4).shape == (0, 4)


def test_threads_take_the_same() -> None:
    scores = hard_scores(37, 1500)
    single = cpu.top_k(scores, 200)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(cpu.top_k(scores, 200), single)
        finally:
            torch.set_num_threads(1)


def test_a_wrong_list_is_found() -> None:
    """Negative control: of equal scores the last instead of the first."""
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0])
    wrong = 3 - cpu.top_k(scores.flip(0), 2).flip(0)
    assert not np.array_equal(wrong.numpy(), reference.top_k(scores.numpy(), 2))


@pytest.mark.parametrize("way", WAYS)
def test_refusals(way: str) -> None:
    with pytest.raises(TypeError, match="float64"):
        WAYS[way](torch.zeros(3, dtype=torch.float64), 1)
    with pytest.raises(ValueError, match="k must be 0 or more, got -1"):
        WAYS[way](torch.zeros(3), -1)
