"""Sums of packed weights: text forms, quantisers against their definition, bytes, saved form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases_sums import TEXTS, answer_of, error_of, heavy_weight, make_sum

import lath
from lath.formats.activations import activation_format
from lath.formats.codec import Codec
from lath.formats.families import family_of_text, weight_codec
from lath.formats.outliers import OutlierCodec, Outliers
from lath.formats.qtensor import QTensor
from lath.formats.sum_codec import GRAMMAR_TABLE, SumCodec
from lath.formats.sum_tensor import SumTensor
from lath.reference import sums
from lath.verbs.kinds import kind_of
from lath.verbs.sum_quantize import choose_outliers

OTHERS = ["int4-g128", "nf4-g64-dq", "mxfp4", "ternary", "e4m3", "lut4-g64"]


# Text forms


@pytest.mark.parametrize("text", [*TEXTS, "mix1.5-g128", "mix7-g16-s32", "mix3-p0-g16-asym",
                                  "mix2-p5-g64+out1%", "int8+out100%"])  # fmt: skip
def test_text_forms_round_trip(text: str) -> None:
    codec = weight_codec(text)
    assert isinstance(codec, SumCodec)
    assert str(codec) == text
    assert weight_codec(str(codec)) == codec
    assert hash(weight_codec(text)) == hash(codec)
    assert SumTensor.tensor_names(codec)[0] == "codes"
    names = SumTensor.tensor_names(codec)
    assert len(set(names)) == len(names)
    assert GRAMMAR_TABLE


@pytest.mark.parametrize("text", OTHERS)
def test_other_families_keep_their_texts(text: str) -> None:
    assert family_of_text(text).codec is not SumCodec


def test_a_plus_before_a_number_is_not_ours() -> None:
    assert family_of_text("vq8-65536+256").codec is not SumCodec
    assert family_of_text("vq8-65536+256+out1%").codec is SumCodec


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("int4-g64+out0%", "percent.*0"), ("int4-g64+out101%", "percent.*101"),
        ("int4-g64+outx", "outP%"), ("out1%+int4", "outliers only the last"),
        ("int4+out1%+out2%", "outliers only the last"), ("mix2.5", r"mixM\[-pP\]-gG"),
        ("mix2.5-g24", "multiple of 16"), ("mix1-g64", "widths"), ("mix8-g64", "1 to 8"),
        ("mix2:4-4-g64", "between"), ("mix4:2-3-g64", "ascending"), ("mix1.5-g64-s8", "2 to 4"),
        ("mix2.5-g64+mix2.5-g64", "at most one"), ("billm0%-g64", "percent"),
        ("mix2.5-p1-g64", "pairs .* three widths"), ("billm10%", "billmP%-gG"),
        ("int4-g64+nonsense", "nonsense"),
    ],
)  # fmt: skip
def test_text_forms_that_are_none(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        weight_codec(text)


def test_sums_of_sums_and_single_parts_are_none() -> None:
    inner = SumCodec.parse("int4-g64+out1%")
    for parts in ((inner, Codec(4)), (Codec(4),), (), (OutlierCodec(1),)):
        with pytest.raises(ValueError, match="parts"):
            SumCodec(parts)


# Quantisers


@pytest.mark.parametrize(("weighted", "search"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("text", TEXTS)
def test_torch_equals_the_definition(text: str, weighted: bool, search: bool) -> None:
    weight, codec = heavy_weight(21, 168), SumCodec.parse(text)
    importance = None
    if weighted and codec.takes_importance:
        importance = torch.from_numpy(np.random.default_rng(1).random((21, 168)).astype(np.float32))
    packed = lath.quantize(weight, codec, search=search, importance=importance)
    assert isinstance(packed, SumTensor)
    known = None if importance is None else importance.double().numpy()
    if search:
        codec = sums.settle(weight.numpy(), codec, importance=known)
    assert packed.codec == codec
    expected = sums.quantize(weight.numpy(), codec, search, known)
    if expected.columns is not None:
        assert np.array_equal(packed.columns, expected.columns)  # type: ignore[arg-type]
    assert len(packed.terms) == len(expected.terms) + (expected.places is not None)
    for term, own in zip(packed.terms, expected.terms, strict=False):
        assert isinstance(term, QTensor)
        assert np.array_equal(term.unpack_codes().numpy(), own.codes)
        assert np.array_equal(term.scales[:, :21].numpy(), own.scales)
        if own.zeros is not None:
            assert np.array_equal(term.zeros[:, :21].numpy(), own.zeros)  # type: ignore[index]
    if expected.places is not None:
        last = packed.terms[-1]
        assert isinstance(last, Outliers)
        assert np.array_equal(last.places().numpy(), expected.places)
        assert np.array_equal(last.values.numpy(), expected.values)


@pytest.mark.parametrize("text", TEXTS)
def test_the_definition_is_the_sum_of_its_terms(text: str) -> None:
    """`dequantize` and the float64 product against terms that a loop adds."""
    packed = make_sum(text)
    x = torch.randn(3, 200)
    bias = torch.randn(37)
    for activations in ("float", "int8", "int8-g32"):
        fmt = activation_format(activations)
        y = kind_of(packed).reference(x.numpy(), packed, bias.numpy(), fmt)
        np.testing.assert_allclose(y, answer_of(x, packed, bias, activations).y64, rtol=1e-11,
                                   atol=1e-11)  # fmt: skip
    decoded = kind_of(packed).decode(packed)
    # fp32: a minimum that cancels leaves the rounding of scale * code.
    np.testing.assert_allclose(packed.dequantize().numpy(), decoded, rtol=2.0**-22,
                               atol=2.0**-22 * np.abs(decoded).max())  # fmt: skip
    y = kind_of(packed).reference(x.numpy(), packed, None, activation_format("float"))
    np.testing.assert_allclose(y, x.double().numpy() @ decoded.T, rtol=1e-11, atol=1e-11)


def test_whole_groups_keep_the_activations_of_x() -> None:
    """int8 activations in a mix's groups are those of x, wherever its groups went; a scale for
    each token is one of the term's columns, and another number."""
    packed = make_sum("mix2.5-g32", 20, 200)
    x = torch.randn(3, 200) * torch.exp(torch.randn(200))
    decoded = kind_of(packed).decode(packed)
    from lath.reference.linear import multiply

    for activations, same in (("int8-g32", True), ("int8-g16", True), ("int8", False)):
        fmt = activation_format(activations)
        y = kind_of(packed).reference(x.numpy(), packed, None, fmt)
        expected = multiply(x.numpy(), decoded, None, fmt)
        assert np.allclose(y, expected, rtol=1e-12, atol=1e-12) is same


# Outliers


@pytest.mark.parametrize("base", ["int4-g64", "int2-g64-asym", "nf4-g64", "int1-g64", "mix2.5-g32"])
def test_planted_outliers_are_kept_and_the_rest_is_nearer(base: str) -> None:
    """GWQ: dense and sparse together lie closer than the dense part alone at the same bits."""
    rng = np.random.default_rng(2)
    plain = torch.from_numpy(rng.standard_normal((40, 256)).astype(np.float32))
    weight = plain.clone()
    places = torch.from_numpy(rng.permutation(40 * 256)[:102]).sort().values
    weight.view(-1)[places] = 20 * (1 + torch.rand(102)) * torch.randn(102).sign()
    both = lath.quantize(weight, f"{base}+out1%")
    assert isinstance(both, SumTensor)
    last = both.terms[-1]
    assert isinstance(last, Outliers)
    assert torch.equal(last.places(), places)
    alone = lath.quantize(weight, base)
    assert error_of(both, weight) < 0.6 * error_of(alone, weight)
    # Planted ones are held to the rounding of fp16, also where the base has no code for 0.
    difference = (both.dequantize() - weight).view(-1)[places].abs()
    assert bool((difference <= 2.0**-10 * weight.view(-1)[places].abs()).all())
    # What is left is quantised as if they had never been there.
    mean = (both.dequantize() - weight).square().mean()
    clean = (lath.quantize(plain, base).dequantize() - plain).square().mean()
    assert float(mean) < 1.3 * float(clean)


@pytest.mark.parametrize("where", ["one row", "one column", "first and last"])
def test_outliers_anywhere(where: str) -> None:
    weight = torch.rand(50, 100) * 0.1 + 0.01
    count = OutlierCodec(2).count((50, 100))
    if where == "one row":
        weight[17] += 5
    elif where == "one column":
        weight[:, 99] += 5
        weight[:, 3] += 5
    else:
        weight[0, :50] += 5
        weight[49, 50:] += 5
    assert count == 100
    packed = lath.quantize(weight, "int4-g16+out2%")
    last = packed.terms[-1]  # type: ignore[attr-defined]
    assert torch.equal(last.places(), (weight > 4).view(-1).nonzero().view(-1))
    counts = last.offsets.diff()
    if where == "one row":
        assert counts[17] == 100
        assert counts.sum() == 100
    packed.check_values()
    assert torch.equal(last.dequantize() != 0, weight > 4)


def test_ties_take_the_first() -> None:
    score = torch.tensor([[1.0, 2, 2], [2, 1, 2]], dtype=torch.float64)
    for percent, expected in ((50, [1, 2, 3]), (34, [1, 2]), (100, [0, 1, 2, 3, 4, 5])):
        codec = OutlierCodec(percent)
        assert choose_outliers(score, codec).tolist() == expected
        assert sums.choose_outliers(score.numpy(), codec).tolist() == expected


def test_outliers_by_what_they_cost() -> None:
    """An importance for each input, or for each weight as a squared gradient, moves the choice."""
    weight = torch.randn(30, 64)
    inputs = torch.ones(64)
    inputs[5] = 1e6
    chosen = lath.quantize(weight, "int4-g16+out1%", importance=inputs).terms[-1]  # type: ignore[attr-defined]
    assert bool((chosen.codes == 5).all())
    gradients = torch.zeros(30, 64)
    gradients[2, 7], gradients[9, 1] = 3, 2
    chosen = lath.quantize(weight, "int4-g16+out1%", importance=gradients.square()).terms[-1]  # type: ignore[attr-defined]
    assert {2 * 64 + 7, 9 * 64 + 1} <= set(chosen.places().tolist())
    for wrong, match in (
        (torch.ones(63), r"\[64\] or \[30, 64\]"), (-inputs, "not negative"),
        (inputs * torch.nan, "finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            lath.quantize(weight, "int4-g16+out1%", importance=wrong)
    with pytest.raises(ValueError, match="importance is for"):
        lath.quantize(weight, "int4-g16", importance=inputs)
    with pytest.raises(ValueError, match="importance is for"):
        lath.quantize(weight, "int1-g16+int1-g16", importance=inputs)


def test_bytes_of_outliers() -> None:
    """1 % costs 0.32 bits a weight and a row's offset; nothing depends on where they lie."""
    for columns, size in ((1024, 4), (1 << 15, 4), ((1 << 15) + 128, 6)):
        base = QTensor.empty(Codec.parse("int4-g128"), (16, columns)).nbytes
        packed = SumTensor.empty(SumCodec.parse("int4-g128+out1%"), (16, columns))
        assert packed.nbytes - base == round(16 * columns * 0.01) * size + 4 * 17


def test_weights_that_cannot_be_stored() -> None:
    weight = torch.randn(16, 64)
    weight[3, 5] = 1e6
    with pytest.raises(ValueError, match=r"out1%.*overflows fp16"):
        lath.quantize(weight, "int4-g16+out1%")
    with pytest.raises(ValueError, match="overflows fp16"):
        lath.quantize(weight * 100, "billm50%-g16")
    weight[3, 5] = torch.nan
    for text in ("int4-g16+out1%", "mix2.5-g16", "billm10%-g16", "int1+int1"):
        with pytest.raises(ValueError, match="NaN or infinity"):
            lath.quantize(weight, text)
