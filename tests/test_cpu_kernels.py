"""The compiled CPU kernels: exact integers, derived bounds, rows apart, threads."""

from __future__ import annotations

import sys
import threading

import numba
import numpy as np
import pytest
import torch
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

import cases
import lath
import oracle
from cases import LinearCase
from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.qtensor import QTensor
from lath.kernels.linear import cpu, cpu_kernels
from lath.kernels.linear.cpu_activations import emit_quantize
from lath.kernels.linear.cpu_launch import argument_block
from lath.kernels.linear.cpu_record import Record
from lath.kernels.linear.cpu_view import view_group
from lath.kernels.simd import emitter, host_isa
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.threads import torch_team
from lath.reference.linear import quantize_activations

TOKENS = (1, 2, 3, 5, 8, 9, 17)
DTYPES = ("fp32", "bf16", "fp16")


def catalogue() -> list[LinearCase]:
    """Every width and zero with groups, token counts, dtypes and formats in turn: each value of one
    meets many of the others, without the product of all."""
    groups = ("-g16", "-g32", "-g48", "-g64", "-g96", "-g128", "")
    formats = ("int8", "float", "int8-g32", "int8-g128", "int8-g48")
    found = []
    for bits in range(1, 9):
        for index, zero in enumerate(("", "-asym", "-fzero")):
            for turn in range(2):
                n = 7 * bits + 5 * index + 3 * turn
                text = f"int{bits}{groups[n % 7]}{zero}{'-s32' if n % 4 == 0 else ''}"
                data = "one_sign" if n % 3 == 0 else "normal"
                found.append(
                    LinearCase(
                        text, TOKENS[(n + turn) % 7], 17 + 13 * (n % 5), 129 + 37 * (n % 7),
                        DTYPES[n % 3], formats[(n + bits) % 5], data, bool(n % 2),
                    )
                )  # fmt: skip
    return found


def check(case: LinearCase) -> None:
    data = cases.make(case)
    layer = cpu.prepare(data.weight, data.bias, ActivationFormat.parse(case.activations))
    y = layer(data.x)
    assert y.dtype == case.torch_dtype
    bound = oracle.linear_bound(data.y64, data.gauge, case.k, case.torch_dtype)
    ratio = oracle.test_ratio(y, data.y64, bound)
    assert ratio <= 1, f"LinearCase.parse({str(case)!r}): {oracle.worst(y, data.y64, bound)}"


@pytest.mark.parametrize("case", catalogue(), ids=str)
def test_bounds(case: LinearCase) -> None:
    check(case)


@pytest.mark.parametrize("activations", ["float", "int8", "int8-g32"])
@pytest.mark.parametrize("m", [0, *TOKENS, 40])
def test_every_tile_height(m: int, activations: str) -> None:
    check(LinearCase("int4-g64", m, 83, 201, "fp32", activations, "normal", True))


@pytest.mark.parametrize("zero", ["", "-asym", "-fzero"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_small_integers_are_exact(bits: int, zero: str) -> None:
    """Power-of-two scales and activations of scale 1: nothing rounds, so nothing may differ."""
    rng = np.random.default_rng(bits)
    for m in (1, 3, 9):
        weight = cases.make_weight(f"int{bits}-g48{zero}", 41, 150, rng, "integers")
        x = rng.integers(-4, 5, (m, 150)).astype(np.float32)
        for activations in ("float", "int8", "int8-g16"):
            values = x.copy()
            if activations != "float":
                values[:, ::16] = 127
            y64, _ = cases.definition(torch.from_numpy(values), weight, None, activations)
            y = cpu.linear(
                torch.from_numpy(values), weight, None, ActivationFormat.parse(activations)
            )
            assert np.array_equal(y.double().numpy(), y64), (m, activations)


@pytest.mark.parametrize("kind", list(cpu_kernels.FLOAT_KINDS), ids=str)
@pytest.mark.parametrize(("columns", "group"), [(1, None), (77, None), (300, 48), (256, 64)])
def test_activation_codes_are_those_of_the_definition(
    kind: torch.dtype, columns: int, group: int | None
) -> None:
    """Bit for bit, over ordinary, tiny, huge, halfway and non-finite values."""
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((11, columns)).astype(np.float32)
    x[1] *= 1e-35
    x[2] = 0
    x[3] *= 2.0**-101
    x[4] = np.arange(columns) % 255 / 2 - 63.5
    x[5, -1], x[6, 0], x[7, columns // 2] = np.nan, np.inf, -np.inf
    x[8] *= 1e30
    x[9] = 2.0**-100
    tensor = torch.from_numpy(x).to(kind)
    got_codes, got_scales = run_quantize(tensor, group)
    with np.errstate(over="ignore", invalid="ignore"):
        codes, scales = quantize_activations(
            tensor.float().numpy(), ActivationFormat("int8", group)
        )
    assert np.array_equal(got_codes, codes)
    assert np.array_equal(got_scales, scales, equal_nan=True)


def run_quantize(
    x: torch.Tensor, group: int | None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes [M, K] and scales [M, groups] of the compiled kernel, one token per tile."""
    tokens, columns = x.shape
    size = group or -(-columns // 16) * 16
    groups = -(-columns // size)
    codes = np.full((tokens, groups * size), 99, np.int8)
    scales, sums = np.zeros((tokens, groups), np.float32), np.zeros((tokens, groups), np.int32)
    block = argument_block(
        columns=columns, groups=groups, group=size, shared=size, largest=127, tile=1, item=1,
        tokens=tokens,
        x=x.data_ptr(), x_stride=columns * x.element_size(), codes=codes.ctypes.data,
        scales=scales.ctypes.data, sums=sums.ctypes.data,
    )  # fmt: skip
    kernel = compile_kernel(emit_quantize, cpu_kernels.FLOAT_KINDS[x.dtype])
    kernel.ctypes(0, tokens, block.ctypes.data)
    totals = codes.reshape(tokens, groups, size).sum(axis=2, dtype=np.int32)
    assert np.array_equal(totals, sums)
    assert not codes[:, columns:].any()
    return codes[:, :columns], scales


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [65536, 70000])
def test_long_rows_do_not_overflow(bits: int, columns: int) -> None:
    """The largest code times the largest activation, a whole row long, one scale."""
    codec = Codec(bits, None, "integer", "fp32")
    weight = QTensor.empty(codec, (16, columns), device="cpu")
    weight.codes.fill_(-1)
    weight.scales.fill_(1.0)
    assert weight.zeros is not None
    weight.zeros.zero_()
    for m in (1, 3):
        y = cpu.linear(torch.ones(m, columns), weight, None, ActivationFormat("int8"))
        expected = (2**bits - 1) * columns
        assert float((y / expected - 1).abs().max()) < 2**-20


def test_groups_of_a_view() -> None:
    def group(columns: int, text: str, activations: str) -> int:
        return view_group(columns, Codec.parse(text), ActivationFormat.parse(activations))

    assert group(256, "int4-g64", "int8") == 64
    assert group(256, "int4-g64", "int8-g128") == 64
    assert group(256, "int4-g128", "int8-g48") == 16
    assert group(100, "int4", "int8") == 112
    assert group(100, "int4-g128", "int8-g32") == 32
    assert group(131072, "int8", "int8") == 65536
    assert group(0, "int8", "float") == 16


def test_identity_gives_every_code() -> None:
    for bits in range(1, 9):
        for zero in ("", "-asym", "-fzero"):
            weight = cases.make_weight(
                f"int{bits}-g32{zero}", 50, 75, np.random.default_rng(bits), "integers"
            )
            y = cpu.linear(torch.eye(75), weight, None, ActivationFormat())
            assert torch.equal(y.T, weight.dequantize()), (bits, zero)


@intrinsic
def convert_halves(typing_context, halves, floats, count):  # type: ignore[no-untyped-def]
    """fp16 at `halves` → fp32 at `floats` → fp16 at `halves`, sixteen at a time, in integers."""

    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        e = emitter.Emitter(builder, "portable", native_half=False)
        source, target, count = values
        with e.loop(count) as i:
            wide = e.load_floats(e.offset(source, i, 32), emitter.FP16)
            e.store(e.offset(target, i, 64), wide)
        with e.loop(count) as i:
            value = e.load(e.offset(target, i, 64), emitter.FLOATS)
            e.store(e.offset(source, i, 32), e.round_floats(value, emitter.FP16))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


def test_half_conversions_without_instructions() -> None:
    """All 65536 values of fp16 to fp32 and back."""
    halves = np.arange(65536, dtype=np.uint16)
    expected = halves.view(np.float16).astype(np.float32)
    floats = np.zeros(65536, np.float32)
    numba.njit(lambda a, b, n: convert_halves(a, b, n))(
        halves.ctypes.data, floats.ctypes.data, 4096
    )
    assert np.array_equal(floats, expected, equal_nan=True)
    assert np.array_equal(np.signbit(floats), np.signbit(expected))
    with np.errstate(over="ignore"):
        back = expected.astype(np.float16)
    assert np.array_equal(halves.view(np.float16), back, equal_nan=True)


def test_the_view_is_built_once_and_follows_the_weight() -> None:
    weight = lath.quantize(torch.randn(20, 64), "int4-g32")
    x = torch.randn(1, 64)
    first = cpu.linear(x, weight, None, ActivationFormat("int8"))
    views = [cpu.prepare(weight, None, ActivationFormat("int8", 64))._view for _ in range(2)]
    assert views[0] is views[1]
    weight.scales.mul_(2)
    assert torch.equal(cpu.linear(x, weight, None, ActivationFormat("int8")), 2 * first)


def test_rows_do_not_meet() -> None:
    """NaN or infinity in one token changes no other, whatever tile they share."""
    weight = lath.quantize(torch.randn(50, 160), "int4-g32")
    for m in (2, 5, 9):
        for activations in ("float", "int8", "int8-g32"):
            layer = cpu.prepare(weight, torch.randn(50), ActivationFormat.parse(activations))
            x = torch.randn(m, 160)
            clean = layer(x)
            x[1, 7] = float("nan")
            y = layer(x)
            assert bool(y[1].isnan().all())
            keep = [row for row in range(m) if row != 1]
            assert torch.equal(y[keep], clean[keep])


@pytest.mark.parametrize(
    "codec",
    ["int4", "int4-g128", "int8-g128", "int2-g16", "int3-g32-fzero", "int6-g48-asym",
     "int4-g128-s8", "mxfp4", "int8-g64-nested", "sparse50-int8-g64"],
)  # fmt: skip
def test_a_token_does_not_depend_on_the_others(codec: str) -> None:
    """Bit for bit, whichever register tile it shares: groups, panels and tiles are not whole."""
    generator = torch.Generator().manual_seed(0)
    weight = lath.quantize(torch.randn(115, 200, generator=generator), codec)
    formats = ("int8", f"int8-g{weight.codec.group}") if weight.codec.group else ("int8",)
    x = torch.randn(130, 200, generator=generator)
    for activations in formats:
        layer = cpu.prepare(weight, None, ActivationFormat.parse(activations))  # type: ignore[arg-type]
        alone = torch.cat([layer(token[None]) for token in x])
        for m in (*range(2, 18), 63, 64, 65, 127, 128, 129, 130):
            assert torch.equal(layer(x[:m]), alone[:m]), (activations, m)


def test_results_do_not_depend_on_threads() -> None:
    """Also with several Python threads in the same layer at once."""
    weight = cases.make_weight("int4-g64", 1040, 1088, np.random.default_rng(0), "normal")
    inputs = [torch.randn(m, 1088).bfloat16() for m in (1, 7, 20)]
    for activations in ("int8-g64", "float"):
        layer = cpu.prepare(weight, None, ActivationFormat.parse(activations))
        single = [layer(x) for x in inputs]
        wrong: list[int] = []

        def work(layer=layer, single=single, wrong=wrong) -> None:  # type: ignore[no-untyped-def]
            torch.set_num_threads(2)
            for _ in range(20):
                wrong.extend(
                    x.shape[0]
                    for x, y in zip(inputs, single, strict=True)
                    if not torch.equal(layer(x), y)
                )

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, (activations, wrong)
    assert torch.get_num_threads() == 1
    assert torch_team() is not None or not sys.platform.startswith("linux")


def test_shapes_and_refusals() -> None:
    weight = lath.quantize(torch.randn(20, 64), "int4-g32")
    layer = cpu.prepare(weight, torch.ones(20), ActivationFormat("int8"))
    assert layer(torch.randn(2, 3, 64)).shape == (2, 3, 20)
    assert layer(torch.randn(64)).shape == (20,)
    x = torch.randn(1, 64)
    assert torch.equal(
        layer(x, torch.zeros(20)), cpu.prepare(weight, None, ActivationFormat("int8"))(x)
    )
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 64\]"):
        layer(torch.randn(2, 63))
    with pytest.raises(TypeError, match="float64"):
        layer(torch.randn(2, 64).double())
    with pytest.raises(ValueError, match="weight must be on the CPU"):
        cpu.prepare(QTensor.empty(weight.codec, weight.shape), None)


def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the check at first use: a code that is off by one must not pass."""
    honest = emitter.Emitter.fields

    def wrong(e, word, width):  # type: ignore[no-untyped-def]
        return [e.builder.or_(field, e.constant(1)) for field in honest(e, word, width)]

    monkeypatch.setattr(emitter.Emitter, "fields", wrong)
    # Compiled anew and not kept: neither this process nor the disk may see it again.
    monkeypatch.setattr("lath.kernels.simd.compile.callback", numba.cfunc)
    monkeypatch.setattr(cpu_kernels, "compile_kernel", compile_kernel.__wrapped__)
    with pytest.raises(RuntimeError, match=f"int8 .*tile=.*{host_isa()}"):
        cpu_kernels._check.__wrapped__("int8", Record(4, "none", True), emitter.FP32, (8, 3))


def test_warmup_tells_its_steps() -> None:
    steps: list[str] = []
    cpu.warmup(["int4-g64", Codec(2)], steps.append, activations=["int8"], dtypes=[torch.float32])
    assert len(steps) == 2
    assert "int4-g64" in steps[0]
    assert "int2" in steps[1]
