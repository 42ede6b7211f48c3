"""Ternary weights: five codes a byte, products by look-up, and the compiled kernels over both."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_cpu_processes import LOWERINGS, run_lowered

import lath
from lath.formats import packing
from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.qtensor import QTensor
from lath.kernels.linear import cpu, cpu_kernels, plan_cpu
from lath.kernels.linear.cpu_record import Record
from lath.kernels.linear.cpu_view import build_view, view_group
from lath.kernels.simd import emitter, isa, lanes
from lath.kernels.simd.compile import compile_kernel
from lath.reference import ternary as reference

BASE3 = Codec.parse("ternary-1.6")
FORMS = [reference.Tl1, reference.Tl2]
SHAPES = [(1, 1), (16, 160), (17, 161), (37, 500), (3, 20), (0, 5), (5, 0)]


def trits(rows: int, columns: int, seed: int = 0) -> NDArray[np.int8]:
    """-1, 0 and 1; the row in the middle is zeros."""
    weight = np.random.default_rng([rows, columns, seed]).integers(-1, 2, (rows, columns))
    weight[rows // 2 : rows // 2 + 1] = 0
    return weight.astype(np.int8)


def packed(weight: NDArray[np.int8], codec: Codec = BASE3) -> QTensor:
    """A weight of -1, 0, 1 with scale 1."""
    codes = torch.from_numpy((weight + 1).astype(np.uint8))
    side = torch.ones(codec.num_groups(weight.shape[1]), packing.round_up(len(weight), 16)).half()
    return QTensor(codec, weight.shape, packing.pack(codes, codec), side)


def exact_linear(x: NDArray[np.int8], weight: QTensor, backend: str) -> NDArray[np.int64]:
    """The integers Σ x w by a kernel: tokens that are their own int8 codes, scales of 1."""
    values = torch.from_numpy(x.astype(np.float32))
    values[:, 0] = 127  # the scale of a token is 1 then
    y = lath.linear(values, weight, activations="int8", backend=backend)
    return y.numpy().astype(np.int64)


def test_every_byte() -> None:
    """All 243 bytes give their five codes back; by the definition, by torch, none is 0."""
    every = list(itertools.product(range(3), repeat=5))
    bytes_ = [reference.trit_byte(slots) for slots in every]
    assert len(set(bytes_)) == 243
    assert min(bytes_) == 1
    assert max(bytes_) == 255
    assert [reference.trits_of(byte) for byte in bytes_] == every


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_packing_is_the_definition_and_round_trips(rows: int, columns: int) -> None:
    codes = (trits(rows, columns) + 1).astype(np.uint8)
    words = packing.pack(torch.from_numpy(codes), BASE3)
    assert np.array_equal(words.numpy().view(np.uint32), reference.pack_trits(codes))
    assert np.array_equal(packing.unpack(words, BASE3, codes.shape).numpy(), codes)
    padded = packing.round_up(rows, 16) * packing.round_up(columns, 160)
    assert words.numel() * 4 * 5 == padded


def test_bits_per_weight_are_stated_with_all_padding() -> None:
    for columns, bits in ((2560, 1.6), (6880, 1.6), (4096, 1.6 * 4160 / 4096)):
        weight = packed(trits(64, columns))
        assert 8 * weight.codes.nbytes / (64 * columns) == pytest.approx(bits, rel=1e-12)
        assert weight.bits_per_weight == pytest.approx(bits + 16 / columns, rel=1e-12)
    assert packed(trits(64, 2560), Codec.parse("ternary")).bits_per_weight == 2 + 16 / 2560


def test_five_codes_a_byte_are_the_same_numbers() -> None:
    """Nothing but bytes is saved: what is rounded away is what 2 bits round away."""
    weight = torch.randn(64, 800, generator=torch.Generator().manual_seed(5))
    for suffix in ("", "-g160", "-g64-s32"):
        dense, wide = (lath.quantize(weight, f"{name}{suffix}") for name in (
            "ternary-1.6", "ternary"))  # fmt: skip
        assert torch.equal(dense.dequantize(), wide.dequantize())
        assert dense.nbytes < 0.85 * wide.nbytes
    x = torch.randn(3, 800, generator=torch.Generator().manual_seed(6))
    exact = x.double() @ weight.double().T
    error = {
        text: float((lath.linear(x, lath.quantize(weight, text)).double() - exact).norm())
        for text in ("ternary-1.6", "ternary", "int2", "int4")
    }
    assert error["ternary-1.6"] == error["ternary"]
    # Of N(0, 1) rounded to -c, 0, c with c = E|w|: sqrt(E(w - q(w))²) = 0.51; of int4 far less.
    assert abs(error["ternary"] / float(exact.norm()) - 0.51) < 0.05
    assert error["int4"] < error["ternary"]


def test_bytes_that_are_no_codes_are_refused() -> None:
    weight = packed(trits(16, 160))
    state = weight.state_dict()
    assert torch.equal(QTensor.from_state_dict(state).codes, weight.codes)
    known = {reference.trit_byte(slots) for slots in itertools.product(range(3), repeat=5)}
    other = next(byte for byte in range(256) if byte not in known)
    weight.codes.view(torch.uint8)[7] = other
    with pytest.raises(ValueError, match="must each be those of five codes"):
        QTensor.from_state_dict(weight.state_dict())


def test_packings_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="codec packing of values 'integer' must be one of"):
        Codec(2, packing="base3")
    for text in ("int2-1.6", "nf4-1.6", "ternary-1.5", "ternary-g64-1.6"):
        with pytest.raises(ValueError, match="codec must be"):
            Codec.parse(text)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [1, 2, 3, 6, 17, 64, 131])
def test_look_ups_are_the_product(form: type[reference.Tl1], columns: int) -> None:
    """TL1 and TL2 of bitnet.cpp: K odd, K no multiple of a pack, a row of zeros, the largest x."""
    rng = np.random.default_rng(columns)
    weight = trits(9, columns)
    x = rng.integers(-127, 128, (5, columns)).astype(np.int8)
    x[0], x[1] = 127, -127
    product = x.astype(np.int64) @ weight.T.astype(np.int64)
    looked_up = reference.look_up_linear(x, weight, form)
    assert looked_up.dtype == np.int32
    assert np.array_equal(looked_up, product)
    assert not looked_up[:, 4].any()
    wrong = weight.copy()
    wrong[3, columns // 2] = -1 if wrong[3, columns // 2] == 1 else wrong[3, columns // 2] + 1
    assert not np.array_equal(reference.look_up_linear(x, wrong, form), product)


def test_look_up_indices_and_their_bits() -> None:
    """TL1: 2 bits a weight. TL2: 5 bits for three weights, and -w is the look-up of w negated."""
    for form in FORMS:
        every = np.array(list(itertools.product((-1, 0, 1), repeat=form.weights)), np.int8)
        indices, signs = form.encode(every)
        assert len({*zip(indices.ravel().tolist(), signs.ravel().tolist(), strict=True)}) == len(
            every
        )
        assert indices.max() < 16
    assert reference.Tl1.bits / reference.Tl1.weights == 2
    assert reference.Tl2.bits / reference.Tl2.weights == 5 / 3
    with pytest.raises(ValueError, match="-1, 0 and 1 alone"):
        reference.look_up_linear(np.ones((1, 3), np.int8), np.full((1, 3), 2, np.int8), FORMS[0])


@pytest.mark.parametrize("tokens", range(1, 18))
def test_vector_look_ups_are_the_product(tokens: int) -> None:
    """Vec-LUT: one index adds a vector over all tokens; int16 sums never leave their range."""
    rng = np.random.default_rng(tokens)
    weight = trits(7, 1031 if tokens in (1, 17) else 131)
    x = rng.integers(-127, 128, (tokens, weight.shape[1])).astype(np.int8)
    x[0] = np.where(weight[0] == 0, 127, 127 * weight[0])  # the largest sum that there is
    product = x.astype(np.int64) @ weight.T.astype(np.int64)
    for weights in (3, 4, 5):
        assert np.array_equal(reference.vector_look_up_linear(x, weight, weights), product)
    assert np.array_equal(reference.look_up_linear(x, weight, reference.Tl2), product)


BACKENDS = ["triton", "cpu", "reference"]


@pytest.mark.parametrize("text", ["ternary", "ternary-1.6"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_give_the_integers_of_the_look_ups(text: str, backend: str) -> None:
    """int32 sums bit for bit; one trit that is another must show."""
    for rows, columns in ((37, 501), (16, 63)):
        weight, codec = trits(rows, columns), Codec.parse(text)
        x = np.random.default_rng(1).integers(-127, 128, (5, columns)).astype(np.int8)
        x[:, 0] = 127
        looked_up = reference.look_up_linear(x, weight, reference.Tl2)
        assert np.array_equal(exact_linear(x, packed(weight, codec), backend), looked_up)
        weight[5, 7] = -1 if weight[5, 7] == 1 else weight[5, 7] + 1
        x[2, 7] = 1
        assert not np.array_equal(exact_linear(x, packed(weight, codec), backend), looked_up)


@pytest.mark.parametrize("text", ["ternary", "ternary-1.6-g160-s32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tequila(text: str, backend: str) -> None:
    """x = 0 gives C exactly; the integer part is the plain ternary one; zeros alone make C."""
    weight = torch.randn(37, 330, generator=torch.Generator().manual_seed(3))
    packed_weight, bias = lath.tequila(weight, text, strength=0.25)
    plain = lath.quantize(weight, text)
    assert packed_weight.digest() == plain.digest()
    codes = plain.unpack_codes().numpy()
    expected = reference.tequila_bias(weight.numpy(), codes, 0.25)
    assert 0.2 < float((codes == 1).mean()) < 0.5
    # The sums are float64 on both sides, in another order, and rounded once to fp32.
    slack = 2.0**-24 * np.abs(expected) + 2.0**-40
    assert (np.abs(bias.double().numpy() - expected) <= slack).all()
    nothing = torch.zeros(3, 330)
    for activations in ("float", "int8"):

        def run(
            x: torch.Tensor, offsets: torch.Tensor | None, how: str = activations
        ) -> torch.Tensor:
            return lath.linear(x, packed_weight, offsets, activations=how, backend=backend)

        assert torch.equal(run(nothing, bias), bias.expand(3, 37))
        x = torch.randn(3, 330, generator=torch.Generator().manual_seed(4))
        with_bias, without = run(x, bias), run(x, None)
        error = (with_bias.double() - without.double() - bias.double()).abs()
        assert bool((error <= 2.0**-23 * (without.abs() + bias.abs())).all())
        assert not torch.equal(with_bias, without)
    wrong = codes.copy()
    wrong[5, 7] = 2 if wrong[5, 7] == 1 else 1
    moved = reference.tequila_bias(weight.numpy(), wrong, 0.25)
    assert np.flatnonzero(np.abs(moved - expected) > slack).tolist() == [5]


def test_tequila_refuses() -> None:
    weight = torch.ones(4, 32)
    with pytest.raises(ValueError, match="codec of tequila must be a ternary one, got 'int2'"):
        lath.tequila(weight, "int2")
    with pytest.raises(ValueError, match="strength must be finite"):
        lath.tequila(weight, strength=float("nan"))
    weight[1, 1] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        lath.tequila(weight)


def check_trit_view(tokens: int, rows: int, columns: int, group: int | None) -> None:
    """The records of five codes a byte, whatever the instruction set: the integers are exact."""
    codec = replace(BASE3, group=group)
    weight = trits(rows, columns)
    size = view_group(columns, codec, ActivationFormat("int8"), 80)
    view = build_view(packed(weight, codec), size, Record(2, "none", True, "trits"))
    assert view.panel_bytes == view.groups * (size * 16 // 5 + 32)
    layer = cpu.CpuLinear(view, "int8", ActivationFormat("int8"))
    x = np.random.default_rng(tokens).integers(-127, 128, (tokens, columns)).astype(np.float32)
    x[:, 0] = 127
    expected = x.astype(np.int64) @ weight.T.astype(np.int64)
    assert np.array_equal(layer(torch.from_numpy(x)).numpy(), expected), (tokens, rows, columns)


@pytest.mark.parametrize("tokens", [1, 2, 4, 9, 33])
def test_records_of_five_codes_a_byte(tokens: int) -> None:
    if tokens == 1:  # sums longer than int32 lasts for are cut, into whole vectors again
        for group in (None, 81920):
            codec = replace(BASE3, group=group)
            assert view_group(90000, codec, ActivationFormat("int8"), 80) % 80 == 0
        check_trit_view(1, 3, 70000, None)
    for rows, columns, group in ((37, 501, None), (16, 80, None), (83, 11000, None), (20, 170, 80)):
        check_trit_view(tokens, rows, columns, group)


def look_up_layer(weight: NDArray[np.int8], bias: torch.Tensor | None = None) -> cpu.CpuLinear:
    """The layer by look-ups, on an instruction set that would not need them too."""
    whole = packed(weight, Codec.parse("ternary"))
    view = build_view(whole, packing.round_up(weight.shape[1], 16), Record(2, "none", True))
    return cpu.CpuLinear(view, "int8", ActivationFormat("int8"), bias, looks_up=True)


@pytest.mark.parametrize("columns", [1, 37, 256, 300, 2600])
def test_look_ups_on_a_cpu(columns: int) -> None:
    """1 to 17 tokens and more: scalar look-ups, vector look-ups and products are one integer."""
    weight = trits(83, columns)
    weight[7], weight[9] = 1, -1
    layer = look_up_layer(weight, torch.arange(83))
    rng = np.random.default_rng(columns)
    for tokens in (*range(1, 18), 25, 33, 64) if columns == 300 else (8, 16, 20, 31):
        x = rng.integers(-127, 128, (tokens, columns)).astype(np.int8)
        x[0] = x[:, 0] = 127  # the largest sums of rows 7 and 9
        exact = reference.vector_look_up_linear(x, weight)
        assert np.array_equal(exact, reference.look_up_linear(x, weight, reference.Tl1))
        y = layer(torch.from_numpy(x.astype(np.float32)))
        assert np.array_equal(y.numpy(), exact + np.arange(83)), (tokens, columns)
    indices = 6 * 16 * 8 * -(-columns // 32) + 4 * 8  # and those of four rows, read ahead
    assert layer.nbytes == indices + 4 * 6 * 16
    weight[5, columns // 2] = 1 if weight[5, columns // 2] < 1 else 0
    wrong = look_up_layer(weight, torch.arange(83))(torch.from_numpy(x.astype(np.float32)))
    differs = (wrong != y).any(dim=0)
    assert differs.nonzero().tolist() == [[5]]


def test_look_ups_round_as_products_do() -> None:
    """Every dtype, any scales, threads, a token with NaN: the bits of the kernel of products."""
    weight = lath.quantize(torch.randn(1100, 290), "ternary")
    products = cpu.prepare(weight, torch.randn(1100), ActivationFormat("int8"))
    view = build_view(weight, 304, Record(2, "none", True))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        bias = torch.randn(1100)
        by_look_up = cpu.CpuLinear(view, "int8", ActivationFormat("int8"), None, looks_up=True)
        x = torch.randn(49, 290).to(dtype)
        x[3, 5] = torch.nan
        expected = products(x, bias)
        if products._looks_up:
            expected = torch.cat([products(row[None], bias) for row in x])
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                y = by_look_up(x, bias)
                assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7)), (dtype, threads)
        finally:
            torch.set_num_threads(1)


def test_look_ups_that_are_none_are_refused() -> None:
    view = build_view(packed(trits(16, 160), Codec.parse("ternary-g80")), 80,
                      Record(2, "none", True))  # fmt: skip
    with pytest.raises(ValueError, match="has no look-ups"):
        cpu.CpuLinear(view, "int8", ActivationFormat("int8"), None, looks_up=True)


def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the check at first use: rows that change places must not pass."""
    honest = lanes.transpose
    monkeypatch.setattr(
        lanes, "transpose", lambda e, rows: honest(e, [rows[1], rows[0], *rows[2:]])
    )
    monkeypatch.setattr("lath.kernels.simd.compile.callback", numba.cfunc)
    monkeypatch.setattr(cpu_kernels, "compile_kernel", compile_kernel.__wrapped__)
    with pytest.raises(RuntimeError, match="look-up gave wrong numbers"):
        cpu_kernels._check_look_up.__wrapped__(emitter.FP32)


@pytest.mark.parametrize("name", LOWERINGS)
def test_other_instruction_sets(name: str) -> None:
    """`lath.linear` looks up where there is no VNNI; five codes a byte are taken apart too."""
    run_lowered(
        name,
        """
        import torch; torch.set_num_threads(1)
        from test_ternary import check_planned_look_up, check_trit_view
        for text in ("ternary", "ternary-1.6"):
            check_planned_look_up(text)
        for tokens in (1, 9):
            check_trit_view(tokens, 37, 501, None)
        """,
    )


def check_planned_look_up(text: str) -> None:
    weight, x = trits(37, 501), np.ones((20, 501), np.int8)
    x[:] = np.random.default_rng(2).integers(-127, 128, x.shape)
    x[:, 0] = 127
    x = np.concatenate([x, x[::-1]])
    least = plan_cpu.LOOK_UP_TOKENS[isa.host_isa()]
    for tokens in (1, 2, least - 1, least, 16, 17, 20, 21, 32, 40):
        plan = lath.plan(tokens, 37, 501, text, torch.float32, "cpu", "int8")
        few = "gemv" if tokens == 1 else "tiled"
        assert plan.dataflow == ("look_up" if tokens >= least else few)
        exact = reference.look_up_linear(x[:tokens], weight, reference.Tl2)
        assert np.array_equal(
            exact_linear(x[:tokens], packed(weight, Codec.parse(text)), "cpu"), exact
        )


def test_the_plan_says_when_it_looks_up() -> None:
    def dataflow(m: int, text: str, device: str, activations: str = "int8") -> str:
        return lath.plan(m, 64, 2560, text, torch.float32, device, activations).dataflow

    for device, least, few in (("avx2", 5, "tiled"), ("portable", 2, "gemv")):
        for text in ("ternary", "ternary-1.6-s32"):
            assert dataflow(least, text, device) == "look_up"
            assert dataflow(least - 1, text, device) == few
            assert dataflow(16, text, device, "float") == "tiled"
            assert dataflow(16, text, device, "int8-g64") == "tiled"
        assert dataflow(16, "ternary-g64", device) == "tiled"
        assert dataflow(16, "int2", device) == "tiled"
    assert dataflow(16, "ternary", "avx512_vnni") == "tiled"
    long = lath.plan(16, 16, 65537, "ternary", torch.float32, "avx2", "int8")
    assert long.dataflow == "tiled"  # its sums are cut into groups
    plan = lath.plan(32, 64, 2560, "ternary", torch.float32, "avx2", "int8")
    assert "no VNNI" in plan.reason
    assert "(fewer than 5 that are left: products)" in plan.reason
    assert (plan.block_m, plan.block_n) == (16, 16)
