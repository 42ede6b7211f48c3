"""The Triton loops of `linear` over sparse weights, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases_sparse import definition, make_inputs, make_weight
from numpy.typing import NDArray
from torch import Tensor

import cases
import lath
import oracle
from cases import LinearCase, plan_of
from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.plan import Plan
from lath.formats.sparse import SparseTensor
from lath.kernels.linear import triton as launcher
from tools.sanitizer import sanitize

# As in test_triton_linear.py: every kind of kept number in every dot, spans, tails, splits.
CATALOGUE = [
    "sparse50-int8 5 37 300 fp16 float normal True | flat fp16 16x32x128 k2",
    "sparse50-int8-g64 3 20 200 bf16 float one_sign False | flat bf16 8x32x128 swap",
    "sparse80-int8-g128 5 37 300 fp16 int8-g128 normal True | flat int8 16x32x128 k2",
    "sparse70-int4-g64 17 33 300 fp16 int8-g64 normal False | tiled int8 16x32x128 swap",
    "sparse50-int4 3 20 300 bf16 int8 one_sign True | flat int8 16x32x256",
    "sparse50-int4-g48 3 20 200 fp16 float normal False | flat fp16 8x32x128 swap",
    "sparse0-int4-g16 3 37 150 bf16 int8-g16 normal False | flat fp16 16x32x128",
    "sparse100-int8 3 20 150 fp16 float normal True | flat fp16 16x32x128",
    "sparse50-int8-s32 3 21 150 fp32 float normal True | flat fp32 16x16x128",
    "sparse50-int8-g32 2 20 200 fp32 float normal False | gemv fp32 2x32x128 k2",
    "sparse30-int4 1 37 300 fp16 int8 normal True | gemv fp32 1x32x128",
    "sparse50-fp16 5 37 300 fp16 float normal True | flat fp16 16x32x128 k2",
    "sparse50-fp16 3 20 200 bf16 float normal False | flat bf16 16x32x128",
    "sparse50-fp16 3 20 200 fp32 int8-g64 normal False | flat fp16 8x32x128 swap",
    "sparse50-bf16 5 37 300 bf16 float one_sign True | tiled bf16 16x32x128",
    "sparse60-bf16 3 20 200 fp16 int8 normal False | flat bf16 16x32x128",
    "sparse50-bf16 2 20 150 fp32 float normal True | flat fp32 16x32x128 swap",
    "sparse50-int8-g64 5 20 200 fp16 float normal True | decode_matmul fp16 16x64x128",
    "sparse50-bf16 5 20 260 bf16 float normal False | decode_matmul bf16 16x64x128",
]


def run(x: Tensor, weight: SparseTensor, bias: Tensor | None, how: str, plan: Plan) -> Tensor:
    return launcher.linear(x, weight, bias, activation_format(how), plan)


def bound_of(
    y64: NDArray[np.float64], gauge: NDArray[np.float64], x: Tensor, weight: SparseTensor,
    plan: Plan,
) -> NDArray[np.float64]:  # fmt: skip
    """The bound of the oracle; 16-bit numbers in a dot of the other 16-bit type are rounded once,
    and so is every decoded weight of decode_matmul."""
    other = weight.codec.is_table and plan.dot in ("fp16", "bf16")
    rounded = plan.dataflow == "decode_matmul" or (other and plan.dot != weight.codec.values)
    dot = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}.get(plan.dot)
    return oracle.linear_bound(y64, gauge, weight.shape[1], x.dtype, int(rounded), dot)


def ratio(x: Tensor, weight: SparseTensor, bias: Tensor | None, how: str, plan: Plan) -> float:
    y = run(x, weight, bias, how, plan)
    assert y.dtype == x.dtype
    y64, gauge = definition(x, weight, bias, how)
    return oracle.test_ratio(y, y64, bound_of(y64, gauge, x, weight, plan))


@pytest.mark.parametrize("text", CATALOGUE)
def test_parity(text: str) -> None:
    case, chosen = (part.strip() for part in text.split("|"))
    parsed = LinearCase.parse(case)
    inputs, weight = make_inputs(parsed)
    assert ratio(inputs.x, weight, inputs.bias, parsed.activations, plan_of(chosen)) <= 1


@pytest.mark.parametrize("text", ["int8-g64", "int4", "int4-g16", "fp16", "bf16"])
@pytest.mark.parametrize("share", [0, 50, 80, 100])
def test_dequantize_is_the_definition_bit_for_bit(text: str, share: int) -> None:
    """With an empty tile, a full one, and a last one that is cut off both ways."""
    weight = make_weight(f"sparse{share}-{text}", 37, 290, np.random.default_rng(share))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(launcher.dequantize(weight, dtype), weight.dequantize(dtype))


@pytest.mark.parametrize("dot", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("text", ["sparse50-int8", "sparse50-int4", "sparse50-fp16"])
def test_identity_gives_the_kept_numbers(text: str, dot: str) -> None:
    """Whole numbers are exact in every dot type, 16-bit ones in their own and in fp32."""
    weight = make_weight(text, 18, 144, np.random.default_rng(2), "integers")
    dtype = cases.DTYPES[dot]
    x = torch.eye(144, dtype=dtype)
    y = launcher.linear(x, weight, None, ActivationFormat(), plan_of(f"tiled {dot} 32x32x128"))
    assert torch.equal(y, weight.dequantize(dtype).T)


@pytest.mark.parametrize("text", ["sparse50-int8", "sparse80-int4-s32"])
@pytest.mark.parametrize("chosen", ["flat int8 16x32x128", "flat int8 8x32x128 swap"])
def test_int8_sums_are_exact_at_every_split(text: str, chosen: str) -> None:
    """Activations that are their own codes, scales that are powers of two: fp32 holds all sums."""
    rng = np.random.default_rng(3)
    weight = make_weight(text, 20, 260, rng, "integers")
    x = torch.from_numpy(rng.integers(-127, 128, (5, 260)).astype(np.float32))
    x[:, 0] = 127
    y64, _ = definition(x, weight, None, "int8")
    for pieces in (1, 3):
        y = run(x, weight, None, "int8", plan_of(f"{chosen} k{pieces}"))
        assert torch.equal(y.double(), torch.from_numpy(y64)), pieces
        out = torch.full((5, 20), torch.nan)
        filled = launcher.linear(
            x.half(), weight, None, ActivationFormat("int8"), plan_of(f"{chosen} k{pieces}"), out
        )
        assert filled is out
        assert torch.equal(out.double(), torch.from_numpy(y64)), pieces


@pytest.mark.parametrize("how", ["float", "int8"])
def test_one_wrong_bit_is_seen(how: str) -> None:
    """A bit of the bitmap moved by a column, an offset, a number, a scale: each is an error."""
    weight = make_weight("sparse50-int8", 16, 256, np.random.default_rng(8))
    x = torch.rand(3, 256) + 0.5
    plan = plan_of("flat int8 16x32x128" if how == "int8" else "flat fp32 16x32x128")
    y64, gauge = definition(x, weight, None, how)
    bound = bound_of(y64, gauge, x, weight, plan)
    assert oracle.test_ratio(run(x, weight, None, how, plan), y64, bound) <= 1
    for name, tensor in weight.tensors.items():
        changed = tensor.clone()
        if name == "bitmap":
            changed[0, 1, 5, 1] ^= 1 << 30  # a full tile: the last number of the row goes
        elif name == "offsets":
            changed[1] += 1
        elif name == "codes":
            changed[77] = -changed[77] if abs(int(changed[77])) > 20 else 100
        else:
            changed[0, 5] *= 1.25
        wrong = SparseTensor.from_tensors(
            weight.codec, weight.shape, {**weight.tensors, name: changed}
        )
        y = run(x, wrong, None, how, plan)
        assert oracle.test_ratio(y, y64, bound) > 1, name


@pytest.mark.parametrize(
    "text",
    [
        "sparse50-int8 5 37 300 fp16 float normal True | flat fp16 16x32x128 k2",
        "sparse70-int4-g64 5 37 300 bf16 int8-g64 normal False | flat int8 8x32x128 swap",
        "sparse50-bf16 3 37 300 fp32 float normal False | gemv fp32 4x32x128 k2",
        "sparse50-int4 5 37 300 fp16 float normal True | decode_matmul fp16 16x32x128",
    ],
)
def test_sanitizer_is_clean_and_order_does_not_matter(text: str) -> None:
    case, chosen = (part.strip() for part in text.split("|"))
    parsed = LinearCase.parse(case)
    inputs, weight = make_inputs(parsed)
    results = []
    for order in (None, "reverse"):
        with sanitize(order=order) as report:  # type: ignore[arg-type]
            results.append(run(inputs.x, weight, inputs.bias, parsed.activations, plan_of(chosen)))
        report.assert_clean()
    assert torch.equal(results[0], results[1])


def test_the_sanitizer_sees_a_bit_without_a_number() -> None:
    """Negative control: one bit more in the last tile, and a kernel reads behind the numbers."""
    weight = lath.quantize(torch.randn(16, 128), "sparse50-int8")
    word = int((weight.bitmap[0, 0, 15] != -1).nonzero()[0])
    weight.bitmap[0, 0, 15, word] = -1
    x = torch.randn(3, 128)
    with sanitize() as report:
        run(x, weight, None, "float", plan_of("flat fp32 16x16x128"))
    with pytest.raises(AssertionError, match="out_of_bounds_reads at table"):
        report.assert_clean()


@pytest.mark.parametrize("text", ["sparse50-int8-g64", "sparse70-int4", "sparse50-fp16"])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_the_verb_takes_them(text: str, activations: str) -> None:
    torch.manual_seed(1)
    packed = lath.quantize(torch.randn(20, 130), text)
    x = torch.randn(3, 130)
    y = lath.linear(x, packed, activations=activations, backend="triton")
    plan = lath.plan(3, 20, 130, packed.codec, torch.float32, "sm_80", activations)
    y64, gauge = definition(x, packed, None, activations)
    assert oracle.test_ratio(y, y64, bound_of(y64, gauge, x, packed, plan)) <= 1
