"""The catalogue of `lath.linear`, planned for each GPU and compiled as it would be launched.

What is compiled is what was recorded from the launchers: their plan, their specialisations, and not
a list that somebody keeps.
"""

from __future__ import annotations

import pytest
from test_aot_linear import ARCHITECTURES, check

import cases
from lath.formats.activations import activation_format
from lath.formats.device import known_device
from lath.kernels.linear import triton as launcher
from lath.kernels.linear.plan import plan_linear
from tools.fake_gpu import fake_gpu

# Each case on three architectures and each architecture with a third of the cases at every run; the
# others are for the slow one.
PAIRS = [
    pytest.param(
        case, architecture, marks=[] if (i + j) % 3 == 0 else [pytest.mark.slow],
        id=f"{architecture} {case}",
    )
    for i, case in enumerate(cases.CATALOGUE)
    for j, architecture in enumerate(ARCHITECTURES)
]  # fmt: skip


@pytest.mark.parametrize(("case", "architecture"), PAIRS)
def test_planned_launches_compile(case: cases.LinearCase, architecture: str) -> None:
    inputs = cases.make_inputs(case)
    activations = activation_format(case.activations)
    plan = plan_linear(
        case.m,
        case.n,
        case.k,
        inputs.weight.codec,
        activations,
        case.torch_dtype,
        known_device(architecture),
        "triton",
    )
    with fake_gpu(architecture) as recording:
        launcher.linear(inputs.x, inputs.weight, inputs.bias, activations, plan)
    assert recording.launches
    for found in recording.specialisations():
        check(found, plan.dot)
