"""The NumPy definition against paths that share nothing with it: exact rationals, plain loops."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.codec import codec as parse_codec
from lath.reference import codecs, linear

TEXTS = ["int4-g16", "int1-g16", "int3-asym", "int8-g48-fzero", "int2-s32", "int5-g32-asym-s32"]


def exact_value(code: int, scale: float, zero: float, codec: Codec) -> Fraction:
    """The value of one code in exact arithmetic, from the formulas of the codec's docstring."""
    if codec.zero == "float":
        return Fraction(scale) * code + Fraction(zero)
    point = Fraction(codec.zero_code) if codec.zero == "none" else Fraction(zero)
    return Fraction(scale) * (code - point)


@pytest.mark.parametrize("text", TEXTS)
def test_each_code_is_the_nearest_one(text: str) -> None:
    """No other code of the same scale and zero is nearer, up to the fp32 rounding of w / scale."""
    codec = parse_codec(text)
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((5, 70)).astype(np.float32)
    codes, scales, zeros, *_ = codecs.quantize(weight, codec)
    size = codec.group_size(70)
    for n, k in np.ndindex(*weight.shape):
        scale = float(scales[k // size, n])
        zero = 0.0 if zeros is None else float(zeros[k // size, n])
        target = Fraction(float(weight[n, k]))
        errors = [abs(exact_value(c, scale, zero, codec) - target) for c in range(codec.levels)]
        # w / scale is rounded in fp32: near a tie either neighbour may be taken.
        slack = abs(target) * Fraction(2.0**-22) + Fraction(zero if codec.zero == "float" else 0)
        tolerance = abs(slack) * Fraction(2.0**-20) + abs(target) * Fraction(2.0**-22)
        assert errors[codes[n, k]] <= min(errors) + tolerance, f"{text} at {n, k}"


@pytest.mark.parametrize("text", TEXTS)
def test_dequantize_is_exact(text: str) -> None:
    codec = parse_codec(text)
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((4, 50)).astype(np.float32)
    codes, scales, zeros, *_ = codecs.quantize(weight, codec)
    decoded = codecs.dequantize(codes, scales, zeros, codec)
    size = codec.group_size(50)
    for n, k in np.ndindex(*weight.shape):
        zero = 0.0 if zeros is None else float(zeros[k // size, n])
        exact = exact_value(int(codes[n, k]), float(scales[k // size, n]), zero, codec)
        # At most one float64 rounding, of the sum with a minimum.
        assert abs(Fraction(decoded[n, k]) - exact) <= abs(exact) * Fraction(2.0**-52) + Fraction(
            2.0**-60
        )


def test_scales_are_the_stated_formulas() -> None:
    weight = np.array([[-3.0, 1.0] * 8, [0.5, 2.0] * 8], np.float32)
    _, scales, *_ = codecs.quantize(weight, Codec(4, scale_dtype="fp32"))
    assert scales[0].tolist() == [np.float32(3 / 7.5), np.float32(2 / 7.5)]
    _, scales, zeros, *_ = codecs.quantize(weight, Codec(2, zero="integer", scale_dtype="fp32"))
    assert zeros is not None
    assert scales[0].tolist() == [np.float32(4 / 3), np.float32(2 / 3)]
    assert zeros[0].tolist() == [2, 0]
    _, scales, zeros, *_ = codecs.quantize(weight, Codec(2, zero="float", scale_dtype="fp32"))
    assert zeros is not None
    assert scales[0].tolist() == [np.float32(4 / 3), np.float32(1.5 / 3)]
    assert zeros[0].tolist() == [-3.0, 0.5]
    _, scales, *_ = codecs.quantize(weight, Codec(1, scale_dtype="fp32"))
    assert scales[0].tolist() == [4.0, 2.5]


def test_place_is_a_bijection_onto_the_bits() -> None:
    """Every bit of a block's words belongs to exactly one weight: nothing overlaps or is wasted."""
    for width in (1, 2, 4, 8):
        taken = set()
        for k in range(128):
            word, bit = codecs.place(3, k, width, 128)
            taken |= {(word, bit + i) for i in range(width)}
        assert len(taken) == 128 * width
        assert {word for word, _ in taken} == set(range(3 * 4 * width, 4 * 4 * width))


def test_place_reads_as_pairs_and_as_bytes() -> None:
    """k + 1 lies 16 bits above k (two halves of a word), k + 16 lies 8 bits above (bytes)."""
    for width in (1, 2, 4, 8):
        for k in range(128):
            word, bit = codecs.place(0, k, width, 128)
            if k % 2 == 0:
                assert codecs.place(0, k + 1, width, 128) == (word, bit + 16)
            if k % 32 < 16:
                assert codecs.place(0, k + 16, width, 128) == (word, bit + 8)


@pytest.mark.parametrize("text", ["int8", "int8-g16", "int8-g48"])
def test_activation_codes_are_within_half_a_step(text: str) -> None:
    fmt = ActivationFormat.parse(text)
    x = np.random.default_rng(3).standard_normal((6, 100)).astype(np.float32)
    codes, scales = linear.quantize_activations(x, fmt)
    assert np.abs(codes).max() == 127
    group = np.arange(100) // fmt.group_size(100)
    step = scales.astype(np.float64)[:, group]
    # Three fp32 roundings (scale, inverse, product) of a code up to 127.
    assert (np.abs(codes * step - x) <= step * (0.5 + 127 * 3 * 2.0**-24)).all()
    for m, g in np.ndindex(*scales.shape):
        absmax = np.abs(x[m, group == g]).max()
        assert scales[m, g] == np.float32(Fraction(float(absmax)) / 127)


def test_activation_rounding_is_half_to_even() -> None:
    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32)
    codes, scales = linear.quantize_activations(x, ActivationFormat("int8"))
    assert scales[0, 0] == 1
    assert codes[0].tolist() == [127, 0, 2, 2, 0, -2]


def test_activations_that_are_zero_tiny_or_not_finite() -> None:
    x = np.zeros((5, 32), np.float32)
    x[1, 3], x[2, 20], x[3, 5], x[4, 0] = np.nan, np.inf, 1e-32, -2.0
    codes, scales = linear.quantize_activations(x, ActivationFormat("int8", 16))
    assert np.isnan(scales).tolist() == [
        [False, False], [True, False], [False, True], [False, False], [False, False],
    ]  # fmt: skip
    assert (codes[:4] == 0).all()
    assert codes[4, 0] == -127
    assert scales[3].tolist() == [1, 1]


@pytest.mark.parametrize("activations", ["float", "int8", "int8-g32"])
@pytest.mark.parametrize("text", TEXTS)
def test_linear_is_the_sum_it_says(text: str, activations: str) -> None:
    """Plain Python loops over exact rationals."""
    codec, fmt = parse_codec(text), ActivationFormat.parse(activations)
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((3, 70)).astype(np.float32)
    x = rng.standard_normal((2, 70)).astype(np.float32)
    bias = rng.standard_normal(3).astype(np.float32)
    codes, scales, zeros, *_ = codecs.quantize(weight, codec)
    y = linear.linear(x, codes, scales, zeros, codec, bias, fmt)
    size = codec.group_size(70)
    if fmt.kind == "int8":
        rounded, steps = linear.quantize_activations(x, fmt)
    for m, n in np.ndindex(*y.shape):
        total = Fraction(float(bias[n]))
        for k in range(70):
            zero = 0.0 if zeros is None else float(zeros[k // size, n])
            value = exact_value(int(codes[n, k]), float(scales[k // size, n]), zero, codec)
            if fmt.kind == "int8":
                step = Fraction(float(steps[m, k // fmt.group_size(70)]))
                total += int(rounded[m, k]) * step * value
            else:
                total += Fraction(float(x[m, k])) * value
        assert abs(Fraction(y[m, n]) - total) < Fraction(2.0**-44)
