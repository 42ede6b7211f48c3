"""Sums of packed weights in modules and models: PackedLinear, the operator, lath.patch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases_sums import heavy_weight
from torch import nn

import lath
from lath.integration.linear import PackedLinear

CODECS = ["int4-g16+out2%", "mix2.5-g16", "mix2-g16+out1%", "int1-g16+int1-g16", "billm10%-g16"]


def packed(codec: str, backend: str = "reference", activations: str = "float") -> PackedLinear:
    dense = nn.Linear(80, 40)
    with torch.no_grad():
        dense.weight.copy_(heavy_weight(40, 80) / 9)
    return PackedLinear.from_linear(dense, codec, activations, backend=backend)


@pytest.mark.parametrize(
    ("codec", "backend"),
    [*((c, b) for c in CODECS for b in ("reference", "cpu")), ("mix2-g16+out1%", "triton")],
)
def test_module_computes_with_the_packed_weight(codec: str, backend: str) -> None:
    module, x = packed(codec, backend), torch.randn(2, 3, 80)
    expected = nn.functional.linear(x, module.qtensor.dequantize(), module.bias)
    torch.testing.assert_close(module(x), expected, atol=2e-5, rtol=2e-5)
    assert module(x[:, :, None]).shape == (2, 3, 1, 40)
    assert module(x[:0]).shape == (0, 3, 40)
    with pytest.raises(ValueError, match="80"):
        module(x[..., :79])


@pytest.mark.parametrize("codec", CODECS)
def test_state_dict_round_trip_from_the_meta_device(codec: str) -> None:
    module, x = packed(codec), torch.randn(3, 80)
    empty = PackedLinear(80, 40, codec=codec, backend="reference", device="meta")
    assert set(empty.state_dict()) == set(module.state_dict())
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(x), module(x))
    other = PackedLinear(80, 40, codec=codec, backend="cpu")
    other(x)  # of what is not there yet; nothing it keeps may survive
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x), module(x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("codec", CODECS)
def test_copies_and_casts(codec: str) -> None:
    module, x = packed(codec, "cpu", "int8-g16"), torch.randn(3, 80)
    module.bias = None
    expected = module(x)
    clone = copy.deepcopy(module)
    module.half().float()
    assert torch.equal(module(x), expected)
    module.weight.zero_()
    assert torch.equal(clone(x), expected)


def test_a_damaged_weight_is_refused() -> None:
    module, target = packed("mix2.5-g16+out2%"), packed("mix2.5-g16+out2%")
    state = dict(module.state_dict())
    state["weight_columns"] = state["weight_columns"].flip(0)
    with pytest.raises(RuntimeError, match="corrupted"):
        target.load_state_dict(state)


@pytest.mark.parametrize("codec", ["int4-g16+out2%", "mix2.5-g16"])
def test_opcheck_compile_export_gradients(codec: str) -> None:
    module, x = packed(codec), torch.randn(3, 80)
    weight = module.qtensor
    arguments = (x, list(weight.tensors.values()), module.bias, str(weight.codec), 40, 80, "float",
                 "reference")  # fmt: skip
    torch.library.opcheck(torch.ops.lath.linear.default, arguments)
    model = nn.Sequential(module, nn.ReLU())
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    program = torch.export.export(nn.Sequential(module), (x,))
    assert sum("lath.linear" in str(node.target) for node in program.graph.nodes) == 1
    x.requires_grad_()
    module(x).square().sum().backward()
    ours, x.grad = x.grad, None
    nn.functional.linear(x, weight.dequantize(), module.bias).square().sum().backward()
    torch.testing.assert_close(ours, x.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("codec", ["int4-g32+out1%", "mix2.5-g32", "billm10%-g32"])
def test_patch_a_model(codec: str) -> None:
    pytest.importorskip("transformers")
    from hf_models import hf_model, tokens

    model: Any = hf_model("Llama")
    ids = tokens(2, 9)
    with torch.no_grad():
        before = model(ids).logits
        with lath.patch(model, codec, backend="cpu") as report:
            assert report.weights == codec
            assert report.activations == "int8-g32"
            sizes = {row.name: row.bytes_after for row in report.rows if row.action == "replaced"}
            assert len(sizes) == 14
            for name, size in sizes.items():
                module = model.get_submodule(name)
                assert size == module.qtensor.nbytes
            after = model(ids).logits
            assert torch.isfinite(after).all()
            assert not torch.equal(after, before)
            dense = copy.deepcopy(hf_model("Llama"))
            for name in sizes:
                own = dense.get_submodule(name)
                own.weight.copy_(model.get_submodule(name).qtensor.dequantize())
            expected = dense(ids).logits
            # int8 activations lose about 0.4 % a layer; a wrong term would lose everything.
            assert float((after - expected).norm() / expected.norm()) < 0.05
        assert torch.equal(model(ids).logits, before)


def test_patch_searches_the_share_of_each_layer() -> None:
    """Each row names the codec that was found and its bytes; asking again finds all done."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(256, 32), nn.Linear(32, 256), nn.Linear(256, 16))
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([1.0, 30.0]).repeat_interleave(32).repeat(4))
    with lath.patch(model, "mix3-g32", search=True, backend="reference") as report:
        codecs = [row.codec for row in report.rows]
        assert codecs == [str(model[i].codec) for i in range(3)]
        assert codecs == ["mix3-p4-g32", "mix3-p0-g32", "mix3-p0-g32"]
        for row, module in zip(report.rows, model, strict=True):
            assert row.bytes_after == module.qtensor.nbytes + 4 * module.out_features
        again = lath.patch(model, "mix3-g32", search=True, backend="reference")
        assert {row.action for row in again.rows} == {"already packed"}
        with pytest.raises(ValueError, match=r"packed already as weights='mix3-p4-g32'"):
            lath.patch(model, "mix3-g32", backend="reference")
    assert type(model[0]) is nn.Linear


def test_patch_takes_an_importance_for_each_layer() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 48))
    x = torch.randn(20, 64) * torch.exp(2 * torch.randn(64))
    with lath.mean_square_inputs(model) as importance:
        model(x)
    dense = {name: model.get_submodule(name).weight.detach() for name in ("0", "2")}
    with lath.patch(model, "int4-g16+out2%", importance=importance, backend="reference"):
        for name in ("0", "2"):
            packed = model.get_submodule(name).qtensor
            alone = lath.quantize(dense[name], packed.codec, importance=importance[name])
            assert alone.digest() == packed.digest()
            own = importance[name][packed.terms[-1].codes.long()]
            assert float(own.mean()) > float(importance[name].mean())
    with pytest.raises(ValueError, match="importance must have '2'"):
        lath.patch(model, "int4-g16+out2%", importance={"0": importance["0"]})
    with pytest.raises(ValueError, match="0: importance is for"):
        lath.patch(model, "int4-g16", importance=importance)
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("activations", ["float", "int8", "int8-g64", "fp8"])
@pytest.mark.parametrize(
    "base",
    ["vq8-256", "vq8-256-g64", "lattice4-d8-g64", "sparse50-int8-g64", "sparse50-bf16",
     "ternary-1.6", "int8-g64-nested", "int4-g64-fp8"],
)  # fmt: skip
def test_outliers_beside_every_other_kind(base: str, activations: str, backend: str) -> None:
    """The base alone by its own definition, and x itself times the outliers: nothing else.

    Both are fp32: the outliers' sum has as many roundings as a row has of them, and two additions
    follow.
    """
    weight = lath.quantize(torch.randn(37, 300), f"{base}+out1%")
    assert isinstance(weight, lath.SumTensor)
    first, outliers = weight.terms
    assert str(first.codec) == base
    x = torch.randn(3, 300)
    found = lath.linear(x, weight, activations=activations, backend=backend)
    alone = lath.linear(x, first, activations=activations, backend=backend)
    dense = outliers.dequantize().double()
    expected = alone.double() + x.double() @ dense.T
    most = int((dense != 0).sum(dim=1).max())
    sizes = alone.double().abs() + x.double().abs() @ dense.abs().T
    assert bool(((found.double() - expected).abs() <= (most + 4) * 2.0**-24 * sizes).all())
