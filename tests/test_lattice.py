"""Lattices: text forms, Babai's points, generators, decoding, `linear` on every backend, saving."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_vectors import correlated
from torch import nn

import cases
import lath
import oracle
from lath.formats.activations import activation_format
from lath.formats.families import weight_codec
from lath.formats.lattice import LATTICE_GRAMMAR, LatticeCodec, LatticeTensor
from lath.integration.linear import PackedLinear
from lath.kernels import quantize_lattice
from lath.kernels.linear import lattice as kernel
from lath.reference import lattice as definition
from lath.reference import linear as reference
from lath.verbs import linear as verb
from tools.sanitizer import sanitize

FORMS = ["lattice2-d8", "lattice3-d2-g16", "lattice4-d16-g48", "lattice8-d4", "lattice5-d32-g64"]


def make_generator(d: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Far from orthogonal, but not nearly singular."""
    generator = np.eye(d) + 0.4 * rng.standard_normal((d, d)) / math.sqrt(d)
    return generator / np.linalg.norm(generator, 2)


def make_weight(text: str, rows: int, columns: int, rng: np.random.Generator) -> LatticeTensor:
    """Every whole number in use, generators and scales all different."""
    codec = LatticeCodec.parse(text)
    weight = LatticeTensor.empty(codec, (rows, columns), "cpu")
    words = rng.integers(-(2**31), 2**31, weight.codes.shape)
    scales = (0.5 + rng.random(weight.scales.shape)) / (2**codec.bits * columns**0.5)
    generators = [make_generator(codec.dimension, rng) for _ in weight.generators]
    return LatticeTensor(
        codec, (rows, columns), torch.from_numpy(words).to(torch.int32),
        torch.from_numpy(scales).half(), torch.from_numpy(np.array(generators)).float(),
    )  # fmt: skip


def points_of(weight: LatticeTensor) -> NDArray[np.int64]:
    return weight.points.unpack_codes().numpy().astype(np.int64) - 2 ** (weight.codec.bits - 1)


def decode(weight: LatticeTensor) -> NDArray[np.float64]:
    rows, columns = weight.shape
    return definition.dequantize(
        points_of(weight), weight.scales[:, :rows].numpy(), weight.generators.numpy(),
        weight.codec, columns,
    )  # fmt: skip


def answer(
    x: torch.Tensor, weight: LatticeTensor, bias: torch.Tensor | None, activations: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """y64 of the definition of `linear`, and Σ|a||w| of the loop over z with its zero point."""
    rows, fmt = weight.shape[0], activation_format(activations)
    turned = definition.transform(x.float().numpy(), weight.generators.numpy(), weight.codec)
    columns = turned.shape[1]
    group = np.arange(columns) // weight.codec.points.group_size(columns)
    scales = weight.scales[:, :rows].double().numpy().T[:, group]
    offsets = None if bias is None else bias.float().numpy()
    y64 = reference.multiply(turned, points_of(weight) * scales, offsets, fmt)
    gauge = (
        np.abs(reference.decode_activations(turned, fmt)) @ (2 * 2**weight.codec.bits * scales).T
    )
    return y64, gauge if offsets is None else gauge + np.abs(offsets)


def ratio(
    y: torch.Tensor, x: torch.Tensor, weight: LatticeTensor, bias: torch.Tensor | None,
    activations: str, rounded: bool,
) -> float:  # fmt: skip
    """rounded: x G was rounded to x's dtype before the dot."""
    y64, gauge = answer(x, weight, bias, activations)
    columns = weight.points.shape[1]
    bound = oracle.linear_bound(y64, gauge, columns, x.dtype, int(rounded))
    return oracle.test_ratio(y, y64, bound)


@pytest.mark.parametrize("text", FORMS)
def test_text_forms_round_trip(text: str) -> None:
    codec = weight_codec(text)
    assert isinstance(codec, LatticeCodec)
    assert str(codec) == text
    assert eval(repr(codec), {"LatticeCodec": LatticeCodec}) == codec
    assert LATTICE_GRAMMAR


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("lattice1-d8", "codec must be lattice"), ("lattice2", "codec must be lattice"),
        ("lattice2-d3", "dimension must be one of"), ("lattice2-d8-g24", "multiple of 16"),
        ("lattice2-d32-g48", "multiple of 32"), ("lattice9-d8", "codec must be lattice"),
    ],
)  # fmt: skip
def test_text_forms_that_are_none(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        weight_codec(text)


@pytest.mark.parametrize(("d", "bits"), [(2, 2), (4, 8), (8, 2), (8, 4), (16, 3), (32, 2)])
def test_a_point_of_the_lattice_is_its_own(d: int, bits: int) -> None:
    """babai(G z) == z, both ends of every coordinate included; shifted by less than half a step
    along each axis of Q too, and no longer where the shift is more."""
    rng = np.random.default_rng(d)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    generator = make_generator(d, rng)
    z = rng.integers(low, high + 1, (200, d))
    z[0], z[1] = low, high
    exact = z @ generator.T
    assert np.array_equal(definition.babai(exact, generator, bits), z)
    found = quantize_lattice.babai(torch.from_numpy(exact), torch.from_numpy(generator), bits)
    assert np.array_equal(found.numpy(), z)
    q, r = np.linalg.qr(generator)
    sides = np.abs(np.diag(r))
    shift = rng.uniform(-0.49, 0.49, (200, d)) * sides
    assert np.array_equal(definition.babai(exact + shift @ q.T, generator, bits), z)
    inner = (z[:, -1] < high) & (z[:, -1] > low)
    moved = exact + 0.51 * r[-1, -1] * q[:, -1]
    assert (definition.babai(moved, generator, bits)[inner, -1] == z[inner, -1] + 1).all()


def test_nearest_plane_is_within_its_bound_of_the_nearest_point() -> None:
    """In two dimensions, against every point: never more than its box is long."""
    rng = np.random.default_rng(3)
    generator = make_generator(2, rng)
    every = np.array(list(itertools.product(range(-8, 8), repeat=2)))
    vectors = rng.uniform(-2, 2, (300, 2))
    best = np.linalg.norm(vectors[:, None] - every @ generator.T, axis=2).min(axis=1)
    own = definition.babai(vectors, generator, 4)
    distance = np.linalg.norm(vectors - own @ generator.T, axis=1)
    half = np.linalg.norm(np.diag(np.linalg.qr(generator)[1])) / 2
    assert (distance >= best - 1e-12).all()
    assert (distance <= half + 1e-12).all()


@pytest.mark.parametrize("text", ["lattice2-d8", "lattice3-d2-g16", "lattice4-d16-g48"])
def test_torch_equals_the_definition(text: str) -> None:
    weight, codec = correlated(41, 203), LatticeCodec.parse(text)
    weight[4] = 0
    expected = definition.quantize(weight, codec)
    packed = lath.quantize(torch.from_numpy(weight), codec)
    assert isinstance(packed, LatticeTensor)
    packed.check_values()
    np.testing.assert_allclose(packed.generators.numpy(), expected.generators, rtol=0, atol=1e-6)
    scales = packed.scales[:, :41].numpy().astype(np.float64)
    np.testing.assert_allclose(scales, expected.scales.astype(np.float64), rtol=2.0**-10)
    # The same float64 steps in another order of sums: a point differs where it is a tie.
    assert (points_of(packed) == expected.points).mean() > 0.999
    assert not decode(packed)[4].any()


@pytest.mark.parametrize("text", FORMS)
def test_decoding_is_the_definition_to_half_a_unit(text: str) -> None:
    weight = make_weight(text, 19, 205, np.random.default_rng(1))
    exact = decode(weight)
    # Magnitudes of what is summed: a cancelled sum keeps the rounding of its parts in float64.
    positive = np.abs(points_of(weight)).astype(np.int64)
    gauge = definition.dequantize(
        positive, weight.scales[:, :19].numpy(), np.abs(weight.generators.numpy()),
        weight.codec, 205,
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        error = np.abs(weight.dequantize(dtype).double().numpy() - exact)
        assert (error <= oracle.UNIT_ROUNDOFF[dtype] * np.abs(exact) + 2.0**-23 * gauge).all()
    # By one plain sum for one number.
    d, n, k = weight.codec.dimension, 7, 33
    g = weight.codec.group_of_block(205)[k // d]
    row = weight.generators[g, k % d].tolist()
    z = points_of(weight)[n, k // d * d :].tolist()
    plain = float(weight.scales[g, n]) * math.fsum(a * b for a, b in zip(row, z[:d], strict=True))
    assert exact[n, k] == pytest.approx(plain, rel=1e-12)


def test_bits_per_weight_are_those_of_the_bytes() -> None:
    weight = LatticeTensor.empty(LatticeCodec.parse("lattice2-d8-g128"), (512, 1024))
    bits = 2 * 512 * 1024 + 16 * 8 * 512 + 32 * 8 * 64
    assert weight.bits_per_weight == bits / (512 * 1024)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.5), (4, 0.5)])
def test_a_lattice_beats_scalar_codes_at_equal_bits(bits: int, share: float) -> None:
    """Weights that go with their neighbours: less than half the squared error."""
    weight = correlated(96, 512)
    per_row = (weight.astype(np.float64) ** 2).mean(axis=1, keepdims=True)

    def loss(text: str, values: NDArray[np.float32], search: bool) -> float:
        decoded = lath.quantize(torch.from_numpy(values), text, search=search).dequantize()
        return float(((decoded.numpy() - values) ** 2 / per_row).mean())

    gain = loss(f"lattice{bits}-d8", weight, False) / loss(f"int{bits}", weight, True)
    assert gain < share
    # Negative control: of weights that know nothing of one another hardly anything is gained.
    shuffled = np.random.default_rng(1).permuted(weight, axis=1)
    alone = loss(f"lattice{bits}-d8", shuffled, False) / loss(f"int{bits}", shuffled, True)
    assert alone > 1.5 * gain


@pytest.mark.parametrize("text", ["lattice2-d8", "lattice3-d2-g16", "lattice4-d16-g48"])
def test_cpu_parity(text: str) -> None:
    pytest.importorskip("numba")
    weight = make_weight(text, 37, 203, np.random.default_rng(2))
    for m, dtype, activations in (
        (1, "fp32", "float"), (3, "bf16", "int8"), (9, "fp16", "int8-g48"), (2, "bf16", "float"),
    ):  # fmt: skip
        x, bias = torch.randn(m, 203).to(cases.DTYPES[dtype]), torch.randn(37)
        y = lath.linear(x, weight, bias, activations=activations, backend="cpu")
        assert y.dtype == x.dtype
        assert ratio(y, x, weight, bias, activations, False) <= 1, (m, dtype, activations)


@pytest.mark.parametrize(
    ("m", "dtype", "activations"),
    [(1, "fp32", "float"), (3, "bf16", "int8"), (5, "fp16", "float"), (2, "bf16", "float")],
)
@pytest.mark.parametrize("text", ["lattice2-d8-g48", "lattice4-d4"])
def test_triton_parity(text: str, m: int, dtype: str, activations: str) -> None:
    weight = make_weight(text, 21, 139, np.random.default_rng(4))
    x, bias = torch.randn(m, 139).to(cases.DTYPES[dtype]), torch.randn(21)
    with sanitize() as report:
        y = lath.linear(x, weight, bias, activations=activations, backend="triton")
    report.assert_clean()
    rounded = activations == "float" and dtype != "fp32"
    assert ratio(y, x, weight, bias, activations, rounded) <= 1


def test_it_is_the_product_with_the_decoded_weight() -> None:
    """(x G) z = x (G z), but for one rounding of x G to fp32."""
    weight = make_weight("lattice4-d8-g16", 20, 100, np.random.default_rng(5))
    x = np.random.default_rng(6).standard_normal((4, 100)).astype(np.float32)
    y = lath.linear(torch.from_numpy(x), weight, backend="reference").double().numpy()
    exact = x.astype(np.float64) @ decode(weight).T
    _, gauge = answer(torch.from_numpy(x), weight, None, "float")
    assert (np.abs(y - exact) <= 2.0**-23 * gauge).all()


def test_a_wrong_generator_is_seen() -> None:
    """Negative control of the bounds: any one number of a generator by a tenth."""
    pytest.importorskip("numba")
    weight = make_weight("lattice2-d4-g16", 20, 64, np.random.default_rng(7))
    x = torch.randn(3, 64)
    for place in ((0, 0, 0), (2, 3, 1), (3, 1, 3)):
        generators = weight.generators.clone()
        generators[place] += 0.1
        wrong = LatticeTensor(weight.codec, weight.shape, weight.codes, weight.scales, generators)
        y = lath.linear(x, wrong, backend="cpu")
        assert ratio(y, x, weight, None, "float", False) > 1


def test_sums_in_fp32_on_request() -> None:
    pytest.importorskip("numba")
    weight = make_weight("lattice2-d8", 20, 90, np.random.default_rng(8))
    x, fmt = torch.randn(3, 90).half(), activation_format("int8")
    for device in ("avx512_vnni", "sm_80"):
        plan = lath.plan(3, 20, 90, weight.codec, torch.float16, device, "int8")
        out = torch.full((3, 20), torch.nan)
        assert kernel.linear(x, weight, None, fmt, plan, out) is out
        assert torch.equal(out.half(), kernel.linear(x, weight, None, fmt, plan))
        assert not torch.equal(out, out.half().float())


def test_nan_stays_in_its_row() -> None:
    pytest.importorskip("numba")
    weight, x = make_weight("lattice2-d8", 20, 90, np.random.default_rng(9)), torch.randn(3, 90)
    for backend, activations in itertools.product(("cpu", "reference"), ("float", "int8")):
        clean = lath.linear(x, weight, activations=activations, backend=backend)
        broken = x.clone()
        broken[1, 5] = torch.nan
        y = lath.linear(broken, weight, activations=activations, backend=backend)
        assert torch.equal(y[[0, 2]], clean[[0, 2]])
        assert y[1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 40), (3, 0), (1, 1), (17, 9)])
def test_any_shape(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    packed = lath.quantize(weight, "lattice4-d8-g16")
    assert packed.dequantize().shape == shape
    assert lath.linear(torch.randn(2, shape[1]), packed, backend="reference").shape == (2, shape[0])
    if shape[0] and shape[1]:
        y = lath.linear(torch.randn(2, shape[1]), packed)
        assert y.shape == (2, shape[0])


def test_singular_lattices_are_refused() -> None:
    weight = make_weight("lattice2-d4-g16", 16, 32, np.random.default_rng(0))
    state = weight.state_dict()
    assert torch.equal(lath.load_weight(state).dequantize(), weight.dequantize())
    flat, nearly = weight.generators.clone(), weight.generators.clone()
    flat[1, 2] = flat[1, 0]
    nearly[1] = torch.diag(torch.tensor([1, 1, 1, 0.9e-4]))
    for bad, match in (
        (flat, "condition numbers"), (nearly, "condition numbers"),
        (torch.full_like(flat, math.nan), "must be finite"),
        (flat[:1], r"generators of .* must be torch.float32 \[2, 4, 4\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            lath.load_weight({**state, "generators": bad})
    nearly[1] = torch.diag(torch.tensor([1, 1, 1, 1.1e-4]))
    fine = LatticeTensor(weight.codec, weight.shape, weight.codes, weight.scales, nearly)
    fine.check_values()
    with pytest.raises(ValueError, match="corrupted"):
        lath.load_weight({**state, "generators": nearly})


def test_degenerate_weights_get_a_lattice() -> None:
    """Constant rows, columns of zeros, one vector: never a singular generator."""
    weight = torch.zeros(20, 64)
    weight[:, ::4] = 1.0
    for values in (weight, torch.ones(20, 64), torch.ones(1, 8), torch.zeros(4, 16)):
        packed = lath.quantize(values, "lattice4-d8")
        packed.check_values()
        error = (packed.dequantize() - values).abs().max()
        assert error <= 0.15 * values.abs().max()


def test_what_is_refused() -> None:
    weight = torch.randn(16, 32)
    for bad in (math.nan, math.inf):
        broken = weight.clone()
        broken[3, 5] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            lath.quantize(broken, "lattice2-d8")
        with pytest.raises(ValueError, match="NaN or infinity"):
            definition.quantize(broken.numpy(), LatticeCodec.parse("lattice2-d8"))
    with pytest.raises(ValueError, match="overflows fp16"):
        lath.quantize(weight * 1e7, "lattice2-d8")
    with pytest.raises(ValueError, match="search must be False"):
        lath.quantize(weight, "lattice2-d8", search=True)
    with pytest.raises(ValueError, match="table is for"):
        lath.quantize(weight, "lattice2-d8", table=torch.arange(4.0))


def test_the_layer_round_trip_and_the_operator() -> None:
    pytest.importorskip("numba")
    torch.manual_seed(2)
    source = nn.Linear(90, 40)
    for backend in ("reference", "cpu"):
        module = PackedLinear.from_linear(source, "lattice4-d8-g16", "int8-g16", backend=backend)
        x = torch.randn(2, 3, 90).bfloat16()
        other = PackedLinear(
            90, 40, codec="lattice4-d8-g16", activations="int8-g16", backend=backend
        )
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(x), module(x))
        through = lath.linear(x, module.qtensor, module.bias, activations="int8-g16")
        assert backend == "reference" or torch.equal(module(x), through)
        with pytest.raises(ValueError, match="90"):
            module(torch.randn(3, 89))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
    packed = module.qtensor
    torch.library.opcheck(
        verb._operator,
        (torch.randn(3, 90, requires_grad=True), list(packed.tensors.values()), module.bias,
         "lattice4-d8-g16", 40, 90, "float", "reference"),
    )  # fmt: skip


def test_a_weight_far_from_the_others_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the scale of the other rows it is clipped to a half."""
    codec = LatticeCodec.parse("lattice4-d8-g64")
    weight = np.random.default_rng(3).standard_normal((48, 64)).astype(np.float32)
    weight[5, 17] = 8.0

    def error() -> np.ndarray:
        found = definition.quantize(weight, codec)
        return np.abs(definition.dequantize(*found, codec, 64) - weight)[5, 17]

    assert error() < 1
    monkeypatch.setattr(definition, "WIDTHS", (1.0,))
    assert error() > 3
