"""The compiled CPU kernels over sparse weights: expansion, parity, other instruction sets."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from cases_sparse import definition, make_inputs, make_weight
from llvmlite import ir
from test_cpu_processes import LOWERINGS, run_lowered

import lath
import oracle
from cases import LinearCase
from lath.formats.activations import ActivationFormat
from lath.formats.sparse import SparseCodec, SparseTensor
from lath.kernels.linear import cpu, cpu_kernels, cpu_streams
from lath.kernels.linear.cpu_record import Record
from lath.kernels.linear.cpu_sparse import sparse_view
from lath.kernels.simd import emitter, host_isa
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.expand import expand

TOKENS = (1, 2, 5, 8, 9, 33)
# One in a row: kinds of numbers, groups, tails, dtypes of x; activations alike and unlike them.
CATALOGUE = [
    "sparse50-int8 {m} 53 300 fp32 int8 normal True",
    "sparse50-int8-g64 {m} 37 300 bf16 int8-g64 one_sign False",
    "sparse80-int8-g48-s32 {m} 20 130 fp16 int8-g32 normal True",
    "sparse70-int4-g64 {m} 33 200 bf16 int8-g64 normal False",
    "sparse0-int8 {m} 16 128 fp32 float one_sign True",
    "sparse100-int4 {m} 21 140 fp32 int8 normal True",
    "sparse50-fp16 {m} 37 300 fp16 float normal True",
    "sparse60-bf16 {m} 53 290 bf16 float one_sign False",
    "sparse50-fp16 {m} 20 200 fp32 int8-g64 normal False",
]


@pytest.fixture(autouse=True)
def one_thread():  # type: ignore[no-untyped-def]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ratio_of(case: LinearCase) -> float:
    inputs, weight = make_inputs(case)
    y64, gauge = definition(inputs.x, weight, inputs.bias, case.activations)
    fmt = ActivationFormat.parse(case.activations)
    y = cpu.linear(inputs.x, weight, inputs.bias, fmt)
    assert y.dtype == inputs.x.dtype
    # Activations that are rounded to int8 and multiplied as fp32 numbers are rounded once more.
    bound = oracle.linear_bound(y64, gauge, case.k + 1, inputs.x.dtype)
    return oracle.test_ratio(y, y64, bound)


def check(text: str) -> None:
    assert ratio_of(LinearCase.parse(text)) <= 1, text


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("text", CATALOGUE)
def test_parity(text: str, m: int) -> None:
    check(text.format(m=m))


def emit_expand(e: Any, begin: Any, end: Any, arguments: Any, bits: int) -> None:
    """Masks at `begin`, numbers at `end`, vectors at `arguments`: 64 of each."""
    filler = e.constant(0x01010101 * 7 if bits == 64 else 0)
    at = e.variable(end)
    with e.loop(e.integer(64)) as i:
        mask = e.load(e.offset(begin, i, 8), ir.IntType(bits))
        e.store(e.offset(arguments, i, 64), expand(e, mask, at.value, filler))
        at.value = e.add(at.value, 3)  # loads begin at any byte


@pytest.mark.parametrize("bits", [64, 32])
def test_expansion(bits: int) -> None:
    """Every count of bits; what lies under none is the filler."""
    rng = np.random.default_rng(bits)
    items = np.uint8 if bits == 64 else np.uint16
    flags = rng.random((64, bits)) * 63 < np.arange(64)[:, None]
    flags[0], flags[-1] = False, True
    masks = np.zeros((64, 8), np.uint8)
    masks[:, : bits // 8] = np.packbits(flags, axis=1, bitorder="little")
    memory = rng.integers(0, 256, 3 * 64 + 128, dtype=np.uint8)
    found = np.zeros((64, bits), items)
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(compile_kernel(emit_expand, bits).address)
    run(masks.ctypes.data, memory.ctypes.data, found.ctypes.data)
    for i, row in enumerate(flags):
        expected = np.full(bits, 7 if bits == 64 else 0, items)
        size = int(row.sum()) * items().itemsize
        expected[row] = memory[3 * i : 3 * i + size].copy().view(items)
        assert np.array_equal(found[i], expected), i


@pytest.mark.parametrize("share", [0, 50, 80, 100])
@pytest.mark.parametrize("m", [1, 8, 11])
def test_integers_are_exact(share: int, m: int) -> None:
    """Activations that are their own codes, scales that are powers of two; an empty tile."""
    rng = np.random.default_rng(share)
    weight = make_weight(f"sparse{share}-int8-g64", 50, 320, rng, "integers")
    x = torch.from_numpy(rng.integers(-127, 128, (m, 320)).astype(np.float32))
    x[:, ::64] = 127
    y64, _ = definition(x, weight, None, "int8-g64")
    out = torch.full((m, 50), torch.nan)
    assert cpu.linear(x.half(), weight, None, ActivationFormat("int8", 64), out=out) is out
    assert torch.equal(out.double(), torch.from_numpy(y64))
    dense = lath.quantize(weight.dequantize(), "sparse0-bf16")
    floats = cpu.linear(x, dense, None, ActivationFormat())
    exact = x.double() @ dense.dequantize().double().T
    assert torch.equal(floats.double(), exact)


@pytest.mark.parametrize("text", ["sparse50-int8", "sparse50-int8-g64", "sparse50-fp16"])
def test_results_do_not_depend_on_threads(text: str) -> None:
    """Threads expand panels in memory of their own."""
    weight = lath.quantize(torch.randn(700, 256), text)
    for tokens in (1, 30):
        x = torch.randn(tokens, 256)
        for activations in ("int8", "float"):
            fmt = ActivationFormat.parse(activations)
            one = cpu.linear(x, weight, None, fmt)
            torch.set_num_threads(2)
            two = cpu.linear(x, weight, None, fmt)
            torch.set_num_threads(1)
            assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["codes", "bitmap", "scales"])
@pytest.mark.parametrize("m", [1, 9])
def test_one_wrong_number_is_seen(name: str, m: int) -> None:
    weight = make_weight("sparse50-int8", 32, 256, np.random.default_rng(8))
    x = torch.rand(m, 256) + 0.5
    for activations in ("float", "int8"):
        y64, gauge = definition(x, weight, None, activations)
        bound = oracle.linear_bound(y64, gauge, 257, torch.float32)
        changed = weight.tensors[name].clone()
        if name == "codes":
            changed[77] = -changed[77] if abs(int(changed[77])) > 20 else 100
        elif name == "bitmap":  # a bit of a full tile: all numbers behind it move up by one
            changed[0, 1, 5, 1] ^= 1 << 30
        else:
            changed[0, 5] *= 1.25
        tensors = {**weight.tensors, name: changed}
        if name == "bitmap":  # as many codes as bits, or the view is not built
            tensors["codes"], tensors["offsets"] = weight.codes[:-1].clone(), weight.offsets.clone()
            tensors["offsets"][2:] -= 1
        wrong = SparseTensor.from_tensors(weight.codec, weight.shape, tensors)
        y = cpu.linear(x, wrong, None, ActivationFormat.parse(activations))
        assert oracle.test_ratio(y, y64, bound) > 1, activations
        right = cpu.linear(x, weight, None, ActivationFormat.parse(activations))
        assert oracle.test_ratio(right, y64, bound) <= 1


def test_codes_that_do_not_match_the_bitmap_are_refused() -> None:
    weight = make_weight("sparse50-int8", 32, 256, np.random.default_rng(9))
    weight.codes = weight.codes[:-3]
    with pytest.raises(ValueError, match="codes of a sparse50-int8 with"):
        cpu.linear(torch.zeros(1, 256), weight, None, ActivationFormat())


@pytest.mark.parametrize("kind", ["int8", "float"])
def test_a_wrong_kernel_is_refused(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the check at first use: bytes that change places must not pass."""
    import numba

    def wrong(e, mask, source, filler):  # type: ignore[no-untyped-def]
        value = expand(e, mask, source, filler)
        return e.shuffle(value, value, [1, 0, *range(2, 16)])

    monkeypatch.setattr(cpu_streams, "expand", wrong)
    monkeypatch.setattr("lath.kernels.simd.compile.callback", numba.cfunc)
    monkeypatch.setattr(cpu_kernels, "compile_kernel", compile_kernel.__wrapped__)
    record = Record(8, "none", True, sparse=True)
    with pytest.raises(RuntimeError, match=f"{kind} .*{host_isa()}"):
        cpu_kernels._check.__wrapped__(kind, record, emitter.FP32, (4, 1))


@pytest.mark.parametrize("name", LOWERINGS)
def test_other_instruction_sets(name: str) -> None:
    run_lowered(
        name,
        """
        import torch; torch.set_num_threads(1)
        from test_cpu_sparse import check
        for text in ("sparse50-int8-g64 {m} 37 201 bf16 int8-g64 normal True",
                     "sparse70-int4 {m} 20 130 fp32 int8 normal False",
                     "sparse50-int8 {m} 20 130 fp16 float normal False",
                     "sparse50-fp16 {m} 33 150 fp32 float normal True",
                     "sparse50-bf16 {m} 33 150 fp16 int8 normal True"):
            for m in (1, 9):
                check(text.format(m=m))
        """,
    )


@pytest.mark.parametrize("text", ["sparse50-int8", "sparse100-int4-g64", "sparse50-bf16"])
def test_small_and_empty_weights(text: str) -> None:
    for rows, columns in ((0, 64), (16, 0), (1, 1), (3, 17)):
        weight = lath.quantize(torch.ones(rows, columns), text)
        for activations in ("float", "int8"):
            y = lath.linear(torch.ones(2, columns), weight, activations=activations, backend="cpu")
            assert y.shape == (2, rows)
            assert torch.equal(y, torch.ones(2, columns) @ weight.dequantize().T)


def test_the_view_holds_what_is_kept() -> None:
    """A bit for each weight, its numbers, scales: 80 % zeros cost a third of the dense view."""
    weight, dense = (lath.quantize(torch.randn(64, 512), t) for t in ("sparse80-int8", "int8"))
    fmt = ActivationFormat("int8")
    view = sparse_view(weight, fmt)
    kept = int((weight.numbers() != 0).sum())
    assert view.nbytes == 64 * 512 // 8 + kept + 4 * 32 + 64 + 8 * 4
    cpu.linear(torch.zeros(1, 512), dense, None, fmt)
    assert view.nbytes < 0.35 * dense.view_nbytes
    plan = lath.plan(1, 64, 512, "sparse80-int8", device="avx512_vnni", activations="int8")
    assert "in registers" in plan.reason
    plan = lath.plan(64, 64, 512, "sparse80-int8", device="avx512_vnni", activations="int8")
    assert "once for all tokens" in plan.reason
    assert isinstance(weight.codec, SparseCodec)
