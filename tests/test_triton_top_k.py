"""The largest k in Triton, interpreted: the definition's indices exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases_select import extreme_rows, hard_scores
from torch import Tensor

from cases_attention import as_array
from lath.formats.plan import Plan
from lath.kernels.select import triton as kernels
from lath.reference import select as reference
from tools.sanitizer import sanitize


def check_top_k(scores: Tensor, k: int) -> None:
    got = kernels.top_k(scores, k)
    assert got.dtype == torch.int32
    np.testing.assert_array_equal(got.numpy(), reference.top_k(as_array(scores), k), f"k = {k}")


@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 512, 1024, 1025, 3000, 4097])
def test_top_k_is_exact(width: int) -> None:
    scores = hard_scores(2, width)
    for k in {0, 1, width // 8, width // 2, width - 1, width + 5}:
        check_top_k(scores, k)


@pytest.mark.parametrize("width", [40, 1500])
def test_top_k_of_extreme_rows(width: int) -> None:
    scores = extreme_rows(width)
    for k in (1, 7, width // 2, width):
        check_top_k(scores, k)


def test_top_k_of_every_shape_and_stride() -> None:
    scores = hard_scores(6, 90).reshape(2, 3, 90)
    check_top_k(scores, 10)
    check_top_k(scores[0, 0], 10)
    check_top_k(scores.transpose(0, 1)[..., ::2], 10)
    assert kernels.top_k(torch.empty(2, 0), 4).shape == (2, 0)
    assert kernels.top_k(torch.empty(0, 8), 4).shape == (0, 4)


def test_top_k_of_other_blocks() -> None:
    """Neither the block of the radix passes nor padding matters."""
    scores = hard_scores(2, 1100)
    exact = reference.top_k(as_array(scores), 50)
    for block in (128, 256, 4096):
        plan = Plan("triton", "select", "none", "a test", 0, 0, block_n=block, warps=1, stages=1)
        np.testing.assert_array_equal(kernels.top_k(scores, 50, plan).numpy(), exact)


def test_sanitizer_is_clean() -> None:
    """And the order of programs does not matter."""
    for scores, k in ((hard_scores(2, 70), 9), (hard_scores(2, 1500), 40)):
        clean = kernels.top_k(scores, k)
        with sanitize(order="reverse") as report:
            again = kernels.top_k(scores, k)
        report.assert_clean()
        assert torch.equal(clean, again)


def test_the_comparison_notices() -> None:
    """Negative control: the last of equal scores in place of the first."""
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert kernels.top_k(scores, 1).tolist() == [[1]]
    flipped = 3 - kernels.top_k(scores.flip(-1), 1)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(flipped.numpy(), reference.top_k(as_array(scores), 1))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"scores must be float32, got torch\.float16"):
        kernels.top_k(torch.zeros(4).half(), 2)
    with pytest.raises(ValueError, match="k must be 0 or more, got -1"):
        kernels.top_k(torch.zeros(4), -1)
