"""Weights that change under a compiled step: replaced, loaded, moved, written in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_hf_decode import ROUNDING, decoder, fused_tokens, patched, steps

from hf_models import relative

pytest.importorskip("transformers")
pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("no_grad")


def scale_norm(model: Any) -> None:
    model.model.norm.weight.mul_(2)


def replace_norm(model: Any) -> None:
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight * 2)


def replace_data(model: Any) -> None:
    model.model.norm.weight.data = model.model.norm.weight * 2


def load_linear(model: Any) -> None:
    own, other = model.model.layers[0].mlp.down_proj, model.model.layers[1].mlp.down_proj
    own.load_state_dict(other.state_dict())


def swap_linear(model: Any) -> None:
    model.model.layers[0].mlp.down_proj = model.model.layers[1].mlp.down_proj


def swap_layers(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number


def cast(model: Any) -> None:
    model.to(torch.bfloat16)
    model.to(torch.float32)


def write_codes(model: Any) -> None:
    own, other = model.model.layers[0].mlp.down_proj, model.model.layers[1].mlp.down_proj
    own.weight.copy_(other.weight)


def write_scales(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight_scale.mul_(2)


def replace_scales(model: Any) -> None:
    linear = model.model.layers[0].self_attn.v_proj
    linear.weight_scale.data = linear.weight_scale * 2


CHANGES = (
    write_codes,
    write_scales,
    replace_scales,
    scale_norm,
    replace_norm,
    replace_data,
    load_linear,
    swap_linear,
    swap_layers,
    cast,
)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change: Callable[[Any], None]) -> None:
    first, second = decoder("Llama"), decoder("Llama")
    patched(first, "modules")
    change(first)
    expected = steps(first, 70, 3)
    report = patched(second, "fused")
    before = steps(second, 70, 3)
    change(second)
    out = steps(second, 70, 3)
    assert fused_tokens(report) == 6
    assert relative(out - expected, expected) < ROUNDING
    if change is not cast:
        assert relative(before - expected, expected) > 100 * ROUNDING


def test_a_bias_written_in_place_is_noticed() -> None:
    first, second = decoder("Qwen2"), decoder("Qwen2")
    patched(first, "modules")
    report = patched(second, "fused")
    before = steps(second, 70, 3)
    for model in (first, second):
        model.model.layers[0].self_attn.v_proj.bias.add_(3)
    expected, out = steps(first, 70, 3), steps(second, 70, 3)
    assert fused_tokens(report) == 6
    assert relative(out - expected, expected) < ROUNDING
    assert relative(before - expected, expected) > 100 * ROUNDING
