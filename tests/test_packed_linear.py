"""PackedLinear: its numbers, copies, casts, saved form, gradients, and torch.compile.

Every test computes with the NumPy definition: the kernels have tests of their own.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lath.integration.linear import PackedLinear
from lath.verbs.linear import linear

CODECS = ["int4-g64", "int3-g32-asym", "int4-g32-fzero", "int8-s32", "int1"]


def packed(codec: str = "int4-g16", bias: bool = True, **options: object) -> PackedLinear:
    torch.manual_seed(2)
    return PackedLinear.from_linear(nn.Linear(80, 40, bias), codec, backend="reference", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bias", [True, False])
def test_module_computes_with_the_packed_weight(codec: str, bias: bool) -> None:
    module = packed(codec, bias)
    x = torch.randn(2, 3, 80)
    expected = functional.linear(x, module.qtensor.dequantize(), module.bias)
    torch.testing.assert_close(module(x), expected, atol=2e-5, rtol=2e-5)


def test_module_says_what_it_is() -> None:
    text = str(packed(activations="int8-g16"))
    for part in ("in_features=80", "out_features=40", "int4-g16", "int8-g16", "reference"):
        assert part in text
    assert {name for name, _ in packed("int4-asym").named_parameters()} == {
        "weight", "weight_scale", "weight_zero", "bias",
    }  # fmt: skip
    assert not any(p.requires_grad for p in packed().parameters())


@pytest.mark.parametrize("move", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_their_own(move: Callable[[nn.Module], nn.Module]) -> None:
    module, x = packed("int5-g16-asym"), torch.randn(3, 80)
    expected = module(x)
    clone = move(module)
    assert torch.equal(clone(x), expected)
    module.weight.zero_()
    assert torch.equal(clone(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("codec", ["int4-g16-fzero", "int4-g16-s32"])
def test_casts_leave_the_packed_numbers_alone(codec: str, dtype: torch.dtype) -> None:
    module, x = packed(codec, bias=False), torch.randn(3, 80)
    expected = module(x)
    before = {name: (p.dtype, p.clone()) for name, p in module.named_parameters()}
    model = nn.Sequential(module, nn.Linear(40, 40)).to(dtype)
    assert model[1].weight.dtype == dtype
    for name, parameter in module.named_parameters():
        assert parameter.dtype == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert torch.equal(module(x), expected)
    assert module(x.bfloat16()).dtype == torch.bfloat16
    assert module.dense_dtype == dtype


@pytest.mark.parametrize("codec", CODECS)
def test_state_dict_round_trip_from_the_meta_device(codec: str) -> None:
    module, x = packed(codec), torch.randn(3, 80)
    empty = PackedLinear(80, 40, codec=codec, backend="reference", device="meta")
    assert set(empty.state_dict()) == set(module.state_dict())
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(x), module(x))
    other = PackedLinear(80, 40, codec=codec, backend="reference")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def test_state_dict_through_safetensors(tmp_path: object) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    module, other = packed("int3-g16-asym"), packed("int3-g16-asym").to("cpu")
    other.weight.zero_()
    path = f"{tmp_path}/model.safetensors"
    safetensors.save_file(module.state_dict(), path)
    other.load_state_dict(safetensors.load_file(path))
    assert torch.equal(other.qtensor.dequantize(), module.qtensor.dequantize())


def _flip(state: dict[str, Tensor]) -> None:
    state["weight"] = state["weight"].clone()
    state["weight"][3] ^= 1 << 7


def _drop_meta(state: dict[str, Tensor]) -> None:
    del state["weight_meta"]


def _other_codec(state: dict[str, Tensor]) -> None:
    state.update(packed("int4-g32").state_dict())


def _dense(state: dict[str, Tensor]) -> None:
    state.clear()
    state.update(nn.Linear(80, 40).state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "corrupted"),
        (_drop_meta, "weight_meta is missing"),
        (_other_codec, "int4-g32"),
        (_dense, "not a packed weight"),
    ],
)
def test_a_damaged_or_different_weight_is_refused(
    damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    module, target = packed(), packed()
    state = dict(module.state_dict())
    damage(state)
    before = target.weight.clone()
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(state)
    assert torch.equal(target.weight, before)


def test_packed_numbers_cannot_be_assigned_over() -> None:
    module = packed()
    with pytest.raises(TypeError, match=r"weight.*undo the patch"):
        module.weight = nn.Parameter(torch.zeros(40, 80))


def test_gradient_of_x() -> None:
    module, x = packed(), torch.randn(3, 80, requires_grad=True)
    module(x).square().sum().backward()
    ours, x.grad = x.grad, None
    functional.linear(x, module.qtensor.dequantize(), module.bias).square().sum().backward()
    torch.testing.assert_close(ours, x.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fresh", [True, False])
def test_compiles_without_a_graph_break(fresh: bool) -> None:
    model = nn.Sequential(packed("int4-g16-asym"), nn.ReLU())
    x = torch.randn(3, 80)
    expected = model(x)
    if fresh:
        model = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)
        assert compiled(torch.randn(5, 80)).shape == (5, 40)


def test_exports_as_one_operator() -> None:
    program = torch.export.export(nn.Sequential(packed()), (torch.randn(3, 80),))
    assert sum("lath.linear" in str(node.target) for node in program.graph.nodes) == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: packed(backend="gpu"), TypeError, "backend"),
        (lambda: PackedLinear(80, 40, codec="int9"), ValueError, "int9"),
        (lambda: PackedLinear(80, 40, backend="gpu"), ValueError, "backend.*gpu"),
        (lambda: PackedLinear(80, 40, activations="int4"), ValueError, "activations.*int4"),
        (lambda: packed()(torch.randn(3, 79)), ValueError, "80"),
        (lambda: packed()(torch.ones(3, 80, dtype=torch.int32)), TypeError, "int32"),
        (
            lambda: PackedLinear.from_qtensor(packed().qtensor, torch.zeros(39)),
            ValueError,
            "bias.*39",
        ),
    ],
)
def test_malformed_modules_and_calls(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


# The direct call of the compiled kernel


def compiled(codec: str = "int4-g16", bias: bool = True) -> PackedLinear:
    pytest.importorskip("numba")
    torch.manual_seed(2)
    return PackedLinear.from_linear(nn.Linear(80, 40, bias), codec, "int8-g16", backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(80,), (1, 80), (2, 3, 80), (0, 80), (2, 0, 80)])
def test_direct_call_is_the_verb(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    module, x = compiled(), torch.randn(shape).to(dtype)
    assert module._kernel is None
    y = module(x)
    assert module._kernel is not None
    expected = linear(x, module.qtensor, module.bias, activations="int8-g16", backend="cpu")
    assert torch.equal(y, expected)
    assert y.dtype == dtype
    assert torch.equal(module(x.clone().requires_grad_()), expected)
    with torch.inference_mode():
        assert torch.equal(module(x), expected)


def test_direct_call_takes_strided_input() -> None:
    module, x = compiled(), torch.randn(80, 6)
    assert torch.equal(module(x.T), module(x.T.contiguous()))


@pytest.mark.parametrize("shape", [(3, 79), (3, 160), (0,), ()])
def test_direct_call_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    module = compiled()
    module(torch.randn(3, 80))
    with pytest.raises(ValueError, match="80"):
        module(torch.randn(shape))
    with pytest.raises(TypeError, match="int64"):
        module(torch.zeros(3, 80, dtype=torch.int64))
    with pytest.raises(TypeError, match="float64"):
        module(torch.zeros(3, 80, dtype=torch.float64))


def test_direct_call_follows_a_loaded_weight() -> None:
    module, x = compiled(), torch.randn(3, 80)
    module(x)
    torch.manual_seed(9)
    other = PackedLinear.from_linear(nn.Linear(80, 40), "int4-g16", "int8-g16", backend="cpu")
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))
    module.weight = nn.Parameter(compiled().weight.clone(), requires_grad=False)
    module.weight_scale = nn.Parameter(compiled().weight_scale.clone(), requires_grad=False)
    module.bias = compiled().bias
    assert torch.equal(module(x), compiled()(x))
    module.bias = nn.Parameter(module.bias.detach() + 1, requires_grad=False)
    assert not torch.equal(module(x), compiled()(x))


def write_bias(module: PackedLinear) -> None:
    assert module.bias is not None
    module.bias.add_(3)


def write_scales(module: PackedLinear) -> None:
    module.weight_scale.mul_(2)


def write_codes(module: PackedLinear) -> None:
    module.weight.copy_(module.weight.flip(0))


def replace_data(module: PackedLinear) -> None:
    module.weight_scale.data = module.weight_scale * 2


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("write", [write_bias, write_scales, write_codes, replace_data])
def test_what_is_written_in_place_takes_effect(
    write: Callable[[PackedLinear], None], backend: str
) -> None:
    module = PackedLinear.from_linear(nn.Linear(80, 40), "int4-g16", backend=backend)
    x = torch.randn(3, 80)
    before, kernel = module(x), module._kernel
    with torch.no_grad():
        write(module)
    after = linear(x, module._of_parameters(), module.bias, backend=backend)
    assert torch.equal(module(x), after)
    assert not torch.equal(before, after)
    assert module._kernel is not kernel
    kept = module._kernel, module.qtensor
    module(x)
    assert (module._kernel, module.qtensor) == kept  # nothing is made anew without a reason


def test_a_compact_module_sees_its_bias_written() -> None:
    pytest.importorskip("numba")
    module = PackedLinear.from_linear(nn.Linear(80, 40), "int4-g16", backend="cpu")
    x = torch.randn(3, 80)
    before = module(x)
    assert module.compact()
    with torch.no_grad():
        write_bias(module)
    torch.testing.assert_close(module(x), before + 3)
    assert module.is_compact


def test_parameters_of_inference_mode() -> None:
    """Their writes are not counted: asking would raise."""
    with torch.inference_mode():
        module = PackedLinear.from_linear(nn.Linear(80, 40), "int4-g16", backend="reference")
        x = torch.randn(3, 80)
        assert torch.equal(module(x), module(x))
