"""Ternary weights by look-up in registers (cpu_triplets.py), where the machine has AVX512."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_ternary import BASE3, packed, trits

import lath
from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.kernels.linear import cpu, cpu_kernels, cpu_restore, cpu_views, plan_cpu
from lath.kernels.linear.cpu_record import Record
from lath.kernels.linear.cpu_triplet_view import TripletView, build_triplets, codes_of, places
from lath.kernels.linear.cpu_view import build_view
from lath.kernels.simd import emitter, isa, lanes
from lath.kernels.simd.compile import compile_kernel
from lath.reference import ternary as reference
from lath.verbs.planning import describe_device

INT8 = ActivationFormat("int8")
needs_permutation = pytest.mark.skipif(
    isa.host_isa() != "avx512_vnni", reason="needs AVX512: vpermw looks up 32 numbers of 16 bits"
)


def view_of(weight: NDArray[np.int8], codec: Codec = BASE3) -> TripletView:
    return build_triplets(packed(weight, codec), Record(2, "none", True, "triplets"))


def layer_of(weight: NDArray[np.int8], bias: torch.Tensor | None = None) -> cpu.CpuLinear:
    return cpu.CpuLinear(view_of(weight), "int8", INT8, bias)


def test_every_index_has_a_place_of_its_own() -> None:
    """An entry is item 2e of a vector, or 2e - 31: what two halves of a table give interleaved."""
    entries = np.arange(32)
    interleaved = np.stack([entries[:16], entries[16:]], axis=1).reshape(-1)
    assert interleaved[places()].tolist() == list(range(27))


@pytest.mark.parametrize("codec", ["ternary", "ternary-1.6"])
@pytest.mark.parametrize("shape", [(1, 1), (16, 9), (17, 252), (83, 253), (48, 1009), (5, 300)])
def test_the_codes_come_back(shape: tuple[int, int], codec: str) -> None:
    weight = trits(*shape)
    view = view_of(weight, Codec.parse(codec))
    words, pairs = -(-shape[1] // 9), -(-shape[0] // 32)
    assert view.records.nbytes == words * pairs * 64
    whole = codes_of(view, 0, view.panels)
    assert np.array_equal(whole[: shape[0]].astype(np.int8) - 1, weight)
    for first in range(view.panels):  # from the middle of a pair too
        part = codes_of(view, first, view.panels)
        assert np.array_equal(part, whole[16 * first :])


@needs_permutation
@pytest.mark.parametrize("columns", [1, 37, 252, 253, 300, 1008, 1009, 2600])
def test_every_form_of_look_up_is_one_integer(columns: int) -> None:
    """1 to 9 tokens and more; whole runs, parts of one, several runs; rows of all 1 and all -1,
    whose sums are the largest there are."""
    weight = trits(83, columns)
    weight[7], weight[9] = 1, -1
    layer = layer_of(weight, torch.arange(83))
    rng = np.random.default_rng(columns)
    for tokens in (*range(1, 10), 17) if columns == 300 else (1, 2, 5):
        x = rng.integers(-127, 128, (tokens, columns)).astype(np.int8)
        x[0] = x[:, 0] = 127
        exact = reference.vector_look_up_linear(x, weight)
        assert np.array_equal(exact, reference.look_up_linear(x, weight, reference.Tl2))
        y = layer(torch.from_numpy(x.astype(np.float32)))
        assert np.array_equal(y.numpy(), exact + np.arange(83)), (tokens, columns)
    weight[5, columns // 2] = 1 if weight[5, columns // 2] < 1 else 0
    wrong = layer_of(weight, torch.arange(83))(torch.from_numpy(x.astype(np.float32)))
    assert (wrong != y).any(dim=0).nonzero().tolist() == [[5]]


@needs_permutation
@pytest.mark.parametrize(("rows", "tokens"), [(32770 + 16, 1), (8192 + 48, 3)])
def test_rows_of_several_chunks(rows: int, tokens: int) -> None:
    weight, x = trits(rows, 20), np.full((tokens, 20), 3, np.int8)
    x[:, 0] = 127
    y = layer_of(weight)(torch.from_numpy(x.astype(np.float32)))
    assert np.array_equal(y.numpy(), x.astype(np.int64) @ weight.T)


@needs_permutation
def test_look_ups_round_as_products_do() -> None:
    """Every dtype, any scales, threads, a token with NaN: the bits of the kernel of products."""
    weight = lath.quantize(torch.randn(1100, 290), "ternary")
    products = cpu.CpuLinear(build_view(weight, 304, Record(2, "none", True)), "int8", INT8)
    view = build_triplets(weight, Record(2, "none", True, "triplets"))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        bias = torch.randn(1100)
        layer = cpu.CpuLinear(view, "int8", INT8)
        x = torch.randn(19, 290).to(dtype)
        x[3, 5] = torch.nan
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for some in (x, x[:1]):
                    y, expected = layer(some, bias), products(some, bias)
                    assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7)), (dtype, threads)
        finally:
            torch.set_num_threads(1)


@needs_permutation
def test_a_weight_is_viewed_so_where_it_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The view follows the plan, and holds the weight alone; groups keep the one of products."""
    for text in ("ternary", "ternary-1.6-s32", "ternary-g80"):
        kinds, numbers, x = [], torch.randn(40, 160), torch.randn(3, 160)
        for quick in (False, True):
            monkeypatch.setattr(cpu_views, "has_quick_permutation", lambda _, quick=quick: quick)
            weight = lath.quantize(numbers, text)
            layer = cpu.prepare(weight, None, INT8)
            kinds.append((layer._view.record.stored == "triplets", layer(x)))
            only = cpu_restore.only_view(weight, INT8)
            assert only is not None
            assert all(
                torch.equal(tensor, weight.tensors[name]) for name, tensor in only.tensors.items()
            )
        assert [kind for kind, _ in kinds] == [False, text != "ternary-g80"]
        assert torch.equal(kinds[0][1], kinds[1][1])


def test_what_is_none_is_refused() -> None:
    weight = packed(trits(16, 160), Codec.parse("ternary-g80"))
    with pytest.raises(ValueError, match="one scale for each row, got groups of 80"):
        build_triplets(weight, Record(2, "none", True, "triplets"))
    with pytest.raises(ValueError, match="ternary codes 0, 1 and 2, got 3"):
        view_of(np.full((3, 9), 2, np.int8), Codec.parse("ternary"))


def test_which_cpus_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "_cpu_name", lambda: "znver4")
    assert isa.has_quick_permutation("avx512_vnni")
    assert not isa.has_quick_permutation("avx2")
    monkeypatch.setattr(isa, "_cpu_name", lambda: "znver5")
    assert not isa.has_quick_permutation("avx512_vnni")
    assert plan_cpu.cpu_tile("triplets", 2, 3, 1, "avx512_vnni") == (4, 2)


@needs_permutation
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Negative control of the check at first use: an entry that is not the one that was named."""
    honest = lanes.add_permuted

    def other(e: Any, table: Any, places: Any, totals: Any) -> Any:
        return honest(e, table, [e.builder.not_(places[0]), places[1]], totals)

    monkeypatch.setattr(lanes, "add_permuted", other)
    monkeypatch.setattr("lath.kernels.simd.compile.callback", numba.cfunc)
    monkeypatch.setattr(cpu_kernels, "compile_kernel", compile_kernel.__wrapped__)
    record = Record(2, "none", True, "triplets")
    with pytest.raises(RuntimeError, match=r"triplets.* gave wrong numbers"):
        cpu_kernels._check.__wrapped__("int8", record, emitter.FP32, (tokens, 2))


def test_the_plan_says_how_codes_are_kept() -> None:
    def reason(
        device: str | lath.DeviceDescription, activations: str, text: str = "ternary-1.6"
    ) -> str:
        return lath.plan(1, 64, 2560, text, torch.bfloat16, device, activations).reason

    assert "five in a byte" in reason("avx512_vnni", "int8")
    assert "five in a byte" in reason("avx512_vnni", "int8-g160", "ternary-1.6-g80")
    assert "float activations multiply 2-bit" in reason("avx512_vnni", "float")
    assert "no look-up of 128 bytes" in reason("avx2", "int8")
    cascade_lake = replace(describe_device("avx512_vnni"), wide_look_up=False)
    assert "no look-up of 128 bytes" in reason(cascade_lake, "int8")
    assert "no multiples of 80" in reason("avx512_vnni", "int8-g64")
    assert "five" not in reason("avx512_vnni", "int8", "ternary")
    plan = lath.plan(1, 64, 2560, "ternary-1.6", torch.bfloat16, "sm_90", "int8")
    assert plan.block_k == 160
    assert "index into sums" not in reason("avx512_vnni", "int8")
    zen4 = replace(describe_device("avx512_vnni"), quick_permutation=True)
    for text in ("ternary", "ternary-1.6-s32"):
        assert "index into sums" in reason(zen4, "int8", text)
        assert "widened" not in reason(zen4, "int8", text)
        assert "index into sums" not in reason(zen4, "float", text)
        assert "index into sums" not in reason(zen4, "int8-g160", text)
    assert "index into sums" not in reason(zen4, "int8", "ternary-g80")
    assert "index into sums" not in reason(zen4, "int8", "int2")
    here = describe_device("cpu")
    view_bytes = {True: 16 * 2560 // 5, False: 16 * 2560 // 4}[here.wide_look_up] + 32
    if here.quick_permutation:
        view_bytes = 32 * -(-2560 // 9)
    layer = cpu.prepare(packed(trits(16, 2560)), None, ActivationFormat("int8"))
    assert layer._view.panel_bytes == view_bytes
