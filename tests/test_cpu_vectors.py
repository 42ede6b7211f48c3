"""The compiled CPU kernels over vector codebooks."""

from __future__ import annotations

import itertools

import numba
import numpy as np
import pytest
import torch
from cases_vectors import answer, bound_of, make_weight
from test_cpu_processes import LOWERINGS, run_lowered

import cases
import lath
import oracle
from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.vectors import VectorTensor
from lath.integration.linear import PackedLinear
from lath.kernels.linear import cpu_vector_loops, cpu_vectors
from lath.kernels.simd import emitter, host_isa
from lath.kernels.simd.compile import compile_kernel

CODECS = [
    "vq2-16", "vq2-256-g48", "vq4-65536", "vq8-256-g32", "vq8-65536+256-g128", "vq4-256+16",
    "vq16-65536",
]  # fmt: skip
ACTIVATIONS = ("float", "int8", "int8-g32", "int8-g48")
# One token, tiles of two and four, more than a tile; decoded pieces; more than they serve at once.
TOKENS = (1, 2, 7, 11, 259)


def check(text: str, m: int, n: int, k: int, dtype: str, activations: str, bias: bool) -> None:
    rng = np.random.default_rng([m, n, k])
    weight = make_weight(text, n, k, rng)
    x = torch.from_numpy(rng.standard_normal((m, k))).to(cases.DTYPES[dtype])
    offsets = torch.from_numpy(rng.standard_normal(n)).to(x.dtype) if bias else None
    data = answer(x, weight, offsets, activations)
    y = cpu_vectors.linear(x, weight, offsets, activation_format(activations))
    assert y.dtype == x.dtype
    ratio = oracle.test_ratio(y, data.y64, bound_of(data, None))
    assert ratio <= 1, (text, m, n, k, dtype, activations, bias, ratio)


@pytest.mark.parametrize("text", CODECS)
def test_bounds(text: str) -> None:
    """Every dtype, format and count of tokens in turn; odd N and K, one panel to several."""
    turns = itertools.cycle(itertools.product(cases.DTYPES, ACTIVATIONS))
    for turn, m in enumerate(TOKENS):
        dtype, activations = next(itertools.islice(turns, turn % 5, None))
        n, k = (37, 16, 51, 5)[turn % 4], (201, 330, 129, 64, 17)[turn % 5]
        check(text, m, n, k, dtype, activations, bool(turn % 2))


def test_rows_longer_than_a_decoded_piece() -> None:
    """Pieces are 512 columns: whole ones, a short last one, groups across their ends."""
    for text in ("vq8-256-g96", "vq4-256+16"):
        for k, activations in ((1100, "float"), (1024, "int8-g48"), (513, "int8")):
            check(text, 9, 20, k, "fp32", activations, True)


@pytest.mark.parametrize("text", ["vq8-256", "vq2-16-g16", "vq4-256+16"])
def test_identity_gives_every_entry(text: str) -> None:
    """Of one product nothing is rounded but by the scale: the numbers are equal bit for bit."""
    weight = make_weight(text, 37, 300, np.random.default_rng(1))
    y = cpu_vectors.linear(torch.eye(300), weight, None, ActivationFormat())
    assert torch.equal(y.T, weight.dequantize())


def test_sums_in_fp32_on_request() -> None:
    weight = make_weight("vq8-256", 20, 100, np.random.default_rng(2))
    for m in (1, 9):
        x, out = torch.randn(m, 100).half(), torch.full((m, 20), torch.nan)
        y = cpu_vectors.linear(x, weight, None, ActivationFormat(), None, out)
        assert y is out
        assert torch.equal(out.half(), cpu_vectors.linear(x, weight, None, ActivationFormat()))
        assert not torch.equal(out, out.half().float())


def test_tokens_do_not_meet() -> None:
    weight = make_weight("vq8-256-g32", 50, 160, np.random.default_rng(3))
    for m, activations, bad in itertools.product(
        (2, 7, 9), ("float", "int8", "int8-g32"), (np.nan, np.inf)
    ):
        x = torch.randn(m, 160)
        fmt = ActivationFormat.parse(activations)
        clean = cpu_vectors.linear(x, weight, None, fmt)
        x[1, 7] = bad
        y = cpu_vectors.linear(x, weight, None, fmt)
        keep = [row for row in range(m) if row != 1]
        assert torch.equal(y[keep], clean[keep])
        assert not torch.isfinite(y[1]).any()


def test_results_do_not_depend_on_threads() -> None:
    weight = make_weight("vq8-256-g64", 517, 1100, np.random.default_rng(6))
    for m, activations in itertools.product((1, 7, 33), ("float", "int8-g64")):
        x, found = torch.randn(m, 1100), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cpu_vectors.linear(x, weight, None, ActivationFormat.parse(activations)))
        torch.set_num_threads(1)
        assert all(torch.equal(found[0], y) for y in found), (m, activations)


def test_views_and_their_bytes() -> None:
    """Indices take what they take in the weight, those of 4 bits too; a view follows its weight."""
    weight = make_weight("vq4-16", 32, 256, np.random.default_rng(7))
    layer = cpu_vectors.prepare(weight)
    view = layer._view
    assert [index.nbytes for index in view.indices] == [weight.codes.nbytes]
    assert view.books[0].shape == (256, 8)  # of all pairs
    x = torch.randn(2, 256)
    first = cpu_vectors.linear(x, weight, None, ActivationFormat())
    weight.books.mul_(2)
    assert torch.equal(cpu_vectors.linear(x, weight, None, ActivationFormat()), 2 * first)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_wrong_entry_is_seen(activations: str) -> None:
    """Negative control of the bounds: the definition with another entry for one fails them."""
    weight = make_weight("vq8-256", 20, 256, np.random.default_rng(9))
    books = weight.books.clone()
    books[255] = books[254]
    wrong = VectorTensor(weight.codec, weight.shape, weight.codes, weight.scales, books)
    x = torch.randn(3, 256)
    data = answer(x, wrong, None, activations)
    y = cpu_vectors.linear(x, weight, None, ActivationFormat.parse(activations))
    assert oracle.test_ratio(y, data.y64, bound_of(data, None)) > 10


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("shape", [(8, 1), (8, 2, 8, 1), (2, 1, 4, 1)])
def test_a_wrong_kernel_is_refused(
    shape: tuple[int, ...], staged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the check at first use: columns that change places must not pass."""
    honest = cpu_vector_loops._Book.numbers

    def wrong(self, r, step):  # type: ignore[no-untyped-def]
        value = honest(self, r, step)
        return self.e.shuffle(value, value, [1, 0, *range(2, 16)])

    monkeypatch.setattr(cpu_vector_loops._Book, "numbers", wrong)
    monkeypatch.setattr("lath.kernels.simd.compile.callback", numba.cfunc)
    monkeypatch.setattr(cpu_vectors, "compile_kernel", compile_kernel.__wrapped__)
    own = cpu_vectors._Shape(*shape)
    with pytest.raises(RuntimeError, match=f"float tile=4 .*{host_isa()}"):
        cpu_vectors._check.__wrapped__(own, "float", emitter.FP32, 4, staged)


@pytest.mark.parametrize("name", LOWERINGS)
def test_other_instruction_sets(name: str) -> None:
    run_lowered(
        name,
        """
        import torch; torch.set_num_threads(1)
        from test_cpu_vectors import check
        for text in ("vq8-256+256-g32", "vq2-16"):
            for m, activations in ((1, "float"), (3, "int8"), (9, "int8-g32")):
                check(text, m, 20, 100, "fp16", activations, True)
        """,
    )


def test_the_layer_and_its_plan() -> None:
    torch.manual_seed(3)
    source = torch.nn.Linear(96, 40)
    module = PackedLinear.from_linear(source, "vq4-16-g32", "int8-g32", backend="cpu")
    x = torch.randn(5, 96)
    y = module(x)
    assert isinstance(module._kernel, cpu_vectors.VectorLinear)
    expected = lath.linear(x, module.qtensor, module.bias, activations="int8-g32")
    assert torch.equal(y, expected)
    plan = lath.plan(1, 40, 96, "vq4-16-g32", torch.float32, "avx512_vnni", "int8-g32")
    assert (plan.dataflow, plan.block_m, plan.dot) == ("gemv", 1, "fp32")
    assert "sixteen rows" in lath.plan(64, 40, 96, "vq8-256", device="avx512_vnni").reason
