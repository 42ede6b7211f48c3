"""Codecs whose codes are not plain integers: value tables, ternary numbers, scales of 8 bits."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lath
from lath.formats import values
from lath.formats.codec import GRAMMAR_TABLE, Codec
from lath.formats.qtensor import QTensor
from lath.reference import codecs

TEXTS = [
    "int4-g64-s8", "int4-g48-asym-s8", "int2-g16-s8", "int4-g64-fp8", "int2-g48-fp8", "int3-fp8",
    "int8-g64-nested", "int4-nested-s32", "int2-g48-nested",
    "ternary", "ternary-g64", "ternary-g32-s32",
    "ternary-1.6", "ternary-1.6-g48-s32",
    "nf4-g64", "nf4-g64-dq", "nf4-s32", "fp4-g64", "fp4-g16-dq", "lut4-g128", "lut3-g64-dq", "lut8",
    "lut1-g16", "e4m3", "e4m3-g48", "e5m2-g128", "mxfp4", "mxfp6", "mxfp6-e3m2", "mxfp8",
    "mxfp8-e5m2", "nvfp4",
]  # fmt: skip


def make_weight(rows: int = 21, columns: int = 150, seed: int = 0) -> np.ndarray:
    """Rows of very different size, one of zeros, one of a single large number."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-3, 2, (rows, 1))
    weight[2], weight[5] = 0, 0
    weight[5, 7] = 3.0
    return weight.astype(np.float32)


@pytest.mark.parametrize("text", TEXTS)
def test_text_forms_round_trip(text: str) -> None:
    assert str(Codec.parse(text)) == text
    assert eval(repr(Codec.parse(text)), {"Codec": Codec}) == Codec.parse(text)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("int8-g64-s8", "2 to 4 bits"), ("int8-fp8", "2 to 4 bits"),
        ("int4-asym-fp8", "zero"), ("int4-fzero-s8", "zero"), ("e4m3-s32", "fp32 scales"),
        ("ternary-dq", "ternary"), ("mxfp4-g32", "codec must be"), ("nf5", "codec must be"),
        ("lut9", "codec must be"), ("nf4-g8", "multiple of 16"), ("fp4-asym", "codec must be"),
    ],
)  # fmt: skip
def test_text_forms_that_are_none(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Codec.parse(text)
    assert all(form for form in GRAMMAR_TABLE)


def test_tables_are_the_published_ones() -> None:
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        expected = torch.arange(256, dtype=torch.uint8).view(dtype).double().numpy()
        np.testing.assert_array_equal(np.array(values.table(name)), expected)  # type: ignore[arg-type]
    assert values.table("fp4")[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert values.table("e2m3")[:32:8] == (0, 1, 2, 4)
    assert values.largest("e2m3") == 7.5
    assert values.largest("e3m2") == 28
    for name in ("fp4", "e2m3", "e3m2"):
        entries = values.table(name)  # type: ignore[arg-type]
        half = len(entries) // 2
        assert [-x for x in entries[:half]] == list(entries[half:])
    nf4 = np.array(values.table("nf4"))
    assert (np.diff(nf4) > 0).all()
    assert (nf4[0], nf4[7], nf4[15]) == (-1, 0, 1)
    # Equal shares of a normal distribution on each side: 8 positive and 7 negative steps.
    normal = [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in nf4 * 1.848]
    assert np.ptp(np.diff(normal[8:])) < 0.012
    assert np.ptp(np.diff(normal[:7])) < 0.012
    for name, unit in values.UNITS.items():
        whole = np.array(values.table(name)) / unit  # type: ignore[arg-type]
        finite = whole[np.isfinite(whole)]
        assert np.array_equal(finite, np.rint(finite))
        assert np.abs(finite).max() <= 127


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["nf4", "fp4", "e2m3", "e3m2", "e4m3", "e5m2"]),
    st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=6),
)
def test_nearest_by_exact_distance(name: str, numbers: list[float]) -> None:
    """The least distance; of two as near, the even code; ties are met by the middles too."""
    entries = np.array(values.table(name), np.float32)  # type: ignore[arg-type]
    finite = sorted({float(x) for x in entries if math.isfinite(x)})
    middles = [(a + b) / 2 for a, b in itertools.pairwise(finite)][::7]
    for x in [*numbers, *(m for m in middles if float(np.float32(m)) == m)]:
        got = int(codecs.nearest_entry(np.array([x], np.float32), entries)[0])
        exact = {
            c: abs(Fraction(x) - Fraction(float(e)))
            for c, e in enumerate(entries)
            if np.isfinite(e)
        }
        best = min(exact.values())
        ties = [code for code, distance in exact.items() if distance == best]
        assert got in ties
        assert got % 2 == 0 or all(code % 2 for code in ties)
        again = lath.kernels.quantize_tables.nearest_entry(torch.tensor([x]), torch.tensor(entries))
        assert int(again) == got


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_torch_equals_the_definition(text: str, search: bool) -> None:
    weight, codec = make_weight(), Codec.parse(text)
    expected = codecs.quantize(weight, codec, search)
    packed = lath.quantize(torch.from_numpy(weight), codec, search=search)
    assert np.array_equal(packed.unpack_codes().numpy(), expected.codes)
    rows = weight.shape[0]
    for name in ("scales", "zeros", "outer", "table"):
        own, wanted = getattr(packed, name), getattr(expected, name)
        assert (own is None) == (wanted is None)
        if own is not None:
            own = own if name == "table" or own.numel() == 1 else own[..., :rows]
            assert np.array_equal(own.numpy(), wanted), name
    decoded = codecs.dequantize(
        expected.codes, expected.scales, expected.zeros, codec, expected.outer, expected.table
    )
    np.testing.assert_allclose(packed.dequantize().numpy(), decoded, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("text", TEXTS)
def test_no_other_code_is_nearer(text: str) -> None:
    """Every weight has the code whose number lies nearest to it, given the stored scales."""
    weight, codec = make_weight(7, 100), Codec.parse(text)
    q = codecs.quantize(weight, codec)
    scale = codecs.effective_scales(q.scales, q.outer, codec)
    entries = codecs.entries_of(codec, q.table).astype(np.float64)
    for n in range(7):
        for k in range(0, 100, 3):
            g = k // codec.group_size(100)
            if codec.is_table:
                numbers = entries * scale[g, n]
            else:
                zero = codec.zero_code if q.zeros is None else float(q.zeros[g, n])
                numbers = (np.arange(codec.levels) - zero) * scale[g, n]
            distance = np.abs(numbers - float(weight[n, k]))
            own = distance[q.codes[n, k]]
            # w / scale is rounded once to fp32 before the nearest is taken.
            assert own <= np.nanmin(distance) + 2.0**-22 * abs(float(weight[n, k]))
    assert not codecs.dequantize(q.codes, q.scales, q.zeros, codec, q.outer, q.table)[2].any()


@pytest.mark.parametrize("rows", [16, 21])
@pytest.mark.parametrize("text", TEXTS)
def test_what_kernels_read_is_contiguous(text: str, rows: int) -> None:
    """Nothing to pad must not leave a transpose."""
    packed = lath.quantize(torch.from_numpy(make_weight(rows)), text)
    assert all(tensor.is_contiguous() for tensor in packed.tensors.values())


@pytest.mark.parametrize("text", TEXTS)
def test_saved_and_loaded(text: str) -> None:
    packed = lath.quantize(torch.from_numpy(make_weight()), text)
    state = packed.state_dict()
    again = QTensor.from_state_dict(state)
    assert again.digest() == packed.digest()
    assert torch.equal(again.dequantize(), packed.dequantize())
    for name, tensor in packed.tensors.items():
        damaged = {**state, name: tensor.clone()}
        damaged[name].view(torch.uint8).reshape(-1)[0] ^= 1
        with pytest.raises(ValueError, match=r"corrupted|must be"):
            QTensor.from_state_dict(damaged)
    sides = sum(t.nbytes for n, t in packed.tensors.items() if n != "codes")
    codes = 32 * 160 // 5 if "1.6" in text else packed.codec.bits * 32 * 256 // 8
    assert packed.nbytes == codes + sides


def test_powers_of_two_follow_the_published_rule() -> None:
    """floor(log2 amax) - 2 for E2M1: 6 has scale 1, 7.9 saturates, 8 has scale 2."""
    for amax, scale in (
        (6.0, 1.0),
        (7.9, 1.0),
        (8.0, 2.0),
        (4.0, 1.0),
        (3.99, 0.5),
        (2.0**-130, 2.0**-127),
    ):
        q = codecs.quantize(np.full((1, 32), amax, np.float32), Codec.parse("mxfp4"))
        assert codecs.effective_scales(q.scales, None, Codec.parse("mxfp4"))[0, 0] == scale
    better = codecs.quantize(np.full((1, 32), 7.9, np.float32), Codec.parse("mxfp4"), search=True)
    assert int(better.scales[0, 0]) == 128  # twice: 8 is nearer than 6


def test_ternary_is_absmean_of_the_tensor() -> None:
    weight = make_weight()
    q = codecs.quantize(weight, Codec.parse("ternary-s32"))
    mean = np.float32(np.abs(weight.astype(np.float64)).mean())
    assert (q.scales == mean).all()
    assert np.array_equal(q.codes, np.clip(np.rint(weight / mean), -1, 1) + 1)


def test_int8_group_scales_are_one_int8_matmul() -> None:
    """DGQ (2310.04836): Σ_k x (S (w - z)) over all groups is one exact int8 product."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((9, 256)).astype(np.float32)
    for text in ("int4-g64-s8", "int4-g64-asym-s8"):
        codec = Codec.parse(text)
        q = codecs.quantize(weight, codec)
        group = np.arange(256) // 64
        zero = codec.zero_code if q.zeros is None else q.zeros.T[:, group].astype(np.int64)
        eight = q.scales.T[:, group].astype(np.int64) * (q.codes.astype(np.int64) - np.int64(zero))
        assert np.abs(eight).max() <= 127
        x = rng.integers(-127, 128, (5, 256))
        parts = sum(
            q.scales[g].astype(np.int64)
            * (
                x[:, 64 * g : 64 * g + 64]
                @ (q.codes.astype(np.int64) - np.int64(zero))[:, 64 * g : 64 * g + 64].T
            )
            for g in range(4)
        )
        assert np.array_equal(x @ eight.T, parts)
        assert np.abs(x @ eight.T).max() < 2**31
        decoded = codecs.dequantize(q.codes, q.scales, q.zeros, codec, q.outer)
        np.testing.assert_allclose(
            decoded, eight * q.outer.astype(np.float64)[:, None], rtol=2.0**-23
        )  # type: ignore[union-attr]


def test_scales_whose_product_leaves_int8_are_refused() -> None:
    packed = lath.quantize(torch.randn(16, 64), "int4-g16-s8")
    assert int(packed.scales.max()) <= 127 // 8
    state = packed.state_dict()
    wrong = QTensor(packed.codec, packed.shape, packed.codes, packed.scales + 1, None, packed.outer)
    with pytest.raises(ValueError, match="fits int8"):
        QTensor.from_state_dict({**wrong.state_dict(), "meta": wrong.metadata()})
    assert QTensor.from_state_dict(state).digest() == packed.digest()


def test_learned_tables() -> None:
    rng = np.random.default_rng(5)
    levels = np.array([-1, -0.7, -0.1, 0, 0.05, 0.3, 0.6, 1.0])
    weight = levels[rng.integers(0, 8, (32, 128))].astype(np.float32)
    weight[:, ::64], weight[:, 1::64] = 1, -1  # every group has its largest
    packed = lath.quantize(torch.from_numpy(weight), "lut3-g64")
    np.testing.assert_allclose(packed.table.numpy(), levels, atol=1e-6)  # type: ignore[union-attr]
    np.testing.assert_allclose(packed.dequantize().numpy(), weight, atol=1e-6)
    own = torch.linspace(-1, 1, 8)
    given = lath.quantize(torch.from_numpy(weight), "lut3-g64", table=own)
    assert torch.equal(given.table, own)  # type: ignore[arg-type]
    error = [
        float((p.dequantize() - torch.from_numpy(weight)).square().sum()) for p in (packed, given)
    ]
    assert error[0] < error[1]
    for wrong, match in ((own[:4], "8 finite"), (own.flip(0), "ascend"), (own * 0, "not 0")):
        with pytest.raises(ValueError, match=match):
            lath.quantize(torch.from_numpy(weight), "lut3-g64", table=wrong)
    with pytest.raises(ValueError, match="for 'lut' codecs"):
        lath.quantize(torch.from_numpy(weight), "nf4-g64", table=own)
    with pytest.raises(ValueError, match="not 0"):
        lath.quantize(torch.zeros(4, 64), "lut3-g64")


@pytest.mark.parametrize("text", ["nf4-g64", "mxfp4", "nvfp4", "ternary", "e4m3", "lut4"])
def test_weights_that_cannot_be_stored(text: str) -> None:
    weight = torch.randn(16, 64)
    weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        lath.quantize(weight, text)
    if text in ("nf4-g64", "lut4"):
        with pytest.raises(ValueError, match="too large"):
            lath.quantize(torch.full((16, 64), 1e6), text)


@pytest.mark.parametrize("shape", [(0, 64), (16, 0), (1, 1), (3, 17)])
@pytest.mark.parametrize("text", [t for t in TEXTS if not t.startswith("lut")])
def test_small_and_empty_weights(text: str, shape: tuple[int, int]) -> None:
    packed = lath.quantize(torch.ones(shape), text)
    assert packed.dequantize().shape == shape
    x = torch.ones(2, shape[1])
    assert lath.linear(x, packed, backend="reference").shape == (2, shape[0])
