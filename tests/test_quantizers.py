"""`lath.quantize(quantizer=…)`, `lath.awq_scales`: torch against the definition; refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_reference_quantizers import CODECS, make

import lath
from lath.formats.codec import Codec
from lath.formats.quantizer import AWQ, GPTQ, HQQ, QUANTIZERS, RTN
from lath.reference import codecs
from lath.reference import quantizers as reference


def test_text_forms_round_trip() -> None:
    for text, value in QUANTIZERS.items():
        assert str(lath.quantizer(text)) == text
        assert lath.quantizer(value) is value
    assert lath.quantizer("awq+gptq") == AWQ(rounding=GPTQ())


@pytest.mark.parametrize("options", [GPTQ(block=32), GPTQ(act_order=False, block=7, damping=0.1)])
@pytest.mark.parametrize("text", CODECS)
def test_gptq_has_the_codes_of_the_definition(text: str, options: GPTQ) -> None:
    """Exactly: both sum in float64, in another order, and a code would differ only where a value
    lies within about 1e-13 of the middle between two codes. Blocks do not change the numbers."""
    weight, hessian = make(19, 150)
    codec = Codec.parse(text)
    expected = reference.gptq(weight, codec, hessian, options)
    packed = lath.quantize(
        torch.from_numpy(weight), codec, quantizer=options, hessian=torch.from_numpy(hessian)
    )
    assert np.array_equal(packed.unpack_codes().numpy(), expected.codes)
    table = None
    if codec.values == "learned":
        assert packed.table is not None
        # Sums in float64, taken in another order.
        np.testing.assert_allclose(packed.table.numpy(), expected.table, rtol=2.0**-23)
        table = packed.table
    plain = lath.quantize(torch.from_numpy(weight), codec, table=table)
    for name, tensor in plain.tensors.items():
        assert torch.equal(tensor, packed.tensors[name]) == (name != "codes"), name


@pytest.mark.parametrize("text", CODECS)
def test_without_correlation_it_is_round_to_nearest(text: str) -> None:
    weight = torch.randn(20, 150)
    got = lath.quantize(weight, text, quantizer="gptq", hessian=torch.eye(150))
    plain = lath.quantize(weight, text, table=got.table)
    assert torch.equal(plain.codes, got.codes)


@pytest.mark.parametrize(
    "text", ["int4-g64-fzero", "int3-g48-fzero", "int2-fzero-s32", "int1-g16-fzero"]
)
def test_hqq_equals_the_definition(text: str) -> None:
    weight = np.random.default_rng(0).standard_t(3, (21, 150)).astype(np.float32)
    expected = reference.hqq(weight, Codec.parse(text), HQQ())
    packed = lath.quantize(torch.from_numpy(weight), text, quantizer="hqq")
    assert packed.zeros is not None
    assert np.array_equal(packed.zeros[:, :21].numpy(), expected.zeros)
    assert np.array_equal(packed.unpack_codes().numpy(), expected.codes)
    assert not packed.zeros[:, 21:].any()


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("shared", [None, torch.arange(80) // 2])
def test_awq_scales_equal_the_definition(shared: torch.Tensor | None, search: bool) -> None:
    """To the last bits of fp32: a power in torch and in NumPy is not rounded alike."""
    weight, hessian = make()
    size = np.where(np.arange(80) % 16 < 2, 30.0, 1.0) * np.linspace(1, 1.5, 80)
    hessian = np.diag(size**2) + hessian / hessian.max()
    weights = [weight, weight[:4] * 2]
    own = None if shared is None else shared.numpy()
    expected = reference.awq_scales(
        weights, Codec.parse("int3-g32"), hessian, AWQ(), own, search=search
    )
    got = lath.awq_scales(
        [torch.from_numpy(w) for w in weights], "int3-g32", torch.from_numpy(hessian),
        shared=shared, search=search,
    )  # fmt: skip
    np.testing.assert_allclose(got.numpy(), expected, rtol=2.0**-22)
    assert len(got.unique()) > 2


def test_awq_columns_and_inputs_cancel() -> None:
    """(W s)(x / s) = W x: scaled, rounded and multiplied, it errs less on inputs with outliers."""
    torch.manual_seed(3)
    weight, x = torch.randn(48, 128), torch.randn(256, 128)
    x[:, 5::32] *= 40
    hessian = x.T @ x
    s = lath.awq_scales(weight, "int4-g32", hessian)
    scaled = lath.quantize(weight * s, "int4-g32")
    exact = x @ weight.T
    errors = [
        float((lath.linear(a, w, backend="reference") - exact).norm())
        for a, w in ((x, lath.quantize(weight, "int4-g32")), (x / s, scaled))
    ]
    assert errors[1] < errors[0]
    wrong = lath.linear(x, scaled, backend="reference")
    assert float((wrong - exact).norm()) > errors[0]  # the control: x not scaled back


def test_the_hessian_is_gathered_piece_by_piece() -> None:
    x = torch.randn(3, 50, 24)
    own = lath.Hessian(24)
    for piece in x:
        own.add(piece.to(torch.bfloat16))
    rows = x.to(torch.bfloat16).double().reshape(-1, 24)
    assert own.count == 150
    # 150 products of numbers below 4.5, summed in fp32: (150 + 3) roundings of at most 2**-24.
    assert float((own.matrix - rows.T @ rows).abs().max()) <= 153 * 2.0**-24 * 150 * 4.5**2
    with pytest.raises(ValueError, match=r"\[\.\.\., 24\]"):
        own.add(torch.randn(2, 25))
    with pytest.raises(ValueError, match="finite"):
        own.add(torch.full((1, 24), torch.nan))


def test_any_dtype_and_shape_is_taken() -> None:
    hessian = torch.eye(48) + 0.5
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.randn(10, 96).to(dtype)[:, ::2]  # not contiguous
        got = lath.quantize(weight, "int4-g32", quantizer="gptq", hessian=hessian)
        again = lath.quantize(
            weight.float(), "int4-g32", quantizer="gptq", hessian=hessian.double()
        )
        assert torch.equal(got.codes, again.codes)
    for shape in ((0, 48), (5, 0), (1, 1)):
        columns = shape[1]
        packed = lath.quantize(
            torch.ones(shape), "int4-g32-asym", quantizer="gptq", hessian=torch.eye(columns)
        )
        assert packed.shape == shape
        assert lath.quantize(torch.ones(shape), "int4-g32-fzero", quantizer="hqq").shape == shape


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"quantizer": "gtpq"}, ValueError, "quantizer must be one of"),
        ({"quantizer": 3}, TypeError, "quantizer must be"),
        ({"quantizer": "gptq"}, ValueError, "needs hessian"),
        ({"quantizer": "rtn", "hessian": torch.eye(32)}, ValueError, "hessian is for"),
        ({"quantizer": "hqq"}, ValueError, "has none"),
        ({"quantizer": "awq", "hessian": torch.eye(32)}, ValueError, "lath.awq_scales"),
        ({"quantizer": "gptq", "hessian": torch.eye(31)}, ValueError, r"\[32, 32\]"),
        ({"quantizer": "gptq", "hessian": torch.eye(32).half()}, TypeError, "hessian must be"),
        ({"quantizer": "gptq", "hessian": -torch.eye(32)}, ValueError, "negative"),
        ({"quantizer": "gptq", "hessian": torch.eye(32) * torch.nan}, ValueError, "finite"),
        (
            {"quantizer": "gptq", "hessian": torch.eye(32) + torch.ones(32, 32).triu()},
            ValueError, "symmetric",
        ),
        (
            {"quantizer": GPTQ(damping=0), "hessian": torch.ones(32, 32)},
            ValueError, "singular.*raise the damping",
        ),
        ({"quantizer": "gptq", "hessian": torch.zeros(32, 32)}, ValueError, "singular"),
    ],
)  # fmt: skip
def test_what_is_refused(options: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        lath.quantize(torch.randn(8, 32), "int4-g16", **options)  # type: ignore[arg-type]


def test_weights_that_do_not_fit_are_refused() -> None:
    hessian = torch.eye(32)
    for weight, match in ((torch.full((8, 32), 1e6), "too large"), (torch.full((8, 32), torch.inf),
                          "infinity")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            lath.quantize(weight, "int4-g16", quantizer="gptq", hessian=hessian)
        with pytest.raises(ValueError, match=match):
            lath.quantize(weight, "int4-g16-fzero", quantizer="hqq")


@pytest.mark.parametrize(
    ("make_it", "match"),
    [
        (lambda: GPTQ(damping=-1.0), "damping"), (lambda: GPTQ(block=0), "block"),
        (lambda: GPTQ(damping=float("nan")), "damping"), (lambda: HQQ(p=0.0), "p must"),
        (lambda: HQQ(kappa=0.5), "kappa"), (lambda: HQQ(rounds=-1), "rounds"),
        (lambda: AWQ(grid=0), "grid"),
    ],
)  # fmt: skip
def test_options_out_of_range(make_it: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_it()  # type: ignore[operator]
    assert AWQ(rounding=RTN()) == AWQ()


def test_codes_are_new_and_start_is_not_changed() -> None:
    weight, hessian = make(16, 64)
    kept, own = weight.copy(), torch.from_numpy(hessian.copy())
    lath.quantize(torch.from_numpy(weight), "int4-g16", quantizer="gptq", hessian=own)
    assert np.array_equal(weight, kept)
    assert np.array_equal(own.numpy(), hessian)
    first = codecs.quantize(weight, Codec.parse("int4-g16-fzero"))
    zeros = first.zeros.copy()  # type: ignore[union-attr]
    reference.hqq(weight, Codec.parse("int4-g16-fzero"), HQQ(), first)
    assert np.array_equal(first.zeros, zeros)  # type: ignore[arg-type]
