"""What the probe admits: every right model is below it, in every dtype and activation format, and
models that are wrong in one thing are above. Helpers are those of test_hf_decode.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_hf_decode import changed, decoder
from torch import Tensor

import lath

pytest.importorskip("transformers")
pytest.importorskip("numba")
from lath.formats.activations import activation_format
from lath.integration import decode_probe
from lath.integration.decode_tolerance import codes_of
from lath.reference.linear import decode_activations

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("float", "int8-g32", "int8", "int6-g32", "fp8", "fp8-e5m2")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}

pytestmark = pytest.mark.usefixtures("no_grad")


def fuse(model: Any, activations: str) -> None:
    """ValueError where the probe refuses."""
    lath.patch(
        model, "int4-g32", skip=(), activations=activations, attention="int8", kv="int8",
        decode="fused",
    )  # fmt: skip


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [{}, pytest.param(WIDE, marks=pytest.mark.slow)])
def test_right_models_are_admitted(
    sizes: dict[str, int], dtype: torch.dtype, activations: str
) -> None:
    """BitNet rounds most; SmolLM3 has layers with and without rotation."""
    for name in ("BitNet", "SmolLM3"):
        fuse(decoder(name, dtype, **sizes), activations)


# Faults: what a stack becomes whose second layer is wrong in one thing, as a bug would have it


def other_weight(stack: Any) -> Any:
    """The rows of up in another order."""
    product = stack.layers[1].up
    weight = lath.quantize(product.weight.dequantize().flip(0), "int4-g32")
    return changed(stack, up=dataclasses.replace(product, weight=weight))


def swapped_heads(stack: Any) -> Any:
    """The values of the two KV heads."""
    product = stack.layers[1].value
    dense = product.weight.dequantize().view(2, stack.head_dim, -1).flip(0).flatten(0, 1)
    weight = lath.quantize(dense, "int4-g32")
    return changed(stack, value=dataclasses.replace(product, weight=weight))


def other_order_of_heads(stack: Any) -> Any:
    """Query heads shared out among KV heads in turn, not in blocks: output's columns by heads."""
    product = stack.layers[1].output
    dense = product.weight.dequantize()
    heads = dense.view(len(dense), 4, stack.head_dim)[:, [0, 2, 1, 3]].flatten(1)
    weight = lath.quantize(heads, "int4-g32")
    return changed(stack, output=dataclasses.replace(product, weight=weight))


FAULTS: dict[str, Callable[[Any], Any]] = {
    "weight": other_weight,
    "swapped heads": swapped_heads,
    "order of heads": other_order_of_heads,
}


def spoil(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], Any]) -> None:
    real = decode_probe.stack_of
    monkeypatch.setattr(decode_probe, "stack_of", lambda *given: fault(real(*given)))


@pytest.mark.parametrize("activations", ["float", "int8-g32", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_stacks_are_refused(
    fault: str, dtype: torch.dtype, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, FAULTS[fault])
    with pytest.raises(ValueError, match="layer 1 is computed differently"):
        fuse(decoder("Llama", dtype), activations)


def turned_back(table: Tensor) -> Tensor:
    """The sines with the other sign."""
    return torch.stack([table[:, 0], -table[:, 1]], dim=1)


def at_the_next_position(table: Tensor) -> Tensor:
    return table.roll(-1, 0)


def in_pairs(table: Tensor) -> Tensor:
    """The angles of neighbours, not of halves."""
    half = table.shape[-1] // 2
    return torch.cat([table[..., :half].repeat_interleave(2, -1)], dim=-1)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [turned_back, at_the_next_position, in_pairs])
def test_wrong_rotations_are_refused(
    fault: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    activations: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = decode_probe.rotations
    monkeypatch.setattr(decode_probe, "rotations", lambda *given: fault(real(*given)).contiguous())
    with pytest.raises(ValueError, match=r"layer \d is computed differently"):
        fuse(decoder("Llama", dtype), activations)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.0005), (torch.float16, 1.01),
                                               (torch.bfloat16, 1.05)])  # fmt: skip
def test_without_codes_small_faults_show(
    dtype: torch.dtype, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is too large by so much: what constants in `forward` would do."""

    def enlarged(stack: Any) -> Any:
        layer = stack.layers[1]
        norms = {
            name: dataclasses.replace(norm, weight=norm.weight * factor)
            for name in ("attention_norm", "mlp_norm")
            for norm in [getattr(layer, name)]
        }
        return changed(stack, **norms)

    spoil(monkeypatch, enlarged)
    with pytest.raises(ValueError, match="layer 1 is computed differently"):
        fuse(decoder("Llama", dtype), "float")


@pytest.mark.parametrize("activations", ACTIVATIONS[1:])
def test_the_share_of_codes_is_what_is_counted(activations: str) -> None:
    """c of the derivation, by rounding normal numbers twice, a little apart."""
    fmt = activation_format(activations)
    for spread in (0.0, 1.5):  # normal numbers, and such as have outliers
        x = torch.randn(400, 512) * torch.exp(spread * torch.randn(512))
        apart = 1e-3
        moved = x * (1 + apart * (2 * torch.randint(0, 2, x.shape) - 1))
        first, second = (
            torch.from_numpy(decode_activations(each.numpy(), fmt)) for each in (x, moved)
        )
        counted = (second - first).square().sum(1) / x.square().sum(1)
        bounds = torch.tensor([apart * codes_of(row, fmt).share + apart**2 for row in x])
        assert float(counted.mean()) < float(bounds.mean())
        assert float(counted.mean()) > float(bounds.mean()) / 4
