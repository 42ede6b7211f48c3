"""Weights that live in the CPU's view alone: the packed tensors come back bit for bit, and a
PackedLinear in that state saves, copies, casts, moves and computes as it did."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lath
from lath.formats.activations import ActivationFormat
from lath.formats.viewed import ViewedTensor

pytest.importorskip("numba")
from lath.integration.linear import PackedLinear
from lath.kernels.linear import cpu_restore
from lath.kernels.linear.cpu_restore import only_view
from lath.kernels.linear.cpu_views import cpu_view

HELD = (
    "int1", "int2-g32", "int3-g64-asym", "int4-g64", "int4-g32-fzero", "int5", "int6-g16-asym",
    "int7-fzero", "int8-g64", "int1-g32-s32", "int4-nested", "ternary-s32", "ternary-1.6-s32",
    "ternary-g64", "nf4-g64", "fp4", "lut3-g64", "lut8", "e4m3", "e5m2-g64", "mxfp4", "mxfp8",
    "nvfp4",
)  # fmt: skip
SHAPES = ((40, 100), (16, 320), (1, 17), (100, 1000))
CODECS = ("int4-g16", "int3-g16-asym", "int4-g16-fzero", "ternary-1.6-s32")


@pytest.mark.parametrize("codec", HELD)
def test_tensors_come_back_from_the_view(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_restore, "_CHUNK_WEIGHTS", 32 * 1000)  # several pieces
    for activations in ("int8", "int8-g64", "float"):
        for shape in SHAPES:
            weight = lath.quantize(torch.randn(shape), codec)
            viewed = only_view(weight, ActivationFormat.parse(activations))
            assert isinstance(viewed, ViewedTensor)
            for name, tensor in weight.tensors.items():
                assert torch.equal(viewed.tensors[name], tensor)
                assert torch.equal(getattr(viewed, name), tensor)
            assert viewed.digest() == weight.digest()
            assert (viewed.nbytes, viewed.device) == (weight.nbytes, weight.device)
            assert torch.equal(viewed.dequantize(), weight.dequantize())
            again = pickle.loads(pickle.dumps(viewed))
            assert torch.equal(again.codes, weight.codes)


def test_a_view_with_other_numbers_is_not_kept() -> None:
    """fp8 products, scales of two levels and 6-bit floats: the view is not a bijection there."""
    for codec in ("int4-g64-fp8", "nf4-g64-dq", "mxfp6"):
        assert (
            only_view(lath.quantize(torch.randn(32, 128), codec), ActivationFormat("int8")) is None
        )


@pytest.mark.parametrize("side", [0, -1])
def test_a_view_that_lost_a_bit_is_not_kept(side: int) -> None:
    """Negative control: one bit of a code, then of a scale, before it is looked at."""
    weight = lath.quantize(torch.randn(32, 128), "int4-g64")
    view = cpu_view(weight, ActivationFormat("int8"))
    view.records.view(-1)[side] ^= 1
    assert only_view(weight, ActivationFormat("int8")) is None


def packed(codec: str = "int4-g16", bias: bool = True) -> PackedLinear:
    torch.manual_seed(2)
    return PackedLinear.from_linear(nn.Linear(80, 40, bias), codec, "int8", backend="cpu")


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_but_memory_changes(codec: str) -> None:
    module, x = packed(codec), torch.randn(3, 80)
    expected, state, digest = module(x), module.state_dict(), module.qtensor.digest()
    state = {name: tensor.clone() for name, tensor in state.items()}
    assert module.compact()
    assert module.compact()
    assert module.is_compact
    assert all(p.is_meta for name, p in module.named_parameters() if name != "bias")
    assert torch.equal(module(x), expected)
    assert module.qtensor.digest() == digest
    saved = module.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)
    assert module.is_compact
    other = PackedLinear(80, 40, codec=codec, activations="int8", backend="cpu")
    other.load_state_dict(saved)
    assert torch.equal(other(x), expected)
    wide = x.clone().requires_grad_()
    module(wide).sum().backward()
    expected_gradient = torch.ones(3, 40) @ module.qtensor.dequantize()
    torch.testing.assert_close(wide.grad, expected_gradient)
    module.restore()
    assert not module.is_compact
    assert all(torch.equal(module.state_dict()[name], state[name]) for name in state)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_their_codes(copied: Callable[[nn.Module], nn.Module]) -> None:
    module, x = packed(), torch.randn(3, 80)
    expected = module(x)
    module.compact()
    clone = copied(module)
    assert module.is_compact
    assert not clone.is_compact
    assert torch.equal(clone(x), expected)


def test_casts_keep_it_and_moves_bring_the_codes_back() -> None:
    module, x = packed(), torch.randn(3, 80)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.compact()
    half = module.to(torch.bfloat16)
    assert half is module
    assert module.is_compact
    assert module.bias is not None
    assert module.bias.dtype == module.dense_dtype == torch.bfloat16
    assert module(x.bfloat16()).dtype == torch.bfloat16
    assert list(dict(module.named_parameters())) == ["weight", "weight_scale", "bias"]
    module.to("cpu")
    assert module.is_compact
    module.to("meta")  # any other device
    assert not module.is_compact
    assert module.weight.is_meta
    module = packed()
    module.compact()
    module.weight = nn.Parameter(state["weight"].clone(), requires_grad=False)
    assert not module.is_compact
    assert torch.equal(module.state_dict()["weight_scale"], state["weight_scale"])
    module.compact()
    with pytest.raises(TypeError, match="cannot become"):
        module.weight = nn.Parameter(torch.zeros(40, 80))
    module.compact()
    module.bias = None
    assert module.is_compact
    assert torch.equal(module(torch.zeros(1, 80)), torch.zeros(1, 40))


def test_loading_into_it() -> None:
    module, other, x = packed(), packed("int4-g16"), torch.randn(3, 80)
    torch.manual_seed(5)
    other = PackedLinear.from_linear(nn.Linear(80, 40), "int4-g16", "int8", backend="cpu")
    module.compact()
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))


def test_where_it_cannot_be() -> None:
    dense = nn.Linear(80, 48)
    for codec, backend in (("int4-g16", "reference"), ("sparse50-int8", "cpu"), ("mxfp6", "cpu")):
        module = PackedLinear.from_linear(dense, codec, "int8", backend=backend)
        before = module.weight
        assert not module.compact()
        assert module.weight is before


def test_the_codes_are_freed() -> None:
    module = packed()
    module(torch.zeros(1, 80))
    names = [name for name in dict(module.named_parameters()) if name != "bias"]
    kept = [weakref.ref(getattr(module, name)) for name in names]
    whole = weakref.ref(module.qtensor)
    module.compact()
    gc.collect()
    assert [one() for one in [*kept, whole]] == [None] * 3
    module.qtensor.dequantize()
    module.state_dict()
    gc.collect()
    assert not [one for one in vars(module.qtensor).values() if isinstance(one, Tensor)]


def test_torch_compile_is_refused() -> None:
    module = packed()
    module.compact()
    with pytest.raises(Exception, match="call restore"):
        torch.compile(module, backend="eager", fullgraph=True)(torch.randn(3, 80))
