"""The Triton kernel of outliers, compiled for GPUs that are not here, and the terms of sums."""

from __future__ import annotations

import pytest
import torch
from test_aot_linear import ARCHITECTURES, check

from lath.formats.activations import ActivationFormat
from lath.formats.device import known_device
from lath.formats.outliers import OutlierCodec, Outliers
from lath.formats.sum_codec import SumCodec
from lath.formats.sum_tensor import SumTensor
from lath.kernels.outliers import triton as launcher
from lath.kernels.outliers.plan import plan_linear
from lath.verbs import sum_plan, sum_triton
from tools.fake_gpu import compile_recorded, fake_gpu
from tools.machine_code import resources


@pytest.mark.parametrize(
    ("tokens", "columns", "dtype"),
    [
        (1, 4096, torch.bfloat16), (4, 4096, torch.float32), (64, 4096, torch.float16),
        (1, 40000, torch.float16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outliers_compile(architecture: str, tokens: int, columns: int, dtype: torch.dtype) -> None:
    """No spill, no shared memory beyond the device's, no tensor unit."""
    device = known_device(architecture)
    codec, activations = OutlierCodec(1), ActivationFormat()
    plan = plan_linear(tokens, 1024, columns, codec, activations, dtype, device, "triton")
    weight = Outliers.empty(codec, (1024, columns), "cpu")
    out = torch.empty(tokens, 1024)
    with fake_gpu(architecture) as recording:
        launcher.linear(torch.zeros(tokens, columns, dtype=dtype), weight, None, activations, plan,
                        out)  # fmt: skip
    (found,) = recording.specialisations()
    check(found, plan.dot)
    assert not resources(compile_recorded(found)).spill_bytes


@pytest.mark.parametrize(
    ("architecture", "text", "rounded"),
    [
        ("sm_90", "mix2.5-g64+out1%", "float"), ("gfx942", "mix2:4-2.25-g64-s8", "float"),
        ("sm_80", "billm10%-g128", "float"), ("sm_90", "mix2.5-g64", "int8-g64"),
        ("gfx942", "mix2.5-g64", "int8-g64"),
    ],
)  # fmt: skip
def test_sums_compile(architecture: str, text: str, rounded: str) -> None:
    """Every launch of a sum, the reduction of its terms among them; where x is rounded that reads
    it at the columns of the terms."""
    codec, activations = SumCodec.parse(text), ActivationFormat.parse(rounded)
    device = known_device(architecture)
    plan = sum_plan.plan_linear(1, 1024, 2048, codec, activations, torch.float16, device, "triton")
    weight = SumTensor.empty(codec, (1024, 2048), "cpu")
    with fake_gpu(architecture) as recording:
        sum_triton.linear(torch.zeros(1, 2048).half(), weight, None, activations, plan)
    names = [found.name for found in recording.specialisations()]
    assert "reduce_kernel" in names
    assert ("gather_kernel" in names) == ("out" in text)
    assert ("quantize_rows_kernel" in names) == (rounded != "float")
    for found in recording.specialisations():
        check(found, plan.terms[0].dot)
