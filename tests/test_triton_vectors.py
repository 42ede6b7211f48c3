"""The Triton loops of `linear` over vector codebooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases_vectors import answer, bound_of, decode, make, make_weight

import cases
import lath
import oracle
from cases import LinearCase, LinearData, plan_of
from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.plan import Plan
from lath.formats.vectors import VectorTensor
from lath.kernels.linear import triton as launcher
from tools.sanitizer import sanitize

# As in test_triton_linear.py. Each length of a vector with each size of book that it may have, one
# book and two, in each dot type; groups, tails of K, orientations and splits.
CATALOGUE = [
    "vq8-256 5 37 300 fp16 float normal True | flat fp16 16x32x128 k2",
    "vq8-256-g64 3 20 203 bf16 float one_sign False | flat bf16 8x32x128 swap",
    "vq8-256+256-g128 5 33 300 fp16 float normal False | flat fp16 16x32x128",
    "vq8-256-g48 2 20 140 fp32 float normal False | flat fp32 16x16x128",
    "vq8-65536 3 20 260 fp16 int8 normal True | flat fp16 16x32x128 swap",
    "vq8-65536+256 4 20 200 bf16 float normal False | flat bf16 16x32x128 k2",
    "vq8-256+65536-g32 2 20 130 fp16 int8-g32 normal False | flat fp16 8x32x128 swap",
    "vq4-16 3 20 150 fp16 float one_sign True | flat fp16 16x32x128",
    "vq4-256+16-g16 3 20 131 bf16 int8-g16 normal False | flat fp16 16x32x128",
    "vq4-65536-g96 2 17 130 fp16 float normal False | flat fp16 16x32x256",
    "vq2-16 3 20 77 fp32 float normal False | gemv fp32 4x16x128",
    "vq2-256-g64 17 33 140 fp16 float normal False | tiled fp16 16x32x128 swap",
    "vq16-65536 1 37 300 bf16 float normal True | gemv fp32 1x32x128 k2",
    "vq16-65536+65536-g32 3 20 150 fp16 float normal False | flat fp16 8x32x128 swap",
    "vq8-256-g64 5 20 140 fp16 float normal True | decode_matmul fp16 16x64x128",
    "vq4-256 3 20 140 bf16 float normal False | decode_matmul bf16 16x64x128",
]


def run(data: LinearData, activations: str, plan: Plan) -> torch.Tensor:
    fmt = activation_format(activations)
    return launcher.linear(data.x, data.weight, data.bias, fmt, plan)


@pytest.mark.parametrize("text", CATALOGUE)
def test_parity(text: str) -> None:
    case, chosen = (part.strip() for part in text.split("|"))
    parsed = LinearCase.parse(case)
    data, plan = make(parsed), plan_of(chosen)
    y = run(data, parsed.activations, plan)
    assert y.dtype == parsed.torch_dtype
    bound = bound_of(data, plan)
    assert oracle.test_ratio(y, data.y64, bound) <= 1, oracle.worst(y, data.y64, bound)


@pytest.mark.parametrize("text", ["vq8-256-g48", "vq2-16", "vq4-256+16", "vq16-65536", "vq4-65536"])
def test_dequantize_is_the_definition_bit_for_bit(text: str) -> None:
    weight = make_weight(text, 21, 203, np.random.default_rng(1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = launcher.dequantize(weight, dtype)
        assert torch.equal(got, weight.dequantize(dtype))
    # The sum and the product are one fp32 operation each.
    np.testing.assert_allclose(weight.dequantize().numpy(), decode(weight), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("chosen", ["flat fp16 16x32x128", "gemv fp32 4x32x128"])
@pytest.mark.parametrize("text", ["vq8-256-g32", "vq8-65536+256"])
def test_sums_of_whole_numbers_are_exact_at_every_split(text: str, chosen: str) -> None:
    rng = np.random.default_rng(3)
    weight = make_weight(text, 20, 400, rng, "integers")
    x = torch.from_numpy(rng.integers(-8, 9, (4, 400))).half()
    data = answer(x, weight, None, "float")
    for pieces in (1, 2, 4):
        out = torch.empty(4, 20)
        plan = plan_of(f"{chosen} k{pieces}")
        y = launcher.linear(x, weight, None, ActivationFormat(), plan, out)
        assert y is out
        assert torch.equal(y.double(), torch.from_numpy(data.y64)), pieces


@pytest.mark.parametrize(
    ("text", "how", "chosen"),
    [
        ("vq8-256-g16", "fp16 float", "flat fp16 16x32x128"),
        ("vq4-256+16", "fp32 float", "gemv fp32 4x32x128"),
        ("vq2-16", "fp32 int8", "flat fp16 8x32x128 swap"),
    ],
)
def test_one_wrong_number_is_seen(text: str, how: str, chosen: str) -> None:
    """The bound is tight enough that any single stored number shows when it is another."""
    dtype, activations = how.split()
    weight = make_weight(text, 16, 64, np.random.default_rng(8), "one_sign")
    plan, x = plan_of(chosen), torch.ones(3, 64, dtype=cases.DTYPES[dtype])
    data = answer(x, weight, None, activations)
    assert oracle.test_ratio(run(data, activations, plan), data.y64, bound_of(data, plan)) <= 1
    used = int(weight.unpack_indices()[0][5, 1])
    row = 5 * 4 * weight.codec.plane_widths[0]  # its first word
    changes = {"codes": row, "scales": 5, "books": used * weight.codec.vector}
    for name, place in changes.items():
        changed = weight.tensors[name].clone()
        flat = changed.reshape(-1)
        flat[place] = flat[place] ^ 5 if name == "codes" else flat[place] * 1.25
        wrong = VectorTensor(weight.codec, weight.shape, **{**weight.tensors, name: changed})
        other = LinearData(x, wrong, None, data.y64, data.gauge)  # type: ignore[arg-type]
        y = run(other, activations, plan)
        assert oracle.test_ratio(y, data.y64, bound_of(data, plan)) > 1, name


@pytest.mark.parametrize(
    "text",
    [
        "vq8-256+256-g64 5 37 300 fp16 float normal True | flat fp16 16x32x128 k2",
        "vq4-16 3 20 200 bf16 float normal False | flat bf16 8x32x128 swap",
        "vq16-65536 3 37 140 fp32 float normal False | gemv fp32 4x32x128",
        "vq2-256-g32 3 20 140 fp16 float normal True | decode_matmul fp16 16x32x128",
    ],
)
def test_sanitizer_is_clean_and_order_does_not_matter(text: str) -> None:
    case, chosen = (part.strip() for part in text.split("|"))
    parsed = LinearCase.parse(case)
    data, results = make(parsed), []
    for order in (None, "reverse"):
        with sanitize(order=order) as report:  # type: ignore[arg-type]
            results.append(run(data, parsed.activations, plan_of(chosen)))
        report.assert_clean()
    assert torch.equal(results[0], results[1])


def test_the_verb_takes_them() -> None:
    torch.manual_seed(1)
    packed = lath.quantize(torch.randn(20, 130), "vq4-16-g64")
    for activations in ("float", "int8"):
        data = answer(torch.randn(3, 130), packed, None, activations)  # type: ignore[arg-type]
        y = lath.linear(data.x, packed, activations=activations, backend="triton")
        plan = lath.plan(3, 20, 130, packed.codec, torch.float32, "sm_80", activations)
        assert oracle.test_ratio(y, data.y64, bound_of(data, plan)) <= 1


def test_an_int8_dot_is_refused() -> None:
    weight = make_weight("vq8-256", 16, 64, np.random.default_rng(9))
    with pytest.raises(ValueError, match=r"plan dot .* 'fp16', as int8 times .* got 'int8'"):
        launcher.linear(
            torch.randn(3, 64), weight, None, ActivationFormat("int8"),
            plan_of("flat int8 16x32x128"),
        )  # fmt: skip
