"""`lath.linear` on every backend against its definition, and as an operator of torch."""

from __future__ import annotations

import pytest
import torch

import cases
import lath
import oracle
from cases import LinearCase
from lath.formats.qtensor import QTensor

BACKENDS = ["reference", "cpu", "triton"]

EXACT = [
    LinearCase("int4-g32-asym", m, 40, 160, "fp32", "float", "integers", True) for m in (1, 3, 17)
] + [
    LinearCase(text, 5, 24, 256, "fp32", "float", "integers")
    for text in ("int1-g16", "int2-g64", "int3-fzero", "int5-g48", "int6-asym", "int7", "int8-g32")
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases.CATALOGUE, ids=str)
def test_parity(case: LinearCase, backend: str) -> None:
    data = cases.make(case)
    before = data.x.clone()
    y = lath.linear(data.x, data.weight, data.bias, activations=case.activations, backend=backend)
    assert y.dtype == case.torch_dtype
    assert torch.equal(data.x, before), "x was changed"
    bound = oracle.linear_bound(data.y64, data.gauge, case.k, case.torch_dtype)
    ratio = oracle.test_ratio(y, data.y64, bound)
    assert ratio <= 1, (
        f"LinearCase.parse({str(case)!r}) {backend}: {oracle.worst(y, data.y64, bound)}"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_small_integers_are_exact(case: LinearCase, backend: str) -> None:
    data = cases.make(case)
    y = lath.linear(data.x, data.weight, data.bias, backend=backend)
    assert torch.equal(y.double(), torch.from_numpy(data.y64)), f"LinearCase.parse({str(case)!r})"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", ["int4-g48-asym", "int3-g16", "int8-fzero", "int1-g64"])
def test_identity_gives_the_decoded_weight(text: str, backend: str) -> None:
    """x = I reads every weight alone: y is its decoded value, rounded once."""
    packed = lath.quantize(torch.randn(18, 144), text)
    y = lath.linear(torch.eye(144), packed, backend=backend)
    decoded = packed.dequantize().T
    # fp32 keeps code and offset apart: one rounding of each part of at most `levels` scales.
    slack = packed.codec.levels * float(packed.scales.float().max()) * 2.0**-22
    assert float((y - decoded).abs().max()) <= slack


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activations", ["float", "int8", "int8-g32"])
def test_nan_and_infinity_stay_in_their_row(backend: str, activations: str) -> None:
    packed = lath.quantize(torch.randn(20, 160), "int4-g32")
    x = torch.randn(6, 160)
    clean = lath.linear(x, packed, activations=activations, backend=backend)
    x[1, 5], x[4, 159] = float("nan"), float("inf")
    y = lath.linear(x, packed, activations=activations, backend=backend)
    assert bool(y[1].isnan().all())
    assert not bool(y[4].isfinite().any())
    for row in (0, 2, 3, 5):
        assert torch.equal(y[row], clean[row]), f"row {row}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend: str) -> None:
    packed = lath.quantize(torch.randn(20, 64), "int4-g32")
    for shape in [(64,), (0, 64), (2, 0, 64), (2, 3, 64), (1, 1, 1, 64)]:
        y = lath.linear(torch.randn(shape), packed, backend=backend)
        assert y.shape == (*shape[:-1], 20)
    empty = lath.quantize(torch.randn(0, 64), "int4-g32")
    assert lath.linear(torch.randn(3, 64), empty, backend=backend).shape == (3, 0)
    no_columns = lath.quantize(torch.randn(5, 0), "int4-g32")
    bias = torch.randn(5)
    y = lath.linear(torch.randn(3, 0), no_columns, bias, backend=backend)
    assert torch.equal(y, bias.expand(3, 5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activations", ["float", "int8-g32"])
def test_strides_do_not_matter(backend: str, activations: str) -> None:
    packed = lath.quantize(torch.randn(20, 64), "int4-g32")
    for m in (1, 7):
        base = torch.randn(64, 2 * m)
        for x in (base.T[::2], torch.randn(m, 128)[:, ::2], torch.randn(m, 70)[:, 3:67]):
            y = lath.linear(x, packed, activations=activations, backend=backend)
            same = lath.linear(x.contiguous(), packed, activations=activations, backend=backend)
            assert torch.equal(y, same)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("activations", ["float", "int8-g32"])
def test_a_wrong_number_is_noticed(backend: str, activations: str) -> None:
    """Negative control: one code, scale or zero changed puts the ratio above 1."""
    case = LinearCase("int4-g32-asym", 2, 20, 64, "fp32", activations)
    data = cases.make(case)
    bound = oracle.linear_bound(data.y64, data.gauge, case.k, case.torch_dtype)
    assert data.weight.zeros is not None
    for field in ("codes", "scales", "zeros"):
        tensors = {
            "codes": data.weight.codes.clone(),
            "scales": data.weight.scales.clone(),
            "zeros": data.weight.zeros.clone(),
        }
        bits = tensors[field].reshape(-1).view(torch.uint8)
        bits[4] ^= 1 if field != "scales" else 0x40
        wrong = QTensor(data.weight.codec, data.weight.shape, **tensors)
        y = lath.linear(data.x, wrong, activations=activations, backend=backend)
        assert oracle.test_ratio(y, data.y64, bound) > 1, field


WEIGHT = lath.quantize(torch.randn(20, 64), "int4-g32")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], WEIGHT), {}, TypeError, "x must be a torch.Tensor, got list"),
        (
            (torch.randn(2, 64), torch.randn(20, 64)),
            {},
            TypeError,
            "weight must be a packed weight",
        ),
        ((torch.randn(2, 63), WEIGHT), {}, ValueError, r"x must be \[..., 64\]"),
        ((torch.tensor(1.0), WEIGHT), {}, ValueError, r"x must be \[..., 64\]"),
        ((torch.randn(2, 64).double(), WEIGHT), {}, TypeError, "x must be float16.*got float64"),
        ((torch.ones(2, 64, dtype=torch.int8), WEIGHT), {}, TypeError, "got int8"),
        ((torch.randn(2, 64), WEIGHT, torch.randn(19)), {}, ValueError, r"bias must be \[20\]"),
        (
            (torch.randn(2, 64), WEIGHT, torch.ones(20).long()),
            {},
            TypeError,
            "bias must be float16",
        ),
        ((torch.randn(2, 64), WEIGHT, 1.0), {}, TypeError, "bias must be a torch.Tensor"),
        ((torch.randn(2, 64, device="meta"), WEIGHT), {}, ValueError, "x must be on cpu"),
        ((torch.randn(2, 64), WEIGHT), {"backend": "gpu"}, ValueError, "backend must be one of"),
        ((torch.randn(2, 64), WEIGHT), {"activations": "int4"}, ValueError, "activations must be"),
        ((torch.randn(2, 64), WEIGHT), {"activations": 8}, TypeError, "activations must be a str"),
    ],
)
def test_malformed_calls_are_refused(arguments, options, error, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        lath.linear(*arguments, **options)


def operator_arguments(activations: str, backend: str) -> tuple[object, ...]:
    packed = lath.quantize(torch.randn(20, 64), "int4-g32-asym")
    return (
        torch.randn(3, 64), list(packed.tensors.values()), torch.randn(20), str(packed.codec),
        20, 64, activations, backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    torch.library.opcheck(torch.ops.lath.linear.default, operator_arguments("int8-g32", backend))
    arguments = (torch.randn(9, 40), "int3-g16", False, None)
    torch.library.opcheck(torch.ops.lath.quantize.default, arguments)


def test_opcheck_with_gradients() -> None:
    x, *rest = operator_arguments("float", "reference")
    assert isinstance(x, torch.Tensor)
    torch.library.opcheck(torch.ops.lath.linear.default, (x.requires_grad_(), *rest))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_compile_gives_one_graph_and_the_plan_follows_m(backend: str) -> None:
    """A branch on M taken while tracing would freeze the first plan: one graph serves every M."""
    packed = lath.quantize(torch.randn(40, 128), "int4-g64")
    graphs = []

    def count(graph, inputs):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph.forward

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(lath.linear(x, packed, activations="int8-g64", backend=backend)) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for m in (3, 9, 41):  # equal to no size of the weight, which torch would take for the same
        x = torch.randn(m, 128)
        assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_x(backend: str) -> None:
    packed = lath.quantize(torch.randn(20, 64), "int4-g32")
    x = torch.randn(3, 64, requires_grad=True)
    lath.linear(x, packed, backend=backend).square().sum().backward()
    dense = packed.dequantize()
    y = x.detach() @ dense.T
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * y @ dense, rtol=1e-4, atol=1e-4)
