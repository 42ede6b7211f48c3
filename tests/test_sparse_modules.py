"""Sparse weights in modules and models: saving, operators, a patched Hugging Face model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import lath
from hf_models import hf_model
from lath.formats.sparse import SparseTensor
from lath.integration.linear import PackedLinear
from lath.kernels import quantize_sparse

TEXTS = ["sparse50-int8", "sparse70-int4-g16", "sparse50-fp16"]


def packed(text: str, seed: int = 2) -> PackedLinear:
    torch.manual_seed(seed)
    linear = nn.Linear(80, 40)
    with torch.no_grad():  # zeros of its own, so that the number of kept weights is its own too
        linear.weight[:seed] = 0
    return PackedLinear.from_linear(linear, text, backend="reference")


@pytest.mark.parametrize("text", TEXTS)
def test_state_dict_round_trip(text: str) -> None:
    """Into an empty module and into one with another count of kept weights."""
    module, x = packed(text), torch.randn(3, 80)
    expected = module(x)
    for other in (
        PackedLinear(80, 40, codec=text, backend="reference", device="meta"),
        PackedLinear(80, 40, codec=text, backend="reference"),
        packed(text, 5),
    ):
        other.load_state_dict(module.state_dict(), assign=other.weight.is_meta)
        assert torch.equal(other(x), expected)
        assert other.weight.shape == module.weight.shape
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(clone(x), expected)
    before = {name: tensor.clone() for name, tensor in module.qtensor.tensors.items()}
    for name, tensor in module.bfloat16().qtensor.tensors.items():  # casts leave them alone
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", ["weight", "weight_bitmap", "weight_offsets"])
def test_damaged_weights_are_refused_and_the_module_stays(name: str) -> None:
    module, other, x = packed("sparse50-int8"), packed("sparse50-int8", 5), torch.randn(3, 80)
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    expected = other(x)
    flat = state[name].reshape(-1)
    flat[1] = flat[1] + 1
    with pytest.raises(RuntimeError, match="weight: "):
        other.load_state_dict(state)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize(
    ("text", "backend"),
    [("sparse50-int8-g16", "triton"), ("sparse70-int4", "reference"), ("sparse50-bf16", "cpu")],
)
def test_opcheck(text: str, backend: str) -> None:
    weight = lath.quantize(torch.randn(20, 64), text)
    arguments = (
        torch.randn(3, 64), list(weight.tensors.values()), torch.randn(20), str(weight.codec),
        20, 64, "int8-g32", backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.lath.linear.default, arguments)
    if backend == "reference":
        x, *rest = (*arguments[:-2], "float", backend)
        torch.library.opcheck(torch.ops.lath.linear.default, (x.requires_grad_(), *rest))
        torch.library.opcheck(
            torch.ops.lath.quantize.default, (torch.randn(9, 40), text, False, None)
        )


def masked(model: nn.Module, share: int) -> nn.Module:
    """The model with the smallest weights of its linear layers at zero, its output layer as is."""
    other = copy.deepcopy(model)
    for name, module in other.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            weight = module.weight.detach()
            module.weight.data = weight * quantize_sparse.keep(weight, share)
    return other


@torch.inference_mode()
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_patched_model_is_the_masked_model(backend: str) -> None:
    """All linear layers replaced automatically; 16-bit weights are exact, so sums alone differ. A
    second call does not wrap again."""
    model, ids = hf_model("Llama", torch.bfloat16).float(), torch.arange(1, 41).reshape(2, 20)
    expected = masked(model, 50)(ids).logits
    dense = model(ids).logits
    report = lath.patch(
        model, "sparse50-bf16", activations="float", backend=backend, progress=False
    )
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == len(report.replaced) == 14
    assert all(isinstance(layer.qtensor, SparseTensor) for layer in layers)
    got = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    # Negative control: what was pruned is far more than the tolerance.
    assert float((dense - expected).abs().max()) > 0.01 * float(expected.abs().max())
    again = lath.patch(model, "sparse50-bf16", activations="float", backend=backend, progress=False)
    assert not again.replaced
    assert [m for m in model.modules() if isinstance(m, PackedLinear)] == layers
    report.undo()
    assert torch.equal(model(ids).logits, dense)


@torch.inference_mode()
def test_a_model_that_was_pruned_before_keeps_its_own_zeros() -> None:
    """The mask of another method: sparse0 takes it as it is, and a lower share adds nothing."""
    model, ids = masked(hf_model("Llama"), 75), torch.arange(1, 21)[None]
    zeros = {name: p == 0 for name, p in model.named_parameters()}
    expected = model(ids).logits
    for text in ("sparse0-bf16", "sparse0-int8", "sparse50-int8"):
        with lath.patch(model, text, activations="float", backend="cpu", progress=False):
            for name, module in model.named_modules():
                if isinstance(module, PackedLinear):
                    assert isinstance(module.qtensor, SparseTensor)
                    assert torch.equal(~module.qtensor.mask(), zeros[f"{name}.weight"])
            close = _relative(model(ids).logits, expected)
        assert close < 0.02, text


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
