"""`lath.linear` under pytest-benchmark, over the shapes of the tests' catalogue of speed.

    pytest bench --benchmark-only

For ratios against peers in one run use `lath bench linear`, which interleaves the calls.
"""

from __future__ import annotations

import pytest
import torch

import cases
import lath

torch.set_num_threads(1)


@pytest.mark.parametrize("case", cases.SPEED, ids=str)
def test_lath(case: cases.LinearCase, benchmark) -> None:  # type: ignore[no-untyped-def]
    data = cases.make_inputs(case)
    with torch.inference_mode():
        benchmark(lath.linear, data.x, data.weight, activations=case.activations)


@pytest.mark.parametrize("case", cases.SPEED, ids=str)
def test_torch(case: cases.LinearCase, benchmark) -> None:  # type: ignore[no-untyped-def]
    data = cases.make_inputs(case)
    dense = data.weight.dequantize(data.x.dtype)
    with torch.inference_mode():
        benchmark(torch.nn.functional.linear, data.x, dense)
